//! What was asked for in an earlier restore of the image, brought in ahead; and what this one is asked for.
//!
//! A block that was brought in ahead is not asked for any more, so both make up the note for the next restore: in the
//! order in which they came in. A restore that asks for nothing new leaves the note as it was; what is missed in it takes
//! the place at which it was missed; and a block that is never there any more drops out.

use std::{
    collections::HashSet,
    sync::{Mutex, MutexGuard, PoisonError},
    vec,
};

use crate::touches::{MAX_TOUCHES, Touch};

/// The notes of one restore.
#[derive(Debug)]
pub(super) struct Ahead {
    /// Of the earlier one, what was not come to yet.
    noted: Mutex<vec::IntoIter<Touch>>,
    wanted: Mutex<Wanted>,
}

/// What was asked for, now or earlier, in the order in which it came in.
#[derive(Debug, Default)]
pub(super) struct Wanted {
    pub(super) touches: Vec<Touch>,
    known: HashSet<Touch>,
    /// Blocks that were asked for now.
    pub(super) asked: usize,
    /// Blocks that nobody had asked for when they were brought in.
    pub(super) ahead: usize,
}

impl Wanted {
    /// Notes a block; says whether it is a new one.
    fn note(&mut self, touch: Touch) -> bool {
        if touch.pid() <= 0 || self.touches.len() == MAX_TOUCHES || !self.known.insert(touch) {
            return false;
        }
        self.touches.push(touch);
        true
    }
}

impl Ahead {
    pub(super) fn new(noted: Vec<Touch>) -> Self {
        Self {
            noted: Mutex::new(noted.into_iter()),
            wanted: Mutex::default(),
        }
    }

    /// Somebody waits for this block, which is missing. What a forked process asks for is counted and not noted: it has
    /// no number by which the next restore would know it.
    pub(super) fn asked(&self, touch: Touch) {
        let mut wanted = lock(&self.wanted);
        wanted.asked += 1;
        wanted.note(touch);
    }

    /// The next block to bring in, as `find` finds it; those that it does not find are passed over.
    pub(super) fn next<T>(&self, mut find: impl FnMut(Touch) -> Option<T>) -> Option<T> {
        let mut noted = lock(&self.noted);
        let (touch, found) = noted.find_map(|touch| Some((touch, find(touch)?)))?;
        // Under the lock of both: their order is that in which they are brought in, whoever does it.
        let mut wanted = lock(&self.wanted);
        wanted.ahead += usize::from(wanted.note(touch));
        Some(found)
    }

    pub(super) fn into_wanted(self) -> Wanted {
        self.wanted
            .into_inner()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
