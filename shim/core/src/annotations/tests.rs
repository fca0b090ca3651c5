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
            &[("rekindle.dev/warm-start", "auto")],
            &["warm-start", "does not have it yet"],
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
