//! `manifest.json`: without it there is no dataset.

use std::{fs::File, io::Read, path::Path};

use rekindle_core::config::Verification;
use rekindle_store::{StoreError, crc::Crc64};
use serde::{Deserialize, Serialize};

use crate::{DatasetError, Version, listing::unsafe_path};

/// The manifest's name in a dataset's folder.
pub(crate) const FILE: &str = "manifest.json";
/// What is written today. A reader refuses what it does not know.
const FORMAT: u32 = 1;
/// 1e6 files of 300 bytes each, and room.
const MAX_BYTES: u64 = 1 << 30;

/// One file of a dataset.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileRecord {
    /// Its path below `files/`.
    pub path: String,
    /// Its size in bytes.
    pub size: u64,
    /// The store's ETag when it was fetched.
    pub etag: String,
    /// The checksum of the bytes as they were written.
    pub crc64nvme: Crc64,
    /// What the bytes were compared with before they were published.
    pub verified: Verification,
}

/// What a published dataset is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    /// The format of this file.
    pub format: u32,
    /// Where it came from.
    pub uri: String,
    /// From which endpoint; none means the scheme's own.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub endpoint: Option<String>,
    /// The hash of the listing.
    pub version: Version,
    /// When it was published, in seconds since 1970.
    pub published: u64,
    /// All files, sorted by path.
    pub files: Vec<FileRecord>,
}

impl Manifest {
    /// A manifest in today's format.
    #[cfg(feature = "s3")]
    pub(crate) fn new(
        uri: String,
        endpoint: Option<String>,
        version: Version,
        published: u64,
        files: Vec<FileRecord>,
    ) -> Self {
        Self {
            format: FORMAT,
            uri,
            endpoint,
            version,
            published,
            files,
        }
    }

    /// Reads and checks the manifest in `folder`; `None` when there is none, which means: no dataset.
    ///
    /// # Errors
    /// Not readable, not JSON, of another format, or with a path that climbs.
    pub(crate) fn read(folder: &Path) -> Result<Option<Self>, DatasetError> {
        let path = folder.join(FILE);
        let mut text = Vec::new();
        match File::open(&path).and_then(|file| file.take(MAX_BYTES).read_to_end(&mut text)) {
            Ok(_) => {}
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(StoreError::io("read", &path)(e).into()),
        }
        let refuse = |reason| DatasetError::Manifest {
            path: path.clone(),
            reason,
        };
        let manifest: Self = serde_json::from_slice(&text)
            .map_err(|e| refuse(format!("it is not a manifest ({e})")))?;
        if manifest.format != FORMAT {
            return Err(refuse(format!(
                "it has format {}, and this build reads format {FORMAT}",
                manifest.format
            )));
        }
        for file in &manifest.files {
            if let Some(reason) = unsafe_path(&file.path) {
                return Err(refuse(format!("{:?}: {reason}", file.path)));
            }
        }
        Ok(Some(manifest))
    }

    /// Bytes of all files.
    pub fn bytes(&self) -> u64 {
        self.files.iter().map(|file| file.size).sum()
    }

    /// The weakest verification of any file.
    pub fn weakest(&self) -> Verification {
        self.files
            .iter()
            .map(|file| file.verified)
            .min()
            .unwrap_or_default()
    }
}
