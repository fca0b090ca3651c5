//! The store of checkpoint images on this node, and the types that an image goes through.
//!
//! ```text
//!  <root>/                                  0700
//!    .partial/<request>/                    being made; request.json, criu/, pack-…
//!    .partial/<request>.lock                shared by who asked and who makes; free means: left over
//!    <namespace>/<name>/<generation>/       sealed: manifest.json, manifest.blake3, and what they list
//!      …/origin.json                        where the rest of it is, while its packs are still coming in
//!    <namespace>/<name>/.<generation>.lock  shared while somebody restores or reads from it; changed when a
//!                                           container started from it
//!    <namespace>/<name>/.<generation>.unsound  it was found damaged: no further generation is built on it
//!    <namespace>/<name>/.<generation>.touches  what a restore of it asked for first: a hint, and no part of it
//!    <namespace>/<name>/.last               the highest generation there ever was; written before an image has it
//!    <namespace>/<name>/.warm.json          what became of those that containers made for others of their kind
//! ```
//! Where the node has memory for images, [a second root](Place) has `.partial` and generations too, and nothing else.
//!
//! [`Request`] (who asked) and [`Order`] (who makes a [`Partial`] of it) are two processes' ends of one partial
//! folder; [`SealedImage`] has a manifest and nothing else can be had from it; [`VerifiedImage`] gives files.

use std::{
    io,
    path::{Path, PathBuf},
};

use rekindle_core::name::{ImageName, ImageRef, Namespace};
use rekindle_store::StoreError;

use crate::{
    chunks::ChunkError,
    criu_image::CriuImageError,
    manifest::{ManifestError, shorten},
    touches::TouchesError,
};

mod arriving;
mod copies;
mod folder;
mod incoming;
mod inventory;
mod laid_out;
mod partial;
mod places;
mod removal;
mod room;
mod store;
mod touched;
mod verify;

pub(crate) use arriving::Arriving;
pub use copies::{Copied, Proof};
pub use folder::Scratch;
pub use incoming::{Origin, Source};
pub use inventory::{Evicted, Leftovers, bytes_below};
pub use partial::{Order, Partial, Request, Steps};
pub use places::{Place, Places, require_memory};
pub(crate) use store::open_regular;
pub use store::{ImageStore, Listed, SealedImage};
pub use verify::{StagedImage, VerifiedImage};

/// What is wrong with a file of an image.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Damage {
    /// It is there, and the manifest does not list it.
    #[error("is not in the manifest")]
    Extra,
    /// The manifest lists it, and it is not there.
    #[error("is missing")]
    Absent,
    /// It is a symlink, a folder, a device.
    #[error("is not a regular file")]
    NotAFile,
    /// It has another size.
    #[error("has {found} bytes where the manifest says {expected}")]
    Size {
        /// What the manifest says.
        expected: u64,
        /// What is there.
        found: u64,
    },
    /// Its bytes are not those that were sealed.
    #[error("does not have the checksum that it was sealed with")]
    Checksum,
}

/// Why an image was refused, or could not be made, found or removed.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// There is no such image, or no such generation of it.
    #[error("there is no image {0} on this node (`rekindle image ls` shows what there is)")]
    Unknown(String),
    /// Somebody restores from it, or is still reading its pages.
    #[error(
        "image {0} is in use: a container is being restored from it or still loads its memory; wait for that, or force the removal"
    )]
    InUse(String),
    /// A file of it is not what it was.
    #[error("image {image} is damaged: {file} {damage}; remove the image and make it again")]
    Damaged {
        /// Which image.
        image: String,
        /// Which file of it.
        file: String,
        /// What is wrong with that file.
        damage: Damage,
    },
    /// Its manifest is refused.
    #[error("image {image} is refused")]
    Manifest {
        /// Which image.
        image: String,
        /// Why.
        source: ManifestError,
    },
    /// Its chunks are refused, or could not be stored.
    #[error("image {image} is refused")]
    Chunks {
        /// Which image.
        image: String,
        /// Why.
        source: ChunkError,
    },
    /// It is needed whole, and some of it has not come yet.
    #[error(
        "image {image} is not all on this node yet: the rest is in {tier}, and `rekindle image fetch {name}` brings it"
    )]
    Incoming {
        /// Which image.
        image: String,
        /// Without its generation.
        name: String,
        /// Where the rest is.
        tier: String,
    },
    /// It is encrypted, and no key was given, or another one.
    #[error(
        "image {image} is encrypted with the key {key:?}, {found}: [[images.key]] in the configuration names keys"
    )]
    Locked {
        /// Which image.
        image: String,
        /// The key's name.
        key: String,
        /// "which this node does not have".
        found: &'static str,
    },
    /// It is not encrypted, where it has to be.
    #[error(
        "image {0} is not encrypted, and this node has a key for its namespace: whoever made it did not have that key"
    )]
    Unlocked(String),
    /// Its CRIU files are refused.
    #[error("image {image} is refused")]
    Criu {
        /// Which image.
        image: String,
        /// Why.
        source: CriuImageError,
    },
    /// What a restore has noted of its memory is not used.
    #[error("{} is not used", path.display())]
    Touches {
        /// The note.
        path: PathBuf,
        /// Why.
        source: TouchesError,
    },
    /// The manifest is another image's.
    #[error("image {image} is refused: its manifest says that it is {claimed}")]
    Misplaced {
        /// Which image.
        image: String,
        /// What the manifest says.
        claimed: String,
    },
    /// A partial folder holds what an image cannot.
    #[error("cannot seal image {image}: {file} {damage}")]
    Unsealable {
        /// Which image.
        image: String,
        /// Which file.
        file: String,
        /// What is wrong with it.
        damage: Damage,
    },
    /// A folder for images in memory is not there.
    #[error("{} is not in memory: images.memory.root has to be below a tmpfs", .0.display())]
    NotInMemory(PathBuf),
    /// The partial folder's request cannot be understood.
    #[error("{} is no request for an image: {reason}", path.display())]
    Request {
        /// The request file.
        path: PathBuf,
        /// What was found.
        reason: String,
    },
    /// A chunk could not be stored.
    #[error(transparent)]
    Chunk(#[from] ChunkError),
    /// The store could not do it.
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl ImageError {
    pub(crate) fn io<'a>(
        doing: &'static str,
        path: &'a Path,
    ) -> impl FnOnce(io::Error) -> Self + 'a {
        move |source| Self::Store(StoreError::io(doing, path)(source))
    }

    /// The chunks of `image` are refused.
    fn chunks(image: &str) -> impl Fn(ChunkError) -> Self + '_ {
        |source| Self::Chunks {
            image: image.to_owned(),
            source,
        }
    }

    fn request(path: &Path, reason: impl std::fmt::Display) -> Self {
        Self::Request {
            path: path.to_owned(),
            reason: shorten(&reason.to_string()),
        }
    }
}

/// `<namespace>/<name>@<generation>`.
fn reference(namespace: &Namespace, name: &ImageName, generation: Option<u64>) -> String {
    ImageRef {
        namespace: Some(namespace.clone()),
        name: name.clone(),
        generation,
    }
    .to_string()
}

#[cfg(test)]
pub(crate) mod tests;
