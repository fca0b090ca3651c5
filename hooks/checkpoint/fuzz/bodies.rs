//! What is asked of each parser of an image, whatever the bytes: by the fuzzer, and by `tests/corpus.rs` for the
//! inputs that are kept. A panic is a fault that was found.

use std::{
    collections::{BTreeMap, HashMap, HashSet},
    fs::{self, File, Metadata},
    io::Read as _,
    os::unix::fs::{FileTypeExt as _, MetadataExt as _},
    path::{Component, Path, PathBuf},
    sync::{Arc, atomic::AtomicU64},
};

use rekindle_checkpoint::{
    ImageStore, Key, Manifest,
    archive::{Existing, differences, list, open_dir, unpack},
    chunks::{CHUNK, Chunks, Compression, Digest, Index},
    criu_image::{
        CriuImageError, OpenFiles, PE_PARENT, Pagemap, Run, areas, check_folder, credentials,
        link_remaps, pages_file,
    },
    foreign::{Archive, Imported},
    layout::{ARTIFACT, Layout},
    manifest::{CRIU_DIR, FORMAT, MANIFEST_FILE, MAX_FILES, MAX_ITEMS, PackEntry},
    touches,
};
use serde_json::json;
use sha2::{Digest as _, Sha256};
use tempfile::TempDir;

/// What one target does with an input.
pub type Body = fn(&[u8]);

/// Every target by its name.
pub const ALL: &[(&str, Body)] = &[
    ("archive", archive),
    ("chunk", chunk),
    ("folder", folder),
    ("foreign", foreign),
    ("index", index),
    ("layout", layout),
    ("manifest", manifest),
    ("pagemap", pagemap),
    ("touches", touches),
];

/// Makes the checksums of all headers of an archive right, and of the archives in it: hardly a change of the fuzzer's
/// would get behind them otherwise.
#[allow(dead_code, reason = "of the fuzzer's targets, and not of their bodies")]
pub fn correct(mut rest: &mut [u8]) {
    while let Some((header, behind)) = rest.split_first_chunk_mut::<512>() {
        let (mut size, mut nested) = (0, false);
        if header.iter().any(|byte| *byte != 0) {
            // The checksum counts itself as spaces.
            header[148..156].fill(b' ');
            let sum: u32 = header.iter().map(|byte| u32::from(*byte)).sum();
            header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
            let header = tar::Header::from_byte_slice(header);
            size = header.entry_size().unwrap_or(0);
            nested = header.path_bytes().ends_with(b".tar");
        }
        let most = behind.len();
        let within = |bytes: u64| most.min(usize::try_from(bytes).unwrap_or(usize::MAX));
        let (data, next) = (within(size), within(size.div_ceil(512).saturating_mul(512)));
        if nested {
            correct(&mut behind[..data]);
        }
        rest = &mut behind[next..];
    }
}

/// No process of Linux has an address behind it (x86 with five levels).
const ADDRESSES: u64 = 1 << 57;

/// In memory: a disk would be what is measured.
fn new_folder() -> TempDir {
    tempfile::tempdir_in("/dev/shm").unwrap()
}

/// The bytes are a manifest.
pub fn manifest(bytes: &[u8]) {
    let path = Path::new(MANIFEST_FILE);
    let manifest = match Manifest::parse(path, bytes) {
        Ok(manifest) => manifest,
        Err(e) => {
            // 120 characters of what it refuses, the longest of which is written in ten.
            assert!(e.to_string().len() < 2048, "{e}");
            return;
        }
    };
    let facts = &manifest.facts;
    assert_eq!(manifest.format, FORMAT);
    assert!(manifest.files.len() <= MAX_FILES && manifest.packs.len() <= MAX_FILES);
    assert!(facts.processes.len() <= MAX_ITEMS && facts.container.mounts.len() <= MAX_ITEMS);
    assert!(manifest.files.is_sorted_by(|a, b| a.path < b.path));
    for file in &manifest.files {
        assert_is_of_an_image(&file.path);
        assert_eq!(manifest.file(&file.path), Some(file));
    }
    let _ = manifest.total_bytes();
    let text = serde_json::to_vec(&manifest).unwrap();
    assert_eq!(Manifest::parse(path, &text).unwrap(), manifest);
}

/// The bytes are a checkpoint archive of containerd: it becomes an image that is whole, or nothing is left of it.
pub fn foreign(bytes: &[u8]) {
    let folder = new_folder();
    let path = |name: &str| folder.path().join(name);
    fs::write(path("archive.tar"), bytes).unwrap();
    let store = ImageStore::open(&path("store")).unwrap();
    let (namespace, name) = ("team-a".parse().unwrap(), "warm".parse().unwrap());
    let imported = Archive::open(&path("archive.tar")).and_then(|archive| {
        let (to, done) = ((&namespace, &name), AtomicU64::new(0));
        archive.import(&store, to, None, Compression::None, &path("private"), &done)
    });
    let left = fs::read_dir(path("store/.partial")).unwrap().count();
    assert_eq!(left, 0, "something is left of it");
    match imported {
        Ok(Imported { image, .. }) => {
            let verified = image.verify(&path("into"), None).unwrap();
            verified.verify_chunks(&AtomicU64::new(0)).unwrap();
            for archive in [verified.upper(), verified.shm()].into_iter().flatten() {
                list(archive).unwrap();
            }
        }
        Err(refused) => {
            assert!(store.list(None).unwrap().is_empty());
            assert!(refused.to_string().len() < 4096, "{refused}");
        }
    }
}

/// A file below the image's folder, and no deeper than in that of CRIU's files.
fn assert_is_of_an_image(path: &str) {
    let parts: Vec<_> = Path::new(path).components().collect();
    let plain = |part: &Component<'_>| matches!(part, Component::Normal(_));
    assert!(parts.iter().all(plain), "{path:?}");
    assert!(
        parts.len() == 1 || parts.len() == 2 && path.starts_with(CRIU_DIR),
        "{path:?}"
    );
}

/// The bytes are an index, of images with no pack to three.
pub fn index(bytes: &[u8]) {
    let sizes: &[&[u64]] = &[
        &[],
        &[1 << 16],
        &[1 << 40],
        &[u64::MAX],
        &[300, 1 << 30],
        &[1 << 20, 0, 1 << 20],
    ];
    for sizes in sizes {
        for encrypted in [false, true] {
            if let Ok(index) = Index::parse(bytes, sizes, encrypted) {
                let streams = read_by_the_letter(bytes, sizes, encrypted);
                read_streams(index, sizes, encrypted, &streams);
            }
        }
    }
}

fn number(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
}

/// What was accepted, read anew and compared with what was promised of it. Gives the streams with their bytes.
fn read_by_the_letter(bytes: &[u8], sizes: &[u64], encrypted: bool) -> Vec<(String, u64)> {
    const HEAD: usize = 20;
    const ROW: usize = 52;
    let tag = if encrypted { 16 } else { 0 };
    let mut plain = Vec::new();
    let (rows, rest) = bytes[HEAD..].split_at(number(bytes, 12) as usize * ROW);
    for row in rows.chunks_exact(ROW) {
        let offset = u64::from_le_bytes(row[32..40].try_into().unwrap());
        let (stored, size) = (number(row, 40), number(row, 44));
        let pack = u16::from_le_bytes([row[48], row[49]]);
        assert!((1..=CHUNK as u32).contains(&size));
        match row[50..] {
            [0, 0] => assert_eq!(stored, size + tag),
            [1, 0] => assert!(tag < stored && stored < size + tag),
            _ => panic!("encoded in no way that is known"),
        }
        let end = offset.checked_add(stored.into()).unwrap();
        assert!(end <= sizes[usize::from(pack)]);
        plain.push(u64::from(size));
    }
    let mut streams: Vec<(String, u64)> = Vec::new();
    let mut at = 0;
    for _ in 0..number(bytes, 16) {
        let name = &rest[at + 1..][..usize::from(rest[at])];
        let name = String::from_utf8(name.to_vec()).unwrap();
        assert_is_of_an_image(&name);
        at += 1 + name.len();
        let parts = number(rest, at) as usize;
        let parts = (0..parts).map(|part| match number(rest, at + 4 + 4 * part) {
            run if run >> 31 == 1 => {
                assert_ne!(run, 1 << 31, "a run of no zeros");
                u64::from(run & !(1 << 31)) * 512
            }
            row => plain[row as usize],
        });
        let size = parts.fold(0, |sum: u64, part| sum.checked_add(part).unwrap());
        assert!(size <= ADDRESSES);
        at += 4 + 4 * number(rest, at) as usize;
        streams.push((name, size));
    }
    assert_eq!(at, rest.len());
    assert!(streams.is_sorted_by(|a, b| a.0 < b.0));
    streams
}

/// Reads a little everywhere in packs that are zeros, and shorter than they should be.
fn read_streams(index: Index, sizes: &[u64], encrypted: bool, streams: &[(String, u64)]) {
    let dir = new_folder();
    let entries = sizes.iter().enumerate().map(|(number, size)| PackEntry {
        id: format!("{number:032x}").parse().unwrap(),
        size: *size,
    });
    let packs: Vec<PackEntry> = entries.collect();
    for pack in &packs {
        let file = File::create(dir.path().join(pack.id.file())).unwrap();
        file.set_len(pack.size.min(1 << 20)).unwrap();
    }
    let key = encrypted.then(key);
    let chunks = Chunks::open(dir.path(), &packs, index, key.as_ref()).unwrap();
    let found: Vec<_> = chunks.streams().collect();
    let expected = streams.iter().map(|(name, size)| (name.as_str(), *size));
    assert_eq!(found, expected.collect::<Vec<_>>());
    // More of them are more of the same.
    for (name, size) in streams.iter().take(4) {
        for at in [0, size / 2, size.saturating_sub(1)] {
            let mut into = vec![7; (size - at).min(4096) as usize];
            if let Ok(false) = chunks.read_at(name, at, &mut into) {
                assert!(into.iter().all(|byte| *byte == 0));
            }
        }
        for at in [*size, u64::MAX] {
            assert!(chunks.read_at(name, at, &mut [0]).is_err());
        }
    }
}

fn key() -> Key {
    Key::parse("fuzz", &[7; 32]).unwrap()
}

/// The bytes are one stored chunk and what its row in the index says: flags, plain bytes less one, where to read, the
/// pack's name, the digest.
pub fn chunk(bytes: &[u8]) {
    const ENCRYPTED: u8 = 1;
    const COMPRESSED: u8 = 2;
    /// The digest is what the bytes give, not what is said: nobody guesses one.
    const COMPUTED: u8 = 4;
    let Some(([flags, size @ .., at_low, at_high], rest)) = bytes.split_first_chunk::<5>() else {
        return;
    };
    let Some((id, rest)) = rest.split_first_chunk::<16>() else {
        return;
    };
    let Some((digest, stored)) = rest.split_first_chunk::<32>() else {
        return;
    };
    let has = |flag| flags & flag != 0;
    let size = usize::from(u16::from_le_bytes(*size)) + 1;
    let gives = match has(COMPRESSED) {
        true => lz4_flex::block::decompress(stored, size).unwrap_or_default(),
        false => stored.to_vec(),
    };
    let computed = has(COMPUTED) && !has(ENCRYPTED);
    let digest = if computed {
        Digest::of(&gives).0
    } else {
        *digest
    };

    let pack = PackEntry {
        id: format!("{:032x}", u128::from_be_bytes(*id))
            .parse()
            .unwrap(),
        size: stored.len() as u64,
    };
    const NAME: &str = "upper.tar";
    let mut index = b"RKCHUNKS".to_vec();
    for count in [1_u32, 1, 1] {
        index.extend(count.to_le_bytes());
    }
    index.extend(digest);
    index.extend(0_u64.to_le_bytes());
    index.extend((stored.len() as u32).to_le_bytes());
    index.extend((size as u32).to_le_bytes());
    index.extend([0, 0, u8::from(has(COMPRESSED)), 0]);
    index.push(NAME.len() as u8);
    index.extend(NAME.as_bytes());
    index.extend([1, 0, 0, 0, 0, 0, 0, 0]);
    let Ok(index) = Index::parse(&index, &[pack.size], has(ENCRYPTED)) else {
        return;
    };

    let dir = new_folder();
    fs::write(dir.path().join(pack.id.file()), stored).unwrap();
    let key = has(ENCRYPTED).then(key);
    let chunks = Arc::new(Chunks::open(dir.path(), &[pack], index, key.as_ref()).unwrap());
    let verified = chunks.verify(&AtomicU64::new(0)).is_ok();
    let at = usize::from(u16::from_le_bytes([*at_low, *at_high])) % size;
    let mut part = vec![0; size - at];
    let partly = chunks.read_at(NAME, at as u64, &mut part).is_ok();
    let mut whole = Vec::new();
    let mut stream = chunks.stream(NAME).unwrap();
    let read = stream.read_to_end(&mut whole).is_ok();
    assert_eq!((verified, partly), (read, read));
    if read {
        let proof = match has(ENCRYPTED) {
            true => {
                let key = blake3::derive_key("rekindle 2026-11 chunk address", &[7; 32]);
                blake3::keyed_hash(&key, &whole)
            }
            false => blake3::hash(&whole),
        };
        assert_eq!(*proof.as_bytes(), digest);
        assert_eq!(whole.len(), size);
        assert_eq!(part, whole[at..]);
    } else {
        assert!(whole.is_empty() && stream.read(&mut [0]).is_err());
    }
    if computed && gives.len() == size {
        assert!(read && whole == gives);
    }
}

/// The bytes are a pagemap.
pub fn pagemap(bytes: &[u8]) {
    let Ok(mut map) = Pagemap::read(Path::new("pagemap-1.img"), bytes) else {
        return;
    };
    let mut end = 0;
    while let Ok(Some(run)) = map.next_run() {
        assert!(run.vaddr >= end && run.vaddr.is_multiple_of(4096));
        end = run.vaddr.checked_add(run.bytes(4096)).unwrap();
        assert!(end <= ADDRESSES);
        if let Some(at) = run.flags_at {
            assert_eq!(u32::from(bytes[at as usize]), run.flags);
        }
    }
}

/// The files of CRIU's that have a meaning, and some that may not be there. A byte of the input chooses.
const NAMES: &[&str] = &[
    "inventory.img",
    "pstree.img",
    "pagemap-1.img",
    "pages-1.img",
    "core-1.img",
    "core-2.img",
    "files.img",
    "remap-fpath.img",
    "pagemap-2.img",
    "pages-2.img",
    "pagemap-shmem-3.img",
    "mm-1.img",
    "fdinfo-2.img",
    "ids-1.img",
    "fs-1.img",
    "utsns-10.img",
    "mountpoints-11.img",
    "cgroup.img",
    "seccomp.img",
    "core-x.img",
    "userns-13.img",
    "creds-1.img",
    "apparmor.img",
];

/// The bytes are a folder of CRIU's images: of each file the place in [`NAMES`], two bytes of its length, its bytes.
/// The length of pages is in pages, and they have no bytes.
pub fn folder(bytes: &[u8]) {
    let dir = new_folder();
    let dir = dir.path();
    let mut rest = bytes;
    while let Some(([name, length @ ..], behind)) = rest.split_first_chunk::<3>() {
        let name = NAMES[usize::from(*name) % NAMES.len()];
        let length = usize::from(u16::from_le_bytes(*length));
        let path = dir.join(name);
        if name.starts_with("pages-") {
            let file = File::create(path).unwrap();
            file.set_len(length as u64 * 4096).unwrap();
            rest = behind;
        } else {
            let (content, behind) = behind.split_at(length.min(behind.len()));
            fs::write(path, content).unwrap();
            rest = behind;
        }
    }
    if check_folder(dir).is_ok() {
        assert_every_page_is_there(dir);
    }
    if let Ok(tasks) = credentials(dir) {
        assert!(tasks.is_sorted_by(|a, b| a.tid < b.tid));
        let different = tasks.iter().map(|task| format!("{:?}", task.credentials));
        let different: HashSet<_> = different.collect();
        assert_eq!(different.len(), tasks.len());
        // Where a byte is no text, three stand for it.
        assert!(tasks.iter().all(|task| task.comm.len() <= 45));
    }
    for area in areas(dir, 1).unwrap_or_default().windows(2) {
        assert!(area[0].start < area[0].end && area[0].end <= area[1].start);
    }
    if let Ok(files) = OpenFiles::read(dir) {
        assert!(files.sockets.is_sorted());
    }
    for remap in link_remaps(dir).unwrap_or_default() {
        assert!(remap.deleted.is_absolute() && remap.link.is_absolute());
    }
}

fn assert_every_page_is_there(dir: &Path) {
    let mut claims: HashMap<u32, u64> = HashMap::new();
    for name in NAMES.iter().filter(|name| name.starts_with("pagemap-")) {
        let runs = || -> Result<(u32, Vec<Run>), CriuImageError> {
            let mut map = Pagemap::open(&dir.join(name))?;
            let mut runs = Vec::new();
            while let Some(run) = map.next_run()? {
                runs.push(run);
            }
            Ok((map.pages_id, runs))
        };
        if dir.join(name).exists() {
            let (id, runs) = runs().unwrap();
            for run in runs {
                assert!(run.flags & PE_PARENT == 0 && !run.left_behind());
                if run.present() {
                    *claims.entry(id).or_default() += run.pages;
                }
            }
        }
    }
    for (id, claimed) in claims {
        let held = fs::metadata(dir.join(pages_file(id))).map_or(0, |file| file.len() / 4096);
        assert!(claimed <= held, "{claimed} pages of {held}");
    }
}

/// The bytes are the archive of an upper layer, and that of a `/dev/shm`.
pub fn archive(bytes: &[u8]) {
    if claims_much(bytes) {
        return;
    }
    for existing in [Existing::Refuse, Existing::Replace] {
        let dir = new_folder();
        let (into, other) = (dir.path().join("into"), dir.path().join("other"));
        fs::create_dir(&into).unwrap();
        fs::write(&other, "other").unwrap();
        let before = fs::metadata(&other).unwrap();
        let folder = open_dir(&into).unwrap();
        let unpacked = unpack(bytes, &folder, existing);

        let names = walk(dir.path()).into_keys();
        let outside: Vec<_> = names.filter(|path| !path.starts_with(&into)).collect();
        assert_eq!(outside, [other.as_path()]);
        let after = fs::symlink_metadata(&other).unwrap();
        let of = |file: &Metadata| {
            (
                file.ino(),
                file.mode(),
                file.uid(),
                file.gid(),
                file.nlink(),
            )
        };
        assert_eq!(of(&after), of(&before));
        assert_eq!(
            (after.ctime(), after.ctime_nsec()),
            (before.ctime(), before.ctime_nsec())
        );

        let inside = walk(&into);
        if unpacked.is_ok() {
            let listed = list(bytes).unwrap();
            assert!(listed.is_sorted_by(|a, b| a.path <= b.path));
            assert!(differences(&listed, &listed).is_empty());
        }
        let Ok(unpacked) = unpacked else {
            assert!(inside.is_empty(), "{existing:?} left {inside:?}");
            continue;
        };
        assert!(inside.len() as u64 <= unpacked.entries);
        assert_is_of_a_container(&inside);
        if existing == Existing::Replace {
            // All of it was made by this.
            unpacked.made.remove(&folder);
            let left = walk(&into);
            assert!(left.is_empty(), "{left:?}");
        }
    }
}

/// More bytes than a second is enough for: zeros that are written nowhere, of which a header may claim a terabyte.
fn claims_much(bytes: &[u8]) -> bool {
    let mut archive = tar::Archive::new(bytes);
    let Ok(entries) = archive.entries() else {
        return false;
    };
    let sizes = entries.map_while(|entry| Some(entry.ok()?.size()));
    sizes.fold(0, u64::saturating_add) > 16 << 20
}

/// Whiteouts, but no other device; no link to a file elsewhere.
fn assert_is_of_a_container(inside: &BTreeMap<PathBuf, Metadata>) {
    let mut links: HashMap<u64, u64> = HashMap::new();
    for (path, file) in inside {
        let kind = file.file_type();
        let whiteout = kind.is_char_device() && file.rdev() == 0;
        let plain = kind.is_file() || kind.is_dir() || kind.is_symlink() || kind.is_fifo();
        assert!(plain || whiteout, "{}", path.display());
        *links.entry(file.ino()).or_default() += 1;
    }
    for (path, file) in inside.iter().filter(|(_, file)| file.is_file()) {
        assert_eq!(file.nlink(), links[&file.ino()], "{}", path.display());
    }
}

/// Everything below a folder but the folder itself, links not followed.
fn walk(dir: &Path) -> BTreeMap<PathBuf, Metadata> {
    let mut found = BTreeMap::new();
    let mut folders = vec![dir.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).unwrap() {
            let path = entry.unwrap().path();
            let file = fs::symlink_metadata(&path).unwrap();
            if file.is_dir() {
                folders.push(path.clone());
            }
            found.insert(path, file);
        }
    }
    found
}

/// The bytes are a note of a restore: as they are, and between a beginning and an end that are right.
pub fn touches(bytes: &[u8]) {
    const IMAGE: &[u8] = b"{}";
    let image = Digest::of(IMAGE).0;
    let mut whole = [b"RKTOUCH1", &image[..], bytes].concat();
    let digest = Digest::of(&whole).0;
    whole.extend(digest);
    for bytes in [bytes, &whole] {
        if let Ok(touches) = touches::read(bytes, IMAGE) {
            assert!(touches.iter().all(|touch| touch.pid() > 0));
            assert!(
                touches
                    .iter()
                    .all(|touch| touch.vaddr() % CHUNK as u64 == 0)
            );
            assert_eq!(touches::write(&touches, IMAGE), bytes);
        }
    }
}

/// The bytes are the index of an OCI layout; and then the manifest that a tag names, beside the config of an image.
pub fn layout(bytes: &[u8]) {
    let dir = new_folder();
    let dir = dir.path();
    fs::create_dir_all(dir.join("blobs/sha256")).unwrap();
    fs::write(dir.join("oci-layout"), r#"{"imageLayoutVersion": "1.0.0"}"#).unwrap();
    fs::write(dir.join("index.json"), bytes).unwrap();
    let layout = Layout::open(dir).unwrap();
    for tag in [None, Some("t")] {
        // There are no blobs yet. 120 characters of what is refused, the longest of which is written in ten.
        let refused = layout.find(tag).unwrap_err().to_string();
        assert!(refused.len() < 4096, "{refused}");
    }
    let put = |bytes: &[u8]| {
        let digest: String = Sha256::digest(bytes)
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect();
        fs::write(dir.join("blobs/sha256").join(&digest), bytes).unwrap();
        format!("sha256:{digest}")
    };
    put(CONFIG);
    let of = json!({
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "artifactType": ARTIFACT,
        "digest": put(bytes),
        "size": bytes.len(),
    });
    let index = json!({"schemaVersion": 2, "manifests": [of]});
    fs::write(dir.join("index.json"), index.to_string()).unwrap();
    if let Ok(found) = layout.find(None) {
        let known = Manifest::parse(Path::new(MANIFEST_FILE), CONFIG).unwrap();
        assert_eq!(*found.manifest(), known);
    }
}

/// The manifest of an image with an index and a pack.
const CONFIG: &[u8] = br#"{"format":2,"namespace":"a","name":"x","request":"r","created":0,"facts":{},"compression":"none","encryption":null,"stored":{"bytes":0,"zeros":0,"shared":0,"written":0},"packs":[{"id":"00000000000000000000000000000000","size":9}],"files":[{"path":"chunks.index","size":20,"blake3":"0000000000000000000000000000000000000000000000000000000000000000"}]}"#;
