//! Where a process's mappings begin and end.

use std::{fs::File, io::BufReader, path::Path};

use super::{CriuImageError, Records, wire};

pub(super) const MM_MAGIC: u32 = 0x5749_2820;
/// Set in the status of what is no mapping but a range of guard pages (`MADV_GUARD_INSTALL`) within one.
/// CRIU lists these behind all mappings (`criu/include/image.h`, since 4.2).
pub(super) const GUARD: u64 = 1 << 16;

/// `MADV_DONTFORK` and `MADV_WIPEONFORK`, as bits of a mapping's advice.
const NOT_INHERITED: u64 = 1 << 10 | 1 << 18;

/// A mapping of a process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Mapping {
    /// Its first address.
    pub(crate) start: u64,
    /// The first address behind it.
    pub(crate) end: u64,
    /// Whether a forked child finds the same in it.
    pub(crate) inherited: bool,
}

/// The mappings of one process, as `mm-<pid>.img` lists them (`images/mm.proto`, `images/vma.proto`):
/// ascending, not overlapping.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Mappings(Vec<Mapping>);

impl Mappings {
    /// Reads them.
    ///
    /// # Errors
    /// When the file cannot be read, or lists what no process could have.
    pub(crate) fn open(path: &Path) -> Result<Self, CriuImageError> {
        let file = File::open(path).map_err(|source| CriuImageError::Read {
            path: path.to_owned(),
            source,
        })?;
        let mut records = Records::new(path, BufReader::new(file), MM_MAGIC)?;
        let (_, message) = records
            .next()?
            .ok_or_else(|| records.malformed("it is empty"))?;
        Self::parse(&message).map_err(|what| records.malformed(what))
    }

    fn parse(message: &[u8]) -> Result<Self, &'static str> {
        let mut mappings: Vec<Mapping> = Vec::new();
        let mut malformed = None;
        wire::fields(message, |field, _| {
            if field.number == 14 {
                match mapping(field.bytes) {
                    Ok(mapping) => mappings.extend(mapping),
                    Err(what) => malformed = Some(what),
                }
            }
        })?;
        if let Some(what) = malformed {
            return Err(what);
        }
        let ascending = mappings.windows(2).all(|pair| pair[0].end <= pair[1].start);
        if !ascending || mappings.iter().any(|mapping| mapping.start >= mapping.end) {
            return Err("its mappings are not in order");
        }
        Ok(Self(mappings))
    }

    /// Those that have a part in `start..end`, in their order.
    pub(crate) fn overlapping(&self, start: u64, end: u64) -> impl Iterator<Item = Mapping> {
        let first = self.0.partition_point(|mapping| mapping.end <= start);
        self.0[first..]
            .iter()
            .copied()
            .take_while(move |mapping| mapping.start < end)
    }
}

/// A mapping; none for a range of guard pages.
fn mapping(message: &[u8]) -> Result<Option<Mapping>, &'static str> {
    let (mut start, mut end, mut status, mut advice) = (None, None, 0, 0);
    wire::fields(message, |field, _| match field.number {
        1 => start = field.value,
        2 => end = field.value,
        7 => status = field.value.unwrap_or_default(),
        9 => advice = field.value.unwrap_or_default(),
        _ => {}
    })?;
    let (start, end) = start.zip(end).ok_or("a mapping has no address")?;
    let mapping = Mapping {
        start,
        end,
        inherited: advice & NOT_INHERITED == 0,
    };
    Ok((status & GUARD == 0).then_some(mapping))
}
