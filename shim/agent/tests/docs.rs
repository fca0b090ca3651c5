//! The documentation's examples are read by the code that they are about.
#![allow(clippy::unwrap_used)]

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use rekindle_core::{
    annotations::{AnnotationError, KUBE_CACHE_DATASET, PREFIX, PodRequest},
    config::NodeConfig,
};

#[allow(dead_code, reason = "other tests compare what commands print")]
mod schema;

fn doc(name: &str) -> String {
    let path = format!("{}/../../docs/{name}", env!("CARGO_MANIFEST_DIR"));
    fs::read_to_string(&path).unwrap_or_else(|e| panic!("{path}: {e}"))
}

/// The fenced blocks of a language.
fn blocks(text: &str, language: &str) -> Vec<String> {
    let mut blocks = Vec::new();
    let mut lines = text.lines();
    while let Some(line) = lines.next() {
        if line == format!("```{language}") {
            let block: Vec<&str> = lines.by_ref().take_while(|line| *line != "```").collect();
            blocks.push(block.join("\n") + "\n");
        }
    }
    blocks
}

#[test]
fn every_example_of_the_configuration_is_accepted() {
    let text = doc("CONFIGURATION.md");
    let blocks = blocks(&text, "toml");
    assert!(blocks.len() >= 5);
    for block in &blocks {
        NodeConfig::parse("CONFIGURATION.md", block).unwrap_or_else(|e| panic!("{e}\n{block}"));
    }
    let defaults = NodeConfig::parse("CONFIGURATION.md", &blocks[0]).unwrap();
    assert_eq!(
        defaults,
        NodeConfig::default(),
        "the first block claims to be all defaults"
    );
}

#[test]
fn every_schema_is_that_of_a_command_and_is_one() {
    let text = doc("JSON.md");
    let links = text.split("](schemas/").skip(1);
    let listed = links.filter_map(|rest| rest.split_once(')').map(|(file, _)| file.to_owned()));
    let mut listed: Vec<String> = listed.collect();
    listed.sort();
    let folder = format!("{}/../../docs/schemas", env!("CARGO_MANIFEST_DIR"));
    let mut there = Vec::new();
    for entry in fs::read_dir(&folder).unwrap() {
        let file = entry.unwrap().file_name().into_string().unwrap();
        // None of its words is one that the tests do not compare.
        schema::errors(&schema::load(&file), &serde_json::Value::Null);
        there.push(file);
    }
    there.sort();
    assert_eq!(listed, there);
}

/// The first cells of a document's tables that name a key, in the section that starts with `heading`.
fn documented(text: &str, heading: &str) -> Vec<String> {
    text.split("\n## ")
        .find_map(|section| section.strip_prefix(heading))
        .unwrap_or_else(|| panic!("no section {heading}"))
        .lines()
        .filter_map(|line| line.strip_prefix("| `")?.split_once('`'))
        .map(|(key, _)| key.to_owned())
        .collect()
}

#[test]
fn every_key_of_the_configuration_is_documented_and_no_other() {
    let text = doc("CONFIGURATION.md");
    for (heading, table) in [
        ("`[datasets]`", "[datasets]"),
        ("`[[datasets.source]]`", "[[datasets.source]]"),
        ("`[images]`", "[images]"),
        ("`[images.memory]`", "[images.memory]"),
        ("`[images.retention]`", "[images.retention]"),
        ("`[[images.key]]`", "[[images.key]]"),
        ("`[[images.tier]]`", "[[images.tier]]"),
        ("`[[images.export]]`", "[[images.export]]"),
        ("`[restore]`", "[restore]"),
        ("`[warm-start]`", "[warm-start]"),
        ("`[deadlines]`", "[deadlines]"),
        ("`[agent]`", "[agent]"),
        ("`[kubernetes]`", "[kubernetes]"),
    ] {
        // serde lists the keys there are when it meets one that there is not.
        let error = NodeConfig::parse("", &format!("{table}\nno-such-key = 1\n")).unwrap_err();
        let error = error.to_string();
        let (_, expected) = error
            .split_once("expected")
            .unwrap_or_else(|| panic!("{error}"));
        let mut allowed: Vec<String> = expected
            .split('`')
            .skip(1)
            .step_by(2)
            .map(str::to_owned)
            .collect();
        // Tables have a section of their own.
        allowed.retain(|key| {
            !["source", "export", "key", "memory", "retention", "tier"].contains(&key.as_str())
        });
        let mut keys = documented(&text, heading);
        keys.sort();
        allowed.sort();
        assert_eq!(keys, allowed, "{table}");
    }
}

#[test]
fn every_annotation_is_documented_and_no_other() {
    let text = doc("ANNOTATIONS.md");
    let documented: Vec<String> = text
        .split('`')
        .filter_map(|span| span.strip_prefix(PREFIX))
        .filter(|key| !key.is_empty())
        .map(str::to_owned)
        .collect();
    let parse = |key: &str| {
        PodRequest::parse(&BTreeMap::from([(
            format!("{PREFIX}{key}"),
            "?".to_owned(),
        )]))
    };
    let Err(AnnotationError::UnknownKey { allowed, .. }) = parse("no-such-key") else {
        panic!("an unknown key is refused");
    };
    for key in allowed.split(", ") {
        assert!(
            documented.iter().any(|known| known == key),
            "{PREFIX}{key} is not documented"
        );
    }
    for key in documented {
        let unknown = matches!(parse(&key), Err(AnnotationError::UnknownKey { .. }));
        assert!(!unknown, "{PREFIX}{key} does not exist");
    }
    assert!(text.contains(KUBE_CACHE_DATASET));
}

#[test]
fn every_example_of_an_annotation_is_accepted() {
    let annotations = doc("ANNOTATIONS.md");
    let pod = format!(
        "{}/../../runtimeclass/manifests/example-pod.yaml",
        env!("CARGO_MANIFEST_DIR")
    );
    let mut examples = blocks(&annotations, "yaml");
    assert!(examples.len() >= 3);
    examples.push(fs::read_to_string(pod).unwrap());
    for example in examples {
        let value: serde_yaml_ng::Value = serde_yaml_ng::from_str(&example).unwrap();
        let map: BTreeMap<String, String> =
            serde_yaml_ng::from_value(value["metadata"]["annotations"].clone()).unwrap();
        let request = PodRequest::parse(&map).unwrap_or_else(|e| panic!("{e}\n{example}"));
        assert_ne!(request, PodRequest::default(), "{example}");
    }
}

/// All Rust source of the programs and their libraries.
fn sources() -> String {
    fn collect(folder: &Path, into: &mut String) {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                collect(&path, into);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                into.push_str(&fs::read_to_string(&path).unwrap());
            }
        }
    }
    let mut text = String::new();
    for folder in ["shim", "hooks"] {
        collect(&root().join(folder), &mut text);
    }
    text
}

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

#[test]
fn every_sentence_of_the_troubleshooting_is_the_codes() {
    let sources = sources();
    let text = doc("TROUBLESHOOTING.md");
    let sentences: Vec<&str> = text
        .lines()
        .filter_map(|line| line.strip_prefix("### `")?.strip_suffix('`'))
        .collect();
    assert!(sentences.len() >= 20);
    for sentence in sentences {
        for piece in sentence
            .split('…')
            .map(str::trim)
            .filter(|piece| piece.len() > 3)
        {
            assert!(
                sources.contains(piece),
                "no error says {piece:?} (of {sentence:?})"
            );
        }
    }
}

/// Checks the tests that a text names, and says how many there are.
fn named_tests(text: &str) -> usize {
    let mut named = 0;
    for pointer in text.split('`').filter(|span| span.contains(".rs::")) {
        let (file, test) = pointer.split_once("::").unwrap();
        let source =
            fs::read_to_string(root().join(file)).unwrap_or_else(|e| panic!("{file}: {e}"));
        let defined = source.contains(&format!("fn {test}("))
            || source.contains(&format!("macro_rules! {test}"));
        assert!(defined, "{pointer}");
        named += 1;
    }
    named
}

#[test]
fn every_test_that_the_semantics_names_exists() {
    let text = doc("SEMANTICS.md");
    assert!(named_tests(&text) >= 15);
    let promises = text.lines().filter(|line| {
        line.split_once(". ")
            .is_some_and(|(n, _)| n.parse::<u32>().is_ok())
    });
    assert_eq!(
        promises.count(),
        text.matches("Test: ").count() - 1,
        "each promise names its test, or says none yet"
    );
}

/// What a row of the parity has in place of a test until there is one.
const TO_DO: &str = "TODO(";

/// The rows of the parity's tables: the section and the four cells.
fn parity(text: &str) -> Vec<(&str, [&str; 4])> {
    let mut section = "";
    let mut rows = Vec::new();
    for line in text.lines() {
        if let Some(heading) = line.strip_prefix("## ") {
            section = heading.trim_matches('`');
        }
        let cells: Vec<&str> = line.trim_matches('|').split('|').map(str::trim).collect();
        if let Ok(cells) = <[&str; 4]>::try_from(cells)
            && cells[3] != "shown by"
            && !cells[3].starts_with("---")
        {
            rows.push((section, cells));
        }
    }
    rows
}

#[test]
fn every_row_of_the_parity_has_a_test_or_a_reason() {
    let text = doc("PARITY.md");
    let rows = parity(&text);
    assert!(rows.len() >= 300);
    for (section, cells) in rows {
        let shown = cells[3];
        assert!(
            named_tests(shown) > 0 || shown.ends_with('.') || shown.starts_with(TO_DO),
            "neither a test nor a reason, which is a sentence: {section}: {cells:?}"
        );
    }
    for link in text.split("](#").skip(1) {
        let id = link.split(')').next().unwrap();
        assert!(text.contains(&format!("<a id=\"{id}\">")), "{id}");
    }
}

#[test]
#[ignore = "what is left to do is no failure of the code; `make parity` runs it"]
fn nothing_of_the_parity_is_left_to_do() {
    let text = doc("PARITY.md");
    let left = parity(&text);
    let left: Vec<_> = left
        .iter()
        .filter(|(_, cells)| cells[3].starts_with(TO_DO))
        .collect();
    assert!(left.is_empty(), "{} rows: {left:#?}", left.len());
}

/// The files that the parity is about, below `cmd/containerd-shim-runc-v2` of containerd's source.
const FILES: [&str; 9] = [
    "task/service.go",
    "runc/container.go",
    "process/init.go",
    "process/init_state.go",
    "process/exec.go",
    "process/exec_state.go",
    "process/io.go",
    "process/deleted_state.go",
    "manager/manager_linux.go",
];

#[test]
#[ignore = "needs containerd's source; `make parity` finds it"]
fn every_return_of_the_other_shim_has_its_row_in_the_parity() {
    let source = PathBuf::from(std::env::var_os("CONTAINERD_SOURCE").unwrap());
    let text = doc("PARITY.md");
    let version = fs::read_to_string(source.join("version/version.go")).unwrap();
    let version = version.split("Version = \"").nth(1).unwrap();
    let version = version.split(['+', '"']).next().unwrap();
    assert!(
        text.contains(&format!("of containerd {version},")),
        "the source is that of containerd {version}"
    );
    let rows = parity(&text);
    let mut wrong = Vec::new();
    for file in FILES {
        let path = source.join("cmd/containerd-shim-runc-v2").join(file);
        let mut there: BTreeMap<String, usize> = BTreeMap::new();
        for (_, cells) in rows.iter().filter(|(section, _)| *section == file) {
            let function = cells[0].trim_matches('`').to_owned();
            *there.entry(function).or_default() += 1;
        }
        let needed = returns(&fs::read_to_string(path).unwrap());
        for function in needed.keys().chain(there.keys()) {
            let (needed, there) = (needed.get(function), there.get(function));
            if needed != there {
                let [needed, there] = [needed, there].map(|count| count.copied().unwrap_or(0));
                wrong.push(format!("{file}: {function}: {there} rows for {needed}"));
            }
        }
    }
    wrong.dedup();
    assert!(wrong.is_empty(), "{wrong:#?}");
}

/// How many rows the functions of a Go file need: one for each return that can carry an error, and where a function is
/// exported one for its answer. gofmt ends a function with a brace in the first column.
fn returns(source: &str) -> BTreeMap<String, usize> {
    let opened = |text: &str| text.matches(['(', '{', '[']).count();
    let closed = |text: &str| text.matches([')', '}', ']']).count();
    let mut found = BTreeMap::new();
    let mut lines = source.lines();
    while let Some(line) = lines.next() {
        let Some(mut signature) = line.strip_prefix("func ").map(str::to_owned) else {
            continue;
        };
        while !signature.ends_with('{') {
            signature += lines.next().unwrap();
        }
        let fails = signature.ends_with("error {") || signature.ends_with("error) {");
        let (mut errors, mut answers) = (0, !fails);
        let mut body = lines.by_ref().take_while(|line| *line != "}");
        while let Some(line) = body.next().map(str::trim) {
            if !fails || !line.starts_with("return ") {
                continue;
            }
            let mut returned = line.to_owned();
            while opened(&returned) > closed(&returned) {
                returned += body.next().unwrap();
            }
            if returned == "return nil" || returned.ends_with(", nil") {
                answers = true;
            } else {
                errors += 1;
            }
        }
        let (receiver, rest) = match signature.strip_prefix('(') {
            Some(rest) => rest.split_once(") ").unwrap(),
            None => ("", signature.as_str()),
        };
        let method = rest.split('(').next().unwrap();
        let exported = method.starts_with(char::is_uppercase);
        let rows = errors + usize::from(exported && answers);
        if rows > 0 {
            let kind = receiver.rsplit([' ', '*']).next().unwrap();
            let name = [kind, method].join(".");
            found.insert(name.trim_start_matches('.').to_owned(), rows);
        }
    }
    found
}
