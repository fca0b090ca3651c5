//! What the chunks of an image have in common with those of another.

use std::collections::HashSet;

use super::{Chunks, Part};

/// Which chunks of an image another one has too, by their rows. Digests say so: both images must be without a key, or
/// under the same.
#[derive(Debug)]
pub struct Common(Vec<bool>);

/// What a part of a stream is made of, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Composition {
    /// All of it.
    pub bytes: u64,
    /// Of these, runs of zeros, which are stored nowhere.
    pub zeros: u64,
    /// Of these, what lies in chunks that the other image has too.
    pub common: u64,
}

impl Composition {
    /// Adds what another part is made of.
    pub fn add(&mut self, other: Self) {
        self.bytes += other.bytes;
        self.zeros += other.zeros;
        self.common += other.common;
    }

    /// What the other image does not have.
    pub fn own(&self) -> u64 {
        self.bytes - self.zeros - self.common
    }
}

impl Chunks {
    /// Those of these chunks that `other` has too.
    pub fn common(&self, other: &Self) -> Common {
        let digests: HashSet<_> = other.rows.iter().map(|row| row.digest).collect();
        let rows = self.rows.iter();
        Common(rows.map(|row| digests.contains(&row.digest)).collect())
    }

    /// How many different chunks there are, and their bytes.
    pub fn different(&self) -> (usize, u64) {
        let bytes = self.rows.iter().map(|row| u64::from(row.plain));
        (self.rows.len(), bytes.sum())
    }

    /// How many of them the other image has too, and their bytes.
    pub fn in_common(&self, common: &Common) -> (usize, u64) {
        let rows = self.rows.iter().zip(&common.0);
        let both = rows.filter(|(_, common)| **common);
        both.fold((0, 0), |(count, bytes), (row, _)| {
            (count + 1, bytes + u64::from(row.plain))
        })
    }

    /// What a stream has between two offsets; nothing where it ends before them, or there is no such stream.
    pub fn composition(
        &self,
        name: &str,
        from: u64,
        to: u64,
        common: Option<&Common>,
    ) -> Composition {
        let mut found = Composition::default();
        let Some(stream) = self.streams.get(name) else {
            return found;
        };
        let first = stream.ends.partition_point(|end| *end <= from);
        let mut begin = first.checked_sub(1).map_or(0, |before| stream.ends[before]);
        for (part, end) in stream.parts.iter().zip(&stream.ends).skip(first) {
            if begin >= to {
                break;
            }
            let bytes = to.min(*end) - from.max(begin);
            found.bytes += bytes;
            match part {
                Part::Zeros(_) => found.zeros += bytes,
                Part::Chunk(row) if common.is_some_and(|common| common.0[*row as usize]) => {
                    found.common += bytes;
                }
                Part::Chunk(_) => {}
            }
            begin = *end;
        }
        found
    }
}
