//! An image that is being made: who asked for it, who makes it, and how it becomes one.

use std::{
    fs::{self, File},
    io,
    os::unix::fs::{DirBuilderExt, FileTypeExt as _},
    path::{Path, PathBuf},
    process,
    time::{SystemTime, UNIX_EPOCH},
};

use rekindle_core::name::{ImageName, Namespace};
use rekindle_store::{
    Lock, crc::Crc64, crc::file_crc, publish_dir, remove_tree, space, write_file,
};
use serde::{Deserialize, Serialize};

use super::{Damage, ImageError, ImageStore, SealedImage, reference, store::share};
use crate::manifest::{
    CRIU_DIR, FORMAT, Facts, FileEntry, MANIFEST_CRC_FILE, MANIFEST_FILE, Manifest, SHM_FILE,
    Source, UPPER_FILE, declared_format, is_image_path, parse_json, read_bounded,
};

const REQUEST_FILE: &str = "request.json";

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct RequestFile {
    format: u32,
    namespace: Namespace,
    name: ImageName,
    source: Source,
}

/// An image that this process asked for and another one makes. Dropped, whatever is left of it is removed,
/// unless somebody is still making it.
#[derive(Debug)]
pub struct Request {
    store: ImageStore,
    id: String,
    namespace: Namespace,
    name: ImageName,
    lease: Option<Lock>,
}

impl Request {
    pub(super) fn begin(
        store: &ImageStore,
        namespace: &Namespace,
        name: &ImageName,
        source: Source,
    ) -> Result<Self, ImageError> {
        let now = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default();
        let id = format!("{:x}-{:x}", now.as_nanos(), process::id());
        let request = Self {
            lease: share(&lock_path(store, &id))?,
            store: store.clone(),
            id,
            namespace: namespace.clone(),
            name: name.clone(),
        };
        let dir = request.dir();
        new_dir(&dir)?;
        let text = RequestFile {
            format: FORMAT,
            namespace: namespace.clone(),
            name: name.clone(),
            source,
        };
        let path = dir.join(REQUEST_FILE);
        let text = serde_json::to_vec(&text).map_err(|e| ImageError::request(&path, e))?;
        write_file(&path, &text, false)?;
        Ok(request)
    }

    /// The partial folder: what to hand to containerd as `image_path`.
    pub fn dir(&self) -> PathBuf {
        self.store.partial_dir().join(&self.id)
    }

    /// The image, once the checkpoint call has returned with success.
    ///
    /// # Errors
    /// [`ImageError::Unknown`] when the call made none: the container's shim is not ours.
    pub fn finish(self) -> Result<SealedImage, ImageError> {
        self.store.made_by(&self.namespace, &self.name, &self.id)
    }
}

impl Drop for Request {
    fn drop(&mut self) {
        drop(self.lease.take());
        // Still shared by the maker: it removes the folder itself. Errors leave it to the next sweep.
        let _ = remove_unless_leased(&self.store, &self.id);
    }
}

/// An image that this process makes. Dropped without [`Partial::seal`], it is removed.
#[derive(Debug)]
pub struct Partial {
    store: ImageStore,
    id: String,
    dir: PathBuf,
    request: RequestFile,
    lease: Option<Lock>,
    sealed: bool,
}

impl Partial {
    pub(super) fn open(store: &ImageStore, id: &str) -> Result<Self, ImageError> {
        let lock = lock_path(store, id);
        let lease = share(&lock)?;
        let dir = store.partial_dir().join(id);
        let path = dir.join(REQUEST_FILE);
        let refuse = |e: &dyn std::fmt::Display| ImageError::request(&path, e);
        if lease.is_none() {
            return Err(refuse(&"it is being removed"));
        }
        let mut file = File::open(&path).map_err(ImageError::io("read", &path))?;
        let bytes = read_bounded(&path, &mut file).map_err(|e| refuse(&e))?;
        let format = declared_format(&path, &bytes).map_err(|e| refuse(&e))?;
        if format != u64::from(FORMAT) {
            return Err(refuse(&format_args!(
                "it has format {format}, not {FORMAT}"
            )));
        }
        let request: RequestFile = parse_json(&path, &bytes).map_err(|e| refuse(&e))?;
        let criu = dir.join(CRIU_DIR);
        new_dir(&criu)?;
        Ok(Self {
            store: store.clone(),
            id: id.to_owned(),
            dir,
            request,
            lease,
            sealed: false,
        })
    }

    /// The namespace that the image will be in. Whoever makes it compares it with the container's own.
    pub fn namespace(&self) -> &Namespace {
        &self.request.namespace
    }

    /// The image's name.
    pub fn name(&self) -> &ImageName {
        &self.request.name
    }

    /// What who asked knows of the container's origin.
    pub fn source(&self) -> &Source {
        &self.request.source
    }

    /// Where CRIU writes its images; empty at first.
    pub fn criu_dir(&self) -> PathBuf {
        self.dir.join(CRIU_DIR)
    }

    /// Where the upper layer goes.
    pub fn upper_tar(&self) -> PathBuf {
        self.dir.join(UPPER_FILE)
    }

    /// Where `/dev/shm` goes.
    pub fn shm_tar(&self) -> PathBuf {
        self.dir.join(SHM_FILE)
    }

    /// Refuses when `bytes` more do not fit on the store's file system.
    ///
    /// # Errors
    /// [`StoreError::NoSpace`](rekindle_store::StoreError::NoSpace).
    pub fn require_space(&self, bytes: u64) -> Result<(), ImageError> {
        Ok(space::require(&self.dir, bytes)?)
    }

    /// Makes an image of what lies in the folder: checksums every file that is not in `known` (those were
    /// checksummed while they were written, and only their size is compared), writes the manifest last,
    /// syncs, and publishes by rename under the next generation.
    ///
    /// # Errors
    /// When the folder holds what an image cannot, or the file system refuses; nothing is published then,
    /// and the folder is removed.
    pub fn seal(mut self, facts: Facts, known: &[FileEntry]) -> Result<SealedImage, ImageError> {
        let path = self.dir.join(REQUEST_FILE);
        fs::remove_file(&path).map_err(ImageError::io("remove", &path))?;
        let mut files = Vec::new();
        self.collect(&self.dir, "", known, &mut files)?;
        for entry in known {
            if !files.iter().any(|file| file.path == entry.path) {
                return Err(self.unsealable(&entry.path, Damage::Absent));
            }
        }
        files.sort_by(|a, b| a.path.cmp(&b.path));
        let created = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default();
        let manifest = Manifest {
            format: FORMAT,
            namespace: self.request.namespace.clone(),
            name: self.request.name.clone(),
            request: self.id.clone(),
            created: created.as_secs(),
            facts,
            files,
        };
        let path = self.dir.join(MANIFEST_FILE);
        let text =
            serde_json::to_vec_pretty(&manifest).map_err(|e| ImageError::request(&path, e))?;
        // What we would not read must not be written either.
        Manifest::parse(&path, &text).map_err(|source| ImageError::Manifest {
            image: self.reference(),
            source,
        })?;
        let crc = format!("{}\n", Crc64::of(&text));
        write_file(&self.dir.join(MANIFEST_CRC_FILE), crc.as_bytes(), false)?;
        write_file(&path, &text, false)?;
        let sealed = self
            .store
            .publish(&manifest.namespace, &manifest.name, |dest| {
                publish_dir(&self.dir, dest)
            })?;
        self.sealed = true;
        Ok(sealed)
    }

    fn collect(
        &self,
        dir: &Path,
        prefix: &str,
        known: &[FileEntry],
        files: &mut Vec<FileEntry>,
    ) -> Result<(), ImageError> {
        for entry in fs::read_dir(dir).map_err(ImageError::io("list", dir))? {
            let entry = entry.map_err(ImageError::io("list", dir))?;
            let path = entry.path();
            let name = format!("{prefix}{}", entry.file_name().to_string_lossy());
            let found = fs::symlink_metadata(&path).map_err(ImageError::io("look at", &path))?;
            if found.is_dir() && name == CRIU_DIR {
                self.collect(&path, &format!("{CRIU_DIR}/"), known, files)?;
                continue;
            }
            if found.file_type().is_socket() {
                // CRIU leaves none; a daemon that shared the folder may have.
                fs::remove_file(&path).map_err(ImageError::io("remove", &path))?;
                continue;
            }
            if !found.is_file() {
                return Err(self.unsealable(&name, Damage::NotAFile));
            }
            if !is_image_path(&name) {
                return Err(self.unsealable(&name, Damage::Extra));
            }
            let entry = match known.iter().find(|entry| entry.path == name) {
                Some(entry) if entry.size == found.len() => entry.clone(),
                Some(entry) => {
                    let (expected, found) = (entry.size, found.len());
                    return Err(self.unsealable(&name, Damage::Size { expected, found }));
                }
                None => {
                    let (crc64, size) = file_crc(&path)?;
                    FileEntry {
                        path: name,
                        size,
                        crc64,
                    }
                }
            };
            files.push(entry);
        }
        Ok(())
    }

    fn reference(&self) -> String {
        reference(&self.request.namespace, &self.request.name, None)
    }

    fn unsealable(&self, file: &str, damage: Damage) -> ImageError {
        ImageError::Unsealable {
            image: self.reference(),
            file: file.to_owned(),
            damage,
        }
    }
}

impl Drop for Partial {
    fn drop(&mut self) {
        if !self.sealed {
            // Errors leave it to the next sweep.
            let _ = remove_tree(&self.dir);
        }
        drop(self.lease.take());
        let _ = remove_unless_leased(&self.store, &self.id);
    }
}

fn lock_path(store: &ImageStore, id: &str) -> PathBuf {
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
