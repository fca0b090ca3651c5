//! `rekindle image` and the agent with a registry.

use std::fs;

use rekindle_checkpoint::manifest::UPPER_FILE;
use serde_json::Value;

use crate::{
    nodes::{MIB, Nodes, bytes},
    proxy::{Lie, Op, Proxy},
};

fn tier(at: impl std::fmt::Display, namespace: &str) -> String {
    format!(
        "[[images.tier]]\nurl = \"docker://{at}/team/images\"\nnamespaces = [{namespace:?}]\nanonymous = true\n"
    )
}

#[test]
fn an_image_is_pushed_listed_pulled_and_fetched() {
    let nodes = Nodes::new();
    let image = nodes.make(None, 1, 2 * MIB);
    let config = tier(nodes.address, "team-a");
    let place = format!("docker://{}/team/images", nodes.address);
    let said = nodes.says("from", &config, &["image", "ls", &place]);
    assert_eq!(said, format!("no images in {place}\n"));
    let said = nodes.says(
        "from",
        &config,
        &["image", "push", "team-a/warm", &place, "--json"],
    );
    let said: Value = serde_json::from_str(&said).unwrap();
    assert_eq!(said["url"], place);
    let tag = said["tag"].as_str().unwrap();
    assert!(tag.starts_with("team-a.warm."), "{tag}");
    let digest = said["digest"].as_str().unwrap();
    let said = nodes.says(
        "from",
        &config,
        &["image", "push", "team-a/warm", &format!("{place}:mine")],
    );
    assert!(
        said.contains("as mine: 2.0") && said.contains("of which 2.0"),
        "{said}"
    );

    let said = nodes.says("to", &config, &["image", "ls", &place, "--json"]);
    let rows: Value = serde_json::from_str(&said).unwrap();
    assert_eq!(rows[0]["tag"], "mine");
    assert_eq!(rows[1]["tag"], tag);
    assert_eq!(rows[1]["namespace"], "team-a");
    assert_eq!(rows[1]["created"], image.manifest().created);
    let said = nodes.says("to", &config, &["image", "ls", &place, "-n", "team-a"]);
    assert!(said.starts_with(tag) && said.lines().count() == 1, "{said}");

    for (behind, generation) in [
        (":team-a/warm".to_owned(), 1),
        (":mine".to_owned(), 2),
        (format!("@{digest}"), 3),
    ] {
        let said = nodes.says(
            "to",
            &config,
            &["image", "pull", &format!("{place}{behind}")],
        );
        assert!(
            said.starts_with(&format!("pulled team-a/warm@{generation}: ")),
            "{said}"
        );
        assert!(said.ends_with("; verified\n"), "{said}");
    }
    nodes.says("to", &config, &["image", "rm", "team-a/warm"]);
    let said = nodes.says("to", &config, &["image", "fetch", "team-a/warm"]);
    assert!(
        said.starts_with("team-a/warm@4 (2.0") && said.ends_with(" fetched\n"),
        "{said}"
    );
    nodes.says("to", &config, &["image", "verify"]);
}

#[test]
fn a_fetch_from_a_registry_that_gives_no_parts_is_whole_at_once() {
    let nodes = Nodes::new();
    nodes
        .push(&nodes.layout(nodes.address), &nodes.make(None, 1, 2 * MIB))
        .unwrap();
    let proxy = Proxy::start(nodes.address, |r| match r.op {
        Op::Get => Lie::NoRange,
        _ => Lie::None,
    });
    let config = tier(proxy.at(), "team-a");
    let said = nodes.says("to", &config, &["image", "fetch", "team-a/warm", "--json"]);
    let lines: Vec<Value> = said
        .lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect();
    assert_eq!(lines.last().unwrap()["event"], "ready");
    assert!(lines.iter().any(|line| line["event"] == "begun"), "{said}");
    nodes.says("to", &config, &["image", "verify", "team-a/warm"]);
}

#[test]
fn a_registry_is_for_those_whom_the_configuration_names() {
    let nodes = Nodes::new();
    nodes.make(None, 1, MIB);
    let other = ("team-b".parse().unwrap(), "warm".parse().unwrap());
    let image = nodes.make_of(None, other, &[(UPPER_FILE.to_owned(), bytes(2, 100))]);
    // Somebody who may has put it there.
    let there = nodes.layout(nodes.address);
    nodes.push(&there, &image).unwrap();
    let tag = there.tag_for(&image);
    let config = tier(nodes.address, "team-a");
    let place = format!("docker://{}/team/images", nodes.address);
    let below = format!("docker://{}/team", nodes.address);
    let of_b = format!("{place}:{tag}");
    for args in [
        &["image", "push", "team-b/warm", &place][..],
        &["image", "push", "team-a/warm", &below],
        &["image", "push", "team-a/warm", &format!("{place}-b")],
        &[
            "image",
            "push",
            "team-a/warm",
            "docker://127.0.0.1:1/team/images",
        ],
        &["image", "pull", &of_b],
        &["image", "pull", "-n", "team-b", &place],
        &["image", "pull", &format!("{place}:team-b/warm")],
        &["image", "ls", &below],
        &["image", "ls", "-n", "team-b", &place],
    ] {
        let output = nodes.rekindle("from", &config, args);
        let said = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(3), "{args:?}: {output:?}");
        assert!(
            said.contains("no tier of images") && said.contains("[[images.tier]]"),
            "{said}"
        );
    }
    // What is another's is not listed.
    let said = nodes.says("from", &config, &["image", "ls", &place]);
    assert_eq!(said, format!("no images in {place}\n"));
    let missing = nodes.rekindle(
        "from",
        &config,
        &["image", "pull", &format!("{place}:never")],
    );
    assert_eq!(missing.status.code(), Some(4), "{missing:?}");
    let path = nodes.rekindle(
        "from",
        &config,
        &[
            "image",
            "push",
            "team-a/warm",
            &format!("{place}:team-a/warm"),
        ],
    );
    assert_eq!(path.status.code(), Some(1), "{path:?}");
    assert!(String::from_utf8_lossy(&path.stderr).contains("is no tag of a registry"));
}

/// A registry is a tier as a bucket is: what the node removes is there, whole.
#[test]
fn the_agent_has_images_in_the_registry_before_they_go() {
    let nodes = Nodes::new();
    for seed in 1..=3 {
        nodes.make(None, seed, MIB);
    }
    let config = format!(
        "[images.retention]\nkeep = 1\nquota = \"1TiB\"\n{}",
        tier(nodes.address, "team-a")
    );
    nodes.says("from", &config, &["agent", "--once"]);
    assert_eq!(nodes.tags().len(), 3);
    let left = fs::read_dir(nodes.folder.path().join("from/team-a/warm")).unwrap();
    let left: Vec<_> = left
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    let generations = left
        .iter()
        .filter(|name| name.parse::<u64>().is_ok())
        .count();
    assert_eq!(generations, 1, "{left:?}");
    let registry = nodes.layout(nodes.address);
    for tag in nodes.tags() {
        nodes.pull(&registry, &tag, None).unwrap();
    }
}
