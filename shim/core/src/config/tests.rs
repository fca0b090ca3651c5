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
fn the_first_key_of_a_namespace_encrypts_and_any_of_its_own_opens() {
    let config = parse(
        r#"
        [[images.key]]
        id = "a-2"
        namespaces = ["team-a"]
        file = "/etc/keys/a-2"
        [[images.key]]
        id = "a-1"
        namespaces = ["team-a", "team-b"]
        command = ["/bin/keys", "a-1"]
        "#,
    )
    .unwrap();
    let named = |ns: &str| {
        config
            .key_for(&ns.parse().unwrap())
            .map(|key| key.id.as_str())
    };
    assert_eq!(
        [named("team-a"), named("team-b"), named("team-c")],
        [Some("a-2"), Some("a-1"), None]
    );
    let opens = |id: &str, ns: &str| config.key_named(id, &ns.parse().unwrap()).is_some();
    assert!(opens("a-1", "team-a") && opens("a-2", "team-a") && !opens("a-2", "team-b"));
}

#[test]
fn a_key_that_cannot_be_is_refused() {
    for (text, words) in [
        ("id = \"a\"\nnamespaces = []", "either a file or a command"),
        (
            "id = \"a\"\nnamespaces = []\nfile = \"key\"",
            "either a file or a command",
        ),
        (
            "id = \"a\"\nnamespaces = []\ncommand = []",
            "either a file or a command",
        ),
        (
            "id = \"a\"\nnamespaces = []\ncommand = [\"keys\"]",
            "either a file or a command",
        ),
        (
            "id = \"a\"\nnamespaces = []\nfile = \"/a\"\ncommand = [\"/b\"]",
            "either a file or a command",
        ),
        ("id = \"\"\nnamespaces = []\nfile = \"/a\"", "images.key.id"),
        (
            "id = \"a b\"\nnamespaces = []\nfile = \"/a\"",
            "images.key.id",
        ),
        ("id = \"a\"\nfile = \"/a\"", "namespaces"),
        (
            "id = \"a\"\nnamespaces = []\nfile = \"/a\"\nkey = \"00\"",
            "unknown field",
        ),
    ] {
        let refused = parse(&format!("[[images.key]]\n{text}\n")).unwrap_err();
        assert!(refused.contains(words), "{text}: {refused}");
    }
    let one = "[[images.key]]\nid = \"a\"\nnamespaces = []\nfile = \"/a\"\n";
    assert!(
        parse(&one.repeat(2))
            .unwrap_err()
            .contains("an id of its own")
    );
}

#[test]
fn a_tier_has_the_images_of_its_namespaces_and_nothing_beside_its_prefix() {
    let config = parse(
        r#"
        [[images.tier]]
        url = "s3://images/a/"
        namespaces = ["team-a"]
        [[images.tier]]
        url = "s3://images/rest/"
        namespaces = ["*"]
        "#,
    )
    .unwrap();
    let url = |tier: Option<&Tier>| tier.map(|tier| tier.url.clone());
    let of = |ns: &str| url(config.tier_for(&ns.parse().unwrap()));
    assert_eq!(of("team-a").as_deref(), Some("s3://images/a/"));
    assert_eq!(of("team-b").as_deref(), Some("s3://images/rest/"));
    let at = |place: &str, ns: &str| {
        config
            .tier_at(&place.parse().unwrap(), Some(&ns.parse().unwrap()))
            .is_some()
    };
    assert!(at("s3://images/a/", "team-a") && at("s3://images/a/b/", "team-a"));
    assert!(!at("s3://images/a/", "team-b") && !at("s3://images/a-private/", "team-a"));
    assert!(at("s3://images/rest/", "team-a"));
}

#[test]
fn a_repository_is_a_tier_and_so_is_what_lies_below_it() {
    let config = parse(
        r#"
        [[images.tier]]
        url = "docker://r.example:5000/team"
        namespaces = ["team-a"]
        endpoint = "http://r.example:5000"
        credentials-file = "/etc/rekindle/docker.json"
        "#,
    )
    .unwrap();
    let at = |place: &str, ns: &str| {
        config
            .tier_at(&place.parse().unwrap(), Some(&ns.parse().unwrap()))
            .is_some()
    };
    assert!(at("docker://r.example:5000/team", "team-a"));
    assert!(at("docker://r.example:5000/team/more", "team-a"));
    assert!(!at("docker://r.example:5000/team", "team-b"));
    assert!(!at("docker://r.example:5000/team-b", "team-a"));
    assert!(!at("docker://r.example/team", "team-a"));
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
        (
            "[[images.tier]]\nurl = \"s3://images\"\nnamespaces = []",
            &["images.tier.url", "slash"],
        ),
        (
            "[[images.tier]]\nurl = \"file:///images/\"\nnamespaces = []",
            &["images.tier.url", "s3://bucket/"],
        ),
        (
            "[[images.tier]]\nurl = \"s3://images/\"\nnamespaces = []\nendpoint = \"x\"",
            &["images.tier.endpoint", "https://"],
        ),
        (
            "[[images.tier]]\nurl = \"s3://images/\"\nnamespaces = []\nregoin = \"x\"",
            &["regoin", "region"],
        ),
        (
            "[[images.tier]]\nurl = \"docker://r.example/a/\"\nnamespaces = []",
            &["images.tier.url", "docker://host/repository"],
        ),
        (
            "[[images.tier]]\nurl = \"docker://r.example/a\"\nnamespaces = []\nregion = \"x\"",
            &["images.tier.region", "registry"],
        ),
        (
            "[[images.tier]]\nurl = \"docker://r.example/a\"\nnamespaces = []\nendpoint = \"http://r.example/v2\"",
            &["images.tier.endpoint", "no more"],
        ),
        (
            "[agent]\nevery = \"0s\"",
            &["agent.every", "between two rounds"],
        ),
        ("[deadlines]\ncontainer = \"90\"", &["90", "unit"]),
        ("[restore]\npaging = \"soon\"", &["soon", "lazy"]),
        (
            "[datasets]\nconcurrency = 0",
            &["datasets.concurrency", "1024"],
        ),
        (
            "[images.retention]\nkeep = 0",
            &["images.retention.keep", "at least one"],
        ),
        (
            "[images.retention]\nidle-newest = true",
            &["images.retention.idle-newest", "not set"],
        ),
        ("[images.retention]\nquota = \"5GB\"", &["5GB", "GiB"]),
        ("[images.retention]\nquota = 5", &["string"]),
        (
            "[images.memory]\nroot = \"run\"",
            &["images.memory.root", "absolute"],
        ),
        ("[images.memory]\nquota = \"1GB\"", &["1GB", "GiB"]),
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

#[test]
fn nothing_is_removed_unless_the_retention_says_so() {
    let none = Retention::default();
    assert_eq!(NodeConfig::default().images.retention, none);
    assert_eq!(parse("[images.retention]").unwrap().images.retention, none);
    let text = "[images.retention]\nkeep = 2\nidle = \"72h\"\nidle-newest = true\nquota = \"200GiB\"\nnamespace-quota = \"50GiB\"\n";
    let all = Retention {
        keep: Some(2),
        idle: Some(Duration::from_secs(72 * 3600)),
        idle_newest: true,
        quota: Some(200 << 30),
        namespace_quota: Some(50 << 30),
    };
    assert_eq!(parse(text).unwrap().images.retention, all);
}

#[test]
fn images_are_in_memory_only_where_there_is_a_quota() {
    for text in [
        "",
        "[images.memory]",
        "[images.memory]\nquota = \"0B\"\nidle = \"1m\"\n",
    ] {
        assert_eq!(parse(text).unwrap().images.memory, None, "{text}");
    }
    let config = parse("[images.memory]\nquota = \"64GiB\"\n").unwrap();
    let memory = Memory {
        root: "/run/rekindle/images".into(),
        quota: 64 << 30,
        namespace_quota: None,
        idle: Duration::from_secs(3600),
    };
    assert_eq!(config.images.memory, Some(memory));
}
