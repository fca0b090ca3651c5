//! Images in memory in front of those on the disk. Memory is a folder in `/dev/shm`.

use std::{
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::Duration,
};

use rekindle_core::config::Memory;
use tempfile::TempDir;

use super::*;
use crate::retention::Held;

/// A node with room for some images in memory.
struct Node {
    disk: TempDir,
    memory: TempDir,
    store: ImageStore,
}

/// Of an image that [`Making`] makes, about.
const BYTES: u64 = 2 << 20;

impl Node {
    fn new(quota: u64) -> Self {
        let disk = tempfile::tempdir().unwrap();
        let memory = tempfile::tempdir_in("/dev/shm").unwrap();
        let mut store = ImageStore::open(disk.path()).unwrap();
        store.use_memory(allowed(memory.path(), quota)).unwrap();
        Self {
            disk,
            memory,
            store,
        }
    }

    fn make(&self) -> SealedImage {
        make_of(&self.store, &Making::plain(), BYTES)
    }

    fn resolve(&self, generation: u64) -> SealedImage {
        let (namespace, name) = names();
        self.store
            .resolve(&namespace, &name, Some(generation))
            .unwrap()
    }

    fn settle(&self, image: &SealedImage) -> Result<Copied, ImageError> {
        image.settle(Some((None, &self.disk.path().join("laid-out"))))
    }

    fn promote(&self, image: &SealedImage) -> Result<Copied, ImageError> {
        image.promote(Some((None, &self.disk.path().join("laid-out"))))
    }

    /// What a restart does.
    fn restart(&self) {
        for entry in fs::read_dir(self.memory.path()).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                fs::remove_dir_all(path).unwrap();
            } else {
                fs::remove_file(path).unwrap();
            }
        }
    }

    fn places(&self, generation: u64) -> String {
        let (namespace, name) = names();
        let places = self.store.places((&namespace, &name), generation);
        places.to_string()
    }

    fn in_memory(&self, generation: u64) -> PathBuf {
        let folder = self.memory.path().join("team-a/warm");
        folder.join(generation.to_string())
    }

    fn on_disk(&self, generation: u64) -> PathBuf {
        let folder = self.disk.path().join("team-a/warm");
        folder.join(generation.to_string())
    }

    fn held(&self, generation: u64) -> Held {
        let all = self.store.inventory(None).unwrap().into_iter();
        let mut found = all.filter(|held| held.generation == generation);
        found.next().unwrap()
    }

    /// Nothing is left of what is being made, in either place.
    fn is_clean(&self) -> bool {
        let count = |root: &Path| fs::read_dir(root.join(".partial")).unwrap().count();
        count(self.disk.path()) + count(self.memory.path()) == 0
    }

    fn sound(&self, image: SealedImage) -> Result<VerifiedImage, ImageError> {
        verify(&self.store, image)
    }
}

fn allowed(root: &Path, quota: u64) -> Memory {
    Memory {
        quota,
        ..Memory::to_read(root)
    }
}

fn begin_of(store: &ImageStore, making: &Making, bytes: u64) -> (Request, Partial) {
    let (namespace, name) = names();
    let request = store.begin(&namespace, &name, Source::default()).unwrap();
    let order = store.partial_at(&request.dir()).unwrap().unwrap();
    let partial = order
        .expecting(bytes)
        .begin(making.key.clone(), making.compression, &making.private)
        .unwrap();
    (request, partial)
}

/// As [`Making::make`], with so many bytes that were expected.
fn make_of(store: &ImageStore, making: &Making, bytes: u64) -> SealedImage {
    let (request, partial) = begin_of(store, making, bytes);
    drop(making.fill(partial).unwrap());
    request.finish().unwrap()
}

/// The one pack of a folder.
fn pack_in(folder: &Path) -> PathBuf {
    let mut entries = fs::read_dir(folder).unwrap();
    let found = entries.find_map(|entry| {
        let path = entry.unwrap().path();
        let name = path.file_name()?.to_str()?;
        name.starts_with("pack-").then(|| path.clone())
    });
    found.unwrap()
}

fn flip(path: &Path) {
    let mut bytes = fs::read(path).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(path, bytes).unwrap();
}

#[test]
fn what_fits_is_made_in_memory_and_its_number_outlives_it() {
    let node = Node::new(1 << 30);
    let image = node.make();
    assert_eq!(image.reference(), "team-a/warm@1");
    assert_eq!(node.places(1), "memory");
    assert!(!node.on_disk(1).exists() && node.is_clean());
    node.sound(image).unwrap();
    // The next one builds on it.
    let second = node.make();
    assert_eq!(
        pack_in(&node.in_memory(1)).file_name(),
        pack_in(&node.in_memory(2)).file_name()
    );
    assert_eq!(second.manifest().stored.written, 0);
    drop(second);
    node.restart();
    let (namespace, name) = names();
    let gone = node.store.resolve(&namespace, &name, None);
    assert!(matches!(gone, Err(ImageError::Unknown(_))), "{gone:?}");
    assert_eq!(node.store.list(None).unwrap().len(), 0);
    // What lay beside it is nobody's any more.
    assert!(node.disk.path().join("team-a/warm/.2.lock").exists());
    node.store.leftovers(true).unwrap();
    assert!(!node.disk.path().join("team-a/warm/.2.lock").exists());
    assert_eq!(node.make().reference(), "team-a/warm@3");
}

#[test]
fn what_does_not_fit_or_is_not_told_of_is_made_on_the_disk() {
    let node = Node::new(16 << 20);
    drop(make_of(&node.store, &Making::plain(), 16 << 20));
    assert_eq!(node.places(1), "disk");
    drop(make(&node.store));
    assert_eq!(node.places(2), "disk");
    drop(make_of(&node.store, &Making::plain(), 12 << 20));
    assert_eq!(node.places(3), "memory");
    assert!(node.is_clean());
}

#[test]
fn what_is_promised_to_one_is_not_promised_to_another() {
    let node = Node::new(16 << 20);
    let making = Making::plain();
    let (first, one) = begin_of(&node.store, &making, 8 << 20);
    let (second, two) = begin_of(&node.store, &making, 8 << 20);
    assert_eq!((one.place(), two.place()), (Place::Memory, Place::Disk));
    drop((one, first));
    let (third, three) = begin_of(&node.store, &making, 8 << 20);
    assert_eq!(three.place(), Place::Memory);
    drop((two, second, three, third));
    assert!(node.is_clean());
}

/// At once, in two places, and on both sides of a failure.
#[test]
fn no_two_images_have_one_number() {
    let node = Node::new(1 << 30);
    let numbers = thread::scope(|scope| {
        let make = |bytes: Option<u64>| {
            let (node, making) = (&node, Making::plain());
            scope.spawn(move || {
                let made = (0..5).map(|_| match bytes {
                    Some(bytes) => make_of(&node.store, &making, bytes).generation(),
                    None => making.make(&node.store).generation(),
                });
                made.collect::<Vec<_>>()
            })
        };
        let making = [make(Some(BYTES)), make(None), make(Some(BYTES))];
        let made = making.map(|making| making.join().unwrap());
        made.concat()
    });
    let mut distinct = numbers.clone();
    distinct.sort_unstable();
    distinct.dedup();
    assert_eq!(distinct, (1..=15).collect::<Vec<u64>>(), "{numbers:?}");
    let places = distinct.iter().map(|generation| node.places(*generation));
    assert_eq!(places.filter(|places| places == "disk").count(), 5);
}

/// Told less than it is, it would take more memory than there is for images.
#[test]
fn what_grows_beyond_the_room_fails_and_leaves_nothing() {
    let node = Node::new(1 << 20);
    let (request, partial) = begin_of(&node.store, &Making::plain(), 1);
    assert_eq!(partial.place(), Place::Memory);
    let mut stream = partial.chunks().stream(UPPER_FILE);
    let full = stream.write_all(&upper_layer()).unwrap_err();
    assert_eq!(full.kind(), io::ErrorKind::StorageFull);
    drop(stream);
    drop(partial);
    drop(request);
    assert!(node.is_clean());
    assert_eq!(node.store.list(None).unwrap().len(), 0);
}

#[test]
fn a_folder_that_is_not_in_memory_is_not_used() {
    let disk = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
    if require_memory(disk.path()).is_ok() {
        // The whole tree is on a tmpfs.
        return;
    }
    let mut store = ImageStore::open(disk.path()).unwrap();
    let elsewhere = disk.path().join("memory/images");
    let refused = store.use_memory(allowed(&elsewhere, 1 << 30)).unwrap_err();
    assert!(matches!(refused, ImageError::NotInMemory(_)), "{refused}");
    assert!(!disk.path().join("memory").exists());
    assert_eq!(make_of(&store, &Making::plain(), 1).place(), Place::Disk);
}

#[test]
fn it_settles_on_the_disk_under_its_number() {
    let node = Node::new(1 << 30);
    drop(node.make());
    drop(node.make());
    for generation in [1, 2] {
        let image = node.resolve(generation);
        assert!(matches!(node.settle(&image).unwrap(), Copied::Written(_)));
        assert_eq!(node.settle(&image).unwrap(), Copied::There);
        assert_eq!(node.places(generation), "memory+disk");
    }
    // What the generation before it has there is linked.
    let links = |path: &Path| {
        let found = fs::metadata(pack_in(path)).unwrap();
        std::os::unix::fs::MetadataExt::nlink(&found)
    };
    assert_eq!((links(&node.on_disk(1)), links(&node.on_disk(2))), (2, 2));
    assert_eq!(node.resolve(2).place(), Place::Memory);
    assert!(node.is_clean());
    node.restart();
    let image = node.resolve(2);
    assert_eq!((image.place(), image.generation()), (Place::Disk, 2));
    node.sound(image).unwrap();
}

#[test]
fn what_is_damaged_does_not_settle() {
    let node = Node::new(1 << 30);
    let image = node.make();
    flip(&pack_in(&node.in_memory(1)));
    let refused = node.settle(&image).unwrap_err();
    assert!(matches!(refused, ImageError::Chunks { .. }), "{refused}");
    assert_eq!(node.places(1), "memory");
    assert!(node.is_clean() && !node.on_disk(1).exists());
}

/// What would be linked is damaged, and this one is not.
#[test]
fn it_settles_beside_one_that_is_damaged_on_the_disk() {
    let node = Node::new(1 << 30);
    drop(node.make());
    drop(node.make());
    node.settle(&node.resolve(1)).unwrap();
    flip(&pack_in(&node.on_disk(1)));
    assert!(
        matches!(node.settle(&node.resolve(2)).unwrap(), Copied::Written(bytes) if bytes > 1 << 20)
    );
    node.sound(node.resolve(2).on_disk().unwrap()).unwrap();
    assert!(node.sound(node.resolve(1).on_disk().unwrap()).is_err());
    assert!(node.is_clean());
}

#[test]
fn an_encrypted_image_settles_with_its_key_and_without() {
    let node = Node::new(1 << 30);
    let key = Key::parse("k", &[b'1'; 64]).unwrap();
    for generation in [1, 2] {
        let making = Making {
            key: Some(key.clone()),
            private: node.memory.path().join("private"),
            ..Making::plain()
        };
        let image = make_of(&node.store, &making, BYTES);
        assert_eq!(image.place(), Place::Memory);
        let into = node.memory.path().join("laid-out");
        let proof: Proof<'_> = (generation == 1).then_some((Some(&key), into.as_path()));
        assert!(matches!(image.settle(proof).unwrap(), Copied::Written(_)));
        drop(image);
        let disk = node.resolve(generation).on_disk().unwrap();
        let verified = disk.verify(&into, Some(&key)).unwrap();
        verified.verify_chunks(&AtomicU64::new(0)).unwrap();
    }
}

/// The promise: whatever of the copy in memory is wrong, the one on the disk takes its place.
#[test]
fn a_copy_in_memory_that_fails_is_a_miss() {
    let node = Node::new(1 << 30);
    drop(node.make());
    let name = |path: &Path| path.strip_prefix(node.in_memory(1)).unwrap().to_owned();
    let mut files = vec![PathBuf::new()];
    for folder in [node.in_memory(1), node.in_memory(1).join(CRIU_DIR)] {
        let entries = fs::read_dir(folder)
            .unwrap()
            .map(|entry| entry.unwrap().path());
        files.extend(
            entries
                .filter(|path| path.is_file())
                .map(|path| name(&path)),
        );
    }
    assert!(files.len() > 5, "{files:?}");
    node.settle(&node.resolve(1)).unwrap();
    for file in files {
        for gone in [false, true] {
            if node.places(1) == "disk" {
                node.promote(&node.resolve(1)).unwrap();
            }
            let path = node.in_memory(1).join(&file);
            match (gone, file == Path::new("")) {
                (false, true) => continue,
                (true, true) => fs::remove_dir_all(&path).unwrap(),
                (false, false) => flip(&path),
                (true, false) => fs::remove_file(&path).unwrap(),
            }
            let what = format!("{} {gone}", file.display());
            let image = node.resolve(1);
            if image.place() == Place::Memory {
                let alone = node.sound(node.resolve(1).alone());
                assert!(alone.is_err(), "{what} is not told of");
            }
            let verified = node.sound(image).unwrap_or_else(|e| panic!("{what}: {e}"));
            let mut upper = Vec::new();
            verified.upper().unwrap().read_to_end(&mut upper).unwrap();
            assert!(upper == upper_layer(), "{what}");
            drop(verified);
            // Of a copy that was found to be damaged at once nothing stays; of a pack that is told when it is read.
            if node.in_memory(1).exists() {
                assert!(file.to_str().unwrap().starts_with("pack-"), "{what}");
                node.resolve(1).leave_memory();
            }
            assert_eq!(node.places(1), "disk", "{what}");
        }
    }
    assert!(node.is_clean());
}

#[test]
fn a_pager_is_given_the_disks_bytes_for_those_that_are_damaged() {
    let node = Node::new(1 << 30);
    drop(node.make());
    let image = node.resolve(1);
    node.settle(&image).unwrap();
    drop(image);
    let image = node.resolve(1);
    let chunks = image.chunks(None).unwrap();
    flip(&pack_in(&node.in_memory(1)));
    chunks.verify(&AtomicU64::new(0)).unwrap();
    assert!(chunks.has_missed());
    // And where both are, nobody gets them.
    flip(&pack_in(&node.on_disk(1)));
    let damaged = chunks.verify(&AtomicU64::new(0)).unwrap_err();
    assert!(matches!(damaged, ChunkError::Damaged { .. }));
}

#[test]
fn it_is_promoted_where_there_is_room() {
    let node = Node::new(8 << 20);
    drop(make(&node.store));
    drop(make(&node.store));
    let image = node.resolve(1);
    assert!(matches!(node.promote(&image).unwrap(), Copied::Written(bytes) if bytes > 1 << 20));
    assert_eq!(node.places(1), "memory+disk");
    assert_eq!(node.promote(&node.resolve(1)).unwrap(), Copied::There);
    // The pack is there already.
    assert!(
        matches!(node.promote(&node.resolve(2)).unwrap(), Copied::Written(bytes) if bytes < 1 << 20)
    );
    node.sound(node.resolve(2).alone()).unwrap();
    let small = Node::new(1 << 20);
    drop(make(&small.store));
    assert_eq!(small.promote(&small.resolve(1)).unwrap(), Copied::NoRoom);
    assert_eq!(small.places(1), "disk");
    assert!(node.is_clean() && small.is_clean());
}

#[test]
fn what_is_damaged_is_not_promoted() {
    let node = Node::new(1 << 30);
    drop(make(&node.store));
    flip(&pack_in(&node.on_disk(1)));
    assert!(node.promote(&node.resolve(1)).is_err());
    assert_eq!(node.places(1), "disk");
    assert!(node.is_clean() && !node.in_memory(1).exists());
}

#[test]
fn only_what_nobody_leases_and_the_disk_has_leaves_memory() {
    let node = Node::new(1 << 30);
    drop(node.make());
    assert_eq!(node.store.demote(&node.held(1)).unwrap(), Evicted::Used);
    node.settle(&node.resolve(1)).unwrap();
    let before = node.held(1);
    let lease = node.resolve(1);
    assert_eq!(node.store.demote(&before).unwrap(), Evicted::Used);
    assert_eq!(node.places(1), "memory+disk");
    // A lease of one copy is a lease of the image.
    let (namespace, name) = names();
    let refused = node.store.remove(&namespace, &name, None, false);
    assert!(matches!(refused, Err(ImageError::InUse(_))), "{refused:?}");
    // Who has started from it since wins.
    thread::park_timeout(Duration::from_millis(1100));
    lease.mark_used().unwrap();
    drop(lease);
    assert_eq!(node.store.demote(&before).unwrap(), Evicted::Used);
    let freed = node.store.demote(&node.held(1)).unwrap();
    assert!(
        matches!(freed, Evicted::Freed(bytes) if bytes > 1 << 20),
        "{freed:?}"
    );
    assert_eq!(node.places(1), "disk");
    assert_eq!(node.store.demote(&node.held(1)).unwrap(), Evicted::Gone);
    assert!(node.is_clean() && !node.in_memory(1).exists());
    node.sound(node.resolve(1)).unwrap();
}

/// The promise: who starts from an image does not notice that it comes and goes.
#[test]
fn leaving_memory_takes_nothing_from_a_restore() {
    let node = Node::new(1 << 30);
    drop(node.make());
    node.settle(&node.resolve(1)).unwrap();
    let done = AtomicBool::new(false);
    let moved = thread::scope(|scope| {
        let moving = scope.spawn(|| {
            let mut moved = 0;
            while !done.load(Ordering::Relaxed) {
                if let Evicted::Freed(_) = node.store.demote(&node.held(1)).unwrap() {
                    moved += 1;
                    node.promote(&node.resolve(1)).unwrap();
                }
            }
            moved
        });
        for turn in 0..60 {
            let into = node.disk.path().join(format!("restore-{turn}"));
            let verified = node.resolve(1).verify(&into, None).unwrap();
            verified.verify_chunks(&AtomicU64::new(0)).unwrap();
        }
        done.store(true, Ordering::Relaxed);
        moving.join().unwrap()
    });
    println!("it left memory {moved} times");
    assert!(moved > 0);
}

#[test]
fn it_is_removed_from_both_places_and_what_a_killed_removal_left_too() {
    let node = Node::new(1 << 30);
    let (namespace, name) = names();
    for _ in 0..3 {
        drop(node.make());
    }
    for generation in 1..=3 {
        node.settle(&node.resolve(generation)).unwrap();
    }
    node.store
        .remove(&namespace, &name, Some(1), false)
        .unwrap();
    assert_eq!(node.places(1), "nowhere");
    // Killed when the manifest of one copy was gone: the other one is the image.
    fs::remove_file(node.in_memory(2).join(MANIFEST_FILE)).unwrap();
    // And of both.
    fs::remove_file(node.in_memory(3).join(MANIFEST_FILE)).unwrap();
    fs::remove_file(node.on_disk(3).join(MANIFEST_FILE)).unwrap();
    let partial = node.memory.path().join(".partial/dead");
    fs::create_dir(&partial).unwrap();
    let found = node.store.leftovers(true).unwrap();
    assert_eq!(found.folders, 3);
    assert_eq!(
        (node.places(2), node.places(3)),
        ("disk".to_owned(), "nowhere".to_owned())
    );
    assert!(!node.in_memory(2).exists() && !node.on_disk(3).exists() && node.is_clean());
    node.sound(node.resolve(2)).unwrap();
    assert_eq!(node.store.list(None).unwrap().len(), 1);
}

#[test]
fn who_is_killed_while_making_one_in_memory_leaves_what_is_swept() {
    let node = Node::new(1 << 30);
    let (request, partial) = begin_of(&node.store, &Making::plain(), BYTES);
    partial
        .chunks()
        .stream(UPPER_FILE)
        .write_all(&upper_layer())
        .unwrap();
    // Its locks go with the process, and nothing else does.
    let (disk, memory) = (
        node.disk.path().join(".partial"),
        node.memory.path().join(".partial"),
    );
    let ids = |folder: &Path| {
        let entries = fs::read_dir(folder)
            .unwrap()
            .map(|entry| entry.unwrap().path());
        entries.filter(|path| path.is_dir()).collect::<Vec<_>>()
    };
    let (asked, made) = (ids(&disk), ids(&memory));
    assert_eq!((asked.len(), made.len()), (1, 1));
    let copies: Vec<_> = made.iter().map(|dir| (dir.clone(), pack_in(dir))).collect();
    let bytes = fs::read(&copies[0].1).unwrap();
    drop((partial, request));
    assert!(node.is_clean());
    fs::create_dir(&copies[0].0).unwrap();
    fs::write(&copies[0].1, bytes).unwrap();
    assert_eq!(node.store.sweep().unwrap(), 1);
    assert!(node.is_clean());
}
