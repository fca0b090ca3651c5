//! Which images may go: a pure function from what lies in the store to what is removed, in which order, and why.
//!
//! ```text
//!  keep       all but the n newest generations of a name
//!  idle       what no container started from for t; of each name the newest generation stays
//!  quota      the least recently used, until the namespace's images fit, and then all images; where no quota was
//!             set but what the disk can spare, of each name the newest generation stays
//! ```
//! What a container leases is never removed, and what was asked for by no rule is not either. An image that is removed goes
//! from memory too; one that lies there only takes none of the disk, and no quota of the disk removes it. What lies in
//! memory beside the disk is a matter of its own: [`demotions`], [`promotions`].
//!
//! **Bytes are those on the disk, and counted once.** Generations share packs by hard links, so the sum of what their
//! manifests list says nothing about the disk, and removing one frees only what no other has. Files are therefore
//! counted by inode: a file counts for its namespace while one of its images has it, and for the store while it has a
//! link that was not removed. A link that no image has (somebody is just making the next generation) keeps the bytes on
//! the disk, and that is what the plan says too.

use std::{
    collections::{BTreeMap, HashMap},
    time::Duration,
};

use rekindle_core::{
    config::Retention,
    name::{ImageName, Namespace},
};
use serde::Serialize;

use crate::image::Places;

mod memory;

pub use memory::{Promotion, demotions, promotions};

/// Of a file system, in percent: what images leave free where no quota was set.
///
/// The kubelet evicts pods when less than 10 % of the node's file system is free, or less than 15 % of the one with
/// container images (`evictionHard`: `nodefs.available<10%`, `imagefs.available<15%`). Before that it removes container
/// images, from 85 % in use until 80 % are (`imageGCHighThresholdPercent`, `imageGCLowThresholdPercent`). Those are its
/// defaults (kubernetes.io: "Node-pressure Eviction", "Kubelet Configuration v1beta1"); whoever leaves a fifth free
/// makes it do neither.
pub const FREE_PERCENT: u64 = 20;

/// How long an image that containers make anew stays all the same where the disk is full and no quota was set, in
/// seconds: it would be made again at the next start, and a container stopped for that.
const IN_DEMAND: u64 = 24 * 3600;

/// A file of an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct HeldFile {
    /// Device and inode: equal ones are one file.
    pub inode: (u64, u64),
    /// Bytes that it takes on the disk.
    pub bytes: u64,
    /// Its hard links, those among the images and others.
    pub links: u64,
}

/// An image, and what it takes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Held {
    /// Its namespace.
    pub namespace: Namespace,
    /// Its name.
    pub name: ImageName,
    /// Its generation.
    pub generation: u64,
    /// When a container last started from it, or when it came into the store; seconds since 1970.
    pub last_used: u64,
    /// A container is being started from it, or still loads from it.
    pub in_use: bool,
    /// Some of it is in its tier only, and comes.
    pub incoming: bool,
    /// Its manifest can be read, and it is not in quarantine. One that is not usable is no generation to keep, and the
    /// newest of no name.
    pub usable: bool,
    /// Containers make it anew where they do not find it (`warm-start: auto`): it is the newest of no name either.
    pub remade: bool,
    /// Its files on the disk; none where it does not lie there.
    pub files: Vec<HeldFile>,
    /// Its files in memory; none where it does not lie there.
    pub memory: Vec<HeldFile>,
}

impl Held {
    /// Where it lies.
    pub fn places(&self) -> Places {
        Places {
            memory: !self.memory.is_empty(),
            disk: !self.files.is_empty(),
        }
    }

    /// Bytes that it takes on the disk, what it shares with others included.
    pub fn bytes(&self) -> u64 {
        self.files.iter().map(|file| file.bytes).sum()
    }

    /// Bytes that it takes in memory, what it shares with others included.
    pub fn memory_bytes(&self) -> u64 {
        self.memory.iter().map(|file| file.bytes).sum()
    }

    /// Bytes that come free when it alone is removed.
    pub fn own_bytes(&self) -> u64 {
        let own = self.files.iter().filter(|file| file.links <= 1);
        own.map(|file| file.bytes).sum()
    }
}

/// The file system of the store.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Disk {
    /// Bytes of all of it.
    pub total: u64,
    /// Bytes that are free, as the kubelet counts them: those that are not kept for root.
    pub available: u64,
}

/// Why an image is removed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case", tag = "rule")]
pub enum Reason {
    /// There are as many newer generations as are kept.
    Keep {
        /// How many are kept.
        keep: u32,
    },
    /// Nothing started from it for too long.
    Idle {
        /// For how long, seconds.
        seconds: u64,
    },
    /// The namespace's images take more than they may.
    NamespaceQuota {
        /// What they may take, bytes.
        quota: u64,
    },
    /// All images take more than they may.
    Quota {
        /// What they may take, bytes.
        quota: u64,
    },
}

/// An image to remove.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Removal {
    /// Which: its place among the images that were handed in.
    pub image: usize,
    /// Why.
    pub reason: Reason,
    /// Bytes that come free on the disk, when those before it are removed too.
    pub frees: u64,
}

/// What is to be done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plan {
    /// What is removed, in this order.
    pub removals: Vec<Removal>,
    /// Bytes that images take on the disk before.
    pub before: u64,
    /// And after.
    pub after: u64,
    /// Bytes that they may take; none where only the images of a namespace were looked at.
    pub quota: Option<u64>,
}

impl Plan {
    /// Bytes by which the images that must stay go over the quota.
    pub fn over(&self) -> u64 {
        self.quota
            .map_or(0, |quota| self.after.saturating_sub(quota))
    }
}

/// Says what to remove of `images` at the time `now` (seconds since 1970). `disk` is none where these are only some of
/// the store's images: then nothing is known of all of them, and the store's quota is left alone.
pub fn plan(images: &[Held], policy: &Retention, disk: Option<Disk>, now: u64) -> Plan {
    let mut ledger = Ledger::of(images);
    let before = ledger.used;
    if let Some(keep) = policy.keep {
        for image in superseded(images, keep) {
            ledger.remove(image, Reason::Keep { keep });
        }
    }
    if let Some(idle) = policy.idle {
        for image in idlers(images, idle, policy.idle_newest, now) {
            let seconds = now.saturating_sub(images[image].last_used);
            ledger.remove(image, Reason::Idle { seconds });
        }
    }
    let mut order = by_use(images);
    order.retain(|image| !images[*image].files.is_empty());
    if let Some(quota) = policy.namespace_quota {
        for image in &order {
            if ledger.used_by(&images[*image].namespace) > quota {
                ledger.remove(*image, Reason::NamespaceQuota { quota });
            }
        }
    }
    let quota = disk.map(|disk| policy.quota.unwrap_or_else(|| spared(disk, before)));
    if let Some(quota) = quota {
        // Who has filled the disk may be somebody else. What new containers start from goes only where a person has
        // said so.
        let spare_newest = policy.quota.is_none() && !policy.idle_newest;
        let in_demand = |image: &Held| now.saturating_sub(image.last_used) < IN_DEMAND;
        let newest = newest(images, |image| !image.remade || in_demand(image));
        for image in &order {
            if ledger.used > quota && !(spare_newest && newest[*image]) {
                ledger.remove(*image, Reason::Quota { quota });
            }
        }
    }
    Plan {
        before,
        after: ledger.used,
        removals: ledger.removals,
        quota,
    }
}

/// What images that take `used` bytes now may take, so that [`FREE_PERCENT`] are free.
fn spared(disk: Disk, used: u64) -> u64 {
    let free = disk.total / 100 * FREE_PERCENT;
    used.saturating_add(disk.available).saturating_sub(free)
}

/// The generations behind the `keep` newest of each name, oldest first.
fn superseded(images: &[Held], keep: u32) -> Vec<usize> {
    let mut found = Vec::new();
    for generations in by_name(images).values() {
        let mut usable = generations
            .iter()
            .rev()
            .filter(|image| images[**image].usable);
        let Some(oldest) = usable.nth(keep.saturating_sub(1) as usize) else {
            continue;
        };
        let older = generations
            .iter()
            .take_while(|image| **image != *oldest)
            .copied();
        found.extend(older);
    }
    found
}

/// What was not used for so long, the longest first.
fn idlers(images: &[Held], idle: Duration, newest_too: bool, now: u64) -> Vec<usize> {
    let newest = newest(images, |image| !image.remade);
    let mut order = by_use(images);
    order.retain(|image| {
        now.saturating_sub(images[*image].last_used) >= idle.as_secs()
            && (newest_too || !newest[*image])
    });
    order
}

/// Whether each is the newest generation of its name that is of use, where such a one is to stay.
fn newest(images: &[Held], stays: impl Fn(&Held) -> bool) -> Vec<bool> {
    let mut newest = vec![false; images.len()];
    for generations in by_name(images).values() {
        let newest_first = generations.iter().rev();
        let mut usable = newest_first.filter(|image| images[**image].usable);
        if let Some(image) = usable.next() {
            newest[*image] = stays(&images[*image]);
        }
    }
    newest
}

/// The images of each name, by generation.
fn by_name(images: &[Held]) -> BTreeMap<(&Namespace, &ImageName), Vec<usize>> {
    let mut names: BTreeMap<_, Vec<usize>> = BTreeMap::new();
    for (place, image) in images.iter().enumerate() {
        let name = (&image.namespace, &image.name);
        names.entry(name).or_default().push(place);
    }
    for generations in names.values_mut() {
        generations.sort_by_key(|image| images[*image].generation);
    }
    names
}

/// All images, the least recently used first; of two that were used in the same second the older generation.
fn by_use(images: &[Held]) -> Vec<usize> {
    let mut order: Vec<usize> = (0..images.len()).collect();
    order.sort_by_key(|image| {
        let image = &images[*image];
        (
            image.last_used,
            &image.namespace,
            &image.name,
            image.generation,
        )
    });
    order
}

/// What is still there while images are removed one after the other.
struct Ledger<'a> {
    images: &'a [Held],
    removals: Vec<Removal>,
    removed: Vec<bool>,
    /// Links that are left of each file, and its bytes.
    links: HashMap<(u64, u64), (u64, u64)>,
    used: u64,
    /// Images of a namespace that have a file.
    holders: HashMap<(&'a Namespace, (u64, u64)), u64>,
    used_by: HashMap<&'a Namespace, u64>,
}

impl<'a> Ledger<'a> {
    fn of(images: &'a [Held]) -> Self {
        let mut ledger = Self {
            images,
            removals: Vec::new(),
            removed: vec![false; images.len()],
            links: HashMap::new(),
            used: 0,
            holders: HashMap::new(),
            used_by: HashMap::new(),
        };
        for image in images {
            for file in &image.files {
                if ledger
                    .links
                    .insert(file.inode, (file.links, file.bytes))
                    .is_none()
                {
                    ledger.used += file.bytes;
                }
                let holders = ledger
                    .holders
                    .entry((&image.namespace, file.inode))
                    .or_default();
                *holders += 1;
                if *holders == 1 {
                    *ledger.used_by.entry(&image.namespace).or_default() += file.bytes;
                }
            }
        }
        ledger
    }

    fn used_by(&self, namespace: &Namespace) -> u64 {
        self.used_by.get(namespace).copied().unwrap_or(0)
    }

    /// Removes an image, unless it is gone already or somebody needs it.
    fn remove(&mut self, image: usize, reason: Reason) {
        let held = &self.images[image];
        if held.in_use || self.removed[image] {
            return;
        }
        let mut frees = 0;
        for file in &held.files {
            if let Some((links, bytes)) = self.links.get_mut(&file.inode) {
                *links = links.saturating_sub(1);
                frees += if *links == 0 { *bytes } else { 0 };
            }
            if let Some(holders) = self.holders.get_mut(&(&held.namespace, file.inode)) {
                *holders -= 1;
                if *holders == 0
                    && let Some(used) = self.used_by.get_mut(&held.namespace)
                {
                    *used -= file.bytes;
                }
            }
        }
        self.used -= frees;
        self.removed[image] = true;
        self.removals.push(Removal {
            image,
            reason,
            frees,
        });
    }
}

#[cfg(test)]
mod tests;
