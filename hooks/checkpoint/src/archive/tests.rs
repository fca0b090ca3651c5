use std::{
    fs,
    io::{Read, Write},
    os::unix::{
        ffi::OsStrExt,
        fs::{FileTypeExt, MetadataExt, PermissionsExt, symlink},
    },
};

use rustix::fs::{
    CWD, FileType, Mode as FileMode, XattrFlags, lgetxattr, lsetxattr, makedev, mknodat,
};
use tar::{Builder, EntryType, Header};

use super::*;

impl Sink for File {}

fn root() -> bool {
    rustix::process::geteuid().is_root()
}

fn xattr(path: &Path, name: &str) -> Option<Vec<u8>> {
    let mut value = vec![0; 4096];
    let length = lgetxattr(path, name, &mut value[..]).ok()?;
    value.truncate(length);
    Some(value)
}

fn pack_to(from: &Path, tar: &Path) -> Packed {
    let out = File::create_new(tar).unwrap();
    pack(&open_dir(from).unwrap(), out).unwrap().1
}

/// Packs `from` and unpacks it into a new folder below `root`.
fn round_trip(from: &Path, root: &Path) -> PathBuf {
    let tar = root.join("a.tar");
    let packed = pack_to(from, &tar);
    let into = root.join("into");
    fs::create_dir(&into).unwrap();
    let unpacked = unpack(
        File::open(&tar).unwrap(),
        &open_dir(&into).unwrap(),
        Existing::Refuse,
    )
    .unwrap();
    assert_eq!(unpacked.entries, packed.entries);
    into
}

#[test]
fn an_upper_layer_comes_back_as_it_was() {
    let root_dir = tempfile::tempdir().unwrap();
    let from = root_dir.path().join("from");
    let long = "l".repeat(120);
    fs::create_dir_all(from.join("opaque").join(&long)).unwrap();
    fs::write(from.join("plain"), "text").unwrap();
    fs::write(from.join("empty"), "").unwrap();
    fs::write(
        from.join("opaque").join(&long).join("deep"),
        vec![5; 3 << 20],
    )
    .unwrap();
    fs::hard_link(from.join("plain"), from.join("twin")).unwrap();
    symlink("../../else//where", from.join("link")).unwrap();
    symlink(format!("/{}", "x/".repeat(90)), from.join("longlink")).unwrap();
    fs::write(
        from.join(std::ffi::OsStr::from_bytes(b"new\nline\xff")),
        "odd name",
    )
    .unwrap();
    // 5 MiB of hole, data, and a hole at the end.
    let mut sparse = File::create(from.join("sparse")).unwrap();
    sparse.set_len(5 << 20).unwrap();
    io::Seek::seek(&mut sparse, io::SeekFrom::Start(5 << 20)).unwrap();
    sparse.write_all(b"data").unwrap();
    sparse.set_len(8 << 20).unwrap();
    fs::set_permissions(from.join("plain"), fs::Permissions::from_mode(0o4751)).unwrap();
    fs::set_permissions(from.join("opaque"), fs::Permissions::from_mode(0o1777)).unwrap();
    mknodat(CWD, from.join("fifo"), FileType::Fifo, FileMode::RUSR, 0).unwrap();
    let _socket = std::os::unix::net::UnixListener::bind(from.join("socket")).unwrap();
    if root() {
        let whiteout = from.join("gone");
        mknodat(
            CWD,
            &whiteout,
            FileType::CharacterDevice,
            FileMode::empty(),
            makedev(0, 0),
        )
        .unwrap();
        let zero = from.join("zero");
        mknodat(
            CWD,
            &zero,
            FileType::CharacterDevice,
            FileMode::RUSR,
            makedev(1, 5),
        )
        .unwrap();
        let set = |name, value: &[u8]| {
            lsetxattr(from.join("opaque"), name, value, XattrFlags::empty()).unwrap()
        };
        set("trusted.overlay.opaque", b"y");
        set("trusted.overlay.origin", b"hint");
        set("trusted.binary", b"a\nb\0c=\xff");
        std::os::unix::fs::lchown(from.join("link"), Some(1234), Some(70_000)).unwrap();
        std::os::unix::fs::chown(from.join("empty"), Some(3_000_000), Some(5)).unwrap();
    }
    let time = std::time::UNIX_EPOCH + std::time::Duration::new(1_600_000_000, 123_456_789);
    File::open(from.join("opaque"))
        .unwrap()
        .set_modified(time)
        .unwrap();
    File::options()
        .write(true)
        .open(from.join("empty"))
        .unwrap()
        .set_modified(time)
        .unwrap();

    let into = round_trip(&from, root_dir.path());
    let meta = |name: &str| fs::symlink_metadata(into.join(name)).unwrap();
    assert_eq!(fs::read(into.join("plain")).unwrap(), b"text");
    assert_eq!(meta("plain").mode() & 0o7777, 0o4751);
    assert_eq!(
        (meta("plain").ino(), meta("plain").nlink()),
        (meta("twin").ino(), 2)
    );
    assert_eq!(
        fs::read(into.join("opaque").join(&long).join("deep")).unwrap(),
        vec![5; 3 << 20]
    );
    assert_eq!(meta("opaque").mode() & 0o7777, 0o1777);
    assert_eq!(meta("opaque").modified().unwrap(), time);
    assert_eq!(meta("empty").modified().unwrap(), time);
    for link in ["link", "longlink"] {
        assert_eq!(
            fs::read_link(into.join(link)).unwrap(),
            fs::read_link(from.join(link)).unwrap()
        );
    }
    assert!(
        into.join(std::ffi::OsStr::from_bytes(b"new\nline\xff"))
            .exists()
    );
    assert!(meta("fifo").file_type().is_fifo());
    assert!(!into.join("socket").exists());
    let (old, new) = (
        fs::read(from.join("sparse")).unwrap(),
        fs::read(into.join("sparse")).unwrap(),
    );
    assert!(old == new && meta("sparse").blocks() * 512 < 1 << 20);
    if root() {
        assert!(meta("gone").file_type().is_char_device() && meta("gone").rdev() == 0);
        assert!(!into.join("zero").exists());
        assert_eq!(
            xattr(&into.join("opaque"), "trusted.overlay.opaque").unwrap(),
            b"y"
        );
        assert_eq!(
            xattr(&into.join("opaque"), "trusted.binary").unwrap(),
            b"a\nb\0c=\xff"
        );
        assert!(xattr(&into.join("opaque"), "trusted.overlay.origin").is_none());
        assert_eq!((meta("link").uid(), meta("link").gid()), (1234, 70_000));
        assert_eq!((meta("empty").uid(), meta("empty").gid()), (3_000_000, 5));
    }
}

#[test]
fn the_same_folder_gives_the_same_archive() {
    let root = tempfile::tempdir().unwrap();
    let from = root.path().join("from");
    fs::create_dir(&from).unwrap();
    for name in ["b", "a", "c"] {
        fs::write(from.join(name), name).unwrap();
    }
    let dir = open_dir(&from).unwrap();
    let packed = ["1", "2"].map(|name| {
        let path = root.path().join(name);
        pack(&dir, File::create_new(&path).unwrap()).unwrap();
        fs::read(path).unwrap()
    });
    assert!(packed[0] == packed[1]);
}

/// Kind, name, link target, device numbers.
type Hostile<'a> = (EntryType, &'a str, &'a str, u32);

/// An archive as an attacker writes it: the names go into the headers as they are.
fn hostile(entries: &[Hostile]) -> Vec<u8> {
    let mut tar = Builder::new(Vec::new());
    for (kind, name, link, device) in entries {
        let mut header = Header::new_gnu();
        header.set_entry_type(*kind);
        header.set_mode(0o644);
        header.set_uid(rustix::process::getuid().as_raw().into());
        header.set_gid(rustix::process::getgid().as_raw().into());
        header.set_mtime(0);
        let data: &[u8] = if *kind == EntryType::Regular {
            b"evil"
        } else {
            b""
        };
        header.set_size(data.len() as u64);
        header.set_device_major(*device).unwrap();
        header.set_device_minor(*device).unwrap();
        header.as_gnu_mut().unwrap().name[..name.len()].copy_from_slice(name.as_bytes());
        header.set_link_name_literal(link).unwrap();
        header.set_cksum();
        tar.append(&header, data).unwrap();
    }
    tar.into_inner().unwrap()
}

#[test]
fn a_hostile_archive_is_refused_and_leaves_nothing() {
    use EntryType::{Block, Char, Directory, Link, Regular, Symlink, XHeader};
    let long = "d/".repeat(49);
    let table: &[(&[Hostile], &str)] = &[
        (&[(Regular, "../climbed", "", 0)], "not a plain path"),
        (&[(Regular, "a/../../climbed", "", 0)], "not a plain path"),
        (&[(Regular, "/etc/climbed", "", 0)], "not a plain path"),
        (&[(Regular, "..", "", 0)], "not a plain path"),
        (&[(Regular, "", "", 0)], "not a plain path"),
        (
            &[(Symlink, "out", "/tmp", 0), (Regular, "out/climbed", "", 0)],
            "cannot open \"out\"",
        ),
        (
            &[(Symlink, "out", "..", 0), (Directory, "out/climbed", "", 0)],
            "cannot open \"out\"",
        ),
        (
            &[(Symlink, "out", "/etc/passwd", 0), (Regular, "out", "", 0)],
            "there already",
        ),
        (
            &[(Symlink, "out", "/etc", 0), (Directory, "out", "", 0)],
            "there already",
        ),
        (&[(Link, "passwd", "/etc/passwd", 0)], "not a plain path"),
        (
            &[(Link, "passwd", "../../etc/passwd", 0)],
            "not a plain path",
        ),
        (
            &[
                (Symlink, "out", "/etc", 0),
                (Link, "passwd", "out/passwd", 0),
            ],
            "cannot open \"out\"",
        ),
        (
            &[(Symlink, "out", "/etc/passwd", 0), (Link, "hard", "out", 0)],
            "of a kind",
        ),
        (&[(Link, "hard", ".", 0)], "not a plain path"),
        (&[(Char, "null", "", 1)], "device node"),
        (&[(Block, "disk", "", 8)], "device node"),
        (&[(Block, "disk", "", 0)], "device node"),
        (
            &[(Regular, "a", "", 0), (Regular, "a", "", 0)],
            "there already",
        ),
        (&[(Regular, ".", "", 0)], "of a kind"),
        (&[(XHeader, "x", "", 0), (Regular, "a", "", 0)], ""),
        (&[(EntryType::new(b'V'), "volume", "", 0)], "of a kind"),
        (&[(Regular, &long, "", 0)], "cannot open"),
    ];
    for (entries, words) in table {
        let root = tempfile::tempdir().unwrap();
        let (tar, into) = (root.path().join("a.tar"), root.path().join("in/to"));
        fs::create_dir_all(&into).unwrap();
        fs::write(&tar, hostile(entries)).unwrap();
        let result = unpack(
            File::open(&tar).unwrap(),
            &open_dir(&into).unwrap(),
            Existing::Refuse,
        );
        if words.is_empty() {
            // Whatever the reader makes of it, it stays inside.
            let _ = result;
        } else {
            let sentence = result.unwrap_err().to_string();
            assert!(sentence.contains(words), "{entries:?}: {sentence}");
            assert_eq!(
                fs::read_dir(&into).unwrap().count(),
                0,
                "{entries:?} left something"
            );
        }
        assert_eq!(fs::read_dir(root.path().join("in")).unwrap().count(), 1);
        assert!(!Path::new("/tmp/climbed").exists() && !Path::new("/etc/climbed").exists());
    }
}

#[test]
fn a_cut_archive_is_refused_and_leaves_nothing() {
    let root = tempfile::tempdir().unwrap();
    let from = root.path().join("from");
    fs::create_dir_all(from.join("b")).unwrap();
    fs::write(from.join("a"), vec![1; 10_000]).unwrap();
    fs::write(from.join("b/c"), vec![2; 10_000]).unwrap();
    let tar = root.path().join("a.tar");
    pack_to(&from, &tar);
    let mut bytes = Vec::new();
    File::open(&tar).unwrap().read_to_end(&mut bytes).unwrap();
    let into = root.path().join("into");
    fs::create_dir(&into).unwrap();
    for length in [
        1,
        511,
        700,
        1600,
        4000,
        bytes.len() - 2000,
        bytes.len() - 12_000,
    ] {
        fs::write(&tar, &bytes[..length]).unwrap();
        let result = unpack(
            File::open(&tar).unwrap(),
            &open_dir(&into).unwrap(),
            Existing::Refuse,
        );
        assert!(result.is_err(), "{length}");
        assert_eq!(fs::read_dir(&into).unwrap().count(), 0, "{length}");
    }
}

#[test]
fn a_file_that_claims_an_exabyte_is_refused() {
    let root = tempfile::tempdir().unwrap();
    let mut header = Header::new_gnu();
    header.set_path("big").unwrap();
    header.set_size(1 << 60);
    header.set_mode(0o644);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(0);
    header.set_cksum();
    let tar = root.path().join("a.tar");
    fs::write(&tar, header.as_bytes()).unwrap();
    let into = root.path().join("into");
    fs::create_dir(&into).unwrap();
    let refused = unpack(
        File::open(&tar).unwrap(),
        &open_dir(&into).unwrap(),
        Existing::Refuse,
    );
    assert!(matches!(refused, Err(ArchiveError::TooLarge { .. })));
}

#[test]
fn what_a_pod_shares_is_replaced_and_what_was_there_stays_after_a_failure() {
    let root = tempfile::tempdir().unwrap();
    let (from, into) = (root.path().join("from"), root.path().join("into"));
    fs::create_dir(&from).unwrap();
    fs::create_dir(&into).unwrap();
    fs::write(from.join("sem"), "new").unwrap();
    fs::write(into.join("sem"), "old").unwrap();
    fs::write(into.join("other"), "stays").unwrap();
    let tar = root.path().join("a.tar");
    pack_to(&from, &tar);
    let dir = open_dir(&into).unwrap();
    let refused = unpack(File::open(&tar).unwrap(), &dir, Existing::Refuse).unwrap_err();
    assert!(refused.to_string().contains("there already"));
    assert_eq!(fs::read(into.join("sem")).unwrap(), b"old");
    unpack(File::open(&tar).unwrap(), &dir, Existing::Replace).unwrap();
    assert_eq!(fs::read(into.join("sem")).unwrap(), b"new");
    assert_eq!(fs::read(into.join("other")).unwrap(), b"stays");
}

/// A reader that fails when half of its bytes are read.
struct Half(File, u64);

impl Read for Half {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let wanted = buffer.len().min(usize::try_from(self.1).unwrap());
        match self.0.read(&mut buffer[..wanted])? {
            0 => Err(io::ErrorKind::TimedOut.into()),
            read => {
                self.1 -= read as u64;
                Ok(read)
            }
        }
    }
}

#[test]
fn what_was_put_among_the_files_of_others_is_taken_back_alone() {
    let root = tempfile::tempdir().unwrap();
    let (from, into) = (root.path().join("from"), root.path().join("into"));
    for folder in ["from/both", "from/new", "into/both"] {
        fs::create_dir_all(root.path().join(folder)).unwrap();
    }
    for name in ["both/mine", "new/mine", "new/last", "sem"] {
        fs::write(from.join(name), "m".repeat(10_000)).unwrap();
    }
    fs::write(into.join("sem"), "theirs").unwrap();
    fs::write(into.join("both/theirs"), "theirs").unwrap();
    let tar = root.path().join("a.tar");
    pack_to(&from, &tar);
    let dir = open_dir(&into).unwrap();
    let listed = || {
        let names = |folder: &Path| -> Vec<String> {
            let entries = fs::read_dir(folder).unwrap();
            let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
            names.collect()
        };
        let mut all = [names(&into), names(&into.join("both"))].concat();
        all.sort();
        all
    };

    let half = Half(
        File::open(&tar).unwrap(),
        fs::metadata(&tar).unwrap().len() / 2,
    );
    unpack(half, &dir, Existing::Replace).unwrap_err();
    assert_eq!(
        listed(),
        ["both", "sem", "theirs"],
        "in the middle it failed"
    );

    let unpacked = unpack(File::open(&tar).unwrap(), &dir, Existing::Replace).unwrap();
    // Since then somebody made a file of that name anew, and another one in a folder of ours.
    fs::remove_file(into.join("both/mine")).unwrap();
    fs::hard_link(into.join("both/theirs"), into.join("both/mine")).unwrap();
    fs::write(into.join("new/theirs"), "theirs").unwrap();
    unpacked.made.remove(&dir);
    // What was replaced does not come back.
    assert_eq!(listed(), ["both", "mine", "new", "theirs"]);
    assert_eq!(fs::read(into.join("both/mine")).unwrap(), b"theirs");
    assert_eq!(fs::read_dir(into.join("new")).unwrap().count(), 1);
}

#[test]
fn a_link_in_a_containers_root_leads_to_a_place_in_there() {
    let root = tempfile::tempdir().unwrap();
    fs::create_dir_all(root.path().join("dev")).unwrap();
    fs::create_dir_all(root.path().join("etc/inner")).unwrap();
    symlink("/etc", root.path().join("dev/shm")).unwrap();
    let dir = open_in_root(root.path(), Path::new("/dev/shm")).unwrap();
    let names = rustix::fs::Dir::read_from(&dir).unwrap();
    let names: Vec<_> = names
        .map(|entry| entry.unwrap().file_name().to_owned())
        .collect();
    assert!(
        names.iter().any(|name| name.to_bytes() == b"inner"),
        "{names:?}"
    );
    let absent = open_in_root(root.path(), Path::new("/no/such")).unwrap_err();
    assert_eq!(absent.kind(), io::ErrorKind::NotFound);
}

#[test]
fn two_archives_are_compared_by_what_is_in_them_and_not_by_its_times() {
    let root = tempfile::tempdir().unwrap();
    let (first, second) = (root.path().join("first"), root.path().join("second"));
    for dir in [&first, &second] {
        fs::create_dir_all(dir.join("etc")).unwrap();
        fs::write(dir.join("etc/same"), "same").unwrap();
    }
    fs::write(first.join("gone"), "12345").unwrap();
    fs::write(second.join("new"), "1234567").unwrap();
    fs::write(first.join("etc/changed"), "12").unwrap();
    fs::write(second.join("etc/changed"), "123").unwrap();
    fs::write(first.join("mode"), "").unwrap();
    fs::write(second.join("mode"), "").unwrap();
    fs::set_permissions(second.join("mode"), fs::Permissions::from_mode(0o600)).unwrap();
    let older = std::time::UNIX_EPOCH;
    let same = File::options().write(true).open(second.join("etc/same"));
    same.unwrap().set_modified(older).unwrap();
    let listed = [&first, &second].map(|dir| {
        let tar = dir.with_extension("tar");
        pack_to(dir, &tar);
        list(File::open(tar).unwrap()).unwrap()
    });
    let found: Vec<_> = differences(&listed[0], &listed[1])
        .into_iter()
        .map(|found| (found.path.display().to_string(), found.change, found.bytes))
        .collect();
    let is = |path: &str, change, bytes| (path.to_owned(), change, bytes);
    assert_eq!(
        found,
        [
            is("etc/changed", Change::Changed, [2, 3]),
            is("gone", Change::Removed, [5, 0]),
            is("mode", Change::Changed, [0, 0]),
            is("new", Change::Added, [0, 7]),
        ]
    );
    let mut cut = fs::read(first.with_extension("tar")).unwrap();
    cut.truncate(1000);
    assert!(matches!(
        list(&cut[..]),
        Err(ArchiveError::Malformed { .. })
    ));
}
