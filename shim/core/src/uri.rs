//! Where a dataset comes from, and where copies of images are.

use std::{fmt, str::FromStr};

mod place;

pub use place::{ImagePlace, PlaceError, Repository};

/// A dataset's source. Parsing it is total: what parses is safe to list, to log and to compare.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum DatasetUri {
    /// `s3://bucket/prefix/`: every object below the prefix. Without the closing slash the one object
    /// of that key.
    S3 {
        /// The bucket's name.
        bucket: String,
        /// The prefix or key, without a leading slash; may be empty (the whole bucket).
        key: String,
    },
    /// `file:///absolute/folder/`: a folder of the node, only where the node's configuration allows it.
    File {
        /// The absolute path, normal (no `.`, no `..`, no doubled slash).
        path: String,
    },
}

/// Why a URI was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum UriError {
    /// No scheme, or one that no source answers to.
    #[error(
        "{0:?} is not a dataset: allowed are s3://bucket/prefix/ and, where the node's configuration says so, file:///folder/"
    )]
    Scheme(String),
    /// A scheme that the design names and this build does not have.
    #[error("{0:?}: this build has no source for {1}://; allowed are s3:// and file://")]
    NotBuilt(String, &'static str),
    /// The bucket is not a bucket's name.
    #[error(
        "{uri:?}: {bucket:?} is not a bucket name (3 to 63 of a-z, 0-9, '.' and '-', beginning and ending with a letter or digit)"
    )]
    Bucket {
        /// The URI.
        uri: String,
        /// What stood in the bucket's place.
        bucket: String,
    },
    /// A path that climbs, or has an empty part or a control character.
    #[error(
        "{0:?}: a part of the path is empty, '.', '..', or has a control character, '?', '#' or '\\'"
    )]
    Path(String),
}

impl DatasetUri {
    /// Whether everything below the key is meant, not one object.
    pub fn is_prefix(&self) -> bool {
        match self {
            Self::S3 { key, .. } => key.is_empty() || key.ends_with('/'),
            Self::File { path } => path.ends_with('/'),
        }
    }
}

fn path_is_plain(path: &str) -> bool {
    let inner = path.strip_suffix('/').unwrap_or(path);
    path.is_empty()
        || inner.split('/').all(|part| {
            !part.is_empty()
                && part != "."
                && part != ".."
                && !part.contains(|c: char| c.is_control() || matches!(c, '?' | '#' | '\\'))
        })
}

fn is_bucket(name: &str) -> bool {
    let edge = |c: Option<char>| c.is_some_and(|c| c.is_ascii_lowercase() || c.is_ascii_digit());
    (3..=63).contains(&name.len())
        && edge(name.chars().next())
        && edge(name.chars().last())
        && name
            .chars()
            .all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || matches!(c, '.' | '-'))
        && !name.contains("..")
}

impl FromStr for DatasetUri {
    type Err = UriError;
    fn from_str(text: &str) -> Result<Self, UriError> {
        let shown = || text.chars().take(200).collect::<String>();
        // 1024 is S3's own limit for a key; more is never right and only fills logs.
        if text.len() > 1024 + 80 {
            return Err(UriError::Path(shown()));
        }
        let (scheme, rest) = text
            .split_once("://")
            .ok_or_else(|| UriError::Scheme(shown()))?;
        match scheme {
            "s3" => {
                let (bucket, key) = rest.split_once('/').unwrap_or((rest, ""));
                if !is_bucket(bucket) {
                    return Err(UriError::Bucket {
                        uri: shown(),
                        bucket: bucket.chars().take(80).collect(),
                    });
                }
                if !path_is_plain(key) {
                    return Err(UriError::Path(shown()));
                }
                Ok(Self::S3 {
                    bucket: bucket.to_owned(),
                    key: key.to_owned(),
                })
            }
            "file" => match rest.strip_prefix('/') {
                Some(inner) if !inner.is_empty() && path_is_plain(inner) => Ok(Self::File {
                    path: rest.to_owned(),
                }),
                _ => Err(UriError::Path(shown())),
            },
            "hf" => Err(UriError::NotBuilt(shown(), "hf")),
            "oci" => Err(UriError::NotBuilt(shown(), "oci")),
            "git+https" => Err(UriError::NotBuilt(shown(), "git+https")),
            _ => Err(UriError::Scheme(shown())),
        }
    }
}

impl fmt::Display for DatasetUri {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::S3 { bucket, key } => write!(f, "s3://{bucket}/{key}"),
            Self::File { path } => write!(f, "file://{path}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn what_is_refused() {
        for bad in [
            "",
            "model",
            "http://x/y",
            "s3://",
            "s3://A/x",
            "s3://ab/x",
            "s3://bucket/a//b",
            "s3://bucket/../x",
            "s3://bucket/./x",
            "s3://bucket/a?b",
            "s3://bucket//",
            "file://",
            "file:///",
            "file://etc",
            "file:///a/../b",
            "hf://org/name",
            "s3://bucket/a\nb",
        ] {
            assert!(bad.parse::<DatasetUri>().is_err(), "{bad:?}");
        }
    }

    #[test]
    fn what_is_understood() {
        for good in [
            "s3://bucket/",
            "s3://bucket/models/a/",
            "s3://my.bucket-1/key.bin",
            "file:///srv/data/",
        ] {
            assert_eq!(good.parse::<DatasetUri>().unwrap().to_string(), good);
        }
        assert!(matches!("s3://bucket".parse(), Ok(DatasetUri::S3 { key, .. }) if key.is_empty()));
    }

    proptest! {
        #[test]
        fn what_parses_never_climbs(text in ".{0,80}") {
            for candidate in [format!("s3://bucket/{text}"), format!("file:///{text}")] {
                if let Ok(uri) = candidate.parse::<DatasetUri>() {
                    prop_assert!(!uri.to_string().split('/').any(|part| part == ".."));
                    prop_assert_eq!(uri.to_string().parse::<DatasetUri>().unwrap(), uri);
                }
            }
        }
    }
}
