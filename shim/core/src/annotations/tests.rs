use super::*;

fn parse(pairs: &[(&str, &str)]) -> Result<PodRequest, AnnotationError> {
    PodRequest::parse(
        &pairs
            .iter()
            .map(|(k, v)| ((*k).to_owned(), (*v).to_owned()))
            .collect(),
    )
}

fn sentence(pairs: &[(&str, &str)]) -> String {
    parse(pairs).unwrap_err().to_string()
}

#[test]
fn nothing_said_is_nothing_asked() {
    assert_eq!(
        parse(&[("other.io/x", "y")]).unwrap(),
        PodRequest::default()
    );
}

#[test]
fn one_dataset_has_defaults() {
    let request = parse(&[("rekindle.dev/dataset", "s3://models/a/")]).unwrap();
    assert_eq!(request.datasets[0].mount, "/data");
    assert_eq!(request.datasets[0].policy, Policy::Required);
    assert_eq!(
        parse(&[("x-openai/required-dataset", "s3://models/a/")]).unwrap(),
        request
    );
}

#[test]
fn several_datasets() {
    let list = "- {name: w, uri: 's3://models/w/', mount: /w}\n- {name: c, uri: 's3://models/c/', mount: /c/, container: app, policy: Opportunistic}\n";
    let request = parse(&[("rekindle.dev/datasets", list)]).unwrap();
    assert_eq!(request.datasets[1].mount, "/c");
    assert_eq!(request.datasets[1].container.as_deref(), Some("app"));
    assert_eq!(request.datasets[1].policy, Policy::Opportunistic);
}

#[test]
fn a_sentence_names_key_value_and_what_is_allowed() {
    for (pairs, words) in [
        (
            &[("rekindle.dev/dataest", "x")][..],
            &["rekindle.dev/dataest", "dataset-mount"][..],
        ),
        (
            &[("rekindle.dev/dataset", "models")],
            &["rekindle.dev/dataset", "\"models\"", "s3://bucket/prefix/"],
        ),
        // The key that the pod has, and not the one that it stands for.
        (
            &[("x-openai/required-dataset", "models")],
            &["annotation x-openai/required-dataset=\"models\""],
        ),
        (
            &[
                ("x-openai/required-dataset", "s3://models/"),
                ("rekindle.dev/dataset", "models"),
            ],
            &["annotation rekindle.dev/dataset=\"models\""],
        ),
        (
            &[("rekindle.dev/dataset", "s3://m-b/a/../b/")],
            &["s3://m-b/a/../b/", "'..'"],
        ),
        (
            &[
                ("rekindle.dev/dataset", "s3://models/"),
                ("rekindle.dev/dataset-mount", "data"),
            ],
            &["dataset-mount", "absolute"],
        ),
        (
            &[
                ("rekindle.dev/dataset", "s3://models/"),
                ("rekindle.dev/dataset-mount", "/proc/x"),
            ],
            &["/proc"],
        ),
        (
            &[
                ("rekindle.dev/dataset", "s3://models/"),
                ("rekindle.dev/dataset-policy", "maybe"),
            ],
            &["Required", "Opportunistic"],
        ),
        (
            &[("rekindle.dev/dataset-mount", "/data")],
            &["rekindle.dev/dataset;"],
        ),
        (
            &[("rekindle.dev/restore-policy", "Required")],
            &["rekindle.dev/restore-from"],
        ),
        (
            &[("rekindle.dev/restore-from", "../../etc")],
            &["restore-from", "../../etc"],
        ),
        (&[("rekindle.dev/restore-from", "a@zero")], &["generation"]),
        (
            &[("rekindle.dev/warm-start", "always")],
            &["warm-start", "\"always\"", "auto"],
        ),
        (
            &[("rekindle.dev/warm-when", "after:1s")],
            &["warm-when", "rekindle.dev/warm-start"],
        ),
        (
            &[
                ("rekindle.dev/warm-start", "auto"),
                ("rekindle.dev/warm-when", "readily"),
            ],
            &["warm-when", "allowed are ready, http://:PORT/PATH"],
        ),
        (
            &[
                ("rekindle.dev/warm-start", "auto"),
                ("rekindle.dev/warm-when", "http://other:80/"),
            ],
            &["warm-when", "write no host"],
        ),
        (
            &[
                ("rekindle.dev/warm-start", "auto"),
                ("rekindle.dev/warm-when", "after:1s"),
                ("rekindle.dev/restore-from", "warm"),
            ],
            &["warm-start", "rekindle.dev/restore-from"],
        ),
        (
            &[
                ("rekindle.dev/warm-start", "auto"),
                ("rekindle.dev/warm-when", "after:1s"),
                ("rekindle.dev/warm-ignore-env", "A,,B"),
            ],
            &["warm-ignore-env", "POD_NAME,POD_IP"],
        ),
        (
            &[("rekindle.dev/restore-force", "host")],
            &["restore-force", "rekindle.dev/restore-from"],
        ),
        (
            &[
                ("rekindle.dev/restore-from", "warm"),
                ("rekindle.dev/restore-force", "all"),
            ],
            &["restore-force", "\"all\"", "host"],
        ),
        (
            &[("rekindle.dev/after-restore", "SIGHUP")],
            &["after-restore", "rekindle.dev/restore-from"],
        ),
        (
            &[
                ("rekindle.dev/restore-from", "warm"),
                ("rekindle.dev/after-restore", "SIGKILL"),
            ],
            &["after-restore", "SIGKILL", "SIGUSR1", "JSON list"],
        ),
        (&[("rekindle.dev/datasets", "nonsense: [")], &["YAML list"]),
        (
            &[(
                "rekindle.dev/datasets",
                "[{name: a, uri: 's3://b-b/', mount: /a, gpu: 1}]",
            )],
            &["gpu"],
        ),
    ] {
        let sentence = sentence(pairs);
        for word in words {
            assert!(
                sentence.contains(word),
                "{sentence:?} does not say {word:?}"
            );
        }
        assert!(
            !sentence.contains('\n') || sentence.contains("YAML"),
            "{sentence:?}"
        );
    }
}

#[test]
fn two_datasets_never_share_a_path() {
    let nested = "- {name: w, uri: 's3://models/w/', mount: /w}\n- {name: c, uri: 's3://models/c/', mount: /w/c}\n";
    assert!(sentence(&[("rekindle.dev/datasets", nested)]).contains("/w"));
    let apart = "- {name: w, uri: 's3://models/w/', mount: /w, container: a}\n- {name: c, uri: 's3://models/c/', mount: /w, container: b}\n";
    assert!(parse(&[("rekindle.dev/datasets", apart)]).is_ok());
}

#[test]
fn images_of_a_running_container_are_asked_for() {
    let asked = |pairs: &[(&str, &str)]| parse(pairs).unwrap().checkpoint;
    let every = ("rekindle.dev/checkpoint-every", "1h30m");
    let term = ("rekindle.dev/checkpoint-on-term", "true");
    let found = asked(&[every, ("rekindle.dev/restore-from", "training@3")]).unwrap();
    assert_eq!(found.name.as_str(), "training");
    assert_eq!(
        (found.every, found.on_term),
        (Some(Duration::from_secs(5400)), false)
    );
    let named = [
        term,
        ("rekindle.dev/restore-from", "other/base"),
        ("rekindle.dev/checkpoint-name", "mine"),
    ];
    let found = asked(&named).unwrap();
    assert_eq!(
        (found.name.as_str(), found.every, found.on_term),
        ("mine", None, true)
    );
    assert_eq!(asked(&[("rekindle.dev/restore-from", "base")]), None);
    for (pairs, words) in [
        (&[every][..], "without rekindle.dev/checkpoint-name"),
        // Another namespace's image cannot be the name of one's own.
        (
            &[term, ("rekindle.dev/restore-from", "other/base")],
            "without rekindle.dev/checkpoint-name",
        ),
        (
            &[("rekindle.dev/checkpoint-name", "a")],
            "without rekindle.dev/checkpoint-every or",
        ),
        (
            &[
                ("rekindle.dev/checkpoint-name", "a"),
                ("rekindle.dev/checkpoint-every", "5s"),
            ],
            "the shortest is 10s",
        ),
        (
            &[
                ("rekindle.dev/checkpoint-name", "a"),
                ("rekindle.dev/checkpoint-every", "often"),
            ],
            "not a duration",
        ),
        (
            &[("rekindle.dev/checkpoint-name", "A b"), every],
            "rekindle.dev/checkpoint-name=\"A b\"",
        ),
        (
            &[
                ("rekindle.dev/checkpoint-name", "a"),
                ("rekindle.dev/checkpoint-on-term", "yes"),
            ],
            "allowed are true and false",
        ),
    ] {
        let said = sentence(pairs);
        assert!(said.contains(words), "{said}");
    }
}

#[test]
fn what_makes_a_container_warm() {
    for (text, when) in [
        (
            "http://:8000/health?deep=1",
            WarmWhen::Http {
                port: 8000,
                path: "/health?deep=1".to_owned(),
            },
        ),
        (
            "http://:80",
            WarmWhen::Http {
                port: 80,
                path: "/".to_owned(),
            },
        ),
        ("ready", WarmWhen::Ready),
        ("tcp://:65535", WarmWhen::Tcp(65535)),
        (
            "file:///tmp/is ready",
            WarmWhen::File("/tmp/is ready".to_owned()),
        ),
        ("after:1m30s", WarmWhen::After(Duration::from_secs(90))),
    ] {
        let read: WarmWhen = text.parse().unwrap();
        assert_eq!(read, when);
        // As the shim hands it on.
        assert_eq!(read.to_string().parse(), Ok(when));
    }
    for text in [
        "",
        "http://",
        "http://:0/",
        "http://:8000health",
        "http://:80/a b",
        "https://:80/",
        "tcp://:80/",
        "tcp://:65536",
        "file://tmp/x",
        "file:///",
        "file:///x/",
        "file:///a\nb",
        "after:",
        "after:10",
        "8000",
    ] {
        assert!(text.parse::<WarmWhen>().is_err(), "{text:?}");
    }
}

#[test]
fn what_a_restored_container_is_told() {
    let command = |text: &str| text.parse::<AfterRestore>();
    assert_eq!(command("SIGUSR1"), Ok(AfterRestore::Signal(10)));
    let words = vec!["/bin/reseed".to_owned(), "a b".to_owned()];
    assert_eq!(
        command(r#"["/bin/reseed", "a b"]"#),
        Ok(AfterRestore::Command(words))
    );
    for text in [
        "",
        "[]",
        "[\"\"]",
        "/bin/reseed",
        "{}",
        "10",
        "- a",
        "[\"a\\u0000\"]",
    ] {
        assert!(command(text).is_err(), "{text:?}");
    }
}
