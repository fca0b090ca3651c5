//! `rekindle image` where images lie in memory too.

use std::{fs, path::Path, time::Duration};

use rekindle_checkpoint::image::Copied;
use tempfile::TempDir;

use super::node::{Node, bytes};

/// A node with `quota` in memory, which is a folder in `/dev/shm`.
fn node(quota: &str) -> (Node, TempDir) {
    let memory = tempfile::tempdir_in("/dev/shm").unwrap();
    let node = Node::with(&format!(
        "[images.retention]\nquota = \"1TiB\"\n[images.memory]\nroot = {:?}\nquota = {quota:?}\n",
        memory.path()
    ));
    (node, memory)
}

/// Makes an image of a megabyte and more, and copies it to the disk.
fn settled(node: &Node, image: &str, seed: u32) {
    node.make(image, &bytes(seed, 1 << 20));
    let (namespace, name) = image.split_once('/').unwrap();
    let (namespace, name) = (namespace.parse().unwrap(), name.parse().unwrap());
    let sealed = node.store().resolve(&namespace, &name, None).unwrap();
    let into = node.folder.path().join("laid-out");
    let copied = sealed.settle(Some((None, &into))).unwrap();
    assert!(matches!(copied, Copied::Written(_)), "{copied:?}");
}

fn flip(folder: &Path) {
    let mut packs = fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().path());
    let pack = packs.find(|path| path.to_str().unwrap().contains("/pack-"));
    let pack = pack.unwrap();
    let mut bytes = fs::read(&pack).unwrap();
    bytes[1000] ^= 1;
    fs::write(pack, bytes).unwrap();
}

#[test]
fn it_is_told_where_an_image_lies() {
    let (node, memory) = node("1GiB");
    node.make("team-a/warm", &bytes(1, 1 << 20));
    let place = || node.json(&["ls", "--json"])[0]["place"].clone();
    assert_eq!(place(), "memory");
    settled(&node, "team-a/other", 2);
    assert!(node.says(&["ls"]).contains("  memory+disk  "));
    assert!(node.says(&["show", "team-a/other"]).contains("memory+disk"));
    assert_eq!(
        node.json(&["show", "--json", "team-a/warm"])["place"],
        "memory"
    );
    node.says(&["rm", "team-a/other"]);
    assert!(!memory.path().join("team-a/other/1").exists());
    assert!(!node.root().join("team-a/other/1").exists());
}

#[test]
fn each_copy_is_verified_by_itself() {
    let (node, memory) = node("1GiB");
    settled(&node, "team-a/warm", 1);
    assert!(node.says(&["verify"]).contains("sound"));
    flip(&memory.path().join("team-a/warm/1"));
    let verified = node.image(&["verify"]);
    let said = String::from_utf8_lossy(&verified.stdout);
    assert_eq!(verified.status.code(), Some(1), "{verified:?}");
    assert!(said.contains("unsound: its copy in memory"), "{said}");
    // What needs the image has it.
    assert!(node.image(&["show", "team-a/warm"]).status.success());
}

#[test]
fn room_is_made_in_memory_by_its_own_quota() {
    let (node, memory) = node("8MiB");
    for (place, name) in ["one", "two", "three"].into_iter().enumerate() {
        let image = format!("team-a/{name}");
        settled(&node, &image, place as u32 + 1);
        node.used(&image, 1, Duration::from_secs(60 * (3 - place as u64)));
    }
    let there = |name: &str| memory.path().join("team-a").join(name).join("1").exists();
    assert!(there("one") && there("two") && there("three"));
    node.used("team-a/two", 1, Duration::from_secs(7200));
    let text = fs::read_to_string(node.config()).unwrap();
    fs::write(node.config(), text.replace("8MiB", "2MiB")).unwrap();
    let planned = node.json(&["gc", "--dry-run", "--json"]);
    let said = node.json(&["gc", "--json"]);
    assert_eq!(planned["memory_freed"], said["memory_freed"]);
    assert_eq!(said["freed"], 0);
    let rows = said["images"].as_array().unwrap();
    let gone: Vec<_> = rows
        .iter()
        .map(|row| {
            (
                row["name"].as_str().unwrap(),
                &row["place"],
                &row["why"]["rule"],
            )
        })
        .collect();
    // The first was idle for too long, and the other one is more than the quota allows.
    let memory = &serde_json::json!("memory");
    let rules = serde_json::json!(["idle", "quota"]);
    assert_eq!(
        gone,
        [("two", memory, &rules[0]), ("one", memory, &rules[1])]
    );
    assert!(!there("one") && !there("two") && there("three"));
    assert_eq!(node.images().len(), 3);
    assert!(node.says(&["verify"]).matches("sound").count() == 3);
}
