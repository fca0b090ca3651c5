use std::os::unix::fs::symlink;

use super::*;

/// As the kubelet writes a ConfigMap or a Secret: a folder with the time in its name, and links that lead through it.
fn written(volume: &Path, time: &str, files: &[(&str, &str)]) {
    let _ = fs::remove_dir_all(volume);
    let dated = volume.join(format!("..{time}"));
    fs::create_dir_all(&dated).unwrap();
    symlink(format!("..{time}"), volume.join("..data")).unwrap();
    for (name, text) in files {
        fs::write(dated.join(name), text).unwrap();
        symlink(format!("..data/{name}"), volume.join(name)).unwrap();
    }
}

fn mounted(own: &[&str]) -> Mounted {
    Mounted {
        mounts: Vec::new(),
        token: None,
        own: own.iter().map(|own| (*own).to_owned()).collect(),
    }
}

fn token(subject: &str, expires: u32) -> String {
    let claims = format!(r#"{{"sub":"{subject}","exp":{expires}}}"#);
    let claims = base64_simd::URL_SAFE_NO_PAD.encode_to_string(claims);
    format!("e30.{claims}.c2ln")
}

#[test]
fn a_volume_is_what_is_in_its_files_and_not_when_it_was_written() {
    let dir = tempfile::tempdir().unwrap();
    let volume = dir.path().join("config");
    let of = |time: &str, files: &[(&str, &str)]| {
        written(&volume, time, files);
        mounted(&[]).hash(&volume)
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
fn each_pod_has_a_token_and_a_name_of_its_own() {
    let dir = tempfile::tempdir().unwrap();
    let volume = dir.path().join("kube-api-access");
    let of = |own: &str, files: &[(&str, &str)]| {
        written(&volume, "2026", files);
        mounted(&[own]).hash(&volume)
    };
    let (one, later) = (token("server", 1), token("server", 2));
    let first = of("web-1", &[("token", &one), ("name", "web-1\n")]);
    assert_eq!(of("web-2", &[("token", &later), ("name", "web-2")]), first);
    assert_ne!(
        of("web-1", &[("token", &token("admin", 1)), ("name", "web-1")]),
        first
    );
    assert_ne!(of("web-1", &[("token", &one), ("name", "web-2")]), first);
}

#[test]
fn a_file_that_is_bound_alone_counts_by_what_is_in_it() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("0");
    fs::write(&file, "one").unwrap();
    let first = part(&file);
    fs::write(dir.path().join("1"), "one").unwrap();
    assert_eq!(part(&dir.path().join("1")), first);
    fs::write(&file, "two").unwrap();
    assert_ne!(part(&file), first);
    // What is large is not read, and is another one when it was written again.
    let large = File::create(&file).unwrap();
    large.set_len(1 << 40).unwrap();
    let before = part(&file);
    large.set_modified(std::time::UNIX_EPOCH).unwrap();
    assert_ne!(part(&file), before);
    // A folder is itself.
    assert_eq!(part(dir.path()), part(dir.path()));
    assert_ne!(part(dir.path()), part(Path::new("/")));
}

#[test]
fn nothing_but_regular_files_is_read() {
    let dir = tempfile::tempdir().unwrap();
    let fifo = dir.path().join("token");
    nix::unistd::mkfifo(&fifo, nix::sys::stat::Mode::S_IRWXU).unwrap();
    assert_eq!(read(&fifo, 1, OFlags::empty()), None);
    assert_eq!(read(Path::new("/dev/zero"), 1, OFlags::empty()), None);
    assert_eq!(read(dir.path(), 1, OFlags::empty()), None);
    let file = dir.path().join("file");
    fs::write(&file, "four").unwrap();
    assert_eq!(read(&file, 2, OFlags::empty()), Some(b"fo".to_vec()));
    symlink(&file, dir.path().join("link")).unwrap();
    assert_eq!(read(&dir.path().join("link"), 9, OFlags::NOFOLLOW), None);
    // And a FIFO that is bound alone is not waited for.
    part(&fifo);
}

#[test]
fn volumes_are_told_apart_by_what_they_are() {
    let of = |kind: &str, source: &str, destination: &str| {
        let mount = Mount {
            kind,
            source,
            destination,
            read_only: false,
        };
        what(&mount, Some("7f-1"))
    };
    let named = |text: &str| What::Named(text.to_owned());
    let pod = |rest: &str| format!("/var/lib/kubelet/pods/7f-1/{rest}");
    let volume = |rest: &str| pod(&format!("volumes/kubernetes.io~{rest}"));
    assert_eq!(of("proc", "proc", "/proc"), named("proc"));
    assert_eq!(
        of("bind", "/run/sandboxes/1/hostname", "/etc/hostname"),
        named("lent")
    );
    assert_eq!(of("bind", "/data/a", "/data"), named("/data/a"));
    assert_eq!(
        of("bind", &volume("empty-dir/scratch"), "/scratch"),
        named("empty-dir")
    );
    // Each replica's own disk.
    let disk = volume("csi/pvc-1/mount");
    assert_eq!(of("bind", &disk, "/data"), named("csi/pvc-1/mount"));
    for plugin in WRITTEN {
        let source = volume(&format!("{plugin}/x"));
        assert_eq!(of("bind", &source, "/x"), What::Written(source.into()));
    }
    let part = pod("volume-subpaths/data/main/0");
    assert_eq!(of("bind", &part, "/x"), What::Part(part.into()));
    // Another pod's volume is a folder of the node.
    let foreign = "/var/lib/kubelet/pods/other/volumes/kubernetes.io~secret/x";
    assert_eq!(of("bind", foreign, "/x"), named(foreign));
}

#[test]
fn the_account_is_the_tokens_that_the_kubelet_wrote() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("token");
    let account = |text: &str| {
        fs::write(&file, text).unwrap();
        let mut mounted = mounted(&[]);
        mounted.token = Some(file.clone());
        mounted.account()
    };
    let found = account(&token("system:serviceaccount:team:server", 1));
    assert_eq!(found.as_deref(), Some("system:serviceaccount:team:server"));
    for text in ["", "a.b", "a.!.c", "a.e30.c", "no token"] {
        assert_eq!(account(text), None, "{text}");
    }
}
