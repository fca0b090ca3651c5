//! Images that a restore begins with before all of them is here.

use std::{fs, os::unix::fs::MetadataExt as _, sync::Arc};

use rekindle_checkpoint::{
    Key, SealedImage,
    manifest::{ORIGIN_FILE, UPPER_FILE},
    touches::Touch,
};

use crate::{
    nodes::{MIB, Nodes, bytes, chain, names},
    proxy::{Lie, Op, Proxy, Request},
};

type Rule = fn(&Request) -> Lie;

/// Of a pack, and not of what lies beside it.
fn pack(request: &Request) -> bool {
    request.op == Op::Get && request.key.contains("blobs/")
}

/// The image as whoever comes next finds it.
fn found(nodes: &Nodes) -> SealedImage {
    let (namespace, name) = names();
    nodes.to.resolve(&namespace, &name, None).unwrap()
}

/// Compares all of it with what was made from `seed`.
fn assert_whole(nodes: &Nodes, key: Option<&Key>, seed: u32, length: usize) {
    let image = found(nodes);
    assert_eq!(image.origin().unwrap(), None);
    let chunks = Arc::new(image.chunks(key).unwrap());
    for (name, wanted) in [
        ("criu/pages-1.img", bytes(seed, length)),
        (UPPER_FILE, bytes(seed + 1, MIB)),
    ] {
        let mut read = vec![0; wanted.len()];
        chunks.read_at(name, 0, &mut read).unwrap();
        assert!(read == wanted, "{name} is another one");
    }
}

#[test]
fn a_restore_can_begin_before_the_pages_are_here_and_they_come() {
    let key = Key::parse("k", "1".repeat(64).as_bytes()).unwrap();
    for key in [None, Some(&key)] {
        let nodes = Nodes::new();
        let bucket = nodes.layout(nodes.address);
        let image = nodes.make_pages(key, 1, 24 * MIB);
        nodes.push(&bucket, &image).unwrap();
        let begun = nodes.begin(&bucket, key).unwrap();
        assert_eq!(begun.origin().unwrap().unwrap().tier, "s3://images/all/");
        let packs = fs::read_dir(nodes.folder.path().join("to/team-a/warm/1")).unwrap();
        let dense = packs.map(|entry| entry.unwrap().metadata().unwrap());
        // There is room for it, whatever else is written meanwhile.
        assert!(dense.map(|found| found.blocks() * 512).sum::<u64>() >= 25 * MIB as u64);

        // Whoever needs all of it is told so.
        let refused = chain(&found(&nodes).chunks(key).unwrap_err());
        assert!(refused.contains("is not all on this node yet"), "{refused}");
        assert!(
            refused.contains("rekindle image fetch team-a/warm"),
            "{refused}"
        );
        let elsewhere = nodes.push(&bucket, &begun).unwrap_err();
        assert!(chain(&elsewhere).contains("is not all on this node yet"));
        // A restore has what it reads before its processes run, and no store is asked for that.
        let into = nodes.folder.path().join("restore");
        let verified = found(&nodes).verify_begun(&into, key).unwrap();
        verified.upper().unwrap().read_through().unwrap();
        drop(verified);
        nodes.complete(&bucket, key, &begun).unwrap();
        assert_whole(&nodes, key, 1, 24 * MIB);
        let again = nodes.push(&bucket, &found(&nodes)).unwrap();
        assert_eq!(again.written, 0, "it is what it was");
    }
}

/// Wherever a fetch is killed, or its store goes away, the next one fetches the rest.
#[test]
fn what_has_come_stays() {
    let nodes = Nodes::new();
    let sound = nodes.layout(nodes.address);
    let image = nodes.make_pages(None, 1, 40 * MIB);
    nodes.push(&sound, &image).unwrap();
    let counting = Proxy::start(nodes.address, |_| Lie::None);
    let begun = nodes.begin(&nodes.layout(counting.address), None).unwrap();
    let mut gone = 0;
    while begun.origin().unwrap().is_some() {
        let proxy = Proxy::start(nodes.address, |r| match pack(r) && r.nth >= 4 {
            true => Lie::GoAway,
            false => Lie::None,
        });
        gone += usize::from(
            nodes
                .complete(&nodes.layout(proxy.address), None, &begun)
                .is_err(),
        );
        assert!(gone < 20, "nothing of it stays");
    }
    assert!(gone > 0, "it never went away");
    assert_whole(&nodes, None, 1, 40 * MIB);
    println!("completed after {gone} stores that went away");
}

/// What a store does once it has begun: the image comes whole, or not, with one sentence; and a store that tells the
/// truth completes it.
#[test]
fn a_store_that_lies_completes_it_or_not() {
    // None: it is completed all the same.
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
            "bodies that break off",
            |r| match pack(r) && r.nth % 4 == 1 {
                true => Lie::Cut(100_000),
                false => Lie::None,
            },
            None,
        ),
        (
            "a body that stalls",
            |r| match pack(r) && r.nth == 2 {
                true => Lie::Stall(1000),
                false => Lie::None,
            },
            None,
        ),
        (
            "wrong bytes, but not when it is asked again",
            |r| match pack(r) && r.nth <= 2 {
                true => Lie::Flip,
                false => Lie::None,
            },
            None,
        ),
        (
            "wrong bytes each time",
            |r| match pack(r) {
                true => Lie::Flip,
                false => Lie::None,
            },
            Some("s3://images/all/ gives something else"),
        ),
        (
            "another object's bytes",
            |r| match pack(r) {
                true => Lie::Other,
                false => Lie::None,
            },
            Some("s3://images/all/ gives something else"),
        ),
        (
            "answers that do not say which bytes they are",
            |r| match pack(r) {
                true => Lie::NoRange,
                false => Lie::None,
            },
            Some("Content-Range"),
        ),
        (
            "the blob is gone",
            |r| match pack(r) {
                true => Lie::Answer(404, "NoSuchKey"),
                false => Lie::None,
            },
            Some("not found"),
        ),
        (
            "it knows us no more",
            |_| Lie::Answer(403, "AccessDenied"),
            Some("refuses these credentials"),
        ),
        (
            "nothing is answered",
            |_| Lie::Stall(0),
            Some("gave up after 4 attempts"),
        ),
        (
            "it goes away",
            |_| Lie::GoAway,
            Some("gave up after 4 attempts"),
        ),
    ];
    for (what, rule, words) in table {
        let nodes = Nodes::new();
        let sound = nodes.layout(nodes.address);
        let image = nodes.make_pages(None, 1, 12 * MIB);
        nodes.push(&sound, &image).unwrap();
        let begun = nodes.begin(&sound, None).unwrap();
        let proxy = Proxy::start(nodes.address, rule);
        let completed = nodes.complete(&nodes.layout(proxy.address), None, &begun);
        match (completed, words) {
            (Ok(()), None) => {}
            (Err(error), Some(words)) => {
                let said = chain(&error);
                assert!(said.contains(words), "{what}: {said}");
                assert!(
                    begun.origin().unwrap().is_some(),
                    "{what}: it passes for whole"
                );
                nodes.complete(&sound, None, &begun).unwrap();
            }
            (Ok(()), Some(_)) => panic!("{what}: it was completed"),
            (Err(error), None) => panic!("{what}: {}", chain(&error)),
        }
        assert_whole(&nodes, None, 1, 12 * MIB);
        assert!(proxy.count(Op::Get) < 100, "{what}: it is asked for ever");
    }
    println!("{} stores that lie once it has begun", table.len());
}

/// Until it has begun, nothing is left of a try, whichever request fails.
#[test]
fn what_does_not_begin_leaves_nothing() {
    let mut tried = 0;
    loop {
        let nodes = Nodes::new();
        let sound = nodes.layout(nodes.address);
        let image = nodes.make_pages(None, 1, 12 * MIB);
        nodes.push(&sound, &image).unwrap();
        let last = tried;
        let proxy = Proxy::start(nodes.address, move |r| {
            match r.op == Op::Get && r.nth > last {
                true => Lie::GoAway,
                false => Lie::None,
            }
        });
        match nodes.begin(&nodes.layout(proxy.address), None) {
            Ok(_) => break,
            Err(_) => nodes.assert_nothing_pulled(&format!("it went away after {last} requests")),
        }
        tried += 1;
        assert!(tried < 50, "it never begins");
    }
    assert!(tried > 5, "it begins with nothing");
    println!("{tried} requests until it begins, and a failure at each");
}

#[test]
fn another_key_is_told_before_anything_is_published() {
    let key = |digit: &str| Key::parse("k", digit.repeat(64).as_bytes()).unwrap();
    let nodes = Nodes::new();
    let bucket = nodes.layout(nodes.address);
    let image = nodes.make_pages(Some(&key("1")), 1, 4 * MIB);
    nodes.push(&bucket, &image).unwrap();
    for wrong in [Some(key("2")), None] {
        assert!(nodes.begin(&bucket, wrong.as_ref()).is_err());
        nodes.assert_nothing_pulled("another key");
    }
    let begun = nodes.begin(&bucket, Some(&key("1"))).unwrap();
    // What says where the rest is is no part of the image, and nobody takes it for one.
    let path = nodes
        .folder
        .path()
        .join("to/team-a/warm/1")
        .join(ORIGIN_FILE);
    fs::write(&path, "[").unwrap();
    assert!(chain(&begun.origin().unwrap_err()).contains("origin.json"));
}

/// What a restore on one node has asked for first is known to the first restore on another, from wherever it was told.
#[test]
fn what_restores_have_asked_for_first_travels() {
    let touches = [(3, 0x7000_0000_0000), (1, 0x10_0000)].map(|(pid, at)| Touch::at(pid, at));
    let nodes = Nodes::new();
    let bucket = nodes.layout(nodes.address);
    let again = |why: &str| {
        let (namespace, name) = names();
        let held = nodes.to.list(None).unwrap();
        if !held.is_empty() {
            nodes.to.remove(&namespace, &name, None, false).unwrap();
        }
        let begun = nodes.begin(&bucket, None);
        begun.unwrap_or_else(|error| panic!("{why}: {}", chain(&error)))
    };
    let image = nodes.make_pages(None, 1, 4 * MIB);
    nodes.push(&bucket, &image).unwrap();
    let begun = again("before any restore");
    assert_eq!(begun.touches().unwrap(), []);
    // By a restore whose memory came from there.
    bucket.put_note(&begun, &touches[..1]).unwrap();
    drop(begun);
    assert_eq!(again("noted").touches().unwrap(), touches[..1]);
    // With the image.
    image.note_touches(&touches).unwrap();
    assert_eq!(nodes.push(&bucket, &image).unwrap().written, 0);
    assert_eq!(again("pushed").touches().unwrap(), touches);
    let tag = bucket.tag_for(&image);
    let pulled = nodes.pull(&bucket, &tag).unwrap();
    assert_eq!(pulled.image.touches().unwrap(), touches);
    drop(pulled);

    // It is a hint: what is wrong with it costs nothing else.
    let [key] = nodes.keys("touches/").try_into().unwrap();
    let path = nodes.there().join(&key);
    let sound = fs::read(&path).unwrap();
    let flipped = {
        let mut bytes = sound.clone();
        bytes[50] ^= 1;
        bytes
    };
    for (what, bytes) in [
        ("flipped", flipped),
        ("cut", sound[..60].to_vec()),
        ("empty", Vec::new()),
        ("too large", vec![0; 1 << 20]),
    ] {
        fs::write(&path, bytes).unwrap();
        assert_eq!(again(what).touches().unwrap(), [], "{what}");
    }
    assert!(bucket.remove(&tag).unwrap());
    assert_eq!(nodes.keys("touches/"), Vec::<String>::new());
    // Where its processes have their memory is told of no encrypted image.
    let key = Key::parse("k", "1".repeat(64).as_bytes()).unwrap();
    let encrypted = nodes.make_pages(Some(&key), 2, MIB);
    encrypted.note_touches(&touches).unwrap();
    nodes.push(&bucket, &encrypted).unwrap();
    bucket.put_note(&encrypted, &touches).unwrap();
    assert_eq!(nodes.keys("touches/"), Vec::<String>::new());
}
