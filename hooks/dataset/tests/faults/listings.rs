//! Listings that lie, listings that are long, and folders of the node.

use std::{fs, os::unix::fs::symlink};

use rekindle_dataset::{DatasetError, Verification};

use crate::{
    liar::{Fault, Liar, Object, Op},
    node::{MIB, Node, pattern, read},
};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn keys_that_climb_are_refused_before_a_byte_is_fetched() {
    for keys in [
        vec!["lie:m/../../../etc/cron.d/x"],
        vec!["lie:/etc/passwd"],
        vec!["lie:m//x"],
        vec!["lie:m/./x"],
        vec!["lie:other/x"],
        vec!["m/a", "lie:m/a"],
        vec!["m/a", "m/a/b"],
        vec![],
    ] {
        let objects = keys.iter().map(|key| (*key, Object::new(pattern(1, 10))));
        let store = Liar::start(objects.collect(), |_, _| Fault::Serve);
        let node = Node::new(store.address);
        let error = node.acquire("s3://bucket/m/").await.unwrap_err();
        let refused = matches!(
            error,
            DatasetError::Key { .. } | DatasetError::Listing { .. }
        );
        assert!(refused && !error.is_retryable(), "{keys:?}: {error}");
        assert_eq!(store.count(Op::Get), 0, "{keys:?}");
        node.assert_nothing_published("a climbing key");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_listing_of_many_pages() {
    let keys: Vec<String> = (0..2500)
        .map(|i| format!("m/{:02}/{i:04}", i % 50))
        .collect();
    let objects = keys.iter().enumerate();
    let objects = objects.map(|(i, key)| (key.as_str(), Object::new(pattern(i as u64, i % 40))));
    let store = Liar::start(objects.collect(), |_, _| Fault::Serve);
    let node = Node::new(store.address);
    let ready = node.acquire("s3://bucket/m/").await.unwrap();
    assert_eq!((ready.files, store.count(Op::List)), (2500, 3));
    for i in [0, 39, 999, 1000, 2499] {
        assert_eq!(
            read(&ready, &keys[i][2..]),
            pattern(i as u64, i % 40),
            "{i}"
        );
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn one_object() {
    let bytes = pattern(3, MIB);
    let store = Liar::start(
        vec![
            ("m/model.bin", Object::new(bytes.clone())),
            ("m/other", Object::new(vec![])),
        ],
        |_, _| Fault::Serve,
    );
    let node = Node::new(store.address);
    let ready = node.acquire("s3://bucket/m/model.bin").await.unwrap();
    assert_eq!((read(&ready, "model.bin"), ready.files), (bytes, 1));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_folder_of_the_node() {
    let node = Node::new("127.0.0.1:1".parse().unwrap());
    let allowed = node.folder.path().join("allowed");
    fs::create_dir_all(allowed.join("m/deep")).unwrap();
    let bytes = pattern(4, 2 * MIB + 3);
    fs::write(allowed.join("m/a"), &bytes).unwrap();
    fs::write(allowed.join("m/deep/b"), b"small").unwrap();
    let uri = format!("file://{}/m/", allowed.display());
    let ready = node.acquire(&uri).await.unwrap();
    assert_eq!(
        (read(&ready, "a"), read(&ready, "deep/b")),
        (bytes, b"small".to_vec())
    );
    assert_eq!(ready.verified, Verification::TransportOnly);
    assert!(node.acquire(&uri).await.unwrap().hit);
    fs::write(allowed.join("m/deep/b"), b"other").unwrap();
    let newer = node.acquire(&uri).await.unwrap();
    assert_eq!(
        (newer.hit, read(&newer, "deep/b")),
        (false, b"other".to_vec())
    );
    assert_eq!(
        read(&ready, "deep/b"),
        b"small",
        "what is mounted never changes"
    );

    let outside = format!("file://{}/", node.folder.path().display());
    let error = node.acquire(&outside).await.unwrap_err();
    assert!(matches!(error, DatasetError::NotAllowed { .. }), "{error}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_symlink_leads_nowhere() {
    for target in ["/etc/passwd", "../../secret", "a"] {
        let node = Node::new("127.0.0.1:1".parse().unwrap());
        let allowed = node.folder.path().join("allowed");
        fs::create_dir_all(allowed.join("m")).unwrap();
        fs::write(allowed.join("m/a"), b"plain").unwrap();
        fs::write(node.folder.path().join("secret"), b"secret").unwrap();
        symlink(target, allowed.join("m/link")).unwrap();
        symlink(node.folder.path(), allowed.join("out")).unwrap();
        for uri in ["m/", "m/link", "out/", "out/secret"] {
            let uri = format!("file://{}/{uri}", allowed.display());
            let error = node.acquire(&uri).await.unwrap_err();
            assert!(!error.is_retryable(), "{uri} -> {target}: {error}");
            node.assert_nothing_published(&uri);
        }
    }
}
