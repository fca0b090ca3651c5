//! What `/counter` says: its nonce, and how far it is. A continued counter is told from a new one by both.

use anyhow::{Context, Result, ensure};

/// One line of a counter.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Count {
    /// Drawn once, when the counter began.
    pub nonce: String,
    /// How often it has counted.
    pub n: u64,
}

impl Count {
    /// The first whole line of an output that is a counter's.
    pub fn first(text: &str) -> Option<Count> {
        whole(text).find_map(Count::parse)
    }

    /// The last one.
    pub fn last(text: &str) -> Option<Count> {
        whole(text).filter_map(Count::parse).last()
    }

    /// Asserts that `later`, the whole output of another counter, is this one gone on: the dump fell between this line
    /// and `until`.
    pub fn continues_in(&self, later: &str, until: u64) -> Result<()> {
        let first = Count::first(later).context("the restored counter said nothing")?;
        ensure!(
            first.nonce == self.nonce,
            "the restored counter's nonce is {}, the dumped one's was {}",
            first.nonce,
            self.nonce
        );
        ensure!(
            (self.n..=until + 1).contains(&first.n),
            "the restored counter begins with {}; it was dumped between {} and {until}",
            first.n,
            self.n
        );
        let all: Vec<u64> = whole(later)
            .filter_map(Count::parse)
            .map(|count| count.n)
            .collect();
        ensure!(
            all.windows(2).all(|pair| pair[1] == pair[0] + 1),
            "the restored counter skipped or repeated: {all:?}"
        );
        Ok(())
    }

    fn parse(line: &str) -> Option<Count> {
        let (nonce, n) = line.split_once(' ')?;
        // The nonce is a UUID; other lines of an output are not meant.
        (nonce.len() == 36).then_some(())?;
        Some(Count {
            nonce: nonce.to_owned(),
            n: n.parse().ok()?,
        })
    }
}

fn whole(text: &str) -> impl Iterator<Item = &str> {
    text[..text.rfind('\n').map_or(0, |end| end + 1)].lines()
}
