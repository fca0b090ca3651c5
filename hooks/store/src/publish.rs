//! The only place where a rename makes something visible.
//!
//! ```text
//!   partial folder ──fsync every file and folder──▶ rename ──fsync the parent──▶ published
//!        │                                            │
//!        └── killed: a partial folder stays           └── killed: either not there, or whole
//! ```
//! A power cut after `publish_dir` has returned loses nothing; before, it leaves only the partial folder.

use std::{
    fs::{self, File, OpenOptions},
    io::Write,
    os::unix::fs::PermissionsExt,
    path::Path,
};

use rustix::{
    fs::{CWD, RenameFlags, renameat_with},
    io::Errno,
};

use crate::StoreError;

/// Publishes a finished folder: every file and folder below `partial` is synced, then `partial` becomes
/// `dest`, then the parent of `dest` is synced. Both must lie on one file system.
///
/// # Errors
/// [`StoreError::Exists`] when `dest` is there already (`partial` is then untouched); whatever the file
/// system says otherwise, and then `dest` does not exist.
pub fn publish_dir(partial: &Path, dest: &Path) -> Result<(), StoreError> {
    sync_tree(partial)?;
    match renameat_with(CWD, partial, CWD, dest, RenameFlags::NOREPLACE) {
        Ok(()) => {}
        Err(Errno::EXIST | Errno::NOTEMPTY) => return Err(StoreError::Exists(dest.to_owned())),
        // Some network file systems have no NOREPLACE. A plain rename replaces at most an empty folder.
        Err(Errno::INVAL) if !dest.exists() => {
            rename(partial, dest)?;
        }
        Err(e) => return Err(StoreError::io("rename to", dest)(e.into())),
    }
    sync_dir(parent(dest))
}

/// Makes a finished file visible, replacing what was there: `tmp` is synced and renamed to `dest`, and
/// the parent is synced.
///
/// # Errors
/// Whatever the file system says; `dest` is then either the old file or the new one, whole.
pub fn commit_file(tmp: &Path, dest: &Path) -> Result<(), StoreError> {
    File::open(tmp)
        .and_then(|file| file.sync_all())
        .map_err(StoreError::io("sync", tmp))?;
    rename(tmp, dest)?;
    sync_dir(parent(dest))
}

/// Writes a small file so that a reader sees the old text or the new one, never half. With `durable` it
/// also survives a power cut; without, it costs no sync (progress files, caches).
///
/// One writer at a time: the temporary name is `dest` with `.tmp` behind it.
///
/// # Errors
/// Whatever the file system says.
pub fn write_file(dest: &Path, bytes: &[u8], durable: bool) -> Result<(), StoreError> {
    let mut name = dest.as_os_str().to_owned();
    name.push(".tmp");
    let tmp = Path::new(&name);
    OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .open(tmp)
        .and_then(|mut file| file.write_all(bytes))
        .map_err(StoreError::io("write", tmp))?;
    if durable {
        commit_file(tmp, dest)
    } else {
        rename(tmp, dest)
    }
}

/// Makes a finished file visible, replacing what was there, and syncs nothing: a power cut may leave the old file, the new
/// one, or part of it. For what proves itself and can be done without.
///
/// # Errors
/// Whatever the file system says; `dest` is then the old file.
pub fn replace_file(tmp: &Path, dest: &Path) -> Result<(), StoreError> {
    rename(tmp, dest)
}

#[allow(
    clippy::disallowed_methods,
    reason = "this is the one place that the ban points to"
)]
fn rename(from: &Path, to: &Path) -> Result<(), StoreError> {
    fs::rename(from, to).map_err(StoreError::io("rename to", to))
}

/// Syncs every regular file and folder below `dir`, and `dir` itself; files before their folder.
///
/// # Errors
/// Whatever the file system says about the first that fails. Symlinks are skipped: their text is part of
/// the folder that holds them.
pub fn sync_tree(dir: &Path) -> Result<(), StoreError> {
    for entry in fs::read_dir(dir).map_err(StoreError::io("list", dir))? {
        let entry = entry.map_err(StoreError::io("list", dir))?;
        let (path, kind) = (entry.path(), entry.file_type());
        let kind = kind.map_err(StoreError::io("look at", &path))?;
        if kind.is_dir() {
            sync_tree(&path)?;
        } else if kind.is_file() {
            File::open(&path)
                .and_then(|file| file.sync_all())
                .map_err(StoreError::io("sync", &path))?;
        }
    }
    sync_dir(dir)
}

/// Syncs one folder: what was created, renamed or removed in it stays so after a power cut.
///
/// # Errors
/// Whatever the file system says.
pub fn sync_dir(dir: &Path) -> Result<(), StoreError> {
    File::open(dir)
        .and_then(|file| file.sync_all())
        .map_err(StoreError::io("sync", dir))
}

/// Files 0444 and folders 0555, `dir` included: a container's user may read them (0400 gives EACCES in a
/// user namespace) and nobody writes them. Keep such folders beneath a 0700 parent.
///
/// # Errors
/// [`StoreError::Foreign`] for a symlink, socket or device; whatever the file system says otherwise.
pub fn make_read_only(dir: &Path) -> Result<(), StoreError> {
    set_modes(dir, 0o444, 0o555, true)
}

/// Removes a folder and all in it, also where [`make_read_only`] was there. Absent is fine.
///
/// # Errors
/// Whatever the file system says; what could be removed is gone then.
pub fn remove_tree(dir: &Path) -> Result<(), StoreError> {
    match dir.symlink_metadata() {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        Err(e) => return Err(StoreError::io("look at", dir)(e)),
        Ok(_) => {}
    }
    // Without root, a 0555 folder cannot be emptied.
    set_modes(dir, 0o600, 0o700, false)?;
    fs::remove_dir_all(dir).map_err(StoreError::io("remove", dir))
}

fn set_modes(dir: &Path, file: u32, folder: u32, strict: bool) -> Result<(), StoreError> {
    let chmod = |path: &Path, mode| {
        fs::set_permissions(path, fs::Permissions::from_mode(mode))
            .map_err(StoreError::io("set the mode of", path))
    };
    if !strict {
        chmod(dir, folder)?;
    }
    for entry in fs::read_dir(dir).map_err(StoreError::io("list", dir))? {
        let entry = entry.map_err(StoreError::io("list", dir))?;
        let (path, kind) = (entry.path(), entry.file_type());
        let kind = kind.map_err(StoreError::io("look at", &path))?;
        if kind.is_dir() {
            set_modes(&path, file, folder, strict)?;
        } else if kind.is_file() {
            if strict {
                chmod(&path, file)?;
            }
        } else if strict {
            return Err(StoreError::Foreign(path));
        }
    }
    if strict {
        chmod(dir, folder)?;
    }
    Ok(())
}

fn parent(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_published_folder_is_whole_and_never_replaced() {
        let root = tempfile::tempdir().unwrap();
        let (partial, dest) = (root.path().join("x.partial"), root.path().join("x"));
        fs::create_dir_all(partial.join("files/deep")).unwrap();
        fs::write(partial.join("files/deep/a"), b"first").unwrap();
        make_read_only(&partial.join("files")).unwrap();
        publish_dir(&partial, &dest).unwrap();
        assert_eq!(fs::read(dest.join("files/deep/a")).unwrap(), b"first");
        assert!(!partial.exists());

        fs::create_dir_all(&partial).unwrap();
        assert!(matches!(
            publish_dir(&partial, &dest),
            Err(StoreError::Exists(path)) if path == dest
        ));
        assert!(partial.exists());
        remove_tree(&dest).unwrap();
        assert!(!dest.exists());
        remove_tree(&dest).unwrap();
    }

    #[test]
    fn a_symlink_is_never_made_part_of_a_read_only_tree() {
        let root = tempfile::tempdir().unwrap();
        std::os::unix::fs::symlink("/etc/passwd", root.path().join("a")).unwrap();
        assert!(matches!(
            make_read_only(root.path()),
            Err(StoreError::Foreign(_))
        ));
    }

    #[test]
    fn a_small_file_is_replaced_whole() {
        let root = tempfile::tempdir().unwrap();
        let dest = root.path().join("progress");
        for (text, durable) in [("one", false), ("two", true)] {
            write_file(&dest, text.as_bytes(), durable).unwrap();
            assert_eq!(fs::read_to_string(&dest).unwrap(), text);
        }
        assert_eq!(fs::read_dir(root.path()).unwrap().count(), 1);
    }
}
