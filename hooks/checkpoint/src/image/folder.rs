//! A folder below the store's `.partial`, and the lock that says that somebody still needs it.

use std::{
    fs, io,
    os::unix::fs::DirBuilderExt,
    path::{Path, PathBuf},
    process,
    time::{SystemTime, UNIX_EPOCH},
};

use rekindle_store::{Lock, remove_tree};

use super::{ImageError, ImageStore, store::share};
use crate::manifest::is_image_path;

/// The partial folder, removed when this is dropped, unless it was published.
#[derive(Debug)]
pub(super) struct Folder {
    pub(super) store: ImageStore,
    pub(super) id: String,
    pub(super) dir: PathBuf,
    lease: Option<Lock>,
    pub(super) published: bool,
}

impl Folder {
    /// The folder of that id, which need not be there; none when it is being removed.
    pub(super) fn hold(store: &ImageStore, id: &str) -> Result<Option<Self>, ImageError> {
        let lease = share(&lock_path(store, id))?;
        Ok(lease.map(|lease| Self {
            store: store.clone(),
            id: id.to_owned(),
            dir: store.partial_dir().join(id),
            lease: Some(lease),
            published: false,
        }))
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        if !self.published {
            // Errors leave it to the next sweep.
            let _ = remove_tree(&self.dir);
        }
        drop(self.lease.take());
        let _ = remove_unless_leased(&self.store, &self.id);
    }
}

/// A folder below the store's, removed when this is dropped, or swept after a crash.
#[derive(Debug)]
pub struct Scratch(Folder);

impl Scratch {
    pub(super) fn new(store: &ImageStore) -> Result<Self, ImageError> {
        let id = format!("scratch-{}", new_id());
        let folder = Folder::hold(store, &id)?;
        // Its name is new, so nobody can be removing it.
        let folder =
            folder.ok_or_else(|| ImageError::request(&store.partial_dir(), "it is locked"))?;
        new_dir(&folder.dir)?;
        Ok(Self(folder))
    }

    /// Where it is.
    pub fn path(&self) -> &Path {
        &self.0.dir
    }
}

/// Of two processes, or of one at two times, never the same.
pub(super) fn new_id() -> String {
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    format!("{:x}-{:x}", now.as_nanos(), process::id())
}

pub(super) fn lock_path(store: &ImageStore, id: &str) -> PathBuf {
    store.partial_dir().join(format!("{id}.lock"))
}

/// Removes a partial folder that nobody holds. Says whether there was one to remove.
pub(super) fn remove_unless_leased(store: &ImageStore, id: &str) -> Result<bool, ImageError> {
    let path = lock_path(store, id);
    let Some(_alone) = Lock::try_acquire(&path)? else {
        return Ok(false);
    };
    let dir = store.partial_dir().join(id);
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

/// The id of the partial folder that `path` is, if it is one of this store's.
pub(super) fn partial_id(store: &ImageStore, path: &Path) -> Option<String> {
    let id = path.file_name()?.to_str()?;
    let parent = fs::canonicalize(path.parent()?).ok()?;
    let ours = fs::canonicalize(store.partial_dir()).ok()?;
    (parent == ours && is_image_path(id) && !id.ends_with(".lock")).then(|| id.to_owned())
}
