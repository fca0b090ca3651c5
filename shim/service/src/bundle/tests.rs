use super::*;

#[test]
fn a_change_keeps_what_it_does_not_know() {
    let folder = tempfile::tempdir().unwrap();
    fs::write(
        folder.path().join("config.json"),
        r#"{"future":{"x":1},"mounts":[{"destination":"/data","source":"/old"}]}"#,
    )
    .unwrap();
    let mut spec = Spec::read(folder.path()).unwrap();
    spec.bind_read_only(Path::new("/new"), "/data");
    spec.set_criu_config(Path::new("/criu.conf"));
    spec.write().unwrap();
    let spec = Spec::read(folder.path()).unwrap();
    assert_eq!(spec.json["future"]["x"], 1);
    let data: Vec<_> = spec
        .mounts()
        .map(|m| (m.source, m.destination, m.read_only))
        .collect();
    assert_eq!(data, [("/new", "/data", true)]);
    assert_eq!(spec.bind_source("/data"), None);
    assert_eq!(spec.annotations()["org.criu.config"], "/criu.conf");
}

#[test]
fn a_bundle_without_or_with_a_huge_config_is_named() {
    let folder = tempfile::tempdir().unwrap();
    assert!(
        Spec::read(folder.path())
            .unwrap_err()
            .to_string()
            .contains("config.json")
    );
    let file = fs::File::create(folder.path().join("config.json")).unwrap();
    file.set_len(50 << 20).unwrap();
    assert!(
        Spec::read(folder.path())
            .unwrap_err()
            .to_string()
            .contains("config.json")
    );
}

#[test]
fn the_nodes_shm_is_told_from_the_pods_and_from_the_containers_own() {
    let reason = |namespaces: Value, mount: Value| {
        let mut mount = mount;
        mount["destination"] = "/dev/shm".into();
        let json = json!({"linux": {"namespaces": namespaces}, "mounts": [mount]});
        let path = PathBuf::new();
        Spec { path, json }.shm_of_the_node()
    };
    let bind = |source: &str| json!({"type": "bind", "source": source, "options": ["rbind", "rw"]});
    let pods = tempfile::tempdir().unwrap();
    let pods = bind(pods.path().to_str().unwrap());
    let own_tmpfs = json!({"type": "tmpfs", "source": "shm"});
    let (none, own) = (json!([]), json!([{"type": "ipc"}]));
    let hosts = json!([{"type": "ipc", "path": "/proc/self/ns/ipc"}]);
    for namespaces in [&none, &own, &hosts] {
        assert_eq!(reason(namespaces.clone(), own_tmpfs.clone()), None);
        assert_eq!(reason(namespaces.clone(), pods.clone()), None);
    }
    for namespaces in [&none, &hosts] {
        // However it is written.
        for source in ["/dev/shm", "/dev/../dev/shm/"] {
            let said = reason(namespaces.clone(), bind(source)).unwrap();
            assert!(said.contains("(hostIPC)"), "{said}");
        }
    }
    assert!(reason(own, bind("/dev/shm")).unwrap().contains("hostPath"));
    let read_only = json!({"type": "bind", "source": "/dev/shm", "options": ["rbind", "ro"]});
    assert_eq!(reason(none, read_only), None);
}
