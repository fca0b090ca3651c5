//! Chunks on their way out: none leaves that was not compared with its digest.

use std::{
    collections::BTreeMap,
    fs::File,
    io::{self, Read},
    ops::Range,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
};

use super::{
    CHUNK, ChunkError, Cipher, Index, Key, Part, Remote, Stream,
    cipher::Addresses,
    codec::{Encoding, decode},
    incoming::Incoming,
    index::Chunk,
};
use crate::{image::open_regular, manifest::PackEntry, parallel::in_parallel};

/// How often a chunk is fetched again that is not what was sealed: a byte may flip on the way, and not each time.
const AGAIN: usize = 2;

/// The chunks of one image.
#[derive(Debug)]
pub struct Chunks {
    packs: Vec<Pack>,
    /// Where they are not all here.
    incoming: Option<Arc<Incoming>>,
    addresses: Addresses,
    pub(super) rows: Vec<Chunk>,
    pub(super) streams: BTreeMap<String, Parts>,
    /// Whether a chunk had to be read from where its pack is a second time.
    missed: AtomicBool,
    /// Who reads waits until what is streamed has come, and has nothing come before its turn.
    patient: bool,
}

#[derive(Debug)]
struct Pack {
    path: PathBuf,
    file: File,
    /// The same bytes in another place.
    spare: Option<(PathBuf, File)>,
    cipher: Option<Cipher>,
}

/// A stream, with the offset at which each part ends.
#[derive(Debug, Default)]
pub(super) struct Parts {
    pub(super) parts: Vec<Part>,
    pub(super) ends: Vec<u64>,
}

impl Chunks {
    /// Opens the packs that lie in `dir`.
    ///
    /// # Errors
    /// What the file system says.
    pub fn open(
        dir: &Path,
        packs: &[PackEntry],
        index: Index,
        key: Option<&Key>,
    ) -> Result<Self, ChunkError> {
        let open = |entry: &PackEntry| -> Result<Pack, ChunkError> {
            let path = dir.join(entry.id.file());
            let file = open_regular(&path).map_err(ChunkError::io("read", &path))?;
            let cipher = key.and_then(|key| Cipher::of(key, entry.id));
            Ok(Pack {
                path,
                file,
                spare: None,
                cipher,
            })
        };
        let Index { chunks, streams } = index;
        let streams = streams.into_iter().map(|Stream { name, parts }| {
            let ends = parts.iter().scan(0, |end, part| {
                *end += part.bytes(&chunks);
                Some(*end)
            });
            let ends = ends.collect();
            (name, Parts { parts, ends })
        });
        Ok(Self {
            streams: streams.collect(),
            packs: packs.iter().map(open).collect::<Result<_, _>>()?,
            incoming: None,
            addresses: Addresses::of(key),
            rows: chunks,
            missed: AtomicBool::new(false),
            patient: false,
        })
    }

    /// Has a chunk that cannot be read, or is damaged, read from the same pack in another folder, where that has it.
    #[must_use]
    pub(crate) fn or_from(mut self, dir: &Path) -> Self {
        for pack in &mut self.packs {
            let path = pack.path.file_name().map(|name| dir.join(name));
            pack.spare = path.and_then(|path| Some((path.clone(), open_regular(&path).ok()?)));
        }
        self
    }

    /// Whether that has happened.
    pub fn has_missed(&self) -> bool {
        self.missed.load(Ordering::Relaxed)
    }

    /// Has what is not here of them come from `remote`, when it is read, and with so many requests at once when it is
    /// [streamed](Chunks::stream_in). Whoever reads waits.
    ///
    /// # Errors
    /// What the file system says.
    pub fn from_remote(
        mut self,
        sizes: &[PackEntry],
        remote: Box<dyn Remote>,
        requests: usize,
    ) -> Result<Self, ChunkError> {
        let sizes = sizes.iter().map(|entry| entry.size);
        let packs = self.packs.iter().map(|pack| pack.path.as_path()).zip(sizes);
        self.incoming = Some(Incoming::open(packs, remote, requests)?);
        Ok(self)
    }

    /// Has readers wait for the turn of what is streamed: for who reads all of it, and is in no hurry.
    #[must_use]
    pub(crate) fn patiently(mut self) -> Self {
        self.patient = true;
        self
    }

    /// Begins to fetch the streams that `wanted` says, by their names, in their order, behind what it was told before. For
    /// one process of the node: others find what it has brought.
    pub fn stream_in(&self, wanted: impl Fn(&str) -> bool) {
        let Some(incoming) = &self.incoming else {
            return;
        };
        let streams = self.streams.iter().filter(|(name, _)| wanted(name));
        let parts = streams.flat_map(|(_, stream)| stream.parts.iter().copied());
        incoming.stream(self.in_packs(parts));
    }

    /// The same of parts of streams, with what is known to be asked for soon. What no stream has is passed over.
    pub(crate) fn stream_first(&self, parts: &[(String, Range<u64>)]) {
        let Some(incoming) = &self.incoming else {
            return;
        };
        let streams = parts.iter().filter_map(|(name, range)| {
            let stream = self.streams.get(name)?;
            Some(stream.between(range.start, range.end))
        });
        let parts = streams.flatten().map(|(part, _)| part);
        incoming.stream_scattered(self.in_packs(parts));
    }

    /// Where parts of streams lie: in which pack, and where in that.
    fn in_packs(
        &self,
        parts: impl Iterator<Item = Part>,
    ) -> impl Iterator<Item = (usize, Range<u64>)> {
        parts.filter_map(|part| match part {
            Part::Chunk(row) => {
                let row = &self.rows[row as usize];
                Some((usize::from(row.pack), row.range()))
            }
            Part::Zeros(_) => None,
        })
    }

    /// Whether a part of a stream can be read without waiting. What is not here is fetched before everything else; ask
    /// again soon.
    ///
    /// # Errors
    /// [`ChunkError::Away`] when it cannot be had.
    pub fn ready(&self, name: &str, from: u64, bytes: u64) -> Result<bool, ChunkError> {
        let (Some(incoming), Some(stream)) = (&self.incoming, self.streams.get(name)) else {
            return Ok(true);
        };
        let mut ready = true;
        for (part, _) in stream.between(from, from.saturating_add(bytes)) {
            if let Part::Chunk(row) = part {
                let row = &self.rows[row as usize];
                // All of them are asked for, and not the first only.
                ready &= incoming.ready(usize::from(row.pack), &row.range())?;
            }
        }
        Ok(ready)
    }

    /// Ends the wait of everybody who reads what is not here: nobody needs it any more.
    pub fn give_up(&self) {
        if let Some(incoming) = &self.incoming {
            incoming.stop();
        }
    }

    /// Puts what has come on the disk.
    pub(crate) fn sync(&self) -> Result<(), ChunkError> {
        self.incoming
            .as_ref()
            .map_or(Ok(()), |incoming| incoming.sync())
    }

    /// The names of the streams with their bytes, sorted.
    pub fn streams(&self) -> impl Iterator<Item = (&str, u64)> {
        self.streams
            .iter()
            .map(|(name, parts)| (name.as_str(), parts.bytes()))
    }

    /// Bytes of one of them.
    pub fn bytes_of(&self, name: &str) -> Option<u64> {
        self.streams.get(name).map(Parts::bytes)
    }

    /// Bytes of one of them that lie in chunks between two offsets: what reading that part would write.
    pub fn data_in(&self, name: &str, from: u64, to: u64) -> u64 {
        let Some(stream) = self.streams.get(name) else {
            return 0;
        };
        let parts = stream.between(from, to);
        let chunks = parts.filter(|(part, _)| matches!(part, Part::Chunk(_)));
        chunks
            .map(|(_, range)| to.min(range.end) - from.max(range.start))
            .sum()
    }

    /// One of them, to be read; none where there is no such stream.
    pub fn stream(self: &Arc<Self>, name: &str) -> Option<StreamReader> {
        self.streams.contains_key(name).then(|| StreamReader {
            chunks: Arc::clone(self),
            name: name.to_owned(),
            at: 0,
            buffer: Vec::new(),
            taken: 0,
        })
    }

    /// Fills `into` with what stream `name` has from `at`, and says whether any of that is more than zeros. What
    /// lies behind its end, or in no stream, is [`io::ErrorKind::UnexpectedEof`].
    ///
    /// # Errors
    /// [`ChunkError::Damaged`] when a byte of it is not what was sealed.
    pub fn read_at(&self, name: &str, mut at: u64, into: &mut [u8]) -> Result<bool, ChunkError> {
        let stream = self.streams.get(name);
        let end = at.checked_add(into.len() as u64);
        let Some(stream) = stream.filter(|stream| end.is_some_and(|end| end <= stream.bytes()))
        else {
            return Err(ChunkError::io("read", Path::new(name))(
                io::ErrorKind::UnexpectedEof.into(),
            ));
        };
        let mut place = stream.ends.partition_point(|end| *end <= at);
        let mut rest = into;
        let mut any = false;
        while !rest.is_empty() {
            let end = stream.ends[place];
            let begin = place.checked_sub(1).map_or(0, |before| stream.ends[before]);
            let (head, tail) = rest.split_at_mut(rest.len().min((end - at) as usize));
            any |= matches!(stream.parts[place], Part::Chunk(_));
            match stream.parts[place] {
                Part::Zeros(_) => head.fill(0),
                Part::Chunk(row) if head.len() as u64 == end - begin => self.read(row, head)?,
                Part::Chunk(row) => {
                    let mut whole = [0; CHUNK];
                    let whole = &mut whole[..(end - begin) as usize];
                    self.read(row, whole)?;
                    head.copy_from_slice(&whole[(at - begin) as usize..][..head.len()]);
                }
            }
            at += head.len() as u64;
            rest = tail;
            place += 1;
        }
        Ok(any)
    }

    /// Reads every chunk once and compares it; adds the bytes that are done to `done`.
    ///
    /// # Errors
    /// [`ChunkError::Damaged`] names the first that is not what was sealed.
    pub fn verify(&self, done: &AtomicU64) -> Result<(), ChunkError> {
        /// Rows that one thread takes at a time.
        const BATCH: usize = 64;
        let batches = self.rows.len().div_ceil(BATCH);
        in_parallel(batches, |batch, buffer| -> Result<(), ChunkError> {
            let last = self.rows.len().min((batch + 1) * BATCH);
            for row in batch * BATCH..last {
                let chunk = self.rows[row];
                self.read(row as u32, &mut buffer[..chunk.plain as usize])?;
                done.fetch_add(u64::from(chunk.stored), Ordering::Relaxed);
            }
            Ok(())
        })?;
        Ok(())
    }

    /// Reads a whole chunk; `into` has its size.
    fn read(&self, row: u32, into: &mut [u8]) -> Result<(), ChunkError> {
        let Some(incoming) = &self.incoming else {
            return self.read_here(row, into);
        };
        let chunk = &self.rows[row as usize];
        let (pack, range) = (usize::from(chunk.pack), chunk.range());
        incoming.wait(pack, &range, !self.patient)?;
        for _ in 0..AGAIN {
            match self.read_here(row, into) {
                Err(ChunkError::Damaged { .. }) => incoming.again(pack, &range)?,
                read => return read,
            }
        }
        match self.read_here(row, into) {
            Err(ChunkError::Damaged { offset, .. }) => Err(incoming.lied(pack, offset)),
            read => read,
        }
    }

    /// Reads a whole chunk that is on this node.
    fn read_here(&self, row: u32, into: &mut [u8]) -> Result<(), ChunkError> {
        let pack = &self.packs[usize::from(self.rows[row as usize].pack)];
        let read = self.read_from(row, (&pack.path, &pack.file), into);
        let (Err(error), Some((path, file))) = (&read, &pack.spare) else {
            return read;
        };
        if !self.missed.swap(true, Ordering::Relaxed) {
            tracing::warn!(
                instead = %path.display(),
                "{error}, and what is there takes its place"
            );
        }
        self.read_from(row, (path, file), into)
    }

    /// Reads a whole chunk from its pack, or a copy of that.
    fn read_from(
        &self,
        row: u32,
        (path, file): (&Path, &File),
        into: &mut [u8],
    ) -> Result<(), ChunkError> {
        let chunk = &self.rows[row as usize];
        let cipher = &self.packs[usize::from(chunk.pack)].cipher;
        let damaged = || ChunkError::Damaged {
            path: path.to_owned(),
            offset: chunk.offset,
        };
        let read = |into: &mut [u8]| match file.read_exact_at(into, chunk.offset) {
            Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => Err(damaged()),
            read => read.map_err(ChunkError::io("read", path)),
        };
        if cipher.is_none() && chunk.encoding == Encoding::Plain {
            read(into)?;
        } else {
            // A chunk that is encrypted is a tag longer.
            let mut stored = [0; CHUNK + super::cipher::TAG];
            let stored = &mut stored[..chunk.stored as usize];
            read(stored)?;
            let opened = match cipher {
                Some(cipher) => cipher.open(chunk.offset, stored).ok_or_else(damaged)?,
                None => stored,
            };
            if !decode(chunk.encoding, opened, into) {
                return Err(damaged());
            }
        }
        if self.addresses.digest(into) != chunk.digest {
            return Err(damaged());
        }
        Ok(())
    }
}

impl Parts {
    fn bytes(&self) -> u64 {
        self.ends.last().copied().unwrap_or(0)
    }

    /// The parts that begin before `to` and end behind `from`, each with where it lies in the stream.
    fn between(&self, from: u64, to: u64) -> impl Iterator<Item = (Part, Range<u64>)> {
        let first = self.ends.partition_point(|end| *end <= from);
        let begin = first.checked_sub(1).map_or(0, |before| self.ends[before]);
        let parts = self.parts[first..].iter().zip(&self.ends[first..]);
        let placed = parts.scan(begin, |begin, (part, end)| {
            Some((*part, std::mem::replace(begin, *end)..*end))
        });
        placed.take_while(move |(_, range)| range.start < to)
    }
}

impl Drop for Chunks {
    fn drop(&mut self) {
        self.give_up();
    }
}

/// A stream, read from its beginning to its end.
#[derive(Debug)]
pub struct StreamReader {
    chunks: Arc<Chunks>,
    name: String,
    at: u64,
    /// What was read last, and how much of it was taken.
    buffer: Vec<u8>,
    taken: usize,
}

impl StreamReader {
    /// Bytes of all of it.
    pub fn bytes(&self) -> u64 {
        self.chunks.streams[&self.name].bytes()
    }

    /// Reads all of it for nothing but that it is here, and what was sealed.
    ///
    /// # Errors
    /// As [`Chunks::read_at`].
    pub fn read_through(self) -> Result<(), ChunkError> {
        let stream = &self.chunks.streams[&self.name];
        let mut buffer = [0; CHUNK];
        for part in &stream.parts {
            if let Part::Chunk(row) = *part {
                let plain = self.chunks.rows[row as usize].plain;
                self.chunks.read(row, &mut buffer[..plain as usize])?;
            }
        }
        Ok(())
    }
}

impl Read for StreamReader {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let parts = &self.chunks.streams[&self.name];
        let left = parts.bytes() - self.at;
        if left == 0 || into.is_empty() {
            return Ok(0);
        }
        if self.taken == self.buffer.len() {
            let place = parts.ends.partition_point(|end| *end <= self.at);
            let most = (parts.ends[place] - self.at).min(CHUNK as u64) as usize;
            self.buffer.resize(most, 0);
            // After an error there is nothing to take, and the next read fails as this one.
            self.taken = most;
            self.chunks.read_at(&self.name, self.at, &mut self.buffer)?;
            self.taken = 0;
        }
        let ready = &self.buffer[self.taken..];
        let taken = into.len().min(ready.len());
        into[..taken].copy_from_slice(&ready[..taken]);
        self.taken += taken;
        self.at += taken as u64;
        Ok(taken)
    }
}
