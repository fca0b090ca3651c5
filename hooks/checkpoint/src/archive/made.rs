//! What was put among the files of others, so that it alone can be removed again.

use std::{
    fs::File,
    path::{Path, PathBuf},
};

use rustix::fs::{AtFlags, FileType, OFlags, statat, unlinkat};

use super::open_beneath;

/// Paths that were made in a folder that others use too, in their order, with their inodes: those of a
/// tmpfs, as `/dev/shm` is one, are not used again.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Made(Vec<(PathBuf, u64)>);

impl Made {
    pub(super) fn note(&mut self, path: &Path, inode: u64) {
        self.0.push((path.to_owned(), inode));
    }

    /// Removes it, as far as it is still what was made. What it replaced does not come back, and a folder
    /// in which others have put something stays.
    pub fn remove(&self, from: &File) {
        for (path, inode) in self.0.iter().rev() {
            let parent = path.parent().unwrap_or(Path::new(""));
            let (Some(name), Ok(dir)) = (
                path.file_name(),
                open_beneath(from, parent, OFlags::PATH | OFlags::DIRECTORY),
            ) else {
                continue;
            };
            if let Ok(stat) = statat(&dir, name, AtFlags::SYMLINK_NOFOLLOW)
                && stat.st_ino == *inode
            {
                let flags = match FileType::from_raw_mode(stat.st_mode) {
                    FileType::Directory => AtFlags::REMOVEDIR,
                    _ => AtFlags::empty(),
                };
                let _ = unlinkat(&dir, name, flags);
            }
        }
    }
}
