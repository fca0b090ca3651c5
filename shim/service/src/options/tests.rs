use super::*;

fn any(type_url: &str, value: Vec<u8>) -> Any {
    Any {
        type_url: type_url.to_owned(),
        value,
        ..Any::default()
    }
}

#[test]
fn options_are_read_in_both_forms() {
    let mut options = Options::new();
    options.binary_name = "crun".to_owned();
    options.systemd_cgroup = true;
    let runc = RuncOptions::parse(Some(&any(
        "containerd.runc.v1.Options",
        options.write_to_bytes().unwrap(),
    )))
    .unwrap();
    assert_eq!((runc.binary.as_str(), runc.systemd_cgroup), ("crun", true));

    let read = table_of("BinaryName = \"crun\"\nSystemdCgroup = true\n").unwrap();
    assert_eq!(read, runc);

    let error = RuncOptions::parse(Some(&any("x.Other", vec![])))
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("x.Other") && error.contains("containerd.runc.v1.Options"),
        "{error}"
    );
    assert!(RuncOptions::parse(Some(&any("runtimeoptions.v1.Options", vec![0x1a, 200]))).is_err());
}

fn field(number: u8, bytes: &[u8]) -> Vec<u8> {
    let mut field = vec![number << 3 | 2];
    field.extend([bytes.len() as u8 & 0x7f | 0x80, (bytes.len() >> 7) as u8]);
    field.extend_from_slice(bytes);
    field
}

/// The options of `io.containerd.rekindle.v1`.
fn generic(fields: &[(u8, &str)]) -> Result<RuncOptions, String> {
    let fields = fields
        .iter()
        .map(|(number, text)| field(*number, text.as_bytes()));
    let message = fields.collect::<Vec<_>>().concat();
    let any = any("runtimeoptions.v1.Options", message);
    RuncOptions::parse(Some(&any)).map_err(|e| e.to_string())
}

fn table_of(text: &str) -> Result<RuncOptions, String> {
    generic(&[(1, "x"), (3, text)])
}

#[test]
fn every_option_has_its_key() {
    let all = r#"
        TypeUrl = "containerd.runc.v1.Options"
        BinaryName = "a"
        Root = "b"
        SystemdCgroup = true
        NoPivotRoot = true
        NoNewKeyring = true
        ShimCgroup = "c"
        IoUid = 1
        IoGid = 2
        CriuImagePath = "d"
        CriuWorkPath = "e"
        CriuPath = ""
        TaskApiAddress = "ttrpc+unix:///run/x"
        TaskApiVersion = 3
    "#;
    let expected = RuncOptions {
        binary: "a".to_owned(),
        root: "b".to_owned(),
        systemd_cgroup: true,
        no_pivot_root: true,
        no_new_keyring: true,
        shim_cgroup: "c".to_owned(),
        io_uid: 1,
        io_gid: 2,
        criu_image_path: "d".to_owned(),
        criu_work_path: "e".to_owned(),
    };
    assert_eq!(table_of(all).unwrap(), expected);

    let file = tempfile::NamedTempFile::new().unwrap();
    fs::write(file.path(), all).unwrap();
    let path = file.path().to_str().unwrap();
    // The body is containerd's own table then, with what is not for us.
    assert_eq!(generic(&[(2, path), (3, "Else = 1")]).unwrap(), expected);
}

#[test]
fn what_is_wrong_is_named() {
    for (text, named) in [
        ("SystemdCgroups = true", "`SystemdCgroups`, expected"),
        ("IoUid = \"root\"", "string \"root\""),
        ("BinaryName", "expected"),
        ("CriuPath = \"/usr/sbin/criu\"", "CriuPath"),
    ] {
        let error = table_of(text).unwrap_err();
        assert!(error.contains(named) && !error.contains('\n'), "{error}");
    }
    let error = generic(&[(2, "/no/such/file")]).unwrap_err();
    assert!(error.contains("/no/such/file"), "{error}");
}
