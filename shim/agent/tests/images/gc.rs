//! `rekindle image gc`.

use std::{fs, path::Path, time::Duration};

use super::node::{Node, asked, bytes};

const HOUR: Duration = Duration::from_secs(3600);

/// Bytes on the disk below a folder, each file once: what `du` says.
fn du(folder: &Path) -> u64 {
    use std::os::unix::fs::MetadataExt as _;
    fn walk(folder: &Path, seen: &mut std::collections::HashMap<u64, u64>) {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            let found = fs::symlink_metadata(&path).unwrap();
            if found.is_dir() {
                walk(&path, seen);
            } else {
                seen.insert(found.ino(), found.blocks() * 512);
            }
        }
    }
    let mut seen = Default::default();
    walk(folder, &mut seen);
    seen.values().sum()
}

#[test]
fn old_generations_go_and_what_is_freed_is_what_the_disk_gets_back() {
    let node = Node::with("[images.retention]\nkeep = 2\nquota = \"1TiB\"\n");
    for change in 1..=3 {
        // A megabyte that all have, and one that is this one's.
        let upper = [bytes(1, 1 << 20), bytes(change + 1, 1 << 20)].concat();
        node.make("team-a/warm", &upper);
    }
    let before = du(&node.root());
    let planned = node.json(&["gc", "--dry-run", "--json"]);
    assert_eq!((du(&node.root()), node.images().len()), (before, 3));

    let said = node.json(&["gc", "--json"]);
    assert_eq!(node.images(), ["team-a/warm@2", "team-a/warm@3"]);
    let freed = said["freed"].as_u64().unwrap();
    assert_eq!(before - du(&node.root()), freed);
    assert_eq!(planned["freed"], said["freed"]);
    assert_eq!(
        (&planned["dry_run"], &said["dry_run"]),
        (&true.into(), &false.into())
    );
    assert_eq!(
        said["before"].as_u64().unwrap() - freed,
        said["after"].as_u64().unwrap()
    );
    let row = &said["images"][0];
    assert_eq!(
        (&row["generation"], &row["result"]),
        (&1.into(), &"removed".into())
    );
    assert_eq!(row["why"], serde_json::json!({"rule": "keep", "keep": 2}));
    // What is left is whole.
    assert!(node.image(&["verify"]).status.success());
    // What is typed goes before the configuration.
    let text = node.says(&["gc", "--keep", "1"]);
    assert!(
        text.starts_with("removed team-a/warm@2: there is a newer generation; "),
        "{text}"
    );
    assert!(node.says(&["gc"]).starts_with("0 B freed"));
}

#[test]
fn what_is_idle_goes_but_for_the_newest_generation() {
    let node = Node::with("[images.retention]\nquota = \"1TiB\"\n");
    for _ in 0..2 {
        node.make("team-a/warm", b"x");
        node.make("team-a/other", b"x");
    }
    for image in ["team-a/warm", "team-a/other"] {
        node.used(image, 1, 5 * HOUR);
        node.used(image, 2, 5 * HOUR);
    }
    node.used("team-a/other", 1, HOUR);
    let text = node.says(&["gc", "--idle", "2h"]);
    assert!(
        text.contains("removed team-a/warm@1: not used for 5h"),
        "{text}"
    );
    assert_eq!(
        node.images(),
        ["team-a/other@1", "team-a/other@2", "team-a/warm@2"]
    );
}

#[test]
fn a_quota_takes_the_least_recently_used_and_leaves_what_is_leased() {
    let node = Node::with("");
    for (place, image) in ["team-a/one", "team-a/two", "team-b/three"]
        .iter()
        .enumerate()
    {
        node.make(image, &bytes(place as u32, 1 << 20));
        node.used(image, 1, HOUR * (9 - place as u32));
    }
    let store = node.store();
    let names = |namespace: &str, name: &str| (namespace.parse().unwrap(), name.parse().unwrap());
    let (namespace, name) = names("team-a", "one");
    let lease = store.resolve(&namespace, &name, None).unwrap();
    // Of one namespace, only its images are looked at.
    let said = node.json(&["gc", "-n", "team-b", "--quota", "2MiB", "--json"]);
    assert_eq!(
        (&said["images"], &said["quota"]),
        (&serde_json::json!([]), &serde_json::Value::Null)
    );

    let said = node.json(&["gc", "--quota", "2500KiB", "--json"]);
    assert_eq!(said["images"][0]["name"], "two");
    assert_eq!(said["images"][0]["why"]["rule"], "quota");
    assert_eq!(node.images(), ["team-a/one@1", "team-b/three@1"]);
    let text = node.says(&["gc", "--quota", "1B"]);
    assert!(text.contains("more than the quota of 1 B stay"), "{text}");
    assert_eq!(node.images(), ["team-a/one@1"]);
    drop(lease);
    node.says(&["gc", "--quota", "1B"]);
    assert!(node.images().is_empty());
}

#[test]
fn what_killed_checkpoints_left_is_removed_and_one_that_is_made_is_not() {
    let node = Node::with("");
    node.make("team-a/warm", b"x");
    let store = node.store();
    let request = asked(&store, "team-a/warm");
    let dead = node.root().join(".partial/dead");
    fs::create_dir(&dead).unwrap();
    fs::write(dead.join("pack-1"), bytes(1, 1 << 20)).unwrap();
    let text = node.says(&["gc", "--dry-run"]);
    assert!(
        text.contains("would remove 1 folders") && dead.exists(),
        "{text}"
    );
    let said = node.json(&["gc", "--json"]);
    assert_eq!(said["leftovers"]["folders"], 1);
    assert!(said["leftovers"]["freed"].as_u64().unwrap() >= 1 << 20);
    assert!(!dead.exists() && request.dir().exists());
    assert_eq!(node.images(), ["team-a/warm@1"]);
}

#[test]
fn what_is_typed_wrongly_is_refused() {
    let node = Node::with("");
    for args in [
        &["gc", "--keep", "0"][..],
        &["gc", "--quota", "5GB"],
        &["gc", "--idle", "5"],
        &["gc", "-n", "../up"],
        &["gc", "team-a/warm"],
    ] {
        let output = node.image(args);
        assert_eq!(output.status.code(), Some(2), "{args:?}: {output:?}");
    }
    let node = Node::with("[images.retention]\nkeep = 0\n");
    node.fails(&["gc"], 1, &["images.retention.keep", "at least one"]);
}
