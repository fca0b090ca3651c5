//! Checkpoint images of containers: what they are made of, where they lie, and what must be true before
//! one is restored.
//!
//! ```text
//!  make     ImageStore::begin ─▶ Order ─▶ Partial ─▶ PageServerLink (tasks stopped) ─▶ Partial::seal ─▶ SealedImage
//!                                           │ pages::take_pages
//!                                           └ archive::pack  (upper layer, /dev/shm)
//!  restore  ImageStore::resolve ─▶ SealedImage ─verify─▶ VerifiedImage ─fit─▶ archive::unpack ─▶ StagedImage ─▶ Pager
//! ```
//! An image exists only when its manifest does, and a process gets its bytes only through a
//! [`VerifiedImage`]: there is no way from a [`SealedImage`] to its CRIU folder.
//!
//! No runtime and no network: every call blocks. At most eight threads and a MiB of buffers for each are used,
//! whatever the image's size, for all of this runs inside the shim, but for [`pager::serve`], which is a
//! process of its own.
#![warn(missing_docs)]

pub mod archive;
pub mod chunks;
pub mod contents;
pub mod criu_image;
pub mod deleted;
pub mod fit;
#[cfg(feature = "archives")]
pub mod foreign;
pub mod gpu;
pub mod image;
pub mod layout;
pub mod manifest;
pub mod page_server;
pub mod pager;
pub mod pages;
mod parallel;
pub mod plain;
pub mod precopy;
pub mod retention;
pub mod touches;
pub mod warm;

pub use chunks::Key;
pub use image::{
    ImageError, ImageStore, Order, Partial, Request, SealedImage, StagedImage, Steps, VerifiedImage,
};
pub use manifest::{Facts, Manifest};
pub use page_server::PageServerLink;
