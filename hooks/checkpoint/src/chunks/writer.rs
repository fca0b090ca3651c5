//! Chunks on their way into a pack.

use std::{
    collections::HashMap,
    fs::{self, File, OpenOptions},
    io::{self, Write},
    mem,
    os::unix::fs::{FileExt, OpenOptionsExt},
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
};

use rustix::fs::FallocateFlags;
use serde::{Deserialize, Serialize};

use super::{
    CHUNK, ChunkError, Chunks, Cipher, Compression, Digest, Index, Key, PackId, Part, Stream,
    ZEROS,
    cipher::{Addresses, TAG},
    codec::encode,
    index::Chunk,
};
use crate::manifest::PackEntry;

/// What became of the bytes of an image's streams.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Stored {
    /// Bytes of all streams.
    pub bytes: u64,
    /// Of these, in chunks that are zeros and stored nowhere.
    pub zeros: u64,
    /// Of these, in chunks that an earlier generation had, or that were seen before in this one.
    pub shared: u64,
    /// Bytes that the rest takes in this image's own pack, compressed and encrypted as it is.
    pub written: u64,
}

/// An earlier image whose chunks are not stored again.
#[derive(Debug)]
pub struct Base {
    /// Its folder.
    pub dir: PathBuf,
    /// Its packs.
    pub packs: Vec<PackEntry>,
    /// Its chunks.
    pub index: Index,
}

/// Writes the chunks of one image, from several threads.
#[derive(Debug)]
pub struct ChunkWriter {
    dir: PathBuf,
    /// The base's that are used, and the own one behind them. Fewer than 2^16.
    packs: Vec<PackId>,
    sizes: Vec<u64>,
    path: PathBuf,
    file: File,
    cipher: Option<Cipher>,
    addresses: Addresses,
    compression: Compression,
    /// What the base has, in our numbering of packs.
    base: HashMap<Digest, Chunk>,
    /// Most bytes of the own pack.
    most: u64,
    full: Full,
    state: Mutex<State>,
}

/// Whether the place where chunks are stored has turned out to be too small for them. Outlives their writer.
#[derive(Debug, Clone, Default)]
pub struct Full(Arc<AtomicBool>);

impl Full {
    /// Whether a chunk found no room.
    pub fn is(&self) -> bool {
        self.0.load(Ordering::Relaxed)
    }

    fn note(&self, error: io::Error) -> io::Error {
        if error.kind() == io::ErrorKind::StorageFull {
            self.0.store(true, Ordering::Relaxed);
        }
        error
    }
}

#[derive(Debug, Default)]
struct State {
    rows: HashMap<Digest, u32>,
    index: Index,
    /// Bytes of the own pack that are taken.
    end: u64,
}

/// Buffers of one thread.
#[derive(Debug, Default)]
pub struct Room {
    compressed: Vec<u8>,
    sealed: Vec<u8>,
}

impl ChunkWriter {
    /// A new pack in `dir`, beside those of `base` that are worth it.
    ///
    /// # Errors
    /// What the file system says.
    pub fn new(
        dir: &Path,
        key: Option<&Key>,
        compression: Compression,
        base: Option<Base>,
    ) -> Result<Self, ChunkError> {
        let id = PackId::draw()?;
        let path = dir.join(id.file());
        let file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&path)
            .map_err(ChunkError::io("make", &path))?;
        let mut writer = Self {
            dir: dir.to_owned(),
            packs: Vec::new(),
            sizes: Vec::new(),
            path,
            file,
            cipher: key.and_then(|key| Cipher::of(key, id)),
            addresses: Addresses::of(key),
            compression,
            base: HashMap::new(),
            most: u64::MAX,
            full: Full::default(),
            state: Mutex::default(),
        };
        if let Some(base) = base {
            writer.build_on(base);
        }
        writer.packs.push(id);
        Ok(writer)
    }

    /// Stores at most so many bytes: what comes then fails as on a disk that is full.
    #[must_use]
    pub fn up_to(self, most: u64) -> Self {
        Self { most, ..self }
    }

    /// What tells afterwards whether there was room.
    pub fn full(&self) -> Full {
        self.full.clone()
    }

    /// Links the packs of `base` of which it needs at least half, and remembers what is in them. The others
    /// would be kept for ever for the few chunks that each generation still has of them; this way an image
    /// never keeps more than twice its bytes.
    fn build_on(&mut self, base: Base) {
        let live = base.index.live(base.packs.len());
        let mut places = Vec::new();
        for (pack, live) in base.packs.iter().zip(live) {
            let file = pack.id.file();
            let worth =
                live >= pack.size.div_ceil(2) && self.packs.len() < usize::from(u16::MAX) - 1;
            let there = base.dir.join(&file);
            // What is not what the manifest says is nothing to build on: its chunks are compared, and not its size.
            let sound = fs::symlink_metadata(&there)
                .is_ok_and(|found| found.is_file() && found.len() == pack.size);
            // A pack that cannot be linked (another file system, too many links) is written anew.
            let linked = worth && sound && fs::hard_link(&there, self.dir.join(&file)).is_ok();
            places.push(linked.then_some(self.packs.len() as u16));
            if linked {
                self.packs.push(pack.id);
                self.sizes.push(pack.size);
            }
        }
        for chunk in base.index.chunks {
            if let Some(pack) = places[usize::from(chunk.pack)] {
                self.base.insert(chunk.digest, Chunk { pack, ..chunk });
            }
        }
    }

    /// Whether there is an earlier image that much is expected to be found in.
    pub fn has_base(&self) -> bool {
        !self.base.is_empty()
    }

    /// Stores at most [`CHUNK`] bytes, unless they are there.
    ///
    /// # Errors
    /// What the file system says.
    pub fn put(&self, plain: &[u8], room: &mut Room) -> Result<Part, ChunkError> {
        debug_assert!(!plain.is_empty() && plain.len() <= CHUNK);
        let bytes = plain.len() as u64;
        if bytes.is_multiple_of(ZEROS) && is_zero(plain) {
            return Ok(Part::Zeros((bytes / ZEROS) as u32));
        }
        let digest = self.addresses.digest(plain);
        if let Some(row) = self.state().find(&digest, &self.base) {
            return Ok(Part::Chunk(row));
        }
        let (encoding, encoded) = encode(self.compression, plain, &mut room.compressed);
        let tag = if self.cipher.is_some() { TAG } else { 0 };
        let stored = encoded.len() + tag;
        let (row, offset) = {
            let mut state = self.state();
            // Another thread may have been faster.
            if let Some(row) = state.find(&digest, &self.base) {
                return Ok(Part::Chunk(row));
            }
            let offset = state.end;
            if offset.saturating_add(stored as u64) > self.most {
                let full = self.full.note(io::ErrorKind::StorageFull.into());
                return Err(ChunkError::io("write", &self.path)(full));
            }
            state.end += stored as u64;
            let chunk = Chunk {
                digest,
                pack: (self.packs.len() - 1) as u16,
                offset,
                stored: stored as u32,
                plain: bytes as u32,
                encoding,
            };
            (state.insert(chunk), offset)
        };
        let bytes = match &self.cipher {
            Some(cipher) => {
                room.sealed.clear();
                room.sealed.extend_from_slice(encoded);
                cipher.seal(offset, &mut room.sealed)?;
                room.sealed.as_slice()
            }
            None => encoded,
        };
        let written = self.file.write_all_at(bytes, offset);
        let written = written.map_err(|error| self.full.note(error));
        written.map_err(ChunkError::io("write", &self.path))?;
        Ok(Part::Chunk(row))
    }

    /// Adds a stream whose parts are stored. Each name once.
    pub fn add(&self, stream: Stream) {
        self.state().index.streams.push(stream);
    }

    /// A stream whose bytes come one after the other.
    pub fn stream(&self, name: &str) -> StreamWriter<'_> {
        StreamWriter {
            writer: self,
            stream: Stream {
                name: name.to_owned(),
                parts: Vec::new(),
            },
            buffer: Vec::with_capacity(CHUNK),
            room: Room::default(),
        }
    }

    /// Has what was stored so far written to the disk, so that less of that is left for later.
    ///
    /// # Errors
    /// What the file system says.
    pub fn flush(&self) -> Result<(), ChunkError> {
        let flushed = self.file.sync_data();
        flushed.map_err(ChunkError::io("write", &self.path))
    }

    /// The index, the packs that it needs, and what was stored. What comes from the base is compared with its
    /// digests; packs that are not needed are removed, and what no stream has after all is given back.
    ///
    /// # Errors
    /// What the file system says, or that the base is damaged. `key` is that of [`Self::new`].
    pub fn finish(
        self,
        key: Option<&Key>,
    ) -> Result<(Vec<u8>, Vec<PackEntry>, Stored), ChunkError> {
        let State { mut index, end, .. } = self
            .state
            .into_inner()
            .unwrap_or_else(PoisonError::into_inner);
        index.streams.sort_by(|a, b| a.name.cmp(&b.name));
        let own = (self.packs.len() - 1) as u16;
        let (stored, unused) = index.keep_used(own);
        for range in unused {
            let length = range.end - range.start;
            let punch = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
            // A file system that cannot do this keeps the bytes.
            let _ = rustix::fs::fallocate(&self.file, punch, range.start, length);
        }
        let live = index.live(self.packs.len());
        let (mut packs, mut places) = (Vec::new(), Vec::new());
        let sizes = self.sizes.iter().copied().chain([end]);
        for ((id, size), live) in self.packs.iter().zip(sizes).zip(live) {
            places.push(packs.len() as u16);
            if live > 0 {
                packs.push(PackEntry { id: *id, size });
            } else {
                let path = self.dir.join(id.file());
                fs::remove_file(&path).map_err(ChunkError::io("remove", &path))?;
            }
        }
        let inherited = index
            .chunks
            .iter()
            .filter(|chunk| chunk.pack != own)
            .copied()
            .collect();
        let mut inherited = Index {
            chunks: inherited,
            streams: Vec::new(),
        };
        for chunk in index.chunks.iter_mut().chain(&mut inherited.chunks) {
            chunk.pack = places[usize::from(chunk.pack)];
        }
        if !inherited.chunks.is_empty() {
            Chunks::open(&self.dir, &packs, inherited, key)?.verify(&AtomicU64::new(0))?;
        }
        Ok((index.to_bytes(packs.len()), packs, stored))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// The row of a chunk that this image or its base has.
    fn find(&mut self, digest: &Digest, base: &HashMap<Digest, Chunk>) -> Option<u32> {
        if let Some(row) = self.rows.get(digest) {
            return Some(*row);
        }
        let chunk = *base.get(digest)?;
        Some(self.insert(chunk))
    }

    fn insert(&mut self, chunk: Chunk) -> u32 {
        let row = self.index.chunks.len() as u32;
        self.index.chunks.push(chunk);
        self.rows.insert(chunk.digest, row);
        row
    }
}

impl Stream {
    /// Adds what follows.
    pub(crate) fn push(&mut self, part: Part) {
        // The sum of two runs may be too much for one.
        if let (Some(Part::Zeros(last)), Part::Zeros(more)) = (self.parts.last_mut(), part)
            && let Some(sum) = last.checked_add(more).filter(|sum| *sum < 1 << 31)
        {
            *last = sum;
        } else {
            self.parts.push(part);
        }
    }
}

/// Cuts what is written to it into chunks.
#[derive(Debug)]
pub struct StreamWriter<'a> {
    writer: &'a ChunkWriter,
    stream: Stream,
    buffer: Vec<u8>,
    room: Room,
}

impl StreamWriter<'_> {
    /// Begins a new chunk, where what follows is likely to be found again, however much lies before it.
    ///
    /// # Errors
    /// What the file system says.
    pub fn cut(&mut self) -> Result<(), ChunkError> {
        if !self.buffer.is_empty() {
            let part = self.writer.put(&self.buffer, &mut self.room)?;
            self.stream.push(part);
            self.buffer.clear();
        }
        Ok(())
    }

    /// Adds the stream to the image.
    ///
    /// # Errors
    /// What the file system says.
    pub fn finish(mut self) -> Result<(), ChunkError> {
        self.cut()?;
        let stream = mem::replace(
            &mut self.stream,
            Stream {
                name: String::new(),
                parts: Vec::new(),
            },
        );
        self.writer.add(stream);
        Ok(())
    }
}

impl Write for StreamWriter<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let taken = bytes.len().min(CHUNK - self.buffer.len());
        self.buffer.extend_from_slice(&bytes[..taken]);
        if self.buffer.len() == CHUNK {
            self.cut()?;
        }
        Ok(taken)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Most chunks that are not zeros show it in their first bytes.
fn is_zero(bytes: &[u8]) -> bool {
    let mut blocks = bytes.chunks_exact(64);
    blocks.all(|block| block.iter().fold(0, |any, byte| any | byte) == 0)
        && bytes[bytes.len() - bytes.len() % 64..]
            .iter()
            .all(|byte| *byte == 0)
}
