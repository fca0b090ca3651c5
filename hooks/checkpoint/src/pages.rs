//! Copies the memory that a lazy dump left in its stopped tasks, so that the folder becomes a complete
//! image that stock CRIU restores, lazily or not.
//!
//! ```text
//!  pagemap-7.img   present  lazy  lazy  present      the dump's      pages-3.img  aa dd
//!                  aa       ·     ·     dd
//!  pagemap-7.img   present  both  both  present      ours            pages-3.img  aa bb cc dd
//! ```
//! The pages file holds the present runs in the pagemap's order, so it is written anew: a plan of pieces,
//! each a part of the old file or of a task's memory, is worked off by two threads, every byte is
//! checksummed as it passes, and the plan's order gives the whole file's checksum.

use std::{
    fs, io,
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

use crate::{criu_image::CriuImageError, manifest::FileEntry};

mod copy;
mod plan;
mod tasks;

pub use tasks::{Task, Tasks};

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
    /// A file of the image could not be read or written.
    #[error("cannot {doing} {}", path.display())]
    File {
        /// "write", "read".
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
        matches!(self, Self::File { source, .. } if rekindle_store::is_full(source))
    }
}

/// What was copied.
#[derive(Debug)]
pub struct Copied {
    /// The pages files and pagemaps that were written, for [`Partial::seal`](crate::Partial::seal).
    pub files: Vec<FileEntry>,
    /// Bytes that came from the tasks' memory.
    pub bytes: u64,
    /// How long it took: the tasks were stopped for all of it.
    pub took: Duration,
}

/// Copies all pages that the lazy dump in `criu_dir` left in `tasks`, and completes its images.
///
/// To be called only while the tasks are stopped by the dump.
///
/// # Errors
/// When one page cannot be read, or a file cannot be written. The folder is then no image: remove it.
pub fn copy_lazy_pages(criu_dir: &Path, tasks: &Tasks) -> Result<Copied, PagesError> {
    let begun = Instant::now();
    let mut copied = Copied {
        files: Vec::new(),
        bytes: 0,
        took: Duration::ZERO,
    };
    for (path, pid) in process_pagemaps(criu_dir)? {
        let Some(plan) = plan::Plan::read(criu_dir, &path)? else {
            continue;
        };
        let task = tasks.by_container_pid(pid);
        let task = task.ok_or_else(|| PagesError::NoSuchTask {
            path: path.clone(),
            pid,
        })?;
        copied.files.push(copy::pages(&plan, task)?);
        copied.files.push(plan::mark_present(&path, &plan)?);
        copied.bytes += plan.left_behind;
    }
    copied.took = begun.elapsed();
    Ok(copied)
}

/// Bytes that [`copy_lazy_pages`] will read from the tasks, for a look at the free space before.
///
/// # Errors
/// When the pagemaps cannot be read.
pub fn lazy_bytes(criu_dir: &Path) -> Result<u64, PagesError> {
    let mut bytes = 0;
    for (path, _) in process_pagemaps(criu_dir)? {
        bytes += plan::Plan::read(criu_dir, &path)?.map_or(0, |plan| plan.left_behind);
    }
    Ok(bytes)
}

/// `pagemap-<pid>.img` with the number, in its order; those of shared memory have another name and are
/// never lazy.
fn process_pagemaps(criu_dir: &Path) -> Result<Vec<(PathBuf, i32)>, PagesError> {
    let mut found = Vec::new();
    for entry in fs::read_dir(criu_dir).map_err(PagesError::file("list", criu_dir))? {
        let path = entry.map_err(PagesError::file("list", criu_dir))?.path();
        let pid = path.file_name().and_then(|name| {
            let name = name.to_str()?.strip_prefix("pagemap-")?;
            name.strip_suffix(".img")?.parse::<i32>().ok()
        });
        found.extend(pid.map(|pid| (path, pid)));
    }
    found.sort_by_key(|(_, pid)| *pid);
    Ok(found)
}

#[cfg(test)]
mod tests;
