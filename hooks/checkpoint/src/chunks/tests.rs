use std::{fs, io::Read as _, io::Write as _, sync::Arc, sync::atomic::AtomicU64};

use proptest::prelude::*;

use super::*;
use crate::manifest::PackEntry;

/// An image's chunks as they lie in a folder.
pub(crate) struct Written {
    pub(crate) index: Vec<u8>,
    pub(crate) packs: Vec<PackEntry>,
    pub(crate) stored: Stored,
}

fn sizes(packs: &[PackEntry]) -> Vec<u64> {
    packs.iter().map(|pack| pack.size).collect()
}

impl Written {
    fn index(&self, key: Option<&Key>) -> Index {
        Index::parse(&self.index, &sizes(&self.packs), key.is_some()).unwrap()
    }

    fn open(&self, dir: &Path, key: Option<&Key>) -> Arc<Chunks> {
        Arc::new(Chunks::open(dir, &self.packs, self.index(key), key).unwrap())
    }

    /// Of an image that is not encrypted.
    pub(crate) fn open_owned(&self, dir: &Path) -> Chunks {
        Chunks::open(dir, &self.packs, self.index(None), None).unwrap()
    }

    fn base(&self, dir: &Path, key: Option<&Key>) -> Base {
        Base {
            dir: dir.to_owned(),
            packs: self.packs.clone(),
            index: self.index(key),
        }
    }
}

fn write(
    dir: &Path,
    streams: &[(&str, &[u8])],
    key: Option<&Key>,
    compression: Compression,
    base: Option<Base>,
) -> Written {
    let writer = ChunkWriter::new(dir, key, compression, base).unwrap();
    for (name, bytes) in streams {
        let mut stream = writer.stream(name);
        stream.write_all(bytes).unwrap();
        stream.finish().unwrap();
    }
    let (index, packs, stored) = writer.finish(key).unwrap();
    Written {
        index,
        packs,
        stored,
    }
}

/// These streams as an image's chunks, for the tests of other modules.
pub(crate) fn chunks_of(dir: &Path, streams: &[(&str, &[u8])]) -> Written {
    write(dir, streams, None, Compression::None, None)
}

/// The chunks of these streams, for the tests of other modules.
pub(crate) fn chunks(dir: &Path, streams: &[(&str, &[u8])]) -> Arc<Chunks> {
    chunks_of(dir, streams).open(dir, None)
}

fn key(text: &str) -> Key {
    Key::parse("k", blake3::hash(text.as_bytes()).as_bytes()).unwrap()
}

/// Bytes of which no two chunks are alike, and which do not become smaller.
pub(crate) fn noise(seed: u64, bytes: usize) -> Vec<u8> {
    let mut out = vec![0; bytes];
    blake3::Hasher::new()
        .update(&seed.to_le_bytes())
        .finalize_xof()
        .fill(&mut out);
    out
}

fn whole(chunks: &Arc<Chunks>, name: &str) -> io::Result<Vec<u8>> {
    let mut all = Vec::new();
    chunks.stream(name).unwrap().read_to_end(&mut all)?;
    Ok(all)
}

/// Two streams with all kinds of chunks: zeros, noise, what is found twice, what becomes smaller, an odd end.
fn sample() -> (Vec<u8>, Vec<u8>) {
    let a = [
        noise(1, 3 * CHUNK),
        vec![0; 5 * CHUNK],
        noise(1, CHUNK),
        b"word ".repeat(40_000),
    ]
    .concat();
    let b = [vec![0; 1000], noise(2, CHUNK), vec![0; 300]].concat();
    (a, b)
}

fn kinds() -> Vec<(Option<Key>, Compression)> {
    let keys = [None, Some(key("right"))];
    let of = |key: Option<Key>| {
        [Compression::None, Compression::Lz4].map(|compression| (key.clone(), compression))
    };
    keys.into_iter().flat_map(of).collect()
}

#[test]
fn what_is_written_is_read() {
    let (a, b) = sample();
    for (key, compression) in kinds() {
        let dir = tempfile::tempdir().unwrap();
        let streams: [(&str, &[u8]); 2] = [("criu/pages-1.img", &a), ("upper.tar", &b)];
        let written = write(dir.path(), &streams, key.as_ref(), compression, None);
        let chunks = written.open(dir.path(), key.as_ref());
        assert_eq!(whole(&chunks, "criu/pages-1.img").unwrap(), a);
        assert_eq!(whole(&chunks, "upper.tar").unwrap(), b);
        assert!(chunks.stream("shm.tar").is_none());
        chunks.verify(&AtomicU64::new(0)).unwrap();
        let stored = written.stored;
        assert_eq!(stored.bytes, (a.len() + b.len()) as u64);
        assert_eq!(stored.zeros, 5 * CHUNK as u64);
        assert!(stored.shared >= CHUNK as u64, "{stored:?}");
        assert_eq!(written.packs[0].size, stored.written);
        let compressed = stored.written < 5 * CHUNK as u64;
        assert_eq!(compressed, compression == Compression::Lz4, "{stored:?}");
        // Encrypted, nothing of it can be found.
        let pack = fs::read(dir.path().join(written.packs[0].id.file())).unwrap();
        let found = pack.windows(64).any(|bytes| *bytes == noise(1, 64));
        assert_eq!(found, key.is_none());
    }
}

proptest! {
    #[test]
    fn any_part_of_a_stream_is_read(at in 0_usize..600_000, bytes in 0_usize..400_000) {
        let (a, _) = sample();
        let dir = tempfile::tempdir().unwrap();
        let chunks = chunks(dir.path(), &[("upper.tar", &a)]);
        let mut into = vec![7; bytes];
        let read = chunks.read_at("upper.tar", at as u64, &mut into);
        match a.get(at..at + bytes) {
            Some(part) => {
                // The zeros of the sample are whole chunks, from the fourth on.
                let zeros = (3 * CHUNK..8 * CHUNK).filter(|place| (at..at + bytes).contains(place)).count();
                prop_assert_eq!(chunks.data_in("upper.tar", at as u64, (at + bytes) as u64), (bytes - zeros) as u64);
                prop_assert_eq!(read.unwrap(), part.iter().any(|byte| *byte != 0) );
                prop_assert!(into == part);
            }
            None => prop_assert!(read.is_err()),
        }
    }

    /// The promise: no flipped byte of a pack ever reaches a reader.
    #[test]
    fn a_flipped_byte_is_never_handed_out(place in 0.0..1.0_f64, bit in 0_u8..8, kind in 0_usize..4) {
        let (a, b) = sample();
        let (key, compression) = kinds().swap_remove(kind);
        let dir = tempfile::tempdir().unwrap();
        let streams: [(&str, &[u8]); 2] = [("criu/pages-1.img", &a), ("upper.tar", &b)];
        let written = write(dir.path(), &streams, key.as_ref(), compression, None);
        let pack = dir.path().join(written.packs[0].id.file());
        let mut bytes = fs::read(&pack).unwrap();
        let at = (bytes.len() as f64 * place) as usize;
        bytes[at] ^= 1 << bit;
        fs::write(&pack, bytes).unwrap();
        let chunks = written.open(dir.path(), key.as_ref());
        let damaged = chunks.verify(&AtomicU64::new(0)).unwrap_err();
        prop_assert!(matches!(damaged, ChunkError::Damaged { .. }), "{damaged}");
        for (name, right) in streams {
            if let Ok(read) = whole(&chunks, name) {
                prop_assert!(read == right);
            }
        }
    }

    /// Whatever an index is, it is refused or understood; and one with a byte changed or cut off never makes a
    /// reader give out what is not right.
    #[test]
    fn a_changed_index_is_refused_or_harmless(place in 0.0..1.0_f64, value: u8, cut: bool) {
        let (a, b) = sample();
        let dir = tempfile::tempdir().unwrap();
        let streams: [(&str, &[u8]); 2] = [("criu/pages-1.img", &a), ("upper.tar", &b)];
        let written = write(dir.path(), &streams, None, Compression::Lz4, None);
        let mut bytes = written.index.clone();
        let at = (bytes.len() as f64 * place) as usize;
        if cut {
            bytes.truncate(at);
        } else {
            bytes[at] = value;
        }
        if let Ok(index) = Index::parse(&bytes, &sizes(&written.packs), false) {
            prop_assert!(!cut);
            let chunks = Arc::new(Chunks::open(dir.path(), &written.packs, index, None).unwrap());
            let names: Vec<String> = chunks.streams().map(|(name, _)| name.to_owned()).collect();
            for name in names {
                // Other parts in another order may be what it asks for; it is the manifest that proves the index.
                let _ = chunks.stream(&name).map(|stream| stream.take(1 << 20).read_to_end(&mut Vec::new()));
            }
        }
    }

    #[test]
    fn any_bytes_may_be_an_index(bytes in proptest::collection::vec(any::<u8>(), 0..300), head: bool) {
        let bytes = if head { [b"RKCHUNKS".as_slice(), &bytes].concat() } else { bytes };
        let _ = Index::parse(&bytes, &[1 << 40], false);
    }
}

/// Five percent changed, in runs of 256 KiB that begin anywhere.
#[test]
fn the_next_generation_stores_what_changed() {
    for key in [None, Some(key("right"))] {
        let root = tempfile::tempdir().unwrap();
        let dirs = ["1", "2", "3"].map(|name| root.path().join(name));
        dirs.iter().for_each(|dir| fs::create_dir(dir).unwrap());
        let mut heap = noise(1, 100 << 20);
        let first = write(
            &dirs[0],
            &[("upper.tar", &heap)],
            key.as_ref(),
            Compression::None,
            None,
        );
        for run in 0..20_usize {
            // Page-aligned, as memory is.
            let at = run * (5 << 20) + ((run * 97) % 1000) * 4096;
            let changed = noise(100 + run as u64, 256 << 10);
            heap[at..at + changed.len()].copy_from_slice(&changed);
        }
        let base = first.base(&dirs[0], key.as_ref());
        let second = write(
            &dirs[1],
            &[("upper.tar", &heap)],
            key.as_ref(),
            Compression::None,
            Some(base),
        );
        let share = second.stored.written as f64 / heap.len() as f64;
        assert!(share < 0.08, "{share}");
        assert_eq!(second.packs.len(), 2);
        // It is complete in itself.
        fs::remove_dir_all(&dirs[0]).unwrap();
        assert!(whole(&second.open(&dirs[1], key.as_ref()), "upper.tar").unwrap() == heap);
        // Nothing new at all: no pack of its own.
        let base = second.base(&dirs[1], key.as_ref());
        let third = write(
            &dirs[2],
            &[("upper.tar", &heap)],
            key.as_ref(),
            Compression::None,
            Some(base),
        );
        assert_eq!((third.stored.written, third.packs.len()), (0, 2));
        assert_eq!(fs::read_dir(&dirs[2]).unwrap().count(), 2);
        assert!(whole(&third.open(&dirs[2], key.as_ref()), "upper.tar").unwrap() == heap);
    }
}

/// What was stored while the tasks still ran, and has changed since, is in no image.
#[test]
fn what_no_stream_has_is_given_back() {
    use std::os::unix::fs::MetadataExt as _;
    for key in [None, Some(key("right"))] {
        let dir = tempfile::tempdir().unwrap();
        let writer = ChunkWriter::new(dir.path(), key.as_ref(), Compression::None, None).unwrap();
        let early: Vec<Part> = (0..64)
            .map(|n| writer.put(&noise(n, CHUNK), &mut Room::default()).unwrap())
            .collect();
        // Every fourth is used, two of them twice, and something comes behind them.
        let mut parts: Vec<Part> = early.iter().step_by(4).copied().collect();
        parts.extend_from_within(..2);
        writer.add(Stream {
            name: "criu/pages-1.img".to_owned(),
            parts,
        });
        let mut stream = writer.stream("upper.tar");
        stream.write_all(&noise(100, CHUNK)).unwrap();
        stream.finish().unwrap();
        let (index, packs, stored) = writer.finish(key.as_ref()).unwrap();
        let written = Written {
            index,
            packs,
            stored,
        };
        assert_eq!(stored.bytes, 19 * CHUNK as u64);
        assert_eq!(stored.shared, 2 * CHUNK as u64);
        let (most, least) = (18 * CHUNK as u64, 17 * CHUNK as u64);
        assert!((least..most).contains(&stored.written), "{stored:?}");
        assert_eq!(written.index(key.as_ref()).chunks.len(), 17);
        let chunks = written.open(dir.path(), key.as_ref());
        chunks.verify(&AtomicU64::new(0)).unwrap();
        let right: Vec<u8> = (0..64)
            .step_by(4)
            .chain([0, 4])
            .flat_map(|n| noise(n, CHUNK))
            .collect();
        assert!(whole(&chunks, "criu/pages-1.img").unwrap() == right);
        assert!(whole(&chunks, "upper.tar").unwrap() == noise(100, CHUNK));
        let pack = fs::metadata(dir.path().join(written.packs[0].id.file())).unwrap();
        // Blocks of the file system at the edges of holes stay.
        assert!(pack.blocks() * 512 < 40 * CHUNK as u64, "{}", pack.blocks());
    }
}

/// Otherwise an image that is made every hour would grow for ever.
#[test]
fn a_pack_of_which_little_is_left_is_left_behind() {
    let root = tempfile::tempdir().unwrap();
    let mut heap = noise(1, 64 * CHUNK);
    let mut before: Option<(Written, PathBuf)> = None;
    for generation in 0..40_usize {
        let dir = root.path().join(generation.to_string());
        fs::create_dir(&dir).unwrap();
        for chunk in 0..4 {
            let at = (generation * 7 + chunk * 13) % 64 * CHUNK;
            heap[at..at + CHUNK].copy_from_slice(&noise((1000 * generation + chunk) as u64, CHUNK));
        }
        let base = before
            .as_ref()
            .map(|(written, dir)| written.base(dir, None));
        let written = write(&dir, &[("upper.tar", &heap)], None, Compression::None, base);
        let kept: u64 = sizes(&written.packs).iter().sum();
        // Twice, and what this generation added.
        assert!(
            kept <= 2 * heap.len() as u64 + (4 * CHUNK) as u64,
            "generation {generation}: {kept}"
        );
        assert!(whole(&written.open(&dir, None), "upper.tar").unwrap() == heap);
        before = Some((written, dir));
    }
}

/// The promise: damage of one generation is not inherited in silence.
#[test]
fn a_damaged_base_is_found_before_the_image_is_sealed() {
    let root = tempfile::tempdir().unwrap();
    let dirs = ["1", "2"].map(|name| root.path().join(name));
    dirs.iter().for_each(|dir| fs::create_dir(dir).unwrap());
    let heap = noise(1, 10 * CHUNK);
    let first = write(
        &dirs[0],
        &[("upper.tar", &heap)],
        None,
        Compression::None,
        None,
    );
    let pack = dirs[0].join(first.packs[0].id.file());
    let mut bytes = fs::read(&pack).unwrap();
    bytes[5] ^= 1;
    fs::write(&pack, bytes).unwrap();
    let base = first.base(&dirs[0], None);
    let writer = ChunkWriter::new(&dirs[1], None, Compression::None, Some(base)).unwrap();
    let mut stream = writer.stream("upper.tar");
    stream.write_all(&heap).unwrap();
    stream.finish().unwrap();
    assert!(matches!(
        writer.finish(None),
        Err(ChunkError::Damaged { offset: 0, .. })
    ));
}

#[test]
fn another_key_opens_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let right = key("right");
    let written = write(
        dir.path(),
        &[("upper.tar", &noise(1, CHUNK))],
        Some(&right),
        Compression::None,
        None,
    );
    for wrong in [Some(key("wrong")), None] {
        let chunks = Chunks::open(
            dir.path(),
            &written.packs,
            written.index(Some(&right)),
            wrong.as_ref(),
        );
        let read = whole(&Arc::new(chunks.unwrap()), "upper.tar").unwrap_err();
        assert!(read.to_string().contains("is damaged"), "{read}");
    }
    assert_ne!(right.check(), key("wrong").check());
}

/// Equal bytes of two namespaces cannot be told to be equal.
#[test]
fn digests_under_a_key_tell_nothing_without_it() {
    let bytes = noise(1, CHUNK);
    let of = |key: Option<&Key>| cipher::Addresses::of(key).digest(&bytes);
    let all = [of(None), of(Some(&key("a"))), of(Some(&key("b")))];
    assert!(all[0] != all[1] && all[1] != all[2] && all[0] != all[2]);
}

#[test]
fn a_key_is_read_from_a_file_that_is_its_owners() {
    use std::os::unix::fs::PermissionsExt as _;
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("key");
    let digits = "0123456789abcdef".repeat(4);
    for (text, good) in [
        (format!("{digits}\n").into_bytes(), true),
        (vec![7; 32], true),
        (b"short".to_vec(), false),
        (digits.repeat(2).into_bytes(), false),
    ] {
        fs::write(&path, text).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
        assert_eq!(Key::read("k", &path).is_ok(), good);
    }
    fs::set_permissions(&path, fs::Permissions::from_mode(0o640)).unwrap();
    let refused = Key::read("k", &path).unwrap_err().to_string();
    assert!(refused.contains("chmod 600"), "{refused}");
    let absent = Key::read("k", &dir.path().join("none")).unwrap_err();
    assert!(absent.to_string().contains("cannot read the key \"k\""));
    assert!(!format!("{:?}", key("right")).contains("bytes"));
}
