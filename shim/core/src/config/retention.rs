//! `[images.retention]`: which images may go, and how much room all of them may take.

use std::time::Duration;

use serde::{Deserialize, Serialize};

/// Which images are removed when somebody asks for room, `rekindle image gc`, and by the node's agent where there is one.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
pub struct Retention {
    /// So many generations of each name stay, from 1; none means all.
    pub keep: Option<u32>,
    /// What no container started from for this long goes, but for the newest generation of a name.
    pub idle: Option<Duration>,
    /// Then the newest generation goes too.
    pub idle_newest: bool,
    /// Bytes that all images together may take on the disk; none means what the file system can spare.
    pub quota: Option<u64>,
    /// Bytes that the images of each namespace may take on the disk; none means all of `quota`.
    pub namespace_quota: Option<u64>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default, rename_all = "kebab-case")]
pub(super) struct RawRetention {
    keep: Option<u32>,
    #[serde(deserialize_with = "crate::duration::deserialize")]
    idle: Option<Duration>,
    idle_newest: bool,
    #[serde(deserialize_with = "crate::size::deserialize")]
    quota: Option<u64>,
    #[serde(deserialize_with = "crate::size::deserialize")]
    namespace_quota: Option<u64>,
}

impl RawRetention {
    /// What is wrong with it: key, value and what is allowed.
    pub(super) fn fault(&self) -> Option<(&'static str, String, &'static str)> {
        if self.keep == Some(0) {
            let reason = "at least one generation is kept; `rekindle image rm` removes all";
            return Some(("images.retention.keep", "0".to_owned(), reason));
        }
        if self.idle_newest && self.idle.is_none() {
            let reason = "it says what images.retention.idle applies to, and that is not set";
            return Some(("images.retention.idle-newest", "true".to_owned(), reason));
        }
        None
    }

    pub(super) fn resolve(self) -> Retention {
        Retention {
            keep: self.keep,
            idle: self.idle,
            idle_newest: self.idle_newest,
            quota: self.quota,
            namespace_quota: self.namespace_quota,
        }
    }
}
