//! Advisory locks between processes of one node. The kernel releases them when the holder dies, however
//! it dies, so a lock is never stale.

use std::{
    fs::{File, OpenOptions, TryLockError},
    io,
    os::unix::fs::MetadataExt,
    path::Path,
    time::SystemTime,
};

use crate::StoreError;

/// A held lock; dropped, it is released. The file stays: removing it would let two holders in, one on
/// the old inode and one on the new. (Where its folder is removed as a whole, a new holder notices.)
#[derive(Debug)]
pub struct Lock {
    file: File,
}

impl Lock {
    /// Waits until nobody else holds `path`, shared or not. Blocks the thread, without a deadline.
    ///
    /// # Errors
    /// Whatever the file system says; the folder of `path` must exist.
    pub fn acquire(path: &Path) -> Result<Self, StoreError> {
        hold(path, |file| file.lock().map(|()| true)).map(|lock| lock.expect("blocking"))
    }

    /// Takes `path` alone, or answers `None` when anybody holds it.
    ///
    /// # Errors
    /// Whatever the file system says; the folder of `path` must exist.
    pub fn try_acquire(path: &Path) -> Result<Option<Self>, StoreError> {
        hold(path, |file| attempt(file.try_lock()))
    }

    /// Takes `path` together with other sharers (a lease), or answers `None` when somebody holds it alone.
    ///
    /// # Errors
    /// Whatever the file system says; the folder of `path` must exist.
    pub fn try_share(path: &Path) -> Result<Option<Self>, StoreError> {
        hold(path, |file| attempt(file.try_lock_shared()))
    }

    /// Sets the file's time of modification to now. Nothing else changes that, neither taking a lock nor looking
    /// whether it is held: so it says when somebody last wanted it to.
    ///
    /// # Errors
    /// What the file system says.
    pub fn touch(&self) -> io::Result<()> {
        self.file.set_modified(SystemTime::now())
    }
}

fn attempt(result: Result<(), TryLockError>) -> io::Result<bool> {
    match result {
        Ok(()) => Ok(true),
        Err(TryLockError::WouldBlock) => Ok(false),
        Err(TryLockError::Error(e)) => Err(e),
    }
}

fn hold(path: &Path, lock: impl Fn(&File) -> io::Result<bool>) -> Result<Option<Lock>, StoreError> {
    let attempt = || -> io::Result<Option<Lock>> {
        loop {
            let file = OpenOptions::new()
                .read(true)
                .write(true)
                .create(true)
                .truncate(false)
                .open(path)?;
            if !lock(&file)? {
                return Ok(None);
            }
            let held = file.metadata()?;
            match path.metadata() {
                Ok(now) if (now.dev(), now.ino()) == (held.dev(), held.ino()) => {
                    return Ok(Some(Lock { file }));
                }
                // The file was removed while we waited: what we hold protects nothing.
                Ok(_) => {}
                Err(e) if e.kind() == io::ErrorKind::NotFound => {}
                Err(e) => return Err(e),
            }
        }
    };
    attempt().map_err(StoreError::io("lock", path))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_holder_or_many_sharers() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("lock");
        let one = Lock::acquire(&path).unwrap();
        assert!(Lock::try_acquire(&path).unwrap().is_none());
        assert!(Lock::try_share(&path).unwrap().is_none());
        drop(one);
        let lease = Lock::try_share(&path).unwrap().unwrap();
        assert!(Lock::try_share(&path).unwrap().is_some());
        assert!(Lock::try_acquire(&path).unwrap().is_none());
        drop(lease);
        assert!(Lock::try_acquire(&path).unwrap().is_some());
    }

    #[test]
    fn only_a_touch_changes_when_it_was_touched() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("lock");
        let touched = || path.metadata().unwrap().modified().unwrap();
        let lease = Lock::try_share(&path).unwrap().unwrap();
        let file = File::options().write(true).open(&path).unwrap();
        file.set_modified(SystemTime::UNIX_EPOCH).unwrap();
        assert!(Lock::try_acquire(&path).unwrap().is_none());
        drop(Lock::try_share(&path).unwrap());
        assert_eq!(touched(), SystemTime::UNIX_EPOCH);
        lease.touch().unwrap();
        assert!(touched() > SystemTime::UNIX_EPOCH);
    }

    #[test]
    fn a_removed_lock_file_is_not_mistaken_for_the_lock() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("lock");
        let old = Lock::acquire(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        let new = Lock::try_acquire(&path).unwrap().unwrap();
        drop(old);
        assert!(Lock::try_acquire(&path).unwrap().is_none());
        drop(new);
    }
}
