//! `chunks.index`: where each chunk is, and which of them make up each stream.
//!
//! All numbers are little-endian. Whoever parses one trusts nothing in it: every count is compared with the
//! bytes that are there before memory is asked for.

use std::{mem, ops::Range};

use super::{CHUNK, ChunkError, Digest, Part, Stored, Stream, ZEROS, cipher::TAG, codec::Encoding};
use crate::manifest::is_image_path;

/// Most bytes of an index that are read: a TiB of memory, no two pages of which are alike, needs half of it.
pub const MAX_INDEX: u64 = 2 << 30;

/// Longest stream: no address space of Linux reaches further (x86 with five levels).
const MAX_STREAM: u64 = 1 << 57;
const MAGIC: &[u8; 8] = b"RKCHUNKS";
/// Magic, and the numbers of packs, chunks and streams.
const HEAD: usize = 8 + 3 * 4;
/// A chunk: digest, offset, stored bytes, plain bytes, pack, encoding and an unused byte.
const ROW: usize = 32 + 8 + 4 + 4 + 2 + 1 + 1;
/// Set in a stream's part that is a run of zeros.
const RUN: u32 = 1 << 31;

/// Where a chunk is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Chunk {
    pub(super) digest: Digest,
    pub(super) pack: u16,
    pub(super) offset: u64,
    /// Bytes in the pack.
    pub(super) stored: u32,
    /// Bytes of the chunk, 1 to [`CHUNK`].
    pub(super) plain: u32,
    pub(super) encoding: Encoding,
}

impl Chunk {
    /// Its bytes in the pack.
    pub(super) fn range(&self) -> Range<u64> {
        self.offset..self.offset + u64::from(self.stored)
    }
}

/// The chunks of an image, and its streams.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Index {
    pub(super) chunks: Vec<Chunk>,
    /// Sorted by name.
    pub(super) streams: Vec<Stream>,
}

impl Index {
    /// Writes it for an image of so many packs.
    pub(super) fn to_bytes(&self, packs: usize) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(HEAD + self.chunks.len() * ROW);
        bytes.extend_from_slice(MAGIC);
        for count in [packs, self.chunks.len(), self.streams.len()] {
            bytes.extend_from_slice(&(count as u32).to_le_bytes());
        }
        for chunk in &self.chunks {
            bytes.extend_from_slice(&chunk.digest.0);
            bytes.extend_from_slice(&chunk.offset.to_le_bytes());
            bytes.extend_from_slice(&chunk.stored.to_le_bytes());
            bytes.extend_from_slice(&chunk.plain.to_le_bytes());
            bytes.extend_from_slice(&chunk.pack.to_le_bytes());
            bytes.extend_from_slice(&[chunk.encoding as u8, 0]);
        }
        for stream in &self.streams {
            bytes.push(stream.name.len() as u8);
            bytes.extend_from_slice(stream.name.as_bytes());
            bytes.extend_from_slice(&(stream.parts.len() as u32).to_le_bytes());
            for part in &stream.parts {
                let word = match part {
                    Part::Chunk(row) => *row,
                    Part::Zeros(count) => RUN | count,
                };
                bytes.extend_from_slice(&word.to_le_bytes());
            }
        }
        bytes
    }

    /// Reads one of an image whose packs have these sizes; `encrypted` when they are.
    ///
    /// # Errors
    /// [`ChunkError::Index`]: the first thing in it that we never write.
    pub fn parse(bytes: &[u8], packs: &[u64], encrypted: bool) -> Result<Self, ChunkError> {
        let mut rest = Rest(bytes);
        if rest.take(MAGIC.len())? != MAGIC {
            return Err(ChunkError::Index("it does not begin as one"));
        }
        if rest.number()? as usize != packs.len() {
            return Err(ChunkError::Index(
                "it has another number of packs than the image",
            ));
        }
        let (chunks, streams) = (rest.number()? as usize, rest.number()? as usize);
        let rows = chunks
            .checked_mul(ROW)
            .ok_or(ChunkError::Index("it ends early"))?;
        let rows = rest.take(rows)?;
        let mut index = Self {
            chunks: Vec::with_capacity(chunks),
            streams: Vec::new(),
        };
        for row in rows.chunks_exact(ROW) {
            index.chunks.push(chunk(row, packs, encrypted)?);
        }
        for _ in 0..streams {
            let stream = index.stream(&mut rest)?;
            if index
                .streams
                .last()
                .is_some_and(|last| last.name >= stream.name)
            {
                return Err(ChunkError::Index("its streams are not in order"));
            }
            index.streams.push(stream);
        }
        match rest.0 {
            [] => Ok(index),
            _ => Err(ChunkError::Index("something follows its end")),
        }
    }

    /// Drops the chunks that no stream has, which were stored before it was known what the streams would be.
    /// Says what the streams are made of, and what is unused now of the pack `own`: ranges of its bytes, in order.
    pub(super) fn keep_used(&mut self, own: u16) -> (Stored, Vec<Range<u64>>) {
        let mut stored = Stored::default();
        let mut used = vec![false; self.chunks.len()];
        for part in self.streams.iter().flat_map(|stream| &stream.parts) {
            let bytes = part.bytes(&self.chunks);
            stored.bytes += bytes;
            match *part {
                Part::Zeros(_) => stored.zeros += bytes,
                Part::Chunk(row) => {
                    let chunk = &self.chunks[row as usize];
                    let again = mem::replace(&mut used[row as usize], true);
                    if again || chunk.pack != own {
                        stored.shared += bytes;
                    } else {
                        stored.written += u64::from(chunk.stored);
                    }
                }
            }
        }
        let mut unused: Vec<Range<u64>> = Vec::new();
        let mut rows = Vec::with_capacity(used.len());
        let mut kept = 0;
        for (chunk, used) in self.chunks.iter().zip(&used) {
            rows.push(kept);
            kept += u32::from(*used);
            if !used && chunk.pack == own {
                unused.push(chunk.range());
            }
        }
        if kept as usize == used.len() {
            return (stored, unused);
        }
        let mut used = used.into_iter();
        self.chunks.retain(|_| used.next().unwrap_or(true));
        for part in self.streams.iter_mut().flat_map(|stream| &mut stream.parts) {
            if let Part::Chunk(row) = part {
                *row = rows[*row as usize];
            }
        }
        unused.sort_by_key(|range| range.start);
        unused.dedup_by(|next, range| {
            let joined = range.end == next.start;
            if joined {
                range.end = next.end;
            }
            joined
        });
        (stored, unused)
    }

    fn stream(&self, rest: &mut Rest<'_>) -> Result<Stream, ChunkError> {
        let length = usize::from(rest.take(1)?[0]);
        let name = std::str::from_utf8(rest.take(length)?).unwrap_or_default();
        if !is_image_path(name) {
            return Err(ChunkError::Index(
                "the name of a stream is not that of a file of an image",
            ));
        }
        let parts = rest.number()? as usize;
        let words = parts
            .checked_mul(4)
            .ok_or(ChunkError::Index("it ends early"))?;
        let words = rest.take(words)?;
        let mut parts = Vec::with_capacity(parts);
        for word in words.chunks_exact(4) {
            let word = u32::from_le_bytes([word[0], word[1], word[2], word[3]]);
            parts.push(match word & RUN {
                0 if (word as usize) < self.chunks.len() => Part::Chunk(word),
                0 => {
                    return Err(ChunkError::Index(
                        "a stream names a chunk that is not there",
                    ));
                }
                _ if word == RUN => return Err(ChunkError::Index("a run of no zeros")),
                _ => Part::Zeros(word & !RUN),
            });
        }
        let bytes = parts.iter().try_fold(0_u64, |sum, part| {
            sum.checked_add(part.bytes(&self.chunks))
                .filter(|sum| *sum <= MAX_STREAM)
        });
        if bytes.is_none() {
            return Err(ChunkError::Index(
                "a stream is longer than any address space",
            ));
        }
        Ok(Stream {
            name: name.to_owned(),
            parts,
        })
    }

    /// The bytes of a pack that this image needs, by the pack's place.
    pub(super) fn live(&self, packs: usize) -> Vec<u64> {
        let mut live = vec![0; packs];
        for chunk in &self.chunks {
            live[usize::from(chunk.pack)] += u64::from(chunk.stored);
        }
        live
    }
}

impl Part {
    /// Its bytes, where these are the rows of its index.
    pub(super) fn bytes(self, rows: &[Chunk]) -> u64 {
        match self {
            Self::Chunk(row) => u64::from(rows[row as usize].plain),
            Self::Zeros(count) => u64::from(count) * ZEROS,
        }
    }
}

fn chunk(row: &[u8], packs: &[u64], encrypted: bool) -> Result<Chunk, ChunkError> {
    let mut rest = Rest(row);
    let mut digest = [0; 32];
    digest.copy_from_slice(rest.take(32)?);
    let offset = rest
        .take(8)?
        .iter()
        .rev()
        .fold(0, |sum, byte| sum << 8 | u64::from(*byte));
    let (stored, plain) = (rest.number()?, rest.number()?);
    let [low, high, encoding, unused] = rest.number()?.to_le_bytes();
    let pack = u16::from_le_bytes([low, high]);
    let Some(encoding) = Encoding::from_byte(encoding).filter(|_| unused == 0) else {
        return Err(ChunkError::Index(
            "a chunk is encoded in no way that is known",
        ));
    };
    if plain == 0 || plain as usize > CHUNK {
        return Err(ChunkError::Index("a chunk of impossible size"));
    }
    let tag = if encrypted { TAG as u32 } else { 0 };
    let fits = match encoding {
        Encoding::Plain => stored == plain + tag,
        Encoding::Lz4 => stored > tag && stored < plain + tag,
    };
    let end = offset.checked_add(u64::from(stored));
    let size = packs.get(usize::from(pack));
    if !fits || end.zip(size).is_none_or(|(end, size)| end > *size) {
        return Err(ChunkError::Index(
            "a chunk lies where its pack has no bytes",
        ));
    }
    Ok(Chunk {
        digest: Digest(digest),
        pack,
        offset,
        stored,
        plain,
        encoding,
    })
}

/// What is still to be parsed.
struct Rest<'a>(&'a [u8]);

impl<'a> Rest<'a> {
    fn take(&mut self, bytes: usize) -> Result<&'a [u8], ChunkError> {
        let (taken, rest) = self
            .0
            .split_at_checked(bytes)
            .ok_or(ChunkError::Index("it ends early"))?;
        self.0 = rest;
        Ok(taken)
    }

    fn number(&mut self) -> Result<u32, ChunkError> {
        let bytes = self.take(4)?;
        Ok(u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]))
    }
}
