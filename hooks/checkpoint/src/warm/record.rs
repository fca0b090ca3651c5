//! What became of the containers that started from the images of a kind. Pure.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::Kind;

/// Images of one kind in a row that may turn out to be of no use, and containers in a row of which none can be made,
/// before no more are made.
pub const MAX_USELESS: u32 = 3;
/// Longest sentence that is kept.
const MAX_WHY: usize = 500;

/// A kind of containers, and what became of each generation of its images.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Record {
    /// What the containers have in common. Not where their images are encrypted.
    pub kind: Option<Kind>,
    /// By generation, those of which there is something to tell.
    pub generations: BTreeMap<u64, Fate>,
    /// Images that were put into quarantine since a container went on.
    pub useless: u32,
    /// Containers of which no image could be made since one could.
    pub unmade: u32,
}

/// What became of one generation.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Fate {
    /// Containers in a row that ended early, in thirds: see [`End`].
    pub early: u32,
    /// Why it is used by no one any more.
    pub quarantined: Option<String>,
}

/// How a restored container ended early.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// It failed by itself, or could not be restored for a reason that may have been the node's.
    Failed,
    /// Somebody signalled it: pods come and go, and a liveness probe may have found it dead. It counts for a third.
    Signalled,
}

impl End {
    fn thirds(self) -> u32 {
        match self {
            Self::Failed => 3,
            Self::Signalled => 1,
        }
    }
}

impl Record {
    /// Why a generation is in quarantine, if it is.
    pub fn quarantined(&self, generation: u64) -> Option<&str> {
        self.generations.get(&generation)?.quarantined.as_deref()
    }

    /// Takes a generation out of use.
    pub(super) fn quarantine(&mut self, generation: u64, why: &str) {
        let fate = self.generations.entry(generation).or_default();
        if fate.quarantined.is_none() {
            fate.quarantined = Some(why.chars().take(MAX_WHY).collect());
            self.useless = self.useless.saturating_add(1);
        }
    }

    /// One more ended early, of `failures` that are let pass. Whether its image is out of use now.
    pub(super) fn ended_early(
        &mut self,
        generation: u64,
        why: &str,
        end: End,
        failures: u32,
    ) -> bool {
        let fate = self.generations.entry(generation).or_default();
        fate.early = fate.early.saturating_add(end.thirds());
        if fate.early >= failures.saturating_mul(End::Failed.thirds()) {
            let why = format!("its containers end early, the last one: {why}");
            self.quarantine(generation, &why);
        }
        self.quarantined(generation).is_some()
    }

    /// A restored container went on.
    pub(super) fn went_on(&mut self, generation: u64) {
        self.generations.entry(generation).or_default().early = 0;
        self.useless = 0;
    }

    /// Whether `went_on` would change nothing.
    pub(super) fn is_clean(&self, generation: u64) -> bool {
        let early = self
            .generations
            .get(&generation)
            .map_or(0, |fate| fate.early);
        early == 0 && self.useless == 0
    }

    /// Whether no more are made.
    pub(super) fn is_hopeless(&self) -> bool {
        self.useless >= MAX_USELESS || self.unmade >= MAX_USELESS
    }

    /// Forgets generations that are gone.
    pub(super) fn forget_removed(&mut self, existing: &[u64]) {
        self.generations
            .retain(|generation, _| existing.contains(generation));
    }
}
