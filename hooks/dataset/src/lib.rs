//! Datasets on the node: listed, fetched in parallel ranges, verified as far as their store allows,
//! published by rename, and found again.
//!
//! ```text
//!   <root>/                      0700
//!     <key>/                     one per URI and endpoint; the same for every namespace
//!       lock                     held by the process that downloads; released by the kernel
//!       progress.json            what the holder has so far, for those who wait
//!       <version>.partial/       files, and the journal of the parts that are in them
//!       <version>/               a dataset; exists only with its manifest
//!         manifest.json
//!         files/                 what a pod sees: files 0444, folders 0555
//!       <version>.lease          shared by those who use it, taken alone to remove it
//! ```
//! A version is a hash of what the store listed, so an object that changes makes a new dataset and never
//! changes one that a pod has mounted.
//!
//! Without the feature `s3` only [`Cache`] is here: local, blocking, no network.
#![forbid(unsafe_code)]
#![warn(missing_docs)]

mod cache;
mod error;
mod listing;
mod manifest;
mod progress;

#[cfg(feature = "s3")]
mod acquire;
#[cfg(feature = "s3")]
mod checksum;
#[cfg(feature = "s3")]
mod engine;
#[cfg(feature = "s3")]
mod folder;
#[cfg(feature = "s3")]
mod journal;
#[cfg(feature = "s3")]
mod origin;
#[cfg(feature = "s3")]
mod s3;

pub use cache::{Cache, Damage, DatasetInfo, DatasetKey};
pub use error::DatasetError;
pub use listing::{MAX_OBJECTS, Version};
pub use manifest::{FileRecord, Manifest};
pub use progress::Progress;
pub use rekindle_core::config::Verification;
pub use rekindle_store::Lock;

#[cfg(feature = "s3")]
pub use acquire::{Event, Ready, acquire};
#[cfg(feature = "s3")]
pub use rekindle_store::s3::Tuning;
