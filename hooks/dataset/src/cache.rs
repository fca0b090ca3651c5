//! What is on this node. Local and blocking; the shim uses nothing else.

use std::{
    fs::{self, DirBuilder},
    io,
    os::unix::fs::DirBuilderExt,
    path::{Path, PathBuf},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use rekindle_core::{
    config::{Datasets, Verification},
    uri::DatasetUri,
};
use rekindle_store::{Lock, StoreError, crc, remove_tree, sync_dir};

use crate::{
    DatasetError, Version,
    listing::short_hash,
    manifest::{self, Manifest},
};

/// The folder of one URI and endpoint: the same for every namespace, so that one copy serves all who may
/// have it.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct DatasetKey(String);

impl DatasetKey {
    /// The key of a URI as one endpoint serves it.
    pub fn new(uri: &DatasetUri, endpoint: Option<&str>) -> Self {
        Self(short_hash([
            uri.to_string().as_str(),
            endpoint.unwrap_or_default(),
        ]))
    }
}

/// One published dataset.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DatasetInfo {
    /// Where it came from.
    pub uri: String,
    /// From which endpoint; none means the scheme's own.
    pub endpoint: Option<String>,
    /// Its key in the cache.
    pub key: DatasetKey,
    /// The hash of its listing.
    pub version: Version,
    /// The folder to bind, read-only.
    pub path: PathBuf,
    /// Bytes of all files.
    pub bytes: u64,
    /// Number of files.
    pub files: u64,
    /// The weakest verification of any file.
    pub verified: Verification,
    /// When it was published.
    pub published: SystemTime,
}

/// A file that is not what the manifest says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Damage {
    /// Its path in the dataset.
    pub path: String,
    /// What was found, what was expected.
    pub found: String,
}

/// The datasets of one root.
#[derive(Debug, Clone)]
pub struct Cache {
    root: PathBuf,
}

impl Cache {
    /// The cache that the configuration names. Nothing is created or read yet.
    pub fn open(config: &Datasets) -> Self {
        Self {
            root: config.root.clone(),
        }
    }

    /// All published datasets, newest first. A cache that does not exist has none.
    ///
    /// # Errors
    /// What the file system says, or the first manifest that cannot be read.
    pub fn list(&self) -> Result<Vec<DatasetInfo>, DatasetError> {
        let mut found = Vec::new();
        for key in names(&self.root)? {
            found.extend(self.versions(&DatasetKey(key))?);
        }
        found.sort_by(|a, b| b.published.cmp(&a.published).then(a.uri.cmp(&b.uri)));
        Ok(found)
    }

    /// All published versions of one key, newest first.
    ///
    /// # Errors
    /// As [`Cache::list`].
    pub fn versions(&self, key: &DatasetKey) -> Result<Vec<DatasetInfo>, DatasetError> {
        let mut found = Vec::new();
        for name in names(&self.root.join(&key.0))? {
            if let Ok(version) = name.parse() {
                found.extend(self.get(key, &version)?);
            }
        }
        found.sort_by_key(|info| std::cmp::Reverse(info.published));
        Ok(found)
    }

    /// One published version, or `None`.
    ///
    /// # Errors
    /// What the file system says, or a manifest that cannot be read.
    pub fn get(
        &self,
        key: &DatasetKey,
        version: &Version,
    ) -> Result<Option<DatasetInfo>, DatasetError> {
        let folder = self.folder(key, version);
        let Some(manifest) = Manifest::read(&folder)? else {
            return Ok(None);
        };
        Ok(Some(DatasetInfo {
            key: key.clone(),
            version: version.clone(),
            path: folder.join("files"),
            bytes: manifest.bytes(),
            files: manifest.files.len() as u64,
            verified: manifest.weakest(),
            published: UNIX_EPOCH + Duration::from_secs(manifest.published),
            uri: manifest.uri,
            endpoint: manifest.endpoint,
        }))
    }

    /// The dataset whose files lie at `path` (as [`DatasetInfo::path`] gives it), or `None` when nothing
    /// of this cache is published there.
    ///
    /// # Errors
    /// As [`Cache::get`].
    pub fn at(&self, path: &Path) -> Result<Option<DatasetInfo>, DatasetError> {
        let Ok(inner) = path.strip_prefix(&self.root) else {
            return Ok(None);
        };
        let parts: Vec<_> = inner.iter().filter_map(|part| part.to_str()).collect();
        let [key, version, "files"] = parts[..] else {
            return Ok(None);
        };
        match (key.parse::<Version>(), version.parse()) {
            (Ok(_), Ok(version)) => self.get(&DatasetKey(key.to_owned()), &version),
            _ => Ok(None),
        }
    }

    /// The manifest of a published dataset.
    ///
    /// # Errors
    /// As [`Cache::get`]; also when it has been removed meanwhile.
    pub fn manifest(&self, info: &DatasetInfo) -> Result<Manifest, DatasetError> {
        let folder = self.folder(&info.key, &info.version);
        Manifest::read(&folder)?.ok_or_else(|| DatasetError::Manifest {
            path: folder.join(manifest::FILE),
            reason: "it is gone".to_owned(),
        })
    }

    /// A lease: as long as it is held, the dataset is not removed. Whoever binds a dataset into a
    /// container holds one until the container is gone; the kernel releases it when the holder dies.
    /// `None`: it is being removed right now.
    ///
    /// # Errors
    /// What the file system says.
    pub fn lease(&self, info: &DatasetInfo) -> Result<Option<Lock>, DatasetError> {
        let lock = Lock::try_share(&self.lease_path(&info.key, &info.version))?;
        // Between the lookup and the lease it may have been removed.
        Ok(match self.get(&info.key, &info.version)? {
            Some(_) => lock,
            None => None,
        })
    }

    /// Reads every file of a dataset and compares it with the manifest.
    ///
    /// # Errors
    /// As [`Cache::manifest`]. What is damaged is in the answer, not an error.
    pub fn verify(
        &self,
        info: &DatasetInfo,
        mut on_bytes: impl FnMut(u64),
    ) -> Result<Vec<Damage>, DatasetError> {
        let mut damaged = Vec::new();
        for file in self.manifest(info)?.files {
            let found = match crc::file_crc(&info.path.join(&file.path)) {
                Ok((crc, size)) if (crc, size) == (file.crc64nvme, file.size) => None,
                Ok((crc, size)) => Some(format!(
                    "{size} bytes with CRC {crc}, expected {} with CRC {}",
                    file.size, file.crc64nvme
                )),
                Err(StoreError::Io { source, .. }) => Some(source.to_string()),
                Err(other) => return Err(other.into()),
            };
            on_bytes(file.size);
            damaged.extend(found.map(|found| Damage {
                path: file.path,
                found,
            }));
        }
        Ok(damaged)
    }

    /// Removes a dataset: its manifest first, so that at no moment half of it is there.
    ///
    /// # Errors
    /// [`DatasetError::InUse`] when anybody holds a lease; what the file system says.
    pub fn remove(&self, info: &DatasetInfo) -> Result<(), DatasetError> {
        let _alone =
            Lock::try_acquire(&self.lease_path(&info.key, &info.version))?.ok_or_else(|| {
                DatasetError::InUse {
                    uri: info.uri.clone(),
                    version: info.version.to_string(),
                }
            })?;
        let folder = self.folder(&info.key, &info.version);
        let manifest = folder.join(manifest::FILE);
        match fs::remove_file(&manifest) {
            Ok(()) => sync_dir(&folder)?,
            Err(e) if e.kind() == io::ErrorKind::NotFound => {}
            Err(e) => return Err(StoreError::io("remove", &manifest)(e).into()),
        }
        remove_tree(&folder)?;
        Ok(())
    }

    pub(crate) fn folder(&self, key: &DatasetKey, version: &Version) -> PathBuf {
        self.root.join(&key.0).join(version.as_str())
    }

    fn lease_path(&self, key: &DatasetKey, version: &Version) -> PathBuf {
        self.root.join(&key.0).join(format!("{version}.lease"))
    }

    /// The folder of a key, made if need be: below it nobody but root looks for names.
    #[cfg_attr(not(feature = "s3"), allow(dead_code, reason = "only fetching writes"))]
    pub(crate) fn key_folder(&self, key: &DatasetKey) -> Result<PathBuf, DatasetError> {
        let folder = self.root.join(&key.0);
        DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(&folder)
            .map_err(StoreError::io("make", &folder))?;
        Ok(folder)
    }
}

/// The names in a folder; none when it does not exist.
fn names(folder: &Path) -> Result<Vec<String>, DatasetError> {
    let entries = match fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(e)
            if matches!(
                e.kind(),
                io::ErrorKind::NotFound | io::ErrorKind::NotADirectory
            ) =>
        {
            return Ok(Vec::new());
        }
        Err(e) => return Err(StoreError::io("list", folder)(e).into()),
    };
    entries
        .map(|entry| entry.map(|entry| entry.file_name().into_string().ok()))
        .filter_map(Result::transpose)
        .collect::<Result<_, _>>()
        .map_err(|e| StoreError::io("list", folder)(e).into())
}
