//! `[[images.tier]]`: where images have copies.

use serde::{Deserialize, Serialize};

use super::{S3Access, access::reached};
use crate::uri::ImagePlace;

/// A place that has copies of the images of some namespaces.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "RawTier", rename_all = "kebab-case")]
pub struct Tier {
    /// Where: `s3://bucket/`, `s3://bucket/prefix/`, `docker://host/repository`.
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
    /// The place itself.
    pub fn place(&self) -> Option<ImagePlace> {
        self.url.parse().ok()
    }

    /// Whether `place` is this tier, or lies in it.
    pub(super) fn has(&self, place: &ImagePlace) -> bool {
        self.place().is_some_and(|tier| tier.contains(place))
    }

    /// What is wrong with it: key, value and what is allowed.
    pub(super) fn fault(&self) -> Option<(&'static str, String, &'static str)> {
        let refuse = |key, value: &str, reason| Some((key, format!("{value:?}"), reason));
        match self.place() {
            Some(ImagePlace::Bucket { .. }) => {}
            Some(ImagePlace::Registry(_)) => return self.fault_of_registry(),
            None => {
                let reason = "a tier is a bucket, or a prefix that ends with a slash, s3://bucket/ or s3://bucket/prefix/, or a repository, docker://host/repository, without one";
                return refuse("images.tier.url", &self.url, reason);
            }
        }
        let (value, reason) = self.access.fault()?;
        Some(("images.tier.endpoint", value, reason))
    }

    fn fault_of_registry(&self) -> Option<(&'static str, String, &'static str)> {
        let S3Access {
            endpoint,
            region,
            path_style,
            profile,
            instance_metadata,
            ..
        } = &self.access;
        let of_buckets = [
            ("images.tier.region", region.is_some()),
            ("images.tier.path-style", path_style.is_some()),
            ("images.tier.profile", profile.is_some()),
            ("images.tier.instance-metadata", *instance_metadata),
        ];
        if let Some((key, _)) = of_buckets.into_iter().find(|(_, set)| *set) {
            let reason = "that is for buckets, and this tier is in a registry";
            return Some((key, format!("{:?}", self.url), reason));
        }
        let endpoint = endpoint.as_ref()?;
        let host = ["https://", "http://"]
            .iter()
            .find_map(|scheme| endpoint.strip_prefix(scheme));
        let plain = |host: &str| !host.is_empty() && !host.contains(['/', '@', '?', '#']);
        let reason = "the endpoint of a registry is https://host:port (or http://, unencrypted), and no more";
        (!host.is_some_and(plain))
            .then(|| ("images.tier.endpoint", format!("{endpoint:?}"), reason))
    }
}
