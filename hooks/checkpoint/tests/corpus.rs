//! Every input that the fuzzer's corpus keeps passes still, on any toolchain: `make fuzz` needs a nightly one, and
//! looks for more of them.
#![allow(
    clippy::unwrap_used,
    unreachable_pub,
    reason = "the bodies are a library of the fuzzer's"
)]

use std::{fs, path::Path};

#[path = "../fuzz/bodies.rs"]
mod bodies;

fn fuzz() -> &'static Path {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/fuzz"))
}

/// The names in a folder, sorted.
fn names(dir: &Path) -> Vec<String> {
    let entries = fs::read_dir(dir).unwrap_or_else(|e| panic!("{}: {e}", dir.display()));
    let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
    let mut names: Vec<String> = names.collect();
    names.sort();
    names
}

#[test]
fn every_input_of_the_corpus_passes() {
    for (target, body) in bodies::ALL {
        let dir = fuzz().join("corpus").join(target);
        let inputs = names(&dir);
        assert!(!inputs.is_empty(), "{target} has no inputs");
        for input in inputs {
            println!("{target}: {input}");
            body(&fs::read(dir.join(input)).unwrap());
        }
    }
}

/// A target without a body in the list would be fuzzed, and its inputs never tried here.
#[test]
fn every_target_has_its_body_and_its_inputs_here() {
    let bodies: Vec<String> = bodies::ALL
        .iter()
        .map(|(name, _)| name.to_string())
        .collect();
    assert_eq!(names(&fuzz().join("corpus")), bodies);
    let targets = names(&fuzz().join("fuzz_targets"));
    let files: Vec<String> = bodies.iter().map(|name| format!("{name}.rs")).collect();
    assert_eq!(targets, files);
    let manifest = fs::read_to_string(fuzz().join("Cargo.toml")).unwrap();
    for name in bodies {
        assert!(
            manifest.contains(&format!("[[bin]]\nname = {name:?}\n")),
            "{name}"
        );
    }
}
