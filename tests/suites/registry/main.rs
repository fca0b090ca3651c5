//! Images in a registry: Debian's `docker-registry`, what stands in front of it and lies, and what a registry may ask of
//! its clients. Neither containerd nor root.
#![allow(
    clippy::unwrap_used,
    reason = "helpers of tests, which clippy does not know for tests"
)]

use std::{fs, process::Command};

use rekindle_checkpoint::{
    Key,
    layout::{Layout, LayoutError, Proof},
    touches::Touch,
};

use nodes::{MIB, Nodes, bytes, chain, names};
use proxy::{Lie, Op, Proxy};

mod access;
mod commands;
mod http;
mod lies;
mod nodes;
mod proxy;

#[test]
fn an_image_travels_and_has_one_tag() {
    let nodes = Nodes::new();
    let registry = nodes.layout(nodes.address);
    // Of several chunks.
    let first = nodes.make(None, 1, 5 * MIB);
    assert!(!registry.holds(&first).unwrap());
    let pushed = nodes.push(&registry, &first).unwrap();
    assert_eq!(pushed.bytes, pushed.written);
    assert!(registry.holds(&first).unwrap());
    assert_eq!(nodes.push(&registry, &first).unwrap().written, 0);
    let second = nodes.make(None, 2, 5 * MIB);
    nodes.push(&registry, &second).unwrap();
    assert_eq!(nodes.tags().len(), 2);

    let (namespace, name) = names();
    let newest = registry.newest(&namespace, &name).unwrap().unwrap();
    let pulled = nodes.pull(&registry, "team-a/warm", None).unwrap();
    assert_eq!(pulled.proof, Proof::Whole);
    let tag = registry.tag_for(&pulled.image);
    assert_eq!(tag, newest, "the same image has the same tag on each node");
    assert!(registry.holds(&pulled.image).unwrap());
    // By its digest, which the registry has told nobody.
    nodes
        .pull(&registry, &pushed.digest.to_string(), None)
        .unwrap();
    let refused = nodes.pull(&registry, "latest", None).unwrap_err();
    assert!(matches!(refused, LayoutError::NoTag { .. }), "{refused}");
    assert!(refused.to_string().contains(&tag), "{refused}");
    let other = nodes.layout_with(&Default::default(), &nodes.address.to_string());
    assert_eq!(other.listed().unwrap().len(), 2);
}

/// As an artifact of its own, which is no image to anybody.
#[test]
fn what_restores_have_asked_for_first_travels() {
    let nodes = Nodes::new();
    let registry = nodes.layout(nodes.address);
    let touches = [(3, 0x7000_0000_0000), (1, 0x10_0000)].map(|(pid, at)| Touch::at(pid, at));
    let image = nodes.make(None, 1, MIB);
    image.note_touches(&touches).unwrap();
    nodes.push(&registry, &image).unwrap();
    assert_eq!(nodes.tags().len(), 2);
    assert_eq!(registry.listed().unwrap().len(), 1);
    let (namespace, name) = names();
    let newest = registry.newest(&namespace, &name).unwrap().unwrap();
    assert_eq!(newest, registry.tag_for(&image));
    let pulled = nodes.pull(&registry, "team-a/warm", None).unwrap();
    assert_eq!(pulled.image.touches().unwrap(), touches);
    let noted = &touches[1..];
    registry.put_note(&image, noted).unwrap();
    let pulled = nodes.pull(&registry, &newest, None).unwrap();
    assert_eq!(pulled.image.touches().unwrap(), noted);
}

#[test]
fn what_generations_share_is_stored_once() {
    let nodes = Nodes::new();
    let registry = nodes.layout(nodes.address);
    let first = nodes.make(None, 1, 3 * MIB);
    nodes.push(&registry, &first).unwrap();
    let second = nodes.make(None, 1, 3 * MIB);
    let pushed = nodes.push(&registry, &second).unwrap();
    let (written, all) = (pushed.written, pushed.bytes);
    assert!(
        written < all / 10,
        "{written} of {all} bytes were written again"
    );
}

#[test]
fn an_encrypted_image_is_nothing_to_the_registry() {
    let key = |digit: &str| Key::parse("k", digit.repeat(64).as_bytes()).unwrap();
    let nodes = Nodes::new();
    let registry = nodes.layout(nodes.address);
    let image = nodes.make(Some(&key("1")), 1, 3 * MIB);
    nodes.push(&registry, &image).unwrap();
    let plain = bytes(1, 3 * MIB);
    let blobs = nodes
        .folder
        .path()
        .join("registry/docker/registry/v2/blobs/sha256");
    let mut looked = 0;
    for entry in fs::read_dir(blobs).unwrap() {
        for blob in fs::read_dir(entry.unwrap().path()).unwrap() {
            let stored = fs::read(blob.unwrap().path().join("data")).unwrap();
            looked += stored.len();
            let clear = stored
                .windows(32)
                .any(|piece| piece == &plain[MIB..MIB + 32]);
            assert!(!clear, "the container's bytes are there in clear");
        }
    }
    assert!(looked > 3 * MIB);
    let refused = nodes
        .pull(&registry, "team-a/warm", Some(&key("2")))
        .unwrap_err();
    assert!(
        chain(&refused).contains("another one"),
        "{}",
        chain(&refused)
    );
    nodes.assert_nothing_pulled("another key");
    let pulled = nodes
        .pull(&registry, "team-a/warm", Some(&key("1")))
        .unwrap();
    assert_eq!(pulled.proof, Proof::Whole);
}

#[test]
fn a_restore_can_begin_before_the_pages_are_here() {
    let nodes = Nodes::new();
    let registry = nodes.layout(nodes.address);
    nodes
        .push(&registry, &nodes.make_pages(1, 12 * MIB))
        .unwrap();
    nodes.begin_and_complete(&registry).unwrap();
    let (namespace, name) = names();
    let image = nodes.to.resolve(&namespace, &name, None).unwrap();
    assert!(image.origin().unwrap().is_none());
    let into = nodes.folder.path().join("into");
    let verified = image.verify(&into, None).unwrap();
    verified.verify_chunks(&Default::default()).unwrap();
}

#[test]
fn a_registry_that_gives_no_parts_gives_whole_blobs() {
    let nodes = Nodes::new();
    let image = nodes.make(None, 1, 5 * MIB);
    nodes.push(&nodes.layout(nodes.address), &image).unwrap();
    // And breaks off in the midst of one.
    let proxy = Proxy::start(nodes.address, |r| match (r.op, r.message.header("range")) {
        (Op::Get, None) if r.nth % 5 == 0 => Lie::Cut(MIB / 2),
        (Op::Get, _) => Lie::NoRange,
        _ => Lie::None,
    });
    let registry = nodes.layout(proxy.at());
    let (namespace, name) = names();
    let found = registry.find_image(&namespace, &name).unwrap();
    assert!(!found.comes_in_parts().unwrap());
    let pulled = nodes.pull(&registry, "team-a/warm", None).unwrap();
    assert_eq!(pulled.proof, Proof::Whole);
}

/// What knows registries and layouts and not us.
#[test]
fn other_tools_read_what_was_pushed_and_push_what_is_read() {
    let nodes = Nodes::new();
    let registry = nodes.layout(nodes.address);
    let image = nodes.make(None, 1, 2 * MIB);
    nodes.push(&registry, &image).unwrap();
    let folder = nodes.folder.path().join("layout");
    let tag = registry.tag_for(&image);
    let there = |tag: &str| format!("docker://{}/team/images:{tag}", nodes.address);
    let here = format!("oci:{}:x", folder.display());
    skopeo(&["copy", "--src-tls-verify=false", &there(&tag), &here]);
    nodes
        .pull(&Layout::open(&folder).unwrap(), "x", None)
        .unwrap();
    skopeo(&["copy", "--dest-tls-verify=false", &here, &there("again")]);
    let pulled = nodes.pull(&registry, "again", None).unwrap();
    assert_eq!(registry.tag_for(&pulled.image), tag);
}

fn skopeo(args: &[&str]) {
    let mut command = Command::new("skopeo");
    command.args(["--insecure-policy"]).args(args);
    let output = command
        .output()
        .expect("the Debian package skopeo is installed by `make deps`");
    assert!(output.status.success(), "{args:?}: {output:?}");
}
