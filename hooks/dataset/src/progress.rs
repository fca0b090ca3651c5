//! How far a download is.

use serde::{Deserialize, Serialize};

/// How far a download is: ours, or that of the process we wait for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Progress {
    /// Bytes that are in the partial folder.
    pub done: u64,
    /// Bytes of the whole dataset.
    pub total: u64,
    /// Files that are complete and verified.
    pub files_done: u64,
    /// Files of the whole dataset.
    pub files_total: u64,
    /// Bytes a second, over the last few seconds.
    pub bytes_per_second: u64,
}
