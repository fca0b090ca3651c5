use std::{
    fs,
    io::Write as _,
    path::PathBuf,
    sync::{Arc, atomic::AtomicU64},
};

use flate2::{Compression as Level, write::GzEncoder};
use tar::{Builder, EntryType, Header};

use super::*;
use crate::{
    ImageStore, Key,
    chunks::Compression,
    criu_image::tests::{
        pagemap,
        records::{Number, Text, Value, image as records, message},
    },
    image::{
        SealedImage,
        tests::{leftovers, names, with_causes},
    },
    manifest::Unknown,
};

const PRESENT: u32 = 4;

/// A task of user 0, with a name and no capabilities.
fn core() -> Vec<u8> {
    let ids: Vec<(u8, Value)> = (1..=8).map(|number| (number, Number(0))).collect();
    let creds = message(&ids);
    let process = message(&[(1, Number(1)), (6, Text(b"counter"))]);
    let thread = message(&[(10, Text(&creds))]);
    let core = message(&[(1, Number(1)), (3, Text(&process)), (5, Text(&thread))]);
    records(0x5505_3847, &[core])
}

/// `files.img`, and `remap-fpath.img` where the second file is the name that CRIU gave the first one.
fn files(names: &[&str], remapped: bool) -> Vec<(String, Vec<u8>)> {
    let of = |(id, name): (usize, &&str)| {
        let regular = message(&[(1, Number(id as u64)), (6, Text(name.as_bytes()))]);
        message(&[(1, Number(1)), (2, Number(id as u64)), (3, Text(&regular))])
    };
    let all: Vec<_> = names.iter().enumerate().map(of).collect();
    let mut found = vec![(
        "checkpoint/files.img".to_owned(),
        records(0x5630_3138, &all),
    )];
    if remapped {
        let remap = message(&[(1, Number(0)), (2, Number(1)), (3, Number(0))]);
        found.push((
            "checkpoint/remap-fpath.img".to_owned(),
            records(0x5913_3954, &[remap]),
        ));
    }
    found
}

/// Pages of 17 addresses, none like another.
fn pages() -> Vec<u8> {
    (0..17 * 1024_u32).flat_map(u32::to_le_bytes).collect()
}

fn spec(shm: &str) -> Vec<u8> {
    let annotation = |key: &str| format!("io.kubernetes.cri.{key}");
    let spec = serde_json::json!({
        "ociVersion": "1.1.0",
        "process": {"cwd": "/", "user": {"uid": 0, "gid": 0}},
        "mounts": [{"destination": "/dev/shm", "type": shm}],
        "annotations": {
            annotation("sandbox-namespace"): "team-a",
            annotation("sandbox-name"): "web-1",
            annotation("container-name"): "warm",
        },
    });
    spec.to_string().into_bytes()
}

/// What the kubelet writes.
fn kubelets() -> Vec<(String, Vec<u8>)> {
    let head = |words: [u32; 2]| words.map(u32::to_le_bytes).concat();
    let named = |name: &str, bytes: Vec<u8>| (name.to_owned(), bytes);
    vec![
        named("checkpoint/core-1.img", core()),
        named("checkpoint/inventory.img", head([0x5831_3116, 0])),
        named("checkpoint/pagemap-1.img", pagemap(1, &[(0x1_f000, 17, PRESENT)])),
        named("checkpoint/pages-1.img", pages()),
        named("checkpoint/pstree.img", head([0x5456_4319, 0x5027_3030])),
        named("config.dump", br#"{"id":"c0ffee","rootfsImageRef":"busybox@sha256:00","rootfsImageName":"busybox:1"}"#.to_vec()),
        named("rootfs-diff.tar", gzip(&layer())),
        named("spec.dump", spec("tmpfs")),
        named("stats-dump", b"so fast".to_vec()),
    ]
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut out = GzEncoder::new(Vec::new(), Level::fast());
    out.write_all(bytes).unwrap();
    out.finish().unwrap()
}

type Entry<'a> = (EntryType, &'a str, &'a [u8]);

/// An archive of these members; what is no file has its target in place of content.
fn tar(entries: &[Entry<'_>]) -> Vec<u8> {
    let mut tar = Builder::new(Vec::new());
    for (kind, name, bytes) in entries {
        let mut header = Header::new_ustar();
        // Literally: names that nobody should write are what this is about.
        header.as_old_mut().name[..name.len()].copy_from_slice(name.as_bytes());
        header.set_entry_type(*kind);
        header.set_mode(0o640);
        header.set_uid(7);
        header.set_gid(8);
        header.set_mtime(1_700_000_000);
        if kind.is_file() {
            header.set_size(bytes.len() as u64);
        } else {
            header.set_size(0);
            header.set_link_name_literal(bytes).unwrap();
        }
        header.set_cksum();
        let content: &[u8] = if kind.is_file() { bytes } else { b"" };
        tar.append(&header, content).unwrap();
    }
    tar.into_inner().unwrap()
}

fn layer() -> Vec<u8> {
    tar(&[
        (EntryType::Directory, "root/", b""),
        (EntryType::Regular, "root/note", b"kept"),
        (EntryType::Link, "root/again", b"root/note"),
        (EntryType::Symlink, "root/to", b"../etc//passwd"),
        (EntryType::Regular, "etc/.wh.group", b""),
        (EntryType::Directory, "etc/", b""),
        (EntryType::Regular, "etc/.wh..wh..opq", b""),
    ])
}

fn written(files: &[(String, Vec<u8>)]) -> Vec<u8> {
    let entries: Vec<Entry<'_>> = files
        .iter()
        .map(|(name, bytes)| (EntryType::Regular, name.as_str(), bytes.as_slice()))
        .collect();
    tar(&entries)
}

struct Place {
    dir: tempfile::TempDir,
    store: ImageStore,
}

impl Place {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let store = ImageStore::open(&dir.path().join("store")).unwrap();
        Self { dir, store }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn import_bytes(&self, bytes: &[u8], key: Option<Key>) -> Result<Imported, ForeignError> {
        let path = self.path("a.tar");
        fs::write(&path, bytes).unwrap();
        let archive = Archive::open(&path)?;
        let (namespace, name) = names();
        let done = AtomicU64::new(0);
        let private = self.path("private");
        let to = (&namespace, &name);
        let imported = archive.import(&self.store, to, key, Compression::Lz4, &private, &done)?;
        assert_eq!(done.into_inner(), archive.bytes());
        Ok(imported)
    }

    fn import(&self, files: &[(String, Vec<u8>)]) -> Result<Imported, ForeignError> {
        self.import_bytes(&written(files), None)
    }

    /// Asserts that bytes are refused with these words, and that nothing is left.
    fn refuses(&self, bytes: &[u8], words: &str) {
        let said = match self.import_bytes(bytes, None) {
            Err(refused) => with_causes(&refused),
            Ok(_) => panic!("imported, where {words:?} was expected"),
        };
        assert!(said.contains(words), "{words:?} is not in {said:?}");
        assert_eq!(leftovers(&self.store), 0, "{words}");
        assert!(self.store.list(None).unwrap().is_empty(), "{words}");
    }
}

/// What a stream of an image holds.
fn stream(image: &SealedImage, key: Option<&Key>, name: &str) -> Vec<u8> {
    let chunks = Arc::new(image.chunks(key).unwrap());
    let mut bytes = Vec::new();
    let mut stream = chunks.stream(name).unwrap();
    io::Read::read_to_end(&mut stream, &mut bytes).unwrap();
    bytes
}

fn changed(name: &str, bytes: Vec<u8>) -> Vec<u8> {
    let mut files = kubelets();
    files.retain(|(other, _)| other != name);
    files.push((name.to_owned(), bytes));
    written(&files)
}

fn without(name: &str) -> Vec<u8> {
    let mut files = kubelets();
    files.retain(|(other, _)| other != name);
    written(&files)
}

#[test]
fn the_kubelets_archive_becomes_an_image() {
    let place = Place::new();
    let imported = place.import(&kubelets()).unwrap();
    assert_eq!(imported.unknown, [Unknown::Host]);
    let image = imported.image;
    let facts = &image.manifest().facts;
    assert_eq!(facts.host.arch, "x86_64");
    assert_eq!(facts.source.container, "c0ffee");
    assert_eq!(facts.source.pod.as_deref(), Some("team-a/web-1"));
    assert_eq!(
        (facts.processes[0].pid, facts.processes[0].rss),
        (1, 17 * 4096)
    );
    assert_eq!(stream(&image, None, "criu/pages-1.img"), pages());
    let upper = stream(&image, None, "upper.tar");
    // One page before a boundary of 64 KiB, and sixteen behind it: two chunks, cut where the addresses say.
    let listed = crate::archive::list(upper.as_slice()).unwrap();
    let names: Vec<_> = listed
        .iter()
        .map(|entry| format!("{} {:?}", entry.path.display(), entry.kind))
        .collect();
    assert_eq!(
        names,
        [
            "etc Folder",
            "etc Folder",
            "etc/group Deleted",
            "root Folder",
            "root/again Link",
            "root/note File",
            "root/to Symlink",
        ]
    );
    // Where it may: whiteouts need that.
    if rustix::process::geteuid().is_root() {
        let into = place.path("into");
        fs::create_dir(&into).unwrap();
        let opened = crate::archive::open_dir(&into).unwrap();
        crate::archive::unpack(upper.as_slice(), &opened, crate::archive::Existing::Refuse)
            .unwrap();
        assert_eq!(fs::read(into.join("root/again")).unwrap(), b"kept");
        assert_eq!(
            fs::read_link(into.join("root/to")).unwrap(),
            PathBuf::from("../etc//passwd")
        );
        let mut value = [0; 8];
        let read = rustix::fs::getxattr(into.join("etc"), "trusted.overlay.opaque", &mut value[..]);
        assert_eq!((read, value[0]), (Ok(1), b'y'));
    }
    image.verify(&place.path("laid-out"), None).unwrap();
}

/// As containerd 2 writes it where it is told to.
#[test]
fn a_layer_may_be_compressed_in_each_way_that_there_is() {
    let zstd = |bytes: &[u8]| {
        use ruzstd::encoding::{CompressionLevel, compress_to_vec};
        compress_to_vec(bytes, CompressionLevel::Fastest)
    };
    let upper = |layer: Vec<u8>| {
        let place = Place::new();
        let bytes = changed("rootfs-diff.tar", layer);
        let image = place.import_bytes(&bytes, None).unwrap().image;
        stream(&image, None, "upper.tar")
    };
    let plain = upper(layer());
    assert!(!plain.is_empty());
    assert_eq!(upper(gzip(&layer())), plain);
    assert_eq!(upper(zstd(&layer())), plain);
    let place = Place::new();
    let mut cut = zstd(&layer());
    cut.truncate(cut.len() - 20);
    place.refuses(&changed("rootfs-diff.tar", cut), "the writable layer");
}

#[test]
fn an_encrypted_namespaces_image_is_encrypted_and_its_export_is_said_to_be_plain() {
    let place = Place::new();
    let key = Key::parse("one", "ab".repeat(32).as_bytes()).unwrap();
    let bytes = written(&kubelets());
    let image = place.import_bytes(&bytes, Some(key.clone())).unwrap().image;
    assert_eq!(image.key(), Some("one"));
    assert_eq!(stream(&image, Some(&key), "criu/pages-1.img"), pages());
    let (room, into) = (place.path("room"), place.path("out.tar"));
    let to = (room.as_path(), into.as_path());
    let done = AtomicU64::new(0);
    let refused = export(&image, Some(&key), false, to, &done).unwrap_err();
    assert!(refused.to_string().contains("--plain"), "{refused}");
    assert!(!into.exists());
    export(&image, Some(&key), true, to, &done).unwrap();
}

#[test]
fn what_is_exported_is_imported_as_it_was() {
    let place = Place::new();
    let mut files = kubelets();
    files.push((
        "devshm-checkpoint.tar".to_owned(),
        tar(&[(EntryType::Regular, "held", b"shared")]),
    ));
    files.retain(|(name, _)| name != "spec.dump");
    files.push(("spec.dump".to_owned(), spec("bind")));
    let first = place.import(&files).unwrap().image;
    let (room, into) = (place.path("room"), place.path("out.tar"));
    let done = AtomicU64::new(0);
    let exported = export(&first, None, false, (&room, &into), &done).unwrap();
    assert!(exported.shm);
    assert_eq!(exported.bytes, fs::metadata(&into).unwrap().len());
    assert_eq!(done.into_inner(), first.manifest().stored.bytes);
    let second = place
        .import_bytes(&fs::read(&into).unwrap(), None)
        .unwrap()
        .image;
    let pages = "criu/pages-1.img";
    assert_eq!(stream(&first, None, pages), stream(&second, None, pages));
    let shm = |image| crate::archive::list(stream(image, None, "shm.tar").as_slice()).unwrap();
    assert_eq!(shm(&first), shm(&second));
    let listed = |image| crate::archive::list(stream(image, None, "upper.tar").as_slice()).unwrap();
    let paths = |image| {
        listed(image)
            .into_iter()
            .map(|entry| (entry.path, entry.kind))
            .collect::<std::collections::BTreeMap<_, _>>()
    };
    assert_eq!(paths(&first), paths(&second));
    let (before, after) = (&first.manifest().facts, &second.manifest().facts);
    assert_eq!(
        (&before.host, &before.container),
        (&after.host, &after.container)
    );
    assert_eq!(before.unknown, after.unknown);
    // It is there, and stays.
    let refused = export(
        &first,
        None,
        false,
        (&place.path("room-2"), &into),
        &AtomicU64::new(0),
    );
    assert!(refused.is_err());
    assert_eq!(
        fs::read_dir(place.dir.path())
            .unwrap()
            .filter(|entry| {
                entry
                    .as_ref()
                    .unwrap()
                    .file_name()
                    .to_string_lossy()
                    .contains(".rekindle-")
            })
            .count(),
        0
    );
}

#[test]
fn what_the_archive_does_not_say_is_unknown_or_refused() {
    let place = Place::new();
    let unknown = |bytes: &[u8]| place.import_bytes(bytes, None).unwrap().unknown;
    assert_eq!(
        unknown(&without("rootfs-diff.tar")),
        [Unknown::Host, Unknown::Layer]
    );
    assert_eq!(
        unknown(&changed("spec.dump", spec("bind"))),
        [Unknown::Host, Unknown::Shm]
    );
    let place = Place::new();
    let with = |shm: &str, open: &[&str], remapped: bool| {
        let mut all = kubelets();
        all.retain(|(name, _)| name != "spec.dump");
        all.push(("spec.dump".to_owned(), spec(shm)));
        all.extend(files(open, remapped));
        written(&all)
    };
    let lost = "a process has \"/dev/shm/x\" open";
    place.refuses(&with("bind", &["/dev/shm/x"], false), lost);
    place.refuses(
        &with("bind", &["dev/shm/x", "dev/shm/link_remap.1"], true),
        lost,
    );
    let lost = "a process has \"/tmp/x\" open, and it was deleted";
    place.refuses(&with("tmpfs", &["tmp/x", "tmp/link_remap.1"], true), lost);
    place
        .import_bytes(&with("tmpfs", &["tmp/x", "root/note"], true), None)
        .unwrap();
}

#[test]
fn hostile_archives_are_refused_and_leave_nothing() {
    let place = Place::new();
    let good = written(&kubelets());
    let more = |entries: &[Entry<'_>]| {
        let mut bytes = tar(entries);
        // Its end is that of all.
        bytes.truncate(bytes.len() - 1024);
        [bytes, good.clone()].concat()
    };
    let regular = EntryType::Regular;
    for (name, words) in [
        ("../escaped", "is not a plain path"),
        ("/etc/passwd", "is not a plain path"),
        ("checkpoint/../../x", "is not a plain path"),
        ("checkpoint/deep/core-2.img", "lies in a folder"),
        (
            "checkpoint/.hidden",
            "has a name that no file of CRIU's has",
        ),
        (
            "checkpoint/manifest json",
            "has a name that no file of CRIU's has",
        ),
        ("checkpoint/pages-2.img", "is named by no pagemap"),
        ("checkpoint/core-1.img", "is there twice"),
        (
            "checkpoint/userns-1.img",
            "which no image made by rekindle has",
        ),
        ("checkpoint/rekindle.json", "what rekindle wrote"),
    ] {
        place.refuses(&more(&[(regular, name, b"x")]), words);
    }
    for kind in [
        EntryType::Symlink,
        EntryType::Link,
        EntryType::Fifo,
        EntryType::Block,
    ] {
        place.refuses(
            &more(&[(kind, "checkpoint/core-9.img", b"/etc/shadow")]),
            "is neither a file nor a folder",
        );
    }
    for (name, words) in [
        ("spec.dump", "is missing"),
        ("config.dump", "is missing"),
        ("checkpoint/pages-1.img", "is missing"),
        ("checkpoint/inventory.img", "has no inventory.img"),
        ("checkpoint/core-1.img", "has no core-*.img"),
    ] {
        place.refuses(&without(name), words);
    }
    let map = |runs: &[(u64, u64, u32)]| changed("checkpoint/pagemap-1.img", pagemap(1, runs));
    for (bytes, words) in [
        (
            changed("spec.dump", b"[".to_vec()),
            "is no container's spec",
        ),
        (
            changed("config.dump", b"[".to_vec()),
            "cannot be understood",
        ),
        (
            changed("config.dump", vec![b' '; 17 << 20]),
            "at most 16777216 are read",
        ),
        (
            changed("checkpoint/pages-1.img", pages()[..4096].to_vec()),
            "and its pagemap says 69632",
        ),
        (map(&[(0x1_f000, 1 << 40, PRESENT)]), "and its pagemap says"),
        (map(&[(0x1_f000, 17, 2)]), "still in the dumped process"),
        (
            map(&[(0x1_f000, 17, PRESENT), (0x1_0000, 1, PRESENT)]),
            "not in order",
        ),
        (
            changed(
                "checkpoint/pagemap-2.img",
                pagemap(1, &[(0x1000, 1, PRESENT)]),
            ),
            "names the pages file of another one",
        ),
        (gzip(&good), "is compressed with gzip"),
        (vec![0; 1024], "is no checkpoint archive"),
        (b"not a tar at all".repeat(64), "checksum"),
        (good[..good.len() / 2].to_vec(), "is cut short"),
        (Vec::new(), "cut short"),
    ] {
        place.refuses(&bytes, words);
    }
}

#[test]
fn hostile_layers_are_refused_and_leave_nothing() {
    let place = Place::new();
    let regular = EntryType::Regular;
    let layers: &[(&[Entry<'_>], &str)] = &[
        (&[(regular, "../x", b"")], "is not a plain path"),
        (&[(regular, "a/.wh...", b"")], "is not a plain path"),
        (&[(regular, "a/.wh.", b"")], "is not a plain path"),
        (
            &[(regular, "x", b"1"), (regular, "x", b"2")],
            "which is there already",
        ),
        (
            &[(regular, "x", b"1"), (regular, "x/y", b"2")],
            "which is there already",
        ),
        (
            &[(EntryType::Symlink, "x", b"/etc"), (regular, "x/y", b"2")],
            "which is there already",
        ),
        (
            &[(EntryType::Link, "x", b"../../etc/shadow")],
            "is not a plain path",
        ),
        (
            &[(EntryType::Link, "x", b"etc/shadow")],
            "is not a plain path",
        ),
        (
            &[(EntryType::GNUSparse, "x", b"")],
            "of a kind that is never packed",
        ),
        (&[(regular, ".", b"x")], "of a kind that is never packed"),
    ];
    for (entries, words) in layers {
        for bytes in [tar(entries), gzip(&tar(entries))] {
            place.refuses(&changed("rootfs-diff.tar", bytes), words);
        }
    }
    let mut pax = Header::new_ustar();
    pax.set_entry_type(EntryType::XHeader);
    pax.set_size(1 << 30);
    pax.set_cksum();
    let bomb = gzip(&[pax.as_bytes().to_vec(), vec![b'0'; 4 << 20]].concat());
    place.refuses(
        &changed("rootfs-diff.tar", bomb),
        "claims more than any real one has",
    );
    let mut large = Header::new_gnu();
    large.set_path("large").unwrap();
    large.set_mode(0);
    large.set_uid(0);
    large.set_gid(0);
    large.set_mtime(0);
    large.set_size(1 << 50);
    large.set_cksum();
    place.refuses(
        &changed("rootfs-diff.tar", large.as_bytes().to_vec()),
        "at most 1099511627776 are accepted",
    );
    place.refuses(
        &changed("rootfs-diff.tar", gzip(&layer())[..60].to_vec()),
        "the writable layer",
    );
    place.refuses(
        &changed("rootfs-diff.tar", b"\x28\xb5\x2f\xfd and no more".to_vec()),
        "",
    );
    // A device is not made, and no reason to refuse the rest.
    let devices = [
        (EntryType::Block, "sda", &b""[..]),
        (regular, "note", b"kept"),
    ];
    let imported = place
        .import_bytes(&changed("rootfs-diff.tar", tar(&devices)), None)
        .unwrap();
    assert_eq!(imported.devices, 1);
}

/// What `ctr images export` writes, with `spoil` of its blobs.
fn exported(spoil: impl Fn(&str, &mut Vec<u8>)) -> Vec<u8> {
    let any = |bytes: &[u8]| message(&[(1, Text(b"type")), (2, Text(bytes))]);
    let criu: Vec<_> = kubelets()
        .into_iter()
        .filter_map(|(name, bytes)| Some((name.strip_prefix("checkpoint/")?.to_owned(), bytes)))
        .collect();
    let options = message(&[(2, Number(1)), (5, Number(1)), (6, Text(b"network"))]);
    let mut blobs = Vec::new();
    let mut put = |media_type: &str, bytes: Vec<u8>| {
        let digest = BlobDigest::of(&bytes);
        let of = serde_json::json!({"mediaType": media_type, "digest": digest.to_string(), "size": bytes.len()});
        let mut bytes = bytes;
        spoil(media_type, &mut bytes);
        blobs.push((digest.path(), bytes));
        of
    };
    let manifests = [
        put("application/vnd.oci.image.manifest.v1+json", b"{}".to_vec()),
        put(
            "application/vnd.containerd.container.criu.checkpoint.criu.tar",
            written(&criu),
        ),
        put(
            "application/vnd.containerd.container.checkpoint.config.v1+proto",
            any(&spec("tmpfs")),
        ),
        put(
            "application/vnd.containerd.container.checkpoint.options.v1+proto",
            any(&options),
        ),
        put(
            "application/vnd.oci.image.layer.v1.tar+gzip",
            gzip(&layer()),
        ),
    ];
    let index = serde_json::json!({
        "schemaVersion": 2,
        "manifests": manifests,
        "annotations": {"org.opencontainers.image.ref.name": "docker.io/library/busybox:1"},
    });
    let of = put(
        "application/vnd.oci.image.index.v1+json",
        index.to_string().into_bytes(),
    );
    let top = serde_json::json!({"schemaVersion": 2, "manifests": [of]});
    blobs.push(("index.json".to_owned(), top.to_string().into_bytes()));
    blobs.push(("oci-layout".to_owned(), b"{}".to_vec()));
    written(&blobs)
}

#[test]
fn what_ctr_exports_becomes_an_image() {
    let place = Place::new();
    let image = place
        .import_bytes(&exported(|_, _| {}), None)
        .unwrap()
        .image;
    let facts = &image.manifest().facts;
    assert!(facts.dump.open_tcp && facts.dump.file_locks);
    assert_eq!(facts.dump.empty_namespaces, ["network"]);
    assert_eq!(
        facts.source.image_ref.as_deref(),
        Some("docker.io/library/busybox:1")
    );
    assert_eq!(
        facts.source.image_digest,
        Some(BlobDigest::of(b"{}").to_string())
    );
    assert_eq!(stream(&image, None, "criu/pages-1.img"), pages());
}

#[test]
fn a_blob_that_was_changed_is_refused() {
    for (of, words) in [
        ("criu.tar", "CRIU's files\" does not have the digest"),
        ("config.v1", "does not have that digest"),
        ("options.v1", "does not have that digest"),
        ("layer", "does not have the digest"),
        ("index", "cannot be understood"),
    ] {
        let place = Place::new();
        let bytes = exported(|media_type, bytes| {
            if media_type.contains(of) && !media_type.contains("manifest") {
                // Of pages or of a folder's time; of JSON its first byte.
                let at = match of {
                    "criu.tar" => bytes.len() - 8192,
                    "layer" => bytes.len() - 1,
                    "index" => 0,
                    _ => 4,
                };
                bytes[at] ^= 1;
            }
        });
        let path = place.path("a.tar");
        fs::write(&path, &bytes).unwrap();
        let said = match place.import_bytes(&bytes, None) {
            Err(refused) => with_causes(&refused),
            Ok(_) => panic!("{of} was imported"),
        };
        // A layer whose checksum is wrong is told of by gzip.
        assert!(said.contains(words) || of == "layer", "{said}");
        assert_eq!(leftovers(&place.store), 0, "{of}");
    }
}
