//! What became of the containers that started from the images of a kind. Pure.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::Kind;

/// Images of one kind that may turn out to be of no use before no more are made.
pub const MAX_QUARANTINED: usize = 3;
/// Longest sentence that is kept.
const MAX_WHY: usize = 500;

/// A kind of containers, and what became of each generation of its images.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Record {
    /// What the containers have in common.
    pub kind: Option<Kind>,
    /// By generation, those of which there is something to tell.
    pub generations: BTreeMap<u64, Fate>,
}

/// What became of one generation.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Fate {
    /// Containers in a row that ended early by themselves.
    pub early: u32,
    /// Why it is used by no one any more.
    pub quarantined: Option<String>,
}

impl Fate {
    /// Takes it out of use.
    pub(super) fn quarantine(&mut self, why: &str) {
        self.quarantined = Some(why.chars().take(MAX_WHY).collect());
    }

    /// One more ended early. Whether it is out of use now.
    pub(super) fn ended_early(&mut self, why: &str, most: u32) -> bool {
        self.early = self.early.saturating_add(1);
        if self.early >= most {
            self.quarantine(&format!(
                "{} containers ended early, the last one: {why}",
                self.early
            ));
        }
        self.quarantined.is_some()
    }

    pub(super) fn went_on(&mut self) {
        self.early = 0;
    }
}

impl Record {
    /// Why a generation is in quarantine, if it is.
    pub fn quarantined(&self, generation: u64) -> Option<&str> {
        self.generations.get(&generation)?.quarantined.as_deref()
    }

    pub(super) fn may_use(&self, generation: u64) -> bool {
        self.quarantined(generation).is_none()
    }

    pub(super) fn early(&self, generation: u64) -> u32 {
        self.generations
            .get(&generation)
            .map_or(0, |fate| fate.early)
    }

    pub(super) fn fate(&mut self, generation: u64) -> &mut Fate {
        self.generations.entry(generation).or_default()
    }

    /// Whether too many were of no use.
    pub(super) fn is_hopeless(&self) -> bool {
        let fates = self.generations.values();
        fates.filter(|fate| fate.quarantined.is_some()).count() >= MAX_QUARANTINED
    }

    /// Forgets generations that are gone, but for those that were of no use: those count.
    pub(super) fn forget_removed(&mut self, existing: &[u64]) {
        self.generations
            .retain(|generation, fate| existing.contains(generation) || fate.quarantined.is_some());
    }
}
