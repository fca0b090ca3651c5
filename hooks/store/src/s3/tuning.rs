//! How patient a client of a store is.

use std::{
    hash::{BuildHasher, RandomState},
    time::Duration,
};

use super::S3Error;

/// How patient a client of a store is. The defaults suit a node; tests want less.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Tuning {
    /// Attempts in a row without a byte before a request is given up.
    pub attempts: u32,
    /// The pause after the first such attempt; doubled after each, with jitter.
    pub first_pause: Duration,
    /// The longest pause.
    pub longest_pause: Duration,
    /// A connection that brings no byte for this long is abandoned, and the rest asked for again.
    pub stall: Duration,
    /// How often the objects of a dataset may change under a download before it is given up.
    pub rounds: u32,
}

impl Default for Tuning {
    fn default() -> Self {
        Self {
            // About a minute in all: a store that restarts comes back within it.
            attempts: 10,
            first_pause: Duration::from_millis(200),
            longest_pause: Duration::from_secs(15),
            // S3's own time to first byte stays below a second; its front-ends stall for minutes.
            stall: Duration::from_secs(15),
            rounds: 3,
        }
    }
}

/// Counts attempts without progress, and paces them.
#[derive(Debug)]
pub struct Patience {
    tuning: Tuning,
    failed: u32,
}

impl Patience {
    /// All of it.
    pub fn new(tuning: Tuning) -> Self {
        Self { tuning, failed: 0 }
    }

    /// A byte came.
    pub fn renew(&mut self) {
        self.failed = 0;
    }

    /// Attempts since then, or since the beginning.
    pub fn failed(&self) -> u32 {
        self.failed
    }

    /// That there was none after all.
    pub fn ended(&self, doing: String, last: String) -> S3Error {
        S3Error::Unavailable {
            doing,
            attempts: self.failed,
            last,
        }
    }

    /// Waits before the next attempt; false when there is to be none.
    pub async fn wait(&mut self) -> bool {
        self.failed += 1;
        if self.failed >= self.tuning.attempts {
            return false;
        }
        let doubled = self.tuning.first_pause * 2_u32.saturating_pow(self.failed.min(16) - 1);
        let pause = doubled.min(self.tuning.longest_pause);
        // Between half and all of it, so that parts that failed together do not return together.
        let random = RandomState::new().hash_one(self.failed) % 512;
        let jittered = pause / 2 + pause.mul_f64(random as f64 / 1024.0);
        tokio::time::sleep(jittered).await;
        true
    }
}
