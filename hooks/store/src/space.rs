//! Whether there is room, asked before anything is written.

use std::path::Path;

use rustix::fs::statvfs;

use crate::StoreError;

/// Kept free on the store's file system whatever is asked for: below some such mark other programs of
/// the node fail, and the kubelet begins to evict pods (its default for the node's disk is 10 %).
pub const RESERVE: u64 = 256 << 20;

/// Refuses when `needed` bytes do not fit below `path`. On file systems larger than 16 times the
/// [`RESERVE`] the reserve must stay free as well; smaller ones (test mounts) may be filled.
///
/// # Errors
/// [`StoreError::NoSpace`], or what the file system says.
pub fn require(path: &Path, needed: u64) -> Result<(), StoreError> {
    let stat =
        statvfs(path).map_err(|e| StoreError::io("ask for the free space of", path)(e.into()))?;
    let total = stat.f_blocks.saturating_mul(stat.f_frsize);
    let free = stat.f_bavail.saturating_mul(stat.f_frsize);
    let reserve = if total > 16 * RESERVE { RESERVE } else { 0 };
    if needed.saturating_add(reserve) > free {
        return Err(StoreError::NoSpace {
            path: path.to_owned(),
            needed,
            free: free.saturating_sub(reserve),
        });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_petabyte_does_not_fit() {
        let root = tempfile::tempdir().unwrap();
        require(root.path(), 1).unwrap();
        let refused = require(root.path(), 1 << 60).unwrap_err();
        assert!(
            refused.is_full() && refused.to_string().contains("are free"),
            "{refused}"
        );
    }
}
