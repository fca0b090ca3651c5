//! How an image begins to come in: its packs are holes, and it is published when it has what is read first.

use std::{fs::File, path::Path, sync::Arc};

use rekindle_store::{publish_dir, write_file};
use rustix::fs::{FallocateFlags, fallocate, ftruncate};

use super::{Origin, Source};
use crate::{
    chunks::Key,
    image::{Arriving, ImageError, Place, SealedImage},
    manifest::{MANIFEST_FILE, Manifest, ORIGIN_FILE, PackEntry, criu_path},
};

impl Arriving {
    /// Publishes it under the next generation as soon as it has what a restore reads before any process runs. Its other
    /// files must be there; its packs are made here, with room on the disk for all of them.
    ///
    /// # Errors
    /// As [`Arriving::publish`].
    pub(crate) fn begin(
        mut self,
        manifest: Manifest,
        bytes: Vec<u8>,
        origin: &Origin,
        source: Source,
        (key, into): (Option<&Key>, &Path),
    ) -> Result<SealedImage, ImageError> {
        let dir = self.folder.dir.clone();
        for pack in &manifest.packs {
            reserve(&dir, pack)?;
        }
        write_file(&dir.join(MANIFEST_FILE), &bytes, false)?;
        let path = dir.join(ORIGIN_FILE);
        let text = serde_json::to_vec(origin).map_err(|e| ImageError::request(&path, e))?;
        write_file(&path, &text, false)?;
        let image = self.sealed(manifest, bytes)?;
        let chunks = Arc::new(image.chunks_from(key, source)?);
        let pages = criu_path(Path::new("pages-"));
        chunks.stream_in(|name| !name.starts_with(&pages));
        let verified = image.verify_with(into, key, chunks)?;
        for archive in [verified.upper(), verified.shm()].into_iter().flatten() {
            archive
                .read_through()
                .map_err(ImageError::chunks(verified.reference()))?;
        }
        drop(verified);
        let published = self
            .store
            .publish(Place::Disk, &self.namespace, &self.name, |dest| {
                publish_dir(&dir, dest)
            })?;
        self.folder.kept = true;
        Ok(published)
    }
}

/// Makes a pack of holes. A disk that does not hold it says so now, and not in the middle of a container's life.
fn reserve(dir: &Path, pack: &PackEntry) -> Result<(), ImageError> {
    let path = dir.join(pack.id.file());
    let file = File::create_new(&path).map_err(ImageError::io("make", &path))?;
    if pack.size == 0 {
        return Ok(());
    }
    let reserved = match fallocate(&file, FallocateFlags::empty(), 0, pack.size) {
        // Some file systems cannot.
        Err(rustix::io::Errno::OPNOTSUPP) => ftruncate(&file, pack.size),
        reserved => reserved,
    };
    reserved.map_err(|e| ImageError::io("make room for", &path)(e.into()))
}
