use std::collections::BTreeMap;

use oci_spec::runtime::Spec;
use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;
use crate::manifest::Host;

fn spec() -> Value {
    json!({
        "ociVersion": "1.1.0",
        "process": {
            "args": ["python3", "server.py"],
            "cwd": "/",
            "user": {"uid": 0, "gid": 0},
            "env": [
                "PATH=/usr/bin",
                "MODEL=small",
                "HOSTNAME=server-5c9-xyz",
                "POD_NAME=server-5c9-xyz",
                "REDIS_SERVICE_HOST=10.0.0.1",
                "REDIS_SERVICE_PORT=6379",
                "REDIS_SERVICE_PORT_TLS=6380",
                "REDIS_PORT=tcp://10.0.0.1:6379",
                "REDIS_PORT_6379_TCP=tcp://10.0.0.1:6379",
            ],
        },
        "mounts": [{"destination": "/models", "type": "bind", "source": "/x"}],
    })
}

fn kind(spec: &Value, around: Surroundings<'_>) -> Kind {
    let spec: Spec = serde_json::from_value(spec.clone()).unwrap();
    Kind::of(&spec, &Host::default(), around)
}

fn around() -> Surroundings<'static> {
    Surroundings {
        image: "sha256:1".to_owned(),
        container: Some("server".to_owned()),
        own: vec!["server-5c9-xyz".to_owned()],
        ..Surroundings::default()
    }
}

fn name(spec: &Value, around: Surroundings<'_>) -> ImageName {
    kind(spec, around).image_name().unwrap()
}

fn set_env(spec: &mut Value, pair: &str) {
    let (name, _) = pair.split_once('=').unwrap();
    let env = spec
        .pointer_mut("/process/env")
        .unwrap()
        .as_array_mut()
        .unwrap();
    env.retain(|other| !other.as_str().unwrap().starts_with(&format!("{name}=")));
    env.push(json!(pair));
}

#[test]
fn pods_of_one_deployment_are_of_one_kind() {
    let first = name(&spec(), around());
    assert!(first.as_str().starts_with("auto-server-"), "{first}");
    let mut second = spec();
    for pair in [
        "HOSTNAME=server-5c9-abc",
        "POD_NAME=server-5c9-abc",
        // A service more in the namespace.
        "MYSQL_SERVICE_HOST=10.0.0.2",
        "MYSQL_SERVICE_PORT=3306",
        "MYSQL_PORT=tcp://10.0.0.2:3306",
        "POD_IP=10.1.1.1",
    ] {
        set_env(&mut second, pair);
    }
    second["mounts"][0]["source"] = json!("/y");
    second["hostname"] = json!("server-5c9-abc");
    let ignore = ["POD_IP".to_owned()];
    let other = Surroundings {
        own: vec!["server-5c9-abc".to_owned()],
        ignore_env: &ignore,
        ..around()
    };
    assert_eq!(name(&second, other), first);
}

#[test]
fn what_matters_makes_another_kind_and_is_named() {
    let first = kind(&spec(), around());
    let mut cases: Vec<(&str, Value, Surroundings<'_>)> = Vec::new();
    let mut changed = |what, pointer: &str, value: Value| {
        let mut spec = spec();
        *spec.pointer_mut(pointer).unwrap() = value;
        cases.push((what, spec, around()));
    };
    changed("the command", "/process/args/1", json!("other.py"));
    changed("the working folder", "/process/cwd", json!("/srv"));
    changed("the security context", "/process/user/uid", json!(1000));
    changed("variable MODEL", "/process/env/1", json!("MODEL=large"));
    // What looks like a service's and is none.
    changed(
        "variable SERVER_PORT",
        "/process/env/1",
        json!("SERVER_PORT=8000"),
    );
    changed("mount /other", "/mounts/0/destination", json!("/other"));
    let contents: BTreeMap<_, _> = [("/models".to_owned(), "v2".to_owned())].into();
    for (what, around) in [
        (
            "the container image",
            Surroundings {
                image: "sha256:2".to_owned(),
                ..around()
            },
        ),
        (
            "the service account",
            Surroundings {
                account: Some("admin".to_owned()),
                ..around()
            },
        ),
        (
            "mount /models",
            Surroundings {
                contents,
                ..around()
            },
        ),
    ] {
        cases.push((what, spec(), around));
    }
    for (what, spec, around) in cases {
        let other = kind(&spec, around);
        assert_ne!(other.image_name(), first.image_name(), "{what}");
        let differences = first.differences(&other);
        assert!(
            differences.iter().any(|named| named == what),
            "{what}: {differences:?}"
        );
    }
    // Another container of the pod.
    let other = Surroundings {
        container: Some("sidecar".to_owned()),
        ..around()
    };
    assert!(name(&spec(), other).as_str().starts_with("auto-sidecar-"));
}

fn images(dir: &tempfile::TempDir, generations: &[u64]) -> WarmImages {
    let store = ImageStore::open(&dir.path().join("images")).unwrap();
    let images = WarmImages::new(
        store.clone(),
        "team".parse().unwrap(),
        "auto-x".parse().unwrap(),
    );
    let home = store.home(&images.namespace, &images.name).unwrap();
    for generation in generations {
        fs::create_dir_all(home.join(generation.to_string())).unwrap();
    }
    images
}

#[test]
fn a_restore_that_fails_takes_its_image_out_of_use() {
    let dir = tempfile::tempdir().unwrap();
    let images = images(&dir, &[1, 2]);
    assert_eq!(images.usable().unwrap(), Some(2));
    images.failed(2, "CRIU said no").unwrap();
    assert_eq!(images.usable().unwrap(), Some(1));
    assert_eq!(images.record().quarantined(2), Some("CRIU said no"));
    images.failed(1, "again").unwrap();
    assert_eq!(images.usable().unwrap(), None);
    drop(images.make().unwrap().unwrap());
    // What was removed still counts: no more are made until a person has looked.
    let home = images.store.home(&images.namespace, &images.name).unwrap();
    fs::remove_dir(home.join("1")).unwrap();
    fs::create_dir(home.join("3")).unwrap();
    images.failed(3, "and again").unwrap();
    assert_eq!(images.make().unwrap().unwrap_err(), NotMade::Hopeless);
    images
        .store
        .remove(&images.namespace, &images.name, None, false)
        .unwrap();
    assert!(images.make().unwrap().is_ok());
}

#[test]
fn ends_in_a_row_count_and_one_that_went_on_forgives_them() {
    let dir = tempfile::tempdir().unwrap();
    let images = images(&dir, &[1]);
    assert!(!images.ended_early(1, "status 1", 3).unwrap());
    assert!(!images.ended_early(1, "status 1", 3).unwrap());
    images.went_on(1).unwrap();
    assert!(!images.ended_early(1, "status 1", 3).unwrap());
    assert!(!images.ended_early(1, "status 1", 3).unwrap());
    assert_eq!(images.usable().unwrap(), Some(1));
    assert!(images.ended_early(1, "status 2 after 3 s", 3).unwrap());
    assert_eq!(images.usable().unwrap(), None);
    let record = images.record();
    assert!(
        record
            .quarantined(1)
            .unwrap()
            .contains("status 2 after 3 s")
    );
}

#[test]
fn one_at_a_time_makes_one() {
    let dir = tempfile::tempdir().unwrap();
    let none = images(&dir, &[]);
    let making = none.make().unwrap().unwrap();
    assert_eq!(none.make().unwrap().unwrap_err(), NotMade::Busy);
    fs::create_dir(
        none.store
            .home(&none.namespace, &none.name)
            .unwrap()
            .join("1"),
    )
    .unwrap();
    drop(making);
    assert_eq!(none.make().unwrap().unwrap_err(), NotMade::Exists);
}

#[test]
fn the_nearest_of_the_same_container_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let mine = images(&dir, &[1]);
    let first = kind(&spec(), around());
    let mut near = spec();
    set_env(&mut near, "MODEL=large");
    let mut far = near.clone();
    far["process"]["cwd"] = json!("/srv");
    let other_container = Surroundings {
        container: Some("sidecar".to_owned()),
        ..around()
    };
    for (number, kind) in [
        kind(&far, around()),
        kind(&near, around()),
        kind(&spec(), other_container),
    ]
    .iter()
    .enumerate()
    {
        let name = format!("auto-{number}").parse().unwrap();
        WarmImages::new(mine.store.clone(), mine.namespace.clone(), name)
            .describe(kind)
            .unwrap();
    }
    let (name, differences) = mine.nearest(&first).unwrap().unwrap();
    assert_eq!(
        (name.as_str(), differences),
        ("auto-1", vec!["variable MODEL".to_owned()])
    );
}

#[test]
fn a_record_that_is_none_is_as_none() {
    let dir = tempfile::tempdir().unwrap();
    let images = images(&dir, &[1]);
    let home = images.store.home(&images.namespace, &images.name).unwrap();
    for text in ["", "{", "[]", "{\"generations\": 3}"] {
        fs::write(home.join(RECORD), text).unwrap();
        assert_eq!(images.record(), Record::default(), "{text}");
    }
    fs::remove_file(home.join(RECORD)).unwrap();
    std::os::unix::fs::symlink("/dev/zero", home.join(RECORD)).unwrap();
    assert_eq!(images.record(), Record::default());
}

proptest! {
    #[test]
    fn a_kind_survives_being_written(env in proptest::collection::btree_map("[A-Z]{1,8}", "[ -~]{0,20}", 0..8)) {
        let mut spec = spec();
        let pairs: Vec<String> = env.iter().map(|(name, value)| format!("{name}={value}")).collect();
        spec["process"]["env"] = json!(pairs);
        let kind = kind(&spec, around());
        let text = serde_json::to_vec(&kind).unwrap();
        let read: Kind = serde_json::from_slice(&text).unwrap();
        prop_assert_eq!(read.image_name(), kind.image_name());
        // No value of the environment is written down.
        prop_assert!(env.values().filter(|value| value.len() > 8).all(|value| !String::from_utf8_lossy(&text).contains(value.as_str())));
    }
}
