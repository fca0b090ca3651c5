//! A container's writable layer and its `/dev/shm`, as tar archives: packed while its tasks are stopped,
//! unpacked before the new container's root is mounted.
//!
//! What an overlay's upper layer says beyond plain files travels too: whiteouts (character device 0/0),
//! opaque folders, other extended attributes, hard links, holes, owners, times. Sockets do not: CRIU makes
//! them anew. Device nodes other than whiteouts do not either: a container gets its devices from its spec.
//!
//! Extended attributes are PAX records with hexadecimal values, for the `tar` crate splits PAX records at
//! newlines, which binary values contain.

use std::{
    fs::File,
    io,
    os::fd::{AsFd, OwnedFd},
    path::{Path, PathBuf},
};

use rustix::fs::{Mode, OFlags, ResolveFlags, openat2};

mod attributes;
#[cfg(feature = "archives")]
pub(crate) mod layer;
mod list;
mod made;
#[cfg(feature = "archives")]
pub(crate) mod members;
mod pack;
mod unpack;

pub use list::{Change, Difference, Kind, Listed, differences, list};
pub use made::Made;
pub use pack::{Packed, Sink, pack, pack_with_deleted};
pub use unpack::{Existing, Unpacked, unpack};

/// Deepest folder that is packed or unpacked. Each level costs a descriptor while packing.
const MAX_DEPTH: usize = 200;
/// Most bytes that the files of one archive may claim to have, holes included: at the speed at which zeros
/// are skipped, two minutes.
const MAX_BYTES: u64 = 1 << 40;

/// Why something could not be packed or unpacked. After an error of `unpack` nothing that it made is left.
#[derive(Debug, thiserror::Error)]
pub enum ArchiveError {
    /// The file system refused.
    #[error("cannot {doing} {path:?}")]
    Io {
        /// "read", "make".
        doing: &'static str,
        /// What, relative to the folder that is packed or unpacked.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// The archive is not one of ours.
    #[error("the archive is malformed or cut short at {path:?}")]
    Malformed {
        /// The last name that was seen.
        path: PathBuf,
        /// What the reader said.
        source: io::Error,
    },
    /// An entry would leave the folder, or has a name that we never write.
    #[error("the archive names {name:?}, which is not a plain path below its folder")]
    Name {
        /// The name, shortened.
        name: String,
    },
    /// An entry is a device.
    #[error(
        "the archive holds the device node {name:?}: a container gets its devices from its spec only"
    )]
    Device {
        /// The name, shortened.
        name: String,
    },
    /// An entry is of a kind that we never write.
    #[error("the archive holds {name:?} of a kind that is never packed")]
    Kind {
        /// The name, shortened.
        name: String,
    },
    /// An entry is there already.
    #[error("the archive names {name:?}, which is there already")]
    Exists {
        /// The name, shortened.
        name: String,
    },
    /// Too deep.
    #[error("{0:?} is more than {MAX_DEPTH} folders deep")]
    TooDeep(PathBuf),
    /// Too many of them.
    #[error("the archive has more members, or longer names, than any real one")]
    TooMany,
    /// More bytes than are ever unpacked.
    #[error("the files of the archive claim {claimed} bytes, and at most {max} are accepted")]
    TooLarge {
        /// Bytes claimed up to the entry that went over.
        claimed: u64,
        /// What is accepted.
        max: u64,
    },
    /// A file whose data is still in a lower layer.
    #[error(
        "{0:?} is a copy of metadata only (overlay's metacopy): mount the overlay with metacopy=off"
    )]
    Metacopy(PathBuf),
}

impl ArchiveError {
    fn io<'a, E: Into<io::Error>>(
        doing: &'static str,
        path: &'a Path,
    ) -> impl FnOnce(E) -> Self + 'a {
        move |source| Self::Io {
            doing,
            path: path.to_owned(),
            source: source.into(),
        }
    }

    /// Whether the disk is full.
    pub fn is_full(&self) -> bool {
        matches!(self, Self::Io { source, .. } if rekindle_store::is_full(source))
    }
}

/// Opens a folder inside a container's root, as its own processes would: `/proc/<pid>/root` and
/// `dev/shm`. A symlink in there leads to a place in there; a plain path would follow it on the host.
///
/// # Errors
/// What the kernel says; `NotFound` where the container has no such folder.
pub fn open_in_root(root: &Path, path: &Path) -> io::Result<File> {
    let root = File::open(root)?;
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
    let path = path.strip_prefix("/").unwrap_or(path);
    Ok(File::from(openat2(
        &root,
        path,
        flags,
        Mode::empty(),
        resolve,
    )?))
}

/// Opens a folder by its path on this host, for [`pack`] and [`unpack`]; not through a final symlink.
///
/// # Errors
/// What the kernel says.
pub fn open_dir(path: &Path) -> io::Result<File> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    Ok(File::from(rustix::fs::open(path, flags, Mode::empty())?))
}

/// Opens a folder below another, never leaving it and never following a link.
fn open_beneath(dir: impl AsFd, path: &Path, flags: OFlags) -> rustix::io::Result<OwnedFd> {
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
    let path = if path.as_os_str().is_empty() {
        Path::new(".")
    } else {
        path
    };
    openat2(
        dir,
        path,
        flags | OFlags::CLOEXEC | OFlags::NOFOLLOW,
        Mode::empty(),
        resolve,
    )
}

#[cfg(test)]
mod tests;
