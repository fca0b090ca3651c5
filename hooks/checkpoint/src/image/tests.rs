use std::{
    fs,
    os::unix::fs::{FileExt, symlink},
    sync::Arc,
};

use super::*;
use crate::{
    criu_image::tests::{folder, pagemap},
    manifest::{CRIU_DIR, Facts, MANIFEST_CRC_FILE, MANIFEST_FILE, Source, UPPER_FILE},
};

fn names() -> (Namespace, ImageName) {
    ("team-a".parse().unwrap(), "warm".parse().unwrap())
}

/// Makes an image as the CLI and the shim do together.
fn make(store: &ImageStore) -> SealedImage {
    let (namespace, name) = names();
    let request = store.begin(&namespace, &name, Source::default()).unwrap();
    let partial = store.partial_at(&request.dir()).unwrap().unwrap();
    folder(&partial.criu_dir());
    // Longer than what one thread takes at a time, so that the parts' checksums are joined.
    fs::write(partial.upper_tar(), vec![3; 20 << 20]).unwrap();
    let made = partial.seal(Facts::default(), &[]).unwrap();
    let generation = made.generation();
    drop(made);
    let found = request.finish().unwrap();
    assert_eq!(found.generation(), generation);
    found
}

/// A verified image, for the tests of other modules.
pub(crate) fn verified(root: &Path) -> Arc<VerifiedImage> {
    let store = ImageStore::open(root).unwrap();
    Arc::new(make(&store).verify().unwrap())
}

fn leftovers(store: &ImageStore) -> usize {
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
    let newest = store
        .resolve(&namespace, &name, None)
        .unwrap()
        .verify()
        .unwrap();
    assert_eq!(newest.reference(), "team-a/warm@2");
    assert!(newest.upper().unwrap().is_some() && newest.shm().unwrap().is_none());
    assert!(newest.criu_dir().join("inventory.img").is_file());
    assert_eq!(leftovers(&store), 0);
    let other = "team-b".parse().unwrap();
    assert!(matches!(
        store.resolve(&other, &name, None),
        Err(ImageError::Unknown(_))
    ));
    assert_eq!(store.list(Some(&other)).unwrap().len(), 0);
    assert_eq!(store.list(None).unwrap().len(), 2);
}

/// The promise: a flipped byte in any file of an image is found before anything is restored.
#[test]
fn a_flipped_byte_anywhere_is_found() {
    let root = tempfile::tempdir().unwrap();
    let store = ImageStore::open(root.path()).unwrap();
    drop(make(&store));
    let (namespace, name) = names();
    let dir = root.path().join("team-a/warm/1");
    let mut files = vec![
        MANIFEST_FILE.into(),
        MANIFEST_CRC_FILE.into(),
        UPPER_FILE.into(),
    ];
    for entry in fs::read_dir(dir.join(CRIU_DIR)).unwrap() {
        files.push(Path::new(CRIU_DIR).join(entry.unwrap().file_name()));
    }
    assert_eq!(files.len(), 7);
    for file in files {
        let path: PathBuf = dir.join(&file);
        let length = fs::metadata(&path).unwrap().len();
        for at in [0, length / 2, length - 1] {
            for bit in [0x01, 0x20] {
                flip(&path, at, bit);
                let refused = store
                    .resolve(&namespace, &name, None)
                    .and_then(SealedImage::verify);
                let sentence = refused.unwrap_err().to_string();
                assert!(sentence.contains("team-a/warm"), "{file:?}: {sentence}");
                flip(&path, at, bit);
            }
        }
    }
    store
        .resolve(&namespace, &name, None)
        .unwrap()
        .verify()
        .unwrap();
}

fn flip(path: &Path, at: u64, bit: u8) {
    let file = fs::OpenOptions::new()
        .read(true)
        .write(true)
        .open(path)
        .unwrap();
    let mut byte = [0];
    file.read_exact_at(&mut byte, at).unwrap();
    file.write_all_at(&[byte[0] ^ bit], at).unwrap();
}

/// Each damage is made on a fresh image, and answered by a sentence that names the file.
#[test]
fn what_is_not_the_image_that_was_sealed_is_refused_by_name() {
    type Harm = fn(&Path);
    let table: &[(Harm, &str, &str)] = &[
        (
            |dir| fs::remove_file(dir.join("upper.tar")).unwrap(),
            "upper.tar",
            "is missing",
        ),
        (
            |dir| fs::write(dir.join("extra"), "x").unwrap(),
            "extra",
            "not in the manifest",
        ),
        (
            |dir| fs::write(dir.join("criu/extra.img"), "x").unwrap(),
            "criu/extra.img",
            "not in the manifest",
        ),
        (
            |dir| fs::create_dir(dir.join("criu/deep")).unwrap(),
            "criu/deep",
            "not in the manifest",
        ),
        (
            |dir| {
                fs::OpenOptions::new()
                    .write(true)
                    .open(dir.join("upper.tar"))
                    .unwrap()
                    .set_len(9)
                    .unwrap()
            },
            "upper.tar",
            "has 9 bytes where",
        ),
        (
            |dir| {
                fs::remove_file(dir.join("criu/pages-1.img")).unwrap();
                symlink("/etc/passwd", dir.join("criu/pages-1.img")).unwrap();
            },
            "criu/pages-1.img",
            "not a regular file",
        ),
        (
            |dir| {
                fs::remove_file(dir.join("manifest.crc64")).unwrap();
                symlink("upper.tar", dir.join("manifest.crc64")).unwrap();
            },
            "manifest.crc64",
            "not a regular file",
        ),
        (
            |dir| {
                move_folder(&dir.join("criu"), &dir.join("../elsewhere"));
                symlink("../elsewhere", dir.join("criu")).unwrap();
            },
            "criu/",
            "is missing",
        ),
        (
            |dir| fs::remove_file(dir.join("manifest.crc64")).unwrap(),
            "manifest.crc64",
            "is missing",
        ),
    ];
    for (harm, file, words) in table {
        let root = tempfile::tempdir().unwrap();
        let store = ImageStore::open(root.path()).unwrap();
        drop(make(&store));
        harm(&root.path().join("team-a/warm/1"));
        let (namespace, name) = names();
        let refused = store
            .resolve(&namespace, &name, None)
            .unwrap()
            .verify()
            .unwrap_err();
        let sentence = refused.to_string();
        assert!(
            sentence.contains(file) && sentence.contains(words),
            "{file}: {sentence}"
        );
    }
}

/// Checksums that match do not make CRIU's files harmless: the maker may be the attacker.
#[test]
fn a_well_sealed_image_with_a_lying_pagemap_is_refused() {
    let root = tempfile::tempdir().unwrap();
    let store = ImageStore::open(root.path()).unwrap();
    let (namespace, name) = names();
    let request = store.begin(&namespace, &name, Source::default()).unwrap();
    let partial = store.partial_at(&request.dir()).unwrap().unwrap();
    folder(&partial.criu_dir());
    let map = pagemap(1, &[(0x1000, 1_000_000_000, 4)]);
    fs::write(partial.criu_dir().join("pagemap-1.img"), map).unwrap();
    let sealed = partial.seal(Facts::default(), &[]).unwrap();
    let refused = with_causes(&sealed.verify().unwrap_err());
    assert!(refused.contains("claims 1000000000 pages"), "{refused}");
}

fn with_causes(error: &dyn std::error::Error) -> String {
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
        (sealed.replace("\"format\": 1", "\"format\": 2"), "format 2"),
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
    let lease = make(&store).verify().unwrap();
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

#[test]
fn a_partial_folder_goes_with_its_last_owner() {
    let root = tempfile::tempdir().unwrap();
    let store = ImageStore::open(root.path()).unwrap();
    let (namespace, name) = names();
    let request = store.begin(&namespace, &name, Source::default()).unwrap();
    let partial = store.partial_at(&request.dir()).unwrap().unwrap();
    fs::write(partial.upper_tar(), "half").unwrap();
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
fn nothing_foreign_is_sealed() {
    let (namespace, name) = names();
    type Spoil = fn(&Partial);
    let table: &[(Spoil, &str)] = &[
        (
            |partial| symlink("/etc/passwd", partial.upper_tar()).unwrap(),
            "not a regular file",
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
        let partial = store.partial_at(&request.dir()).unwrap().unwrap();
        folder(&partial.criu_dir());
        spoil(&partial);
        let refused = partial.seal(Facts::default(), &[]).unwrap_err().to_string();
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
