//! An image whose chunks can be read, and a folder for CRIU's files of it.

use std::{
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
};

use rekindle_checkpoint::{
    ImageStore, Key, SealedImage,
    chunks::{Chunks, Common},
    contents::Contents,
    image::Scratch,
    manifest::CRIU_DIR,
};
use rekindle_core::{config::NodeConfig, paths};

use crate::keys;

/// A folder for CRIU's files of an image: one of the store's, or in memory, where it is encrypted and nothing of it goes
/// to the disk in clear.
pub(crate) struct Room {
    pub(crate) path: PathBuf,
    /// Removed with it.
    _scratch: Option<Scratch>,
}

impl Room {
    pub(crate) fn new(store: &ImageStore, key: Option<&Key>) -> anyhow::Result<Self> {
        static MADE: AtomicU32 = AtomicU32::new(0);
        if key.is_some() {
            let number = MADE.fetch_add(1, Ordering::Relaxed);
            let name = format!("look-{}-{number}", std::process::id());
            return Ok(Self {
                path: Path::new(paths::RUN_DIR).join(name),
                _scratch: None,
            });
        }
        let scratch = store.scratch()?;
        Ok(Self {
            path: scratch.path().join(CRIU_DIR),
            _scratch: Some(scratch),
        })
    }
}

/// An image, opened with its key.
pub(super) struct Opened {
    pub(super) chunks: Arc<Chunks>,
    key: Option<Key>,
    room: Room,
}

impl Opened {
    pub(super) fn new(
        store: &ImageStore,
        config: &NodeConfig,
        image: &SealedImage,
    ) -> anyhow::Result<Self> {
        let key = keys::of(config, image)?;
        Ok(Self {
            chunks: Arc::new(image.chunks(key.as_ref())?),
            room: Room::new(store, key.as_ref())?,
            key,
        })
    }

    pub(super) fn contents(
        &self,
        image: &SealedImage,
        common: Option<&Common>,
    ) -> anyhow::Result<Contents> {
        let key = self.key.as_ref();
        Ok(image.contents(&self.room.path, key, &self.chunks, common)?)
    }
}
