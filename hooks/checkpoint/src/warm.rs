//! Images that containers make for others of their kind (`warm-start: auto`).
//!
//! ```text
//!  Kind ──name──▶ the images NAMESPACE/auto-CONTAINER-KEY ──┬─ one that may be used ─▶ restore ─ fails ─▶ quarantine
//!                                                           └─ none ─▶ cold start ─ warm ─▶ Making ─▶ image
//! ```
//! What decides whether two containers are of one [`Kind`] is hashed into the name of their images: to find one is to
//! look at one folder. What became of containers that started from them is in a [`Record`] beside them.

use std::fs;

use rekindle_core::{
    config::Retention,
    name::{ImageName, Namespace},
};
use rekindle_store::{Lock, write_file};

use crate::image::{ImageError, ImageStore};

mod kind;
mod record;

pub use kind::{Kind, Surroundings};
pub use record::{Fate, MAX_QUARANTINED, Record};

/// Beside the generations of a name; see [`Record`].
const RECORD: &str = ".warm.json";
/// Held while the record is changed.
const RECORD_LOCK: &str = ".warm.lock";
/// Held by the one container that makes an image.
const MAKING_LOCK: &str = ".making.lock";
/// Most bytes of a record that are read. Each generation has a sentence, and each of a kind's parts a few words.
const MAX_RECORD: u64 = 4 << 20;

/// The images of one kind of containers.
#[derive(Debug, Clone)]
pub struct WarmImages {
    store: ImageStore,
    namespace: Namespace,
    name: ImageName,
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
    /// Those that were made were of no use.
    #[error(
        "{MAX_QUARANTINED} images of this kind were put into quarantine, and no more are made; look at why (`rekindle image show`), and remove them (`rekindle image rm`) to try again"
    )]
    Hopeless,
}

impl WarmImages {
    /// Those of this name in a store.
    pub fn new(store: ImageStore, namespace: Namespace, name: ImageName) -> Self {
        Self {
            store,
            namespace,
            name,
        }
    }

    /// Their namespace and name.
    pub fn name(&self) -> (&Namespace, &ImageName) {
        (&self.namespace, &self.name)
    }

    /// Makes room for the next kinds, but not of the newest image of this one: it has just been made. What was removed.
    ///
    /// # Errors
    /// What the file system says.
    pub fn make_room(&self, rules: &Retention) -> Result<Vec<String>, ImageError> {
        let _lease = self.store.resolve(&self.namespace, &self.name, None)?;
        self.store.make_room(rules)
    }

    /// The newest generation that may be used.
    ///
    /// # Errors
    /// What the file system says.
    pub fn usable(&self) -> Result<Option<u64>, ImageError> {
        let record = self.record();
        let all = self.store.generations(&self.namespace, &self.name)?;
        Ok(all
            .into_iter()
            .rev()
            .find(|generation| record.may_use(*generation)))
    }

    /// What is known of them. One that cannot be read is as none: it keeps images from being used, and decides nothing
    /// else.
    pub fn record(&self) -> Record {
        self.store.warm_record(&self.namespace, &self.name)
    }

    /// Notes a restore that failed: its image is used by no one any more. `why` is a sentence.
    ///
    /// # Errors
    /// What the file system says.
    pub fn failed(&self, generation: u64, why: &str) -> Result<(), ImageError> {
        self.change(|record| record.fate(generation).quarantine(why))
    }

    /// Notes a restored container that ended by itself too soon. At `most` times its image is used by no one any more;
    /// says whether that is so now.
    ///
    /// # Errors
    /// What the file system says.
    pub fn ended_early(&self, generation: u64, why: &str, most: u32) -> Result<bool, ImageError> {
        let mut quarantined = false;
        self.change(|record| quarantined = record.fate(generation).ended_early(why, most))?;
        Ok(quarantined)
    }

    /// Notes a restored container that went on: what ended early before had other reasons.
    ///
    /// # Errors
    /// What the file system says.
    pub fn went_on(&self, generation: u64) -> Result<(), ImageError> {
        // Mostly there is nothing to forget.
        if self.record().early(generation) == 0 {
            return Ok(());
        }
        self.change(|record| record.fate(generation).went_on())
    }

    /// The right to make an image, where one is wanted.
    ///
    /// # Errors
    /// What the file system says.
    pub fn make(&self) -> Result<Result<Making, NotMade>, ImageError> {
        let home = self.store.home(&self.namespace, &self.name)?;
        let Some(making) = Lock::try_acquire(&home.join(MAKING_LOCK))? else {
            return Ok(Err(NotMade::Busy));
        };
        // Whoever had the right before may have used it.
        if self.usable()?.is_some() {
            return Ok(Err(NotMade::Exists));
        }
        Ok(match self.record().is_hopeless() {
            true => Err(NotMade::Hopeless),
            false => Ok(Making(making)),
        })
    }

    /// Writes down what kind of container the images are of, for whoever asks why another one has no part in them.
    ///
    /// # Errors
    /// What the file system says.
    pub fn describe(&self, kind: &Kind) -> Result<(), ImageError> {
        self.change(|record| record.kind = Some(kind.clone()))
    }

    /// In what `kind` differs from the kind of the newest images of the same container in this namespace; none where
    /// there are none.
    ///
    /// # Errors
    /// What the file system says.
    pub fn nearest(&self, kind: &Kind) -> Result<Option<(ImageName, Vec<String>)>, ImageError> {
        let mut nearest: Option<(ImageName, Vec<String>)> = None;
        for name in self.store.names(&self.namespace)? {
            if name == self.name {
                continue;
            }
            let Some(other) = self.store.warm_record(&self.namespace, &name).kind else {
                continue;
            };
            if other.container != kind.container {
                continue;
            }
            let differences = kind.differences(&other);
            if nearest
                .as_ref()
                .is_none_or(|(_, best)| differences.len() < best.len())
            {
                nearest = Some((name, differences));
            }
        }
        Ok(nearest)
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

    /// Forgets it: who removes all images of a name wants to begin anew.
    pub(crate) fn forget_warm(
        &self,
        namespace: &Namespace,
        name: &ImageName,
    ) -> Result<(), ImageError> {
        let path = self.home_of(namespace, name).join(RECORD);
        match fs::remove_file(&path) {
            Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
                Err(ImageError::io("remove", &path)(e))
            }
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests;
