//! Which pages of a process have not come in, and where in its pages file their bytes are.

use std::{collections::BTreeMap, fs::File, io::BufReader, path::Path};

use crate::criu_image::{CriuImageError, Mappings, Pagemap};

/// A range of missing memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::pager) struct Piece {
    /// Its first address.
    pub(in crate::pager) vaddr: u64,
    /// Its bytes, whole pages.
    pub(in crate::pager) bytes: u64,
    /// Where they are in the pages file.
    pub(in crate::pager) at: u64,
    /// Whether a forked child finds them too.
    pub(super) inherited: bool,
}

impl Piece {
    pub(super) fn end(&self) -> u64 {
        self.vaddr + self.bytes
    }

    /// What of it lies in `start..end`.
    fn within(&self, start: u64, end: u64) -> Option<Self> {
        let vaddr = self.vaddr.max(start);
        let end = self.end().min(end);
        (vaddr < end).then(|| Self {
            vaddr,
            bytes: end - vaddr,
            at: self.at + (vaddr - self.vaddr),
            ..*self
        })
    }
}

/// The missing memory of one process: pieces by their first address, none overlapping, none reaching
/// over the boundary of a mapping, since one copy may not.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(in crate::pager) struct Missing(BTreeMap<u64, Piece>);

impl Missing {
    /// What a lazy restore leaves to the pager, as the images of process `pid` in `criu_dir` say.
    ///
    /// # Errors
    /// When one of them cannot be read or is malformed.
    pub(in crate::pager) fn read(criu_dir: &Path, pid: i32) -> Result<(Self, u32), CriuImageError> {
        let mut map = Pagemap::open(&criu_dir.join(format!("pagemap-{pid}.img")))?;
        let mappings = Mappings::open(&criu_dir.join(format!("mm-{pid}.img")))?;
        let missing = Self::of(&mut map, &mappings)?;
        Ok((missing, map.pages_id))
    }

    fn of(map: &mut Pagemap<BufReader<File>>, mappings: &Mappings) -> Result<Self, CriuImageError> {
        let page_size = rustix::param::page_size() as u64;
        let mut missing = Self::default();
        let mut at = 0;
        while let Some(run) = map.next_run()? {
            let bytes = run.bytes(page_size);
            if run.lazy() && run.present() {
                let whole = Piece {
                    vaddr: run.vaddr,
                    bytes,
                    at,
                    inherited: true,
                };
                let mut found = 0;
                for mapping in mappings.overlapping(whole.vaddr, whole.end()) {
                    if let Some(piece) = whole.within(mapping.start, mapping.end) {
                        found += piece.bytes;
                        missing.insert(Piece {
                            inherited: mapping.inherited,
                            ..piece
                        });
                    }
                }
                if found != bytes {
                    return Err(CriuImageError::Malformed {
                        path: map.path().to_owned(),
                        what: "it has pages that no mapping of the process holds",
                    });
                }
            }
            if run.present() {
                at += bytes;
            }
        }
        Ok(missing)
    }

    /// What is missing in a child that was forked now. What it does not inherit is not there, or zeros.
    pub(super) fn of_child(&self) -> Self {
        let inherited = self.0.iter().filter(|(_, piece)| piece.inherited);
        Self(inherited.map(|(vaddr, piece)| (*vaddr, *piece)).collect())
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub(super) fn insert(&mut self, piece: Piece) {
        self.0.insert(piece.vaddr, piece);
    }

    /// At most `most` bytes of the first piece at or behind `vaddr`, or of the very first one when nothing is
    /// missing there; to where a block of `align` bytes ends, if that many are left over.
    pub(super) fn next(&self, vaddr: u64, most: u64, align: u64) -> Option<Piece> {
        let behind = self.overlapping(vaddr, u64::MAX).next();
        let piece = behind.or_else(|| self.0.values().next().copied())?;
        let end = piece.vaddr + most;
        let aligned = end - end % align;
        piece.within(
            piece.vaddr,
            if aligned > piece.vaddr { aligned } else { end },
        )
    }

    /// Takes what is missing around `vaddr` within one piece and `start..end`; none when the page at
    /// `vaddr` is not missing.
    pub(super) fn take_around(&mut self, vaddr: u64, start: u64, end: u64) -> Option<Piece> {
        let piece = self.holding(vaddr)?.within(start, end)?;
        self.remove(piece.vaddr, piece.end());
        Some(piece)
    }

    /// Forgets what is missing in `start..end`, and says what that was.
    pub(super) fn remove(&mut self, start: u64, end: u64) -> Vec<Piece> {
        let removed: Vec<Piece> = self.overlapping(start, end).collect();
        for part in &removed {
            let Some(whole) = self.holding(part.vaddr) else {
                continue;
            };
            self.0.remove(&whole.vaddr);
            for rest in [
                whole.within(whole.vaddr, part.vaddr),
                whole.within(part.end(), whole.end()),
            ] {
                rest.into_iter().for_each(|rest| self.insert(rest));
            }
        }
        removed
    }

    /// The memory at `from` is at `to` now, and what was at `to` is gone.
    pub(super) fn shift(&mut self, from: u64, to: u64, bytes: u64) {
        let moved = self.remove(from, from.saturating_add(bytes));
        self.remove(to, to.saturating_add(bytes));
        for piece in moved {
            let vaddr = to + (piece.vaddr - from);
            self.insert(Piece { vaddr, ..piece });
        }
    }

    /// The piece that the page at `vaddr` belongs to.
    fn holding(&self, vaddr: u64) -> Option<Piece> {
        let (_, piece) = self.0.range(..=vaddr).next_back()?;
        (vaddr < piece.end()).then_some(*piece)
    }

    /// The parts of pieces that lie in `start..end`, in their order.
    pub(in crate::pager) fn overlapping(
        &self,
        start: u64,
        end: u64,
    ) -> impl Iterator<Item = Piece> {
        let first = self.holding(start).map_or(start, |piece| piece.vaddr);
        let pieces = (first < end).then(|| self.0.range(first..end));
        pieces
            .into_iter()
            .flatten()
            .filter_map(move |(_, piece)| piece.within(start, end))
    }
}

#[cfg(test)]
mod tests;
