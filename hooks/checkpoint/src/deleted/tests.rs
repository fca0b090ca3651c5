use std::io::Write;

use super::*;
use crate::{
    archive::{Existing, open_dir, pack_with_deleted, unpack},
    criu_image::tests::records,
    pages::Task,
};

/// Field numbers with a number or a text: a protobuf message.
fn images(dir: &Path, deleted: &str, link: &str, kind: u64) {
    let file = |id: u64, name: &str| {
        let regular = records::message(&[
            (1, records::Number(id)),
            (6, records::Text(name.as_bytes())),
        ]);
        records::message(&[
            (1, records::Number(1)),
            (2, records::Number(id)),
            (3, records::Text(&regular)),
        ])
    };
    let remap = records::message(&[
        (1, records::Number(5)),
        (2, records::Number(81)),
        (3, records::Number(kind)),
    ]);
    fs::write(
        dir.join("remap-fpath.img"),
        records::image(0x5913_3954, &[remap]),
    )
    .unwrap();
    let files = [file(4, "bin/true"), file(5, deleted), file(81, link)];
    fs::write(dir.join("files.img"), records::image(0x5630_3138, &files)).unwrap();
}

fn me() -> Tasks {
    Tasks::from_iter([Task {
        parent: 0,
        pid: std::process::id().cast_signed(),
        container_pid: 1,
        comm: String::new(),
        rss: 0,
    }])
}

/// As glibc's `sem_open` does it: made under one name, linked to another, the first one deleted.
#[test]
fn a_deleted_file_travels_under_the_name_that_a_restore_looks_for() {
    let root = tempfile::tempdir().unwrap();
    let (criu, shm, into) = (
        root.path().join("criu"),
        root.path().join("shm"),
        root.path().join("into"),
    );
    for dir in [&criu, &shm, &into] {
        fs::create_dir(dir).unwrap();
    }
    let named = |name: &str| {
        shm.join(name)
            .to_string_lossy()
            .trim_start_matches('/')
            .to_owned()
    };
    let mut held = File::create_new(shm.join("sem.tmp")).unwrap();
    held.write_all(b"semaphore").unwrap();
    fs::hard_link(shm.join("sem.tmp"), shm.join("sem.final")).unwrap();
    fs::remove_file(shm.join("sem.tmp")).unwrap();
    images(&criu, &named("sem.tmp"), &named("link_remap.81"), 0);

    let deleted = DeletedFiles::find(&criu, &me()).unwrap();
    let tar = root.path().join("shm.tar");
    let mounts = [shm.to_str().unwrap(), "/proc"];
    let (_, packed) = pack_with_deleted(
        &open_dir(&shm).unwrap(),
        File::create(&tar).unwrap(),
        &shm,
        deleted.of(&shm, mounts),
    )
    .unwrap();
    assert_eq!(packed.entries, 3);
    unpack(
        File::open(&tar).unwrap(),
        &open_dir(&into).unwrap(),
        Existing::Refuse,
    )
    .unwrap();
    assert_eq!(fs::read(into.join("link_remap.81")).unwrap(), b"semaphore");
    use std::os::unix::fs::MetadataExt;
    let inode = |name: &str| fs::metadata(into.join(name)).unwrap().ino();
    assert_eq!(inode("link_remap.81"), inode("sem.final"));

    // With no other name left it travels with its content.
    fs::remove_file(shm.join("sem.final")).unwrap();
    pack_with_deleted(
        &open_dir(&shm).unwrap(),
        File::create(&tar).unwrap(),
        &shm,
        deleted.of(&shm, mounts),
    )
    .unwrap();
    unpack(
        File::open(&tar).unwrap(),
        &open_dir(&into).unwrap(),
        Existing::Replace,
    )
    .unwrap();
    assert_eq!(fs::read(into.join("link_remap.81")).unwrap(), b"semaphore");
}

#[test]
fn a_deleted_file_that_nobody_has_fails_the_checkpoint() {
    let root = tempfile::tempdir().unwrap();
    assert!(DeletedFiles::find(root.path(), &me()).is_ok());
    images(root.path(), "no/such/file", "no/such/link_remap.81", 0);
    let refused = DeletedFiles::find(root.path(), &me())
        .unwrap_err()
        .to_string();
    assert!(refused.contains("/no/such/file"), "{refused}");
    // A ghost file's content is in the image.
    images(root.path(), "no/such/file", "", 1);
    assert!(DeletedFiles::find(root.path(), &me()).is_ok());
}

#[test]
fn a_deleted_file_on_a_volume_is_refused_by_name() {
    let file = |link: &str| DeletedFile {
        link: link.into(),
        deleted: link.into(),
        file: File::open("/dev/null").unwrap(),
    };
    let deleted = DeletedFiles(vec![
        file("/srv/link_remap.1"),
        file("/dev/shm/link_remap.2"),
    ]);
    let mounts = ["/proc", "/dev", "/dev/shm", "/cache"];
    deleted.require_travelling(mounts, &["/dev/shm"]).unwrap();
    assert_eq!(deleted.of(Path::new("/"), mounts).count(), 1);
    assert_eq!(deleted.of(Path::new("/dev/shm"), mounts).count(), 1);
    let deleted = DeletedFiles(vec![file("/cache/link_remap.3")]);
    let refused = deleted
        .require_travelling(mounts, &["/dev/shm"])
        .unwrap_err()
        .to_string();
    assert!(
        refused.contains("/cache/link_remap.3") && refused.contains("volume /cache"),
        "{refused}"
    );
}
