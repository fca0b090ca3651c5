//! Checkpoint archives of containerd: what the kubelet's checkpoint API and `ctr` leave becomes an image, and an image
//! becomes what containerd's CRI restores.
//!
//! ```text
//!  the kubelet's (CheckpointContainer)          ctr containers checkpoint, then ctr images export
//!    checkpoint/*.img    CRIU's files             index.json ─▶ an index, whose manifests are
//!    rootfs-diff.tar     the writable layer         …criu.tar       CRIU's files, as an archive
//!    spec.dump           the container's spec       …layer…         the writable layer
//!    config.dump         its id and image           …config+proto   the container's spec
//! ```
//! Whoever reads one treats it as hostile. It is listed first, without reading what is in it: kinds, names, counts and
//! sizes are bounded then. CRIU's files are those of any image, and checked as such. Pages are read once, and go into
//! chunks as they come. What such an archive does not say is not guessed: see [`Unknown`](crate::manifest::Unknown).

use std::{
    fs::File,
    io,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};

use rekindle_core::name::{ImageName, Namespace};
use rekindle_store::StoreError;

use crate::{
    archive::ArchiveError,
    chunks::ChunkError,
    criu_image::CriuImageError,
    image::{ImageError, open_regular},
    layout::{BlobDigest, LayoutError},
    manifest::{DumpFlags, ManifestError, shorten},
    pages::PagesError,
};

mod export;
mod facts;
mod forms;
mod import;
#[cfg(test)]
mod tests;

pub use export::{Exported, export};
pub use import::Imported;

/// CRIU's files in the kubelet's archive, and the other files beside that folder; the names are those of
/// `checkpointctl/lib/metadata`, which containerd, CRI-O and Podman share.
const CHECKPOINT: &str = "checkpoint/";
const ROOTFS_DIFF: &str = "rootfs-diff.tar";
const SHM_TAR: &str = "devshm-checkpoint.tar";
const SPEC_DUMP: &str = "spec.dump";
const CONFIG_DUMP: &str = "config.dump";
const STATUS_DUMP: &str = "status.dump";
/// Where a pod's containers share memory, which the sandbox lends them.
const SHM: &str = "/dev/shm";

/// Most bytes of a file of JSON.
const MAX_JSON: u64 = 16 << 20;
/// Most bytes of CRIU's files without the pages. A file that was deleted while it was open is among them, and what a
/// container has in a tmpfs of its own.
const MAX_CRIU: u64 = 64 << 30;

/// Why an archive did not become an image, or an image an archive. Nothing is left then.
#[derive(Debug, thiserror::Error)]
pub enum ForeignError {
    /// It is not one.
    #[error("{} is no checkpoint archive: {reason}", path.display())]
    NotOne {
        /// The archive.
        path: PathBuf,
        /// What was found.
        reason: String,
    },
    /// It is compressed, and could not be listed before it is read.
    #[error("{} is compressed with {with}: unpack it first (`{unpack} {}`)", path.display(), path.display())]
    Compressed {
        /// The archive.
        path: PathBuf,
        /// With what.
        with: &'static str,
        /// What unpacks it.
        unpack: &'static str,
    },
    /// It is malformed, or holds what no checkpoint does.
    #[error("{what} of {} is refused", path.display())]
    Archive {
        /// "the archive", "the writable layer".
        what: &'static str,
        /// The archive.
        path: PathBuf,
        /// Why.
        source: ArchiveError,
    },
    /// A file of it is not what it has to be.
    #[error("{} is refused: its {file:?} {what}", path.display())]
    File {
        /// The archive.
        path: PathBuf,
        /// The file in it.
        file: String,
        /// What is wrong with that.
        what: String,
    },
    /// A process needs a file that nobody kept.
    #[error(
        "{} cannot be restored: a process has {file:?} open, and {why}; `rekindle checkpoint` makes an image that has such files",
        path.display()
    )]
    Lost {
        /// The archive.
        path: PathBuf,
        /// The file, in the container.
        file: String,
        /// Why it is not there.
        why: &'static str,
    },
    /// An encrypted image would be written in clear.
    #[error(
        "{0} is encrypted, and the archive would have its memory in clear: --plain says that this is meant"
    )]
    Encrypted(String),
    /// CRIU's files are refused.
    #[error("the checkpoint in {} is refused", path.display())]
    Criu {
        /// The archive.
        path: PathBuf,
        /// Why.
        source: CriuImageError,
    },
    /// Its pages are refused.
    #[error("the pages in {} are refused", path.display())]
    Pages {
        /// The archive.
        path: PathBuf,
        /// Why.
        source: PagesError,
    },
    /// What our own shim wrote beside CRIU's files is refused.
    #[error("what rekindle wrote into {} is refused", path.display())]
    Facts {
        /// The archive.
        path: PathBuf,
        /// Why.
        source: ManifestError,
    },
    /// A digest in it is none.
    #[error(transparent)]
    Digest(#[from] LayoutError),
    /// The image could not be made or read.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// A chunk could not be stored or read.
    #[error(transparent)]
    Chunk(#[from] ChunkError),
    /// The file system refused.
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl ForeignError {
    fn io<'a>(doing: &'static str, path: &'a Path) -> impl FnOnce(io::Error) -> Self + 'a {
        move |source| Self::Store(StoreError::io(doing, path)(source))
    }
}

/// A part of the archive's file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Extent {
    at: u64,
    size: u64,
}

/// A part that is an archive itself.
#[derive(Debug, Clone, Copy)]
struct Nested {
    extent: Extent,
    /// Of its bytes as they lie there, where somebody wrote it down.
    digest: Option<BlobDigest>,
}

/// What an archive says of where it comes from.
#[derive(Debug, Default)]
struct About {
    container: String,
    image_ref: Option<String>,
    image_digest: Option<String>,
    /// How it was dumped, where that was written down.
    flags: Option<DumpFlags>,
    namespace: Option<String>,
    name: Option<String>,
    pod: Option<String>,
}

/// A checkpoint archive whose parts were found. Nothing of what is in them was read but what names others.
#[derive(Debug)]
pub struct Archive {
    path: PathBuf,
    file: File,
    /// CRIU's files, in the order in which they lie in the archive.
    criu: Vec<(String, Extent)>,
    /// The archive that those are in, where they are in one.
    criu_archive: Option<Nested>,
    upper: Option<Nested>,
    shm: Option<Nested>,
    spec: oci_spec::runtime::Spec,
    about: About,
}

impl Archive {
    /// Opens one and finds its parts.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn open(path: &Path) -> Result<Self, ForeignError> {
        let file = open_regular(path).map_err(ForeignError::io("read", path))?;
        forms::open(path.to_owned(), file)
    }

    /// The namespace and the name that an image of it would have, as far as it says so.
    pub fn named(&self) -> (Option<Namespace>, Option<ImageName>) {
        let parse = |text: &Option<String>| text.clone();
        let namespace = parse(&self.about.namespace).and_then(|text| text.parse().ok());
        (
            namespace,
            parse(&self.about.name).and_then(|text| text.parse().ok()),
        )
    }

    /// Bytes of what is read of it.
    pub fn bytes(&self) -> u64 {
        let nested = [self.upper, self.shm].into_iter().flatten();
        let nested = nested.map(|nested| nested.extent.size);
        let criu = match self.criu_archive {
            // All of it is hashed.
            Some(archive) => archive.extent.size,
            None => {
                let sizes = self.criu.iter().map(|(_, extent)| extent.size);
                sizes.fold(0, u64::saturating_add)
            }
        };
        nested.fold(criu, u64::saturating_add)
    }

    fn wrong(&self, file: &str, what: impl std::fmt::Display) -> ForeignError {
        wrong(&self.path, file, what)
    }
}

fn wrong(path: &Path, file: &str, what: impl std::fmt::Display) -> ForeignError {
    ForeignError::File {
        path: path.to_owned(),
        file: shorten(file),
        what: shorten(&what.to_string()),
    }
}

/// All of a part of at most `max` bytes.
fn small(
    (file, path): (&File, &Path),
    (name, extent): (&str, Extent),
    max: u64,
) -> Result<Vec<u8>, ForeignError> {
    if extent.size > max {
        let what = format!(
            "has {} bytes, and at most {max} are read of it",
            extent.size
        );
        return Err(wrong(path, name, what));
    }
    let mut bytes = vec![0; extent.size as usize];
    let read = file.read_exact_at(&mut bytes, extent.at);
    read.map_err(ForeignError::io("read", path))?;
    Ok(bytes)
}
