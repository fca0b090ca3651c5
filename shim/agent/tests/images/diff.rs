//! `rekindle image diff` and `show`.

use std::{
    fs,
    io::{self, Write},
    path::Path,
};

use rekindle_checkpoint::{
    Key,
    archive::{Sink, open_dir, pack},
    manifest::{SHM_FILE, UPPER_FILE},
};

use super::node::{Node, bytes, minimal};

const PAGE: usize = 4096;
const HEX: &str = "00112233445566778899aabbccddeeff00112233445566778899aabbccddeeff";

struct Tar(Vec<u8>);

impl Write for Tar {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.write(bytes)
    }
    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Sink for Tar {}

/// An archive of these files.
fn archive(files: &[(&str, &str)]) -> Vec<u8> {
    let folder = tempfile::tempdir().unwrap();
    for (name, text) in files {
        fs::write(folder.path().join(name), text).unwrap();
    }
    let dir = open_dir(folder.path()).unwrap();
    pack(&dir, Tar(Vec::new())).unwrap().0.0
}

/// A message of protobuf's with small numbers in its fields.
fn message(fields: &[(u8, u64)]) -> Vec<u8> {
    let mut message = Vec::new();
    for (number, mut value) in fields.iter().copied() {
        message.push(number << 3);
        while value >= 0x80 {
            message.push(value as u8 | 0x80);
            value >>= 7;
        }
        message.push(value as u8);
    }
    message
}

fn criu_image(magic: u32, messages: &[Vec<u8>]) -> Vec<u8> {
    let mut image = [0x5456_4319_u32, magic].map(u32::to_le_bytes).concat();
    for message in messages {
        image.extend((message.len() as u32).to_le_bytes());
        image.extend(message);
    }
    image
}

/// CRIU's files of a process with a heap of so many pages.
fn heap(criu: &Path, pages: u64) {
    minimal(criu);
    let run = message(&[(1, 0x10_0000), (2, pages), (4, 6), (5, pages)]);
    let map = criu_image(0x5608_4025, &[message(&[(1, 1)]), run]);
    fs::write(criu.join("pagemap-1.img"), map).unwrap();
    let end = 0x10_0000 + pages * PAGE as u64;
    let area = message(&[(1, 0x10_0000), (2, end), (7, 1 | 1 << 5)]);
    let areas = [&[14 << 3 | 2, area.len() as u8][..], &area].concat();
    fs::write(criu.join("mm-1.img"), criu_image(0x5749_2820, &[areas])).unwrap();
}

/// Two generations of `namespace/warm`, of whose heap of 512 KiB the last chunk differs.
fn two(node: &Node, namespace: &str, key: Option<&Key>) {
    let mut memory = bytes(1, 128 * PAGE);
    let image = format!("{namespace}/warm");
    for files in [
        [("stays", "x"), ("changes", "one"), ("goes", "12345")],
        [("stays", "x"), ("changes", "two!"), ("comes", "123")],
    ] {
        let (upper, shm) = (archive(&files), archive(&[]));
        let streams = [
            ("criu/pages-1.img", &memory[..]),
            (UPPER_FILE, &upper),
            (SHM_FILE, &shm),
        ];
        node.make_with(&image, key.cloned(), |criu| heap(criu, 128), &streams);
        memory[127 * PAGE] ^= 1;
    }
}

#[test]
fn two_generations_differ_in_what_was_changed() {
    let node = Node::with("");
    two(&node, "team-a", None);
    let found = node.json(&["diff", "team-a/warm@1", "team-a/warm", "--json"]);
    assert_eq!(found["images"]["b"], "team-a/warm@2");
    let memory = found["memory"].as_array().unwrap();
    assert_eq!(memory.len(), 1);
    assert_eq!(
        (&memory[0]["pid"], &memory[0]["kind"]),
        (&1.into(), &"heap".into())
    );
    for side in ["a", "b"] {
        assert_eq!(memory[0][side]["bytes"], 128 * PAGE);
        assert_eq!(memory[0][side]["own"], 65536);
    }
    let count = |side: &str| found["chunks"][side]["count"].as_u64().unwrap();
    let common = |side: &str| found["chunks"][side]["common"]["count"].as_u64().unwrap();
    assert!(common("a") >= 7 && common("a") < count("a"), "{found}");
    assert_eq!(common("a"), common("b"));
    let files = found["writable_layer"].as_array().unwrap();
    let told: Vec<_> = files
        .iter()
        .map(|file| {
            format!(
                "{} {} {} {}",
                file["path"], file["change"], file["a"], file["b"]
            )
        })
        .collect();
    assert_eq!(
        told,
        [
            "\"changes\" \"changed\" 3 4",
            "\"comes\" \"added\" 0 3",
            "\"goes\" \"removed\" 5 0",
        ]
    );
    assert_eq!(found["shm"], serde_json::json!([]));

    let text = node.says(&["diff", "-n", "team-a", "warm@1", "warm@2"]);
    for words in [
        "memory             1 heap: 512.00 KiB, 64.00 KiB its own → 512.00 KiB, 64.00 KiB its own",
        "~ /changes  file, 3 B → 4 B",
        "+ /comes  file, 3 B",
        "- /goes  file, 5 B",
        "1 added, 1 changed, 1 removed",
        "/dev/shm           no difference",
    ] {
        assert!(text.contains(words), "{words:?} is not in:\n{text}");
    }
    let text = node.says(&["diff", "team-a/warm@1", "team-a/warm@1"]);
    assert!(
        !text.contains("memory") && text.contains("writable layer     no difference"),
        "{text}"
    );
    node.fails(
        &["diff", "team-a/warm@1", "team-a/warm@7"],
        4,
        &["team-a/warm@7"],
    );
}

#[test]
fn an_encrypted_image_is_compared_with_its_key_only() {
    let key = format!(
        "[[images.key]]\nid = \"k\"\nnamespaces = [\"sealed\"]\ncommand = [\"/bin/echo\", \"{HEX}\"]\n"
    );
    let node = Node::with(&key);
    two(
        &node,
        "sealed",
        Some(&Key::parse("k", HEX.as_bytes()).unwrap()),
    );
    two(&node, "clear", None);
    let found = node.json(&["diff", "sealed/warm@1", "sealed/warm@2", "--json"]);
    assert_eq!(found["memory"][0]["b"]["own"], 65536);
    // The same bytes, and nothing that tells so.
    let found = node.json(&["diff", "clear/warm@1", "sealed/warm@1", "--json"]);
    assert!(found["chunks"]["a"]["common"].is_null(), "{found}");
    assert!(found["memory"][0]["a"]["own"].is_null());
    assert_eq!(found["writable_layer"], serde_json::json!([]));
    let shown = node.json(&["show", "sealed/warm", "--json"]);
    assert_eq!(shown["contents"]["memory"][0]["kind"], "heap");

    let without = Node::with("");
    two(
        &without,
        "sealed",
        Some(&Key::parse("k", HEX.as_bytes()).unwrap()),
    );
    without.fails(
        &["diff", "sealed/warm@1", "sealed/warm@2"],
        1,
        &["encrypted", "\"k\""],
    );
    // What is in clear is told without it.
    let text = without.says(&["show", "sealed/warm"]);
    assert!(
        text.contains("contents           not told") && text.contains("encrypted with     k"),
        "{text}"
    );
    assert!(without.json(&["show", "sealed/warm", "--json"])["contents"].is_null());
}

#[test]
fn an_image_tells_what_is_in_it_and_what_it_has_of_its_parent() {
    let node = Node::with("");
    two(&node, "team-a", None);
    let shown = node.json(&["show", "team-a/warm", "--json"]);
    let contents = &shown["contents"];
    assert_eq!(contents["memory"][0]["bytes"], 128 * PAGE);
    assert_eq!(contents["parent"]["generation"], 1);
    assert!(
        contents["parent"]["chunks"].as_u64() >= Some(7),
        "{contents}"
    );
    let packs = shown["packs_shared_with"].as_object().unwrap();
    assert_eq!(
        packs.values().collect::<Vec<_>>(),
        [&serde_json::json!([1])]
    );
    let text = node.says(&["show", "team-a/warm"]);
    for words in ["heap, of it zeros 0 B", "chunks of @1", ", also of @1"] {
        assert!(text.contains(words), "{words:?} is not in:\n{text}");
    }
    let text = node.says(&["show", "team-a/warm@1"]);
    assert!(text.contains("there is no generation before it"), "{text}");
    // What is damaged is told behind what is not.
    let folder = node.root().join("team-a/warm/2/criu");
    fs::write(folder.join("mm-1.img"), "x").unwrap();
    let output = node.image(&["show", "team-a/warm"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(
        String::from_utf8(output.stdout)
            .unwrap()
            .contains("team-a/warm@2")
    );
    assert!(
        String::from_utf8(output.stderr)
            .unwrap()
            .contains("mm-1.img")
    );
}
