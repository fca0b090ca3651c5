//! Takes the memory that a lazy dump left in its stopped tasks, so that the folder becomes a complete image.
//!
//! ```text
//!  pagemap-7.img   present  lazy  lazy  present      the dump's      pages-3.img  aa dd
//!                  aa       ·     ·     dd
//!  pagemap-7.img   present  both  both  present      ours            pages-3.img  aa bb cc dd, as a stream
//! ```
//! The pages file holds the present runs in the pagemap's order. It becomes a [stream](crate::chunks) of the
//! image: a plan of pieces, each of the dump's own pages and of the task's memory, is worked off by some threads.

use std::{
    collections::BTreeSet,
    fs, io,
    path::{Path, PathBuf},
};

use crate::{
    chunks::{ChunkError, ChunkWriter},
    criu_image::{CriuImageError, Pagemap},
    precopy::Precopied,
};

mod copy;
pub(crate) mod plan;
mod tasks;

pub use tasks::{Task, Tasks, start_time};

/// Why the pages could not be copied. The checkpoint must fail then: the image has holes.
#[derive(Debug, thiserror::Error)]
pub enum PagesError {
    /// The list of the container's processes could not be read.
    #[error("cannot list the processes of the container: {path}")]
    Tasks {
        /// What was being read.
        path: String,
        /// What the kernel said.
        source: io::Error,
    },
    /// A process is in a PID namespace below the container's.
    #[error(
        "process {pid} of the container is in a PID namespace of its own, which CRIU cannot dump"
    )]
    NestedPidNamespace {
        /// Its number here.
        pid: i32,
    },
    /// An image names a process that is not there.
    #[error("{} belongs to process {pid} of the container, which is not among its stopped processes", path.display())]
    NoSuchTask {
        /// The pagemap.
        path: PathBuf,
        /// The process's number in the container.
        pid: i32,
    },
    /// CRIU's image is not as it should be.
    #[error(transparent)]
    Image(#[from] CriuImageError),
    /// A page could not be read.
    #[error(
        "cannot read {bytes} bytes at {vaddr:#x} of process {pid}: the image would have a hole"
    )]
    Memory {
        /// Its number here.
        pid: i32,
        /// Virtual address.
        vaddr: u64,
        /// Bytes from there.
        bytes: u64,
        /// What the kernel said.
        source: io::Error,
    },
    /// A chunk could not be stored.
    #[error(transparent)]
    Chunk(#[from] ChunkError),
    /// A file of the dump could not be read or removed.
    #[error("cannot {doing} {}", path.display())]
    File {
        /// "read", "remove".
        doing: &'static str,
        /// Which.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
}

impl PagesError {
    fn file<'a>(doing: &'static str, path: &'a Path) -> impl FnOnce(io::Error) -> Self + 'a {
        move |source| Self::File {
            doing,
            path: path.to_owned(),
            source,
        }
    }

    /// Whether the store's disk is full.
    pub fn is_full(&self) -> bool {
        match self {
            Self::File { source, .. } => rekindle_store::is_full(source),
            Self::Chunk(error) => error.is_full(),
            _ => false,
        }
    }
}

/// Stores all pages of the lazy dump in `criu_dir`, those that it wrote and those that it left in `tasks`, and
/// says in its pagemaps that they are all there. What was stored `before` is not read again.
///
/// To be called only while the tasks are stopped by the dump.
///
/// # Errors
/// When one page cannot be read or stored. The folder is then no image: remove it.
pub fn take_pages(
    criu_dir: &Path,
    tasks: &Tasks,
    before: &Precopied,
    writer: &ChunkWriter,
) -> Result<(), PagesError> {
    let mut seen = BTreeSet::new();
    for (path, pid) in pagemaps(criu_dir)? {
        let plan = plan::Plan::read(criu_dir, &path)?;
        let task = match pid {
            Some(pid) if plan.left_behind => {
                let task = tasks.by_container_pid(pid);
                Some(task.ok_or_else(|| PagesError::NoSuchTask {
                    path: path.clone(),
                    pid,
                })?)
            }
            _ => None,
        };
        let what = if plan.left_behind && task.is_none() {
            "it is shared memory, which a dump never leaves behind"
        } else if !seen.insert(plan.pages.clone()) {
            "it names the pages file of another one"
        } else {
            copy::pages(&plan, task, before, writer)?;
            plan::mark_present(&path, &plan)?;
            continue;
        };
        return Err(CriuImageError::Malformed { path, what }.into());
    }
    Ok(())
}

/// Bytes of pages that the dump left in the tasks, for a look at the free space before.
///
/// # Errors
/// When the pagemaps cannot be read.
pub fn lazy_bytes(criu_dir: &Path) -> Result<u64, PagesError> {
    let page_size = rustix::param::page_size() as u64;
    let mut bytes = 0;
    for (path, _) in pagemaps(criu_dir)? {
        let mut map = Pagemap::open(&path)?;
        while let Some(run) = map.next_run()? {
            if run.left_behind() {
                bytes += run.bytes(page_size);
            }
        }
    }
    Ok(bytes)
}

/// All pagemaps, by name: `pagemap-<pid>.img` with the number, and those of shared memory without.
pub(crate) fn pagemaps(criu_dir: &Path) -> Result<Vec<(PathBuf, Option<i32>)>, PagesError> {
    let mut found = Vec::new();
    for entry in fs::read_dir(criu_dir).map_err(PagesError::file("list", criu_dir))? {
        let path = entry.map_err(PagesError::file("list", criu_dir))?.path();
        let name = path.file_name().and_then(|name| name.to_str());
        let of = name.and_then(|name| name.strip_prefix("pagemap-")?.strip_suffix(".img"));
        if let Some(of) = of {
            let pid = of.parse().ok();
            found.push((path, pid));
        }
    }
    found.sort();
    Ok(found)
}

#[cfg(test)]
mod tests;
