//! Removing images: from the disk and from memory.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use rekindle_core::name::{ImageName, Namespace};
use rekindle_store::{Lock, remove_tree};

use super::{ImageError, ImageStore, Place, reference, store::ignore_absent};
use crate::manifest::MANIFEST_FILE;

impl ImageStore {
    /// Removes one generation, or all; says which.
    ///
    /// # Errors
    /// [`ImageError::Unknown`]; [`ImageError::InUse`] unless `force`, and then those before it are gone.
    pub fn remove(
        &self,
        namespace: &Namespace,
        name: &ImageName,
        generation: Option<u64>,
        force: bool,
    ) -> Result<Vec<u64>, ImageError> {
        let mut doomed = self.generations(namespace, name)?;
        doomed.retain(|found| generation.is_none_or(|wanted| wanted == *found));
        if doomed.is_empty() {
            return Err(ImageError::Unknown(reference(namespace, name, generation)));
        }
        for generation in &doomed {
            let lock = self.lock_path(namespace, name, *generation);
            let alone = Lock::try_acquire(&lock)?;
            if alone.is_none() && !force {
                return Err(ImageError::InUse(reference(
                    namespace,
                    name,
                    Some(*generation),
                )));
            }
            self.remove_generation(namespace, name, *generation)?;
        }
        if self.generations(namespace, name)?.is_empty() {
            self.forget_warm(namespace, name)?;
        }
        Ok(doomed)
    }

    /// Removes all but the newest `keep` generations of an image, and those that a container is being restored from.
    ///
    /// # Errors
    /// What the file system says.
    pub fn keep_newest(
        &self,
        namespace: &Namespace,
        name: &ImageName,
        keep: usize,
    ) -> Result<(), ImageError> {
        let found = self.generations(namespace, name)?;
        for generation in found.iter().rev().skip(keep) {
            match self.remove(namespace, name, Some(*generation), false) {
                // Another one removes it too.
                Err(ImageError::InUse(_) | ImageError::Unknown(_)) => {}
                other => drop(other?),
            }
        }
        Ok(())
    }

    /// Removes one wherever it lies, whose lock is held or not asked for.
    pub(super) fn remove_generation(
        &self,
        namespace: &Namespace,
        name: &ImageName,
        generation: u64,
    ) -> Result<(), ImageError> {
        let lock = self.lock_path(namespace, name, generation);
        // First: what is left of an image whose removal was killed is found by its folder.
        let touches = self.touches_path(namespace, name, generation);
        remove(&touches)?;
        remove(&self.unsound_path(namespace, name, generation))?;
        // Without its manifest it is no image: killed half-way, the rest is cleared as left over.
        let dirs: Vec<PathBuf> = Place::ALL
            .into_iter()
            .filter_map(|place| self.dir_in(place, (namespace, name), generation))
            .collect();
        for dir in &dirs {
            remove(&dir.join(MANIFEST_FILE))?;
        }
        for dir in &dirs {
            remove_tree(dir)?;
        }
        ignore_absent(fs::remove_file(&lock), "remove", &lock)
    }
}

/// Removes what should be a file, whatever it is.
fn remove(path: &Path) -> Result<(), ImageError> {
    match fs::remove_file(path) {
        Err(e) if e.kind() == io::ErrorKind::IsADirectory => Ok(remove_tree(path)?),
        removed => ignore_absent(removed, "remove", path),
    }
}
