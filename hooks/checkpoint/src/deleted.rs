//! Deleted files that a container still uses, brought into the archives under the names that CRIU's
//! restore looks for.
//!
//! A file that is deleted and has another name (a POSIX semaphore of PyTorch, as glibc makes it) is not in
//! CRIU's images: `link-remap` links it back as `link_remap.<id>` beside where it was. A dump that leaves
//! the tasks running removes those links *before* it serves lazy pages (`cr_dump_finish` of
//! `criu/cr-dump.c`), so in our window they are gone already. The files are not: the stopped tasks hold
//! them, and `/proc` gives them to us.

use std::{
    fs::{self, File},
    io,
    os::unix::ffi::OsStrExt,
    path::{Path, PathBuf},
};

use crate::{
    criu_image::{CriuImageError, LinkRemap, link_remaps},
    pages::Tasks,
};

/// What `/proc` writes behind the name of a deleted file.
const SUFFIX: &[u8] = b" (deleted)";

/// Why a deleted file could not be brought along. The image could not be restored without it.
#[derive(Debug, thiserror::Error)]
pub enum DeletedError {
    /// CRIU's images could not be read.
    #[error(transparent)]
    Image(#[from] CriuImageError),
    /// `/proc` could not be read.
    #[error("cannot look for the deleted files of the container in {}", path.display())]
    Proc {
        /// What was being read.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// No process has it.
    #[error("{} is deleted and the dump needs it, but no process of the container has it open", .0.display())]
    Lost(PathBuf),
    /// It is on a volume, which does not travel.
    #[error("{} is deleted and still open, and lies on the volume {}, which is not part of an image: close it before the checkpoint, or use another folder for it", deleted.display(), mount.display())]
    OnVolume {
        /// The file.
        deleted: PathBuf,
        /// The mount.
        mount: PathBuf,
    },
}

/// One deleted file.
#[derive(Debug)]
pub struct DeletedFile {
    /// Where a restore looks for it, absolute in the container.
    pub link: PathBuf,
    /// The name it was deleted under, absolute in the container.
    pub deleted: PathBuf,
    /// The file.
    pub file: File,
}

/// The deleted files of a container that is being dumped.
#[derive(Debug, Default)]
pub struct DeletedFiles(Vec<DeletedFile>);

impl DeletedFiles {
    /// Finds the files that the dump in `criu_dir` linked back, at the stopped `tasks`.
    ///
    /// # Errors
    /// When one of them is not found: the image could not be restored.
    pub fn find(criu_dir: &Path, tasks: &Tasks) -> Result<Self, DeletedError> {
        let mut missing = link_remaps(criu_dir)?;
        let mut found = Vec::new();
        for task in tasks.all() {
            if missing.is_empty() {
                break;
            }
            let proc = PathBuf::from(format!("/proc/{}", task.pid));
            for folder in ["map_files", "fd"] {
                take(&proc.join(folder), &mut missing, &mut found)?;
            }
        }
        match missing.into_iter().next() {
            Some(lost) => Err(DeletedError::Lost(lost.deleted)),
            None => Ok(Self(found)),
        }
    }

    /// Those that belong into the archive of `folder` (`/` or `/dev/shm`), given all mounts of the
    /// container: those whose innermost mount is that folder.
    pub fn of<'a>(
        &'a self,
        folder: &'a Path,
        mounts: impl IntoIterator<Item = &'a str> + Clone + 'a,
    ) -> impl Iterator<Item = &'a DeletedFile> {
        self.0
            .iter()
            .filter(move |file| innermost(&file.link, mounts.clone()) == folder)
    }

    /// Refuses when one lies on a mount that is neither packed nor one of CRIU's own (`/` and those in
    /// `travelling`: `/dev/shm`, and the container's tmpfs mounts, whose content CRIU dumps).
    ///
    /// # Errors
    /// [`DeletedError::OnVolume`].
    pub fn require_travelling<'a>(
        &self,
        mounts: impl IntoIterator<Item = &'a str> + Clone,
        travelling: &[&str],
    ) -> Result<(), DeletedError> {
        for file in &self.0 {
            let mount = innermost(&file.link, mounts.clone());
            if mount != Path::new("/") && !travelling.iter().any(|path| Path::new(path) == mount) {
                return Err(DeletedError::OnVolume {
                    deleted: file.deleted.clone(),
                    mount: mount.to_owned(),
                });
            }
        }
        Ok(())
    }
}

/// The mount that a path is on: the longest one that it begins with.
fn innermost<'a>(path: &Path, mounts: impl IntoIterator<Item = &'a str>) -> &'a Path {
    mounts
        .into_iter()
        .map(Path::new)
        .filter(|mount| path.starts_with(mount))
        .max_by_key(|mount| mount.components().count())
        .unwrap_or(Path::new("/"))
}

/// Opens what is missing and linked from this folder of `/proc`.
fn take(
    folder: &Path,
    missing: &mut Vec<LinkRemap>,
    found: &mut Vec<DeletedFile>,
) -> Result<(), DeletedError> {
    let proc = |path: &Path| {
        let path = path.to_owned();
        |source| DeletedError::Proc { path, source }
    };
    for entry in fs::read_dir(folder).map_err(proc(folder))? {
        let path = entry.map_err(proc(folder))?.path();
        let Ok(target) = fs::read_link(&path) else {
            continue;
        };
        let Some(deleted) = target.as_os_str().as_bytes().strip_suffix(SUFFIX) else {
            continue;
        };
        // One file may be deleted under one name and be linked back more than once.
        while let Some(at) = missing
            .iter()
            .position(|remap| remap.deleted.as_os_str().as_bytes() == deleted)
        {
            let file = File::open(&path).map_err(proc(&path))?;
            let LinkRemap { deleted, link } = missing.swap_remove(at);
            found.push(DeletedFile {
                link,
                deleted,
                file,
            });
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
