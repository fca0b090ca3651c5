//! How an S3 store is reached, and as whom: the same keys wherever a table of the configuration names one.

use std::path::PathBuf;

use serde::Serialize;

/// How an S3 store is reached, and as whom.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize)]
#[serde(rename_all = "kebab-case")]
pub struct S3Access {
    /// `https://host:port`; none means AWS.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub endpoint: Option<String>,
    /// The region to sign for; none means the SDK's chain, then `us-east-1`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub region: Option<String>,
    /// `endpoint/bucket/key` instead of `bucket.endpoint/key`. Defaults to true with an `endpoint`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub path_style: Option<bool>,
    /// PEM file of extra certificate authorities.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ca_file: Option<PathBuf>,
    /// AWS shared-credentials file for this store, instead of the SDK's chain.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub credentials_file: Option<PathBuf>,
    /// Profile in the credentials file.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub profile: Option<String>,
    /// Send no credentials at all.
    pub anonymous: bool,
    /// Ask the instance metadata service for credentials. Off unless asked for: off AWS it only stalls.
    pub instance_metadata: bool,
}

impl S3Access {
    /// What is wrong with it: the value of `endpoint`, and what is allowed.
    pub(super) fn fault(&self) -> Option<(String, &'static str)> {
        let endpoint = self.endpoint.as_ref()?;
        let known = endpoint.starts_with("https://") || endpoint.starts_with("http://");
        let reason = "an endpoint begins with https:// (or http://, unencrypted)";
        (!known).then(|| (format!("{endpoint:?}"), reason))
    }
}

/// A table as it is written, with the keys of [`S3Access`] among its own. serde's `flatten` would take them from a type
/// of theirs, and then no longer says which keys there are when it meets one that there is not.
macro_rules! reached {
    ($name:ident { $($(#[$meta:meta])* $field:ident: $type:ty,)* }) => {
        #[derive(Debug, serde::Deserialize)]
        #[serde(deny_unknown_fields, rename_all = "kebab-case")]
        struct $name {
            $($(#[$meta])* $field: $type,)*
            #[serde(default)]
            endpoint: Option<String>,
            #[serde(default)]
            region: Option<String>,
            #[serde(default)]
            path_style: Option<bool>,
            #[serde(default)]
            ca_file: Option<std::path::PathBuf>,
            #[serde(default)]
            credentials_file: Option<std::path::PathBuf>,
            #[serde(default)]
            profile: Option<String>,
            #[serde(default)]
            anonymous: bool,
            #[serde(default)]
            instance_metadata: bool,
        }

        impl $name {
            /// The keys of the access, and the table without them.
            fn split(mut self) -> ($crate::config::S3Access, Self) {
                let access = $crate::config::S3Access {
                    endpoint: self.endpoint.take(),
                    region: self.region.take(),
                    path_style: self.path_style.take(),
                    ca_file: self.ca_file.take(),
                    credentials_file: self.credentials_file.take(),
                    profile: self.profile.take(),
                    anonymous: self.anonymous,
                    instance_metadata: self.instance_metadata,
                };
                (access, self)
            }
        }
    };
}

pub(super) use reached;
