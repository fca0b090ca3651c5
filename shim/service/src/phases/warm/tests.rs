use std::os::unix::fs::symlink;

use super::*;

/// As the kubelet writes a ConfigMap or a Secret: a folder with the time in its name, and links that lead through it.
fn projected(volume: &Path, time: &str, files: &[(&str, &str)]) {
    let _ = fs::remove_dir_all(volume);
    let dated = volume.join(format!("..{time}"));
    fs::create_dir_all(&dated).unwrap();
    symlink(format!("..{time}"), volume.join("..data")).unwrap();
    for (name, text) in files {
        fs::write(dated.join(name), text).unwrap();
        symlink(format!("..data/{name}"), volume.join(name)).unwrap();
    }
}

#[test]
fn a_volume_is_what_is_in_its_files_and_not_when_it_was_written() {
    let dir = tempfile::tempdir().unwrap();
    let volume = dir.path().join("config");
    let of = |time: &str, files: &[(&str, &str)]| {
        projected(&volume, time, files);
        hash(&volume)
    };
    let first = of("2026_01", &[("a", "1"), ("b", "2")]);
    assert_eq!(of("2026_02", &[("b", "2"), ("a", "1")]), first);
    for other in [
        &[("a", "1"), ("b", "3")][..],
        &[("a", "1")],
        &[("a", "1"), ("c", "2")],
        &[("a", "12"), ("b", "")],
    ] {
        assert_ne!(of("2026_01", other), first, "{other:?}");
    }
}

#[test]
fn a_file_that_is_bound_alone_counts_by_what_is_in_it() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("0");
    fs::write(&file, "one").unwrap();
    let first = hash(&file);
    fs::write(&file, "two").unwrap();
    assert_ne!(hash(&file), first);
    // What is large is not read.
    let large = File::create(&file).unwrap();
    large.set_len(1 << 40).unwrap();
    assert_ne!(hash(&file), first);
}

#[test]
fn the_account_is_the_tokens() {
    let dir = tempfile::tempdir().unwrap();
    let token = dir.path().join("token");
    let account = |text: &str| {
        fs::write(&token, text).unwrap();
        let contents = Contents {
            datasets: BTreeMap::new(),
            compared: Vec::new(),
            token: Some(token.clone()),
        };
        contents.account()
    };
    let claims = base64_simd::URL_SAFE_NO_PAD
        .encode_to_string(r#"{"sub":"system:serviceaccount:team:server","exp":1}"#);
    let found = account(&format!("e30.{claims}.c2ln"));
    assert_eq!(found.as_deref(), Some("system:serviceaccount:team:server"));
    for text in ["", "a.b", "a.!.c", "a.e30.c", "no token"] {
        assert_eq!(account(text), None, "{text}");
    }
}
