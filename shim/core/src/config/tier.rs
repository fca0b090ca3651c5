//! `[[images.tier]]`: object stores that have copies of images.

use serde::{Deserialize, Serialize};

use super::{S3Access, access::reached};
use crate::uri::DatasetUri;

/// An object store that has copies of the images of some namespaces.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "RawTier", rename_all = "kebab-case")]
pub struct Tier {
    /// Where: `s3://bucket/`, `s3://bucket/prefix/`.
    pub url: String,
    /// The namespaces whose images it has; `"*"` means all.
    pub namespaces: Vec<String>,
    /// How the store is reached.
    #[serde(flatten)]
    pub access: S3Access,
}

reached! {
    RawTier {
        url: String,
        namespaces: Vec<String>,
    }
}

impl From<RawTier> for Tier {
    fn from(raw: RawTier) -> Self {
        let (access, raw) = raw.split();
        Self {
            url: raw.url,
            namespaces: raw.namespaces,
            access,
        }
    }
}

impl Tier {
    /// The bucket, and what the keys in it begin with.
    pub fn place(&self) -> Option<(String, String)> {
        match self.url.parse() {
            Ok(DatasetUri::S3 { bucket, key }) => Some((bucket, key)),
            _ => None,
        }
    }

    /// What is wrong with it: key, value and what is allowed.
    pub(super) fn fault(&self) -> Option<(&'static str, String, &'static str)> {
        if !self.url.ends_with('/') || self.place().is_none() {
            let reason = "a tier is a bucket, or a prefix that ends with a slash: s3://bucket/ or s3://bucket/prefix/";
            return Some(("images.tier.url", format!("{:?}", self.url), reason));
        }
        let (value, reason) = self.access.fault()?;
        Some(("images.tier.endpoint", value, reason))
    }
}
