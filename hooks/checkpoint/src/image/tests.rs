use std::{
    fs::{self, File},
    io::{Read as _, Write as _},
    os::unix::fs::{FileExt, symlink},
    sync::{Arc, atomic::AtomicU64},
};

use rekindle_core::config::Retention;

use super::*;
use crate::{
    chunks::{CHUNK, Compression, Key, Room, Stream},
    criu_image::tests::{folder, pagemap},
    manifest::{
        CRIU_DIR, Facts, INDEX_FILE, MANIFEST_DIGEST_FILE, MANIFEST_FILE, Source, UPPER_FILE,
    },
    pages::{Tasks, take_pages},
    precopy::Precopied,
    touches::Touch,
};

mod faults;
mod memory;

/// What stays of a name whose images are gone, so that a number never means another one.
const NUMBER: [&str; 2] = [".last", ".last.lock"];

pub(crate) fn names() -> (Namespace, ImageName) {
    ("team-a".parse().unwrap(), "warm".parse().unwrap())
}

/// What the shim does with a request: dumps, stores, seals.
pub(crate) struct Making {
    pub(crate) key: Option<Key>,
    pub(crate) compression: Compression,
    pub(crate) private: PathBuf,
}

impl Making {
    fn plain() -> Self {
        Self {
            key: None,
            compression: Compression::None,
            private: PathBuf::new(),
        }
    }

    fn begin(&self, store: &ImageStore, request: &Request) -> Partial {
        let order = store.partial_at(&request.dir()).unwrap().unwrap();
        order
            .begin(self.key.clone(), self.compression, &self.private)
            .unwrap()
    }

    pub(crate) fn make(&self, store: &ImageStore) -> SealedImage {
        let (namespace, name) = names();
        let request = store.begin(&namespace, &name, Source::default()).unwrap();
        let made = self.fill(self.begin(store, &request)).unwrap();
        let generation = made.generation();
        drop(made);
        let found = request.finish().unwrap();
        assert_eq!(found.generation(), generation);
        found
    }

    fn fill(&self, partial: Partial) -> Result<SealedImage, ImageError> {
        folder(&partial.criu_dir());
        let none = Tasks::from_iter([]);
        take_pages(
            &partial.criu_dir(),
            &none,
            &Precopied::default(),
            partial.chunks(),
        )
        .unwrap();
        let mut upper = partial.chunks().stream(UPPER_FILE);
        upper.write_all(&upper_layer()).unwrap();
        upper.finish().unwrap();
        partial.seal(Facts::default())
    }
}

/// Several chunks, no two of them alike.
fn upper_layer() -> Vec<u8> {
    (0..300_000_u32).flat_map(u32::to_le_bytes).collect()
}

/// Makes an image as the CLI and the shim do together.
pub(crate) fn make(store: &ImageStore) -> SealedImage {
    Making::plain().make(store)
}

fn verify(store: &ImageStore, image: SealedImage) -> Result<VerifiedImage, ImageError> {
    let verified = image.verify(&store.root().join("laid-out"), None)?;
    verified.verify_chunks(&AtomicU64::new(0))?;
    Ok(verified)
}

/// A staged image, for the tests of other modules.
pub(crate) fn staged(root: &Path) -> Arc<StagedImage> {
    let store = ImageStore::open(root).unwrap();
    Arc::new(verify(&store, make(&store)).unwrap().staged())
}

pub(crate) fn leftovers(store: &ImageStore) -> usize {
    fs::read_dir(store.partial_dir()).unwrap().count()
}

#[test]
fn an_image_is_made_found_and_verified() {
    let root = tempfile::tempdir().unwrap();
    let store = ImageStore::open(root.path()).unwrap();
    let (namespace, name) = names();
    assert!(matches!(
        store.resolve(&namespace, &name, None),
        Err(ImageError::Unknown(_))
    ));
    assert_eq!(make(&store).reference(), "team-a/warm@1");
    assert_eq!(make(&store).reference(), "team-a/warm@2");
    let newest = store.resolve(&namespace, &name, None).unwrap();
    let newest = verify(&store, newest).unwrap();
    assert_eq!(newest.reference(), "team-a/warm@2");
    assert!(newest.shm().is_none());
    let mut upper = Vec::new();
    newest.upper().unwrap().read_to_end(&mut upper).unwrap();
    assert!(upper == upper_layer());
    let criu = newest.criu_dir().to_owned();
    assert!(criu.join("inventory.img").is_file());
    drop(newest);
    assert!(!criu.exists());
    assert_eq!(leftovers(&store), 0);
    let other = "team-b".parse().unwrap();
    assert!(matches!(
        store.resolve(&other, &name, None),
        Err(ImageError::Unknown(_))
    ));
    assert_eq!(store.list(Some(&other)).unwrap().len(), 0);
    assert_eq!(store.list(None).unwrap().len(), 2);
}

/// The one pack of an image.
pub(crate) fn pack(image: &Path) -> PathBuf {
    let mut all = fs::read_dir(image)
        .unwrap()
        .map(|entry| entry.unwrap().path());
    let pack = |path: &PathBuf| {
        path.file_name()
            .unwrap()
            .to_string_lossy()
            .starts_with("pack-")
    };
    all.find(pack).unwrap()
}

pub(crate) fn flip(path: &Path, at: u64, bit: u8) {
    let file = fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open(path)
        .unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[byte[0] ^ bit], at).unwrap();
}

/// Also those that it has begun when the image is in its place already.
#[test]
fn who_asks_for_an_image_hears_of_each_step() {
    let root = tempfile::tempdir().unwrap();
    let store = ImageStore::open(root.path()).unwrap();
    let (namespace, name) = names();
    let mut request = store.begin(&namespace, &name, Source::default()).unwrap();
    assert!(request.steps().unwrap().is_empty());
    let order = store.partial_at(&request.dir()).unwrap().unwrap();
    let steps = order.steps();
    let private = root.path().join("private");
    let partial = order.begin(None, Compression::None, &private).unwrap();
    steps.begins("hold");
    steps.begins("dump");
    assert_eq!(request.steps().unwrap(), ["hold", "dump"]);
    assert!(request.steps().unwrap().is_empty());
    folder(&partial.criu_dir());
    let before = request.stored().unwrap();
    let mut stream = partial.chunks().stream(UPPER_FILE);
    let bytes: Vec<u8> = (0..1_u32 << 20).flat_map(u32::to_le_bytes).collect();
    stream.write_all(&bytes).unwrap();
    stream.finish().unwrap();
    assert!(request.stored().unwrap() > before);
    steps.begins("seal");
    partial.seal(Facts::default()).unwrap();
    steps.begins("kill");
    assert_eq!(request.steps().unwrap(), ["seal", "kill"]);
    assert_eq!(request.stored(), None);
    request.finish().unwrap();
}

/// Checksums that match do not make CRIU's files harmless: the maker may be the attacker.
#[test]
fn a_well_sealed_image_with_a_lying_pagemap_is_refused() {
    let root = tempfile::tempdir().unwrap();
    let store = ImageStore::open(root.path()).unwrap();
    let (namespace, name) = names();
    let request = store.begin(&namespace, &name, Source::default()).unwrap();
    let partial = Making::plain().begin(&store, &request);
    folder(&partial.criu_dir());
    let map = pagemap(1, &[(0x1000, 1_000_000_000, 4)]);
    fs::write(partial.criu_dir().join("pagemap-1.img"), map).unwrap();
    let sealed = partial.seal(Facts::default()).unwrap();
    let refused = with_causes(&verify(&store, sealed).unwrap_err());
    assert!(refused.contains("claims 1000000000 pages"), "{refused}");
}

/// What CRIU reads itself may be as large as any memory, and is not put into it twice.
#[test]
fn many_pages_that_are_not_lazy_are_laid_out_on_the_disk() {
    let root = tempfile::tempdir().unwrap();
    let store = ImageStore::open(root.path()).unwrap();
    let (namespace, name) = names();
    let request = store.begin(&namespace, &name, Source::default()).unwrap();
    let partial = Making::plain().begin(&store, &request);
    folder(&partial.criu_dir());
    fs::remove_file(partial.criu_dir().join("pages-1.img")).unwrap();
    let pages = 17 << 10;
    let map = pagemap(1, &[(0x10000, pages, 4)]);
    fs::write(partial.criu_dir().join("pagemap-1.img"), map).unwrap();
    let part = partial
        .chunks()
        .put(&[7; 65536], &mut Room::default())
        .unwrap();
    partial.chunks().add(Stream {
        name: "criu/pages-1.img".to_owned(),
        parts: vec![part; pages as usize / 16],
    });
    let image = partial.seal(Facts::default()).unwrap();
    let into = root.path().join("into");
    let verified = image.verify(&into, None).unwrap();
    assert!(verified.criu_dir().starts_with(store.partial_dir()) && !into.exists());
    let laid_out = fs::read(verified.criu_dir().join("pages-1.img")).unwrap();
    assert!(laid_out.len() as u64 == pages * 4096 && laid_out.iter().all(|byte| *byte == 7));
    drop((verified, request));
    assert_eq!(leftovers(&store), 0);
}

/// A few bytes of index can stand for more than any memory holds.
#[test]
fn a_well_sealed_image_that_would_fill_the_node_is_refused() {
    let seal = |name: &str, pages: u64| {
        let root = tempfile::tempdir().unwrap();
        let store = ImageStore::open(root.path()).unwrap();
        let (namespace, image) = names();
        let request = store.begin(&namespace, &image, Source::default()).unwrap();
        let partial = Making::plain().begin(&store, &request);
        folder(&partial.criu_dir());
        fs::remove_file(partial.criu_dir().join("pages-1.img")).unwrap();
        let map = pagemap(1, &[(0x10000, pages, 4)]);
        fs::write(partial.criu_dir().join("pagemap-1.img"), map).unwrap();
        let part = partial
            .chunks()
            .put(&[7; 65536], &mut Room::default())
            .unwrap();
        partial.chunks().add(Stream {
            name: name.to_owned(),
            parts: vec![part; (pages / 16) as usize],
        });
        let sealed = partial.seal(Facts::default()).unwrap();
        let refused = sealed.verify(&root.path().join("into"), None).unwrap_err();
        assert!(!root.path().join("into").exists());
        with_causes(&refused)
    };
    // 1 TiB.
    let refused = seal("criu/pages-1.img", 1 << 28);
    assert!(
        refused.contains("1099511627776 bytes are needed"),
        "{refused}"
    );
    let refused = seal("criu/filler.img", 16);
    assert!(
        refused.contains("criu/filler.img is not in the manifest"),
        "{refused}"
    );
}

pub(crate) fn with_causes(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(&format!(": {error}"));
        cause = error.source();
    }
    text
}

#[test]
fn a_manifest_that_is_not_ours_is_refused_and_listed_as_such() {
    let root = tempfile::tempdir().unwrap();
    let store = ImageStore::open(root.path()).unwrap();
    drop(make(&store));
    let (namespace, name) = names();
    let path = root.path().join("team-a/warm/1/manifest.json");
    let sealed = fs::read_to_string(&path).unwrap();
    for (text, words) in [
        (sealed.replace("\"format\": 2", "\"format\": 3"), "format 3"),
        (
            sealed.replace("criu/pstree.img", "../pstree.img"),
            "plain name",
        ),
        (
            sealed.replace("\"name\": \"warm\"", "\"name\": \"cold\""),
            "says that it is team-a/cold",
        ),
        (" ".repeat(17 << 20), "has 17825792 bytes"),
        (String::new(), "damaged"),
    ] {
        fs::write(&path, text).unwrap();
        let refused = with_causes(&store.resolve(&namespace, &name, None).unwrap_err());
        assert!(refused.contains(words), "{refused}");
    }
    fs::remove_file(&path).unwrap();
    symlink("/etc/passwd", &path).unwrap();
    assert!(store.resolve(&namespace, &name, None).is_err());
    let listed = store.list(None).unwrap();
    assert!(listed.len() == 1 && listed[0].manifest.is_err());
    store.remove(&namespace, &name, None, false).unwrap();
    assert!(Path::new("/etc/passwd").exists());
}

#[test]
fn an_image_in_use_is_not_removed_unless_forced_and_its_number_never_comes_back() {
    let root = tempfile::tempdir().unwrap();
    let store = ImageStore::open(root.path()).unwrap();
    let (namespace, name) = names();
    let lease = verify(&store, make(&store)).unwrap();
    assert!(store.list(None).unwrap()[0].in_use);
    let refused = store.remove(&namespace, &name, None, false).unwrap_err();
    assert!(matches!(refused, ImageError::InUse(ref image) if image == "team-a/warm@1"));
    drop(lease);
    assert!(!store.list(None).unwrap()[0].in_use);
    assert_eq!(
        store.remove(&namespace, &name, Some(1), false).unwrap(),
        [1]
    );
    assert!(matches!(
        store.resolve(&namespace, &name, None),
        Err(ImageError::Unknown(_))
    ));
    let again = make(&store);
    assert_eq!(again.reference(), "team-a/warm@2");
    assert_eq!(store.remove(&namespace, &name, None, true).unwrap(), [2]);
    assert_eq!(store.list(None).unwrap().len(), 0);
}

fn touched(blocks: &[u64]) -> Vec<Touch> {
    let touch = |block: &u64| Touch::at(1, block * CHUNK as u64);
    blocks.iter().map(touch).collect()
}

/// It lies beside the image, whose folder stays as it was sealed, and goes with it.
#[test]
fn what_a_restore_notes_is_found_by_the_next_and_removed_with_the_image() {
    let root = tempfile::tempdir().unwrap();
    let store = ImageStore::open(root.path()).unwrap();
    let (namespace, name) = names();
    let image = make(&store);
    assert_eq!(image.touches().unwrap(), []);
    for blocks in [&[5, 3, 4][..], &[], &[9]] {
        image.note_touches(&touched(blocks)).unwrap();
        assert_eq!(image.touches().unwrap(), touched(blocks));
    }
    assert_eq!(leftovers(&store), 0);
    verify(&store, image).unwrap();
    // The next generation is another image.
    assert_eq!(make(&store).touches().unwrap(), []);
    let home = root.path().join("team-a/warm");
    assert!(home.join(".1.touches").exists());
    store.remove(&namespace, &name, None, false).unwrap();
    let left = names_in(&home);
    assert_eq!(left, NUMBER);
}

fn names_in(dir: &Path) -> Vec<String> {
    let names = fs::read_dir(dir).unwrap();
    let mut names: Vec<String> = names
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

#[test]
fn a_note_that_is_none_is_told_and_replaced() {
    let root = tempfile::tempdir().unwrap();
    let store = ImageStore::open(root.path()).unwrap();
    let (first, image) = (make(&store), make(&store));
    first.note_touches(&touched(&[1])).unwrap();
    let home = root.path().join("team-a/warm");
    let (other, note) = (home.join(".1.touches"), home.join(".2.touches"));
    let refused = |image: &SealedImage| image.touches().unwrap_err();
    // Another image's.
    fs::copy(&other, &note).unwrap();
    assert!(matches!(refused(&image), ImageError::Touches { .. }));
    // Longer than any, and never read to its end.
    File::create(&note).unwrap().set_len(1 << 40).unwrap();
    assert!(matches!(refused(&image), ImageError::Touches { .. }));
    fs::remove_file(&note).unwrap();
    symlink(&other, &note).unwrap();
    assert!(matches!(refused(&image), ImageError::Store(_)));
    image.note_touches(&touched(&[2])).unwrap();
    assert_eq!(image.touches().unwrap(), touched(&[2]));
    assert_eq!(first.touches().unwrap(), touched(&[1]));
}

/// Each of them is whole, and one of them is there at the end.
#[test]
fn two_restores_note_at_once() {
    let root = tempfile::tempdir().unwrap();
    let store = ImageStore::open(root.path()).unwrap();
    let image = make(&store);
    let notes = [touched(&[1; 2000]), touched(&[2; 3000])];
    std::thread::scope(|scope| {
        for note in &notes {
            let image = &image;
            scope.spawn(move || (0..50).for_each(|_| image.note_touches(note).unwrap()));
        }
        for _ in 0..200 {
            let found = image.touches().unwrap();
            assert!(found.is_empty() || notes.contains(&found));
        }
    });
    assert!(notes.contains(&image.touches().unwrap()));
    assert_eq!(leftovers(&store), 0);
}

/// After its removal by force nothing of it comes back.
#[test]
fn nothing_is_noted_of_an_image_that_is_gone() {
    let root = tempfile::tempdir().unwrap();
    let store = ImageStore::open(root.path()).unwrap();
    let (namespace, name) = names();
    let image = make(&store);
    store.remove(&namespace, &name, None, true).unwrap();
    image.note_touches(&touched(&[1])).unwrap();
    assert!(!root.path().join("team-a/warm/.1.touches").exists());
}

#[test]
fn a_partial_folder_goes_with_its_last_owner() {
    let root = tempfile::tempdir().unwrap();
    let store = ImageStore::open(root.path()).unwrap();
    let (namespace, name) = names();
    let request = store.begin(&namespace, &name, Source::default()).unwrap();
    let partial = Making::plain().begin(&store, &request);
    fs::write(partial.criu_dir().join("core-1.img"), "half").unwrap();
    // Somebody else cleans up meanwhile.
    assert_eq!(store.sweep().unwrap(), 0);
    drop(partial);
    assert!(matches!(request.finish(), Err(ImageError::Unknown(_))));
    assert_eq!(leftovers(&store), 0);
}

#[test]
fn what_a_killed_maker_left_is_swept_by_the_next() {
    let root = tempfile::tempdir().unwrap();
    let store = ImageStore::open(root.path()).unwrap();
    // SIGKILL runs no destructor; the kernel releases the locks.
    let dead = store.partial_dir().join("dead");
    fs::create_dir_all(dead.join(CRIU_DIR)).unwrap();
    fs::write(dead.join("criu/pages-1.img"), "half").unwrap();
    fs::write(store.partial_dir().join("dead.lock"), "").unwrap();
    drop(make(&store));
    assert_eq!(leftovers(&store), 0);
}

#[test]
fn only_our_own_partial_folders_are_ours() {
    let root = tempfile::tempdir().unwrap();
    let store = ImageStore::open(root.path()).unwrap();
    for path in ["/tmp", "/", "relative", "/no/such/folder"] {
        assert!(
            store.partial_at(Path::new(path)).unwrap().is_none(),
            "{path}"
        );
    }
    let inside = store.partial_dir().join("never-asked-for");
    assert!(store.partial_at(&inside).is_err());
    assert!(
        store
            .partial_at(&store.partial_dir().join("../.."))
            .unwrap()
            .is_none()
    );
}

#[test]
fn an_encrypted_image_lets_nothing_out_and_opens_with_its_key_only() {
    let key =
        |text: &str| Key::parse("team-a-1", blake3::hash(text.as_bytes()).as_bytes()).unwrap();
    let root = tempfile::tempdir().unwrap();
    let store = ImageStore::open(root.path()).unwrap();
    let making = Making {
        key: Some(key("right")),
        compression: Compression::Lz4,
        private: root.path().join("private"),
    };
    for generation in 1..=2 {
        let image = making.make(&store);
        assert_eq!(image.key(), Some("team-a-1"));
        assert_eq!(image.generation(), generation);
        assert!(!making.private.exists());
        let dir = root.path().join(format!("team-a/warm/{generation}"));
        // CRIU's files are in the pack too.
        assert!(!dir.join(CRIU_DIR).exists());
        let into = root.path().join("laid-out");
        let mut opened = image.verify(&into, Some(&key("right"))).unwrap();
        assert!(opened.criu_dir().join("inventory.img").is_file());
        opened.load_eagerly().unwrap();
        assert_eq!(opened.criu_dir(), into);
        opened.verify_chunks(&AtomicU64::new(0)).unwrap();
    }
    let (namespace, name) = names();
    let resolve = || store.resolve(&namespace, &name, None).unwrap();
    assert_eq!(resolve().manifest().stored.written, 0);
    for (with, words) in [
        (Some(key("wrong")), "is another one"),
        (None, "which this node does not have"),
    ] {
        let refused = resolve()
            .verify(&root.path().join("x"), with.as_ref())
            .unwrap_err();
        assert!(refused.to_string().contains(words), "{refused}");
    }
    // Nor can one that anybody could have made take its place.
    drop(make(&store));
    let refused = resolve()
        .verify(&root.path().join("x"), Some(&key("right")))
        .unwrap_err();
    assert!(matches!(refused, ImageError::Unlocked(_)), "{refused}");
    assert!(!root.path().join("x").exists());
}

/// The manifest says what everything else has to be: without the key nobody makes one.
#[test]
fn a_manifest_that_was_changed_without_the_key_is_refused() {
    let key = Key::parse("k", &[7; 32]).unwrap();
    let root = tempfile::tempdir().unwrap();
    let store = ImageStore::open(root.path()).unwrap();
    let making = Making {
        key: Some(key.clone()),
        compression: Compression::None,
        private: root.path().join("private"),
    };
    drop(making.make(&store));
    let dir = root.path().join("team-a/warm/1");
    let text = fs::read_to_string(dir.join(MANIFEST_FILE)).unwrap();
    let changed = text.replace("\"uid\": 0", "\"uid\": 1");
    assert_ne!(text, changed);
    fs::write(dir.join(MANIFEST_FILE), &changed).unwrap();
    let digest = format!("{}\n", blake3::hash(changed.as_bytes()).to_hex());
    fs::write(dir.join(MANIFEST_DIGEST_FILE), digest).unwrap();
    let (namespace, name) = names();
    let image = store.resolve(&namespace, &name, None).unwrap();
    let refused = image
        .verify(&root.path().join("x"), Some(&key))
        .unwrap_err();
    assert!(
        matches!(
            refused,
            ImageError::Damaged {
                damage: Damage::Checksum,
                ..
            }
        ),
        "{refused}"
    );
}

#[test]
fn nothing_foreign_is_sealed() {
    let (namespace, name) = names();
    type Spoil = fn(&Partial);
    let table: &[(Spoil, &str)] = &[
        (
            |partial| symlink("/etc/passwd", partial.criu_dir().join("../upper.tar")).unwrap(),
            "not in the manifest",
        ),
        (
            |partial| fs::create_dir(partial.criu_dir().join("deep")).unwrap(),
            "not a regular file",
        ),
        (
            |partial| fs::write(partial.criu_dir().join("a b"), "").unwrap(),
            "not in the manifest",
        ),
    ];
    for (spoil, words) in table {
        let root = tempfile::tempdir().unwrap();
        let store = ImageStore::open(root.path()).unwrap();
        let request = store.begin(&namespace, &name, Source::default()).unwrap();
        let partial = Making::plain().begin(&store, &request);
        folder(&partial.criu_dir());
        spoil(&partial);
        let refused = partial.seal(Facts::default()).unwrap_err().to_string();
        assert!(refused.contains(words), "{refused}");
        drop(request);
        assert_eq!(leftovers(&store), 0);
        assert_eq!(store.list(None).unwrap().len(), 0);
    }
}

fn move_folder(from: &Path, to: &Path) {
    fs::create_dir(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        fs::copy(entry.path(), to.join(entry.file_name())).unwrap();
    }
    fs::remove_dir_all(from).unwrap();
}

/// Says of an image that it was used then.
fn used_at(store: &ImageStore, generation: u64, seconds: u64) {
    let (namespace, name) = names();
    let lock = store.lock_path(&namespace, &name, generation);
    let file = fs::OpenOptions::new().write(true).open(lock).unwrap();
    let time = std::time::UNIX_EPOCH + std::time::Duration::from_secs(seconds);
    file.set_modified(time).unwrap();
}

#[test]
fn when_an_image_was_used_is_known_to_the_next_process_and_looking_is_no_use() {
    let root = tempfile::tempdir().unwrap();
    let store = ImageStore::open(root.path()).unwrap();
    drop(make(&store));
    used_at(&store, 1, 1000);
    let (namespace, name) = names();
    let image = store.resolve(&namespace, &name, None).unwrap();
    drop(verify(&store, image).unwrap());
    let last_used = || store.inventory(None).unwrap()[0].last_used;
    assert_eq!(last_used(), 1000);
    let image = store.resolve(&namespace, &name, None).unwrap();
    image.mark_used().unwrap();
    assert!(last_used() > 1000);
    // A clock that was wrong keeps nothing for ever.
    used_at(&store, 1, 1 << 40);
    assert!(last_used() < 1 << 40);
}

#[test]
fn what_is_shared_comes_free_with_the_last_that_has_it() {
    let root = tempfile::tempdir().unwrap();
    let store = ImageStore::open(root.path()).unwrap();
    drop(make(&store));
    drop(make(&store));
    let held = store.inventory(None).unwrap();
    let disk_bytes = |path: &Path| {
        let found = fs::metadata(path).unwrap();
        std::os::unix::fs::MetadataExt::blocks(&found) * 512
    };
    let pack = disk_bytes(&pack(&root.path().join("team-a/warm/1")));
    // 1.2 MB that both have.
    assert!(pack >= 1_200_000);
    let [first, second] = [&held[0], &held[1]].map(|image| (image.own_bytes(), image.bytes()));
    assert!(first.0 < pack && first.1 >= pack && second.1 >= pack);
    assert_eq!(store.evict(&held[0]).unwrap(), Evicted::Freed(first.0));
    assert_eq!(store.evict(&held[0]).unwrap(), Evicted::Gone);
    assert_eq!(store.evict(&held[1]).unwrap(), Evicted::Freed(second.1));
    assert_eq!(store.inventory(None).unwrap(), []);
    assert_eq!(names_in(&root.path().join("team-a/warm")), NUMBER);
}

#[test]
fn a_lease_that_comes_between_the_plan_and_the_removal_wins() {
    let root = tempfile::tempdir().unwrap();
    let store = ImageStore::open(root.path()).unwrap();
    drop(make(&store));
    used_at(&store, 1, 1000);
    let held = store.inventory(None).unwrap().remove(0);
    let (namespace, name) = names();
    let image = store.resolve(&namespace, &name, None).unwrap();
    assert_eq!(store.evict(&held).unwrap(), Evicted::Used);
    // Also one that is over already: its image is the most recently used one now.
    image.mark_used().unwrap();
    drop(image);
    assert_eq!(store.evict(&held).unwrap(), Evicted::Used);
    let again = store.inventory(None).unwrap().remove(0);
    assert!(matches!(store.evict(&again).unwrap(), Evicted::Freed(n) if n > 0));
}

/// Of many that resolve and one that removes, each gets an image that stays as long as it holds it, or none.
#[test]
fn an_eviction_that_races_with_restores_takes_nothing_away() {
    let root = tempfile::tempdir().unwrap();
    let store = ImageStore::open(root.path()).unwrap();
    let (namespace, name) = names();
    let (mut won, mut lost) = (0, 0);
    for _ in 0..40 {
        drop(make(&store));
        let held = store.inventory(None).unwrap().remove(0);
        let outcome = std::thread::scope(|scope| {
            let restore = scope.spawn(|| match store.resolve(&namespace, &name, None) {
                Ok(image) => Some(image.chunks(None).map(|_| drop(image))),
                Err(ImageError::Unknown(_)) => None,
                Err(other) => panic!("{other}"),
            });
            let evicted = store.evict(&held).unwrap();
            (restore.join().unwrap(), evicted)
        });
        match outcome {
            (Some(whole), _) => {
                whole.unwrap();
                won += 1;
            }
            (None, evicted) => {
                assert!(matches!(evicted, Evicted::Freed(_)), "{evicted:?}");
                lost += 1;
            }
        }
        let _ = store.remove(&namespace, &name, None, false);
    }
    println!("the restore came first {won} times, and the eviction {lost} times");
    let home = root.path().join("team-a/warm");
    assert_eq!(names_in(&home), NUMBER);
}

#[test]
fn what_the_killed_left_is_found_and_removed_and_what_somebody_holds_is_not() {
    let root = tempfile::tempdir().unwrap();
    let store = ImageStore::open(root.path()).unwrap();
    drop(make(&store));
    drop(make(&store));
    // A removal that was killed behind its first step.
    fs::remove_file(root.path().join("team-a/warm/1").join(MANIFEST_FILE)).unwrap();
    let (namespace, name) = names();
    let resolve = |generation| store.resolve(&namespace, &name, generation);
    assert!(matches!(resolve(Some(1)), Err(ImageError::Unknown(_))));
    let request = store.begin(&namespace, &name, Source::default()).unwrap();
    let partial = Making::plain().begin(&store, &request);
    let dead = store.partial_dir().join("dead");
    fs::create_dir_all(dead.join(CRIU_DIR)).unwrap();
    fs::write(dead.join("criu/pages-1.img"), vec![7; 1 << 20]).unwrap();
    assert_eq!(store.inventory(None).unwrap().len(), 1);
    let seen = store.leftovers(false).unwrap();
    assert!(seen.folders == 2 && seen.bytes >= 1 << 20, "{seen:?}");
    assert!(dead.exists());
    assert_eq!(store.leftovers(true).unwrap(), seen);
    assert!(!dead.exists() && partial.criu_dir().is_dir());
    assert_eq!(store.leftovers(true).unwrap(), Leftovers::default());
    assert_eq!(store.list(None).unwrap().len(), 1);
}

#[test]
fn a_damaged_generation_fails_one_image_and_no_more() {
    let root = tempfile::tempdir().unwrap();
    let store = ImageStore::open(root.path()).unwrap();
    drop(make(&store));
    let home = root.path().join("team-a/warm");
    flip(&pack(&home.join("1")), 70_000, 1);
    let (namespace, name) = names();
    let request = store.begin(&namespace, &name, Source::default()).unwrap();
    let making = Making::plain();
    let refused = making.fill(making.begin(&store, &request)).unwrap_err();
    assert!(
        matches!(refused, ImageError::Chunk(ChunkError::Damaged { .. })),
        "{refused}"
    );
    drop(request);
    // What is stored anew is whole, and the next one is built on that again.
    verify(&store, make(&store)).unwrap();
    let third = make(&store);
    assert_eq!(third.manifest().stored.written, 0);
    verify(&store, third).unwrap();
    store.remove(&namespace, &name, Some(1), false).unwrap();
    assert!(names_in(&home).iter().all(|name| !name.contains("unsound")));
}

/// The newest one that is whole is meant by its name, and nobody is told of a manifest that cannot be read.
#[test]
fn a_removal_that_was_killed_leaves_the_generation_before() {
    let root = tempfile::tempdir().unwrap();
    let store = ImageStore::open(root.path()).unwrap();
    drop(make(&store));
    drop(make(&store));
    fs::remove_file(root.path().join("team-a/warm/2").join(MANIFEST_FILE)).unwrap();
    let (namespace, name) = names();
    let found = store.resolve(&namespace, &name, None).unwrap();
    assert_eq!(found.generation(), 1);
    // Its number is taken all the same.
    assert_eq!(make(&store).generation(), 3);
}

/// Room is made by itself only of what containers make by themselves.
#[test]
fn what_a_person_has_made_stays_when_room_is_made() {
    let dir = tempfile::tempdir().unwrap();
    let store = ImageStore::open(&dir.path().join("images")).unwrap();
    let first = Making::plain().make(&store);
    let second = Making::plain().make(&store);
    let path = first.dir().join(MANIFEST_FILE);
    let mut manifest: serde_json::Value =
        serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    manifest["facts"]["source"]["warm"] = "hash".into();
    fs::write(&path, manifest.to_string()).unwrap();
    let rules = Retention {
        idle: Some(std::time::Duration::ZERO),
        idle_newest: true,
        ..Retention::default()
    };
    // A container starts from it.
    assert_eq!(store.make_room(&rules).unwrap(), Vec::<String>::new());
    drop((first, second));
    assert_eq!(store.make_room(&rules).unwrap(), ["team-a/warm@1"]);
    assert_eq!(store.list(None).unwrap().len(), 1);
}
