//! What restores note beside an image, for the next one: which of its memory was asked for first.

use std::{
    fs,
    io::{self, Read},
    path::PathBuf,
};

use rekindle_store::replace_file;

use super::{ImageError, SealedImage, store::open_regular};
use crate::{
    manifest::MANIFEST_FILE,
    touches::{self, MAX_FILE, Touch},
};

impl SealedImage {
    /// What the last restore has noted; nothing where none has.
    ///
    /// # Errors
    /// When the note cannot be read, or is none that was made for this image. It can be done without.
    pub fn touches(&self) -> Result<Vec<Touch>, ImageError> {
        let path = self.touches_path();
        let mut bytes = Vec::new();
        match open_regular(&path) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            file => file
                .and_then(|file| file.take(MAX_FILE as u64 + 1).read_to_end(&mut bytes))
                .map_err(ImageError::io("read", &path))?,
        };
        touches::read(&bytes, &self.manifest_bytes)
            .map_err(|source| ImageError::Touches { path, source })
    }

    /// Notes them for the next restore, in place of what was noted before. Of two at once the later one stays, whole.
    /// Not synced: what a power cut leaves of it has another checksum.
    ///
    /// # Errors
    /// What the file system says.
    pub fn note_touches(&self, touches: &[Touch]) -> Result<(), ImageError> {
        // Removed by force meanwhile: nobody would remove the note.
        if !self.dir.join(MANIFEST_FILE).exists() {
            return Ok(());
        }
        let scratch = self.store.scratch()?;
        let new = scratch.path().join("touches");
        fs::write(&new, touches::write(touches, &self.manifest_bytes))
            .map_err(ImageError::io("write", &new))?;
        Ok(replace_file(&new, &self.touches_path())?)
    }

    fn touches_path(&self) -> PathBuf {
        let Self {
            store, manifest, ..
        } = self;
        store.touches_path(&manifest.namespace, &manifest.name, self.generation)
    }
}
