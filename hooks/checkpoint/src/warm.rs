//! Images that containers make for others of their kind (`warm-start: auto`).
//!
//! ```text
//!  Kind ──name──▶ the images NAMESPACE/auto-CONTAINER-KEY ──┬─ one that may be used ─▶ restore ─ fails ─▶ quarantine
//!                                                           └─ none ─▶ cold start ─ warm ─▶ Making ─▶ image
//! ```
//! What decides whether two containers are of one [`Kind`] is hashed into the name of their images, and all of the hash
//! is in their manifests: to find one is to look at one folder. What became of containers that started from them is in
//! a [`Record`] beside them.

use std::fs;

use rekindle_core::{
    config::Retention,
    name::{ImageName, Namespace},
};
use rekindle_store::{Lock, write_file};

use crate::{
    image::{Evicted, ImageError, ImageStore},
    retention::Held,
};

mod kind;
mod record;

pub use kind::{Kind, Surroundings};
pub use record::{End, Fate, MAX_USELESS, Record};
pub use rekindle_core::name::WARM_PREFIX as PREFIX;

/// Beside the generations of a name; see [`Record`].
const RECORD: &str = ".warm.json";
/// Held while the record is changed.
const RECORD_LOCK: &str = ".warm.lock";
/// Held by the one container that makes an image.
const MAKING_LOCK: &str = ".making.lock";
/// Most bytes of a record that are read. Each generation has a sentence, and each of a kind's parts a few words.
const MAX_RECORD: u64 = 4 << 20;
/// Kinds of one container in a namespace that have images: versions that are rolled out beside each other. A container
/// that makes a kind of its own with every start would fill the disk.
const MAX_KINDS: usize = 8;

/// The images of one kind of containers.
#[derive(Debug, Clone)]
pub struct WarmImages {
    store: ImageStore,
    namespace: Namespace,
    name: ImageName,
    kind: Kind,
    hash: String,
}

/// The right to make an image, which one container of a kind has at a time.
#[derive(Debug)]
pub struct Making(#[allow(dead_code, reason = "held")] Lock);

/// Why a container makes no image of itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum NotMade {
    /// Another one was faster.
    #[error("there is one")]
    Exists,
    /// Another one is about to.
    #[error("another container is making one")]
    Busy,
    /// The kubelet would evict pods to make room.
    #[error("the disk has less than {0} % free (warm-start.min-free)")]
    NoRoom(u8),
    /// Those that were made were of no use, or none can be made.
    #[error(
        "{MAX_USELESS} images of this kind in a row were put into quarantine, or could not be made; look at why (`rekindle image show`, the shim's log), and remove what is known of them (`rekindle image rm`) to try again"
    )]
    Hopeless,
}

impl WarmImages {
    /// Those of a kind in a store; none where the container's name cannot be part of theirs.
    pub fn of(store: ImageStore, namespace: Namespace, kind: Kind) -> Option<Self> {
        Some(Self {
            store,
            namespace,
            name: kind.image_name()?,
            hash: kind.hash(),
            kind,
        })
    }

    /// Their namespace and name.
    pub fn name(&self) -> (&Namespace, &ImageName) {
        (&self.namespace, &self.name)
    }

    /// What their containers have in common.
    pub fn kind(&self) -> &Kind {
        &self.kind
    }

    /// What their manifests have of that.
    pub fn hash(&self) -> &str {
        &self.hash
    }

    /// The newest generation that may be used: whole, of this kind by its manifest and not by its name only, and not in
    /// quarantine.
    ///
    /// # Errors
    /// What the file system says.
    pub fn usable(&self) -> Result<Option<u64>, ImageError> {
        let record = self.record();
        let all = self.store.generations(&self.namespace, &self.name)?;
        let is_of_kind = |generation: u64| {
            let manifest = self.store.manifest(&self.namespace, &self.name, generation);
            manifest.is_ok_and(|manifest| manifest.facts.source.warm.as_ref() == Some(&self.hash))
        };
        Ok(all.into_iter().rev().find(|generation| {
            record.quarantined(*generation).is_none() && is_of_kind(*generation)
        }))
    }

    /// What is known of them. One that cannot be read is as none: it keeps images from being used, and decides nothing
    /// else.
    pub fn record(&self) -> Record {
        self.store.warm_record(&self.namespace, &self.name)
    }

    /// Notes an image that is damaged: it is used by no one any more. `why` is a sentence.
    ///
    /// # Errors
    /// What the file system says.
    pub fn is_bad(&self, generation: u64, why: &str) -> Result<(), ImageError> {
        self.change(|record| record.quarantine(generation, why))
    }

    /// Notes a container that could not be restored, or ended too soon. At `failures` in a row its image is used by no
    /// one any more; says whether that is so now.
    ///
    /// # Errors
    /// What the file system says.
    pub fn ended_early(
        &self,
        generation: u64,
        why: &str,
        end: End,
        failures: u32,
    ) -> Result<bool, ImageError> {
        let mut quarantined = false;
        self.change(|record| quarantined = record.ended_early(generation, why, end, failures))?;
        Ok(quarantined)
    }

    /// Notes a restored container that went on: what ended early before had other reasons.
    ///
    /// # Errors
    /// What the file system says.
    pub fn went_on(&self, generation: u64) -> Result<(), ImageError> {
        match self.record().is_clean(generation) {
            true => Ok(()),
            false => self.change(|record| record.went_on(generation)),
        }
    }

    /// Notes a container of which no image could be made.
    ///
    /// # Errors
    /// What the file system says.
    pub fn not_made(&self) -> Result<(), ImageError> {
        self.change(|record| record.unmade = record.unmade.saturating_add(1))
    }

    /// Notes that one was made. With `describe` also of what kind the containers are, for whoever asks why another one has
    /// no part in it.
    ///
    /// # Errors
    /// What the file system says.
    pub fn made(&self, describe: bool) -> Result<(), ImageError> {
        self.change(|record| {
            record.unmade = 0;
            record.kind = describe.then(|| self.kind.clone());
        })
    }

    /// The right to make an image, where one is wanted and the disk has `min_free` percent free.
    ///
    /// # Errors
    /// What the file system says.
    pub fn make(&self, min_free: u8) -> Result<Result<Making, NotMade>, ImageError> {
        let home = self.store.home(&self.namespace, &self.name)?;
        let Some(making) = Lock::try_acquire(&home.join(MAKING_LOCK))? else {
            return Ok(Err(NotMade::Busy));
        };
        // Whoever had the right before may have used it.
        if self.usable()?.is_some() {
            return Ok(Err(NotMade::Exists));
        }
        if self.record().is_hopeless() {
            return Ok(Err(NotMade::Hopeless));
        }
        let disk = self.store.disk()?;
        if disk.available < disk.total / 100 * u64::from(min_free) {
            return Ok(Err(NotMade::NoRoom(min_free)));
        }
        Ok(Ok(Making(making)))
    }

    /// In what the kind differs from the nearest one of the same container in this namespace; none where there is none.
    ///
    /// # Errors
    /// What the file system says.
    pub fn nearest(&self) -> Result<Option<(ImageName, Vec<String>)>, ImageError> {
        let mut nearest: Option<(ImageName, Vec<String>)> = None;
        for name in self.family()? {
            let Some(other) = self.store.warm_record(&self.namespace, &name).kind else {
                continue;
            };
            let differences = self.kind.differences(&other);
            let best = nearest.as_ref().map_or(usize::MAX, |(_, best)| best.len());
            if differences.len() < best {
                nearest = Some((name, differences));
            }
        }
        Ok(nearest)
    }

    /// Makes room for the next ones: of this container's kinds those go that were not used for longest, and of all kinds
    /// what the rules say. Not the newest image of this one: it has just been made. What was removed.
    ///
    /// # Errors
    /// What the file system says.
    pub fn make_room(&self, rules: &Retention) -> Result<Vec<String>, ImageError> {
        let _lease = self.store.resolve(&self.namespace, &self.name, None)?;
        let mut removed = Vec::new();
        let family = self.family()?;
        let mut others: Vec<(u64, ImageName, Vec<Held>)> = Vec::new();
        for image in self.store.inventory(Some(&self.namespace))? {
            if !family.contains(&image.name) {
                continue;
            }
            match others.iter_mut().find(|(_, name, _)| *name == image.name) {
                Some((used, _, images)) => {
                    *used = image.last_used.max(*used);
                    images.push(image);
                }
                None => others.push((image.last_used, image.name.clone(), vec![image])),
            }
        }
        others.sort_by_key(|(used, ..)| std::cmp::Reverse(*used));
        for (_, name, images) in others.into_iter().skip(MAX_KINDS - 1) {
            for image in &images {
                if let Evicted::Freed(_) = self.store.evict(image)? {
                    removed.push(format!("{}/{name}@{}", self.namespace, image.generation));
                }
            }
            if self.store.generations(&self.namespace, &name)?.is_empty() {
                self.store.forget_warm(&self.namespace, &name)?;
            }
        }
        removed.extend(self.store.make_room(rules)?);
        Ok(removed)
    }

    /// The names of the other kinds of this container.
    fn family(&self) -> Result<Vec<ImageName>, ImageError> {
        let family = self.kind.family();
        let mut names = self.store.names(&self.namespace)?;
        names.retain(|name| *name != self.name && name.as_str().starts_with(&family));
        Ok(names)
    }

    fn change(&self, change: impl FnOnce(&mut Record)) -> Result<(), ImageError> {
        let home = self.store.home(&self.namespace, &self.name)?;
        let _alone = Lock::acquire(&home.join(RECORD_LOCK))?;
        let mut record = self.record();
        change(&mut record);
        let existing = self.store.generations(&self.namespace, &self.name)?;
        record.forget_removed(&existing);
        let text = serde_json::to_vec_pretty(&record).unwrap_or_default();
        Ok(write_file(&home.join(RECORD), &text, true)?)
    }
}

impl ImageStore {
    /// What is known of the images of this name that containers made for others of their kind; nothing of others.
    pub fn warm_record(&self, namespace: &Namespace, name: &ImageName) -> Record {
        let path = self.home_of(namespace, name).join(RECORD);
        let small =
            fs::metadata(&path).is_ok_and(|file| file.is_file() && file.len() <= MAX_RECORD);
        let text = small.then(|| fs::read(&path).ok()).flatten();
        text.and_then(|text| serde_json::from_slice(&text).ok())
            .unwrap_or_default()
    }

    /// Forgets it: who removes all images of a name wants to begin anew. Whether there was something.
    ///
    /// # Errors
    /// What the file system says.
    pub fn forget_warm(&self, namespace: &Namespace, name: &ImageName) -> Result<bool, ImageError> {
        let path = self.home_of(namespace, name).join(RECORD);
        match fs::remove_file(&path) {
            Ok(()) => Ok(true),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(false),
            Err(e) => Err(ImageError::io("remove", &path)(e)),
        }
    }
}

#[cfg(test)]
mod tests;
