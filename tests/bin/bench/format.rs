//! The format of images by itself: what digests cost, what storing and reading costs beside a copy, and what the next
//! generation stores.

use crate::figures::Series;
use anyhow::{Context, Result, bail};
use rekindle_checkpoint::chunks::{
    Base, CHUNK, ChunkWriter, Chunks, Compression, Digest, Index, Key, Part, Room, Stored, Stream,
};
use rekindle_checkpoint::manifest::PackEntry;
use rekindle_harness::progress::Progress;
use rekindle_store::crc::Crc64;
use std::fs::{self, File};
use std::hint::black_box;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Instant;

/// Far more than any cache of the processor holds.
const HEAP: usize = 256 << 20;
/// What a dump takes a process's memory with.
const THREADS: usize = 2;
/// Where memory is a file: neither disk nor its scheduling is measured.
const MEMORY: &str = "/dev/shm";
const PAGE: usize = 4096;

/// Everything that was measured.
#[derive(Debug, Default)]
pub(crate) struct Measured {
    /// Bytes of a chunk; GB/s of a copy, CRC-64 and BLAKE3, on one thread.
    pub(crate) digests: Vec<(usize, [Series; 3])>,
    /// GB/s: name, storing, reading and comparing; how many bytes of each stored.
    pub(crate) kinds: Vec<(String, Series, Series, f64)>,
    /// Bytes of the second generation stored for each changed: of runs, of single pages.
    pub(crate) runs: f64,
    pub(crate) scattered: f64,
}

/// Changed: 5 %.
pub(crate) const CHANGED: f64 = 0.05;

pub(crate) fn measure(rounds: usize) -> Result<Measured> {
    let progress = Progress::live("measuring");
    let noise = noise(1, HEAP);
    let words = words(HEAP);
    let mut measured = Measured::default();
    progress.step("digests");
    let sizes = [4, 16, 32, 64, 128, 256, 1024].map(|kib| kib << 10);
    let mut rows: Vec<[Vec<f64>; 3]> = vec![Default::default(); sizes.len()];
    for _ in 0..rounds {
        for (size, row) in sizes.iter().zip(&mut rows) {
            for (speed, digest) in row.iter_mut().zip([copy, crc, blake3]) {
                speed.push(digests(&noise, *size, digest));
            }
        }
    }
    measured.digests = sizes
        .into_iter()
        .zip(rows.into_iter().map(|row| row.map(Series::from_iter)))
        .collect();

    let folder = Folder::new()?;
    let key = Key::parse("bench", &[7; 32])?;
    let lz4 = Compression::Lz4;
    let kinds: [(&str, &[u8], Option<&Key>, Compression); 6] = [
        ("noise", &noise, None, Compression::None),
        ("noise, LZ4", &noise, None, lz4),
        ("noise, encrypted", &noise, Some(&key), Compression::None),
        ("words", &words, None, Compression::None),
        ("words, LZ4", &words, None, lz4),
        ("words, LZ4, encrypted", &words, Some(&key), lz4),
    ];
    let mut rows = vec![(Vec::new(), Vec::new(), 0.0); kinds.len() + 1];
    for round in 1..=rounds {
        progress.step(&format!("round {round} of {rounds}"));
        rows[0].0.push(copied(&noise, &folder)?);
        rows[0].2 = 1.0;
        for ((_, heap, key, compression), row) in kinds.iter().zip(&mut rows[1..]) {
            folder.empty()?;
            let begun = Instant::now();
            let image = store(heap, &folder.0, *key, *compression, None)?;
            row.0.push(speed(begun));
            let chunks = image.open(*key)?;
            let begun = Instant::now();
            chunks.verify(&AtomicU64::new(0))?;
            row.1.push(speed(begun));
            row.2 = image.stored.written as f64 / HEAP as f64;
        }
    }
    let names = std::iter::once("a copy into fresh memory").chain(kinds.map(|kind| kind.0));
    measured.kinds = names
        .zip(rows)
        .map(|(name, (store, read, size))| {
            let (store, read) = (store.into_iter().collect(), read.into_iter().collect());
            (name.to_owned(), store, read, size)
        })
        .collect();

    progress.step("the next generation");
    measured.runs = second(&noise, &folder, 256 << 10)?;
    measured.scattered = second(&noise, &folder, PAGE)?;
    progress.done();
    Ok(measured)
}

fn speed(begun: Instant) -> f64 {
    HEAP as f64 / 1e9 / begun.elapsed().as_secs_f64()
}

fn copy(chunk: &[u8], into: &mut [u8]) {
    into[..chunk.len()].copy_from_slice(chunk);
}

fn crc(chunk: &[u8], _: &mut [u8]) {
    black_box(Crc64::of(chunk));
}

fn blake3(chunk: &[u8], _: &mut [u8]) {
    black_box(Digest::of(chunk));
}

fn digests(heap: &[u8], size: usize, digest: fn(&[u8], &mut [u8])) -> f64 {
    let mut into = vec![1; size];
    let begun = Instant::now();
    for chunk in heap.chunks(size) {
        digest(chunk, &mut into);
        black_box(&mut into);
    }
    speed(begun)
}

/// Removed with all that is in it.
struct Folder(PathBuf);

impl Folder {
    fn new() -> Result<Folder> {
        let path = Path::new(MEMORY).join(format!("rekindle-bench-{}", std::process::id()));
        fs::create_dir(&path).with_context(|| format!("making {}", path.display()))?;
        Ok(Folder(path))
    }

    fn empty(&self) -> Result<()> {
        fs::remove_dir_all(&self.0)?;
        Ok(fs::create_dir(&self.0)?)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// The ceiling: the same bytes, in the same pieces, by as many threads, into a file in memory.
fn copied(heap: &[u8], folder: &Folder) -> Result<f64> {
    folder.empty()?;
    let file = File::create(folder.0.join("copy"))?;
    let begun = Instant::now();
    each(heap.len().div_ceil(CHUNK), |place| {
        let at = place * CHUNK;
        Ok(file.write_all_at(&heap[at..at + CHUNK], at as u64)?)
    })?;
    Ok(speed(begun))
}

/// An image's chunks in a folder.
struct Image {
    folder: PathBuf,
    index: Vec<u8>,
    packs: Vec<PackEntry>,
    stored: Stored,
}

impl Image {
    fn index(&self, key: Option<&Key>) -> Result<Index> {
        let sizes: Vec<u64> = self.packs.iter().map(|pack| pack.size).collect();
        Ok(Index::parse(&self.index, &sizes, key.is_some())?)
    }

    fn open(&self, key: Option<&Key>) -> Result<Chunks> {
        let index = self.index(key)?;
        Ok(Chunks::open(&self.folder, &self.packs, index, key)?)
    }
}

fn store(
    heap: &[u8],
    folder: &Path,
    key: Option<&Key>,
    compression: Compression,
    base: Option<Base>,
) -> Result<Image> {
    let writer = ChunkWriter::new(folder, key, compression, base)?;
    let all = each(heap.len().div_ceil(CHUNK), |place| {
        let chunk = &heap[place * CHUNK..][..CHUNK];
        Ok(writer.put(chunk, &mut Room::default())?)
    })?;
    let parts: Vec<Part> = all;
    writer.add(Stream {
        name: "upper.tar".to_owned(),
        parts,
    });
    let (index, packs, stored) = writer.finish(key)?;
    Ok(Image {
        folder: folder.to_owned(),
        index,
        packs,
        stored,
    })
}

/// Does `work` for each place, on all threads, sixteen places at a time; the results in their order.
fn each<T: Send>(count: usize, work: impl Fn(usize) -> Result<T> + Sync) -> Result<Vec<T>> {
    const BATCH: usize = 16;
    let next = AtomicUsize::new(0);
    let one = || -> Result<Vec<(usize, T)>> {
        let mut done = Vec::new();
        loop {
            let first = next.fetch_add(BATCH, Ordering::Relaxed);
            if first >= count {
                return Ok(done);
            }
            for place in first..count.min(first + BATCH) {
                done.push((place, work(place)?));
            }
        }
    };
    let mut all = Vec::with_capacity(count);
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..THREADS).map(|_| scope.spawn(one)).collect();
        for thread in threads {
            match thread.join() {
                Ok(done) => all.extend(done?),
                Err(_) => bail!("a thread panicked"),
            }
        }
        Ok(())
    })?;
    all.sort_unstable_by_key(|(place, _)| *place);
    Ok(all.into_iter().map(|(_, result)| result).collect())
}

/// The part of the heap that a second generation stores, of which 5 % changed in runs of so many bytes.
fn second(heap: &[u8], folder: &Folder, run: usize) -> Result<f64> {
    folder.empty()?;
    let (first, second) = (folder.0.join("1"), folder.0.join("2"));
    fs::create_dir(&first)?;
    fs::create_dir(&second)?;
    let before = store(heap, &first, None, Compression::None, None)?;
    let mut changed = heap.to_vec();
    let runs = (heap.len() as f64 * CHANGED) as usize / run;
    let every = heap.len() / runs;
    for place in 0..runs {
        // Somewhere in its part of the heap, at a page: 7919 is a prime, so all offsets come.
        let slack = (every - run) / PAGE;
        let at = place * every + place * 7919 % slack.max(1) * PAGE;
        changed[at / PAGE * PAGE..][..run].copy_from_slice(&noise(2 + place as u64, run));
    }
    let base = Base {
        dir: first,
        packs: before.packs.clone(),
        index: before.index(None)?,
    };
    let after = store(&changed, &second, None, Compression::None, Some(base))?;
    Ok(after.stored.written as f64 / heap.len() as f64)
}

/// Bytes of which no two pages are alike, and which do not become smaller (xorshift).
fn noise(seed: u64, bytes: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let words = (0..bytes / 8).flat_map(|_| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    });
    words.collect()
}

/// What becomes about half: eight bytes, of which three differ, as pointers and small numbers do.
fn words(bytes: usize) -> Vec<u8> {
    let mut all = noise(3, bytes);
    for word in all.chunks_exact_mut(8) {
        word[3..].copy_from_slice(&[0x7f, 0x55, 0, 0, 0]);
    }
    all
}
