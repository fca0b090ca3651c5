//! What `--json` prints is what `docs/schemas` says. Whoever runs a command in a test asks here.
//!
//! The schemas use few words of JSON Schema, and those are compared here: a library that knows all of them brings two dozen
//! crates along. A word that is not known is a panic.
#![allow(unreachable_pub, reason = "it is a module of several programs")]

use std::fs;

use serde_json::{Map, Value};

/// The schema of what a command prints, by its words; none where it prints no JSON.
fn name(args: &[&str]) -> Option<&'static str> {
    if !args.contains(&"--json") {
        return None;
    }
    let words: Vec<&str> = args
        .iter()
        .copied()
        .filter(|word| !word.starts_with('-'))
        .collect();
    let elsewhere = words.iter().any(|word| word.contains("://"));
    match words.as_slice() {
        ["checkpoint", ..] => Some("checkpoint"),
        ["restore", ..] => Some("restore"),
        ["prefetch", ..] => Some("prefetch"),
        ["dataset", "ls", ..] => Some("dataset-ls"),
        ["image", "ls", ..] if elsewhere => Some("image-ls-tier"),
        ["image", "ls", ..] => Some("image-ls"),
        ["image", "show", ..] => Some("image-show"),
        ["image", "diff", ..] => Some("image-diff"),
        ["image", "gc", ..] if elsewhere => Some("image-gc-tier"),
        ["image", "gc", ..] => Some("image-gc"),
        ["image", "rm", ..] => Some("image-rm"),
        ["suspend" | "resume", ..] => Some("suspend"),
        ["image", "import", ..] => Some("image-import"),
        ["image", "export", ..] => Some("image-export"),
        ["image", "push", ..] => Some("image-push"),
        ["image", "pull", ..] => Some("image-pull"),
        ["image", "fetch", ..] => Some("image-fetch"),
        _ => None,
    }
}

/// Panics where a line that `rekindle ARGS…` printed is not what its schema says.
pub fn check(args: &[&str], stdout: &[u8]) {
    let Some(name) = name(args) else { return };
    let schema = load(&format!("{name}.json"));
    for line in String::from_utf8_lossy(stdout).lines() {
        let value = serde_json::from_str(line);
        let value = value.unwrap_or_else(|e| panic!("{args:?} printed no JSON ({e}): {line}"));
        let wrong = errors(&schema, &value);
        assert!(
            wrong.is_empty(),
            "{args:?} printed what {name}.json does not have: {wrong:#?}\n{line}"
        );
    }
}

/// A file of `docs/schemas`.
pub fn load(file: &str) -> Value {
    // Of the crate that these tests are of.
    let root = env!("CARGO_MANIFEST_DIR").trim_end_matches("/shim/agent");
    let path = format!("{}/docs/schemas/{file}", root.trim_end_matches("/tests"));
    let text = fs::read_to_string(&path).unwrap_or_else(|e| panic!("{path}: {e}"));
    serde_json::from_str(&text).unwrap_or_else(|e| panic!("{path}: {e}"))
}

/// In what a value is not what its schema says.
pub fn errors(schema: &Value, value: &Value) -> Vec<String> {
    let mut found = Vec::new();
    compare("", schema, value, &mut found);
    found
}

fn compare(at: &str, schema: &Value, value: &Value, found: &mut Vec<String>) {
    let schema = schema.as_object();
    let schema = schema.unwrap_or_else(|| panic!("{at}: a schema that is no object"));
    let none = Map::new();
    let fields = value.as_object().unwrap_or(&none);
    let known = schema.get("properties").and_then(Value::as_object);
    for (word, says) in schema {
        let holds = match word.as_str() {
            "$schema" | "title" | "description" => true,
            "type" => types(says).iter().any(|kind| is(kind, value)),
            "const" => value == says,
            "enum" => list(says).contains(value),
            // Only numbers that are not negative are asked for.
            "minimum" => !value.is_number() || value.as_f64() >= says.as_f64(),
            "required" => {
                let missing = |key: &Value| !fields.contains_key(key.as_str().unwrap_or_default());
                !value.is_object() || !list(says).iter().any(missing)
            }
            "properties" => {
                for (key, of) in says.as_object().unwrap_or(&none) {
                    let of_key = fields.get(key).unwrap_or(&Value::Null);
                    // That its own schema has no word that is not known is looked at in any case.
                    let mut inner = Vec::new();
                    compare(&format!("{at}/{key}"), of, of_key, &mut inner);
                    found.extend(inner.into_iter().filter(|_| fields.contains_key(key)));
                }
                true
            }
            "additionalProperties" => {
                let more = fields
                    .iter()
                    .filter(|(key, _)| known.is_none_or(|known| !known.contains_key(*key)));
                for (key, of_key) in more {
                    match says {
                        Value::Bool(false) => found.push(format!("{at}: {key:?} is not known")),
                        says => compare(&format!("{at}/{key}"), says, of_key, found),
                    }
                }
                true
            }
            "items" => {
                for (index, item) in value.as_array().into_iter().flatten().enumerate() {
                    compare(&format!("{at}/{index}"), says, item, found);
                }
                true
            }
            "anyOf" => list(says).iter().any(|one| errors(one, value).is_empty()),
            "oneOf" => {
                let fit = list(says)
                    .iter()
                    .filter(|one| errors(one, value).is_empty());
                fit.count() == 1
            }
            other => panic!("{at}: the tests do not know {other:?} of JSON Schema"),
        };
        if !holds {
            found.push(format!("{at}: {word} {says} is not true of {value}"));
        }
    }
}

fn list(value: &Value) -> &[Value] {
    value.as_array().map_or(&[], Vec::as_slice)
}

fn types(says: &Value) -> Vec<&str> {
    let many = list(says).iter().filter_map(Value::as_str);
    says.as_str().into_iter().chain(many).collect()
}

fn is(kind: &str, value: &Value) -> bool {
    match kind {
        "object" => value.is_object(),
        "array" => value.is_array(),
        "string" => value.is_string(),
        "boolean" => value.is_boolean(),
        "null" => value.is_null(),
        "number" => value.is_number(),
        "integer" => value.is_u64() || value.is_i64(),
        other => panic!("there is no type {other:?} in JSON Schema"),
    }
}
