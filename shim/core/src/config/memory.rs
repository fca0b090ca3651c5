//! `[images.memory]`: images in memory, in front of those on the disk.

use std::{
    path::{Path, PathBuf},
    time::Duration,
};

use serde::{Deserialize, Serialize};

use crate::paths;

/// How long an image stays in memory that no container starts from. What is started from once an hour comes from memory,
/// and of what is not, the disk has a copy.
const IDLE: Duration = Duration::from_secs(3600);

/// Images in memory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Memory {
    /// Where they lie: below a tmpfs.
    pub root: PathBuf,
    /// Bytes that all of them together may take.
    pub quota: u64,
    /// Bytes that those of each namespace may take; none means all of `quota`.
    pub namespace_quota: Option<u64>,
    /// What a container started from within this time belongs into memory, as far as it fits; what none did leaves it.
    pub idle: Duration,
}

impl Memory {
    /// Nothing is put there; what is there is found.
    pub fn to_read(root: &Path) -> Self {
        Self {
            root: root.to_owned(),
            quota: 0,
            namespace_quota: None,
            idle: IDLE,
        }
    }
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default, rename_all = "kebab-case")]
pub(super) struct RawMemory {
    pub(super) root: Option<PathBuf>,
    #[serde(deserialize_with = "crate::size::deserialize")]
    quota: Option<u64>,
    #[serde(deserialize_with = "crate::size::deserialize")]
    namespace_quota: Option<u64>,
    #[serde(deserialize_with = "crate::duration::deserialize")]
    idle: Option<Duration>,
}

impl RawMemory {
    /// None where there is no room for any.
    pub(super) fn resolve(self) -> Option<Memory> {
        let quota = self.quota.filter(|quota| *quota > 0)?;
        Some(Memory {
            root: self.root.unwrap_or_else(|| paths::MEMORY_DIR.into()),
            quota,
            namespace_quota: self.namespace_quota,
            idle: self.idle.unwrap_or(IDLE),
        })
    }
}
