//! What the store's images take on the disk, and their removal to make room.

use std::{
    collections::HashMap,
    fs, io,
    os::unix::fs::MetadataExt,
    path::Path,
    time::{SystemTime, UNIX_EPOCH},
};

use rekindle_core::{
    config::Retention,
    name::{ImageName, Namespace},
};
use rekindle_store::{Lock, StoreError, remove_tree};
use rustix::fs::statvfs;

use super::{
    ImageError, ImageStore, Place,
    folder::{lock_path, remove_unless_leased},
    reference,
    store::{Listed, names},
};
use crate::{
    manifest::MANIFEST_FILE,
    retention::{Disk, Held, HeldFile, demotions, plan},
};

/// What became of an image that was to be removed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Evicted {
    /// It is gone, and so many bytes of the disk came free; of memory, where it lay there only or is gone from there only.
    Freed(u64),
    /// A container has come meanwhile, and starts or has started from it.
    Used,
    /// Somebody else has removed it.
    Gone,
}

/// What those left who were killed while they made or removed an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Leftovers {
    /// Folders.
    pub folders: usize,
    /// Bytes of the disk that come free with them.
    pub bytes: u64,
}

impl ImageStore {
    /// All images, or those of one namespace, with what they take; for [`plan`](crate::retention::plan). What a killed
    /// removal left is none of them.
    ///
    /// # Errors
    /// What the file system says.
    pub fn inventory(&self, only: Option<&Namespace>) -> Result<Vec<Held>, ImageError> {
        let mut all = Vec::new();
        for listed in self.list(only)? {
            let Listed {
                namespace,
                name,
                generation,
                manifest,
                in_use,
                incoming,
                places,
                quarantined,
            } = listed;
            // One that is being removed just now is gone from a line to the next.
            if !places.any() {
                continue;
            }
            let in_place = |place| match self.dir_in(place, (&namespace, &name), generation) {
                Some(dir) if dir.join(MANIFEST_FILE).exists() => files(&dir),
                _ => Ok(Vec::new()),
            };
            let source = manifest.as_ref().map(|manifest| &manifest.facts.source);
            all.push(Held {
                last_used: self.last_used(&namespace, &name, generation)?,
                files: in_place(Place::Disk)?,
                memory: in_place(Place::Memory)?,
                usable: source.is_ok() && quarantined.is_none(),
                remade: source.is_ok_and(|source| source.warm.is_some()),
                namespace,
                name,
                generation,
                in_use,
                incoming,
            });
        }
        Ok(all)
    }

    /// Counts an image of an inventory anew, which was copied meanwhile.
    ///
    /// # Errors
    /// What the file system says.
    pub fn recount(&self, held: &mut Held) -> Result<(), ImageError> {
        let image = (&held.namespace, &held.name);
        let count = |place| match self.dir_in(place, image, held.generation) {
            Some(dir) => files(&dir),
            None => Ok(Vec::new()),
        };
        let (disk, memory) = (count(Place::Disk)?, count(Place::Memory)?);
        (held.files, held.memory) = (disk, memory);
        Ok(())
    }

    /// The file system that the store is on.
    ///
    /// # Errors
    /// What the file system says.
    pub fn disk(&self) -> Result<Disk, ImageError> {
        file_system(self.root())
    }

    /// Removes an image that was found in an [inventory](ImageStore::inventory), unless a container leases it, or has
    /// done so since: whoever comes meanwhile wins.
    ///
    /// # Errors
    /// What the file system says.
    pub fn evict(&self, held: &Held) -> Result<Evicted, ImageError> {
        let (namespace, name, generation) = (&held.namespace, &held.name, held.generation);
        let image = (namespace, name);
        // That of the disk, where there is one.
        let Some((_, dir)) = self.dirs(image, generation).last() else {
            return Ok(Evicted::Gone);
        };
        let lock = self.lock_path(namespace, name, generation);
        let Some(_alone) = Lock::try_acquire(&lock)? else {
            return Ok(Evicted::Used);
        };
        if self.last_used(namespace, name, generation)? != held.last_used {
            return Ok(Evicted::Used);
        }
        let freed = own_bytes(&dir)?;
        self.remove_generation(namespace, name, generation)?;
        Ok(Evicted::Freed(freed))
    }

    /// Makes room by these rules and the free space of the disk, among the images that containers make anew by
    /// themselves: what a person has made stays. What was removed, by namespace, name and generation. In memory, room is
    /// made among all that lie on the disk too.
    ///
    /// # Errors
    /// What the file system says.
    pub fn make_room(&self, rules: &Retention) -> Result<Vec<String>, ImageError> {
        let mut images = self.inventory(None)?;
        for image in &mut images {
            image.in_use |= !image.remade;
        }
        let now = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default();
        let plan = plan(&images, rules, Some(self.disk()?), now.as_secs());
        let mut removed = Vec::new();
        for removal in plan.removals {
            let image = &images[removal.image];
            if let Evicted::Freed(_) = self.evict(image)? {
                removed.push(reference(
                    &image.namespace,
                    &image.name,
                    Some(image.generation),
                ));
            }
        }
        if let Some(memory) = &self.memory {
            let images = self.inventory(None)?;
            for removal in demotions(&images, memory, now.as_secs(), |_| false).removals {
                self.demote(&images[removal.image])?;
            }
        }
        Ok(removed)
    }

    /// Finds what killed checkpoints, restores and removals left, and removes it where `remove` says so: partial
    /// folders that nobody holds, and generations without a manifest.
    ///
    /// # Errors
    /// What the file system says.
    pub fn leftovers(&self, remove: bool) -> Result<Leftovers, ImageError> {
        let mut found = Leftovers::default();
        for partials in self.partial_dirs() {
            left_partials(&partials, remove, &mut found)?;
        }
        for namespace in names::<Namespace>(self.root())? {
            for name in self.names(&namespace)? {
                for place in Place::ALL {
                    self.unfinished(place, (&namespace, &name), remove, &mut found)?;
                }
                if remove {
                    self.forget_gone(&namespace, &name)?;
                }
            }
        }
        Ok(found)
    }

    /// Generations of a name without a manifest in a place: their removal was not finished.
    fn unfinished(
        &self,
        place: Place,
        (namespace, name): (&Namespace, &ImageName),
        remove: bool,
        found: &mut Leftovers,
    ) -> Result<(), ImageError> {
        for generation in self.generations_in(place, namespace, name)? {
            let Some(dir) = self.dir_in(place, (namespace, name), generation) else {
                continue;
            };
            // A folder appears with its manifest in it, and loses that first.
            if fs::symlink_metadata(dir.join(MANIFEST_FILE)).is_ok() {
                continue;
            }
            let lock = self.lock_path(namespace, name, generation);
            let Some(_alone) = Lock::try_acquire(&lock)? else {
                continue;
            };
            found.folders += 1;
            found.bytes += own_bytes(&dir)?;
            if !remove {
                continue;
            }
            match self.places((namespace, name), generation).any() {
                // The other copy stays, and with it what lies beside it.
                true => remove_tree(&dir)?,
                false => self.remove_generation(namespace, name, generation)?,
            }
        }
        Ok(())
    }

    /// Removes what lies beside a generation that is in no place any more: it was in memory when the node went down.
    fn forget_gone(&self, namespace: &Namespace, name: &ImageName) -> Result<(), ImageError> {
        let home = self.home_of(namespace, name);
        for entry in fs::read_dir(&home).map_err(ImageError::io("list", &home))? {
            let entry = entry.map_err(ImageError::io("list", &home))?.file_name();
            let parts = entry.to_str().and_then(|text| {
                let (number, kind) = text.strip_prefix('.')?.split_once('.')?;
                Some((number.parse::<u64>().ok()?, kind))
            });
            let Some((generation, "lock" | "touches")) = parts else {
                continue;
            };
            if self.dirs((namespace, name), generation).next().is_some() {
                continue;
            }
            let lock = self.lock_path(namespace, name, generation);
            let Some(_alone) = Lock::try_acquire(&lock)? else {
                continue;
            };
            // One that was being published meanwhile.
            if self.dirs((namespace, name), generation).next().is_none() {
                self.remove_generation(namespace, name, generation)?;
            }
        }
        Ok(())
    }

    /// When its lock was last changed; its folder's age where it has none.
    pub(super) fn last_used(
        &self,
        namespace: &Namespace,
        name: &ImageName,
        generation: u64,
    ) -> Result<u64, ImageError> {
        let lock = self.lock_path(namespace, name, generation);
        let dir = self.dirs((namespace, name), generation).next();
        let dir = dir.map_or_else(
            || self.image_dir(namespace, name, generation),
            |(_, dir)| dir,
        );
        let modified = match fs::metadata(&lock) {
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                fs::metadata(&dir).and_then(|found| found.modified())
            }
            found => found.and_then(|found| found.modified()),
        };
        let modified = modified.map_err(ImageError::io("look at", &dir))?;
        // A clock that was wrong must not keep an image for ever.
        let modified = modified.min(SystemTime::now());
        let since = modified.duration_since(UNIX_EPOCH).unwrap_or_default();
        Ok(since.as_secs())
    }
}

/// Partial folders that nobody holds.
fn left_partials(partials: &Path, remove: bool, found: &mut Leftovers) -> Result<(), ImageError> {
    for id in ids(partials)? {
        let dir = partials.join(&id);
        let bytes = own_bytes(&dir)?;
        let lock = lock_path(partials, &id);
        let left = match remove {
            true => remove_unless_leased(partials, &id)?,
            // Looking must not make a lock where there is none.
            false => dir.is_dir() && (!lock.exists() || Lock::try_acquire(&lock)?.is_some()),
        };
        if left {
            found.folders += 1;
            found.bytes += bytes;
        }
    }
    Ok(())
}

/// A file system, by a folder of it.
pub(super) fn file_system(of: &Path) -> Result<Disk, ImageError> {
    let stat =
        statvfs(of).map_err(|e| ImageError::io("ask for the free space of", of)(e.into()))?;
    Ok(Disk {
        total: stat.f_blocks.saturating_mul(stat.f_frsize),
        available: stat.f_bavail.saturating_mul(stat.f_frsize),
    })
}

/// Bytes that the regular files below a folder take, each counted once. None is 0.
///
/// # Errors
/// What the file system says.
pub fn bytes_below(dir: &Path) -> Result<u64, ImageError> {
    Ok(files(dir)?.iter().map(|file| file.bytes).sum())
}

/// The regular files below `dir`, each once.
fn files(dir: &Path) -> Result<Vec<HeldFile>, ImageError> {
    let mut all = HashMap::new();
    collect(dir, &mut all)?;
    Ok(all.into_values().collect())
}

/// Bytes of the disk that come free when this folder is removed: those of the files that have no link elsewhere.
pub(super) fn own_bytes(dir: &Path) -> Result<u64, ImageError> {
    let own = files(dir)?.into_iter().filter(|file| file.links <= 1);
    Ok(own.map(|file| file.bytes).sum())
}

fn collect(dir: &Path, into: &mut HashMap<(u64, u64), HeldFile>) -> Result<(), ImageError> {
    let gone = |e: &io::Error| e.kind() == io::ErrorKind::NotFound;
    let entries = match fs::read_dir(dir) {
        // Somebody is just removing it.
        Err(e) if gone(&e) => return Ok(()),
        entries => entries.map_err(ImageError::io("list", dir))?,
    };
    for entry in entries {
        let path = entry.map_err(StoreError::io("list", dir))?.path();
        let found = match fs::symlink_metadata(&path) {
            Err(e) if gone(&e) => continue,
            found => found.map_err(ImageError::io("look at", &path))?,
        };
        if found.is_dir() {
            collect(&path, into)?;
        } else if found.is_file() {
            let inode = (found.dev(), found.ino());
            let file = HeldFile {
                inode,
                // POSIX counts blocks of 512 bytes, whatever the file system's are.
                bytes: found.blocks() * 512,
                links: found.nlink(),
            };
            into.insert(inode, file);
        }
    }
    Ok(())
}

/// What lies in the folder for images that are being made, without the locks' suffix, each once.
pub(super) fn ids(partials: &Path) -> Result<Vec<String>, ImageError> {
    let mut all = Vec::new();
    let entries = match fs::read_dir(partials) {
        // Somebody has emptied the memory that it was in.
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(all),
        entries => entries.map_err(ImageError::io("list", partials))?,
    };
    for entry in entries {
        let name = entry
            .map_err(ImageError::io("list", partials))?
            .file_name()
            .into_string();
        all.extend(name.map(|name| name.strip_suffix(".lock").unwrap_or(&name).to_owned()));
    }
    all.sort();
    all.dedup();
    Ok(all)
}
