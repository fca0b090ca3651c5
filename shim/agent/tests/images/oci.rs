//! `rekindle image push` and `pull`.

use std::{
    fs,
    process::{Command, Stdio},
    time::Duration,
};

use rekindle_checkpoint::{Key, manifest::UPPER_FILE};

use super::node::{Node, bytes, minimal};

const HEX: &str = "00112233445566778899aabbccddeeff00112233445566778899aabbccddeeff";

/// A node with one image, `team-a/warm@1`, and where its layout is.
fn pushed() -> (Node, String) {
    let node = Node::with("");
    node.make("team-a/warm", &bytes(1, 1 << 20));
    let place = format!("oci:{}", node.folder.path().join("layout").display());
    let said = node.json(&["push", "team-a/warm", &place, "--json"]);
    assert_eq!(said["tag"], "team-a/warm@1");
    assert!(said["digest"].as_str().unwrap().starts_with("sha256:"));
    assert_eq!(said["bytes"], said["written"]);
    (node, place)
}

#[test]
fn an_image_goes_to_another_node() {
    let (from, place) = pushed();
    let to = Node::with("");
    let said = to.json(&["pull", &place, "--json"]);
    assert_eq!(
        (&said["image"], &said["proof"]),
        (&"team-a/warm@1".into(), &"whole".into())
    );
    assert!(to.image(&["verify"]).status.success());
    // A next generation, of which most is there on both sides.
    let upper = [bytes(1, 1 << 20), bytes(2, 1 << 16)].concat();
    from.make("team-a/warm", &upper);
    let second = format!("{place}:second");
    let said = from.json(&["push", "-n", "team-a", "warm", &second, "--json"]);
    let (all, written) = (
        said["bytes"].as_u64().unwrap(),
        said["written"].as_u64().unwrap(),
    );
    assert!(all > 1 << 20 && written < 1 << 18, "{said}");
    let text = to.says(&["pull", &second]);
    assert!(
        text.starts_with("pulled team-a/warm@2: ") && text.ends_with("; verified\n"),
        "{text}"
    );
    assert!(
        text.contains("of which 1.00 MiB were there already"),
        "{text}"
    );
    // And under another name.
    let text = to.says(&["pull", &second, "other", "-n", "team-b"]);
    assert!(text.starts_with("pulled team-b/other@1: "), "{text}");
    assert_eq!(
        to.images(),
        ["team-a/warm@1", "team-a/warm@2", "team-b/other@1"]
    );
    assert!(to.image(&["verify"]).status.success());
}

#[test]
fn what_cannot_be_is_refused_with_its_code() {
    let (node, place) = pushed();
    let of = |tag: &str| format!("{place}:{tag}");
    node.fails(&["push", "team-a/never", &place], 4, &["team-a/never"]);
    node.fails(&["pull", &of("never")], 4, &["\"never\"", "team-a/warm@1"]);
    node.fails(
        &["pull", &place, "team-a/warm@3"],
        3,
        &["the next generation"],
    );
    node.fails(
        &["pull", &place, "team-a/warm", "-n", "team-b"],
        3,
        &["another namespace"],
    );
    let here = node.folder.path().display().to_string();
    node.fails(
        &["push", "team-a/warm", &format!("oci:{here}")],
        1,
        &["is not empty"],
    );
    node.fails(&["pull", &format!("oci:{here}")], 1, &["has no oci-layout"]);
    node.fails(&["pull", &format!("oci:{here}/nowhere")], 1, &["nowhere"]);
    for args in [
        &["pull", "registry.example/x:1"][..],
        &["pull"],
        &["push", "team-a/warm"],
    ] {
        assert_eq!(node.image(args).status.code(), Some(2), "{args:?}");
    }
    // A damaged one is told by its blob.
    let blobs = node.folder.path().join("layout/blobs/sha256");
    let largest = fs::read_dir(blobs)
        .unwrap()
        .map(|entry| entry.unwrap().path());
    let largest = largest
        .max_by_key(|path| fs::metadata(path).unwrap().len())
        .unwrap();
    let mut pack = fs::read(&largest).unwrap();
    pack[5] ^= 1;
    fs::write(&largest, pack).unwrap();
    let other = Node::with("");
    other.fails(
        &["pull", &place],
        1,
        &["pack-", "does not have that digest"],
    );
    assert!(other.images().is_empty());
}

#[test]
fn an_encrypted_image_travels_without_its_key_and_that_is_said() {
    let key = Key::parse("k", HEX.as_bytes()).unwrap();
    let config = format!(
        "[[images.key]]\nid = \"k\"\nnamespaces = [\"sealed\"]\ncommand = [\"/bin/echo\", \"{HEX}\"]\n"
    );
    let (without, with) = (Node::with(""), Node::with(&config));
    let upper = bytes(1, 1 << 20);
    without.make_with("sealed/warm", Some(key), minimal, &[(UPPER_FILE, &upper)]);
    let place = format!("oci:{}", without.folder.path().join("layout").display());
    without.says(&["push", "sealed/warm", &place]);
    let text = without.says(&["pull", &place]);
    assert!(text.contains("does not have the key \"k\""), "{text}");
    without.fails(
        &["pull", &place, "other/warm"],
        1,
        &["encrypted", "its own"],
    );
    let said = with.json(&["pull", &place, "--json"]);
    assert_eq!(said["proof"], "whole");
    assert!(with.image(&["verify"]).status.success());
}

/// Killed at any moment, there is the whole image or none of it, and the next one removes what is left.
#[test]
fn a_killed_pull_leaves_no_half_image() {
    let (node, place) = pushed();
    node.make("team-a/large", &bytes(7, 32 << 20));
    let large = format!("{place}:large");
    node.says(&["push", "team-a/large", &large]);
    let (mut killed, mut finished) = (0, 0);
    for wait in (0..200).step_by(15) {
        let to = Node::with("[images.retention]\nquota = \"1TiB\"\n");
        let mut child = Command::new(env!("CARGO_BIN_EXE_rekindle"))
            .args([
                "--config",
                to.config().to_str().unwrap(),
                "image",
                "pull",
                &large,
            ])
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        std::thread::park_timeout(Duration::from_millis(wait));
        child.kill().unwrap();
        child.wait().unwrap();
        match to.images()[..] {
            [] => killed += 1,
            _ => finished += 1,
        }
        assert!(to.image(&["verify"]).status.success());
        to.says(&["gc"]);
        let left = fs::read_dir(to.root().join(".partial")).unwrap();
        assert_eq!(left.count(), 0, "after {wait} ms");
    }
    assert!(killed > 0);
    println!("of 14 pulls {killed} were killed, and {finished} had ended");
}

#[test]
fn what_is_here_is_not_fetched_and_what_cannot_be_is_said() {
    let node = Node::with(
        "[[images.tier]]\nurl = \"s3://images/a/\"\nnamespaces = [\"team-a\"]\n\
         endpoint = \"http://127.0.0.1:1\"\nanonymous = true\n",
    );
    node.make("team-a/warm", b"one");
    let said = node.json(&["fetch", "team-a/warm", "--json"]);
    assert_eq!(
        (&said["event"], &said["hit"]),
        (&"ready".into(), &true.into())
    );
    assert_eq!(said["image"], "team-a/warm@1");
    node.fails(
        &["fetch", "team-b/warm"],
        4,
        &["team-b/warm", "[[images.tier]]"],
    );
    node.fails(&["fetch", "team-a/warm@1"], 3, &["a node's own"]);
    node.fails(
        &["fetch", "team-a/x", "-n", "team-b"],
        3,
        &["--namespace is team-b"],
    );
    let output = node.image(&["fetch", "-n", "team-a", "cold", "--json"]);
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    let text = String::from_utf8(output.stdout).unwrap();
    let last: serde_json::Value = serde_json::from_str(text.lines().last().unwrap()).unwrap();
    assert_eq!(last["event"], "failed");
    assert!(
        last["reason"].as_str().unwrap().contains("gave up after 4"),
        "{last}"
    );
    let left = fs::read_dir(node.root().join(".partial")).unwrap();
    assert_eq!(left.count(), 0);
}

#[test]
fn a_bucket_is_for_those_whom_the_configuration_names() {
    // Nobody listens there: what is refused is refused before it is asked.
    let node = Node::with(
        "[[images.tier]]\nurl = \"s3://images/a/\"\nnamespaces = [\"team-a\"]\n\
         endpoint = \"http://127.0.0.1:1\"\nanonymous = true\n",
    );
    node.make("team-a/warm", b"one");
    node.make("team-b/warm", b"two");
    let refused = ["no tier of images", "[[images.tier]]"];
    for args in [
        &["push", "team-b/warm", "s3://images/a/"][..],
        &["push", "team-a/warm", "s3://images/"],
        &["push", "team-a/warm", "s3://images/b/"],
        &["push", "team-a/warm", "s3://other/a/"],
        &["pull", "s3://images/a/:team-b/warm"],
        &["pull", "s3://images/a/:team-a/warm", "team-b/warm"],
        &["pull", "-n", "team-b", "s3://images/a/"],
        &["pull", "s3://other/"],
        &["ls", "s3://other/"],
        &["ls", "-n", "team-b", "s3://images/a/"],
    ] {
        node.fails(args, 3, &refused);
    }
}
