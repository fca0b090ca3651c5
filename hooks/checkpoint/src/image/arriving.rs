//! An image that comes from elsewhere, whole: it is put into a partial folder, verified there, and published.

use std::{
    path::{Path, PathBuf},
    sync::atomic::AtomicU64,
};

use rekindle_core::name::{ImageName, Namespace};
use rekindle_store::{Lock, publish_dir, write_file};

use super::{
    ImageError, ImageStore, Place, SealedImage,
    folder::{Folder, lock_path, new_dir, new_id, share},
    reference,
};
use crate::{
    chunks::{Digest, Key},
    manifest::{MANIFEST_DIGEST_FILE, MANIFEST_FILE, Manifest},
};

/// An image that arrives. Dropped, its folder is removed; killed, it is swept.
#[derive(Debug)]
pub(crate) struct Arriving {
    pub(super) store: ImageStore,
    pub(super) folder: Folder,
    pub(super) namespace: Namespace,
    pub(super) name: ImageName,
}

/// What is needed to verify all of an image: its key, where CRIU's files are laid out, and what counts the chunks.
pub(crate) type Verification<'a> = (Option<&'a Key>, &'a Path, &'a AtomicU64);

impl ImageStore {
    /// A folder on the disk for the files of an image that will be `namespace/name`.
    pub(crate) fn arriving(
        &self,
        namespace: &Namespace,
        name: &ImageName,
    ) -> Result<Arriving, ImageError> {
        let partials = self.partial_dir();
        let folder = Folder::hold(&partials, &format!("pull-{}", new_id()))?;
        // Its name is new, so nobody can be removing it.
        let folder = folder.ok_or_else(|| ImageError::request(&partials, "it is locked"))?;
        new_dir(&folder.dir)?;
        Ok(Arriving {
            store: self.clone(),
            folder,
            namespace: namespace.clone(),
            name: name.clone(),
        })
    }

    /// Lets one process of the node fetch an image by its name; none while another one does. What is left of the lock
    /// is swept with the partial folders.
    ///
    /// # Errors
    /// What the file system says.
    pub fn fetching(
        &self,
        namespace: &Namespace,
        name: &ImageName,
    ) -> Result<Option<Lock>, ImageError> {
        let path = lock_path(&self.partial_dir(), &format!("fetch-{namespace}-{name}"));
        Ok(Lock::try_acquire(&path)?)
    }

    /// The folders of all generations of a name, the newest first.
    pub(crate) fn folders(
        &self,
        namespace: &Namespace,
        name: &ImageName,
    ) -> Result<Vec<PathBuf>, ImageError> {
        let generations = self.generations_in(Place::Disk, namespace, name)?;
        Ok(generations
            .into_iter()
            .rev()
            .map(|generation| self.image_dir(namespace, name, generation))
            .collect())
    }
}

impl Arriving {
    /// Where its files go, all but the manifest.
    pub(crate) fn dir(&self) -> &Path {
        &self.folder.dir
    }

    /// Whether the digest that came with a manifest is its own, with this key.
    pub(crate) fn check_manifest(
        &self,
        manifest: &Manifest,
        bytes: &[u8],
        key: Option<&Key>,
    ) -> Result<(), ImageError> {
        self.sealed(manifest.clone(), bytes.to_vec())?
            .check_manifest(key)
    }

    /// The text of a manifest that was given another name, and its digest beside it.
    pub(crate) fn renamed(
        &self,
        manifest: &Manifest,
        key: Option<&Key>,
    ) -> Result<Vec<u8>, ImageError> {
        let path = self.folder.dir.join(MANIFEST_FILE);
        let bytes =
            serde_json::to_vec_pretty(manifest).map_err(|e| ImageError::request(&path, e))?;
        self.put_seal(format!("{}\n", Digest::of_manifest(&bytes, key)).as_bytes())?;
        Ok(bytes)
    }

    /// Writes the digest of its manifest.
    pub(crate) fn put_seal(&self, seal: &[u8]) -> Result<(), ImageError> {
        let path = self.folder.dir.join(MANIFEST_DIGEST_FILE);
        Ok(write_file(&path, seal, false)?)
    }

    /// Verifies it and publishes it under the next generation. Where there is no key for it, its files, their sizes and
    /// the index are compared, and no more can be.
    ///
    /// # Errors
    /// As [`SealedImage::verify`] and [`VerifiedImage::verify_chunks`](super::VerifiedImage::verify_chunks).
    pub(crate) fn publish(
        mut self,
        manifest: Manifest,
        bytes: Vec<u8>,
        whole: Option<Verification<'_>>,
    ) -> Result<SealedImage, ImageError> {
        let dir = self.folder.dir.clone();
        write_file(&dir.join(MANIFEST_FILE), &bytes, false)?;
        let image = self.sealed(manifest, bytes)?;
        match whole {
            Some((key, into, done)) => image.verify(into, key)?.verify_chunks(done)?,
            None => image.check_listed()?,
        }
        let published = self
            .store
            .publish(Place::Disk, &self.namespace, &self.name, |dest| {
                publish_dir(&dir, dest)
            })?;
        self.folder.kept = true;
        Ok(published)
    }

    /// As if it were published already.
    pub(super) fn sealed(
        &self,
        manifest: Manifest,
        bytes: Vec<u8>,
    ) -> Result<SealedImage, ImageError> {
        let lock = lock_path(&self.store.partial_dir(), &self.folder.id);
        let unknown = || ImageError::Unknown(reference(&self.namespace, &self.name, None));
        let highest = self.store.generations(&self.namespace, &self.name)?;
        Ok(SealedImage {
            store: self.store.clone(),
            place: Place::Disk,
            spare: None,
            dir: self.folder.dir.clone(),
            manifest,
            manifest_bytes: bytes,
            generation: highest.last().copied().unwrap_or(0) + 1,
            lease: share(&lock)?.ok_or_else(unknown)?,
        })
    }
}
