//! What the agent does with images in memory: those that are there only are copied to the disk, those that containers
//! start from are copied from there, and what is idle or too much leaves.

use std::time::{SystemTime, UNIX_EPOCH};

use rekindle_checkpoint::{
    ImageError, SealedImage,
    image::{Copied, Evicted},
    retention::{Held, Removal, demotions, promotions},
};
use rekindle_core::config::NodeConfig;

use super::{Agent, Tiers, reference, rule};
use crate::{
    api::{Event, Kind},
    commands::image::opened::Room,
    keys,
};

impl Agent {
    /// Copies to the disk what is in memory only, the last used first; says how often that failed. What failed stays in
    /// memory, and is tried again.
    pub(super) fn settle(&mut self, images: &mut [Held], config: &NodeConfig) -> usize {
        let mut failed = 0;
        for held in images.iter_mut().filter(|held| held.files.is_empty()) {
            let image = reference(held);
            if self.damaged.contains(&image) {
                failed += 1;
                continue;
            }
            match self.copied(held, config, Kind::SETTLED) {
                Ok(Some(Copied::Written(bytes))) => {
                    tracing::info!(image, bytes, "copied to the disk");
                }
                Ok(_) => {}
                Err(error) => {
                    failed += 1;
                    tracing::warn!(image, "in memory only: {error:#}");
                    self.failed(&image, format!("in memory only: {error:#}"));
                    if matches!(error.downcast_ref(), Some(of) if ImageError::is_damage(of)) {
                        self.damaged.insert(image);
                    }
                }
            }
        }
        failed
    }

    /// Copies into memory what containers start from, as far as there is room; says how often that failed.
    pub(super) fn promote(&self, images: &mut [Held], config: &NodeConfig) -> usize {
        let Some(memory) = self.store.memory().and(config.images.memory.as_ref()) else {
            return 0;
        };
        let mut failed = 0;
        for promotion in promotions(images, memory, now()) {
            let image = reference(&images[promotion.image]);
            let made = self.make_way(images, &promotion.instead_of);
            let copied = made.and_then(|made| match made {
                true => self.copied(&mut images[promotion.image], config, Kind::PROMOTED),
                false => Ok(None),
            });
            match copied {
                Ok(Some(Copied::Written(bytes))) => {
                    tracing::info!(image, bytes, "copied into memory");
                }
                Ok(_) => {}
                Err(error) => {
                    failed += 1;
                    tracing::warn!(image, "not copied into memory: {error:#}");
                    self.failed(&image, format!("not copied into memory: {error:#}"));
                }
            }
        }
        failed
    }

    /// Has other images leave memory; whether they did.
    fn make_way(&self, images: &mut [Held], others: &[usize]) -> anyhow::Result<bool> {
        for other in others {
            let held = &mut images[*other];
            match self.store.demote(held)? {
                Evicted::Freed(bytes) => {
                    self.left(held, bytes, "quota");
                    self.store.recount(held)?;
                }
                Evicted::Used => return Ok(false),
                Evicted::Gone => {}
            }
        }
        Ok(true)
    }

    /// Copies an image to where it is not, verified; none where somebody has removed it, or it is not all here.
    fn copied(
        &self,
        held: &mut Held,
        config: &NodeConfig,
        kind: Kind,
    ) -> anyhow::Result<Option<Copied>> {
        let generation = Some(held.generation);
        let sealed = match self.store.resolve(&held.namespace, &held.name, generation) {
            Err(ImageError::Unknown(_)) => return Ok(None),
            sealed => sealed?,
        };
        if sealed.origin()?.is_some() {
            return Ok(None);
        }
        let copied = self.copy(&sealed, config, kind)?;
        self.store.recount(held)?;
        if let Copied::Written(bytes) = copied {
            let event = Event {
                image: reference(held),
                done: bytes,
                ..Event::default()
            };
            self.told.event(kind, event);
        }
        Ok(Some(copied))
    }

    fn copy(
        &self,
        sealed: &SealedImage,
        config: &NodeConfig,
        kind: Kind,
    ) -> anyhow::Result<Copied> {
        let key = keys::of(config, sealed)?;
        let room = Room::new(&self.store, key.as_ref())?;
        // Without its key it is compared as far as that goes.
        let whole = sealed.key().is_none() || key.is_some();
        let proof = whole.then_some((key.as_ref(), room.path.as_path()));
        Ok(match kind {
            Kind::SETTLED => sealed.settle(proof)?,
            _ => sealed.promote(proof)?,
        })
    }

    /// What leaves memory: what is on the disk too, or whole in its tier.
    pub(super) fn leaving(&self, images: &[Held], config: &NodeConfig) -> Vec<Removal> {
        let Some(memory) = self.store.memory().and(config.images.memory.as_ref()) else {
            return Vec::new();
        };
        let in_tier = |held: &Held| self.told.replicated(|all| all.contains(&reference(held)));
        let plan = demotions(images, memory, now(), in_tier);
        if plan.over() > 0 {
            tracing::warn!(
                over = plan.over(),
                quota = plan.quota,
                "images in memory take more than they may: containers use them, or they are not on the disk"
            );
        }
        plan.removals
    }

    /// Has images leave memory; says how often that failed.
    pub(super) fn demote(
        &self,
        images: &[Held],
        demotions: &[Removal],
        tiers: &mut Tiers<'_>,
    ) -> usize {
        let mut failed = 0;
        for removal in demotions {
            let held = &images[removal.image];
            let evicted = match held.places().disk {
                true => self
                    .store
                    .demote(held)
                    .map_err(anyhow::Error::from)
                    .map(Some),
                // It leaves the node: its tier is asked once more.
                false => self.remove(held, tiers),
            };
            match evicted {
                Ok(Some(Evicted::Freed(bytes))) => self.left(held, bytes, rule(removal.reason)),
                Ok(Some(Evicted::Used | Evicted::Gone)) => {}
                Ok(None) => {
                    let image = reference(held);
                    tracing::warn!(image, "kept in memory: its tier does not have it any more");
                    self.told.replicated(|all| all.remove(&image));
                }
                Err(error) => {
                    failed += 1;
                    let image = reference(held);
                    tracing::warn!(image, "not removed from memory: {error:#}");
                    self.failed(&image, format!("not removed from memory: {error:#}"));
                }
            }
        }
        failed
    }

    /// Tells that an image has left memory.
    fn left(&self, held: &Held, bytes: u64, why: &str) {
        let image = reference(held);
        tracing::info!(image, bytes, why, "removed from memory");
        let event = Event {
            image,
            done: bytes,
            message: why.to_owned(),
            ..Event::default()
        };
        self.told.event(Kind::DEMOTED, event);
    }
}

fn now() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    now.unwrap_or_default().as_secs()
}
