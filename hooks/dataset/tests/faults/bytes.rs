//! Bodies that are cut, held back, wrong, or no longer those that were listed.

use std::{process::Command, sync::atomic::Ordering::SeqCst};

use base64_simd::STANDARD;
use rekindle_dataset::{Cache, DatasetError, Verification};
use rekindle_store::Lock;
use sha2::Digest;

use crate::{
    liar::{Fault, Liar, Object, Op},
    node::{MIB, Node, pattern, read},
};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_body_that_is_cut_continues_at_the_byte_reached() {
    const CUT: usize = 300_000;
    for (name, fault) in [
        ("reset", Fault::Reset(CUT)),
        ("short", Fault::Short(CUT)),
        ("stall", Fault::Stall(CUT)),
        ("reset at once", Fault::Reset(0)),
        ("stall at once", Fault::Stall(0)),
    ] {
        let bytes = pattern(5, 4 * MIB + 5);
        let store = Liar::start(
            vec![("m/a", Object::new(bytes.clone()))],
            move |request, _| match request.op == Op::Get && request.nth <= 4 {
                true => fault,
                false => Fault::Serve,
            },
        );
        let node = Node::new(store.address);
        let ready = node.acquire("s3://bucket/m/").await;
        let ready = ready.unwrap_or_else(|e| panic!("{name}: {e}"));
        assert_eq!(read(&ready, "a"), bytes, "{name}");
        // RST may throw away what is in flight; what has arrived is never asked for again.
        let again = store.served.load(SeqCst) - bytes.len() as u64;
        let allowed = if name == "reset" { 4 * CUT as u64 } else { 0 };
        assert!(again <= allowed, "{name}: {again} bytes twice");
    }
}

fn sha256(bytes: &[u8]) -> String {
    STANDARD.encode_to_string(sha2::Sha256::digest(bytes))
}

fn crc32(bytes: &[u8]) -> String {
    let crc = crc_fast::checksum(crc_fast::CrcAlgorithm::Crc32IsoHdlc, bytes) as u32;
    STANDARD.encode_to_string(crc.to_be_bytes())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn wrong_bytes_of_the_right_length_are_never_published() {
    let bytes = pattern(6, 2 * MIB + 9);
    let plain = || Object::without_checksum(bytes.clone());
    for (name, object, verified) in [
        (
            "CRC64NVME",
            Object::new(bytes.clone()),
            Verification::StoreChecksum,
        ),
        (
            "CRC32",
            plain().with("x-amz-checksum-crc32", crc32(&bytes)),
            Verification::StoreChecksum,
        ),
        (
            "SHA256",
            plain().with("x-amz-checksum-sha256", sha256(&bytes)),
            Verification::StoreChecksum,
        ),
        ("MD5", plain(), Verification::EtagMd5),
    ] {
        // Every time: refused, in words.
        let store = Liar::start(vec![("m/a", object.clone())], |request, _| {
            match request.op == Op::Get && request.start == 0 {
                true => Fault::Flip,
                false => Fault::Serve,
            }
        });
        let node = Node::new(store.address);
        let error = node.acquire("s3://bucket/m/").await.unwrap_err();
        assert!(
            matches!(&error, DatasetError::Corrupt { kind, path, .. } if *kind == name && path == "a"),
            "{name}: {error}"
        );
        assert!(!error.is_retryable(), "{name}");
        node.assert_nothing_published(name);

        // Once: fetched again, and right. On the same node: the wrong parts are not believed.
        let store = Liar::start(vec![("m/a", object)], |request, _| {
            match request.op == Op::Get && request.nth == 1 {
                true => Fault::Flip,
                false => Fault::Serve,
            }
        });
        let node = Node::new(store.address);
        let ready = node.acquire("s3://bucket/m/").await.unwrap();
        assert_eq!(
            (read(&ready, "a"), ready.verified),
            (bytes.clone(), verified),
            "{name}"
        );
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_may_require_more_than_a_store_gives() {
    for (etag, extra, verified) in [
        ("\"abc-3\"", "", Ok(Verification::TransportOnly)),
        (
            "\"abc-3\"",
            "minimum-verification = \"etag-md5\"",
            Err("transport-only"),
        ),
        (
            "",
            "minimum-verification = \"store-checksum\"",
            Err("etag-md5"),
        ),
        (
            "",
            "minimum-verification = \"etag-md5\"",
            Ok(Verification::EtagMd5),
        ),
    ] {
        let mut object = Object::without_checksum(pattern(7, 1000));
        if !etag.is_empty() {
            object.etag = etag.to_owned();
        }
        let store = Liar::start(vec![("m/a", object)], |_, _| Fault::Serve);
        let node = Node::with(store.address, extra);
        let got = node
            .acquire("s3://bucket/m/")
            .await
            .map(|ready| ready.verified);
        match (got, verified) {
            (Ok(got), Ok(expected)) => assert_eq!(got, expected, "{etag} {extra}"),
            (Err(error), Err(word)) => {
                assert!(
                    error.is_refusal() && error.to_string().contains(word),
                    "{error}"
                );
                assert_eq!(store.count(Op::Get), 0, "refused before a byte is fetched");
            }
            (got, expected) => panic!("{etag} {extra}: {got:?}, expected {expected:?}"),
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_object_that_changes_half_way_never_makes_a_mixed_dataset() {
    for obeys_if_match in [true, false] {
        let (old, new) = (pattern(8, 6 * MIB), pattern(9, 6 * MIB));
        let newer = Object::new(new.clone());
        let store = Liar::start(
            vec![
                ("m/a", Object::new(old)),
                ("m/b", Object::new(pattern(10, 10))),
            ],
            move |request, store| {
                if request.op == Op::Get && request.nth == 4 {
                    store.put("m/a", newer.clone());
                }
                match obeys_if_match {
                    true => Fault::Serve,
                    false => Fault::IgnoreIfMatch,
                }
            },
        );
        let node = Node::new(store.address);
        let ready = node.acquire("s3://bucket/m/").await.unwrap();
        assert!(read(&ready, "a") == new, "obeys If-Match: {obeys_if_match}");
        let published = Cache::open(&node.config.datasets).list().unwrap();
        assert_eq!(published.len(), 1, "the first listing was never published");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_object_that_never_rests_is_given_up() {
    let store = Liar::start(
        vec![("m/a", Object::new(pattern(0, 2 * MIB)))],
        |request, store| {
            if request.op == Op::Get {
                store.put("m/a", Object::new(pattern(request.nth as u64, 2 * MIB)));
            }
            Fault::Serve
        },
    );
    let node = Node::new(store.address);
    let error = node.acquire("s3://bucket/m/").await.unwrap_err();
    assert!(
        matches!(error, DatasetError::Changed { .. }) && error.is_retryable(),
        "{error}"
    );
    assert_eq!(store.count(Op::List), 3);
    node.assert_nothing_published("an object that never rests");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_store_without_ranges_is_refused() {
    let object = Object::new(pattern(11, 3 * MIB));
    let store = Liar::start(vec![("m/a", object)], |request, _| match request.op {
        Op::Get => Fault::IgnoreRange,
        _ => Fault::Serve,
    });
    let node = Node::new(store.address);
    let error = node.acquire("s3://bucket/m/").await.unwrap_err();
    assert!(error.to_string().contains("Content-Range"), "{error}");
    node.assert_nothing_published("no ranges");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn sizes_beyond_the_disk_are_refused_before_a_byte_is_fetched() {
    for claims in [1 << 50, i64::MAX, -1] {
        let mut object = Object::new(pattern(12, 100));
        object.claims = Some(claims);
        let store = Liar::start(vec![("m/a", object)], |_, _| Fault::Serve);
        let node = Node::new(store.address);
        let error = node.acquire("s3://bucket/m/").await.unwrap_err();
        let full = matches!(&error, DatasetError::Store(error) if error.is_full());
        assert!(full || claims < 0, "{claims}: {error}");
        assert_eq!(store.count(Op::Get), 0, "{claims}: {error}");
        node.assert_nothing_published("a size beyond the disk");
    }
}

/// The disk fills while bytes arrive. In a mount namespace of its own, so that the small file system
/// is gone with the process, however it ends.
#[test]
fn a_disk_that_fills_fails_in_words() {
    let inner = "bytes::inside_a_small_file_system";
    let ran = Command::new("unshare")
        .args(["--mount", "--"])
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", inner, "--ignored", "--nocapture"])
        .output();
    let Ok(ran) = ran else {
        return eprintln!("skipped: no unshare here");
    };
    let text = String::from_utf8_lossy(&ran.stderr);
    if text.starts_with("unshare:") {
        return eprintln!("skipped, needs root: {text}");
    }
    assert!(
        ran.status.success(),
        "{}{text}",
        String::from_utf8_lossy(&ran.stdout)
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "run by a_disk_that_fills_fails_in_words"]
async fn inside_a_small_file_system() {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path().join("cache");
    std::fs::create_dir(&root).unwrap();
    let mounted = Command::new("mount")
        .args(["-t", "tmpfs", "-o", "size=16m", "small"])
        .arg(&root)
        .status();
    assert!(mounted.unwrap().success());
    let filler = root.join("filler");
    let store = Liar::start(
        (0..4)
            .map(|i| {
                (
                    ["m/a", "m/b", "m/c", "m/d"][i],
                    Object::new(pattern(13, 2 * MIB)),
                )
            })
            .collect(),
        move |request, _| {
            if request.op == Op::Get && request.nth == 1 {
                // Fails at the end of the file system, which is what it is for.
                let _ = std::fs::write(&filler, vec![1; 16 * MIB]);
            }
            Fault::Serve
        },
    );
    let mut node = Node::at(folder, root.clone(), store.address, "");
    node.config.datasets.concurrency = 1;
    let error = node.acquire("s3://bucket/m/").await.unwrap_err();
    let full = matches!(&error, DatasetError::Store(error) if error.is_full());
    assert!(full && error.is_retryable(), "{error:?}");
    node.assert_nothing_published("a full disk");

    // Room again: the next call continues.
    std::fs::remove_file(root.join("filler")).unwrap();
    let ready = node.acquire("s3://bucket/m/").await.unwrap();
    assert_eq!(ready.files, 4);
    let twice = store.served.load(SeqCst) - 8 * MIB as u64;
    assert!(twice <= MIB as u64, "{twice} bytes twice");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_dataset_in_use_is_not_removed_and_a_removed_one_is_gone() {
    let object = Object::new(pattern(14, 100));
    let store = Liar::start(vec![("m/a", object)], |_, _| Fault::Serve);
    let node = Node::new(store.address);
    let ready = node.acquire("s3://bucket/m/").await.unwrap();
    let cache = Cache::open(&node.config.datasets);
    let info = cache.at(&ready.path).unwrap().unwrap();
    assert_eq!(
        (info.files, info.bytes, info.uri.as_str()),
        (1, 100, "s3://bucket/m/")
    );
    assert_eq!(cache.verify(&info, |_| {}).unwrap(), []);

    let lease: Lock = cache.lease(&info).unwrap().unwrap();
    assert!(matches!(
        cache.remove(&info),
        Err(DatasetError::InUse { .. })
    ));
    drop(lease);
    cache.remove(&info).unwrap();
    assert!(cache.lease(&info).unwrap().is_none());
    assert_eq!(cache.list().unwrap(), []);
    assert!(!ready.path.exists());
    assert!(!node.acquire("s3://bucket/m/").await.unwrap().hit);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_flipped_byte_on_disk_is_found() {
    use std::os::unix::fs::{FileExt, PermissionsExt};
    let store = Liar::start(
        vec![
            ("m/a", Object::new(pattern(15, 5000))),
            ("m/b/c", Object::new(pattern(16, 10))),
        ],
        |_, _| Fault::Serve,
    );
    let node = Node::new(store.address);
    let ready = node.acquire("s3://bucket/m/").await.unwrap();
    let path = ready.path.join("a");
    let mode = |path: &std::path::Path| path.metadata().unwrap().permissions().mode() & 0o777;
    assert_eq!(
        (mode(&path), mode(&ready.path), mode(&ready.path.join("b"))),
        (0o444, 0o555, 0o555)
    );
    assert_eq!(mode(&node.config.datasets.root), 0o700);

    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).unwrap();
    let file = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
    file.write_all_at(b"x", 77).unwrap();
    let cache = Cache::open(&node.config.datasets);
    let info = cache.at(&ready.path).unwrap().unwrap();
    let damaged = cache.verify(&info, |_| {}).unwrap();
    assert_eq!(damaged.len(), 1);
    assert_eq!(damaged[0].path, "a");
}
