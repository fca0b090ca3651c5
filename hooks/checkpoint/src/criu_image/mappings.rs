//! Where a process's mappings begin and end.

use std::{fs::File, io::BufReader, path::Path};

use super::{CriuImageError, Records, wire};

const MM_MAGIC: u32 = 0x5749_2820;
/// Set in the status of what is no mapping but a range of guard pages (`MADV_GUARD_INSTALL`) within one.
/// CRIU lists these behind all mappings (`criu/include/image.h`, since 4.2).
const GUARD: u64 = 1 << 16;

/// The mappings of one process, as `mm-<pid>.img` lists them (`images/mm.proto`, `images/vma.proto`): ranges
/// of addresses, ascending, not overlapping.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Mappings(Vec<(u64, u64)>);

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
        let mut ranges = Vec::new();
        let mut malformed = None;
        wire::fields(message, |field, _| {
            if field.number == 14 {
                match range(field.bytes) {
                    Ok(range) => ranges.extend(range),
                    Err(what) => malformed = Some(what),
                }
            }
        })?;
        if let Some(what) = malformed {
            return Err(what);
        }
        let ascending = ranges.windows(2).all(|pair| pair[0].1 <= pair[1].0);
        if !ascending || ranges.iter().any(|(start, end)| start >= end) {
            return Err("its mappings are not in order");
        }
        Ok(Self(ranges))
    }

    /// Those that have a part in `start..end`, in their order.
    pub(crate) fn overlapping(&self, start: u64, end: u64) -> impl Iterator<Item = (u64, u64)> {
        let first = self.0.partition_point(|(_, behind)| *behind <= start);
        self.0[first..]
            .iter()
            .copied()
            .take_while(move |(begin, _)| *begin < end)
    }
}

/// Where a mapping begins and ends; none for a range of guard pages.
fn range(message: &[u8]) -> Result<Option<(u64, u64)>, &'static str> {
    let (mut start, mut end, mut status) = (None, None, 0);
    wire::fields(message, |field, _| match field.number {
        1 => start = field.value,
        2 => end = field.value,
        7 => status = field.value.unwrap_or_default(),
        _ => {}
    })?;
    let range = start.zip(end).ok_or("a mapping has no address")?;
    Ok((status & GUARD == 0).then_some(range))
}
