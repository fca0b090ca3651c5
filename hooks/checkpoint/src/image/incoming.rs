//! Images whose packs are still coming in: a restore begins when what it reads first is there, and a pager has the rest
//! come as it is touched.
//!
//! ```text
//!  (in a tier) ─begin─▶ begun: sealed, with holes in its packs, and origin.json ─complete─▶ whole
//!                         └─ whoever is killed here leaves what has come, and the next one goes on from there
//! ```
//! A begun image has all that proves it: its manifest, its index, CRIU's own files. Each chunk is compared before a
//! process gets it, from wherever it comes.

use std::{
    collections::BTreeMap,
    fs, io,
    path::Path,
    sync::{Arc, atomic::AtomicU64},
};

use rekindle_store::sync_dir;
use serde::{Deserialize, Serialize};

use super::{ImageError, SealedImage, VerifiedImage, store::open_regular};
use crate::{
    chunks::{Chunks, Key, Remote},
    manifest::{CRIU_DIR, ORIGIN_FILE},
    pager::first_parts,
};

#[cfg(feature = "s3")]
mod begin;

/// Most bytes of `origin.json`: a pack costs about 130, and an image has one for each generation that it shares with.
const MAX_ORIGIN: u64 = 16 << 20;

/// Where the rest of an image lies.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Origin {
    /// The tier, as the configuration writes it.
    pub tier: String,
    /// The digest of the blob that each pack is there, by the pack's file.
    pub packs: BTreeMap<String, String>,
}

/// Bytes that are not on the node, and how many requests for them may be on their way.
#[derive(Debug)]
pub struct Source {
    /// Where they lie.
    pub remote: Box<dyn Remote>,
    /// Requests at once.
    pub requests: usize,
}

impl SealedImage {
    /// Where the rest of it lies; none when it is whole.
    ///
    /// # Errors
    /// What the file system says, and when it cannot be understood.
    pub fn origin(&self) -> Result<Option<Origin>, ImageError> {
        let path = self.dir.join(ORIGIN_FILE);
        let file = match open_regular(&path) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            file => file.map_err(ImageError::io("read", &path))?,
        };
        let text = io::read_to_string(io::Read::take(file, MAX_ORIGIN));
        let text = text.map_err(ImageError::io("read", &path))?;
        let origin = serde_json::from_str(&text).map_err(|e| ImageError::request(&path, e))?;
        Ok(Some(origin))
    }

    /// Refuses what needs all of it.
    ///
    /// # Errors
    /// [`ImageError::Incoming`].
    pub fn require_whole(&self) -> Result<(), ImageError> {
        match self.origin()? {
            None => Ok(()),
            Some(Origin { tier, .. }) => Err(ImageError::Incoming {
                image: self.reference(),
                name: super::reference(&self.manifest.namespace, &self.manifest.name, None),
                tier,
            }),
        }
    }

    /// Its chunks, with those that are not here yet.
    ///
    /// # Errors
    /// As [`SealedImage::chunks`].
    pub fn chunks_from(&self, key: Option<&Key>, source: Source) -> Result<Chunks, ImageError> {
        let chunks = self.chunks_here(key)?;
        let packs = &self.manifest.packs;
        Ok(chunks.from_remote(packs, source.remote, source.requests)?)
    }

    /// As [`SealedImage::verify`], of an image that need not be whole: for a restore with a pager, which has the rest
    /// come.
    ///
    /// # Errors
    /// As [`SealedImage::verify`].
    pub fn verify_begun(self, into: &Path, key: Option<&Key>) -> Result<VerifiedImage, ImageError> {
        self.or_on_disk(|image| {
            let chunks = Arc::new(image.chunks_here(key)?);
            image.verify_with(into, key, chunks)
        })
    }

    /// Begins to fetch what is not here: first what earlier restores have asked for first, and then all. `criu_dir` has
    /// CRIU's files, as far as they are known; without them it is not known where the former lies.
    pub fn stream_rest(&self, chunks: &Chunks, criu_dir: &Path) {
        let noted = self.touches().unwrap_or_default();
        chunks.stream_first(&first_parts(criu_dir, &noted));
        chunks.stream_in(|_| true);
    }

    /// Has all of it come, and compares that; then it is like any other. For the one process of the node that
    /// [fetches](super::ImageStore::fetching) it. `done` grows to the sum of its packs.
    ///
    /// # Errors
    /// What the store or the file system says, or what is damaged. What has come stays.
    pub fn complete(
        &self,
        key: Option<&Key>,
        source: Source,
        done: &AtomicU64,
    ) -> Result<(), ImageError> {
        let reference = self.reference();
        let chunks = self.chunks_from(key, source)?.patiently();
        self.stream_rest(&chunks, &self.dir.join(CRIU_DIR));
        chunks
            .verify(done)
            .map_err(ImageError::chunks(&reference))?;
        chunks.sync()?;
        let origin = self.dir.join(ORIGIN_FILE);
        match fs::remove_file(&origin) {
            // Removed by force meanwhile.
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
            removed => removed.map_err(ImageError::io("remove", &origin))?,
        }
        Ok(sync_dir(&self.dir)?)
    }
}
