//! What datasets and checkpoint images share: they become visible by [rename](publish), are written by
//! one process at a time ([`Lock`]), prove themselves by [checksum](crc), and check for [room](space) first.
//!
//! No network and no runtime: every call here blocks. Callers on a runtime use `spawn_blocking`. Only the clients of
//! [object stores](s3), behind the feature `s3`, and that of [registries](registry), behind `registry`, are asynchronous.
#![forbid(unsafe_code)]
#![warn(missing_docs)]

pub mod crc;
mod lock;
mod publish;
#[cfg(feature = "registry")]
pub mod registry;
#[cfg(feature = "s3")]
pub mod s3;
pub mod space;

use std::{
    io,
    path::{Path, PathBuf},
};

pub use lock::Lock;
pub use publish::{
    commit_file, make_read_only, publish_dir, remove_tree, replace_file, sync_dir, sync_tree,
    write_file,
};

/// Why something could not be stored.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The destination is already there; it was left as it is.
    #[error("{} is already published", .0.display())]
    Exists(PathBuf),
    /// Not enough room, found before anything was written.
    #[error("{needed} bytes are needed below {}, and {free} are free: remove something there (`rekindle dataset rm`, `rekindle image rm`) or move the store", path.display())]
    NoSpace {
        /// Where.
        path: PathBuf,
        /// Bytes that would be written.
        needed: u64,
        /// Bytes that an unprivileged writer may still write there.
        free: u64,
    },
    /// Something is neither a regular file nor a folder.
    #[error("{} is neither a regular file nor a folder", .0.display())]
    Foreign(PathBuf),
    /// The file system refused.
    #[error("cannot {doing} {}", path.display())]
    Io {
        /// What was being done: "sync", "rename".
        doing: &'static str,
        /// To what.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
}

impl StoreError {
    /// For `map_err`: what was being done, to what.
    pub fn io<'a>(doing: &'static str, path: &'a Path) -> impl FnOnce(io::Error) -> Self + 'a {
        move |source| Self::Io {
            doing,
            path: path.to_owned(),
            source,
        }
    }

    /// Whether the disk (or a quota on it) is full.
    pub fn is_full(&self) -> bool {
        match self {
            Self::NoSpace { .. } => true,
            Self::Io { source, .. } => is_full(source),
            Self::Exists(_) | Self::Foreign(_) => false,
        }
    }
}

/// Whether an I/O error says that the disk (or a quota on it) is full.
pub fn is_full(error: &io::Error) -> bool {
    matches!(
        error.kind(),
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded
    )
}
