//! A folder below the store's `.partial`, and the lock that says that somebody still needs it.

use std::{
    fs, io,
    os::unix::fs::DirBuilderExt,
    path::{Path, PathBuf},
    process,
    time::{SystemTime, UNIX_EPOCH},
};

use rekindle_store::{Lock, remove_tree};

use super::ImageError;
use crate::manifest::is_image_path;

/// The partial folder, removed when this is dropped, unless it was published or is left to others.
#[derive(Debug)]
pub(super) struct Folder {
    pub(super) partials: PathBuf,
    pub(super) id: String,
    pub(super) dir: PathBuf,
    lease: Option<Lock>,
    /// Its folder is not this one's to remove: it was published, or is left to others.
    pub(super) kept: bool,
}

impl Folder {
    /// The folder of that id in `partials`, which need not be there; none when it is being removed.
    pub(super) fn hold(partials: &Path, id: &str) -> Result<Option<Self>, ImageError> {
        let lease = share(&lock_path(partials, id))?;
        Ok(lease.map(|lease| Self {
            partials: partials.to_owned(),
            id: id.to_owned(),
            dir: partials.join(id),
            lease: Some(lease),
            kept: false,
        }))
    }

    /// Removed by whoever holds it last.
    pub(super) fn left_to_others(mut self) -> Self {
        self.kept = true;
        self
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        if !self.kept {
            // Errors leave it to the next sweep.
            let _ = remove_tree(&self.dir);
        }
        drop(self.lease.take());
        let _ = remove_unless_leased(&self.partials, &self.id);
    }
}

/// A folder below the store's, removed when this is dropped, or swept after a crash.
#[derive(Debug)]
pub struct Scratch(Folder);

impl Scratch {
    pub(super) fn new(partials: &Path) -> Result<Self, ImageError> {
        let id = format!("scratch-{}", new_id());
        let folder = Folder::hold(partials, &id)?;
        // Its name is new, so nobody can be removing it.
        let folder = folder.ok_or_else(|| ImageError::request(partials, "it is locked"))?;
        new_dir(&folder.dir)?;
        Ok(Self(folder))
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.0.dir
    }
}

/// A folder outside the store, of no use to anybody when this is dropped.
#[derive(Debug)]
pub(crate) struct Private(PathBuf);

impl Private {
    pub(super) fn new(path: &Path) -> Result<Self, ImageError> {
        new_dir(path)?;
        Ok(Self(path.to_owned()))
    }

    pub(super) fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for Private {
    fn drop(&mut self) {
        // What is left is removed with the folder that it is in.
        let _ = remove_tree(&self.0);
    }
}

/// Of two processes, or of one at two times, never the same.
pub(super) fn new_id() -> String {
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    format!("{:x}-{:x}", now.as_nanos(), process::id())
}

pub(super) fn lock_path(partials: &Path, id: &str) -> PathBuf {
    partials.join(format!("{id}.lock"))
}

/// Removes a partial folder that nobody holds. Says whether there was one to remove.
pub(super) fn remove_unless_leased(partials: &Path, id: &str) -> Result<bool, ImageError> {
    let path = lock_path(partials, id);
    let Some(_alone) = Lock::try_acquire(&path)? else {
        return Ok(false);
    };
    let dir = partials.join(id);
    let was_there = dir.symlink_metadata().is_ok();
    remove_tree(&dir)?;
    match fs::remove_file(&path) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(ImageError::io("remove", &path)(e)),
        _ => Ok(was_there),
    }
}

pub(super) fn new_dir(path: &Path) -> Result<(), ImageError> {
    fs::DirBuilder::new()
        .mode(0o700)
        .recursive(true)
        .create(path)
        .map_err(ImageError::io("make", path))
}

/// The id of the partial folder that `path` is, if it is one of `partials`.
pub(super) fn partial_id(partials: &Path, path: &Path) -> Option<String> {
    let id = path.file_name()?.to_str()?;
    let parent = fs::canonicalize(path.parent()?).ok()?;
    let ours = fs::canonicalize(partials).ok()?;
    (parent == ours && is_image_path(id) && !id.ends_with(".lock")).then(|| id.to_owned())
}

/// Shares a lock. Whoever looks whether an image is in use holds it alone for a moment, so one refusal
/// means nothing; a remover holds it until the image is gone.
pub(super) fn share(path: &Path) -> Result<Option<Lock>, ImageError> {
    // 40 × 5 ms: a thousand times longer than a look takes.
    for _ in 0..40 {
        if let Some(lock) = Lock::try_share(path)? {
            return Ok(Some(lock));
        }
        #[allow(
            clippy::disallowed_methods,
            reason = "this library blocks; its callers know"
        )]
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    Ok(None)
}
