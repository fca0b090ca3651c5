//! Which images lie in memory too: pure, as [`plan`].
//!
//! What a container started from within `images.memory.idle` belongs there, the last used first, as far as the quotas go.
//! So nothing that has just been put there goes again for being idle, and nothing takes the place of what was used later.

use std::collections::{HashMap, HashSet};

use rekindle_core::{
    config::{Memory, Retention},
    name::Namespace,
};

use super::{Disk, Held, Plan, by_use, plan};

/// Says which images leave memory, in which order, and why: those that are idle, and the least recently used while there
/// are more than the quotas allow. Only what lies on the disk too may go, or, by `elsewhere`, is whole in its tier.
pub fn demotions(
    images: &[Held],
    memory: &Memory,
    now: u64,
    elsewhere: impl Fn(&Held) -> bool,
) -> Plan {
    let seen = images.iter().map(|image| {
        let places = image.places();
        Held {
            in_use: image.in_use || !places.memory || !(places.disk || elsewhere(image)),
            files: image.memory.clone(),
            ..image.clone()
        }
    });
    let seen: Vec<Held> = seen.collect();
    let rules = Retention {
        idle: Some(memory.idle),
        idle_newest: true,
        quota: Some(memory.quota),
        namespace_quota: memory.namespace_quota,
        ..Retention::default()
    };
    // With a quota it is not looked at.
    let nothing = Disk {
        total: 0,
        available: 0,
    };
    plan(&seen, &rules, Some(nothing), now)
}

/// An image that goes into memory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Promotion {
    /// Which: its place among the images that were handed in.
    pub image: usize,
    /// Which leave memory for it, before.
    pub instead_of: Vec<usize>,
}

/// Says which images on the disk go into memory, the last used first. Bytes are counted as if they shared nothing with what
/// is there: at most too few go.
pub fn promotions(images: &[Held], memory: &Memory, now: u64) -> Vec<Promotion> {
    let mut used = Used::of(images);
    let mut leaving = by_use(images);
    leaving.retain(|image| {
        let held = &images[*image];
        held.places().memory && held.places().disk && !held.in_use
    });
    let mut all = Vec::new();
    for image in by_use(images).into_iter().rev() {
        let held = &images[image];
        let recent = now.saturating_sub(held.last_used) < memory.idle.as_secs();
        if !recent || !held.usable || held.places().memory {
            continue;
        }
        let mut instead_of = Vec::new();
        let mut then = used.clone();
        for other in &leaving {
            if then.fits(held, memory) || images[*other].last_used >= held.last_used {
                break;
            }
            let whose = &images[*other].namespace;
            if then.fits_all(held, memory) && *whose != held.namespace {
                // It is the namespace that has too much.
                continue;
            }
            then.remove(&images[*other]);
            instead_of.push(*other);
        }
        if then.fits(held, memory) {
            then.add(held);
            used = then;
            leaving.retain(|other| !instead_of.contains(other));
            all.push(Promotion { image, instead_of });
        }
    }
    all
}

/// What lies in memory.
#[derive(Debug, Clone)]
struct Used<'a> {
    all: u64,
    by: HashMap<&'a Namespace, u64>,
}

impl<'a> Used<'a> {
    fn of(images: &'a [Held]) -> Self {
        let mut used = Self {
            all: 0,
            by: HashMap::new(),
        };
        let mut seen = HashSet::new();
        for image in images {
            for file in &image.memory {
                if seen.insert((&image.namespace, file.inode)) {
                    used.all += file.bytes;
                    *used.by.entry(&image.namespace).or_default() += file.bytes;
                }
            }
        }
        used
    }

    fn fits_all(&self, image: &Held, memory: &Memory) -> bool {
        self.all + image.bytes() <= memory.quota
    }

    fn fits(&self, image: &Held, memory: &Memory) -> bool {
        let by = self.by.get(&image.namespace).copied().unwrap_or(0);
        let quota = memory.namespace_quota.unwrap_or(u64::MAX);
        self.fits_all(image, memory) && by + image.bytes() <= quota
    }

    fn add(&mut self, image: &'a Held) {
        self.all += image.bytes();
        *self.by.entry(&image.namespace).or_default() += image.bytes();
    }

    /// What it shares with others stays.
    fn remove(&mut self, image: &'a Held) {
        let own = image.memory.iter().filter(|file| file.links <= 1);
        let own: u64 = own.map(|file| file.bytes).sum();
        self.all = self.all.saturating_sub(own);
        let by = self.by.entry(&image.namespace).or_default();
        *by = by.saturating_sub(own);
    }
}

#[cfg(test)]
mod tests;
