use super::*;

fn parse(text: &str) -> Result<NodeConfig, String> {
    NodeConfig::parse("config.toml", text).map_err(|e| e.to_string())
}

#[test]
fn an_empty_file_is_the_default() {
    assert_eq!(parse("").unwrap(), NodeConfig::default());
    assert!(NodeConfig::default().datasets.sources.is_empty());
}

#[test]
fn a_source_serves_its_namespaces_and_nothing_beside_its_prefix() {
    let config =
        parse("[[datasets.source]]\nallow = \"s3://models/\"\nnamespaces = [\"team-a\"]\n")
            .unwrap();
    let serves = |uri: &str, ns: &str| {
        config
            .source_for(&uri.parse().unwrap(), &ns.parse().unwrap())
            .is_some()
    };
    assert!(serves("s3://models/a/", "team-a"));
    assert!(serves("s3://models", "team-a"));
    assert!(!serves("s3://models/a/", "team-b"));
    assert!(!serves("s3://models-private/a/", "team-a"));
    let nobody = parse("[[datasets.source]]\nallow = \"s3://models/\"\n").unwrap();
    assert!(
        nobody
            .source_for(&"s3://models/".parse().unwrap(), &"a".parse().unwrap())
            .is_none()
    );
}

#[test]
fn images_stay_in_their_namespace_unless_exported() {
    let config =
        parse("[[images.export]]\nnamespace = \"base\"\nname = \"vllm\"\nto = [\"team-a\"]\n")
            .unwrap();
    let may = |owner: &str, name: &str, user: &str| {
        config.may_restore(
            &owner.parse().unwrap(),
            &name.parse().unwrap(),
            &user.parse().unwrap(),
        )
    };
    assert!(may("x", "y", "x"));
    assert!(may("base", "vllm", "team-a"));
    assert!(!may("base", "vllm", "team-b"));
    assert!(!may("base", "other", "team-a"));
}

#[test]
fn what_is_wrong_is_named() {
    for (text, words) in [
        ("[datasets]\nrot = \"/x\"", &["rot", "config.toml"][..]),
        ("[datasets]\nroot = \"x\"", &["datasets.root", "absolute"]),
        (
            "[[datasets.source]]\nallow = \"s3://models\"",
            &["datasets.source.allow", "slash"],
        ),
        (
            "[[datasets.source]]\nallow = \"models/\"",
            &["datasets.source.allow"],
        ),
        (
            "[[datasets.source]]\nallow = \"s3://models/\"\nendpoint = \"host:9000\"",
            &["https://"],
        ),
        ("[deadlines]\ncontainer = \"90\"", &["90", "unit"]),
        ("[restore]\npaging = \"soon\"", &["soon", "lazy"]),
        (
            "[datasets]\nconcurrency = 0",
            &["datasets.concurrency", "1024"],
        ),
    ] {
        let sentence = parse(text).unwrap_err();
        for word in words {
            assert!(
                sentence.contains(word),
                "{sentence:?} does not say {word:?}"
            );
        }
    }
}

#[test]
fn a_cold_start_keeps_its_time_and_never_more_than_a_third() {
    let of = |seconds: u64| {
        let text = format!("[deadlines]\ncontainer = \"{seconds}s\"\n");
        let config = NodeConfig::parse("config.toml", &text).unwrap();
        config.deadlines.cold_start().as_secs()
    };
    assert_eq!([of(9), of(45), of(90)], [3, 15, 15]);
}
