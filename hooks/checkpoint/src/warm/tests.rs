use std::collections::BTreeMap;

use oci_spec::runtime::Spec;
use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;
use crate::{
    chunks::{Compression, Stored},
    manifest::{FORMAT, Facts, Host, MANIFEST_FILE, Manifest, Source},
};

fn spec() -> Value {
    json!({
        "ociVersion": "1.1.0",
        "process": {
            "args": ["python3", "server.py"],
            "cwd": "/",
            "user": {"uid": 0, "gid": 0},
            "oomScoreAdj": 0,
            "env": [
                "PATH=/usr/bin",
                "MODEL=small",
                "HOSTNAME=server-5c9-xyz",
                "POD_NAME=server-5c9-xyz",
                "REDIS_SERVICE_HOST=10.0.0.1",
                "REDIS_SERVICE_PORT=6379",
                "REDIS_SERVICE_PORT_TLS=6380",
                "REDIS_PORT_6379_TCP_ADDR=10.0.0.1",
                "REDIS_PORT_6379_TCP_PROTO=tcp",
                "REDIS_PORT=tcp://10.0.0.1:6379",
                "REDIS_PORT_6379_TCP=tcp://10.0.0.1:6379",
            ],
        },
        "mounts": [{"destination": "/models", "type": "bind", "source": "/x"}],
        "linux": {"namespaces": [{"type": "network", "path": ""}], "resources": {"memory": {"limit": 2_147_483_648_u64}}},
    })
}

fn kind(spec: &Value, around: Surroundings<'_>) -> Kind {
    let spec: Spec = serde_json::from_value(spec.clone()).unwrap();
    Kind::of(&spec, &Host::default(), around)
}

const OWN: &[&str] = &["server-5c9-xyz", "server-5c9-abc"];

fn own() -> &'static [String] {
    static OWN_TEXTS: std::sync::LazyLock<Vec<String>> =
        std::sync::LazyLock::new(|| OWN.iter().map(|own| (*own).to_owned()).collect());
    &OWN_TEXTS
}

fn around() -> Surroundings<'static> {
    Surroundings {
        image: "sha256:1".to_owned(),
        container: Some("server".to_owned()),
        own: own(),
        mounts: [("/models".to_owned(), "models@1 ro".to_owned())].into(),
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
        ignore_env: &ignore,
        ..around()
    };
    assert_eq!(name(&second, other), first);
}

/// What a person calls as the kubelet calls what it says of services.
#[test]
fn variables_of_a_person_count_whatever_they_are_called() {
    let mut first = spec();
    for pair in [
        "PAYMENT_SERVICE_HOST=pay.example.com",
        "PAYMENT_SERVICE_PORT=443",
        "PAYMENT_SERVICE_API_KEY=secret",
        "REDIS_SERVICE_TOKEN=secret",
        "REDIS_PORT_6379_TCP_NAME=x",
    ] {
        set_env(&mut first, pair);
    }
    let before = kind(&first, around());
    for (variable, pair) in [
        (
            "PAYMENT_SERVICE_HOST",
            "PAYMENT_SERVICE_HOST=pay.example.org",
        ),
        ("PAYMENT_SERVICE_API_KEY", "PAYMENT_SERVICE_API_KEY=other"),
        ("REDIS_SERVICE_TOKEN", "REDIS_SERVICE_TOKEN=other"),
        ("REDIS_PORT_6379_TCP_NAME", "REDIS_PORT_6379_TCP_NAME=y"),
    ] {
        let mut second = first.clone();
        set_env(&mut second, pair);
        let differences = before.differences(&kind(&second, around()));
        assert_eq!(differences, [format!("variable {variable}")]);
    }
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
    changed("the command", "/process/cwd", json!("/srv"));
    changed("the security context", "/process/user/uid", json!(1000));
    changed("variable MODEL", "/process/env/1", json!("MODEL=large"));
    changed(
        "variable SERVER_PORT",
        "/process/env/1",
        json!("SERVER_PORT=8000"),
    );
    changed("limit oom_score_adj", "/process/oomScoreAdj", json!(-997));
    changed(
        "limit memory",
        "/linux/resources/memory/limit",
        json!(1 << 30),
    );
    changed(
        "the namespaces",
        "/linux/namespaces/0/path",
        json!("/proc/1/ns/net"),
    );
    let mounts: BTreeMap<_, _> = [("/models".to_owned(), "models@2 ro".to_owned())].into();
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
        ("mount /models", Surroundings { mounts, ..around() }),
    ] {
        cases.push((what, spec(), around));
    }
    for (what, spec, around) in cases {
        let other = kind(&spec, around);
        assert_ne!(other.image_name(), first.image_name(), "{what}");
        let found = first.differences(&other);
        assert!(found.iter().any(|named| named == what), "{what}: {found:?}");
    }
    // Another container of the pod.
    let other = Surroundings {
        container: Some("sidecar".to_owned()),
        ..around()
    };
    assert!(name(&spec(), other).as_str().starts_with("auto-sidecar-"));
    // The host's network is another one than the pod's.
    let mut joins = spec();
    joins["linux"]["namespaces"][0]["path"] = json!("/proc/1/ns/net");
    let host = Surroundings {
        of_the_host: vec!["network".to_owned()],
        ..around()
    };
    assert_ne!(name(&joins, around()), name(&joins, host));
}

fn store(dir: &tempfile::TempDir) -> ImageStore {
    ImageStore::open(&dir.path().join("images")).unwrap()
}

/// The images of a kind of its own, and as much of these generations as decides whether they are used.
fn images(store: &ImageStore, args: &str, generations: &[u64]) -> WarmImages {
    let mut spec = spec();
    spec["process"]["args"] = json!([args]);
    let kind = kind(&spec, around());
    let images = WarmImages::of(store.clone(), "team".parse().unwrap(), kind).unwrap();
    for generation in generations {
        generation_of(&images, *generation, Some(images.hash()));
    }
    images
}

fn generation_of(images: &WarmImages, generation: u64, hash: Option<&str>) {
    let folder = images.store.home(&images.namespace, &images.name).unwrap();
    let folder = folder.join(generation.to_string());
    fs::create_dir_all(&folder).unwrap();
    let manifest = Manifest {
        format: FORMAT,
        namespace: images.namespace.clone(),
        name: images.name.clone(),
        request: "1".to_owned(),
        created: 0,
        facts: Facts {
            source: Source {
                warm: hash.map(str::to_owned),
                ..Source::default()
            },
            ..Facts::default()
        },
        compression: Compression::None,
        encryption: None,
        stored: Stored::default(),
        packs: Vec::new(),
        files: Vec::new(),
    };
    fs::write(
        folder.join(MANIFEST_FILE),
        serde_json::to_vec(&manifest).unwrap(),
    )
    .unwrap();
}

fn removed(images: &WarmImages, generation: u64) {
    let store = &images.store;
    store
        .remove(&images.namespace, &images.name, Some(generation), false)
        .unwrap();
}

#[test]
fn what_is_called_so_and_is_not_of_the_kind_is_not_used() {
    let dir = tempfile::tempdir().unwrap();
    let images = images(&store(&dir), "a", &[1]);
    // Made by somebody who has read the name.
    generation_of(&images, 2, None);
    generation_of(&images, 3, Some("0123456789abcdef"));
    // Left by a removal that was killed.
    let home = images.store.home(&images.namespace, &images.name).unwrap();
    fs::create_dir(home.join("4")).unwrap();
    assert_eq!(images.usable().unwrap(), Some(1));
}

#[test]
fn a_damaged_image_is_out_of_use_and_three_in_a_row_are_enough() {
    let dir = tempfile::tempdir().unwrap();
    let images = images(&store(&dir), "a", &[1, 2]);
    images.is_bad(2, "a flipped byte").unwrap();
    assert_eq!(images.usable().unwrap(), Some(1));
    assert_eq!(images.record().quarantined(2), Some("a flipped byte"));
    // Noted by two containers, it is one image all the same.
    images.is_bad(2, "a flipped byte").unwrap();
    images.is_bad(1, "another").unwrap();
    assert_eq!(images.usable().unwrap(), None);
    drop(images.make(0).unwrap().unwrap());
    // What was removed still counts: no more are made until a person has looked.
    removed(&images, 1);
    generation_of(&images, 3, Some(images.hash()));
    images.is_bad(3, "and again").unwrap();
    assert_eq!(images.make(0).unwrap().unwrap_err(), NotMade::Hopeless);
    let store = &images.store;
    store
        .remove(&images.namespace, &images.name, None, false)
        .unwrap();
    assert!(images.make(0).unwrap().is_ok());
}

#[test]
fn what_is_known_is_forgotten_with_the_last_generation() {
    let dir = tempfile::tempdir().unwrap();
    let images = images(&store(&dir), "a", &[1]);
    for _ in 0..MAX_USELESS {
        images.not_made().unwrap();
    }
    assert!(images.record().is_hopeless());
    removed(&images, 1);
    assert_eq!(images.record(), Record::default());
    // Also where nothing but that is left.
    images.not_made().unwrap();
    assert!(
        images
            .store
            .forget_warm(&images.namespace, &images.name)
            .unwrap()
    );
    assert!(
        !images
            .store
            .forget_warm(&images.namespace, &images.name)
            .unwrap()
    );
    // One that is made starts the count anew.
    images.not_made().unwrap();
    images.made(true).unwrap();
    assert_eq!(images.record().unmade, 0);
}

#[test]
fn ends_in_a_row_count_and_one_that_went_on_forgives_them() {
    let dir = tempfile::tempdir().unwrap();
    let images = images(&store(&dir), "a", &[1]);
    let ended = |end| images.ended_early(1, "status 1", end, 3).unwrap();
    assert!(!ended(End::Failed) && !ended(End::Failed));
    images.went_on(1).unwrap();
    assert!(!ended(End::Failed) && !ended(End::Failed));
    // Somebody else's doing counts for a third.
    assert!(!ended(End::Signalled) && !ended(End::Signalled));
    assert_eq!(images.usable().unwrap(), Some(1));
    assert!(
        images
            .ended_early(1, "status 2 after 3 s", End::Signalled, 3)
            .unwrap()
    );
    assert_eq!(images.usable().unwrap(), None);
    let record = images.record();
    assert!(
        record
            .quarantined(1)
            .unwrap()
            .contains("status 2 after 3 s")
    );
    assert_eq!(record.useless, 1);
    // One that goes on, with another generation, says that it can be done.
    generation_of(&images, 2, Some(images.hash()));
    images.went_on(2).unwrap();
    assert_eq!(images.record().useless, 0);
}

#[test]
fn one_at_a_time_makes_one() {
    let dir = tempfile::tempdir().unwrap();
    let none = images(&store(&dir), "a", &[]);
    let making = none.make(0).unwrap().unwrap();
    assert_eq!(none.make(0).unwrap().unwrap_err(), NotMade::Busy);
    generation_of(&none, 1, Some(none.hash()));
    drop(making);
    assert_eq!(none.make(0).unwrap().unwrap_err(), NotMade::Exists);
    removed(&none, 1);
    assert_eq!(none.make(101).unwrap().unwrap_err(), NotMade::NoRoom(101));
}

#[test]
fn a_container_has_so_many_kinds_and_no_more() {
    let dir = tempfile::tempdir().unwrap();
    let store = store(&dir);
    let all: Vec<WarmImages> = (0..=MAX_KINDS + 1)
        .map(|n| images(&store, &format!("version {n}"), &[1]))
        .collect();
    for (n, images) in all.iter().enumerate() {
        images.made(true).unwrap();
        let home = store.home(&images.namespace, &images.name).unwrap();
        let lock = fs::File::create(home.join(".1.lock")).unwrap();
        let used = std::time::UNIX_EPOCH + std::time::Duration::from_secs(1_000_000_000 + n as u64);
        lock.set_modified(used).unwrap();
    }
    let rules = Retention {
        quota: Some(u64::MAX),
        ..Retention::default()
    };
    // Just made, and so none that goes, whenever it was used.
    let removed = all[0].make_room(&rules).unwrap();
    let gone: Vec<String> = [1, 2]
        .map(|n: usize| format!("team/{}@1", all[n].name))
        .to_vec();
    let sorted = |mut all: Vec<String>| {
        all.sort();
        all
    };
    assert_eq!(sorted(removed), sorted(gone));
    assert_eq!(all[1].record(), Record::default());
    assert!(all[3].record().kind.is_some());
}

#[test]
fn the_nearest_of_the_same_container_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let store = store(&dir);
    let of = |kind| WarmImages::of(store.clone(), "team".parse().unwrap(), kind).unwrap();
    let mut near = spec();
    set_env(&mut near, "MODEL=large");
    let mut far = near.clone();
    far["process"]["cwd"] = json!("/srv");
    let other_container = Surroundings {
        container: Some("sidecar".to_owned()),
        ..around()
    };
    for kind in [
        kind(&far, around()),
        kind(&near, around()),
        kind(&spec(), other_container),
    ] {
        of(kind).made(true).unwrap();
    }
    let (name, differences) = of(kind(&spec(), around())).nearest().unwrap().unwrap();
    assert_eq!(name, kind(&near, around()).image_name().unwrap());
    assert_eq!(differences, ["variable MODEL"]);
}

#[test]
fn a_record_that_is_none_is_as_none() {
    let dir = tempfile::tempdir().unwrap();
    let images = images(&store(&dir), "a", &[1]);
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
        // No value of the environment is written down, and no word of the command.
        prop_assert!(!String::from_utf8_lossy(&text).contains("server.py"));
        prop_assert!(env.values().filter(|value| value.len() > 8).all(|value| !String::from_utf8_lossy(&text).contains(value.as_str())));
    }
}
