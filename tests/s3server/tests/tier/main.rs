//! Images in a bucket: what a store can do wrong on the way there and back, over real sockets. There is an image on the
//! other side then, whole, or none and one sentence.
#![allow(
    clippy::unwrap_used,
    reason = "helpers of tests, which clippy does not know for tests"
)]

use std::fs;

use rekindle_checkpoint::{
    Key,
    layout::{Layout, LayoutError, Proof},
};

use nodes::{MIB, Nodes, bytes, chain, names};
use proxy::{Lie, Op, Proxy, Request};

mod begun;
mod nodes;
mod proxy;
mod removed;

#[test]
fn an_image_travels_and_a_folder_with_the_same_bytes_is_a_layout() {
    let nodes = Nodes::new();
    let bucket = nodes.layout(nodes.address);
    // Of several parts, and of several requests a part.
    let first = nodes.make(1, 12 * MIB);
    let pushed = nodes.push(&bucket, &first).unwrap();
    assert_eq!(pushed.bytes, pushed.written);
    assert!(bucket.holds(&first).unwrap());
    assert_eq!(nodes.push(&bucket, &first).unwrap().written, 0);
    let second = nodes.make(2, 12 * MIB);
    assert!(!bucket.holds(&second).unwrap());
    nodes.push(&bucket, &second).unwrap();
    assert_eq!(nodes.keys("tags/team-a/").len(), 2);

    let (namespace, name) = names();
    let newest = bucket.newest(&namespace, &name).unwrap().unwrap();
    let pulled = nodes.pull(&bucket, "team-a/warm").unwrap();
    assert_eq!(pulled.proof, Proof::Whole);
    let tag = bucket.tag_for(&pulled.image);
    assert_eq!(tag, newest, "the same image has the same tag on each node");
    assert!(bucket.holds(&pulled.image).unwrap());
    nodes.pull(&bucket, &bucket.tag_for(&first)).unwrap();

    // What knows buckets and OCI and not us.
    let folder = Layout::open(&nodes.there()).unwrap();
    nodes.pull(&folder, &bucket.tag_for(&first)).unwrap();
    // And back: what was copied into a bucket as it lay in a folder.
    fs::remove_dir_all(nodes.there().join("tags")).unwrap();
    nodes.pull(&bucket, &bucket.tag_for(&second)).unwrap();
    let refused = nodes.pull(&bucket, "team-a/other").unwrap_err();
    assert!(matches!(refused, LayoutError::NoTag { .. }), "{refused}");
}

#[test]
fn what_generations_share_is_stored_once() {
    let nodes = Nodes::new();
    let bucket = nodes.layout(nodes.address);
    let first = nodes.make(1, 3 * MIB);
    nodes.push(&bucket, &first).unwrap();
    let second = nodes.make(1, 3 * MIB);
    let pushed = nodes.push(&bucket, &second).unwrap();
    assert!(
        pushed.written < pushed.bytes / 10,
        "{} of {} bytes were written again",
        pushed.written,
        pushed.bytes
    );
    drop(nodes.pull(&bucket, &bucket.tag_for(&first)).unwrap());
    let linked = nodes
        .pull(&bucket, &bucket.tag_for(&second))
        .unwrap()
        .linked;
    assert!(linked > 2 * MIB as u64, "{linked} bytes were linked");
}

#[test]
fn an_encrypted_image_is_nothing_to_the_store_and_another_key_is_told_before_its_packs() {
    let key = |digit: &str| Key::parse("k", digit.repeat(64).as_bytes()).unwrap();
    let nodes = Nodes::new();
    let image = nodes.make_with(&key("1"), 1, 4 * MIB);
    nodes.push(&nodes.layout(nodes.address), &image).unwrap();
    let plain = bytes(1, 4 * MIB);
    for blob in nodes.keys("blobs/") {
        let stored = fs::read(nodes.there().join(&blob)).unwrap();
        let there = stored
            .windows(32)
            .any(|piece| piece == &plain[MIB..MIB + 32]);
        assert!(!there, "{blob} has the container's bytes in clear");
    }
    let proxy = Proxy::start(nodes.address, |_| Lie::None);
    let bucket = nodes.layout(proxy.address);
    let refused = nodes.pull_with(&bucket, "team-a/warm", Some(&key("2")));
    let refused = chain(&refused.unwrap_err());
    assert!(refused.contains("another one"), "{refused}");
    // The tag, what it names, the manifest, its seal.
    assert_eq!(proxy.count(Op::Get), 5, "no more was fetched for that");
    nodes.assert_nothing_pulled("another key");
    let pulled = nodes.pull_with(&bucket, "team-a/warm", Some(&key("1")));
    assert_eq!(pulled.unwrap().proof, Proof::Whole);
    // One in clear is none of a namespace that has a key, whoever put it there.
    let image = nodes.make(2, MIB);
    nodes.push(&bucket, &image).unwrap();
    let tag = bucket.tag_for(&image);
    let refused = nodes.pull_with(&bucket, &tag, Some(&key("1")));
    let refused = chain(&refused.unwrap_err());
    assert!(refused.contains("is not encrypted"), "{refused}");
}

/// What a store does to whoever takes an image out of it.
#[test]
fn a_store_that_lies_gives_a_whole_image_or_none() {
    type Rule = fn(&Request) -> Lie;
    fn pack(request: &Request) -> bool {
        request.op == Op::Get && request.key.contains("blobs/")
    }
    // None: it is pulled all the same.
    let table: &[(&str, Rule, Option<&str>)] = &[
        ("the truth", |_| Lie::None, None),
        (
            "the first request for each thing fails",
            |r| match r.first {
                true => Lie::Answer(503, "SlowDown"),
                false => Lie::None,
            },
            None,
        ),
        (
            "a body that breaks off",
            |r| match pack(r) && r.nth == 5 {
                true => Lie::Cut(1000),
                false => Lie::None,
            },
            None,
        ),
        (
            "a body that stalls once",
            |r| match pack(r) && r.nth == 5 {
                true => Lie::Stall(1000),
                false => Lie::None,
            },
            None,
        ),
        (
            "all bodies stall",
            |r| match pack(r) && r.nth > 4 {
                true => Lie::Stall(0),
                false => Lie::None,
            },
            Some("no answer for 1000 ms"),
        ),
        (
            "nothing is answered",
            |_| Lie::Stall(0),
            Some("gave up after 4 attempts"),
        ),
        (
            "it goes away in mid-load",
            |r| match pack(r) && r.nth == 5 {
                true => Lie::GoAway,
                false => Lie::None,
            },
            Some("gave up after 4 attempts"),
        ),
        (
            "it is out of order",
            |_| Lie::Answer(500, "InternalError"),
            Some("HTTP 500"),
        ),
        (
            "it knows us no more",
            |r| match pack(r) {
                true => Lie::Answer(403, "AccessDenied"),
                false => Lie::None,
            },
            Some("refuses these credentials"),
        ),
        (
            "a blob is gone",
            |r| match pack(r) && r.nth > 4 {
                true => Lie::Answer(404, "NoSuchKey"),
                false => Lie::None,
            },
            Some("is missing"),
        ),
        (
            "a wrong byte in a tag",
            |r| match r.op == Op::Get && r.key.contains("tags/") {
                true => Lie::Flip,
                false => Lie::None,
            },
            Some(""),
        ),
        (
            "a wrong byte in what a tag names",
            |r| match pack(r) && r.nth == 2 {
                true => Lie::Flip,
                false => Lie::None,
            },
            Some("does not have that digest"),
        ),
        (
            "a wrong byte in the manifest",
            |r| match pack(r) && r.nth == 3 {
                true => Lie::Flip,
                false => Lie::None,
            },
            Some("does not have that digest"),
        ),
        (
            "a wrong byte in a pack",
            |r| match pack(r) && r.nth == 9 {
                true => Lie::Flip,
                false => Lie::None,
            },
            Some("does not have that digest"),
        ),
        (
            "another object's bytes",
            |r| match pack(r) && r.nth == 9 {
                true => Lie::Other,
                false => Lie::None,
            },
            Some("does not have that digest"),
        ),
        (
            "answers that do not say which bytes they are",
            |r| match pack(r) && r.nth > 4 {
                true => Lie::NoRange,
                false => Lie::None,
            },
            Some("Content-Range"),
        ),
    ];
    for (what, rule, words) in table {
        let nodes = Nodes::new();
        let image = nodes.make(1, 4 * MIB);
        nodes.push(&nodes.layout(nodes.address), &image).unwrap();
        let proxy = Proxy::start(nodes.address, rule);
        let bucket = nodes.layout(proxy.address);
        let tag = bucket.tag_for(&image);
        match (nodes.pull(&bucket, &tag), words) {
            (Ok(pulled), None) => assert_eq!(pulled.image.generation(), 1, "{what}"),
            (Err(error), Some(words)) => {
                let said = chain(&error);
                assert!(said.contains(words), "{what}: {said}");
                nodes.assert_nothing_pulled(what);
                // The next one comes to a store that tells the truth.
                let sound = nodes.layout(nodes.address);
                nodes.pull(&sound, &tag).unwrap();
            }
            (Ok(_), Some(_)) => panic!("{what}: it was pulled"),
            (Err(error), None) => panic!("{what}: {}", chain(&error)),
        }
    }
    println!("{} stores that lie to whoever pulls", table.len());
}

/// What a store does to whoever puts an image into it: the tag is there when all is, and not before.
#[test]
fn a_store_that_lies_has_a_tag_when_it_has_the_image() {
    type Rule = fn(&Request) -> Lie;
    let table: &[(&str, Rule, Option<&str>)] = &[
        (
            "the first request for each thing fails",
            |r| match r.first {
                true => Lie::Answer(503, "SlowDown"),
                false => Lie::None,
            },
            None,
        ),
        (
            "a part's answer is lost",
            |r| match r.op == Op::Part && r.nth == 2 {
                true => Lie::Cut(0),
                false => Lie::None,
            },
            None,
        ),
        (
            "the answer to the last of an upload is lost",
            |r| match r.op == Op::Post && r.nth == 2 {
                true => Lie::Stall(0),
                false => Lie::None,
            },
            None,
        ),
        (
            "a store that has no conditions",
            |r| match r.op == Op::Put && r.key.ends_with("index.json") && r.nth % 2 == 1 {
                true => Lie::Answer(501, "NotImplemented"),
                false => Lie::None,
            },
            None,
        ),
        (
            "blobs are taken and not kept",
            |r| match r.op == Op::Put && r.key.contains("blobs/") {
                true => Lie::Swallow,
                false => Lie::None,
            },
            Some("the store has nothing"),
        ),
        (
            "an upload is taken and not kept",
            |r| match r.op == Op::Post && r.nth == 2 {
                true => Lie::Swallow,
                false => Lie::None,
            },
            Some(""),
        ),
        (
            "it goes away in the midst of an upload",
            |r| match r.op == Op::Part && r.nth == 2 {
                true => Lie::GoAway,
                false => Lie::None,
            },
            Some("gave up after 4 attempts"),
        ),
        (
            "we may not write",
            |r| match r.op == Op::Put {
                true => Lie::Answer(403, "AccessDenied"),
                false => Lie::None,
            },
            Some("refuses these credentials"),
        ),
        (
            "nothing is answered",
            |_| Lie::Stall(0),
            Some("gave up after 4 attempts"),
        ),
    ];
    for (what, rule, words) in table {
        let nodes = Nodes::new();
        let image = nodes.make(1, 12 * MIB);
        let proxy = Proxy::start(nodes.address, rule);
        let lying = nodes.layout(proxy.address);
        let sound = nodes.layout(nodes.address);
        match (nodes.push(&lying, &image), words) {
            (Ok(_), None) => {
                drop(nodes.pull(&sound, "team-a/warm").unwrap());
            }
            (Err(error), Some(words)) => {
                let said = chain(&error);
                assert!(said.contains(words), "{what}: {said}");
                assert_eq!(nodes.keys("tags/"), Vec::<String>::new(), "{what}");
                assert!(!sound.holds(&image).unwrap(), "{what}");
                nodes.push(&sound, &image).unwrap();
                drop(nodes.pull(&sound, "team-a/warm").unwrap());
            }
            (Ok(_), Some(_)) => panic!("{what}: it was pushed"),
            (Err(error), None) => panic!("{what}: {}", chain(&error)),
        }
        assert!(sound.holds(&image).unwrap(), "{what}");
        assert!(
            proxy.count(Op::Put) <= 60,
            "{what}: it is not asked for ever"
        );
    }
    println!("{} stores that lie to whoever pushes", table.len());
}

/// Who writes into the bucket is not who is asked for.
#[test]
fn a_hostile_bucket_is_refused() {
    type Harm = fn(&Nodes, &str);
    let table: &[(&str, Harm, &str)] = &[
        (
            "a tag that is no JSON",
            |n, tag| fs::write(n.there().join("tags").join(tag), "[").unwrap(),
            "cannot be understood",
        ),
        (
            "a tag that is too large",
            |n, tag| fs::write(n.there().join("tags").join(tag), vec![b' '; MIB]).unwrap(),
            "more than the 65536 bytes",
        ),
        (
            "a tag that climbs",
            |n, tag| edit(n, tag, "sha256:", "sha256:../../"),
            "is no digest",
        ),
        (
            "a tag of something else",
            |n, tag| edit(n, tag, "image.manifest", "image.index"),
            "media type",
        ),
        (
            "a tag that claims all there is",
            |n, tag| edit(n, tag, "\"size\":", "\"size\":9"),
            "Content-Range",
        ),
    ];
    for (what, harm, words) in table {
        let nodes = Nodes::new();
        let image = nodes.make(1, MIB);
        let bucket = nodes.layout(nodes.address);
        nodes.push(&bucket, &image).unwrap();
        let tag = bucket.tag_for(&image);
        harm(&nodes, &tag);
        let refused = chain(&nodes.pull(&bucket, &tag).unwrap_err());
        assert!(refused.contains(words), "{what}: {refused}");
        nodes.assert_nothing_pulled(what);
    }
}

fn edit(nodes: &Nodes, tag: &str, from: &str, to: &str) {
    let path = nodes.there().join("tags").join(tag);
    let text = fs::read_to_string(&path).unwrap();
    assert!(text.contains(from), "{text}");
    fs::write(path, text.replacen(from, to, 1)).unwrap();
}
