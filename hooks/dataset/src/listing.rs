//! What a store listed: bounded, safe to turn into paths, and named by a hash.

use std::{collections::BTreeSet, fmt, str::FromStr};

use rekindle_core::uri::DatasetUri;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::DatasetError;

/// More objects than this are refused: at 1000 keys a page that is a thousand requests before the first
/// byte, and a listing that does not end is what a broken store sends.
pub const MAX_OBJECTS: usize = 1_000_000;

/// Linux's limit for one part of a path, in bytes.
const MAX_PART: usize = 255;
/// S3's limit for a key, in bytes.
const MAX_KEY: usize = 1024;

/// The hash of a listing: 32 hex digits.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Version(String);

impl Version {
    /// As text: a plain folder name.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for Version {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        let hex = |b: u8| b.is_ascii_digit() || (b'a'..=b'f').contains(&b);
        if text.len() == 32 && text.bytes().all(hex) {
            return Ok(Self(text.to_owned()));
        }
        Err(format!(
            "{:?} is not a dataset's version (32 hex digits)",
            text.chars().take(40).collect::<String>()
        ))
    }
}

impl TryFrom<String> for Version {
    type Error = String;
    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl From<Version> for String {
    fn from(version: Version) -> Self {
        version.0
    }
}

/// The first 32 hex digits of a SHA-256: enough that nobody finds two listings with one name.
pub(crate) fn short_hash(parts: impl IntoIterator<Item = impl AsRef<[u8]>>) -> String {
    let mut hash = Sha256::new();
    for part in parts {
        let part = part.as_ref();
        // Length first, so that ("ab", "c") and ("a", "bc") differ.
        hash.update((part.len() as u64).to_le_bytes());
        hash.update(part);
    }
    hash.finalize()[..16]
        .iter()
        .map(|byte| format!("{byte:02x}"))
        .collect()
}

/// One object of a listing.
#[derive(Debug, Clone, PartialEq, Eq)]
#[cfg_attr(not(feature = "s3"), allow(dead_code, reason = "only fetching lists"))]
pub(crate) struct Object {
    /// Its path in the dataset.
    pub(crate) path: String,
    /// The store's key.
    pub(crate) key: String,
    pub(crate) size: u64,
    pub(crate) etag: String,
    /// What else identifies this state of the object: version id, or time of change.
    pub(crate) state: String,
    #[cfg(feature = "s3")]
    pub(crate) expected: crate::checksum::Expected,
}

/// A checked listing, sorted by path.
#[derive(Debug, Clone)]
#[cfg_attr(not(feature = "s3"), allow(dead_code, reason = "only fetching lists"))]
pub(crate) struct Listing {
    pub(crate) objects: Vec<Object>,
    pub(crate) bytes: u64,
    pub(crate) version: Version,
}

#[cfg_attr(not(feature = "s3"), allow(dead_code, reason = "only fetching lists"))]
impl Listing {
    /// Sorts, sums and names what was listed.
    pub(crate) fn new(uri: &DatasetUri, mut objects: Vec<Object>) -> Result<Self, DatasetError> {
        objects.sort_by(|a, b| a.path.cmp(&b.path));
        let too_large = || DatasetError::Listing {
            uri: uri.to_string(),
            reason: "the sizes add up to more than 2^63 bytes".to_owned(),
        };
        let mut bytes = 0_u64;
        for object in &objects {
            bytes = bytes
                .checked_add(object.size)
                .filter(|sum| i64::try_from(*sum).is_ok())
                .ok_or_else(too_large)?;
        }
        let fields = objects.iter().flat_map(|object| {
            [
                object.path.clone(),
                object.size.to_string(),
                object.etag.clone(),
                object.state.clone(),
            ]
        });
        let version = Version(short_hash(fields));
        Ok(Self {
            objects,
            bytes,
            version,
        })
    }
}

/// Keys on their way to becoming paths.
#[derive(Debug)]
#[cfg_attr(not(feature = "s3"), allow(dead_code, reason = "only fetching lists"))]
pub(crate) struct Keys<'a> {
    uri: &'a DatasetUri,
    prefix: &'a str,
    paths: BTreeSet<String>,
}

#[cfg_attr(not(feature = "s3"), allow(dead_code, reason = "only fetching lists"))]
impl<'a> Keys<'a> {
    pub(crate) fn below(uri: &'a DatasetUri, prefix: &'a str) -> Self {
        Self {
            uri,
            prefix,
            paths: BTreeSet::new(),
        }
    }

    /// The path of one listed key; `None` for a folder marker, an empty object whose key ends with a slash.
    pub(crate) fn admit(&mut self, key: &str, size: i64) -> Result<Option<String>, DatasetError> {
        let refuse = |reason| DatasetError::Key {
            uri: self.uri.to_string(),
            key: key.chars().take(200).collect(),
            reason,
        };
        let path = key
            .strip_prefix(self.prefix)
            .ok_or_else(|| refuse("it does not lie below the prefix that was asked for"))?;
        if size < 0 {
            return Err(refuse("its size is negative"));
        }
        if path.is_empty() || path.ends_with('/') {
            // Folders as the S3 console makes them.
            return match size {
                0 => Ok(None),
                _ => Err(refuse("it ends with a slash and has bytes")),
            };
        }
        if let Some(reason) = unsafe_path(path) {
            return Err(refuse(reason));
        }
        if !self.paths.insert(path.to_owned()) {
            return Err(refuse("it is listed twice"));
        }
        if self.paths.len() > MAX_OBJECTS {
            return Err(DatasetError::Listing {
                uri: self.uri.to_string(),
                reason: format!("there are more than {MAX_OBJECTS} objects"),
            });
        }
        Ok(Some(path.to_owned()))
    }

    /// When all keys are in: no path is a file and a folder at once.
    pub(crate) fn finish(self) -> Result<(), DatasetError> {
        for path in &self.paths {
            for (at, _) in path.match_indices('/') {
                if self.paths.contains(&path[..at]) {
                    return Err(DatasetError::Key {
                        uri: self.uri.to_string(),
                        key: path.chars().take(200).collect(),
                        reason: "a part of its path is the key of another object",
                    });
                }
            }
        }
        if self.paths.is_empty() {
            return Err(DatasetError::Listing {
                uri: self.uri.to_string(),
                reason: "there is nothing below it".to_owned(),
            });
        }
        Ok(())
    }
}

/// Why `path` must not be created below a folder of ours.
pub(crate) fn unsafe_path(path: &str) -> Option<&'static str> {
    if path.len() > MAX_KEY {
        return Some("it is longer than 1024 bytes");
    }
    if path.contains(char::is_control) {
        return Some("it has a control character");
    }
    path.split('/').find_map(|part| match part {
        "" => Some("a part of its path is empty"),
        "." | ".." => Some("a part of its path is '.' or '..'"),
        _ if part.len() > MAX_PART => Some("a part of its path is longer than 255 bytes"),
        _ => None,
    })
}

#[cfg(test)]
mod tests;
