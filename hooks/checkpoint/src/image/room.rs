//! How much room there is in memory, and who has been promised some of it.
//!
//! Who puts an image into memory is promised room for it before the first byte, and who comes next counts what is
//! promised as taken: two that begin at once do not both get the last of it. A promise is the text of the lock of a partial
//! folder, and is gone with that.

use std::{fs, path::Path};

use rekindle_core::config::Memory;
use rekindle_store::Lock;

use super::{
    ImageError, ImageStore,
    folder::{Folder, lock_path, new_dir},
    inventory::{bytes_below, file_system, ids},
    places::require_memory,
    store::PARTIAL,
};

/// Held while room is looked for and promised.
const ROOM_LOCK: &str = ".room.lock";
/// Of the node's memory, this part stays available whatever the quota says. The kubelet evicts pods below 100 MiB
/// (`evictionHard`, `memory.available<100Mi`), and who is killed first for want of memory is a container.
const SPARED: u64 = 16;

/// The node's memory, bytes.
#[derive(Debug, Clone, Copy)]
struct Node {
    total: u64,
    available: u64,
}

/// What there is in memory.
#[derive(Debug, Clone, Copy)]
struct Taken {
    /// Bytes of files.
    there: u64,
    /// Bytes that are promised and not there yet.
    promised: u64,
}

/// Bytes that the next one may take. `tmpfs` is what the file system has free, where it has a limit.
fn free(quota: u64, taken: Taken, tmpfs: Option<u64>, node: Node) -> u64 {
    let spared = node.total / SPARED;
    [
        quota.saturating_sub(taken.there),
        tmpfs.unwrap_or(u64::MAX),
        node.available.saturating_sub(spared),
    ]
    .into_iter()
    .min()
    .unwrap_or(0)
    .saturating_sub(taken.promised)
}

impl ImageStore {
    /// A partial folder in memory for `bytes`, and how many may go into it at most; none where they do not fit. `more` is
    /// what is promised beyond them, where there is that much.
    pub(super) fn room_in_memory(
        &self,
        id: &str,
        bytes: u64,
        more: u64,
    ) -> Result<Option<(Folder, u64)>, ImageError> {
        let Some(memory) = &self.memory else {
            return Ok(None);
        };
        let partials = memory.root.join(PARTIAL);
        // It may have been emptied, or unmounted.
        require_memory(&memory.root)?;
        new_dir(&partials)?;
        let _alone = Lock::acquire(&memory.root.join(ROOM_LOCK))?;
        let free = room(memory)?;
        if bytes > free {
            tracing::debug!(bytes, free, "not in memory: there is no room for it");
            return Ok(None);
        }
        let Some(folder) = Folder::hold(&partials, id)? else {
            return Ok(None);
        };
        new_dir(&folder.dir)?;
        let lock = lock_path(&partials, id);
        let promised = bytes.saturating_add(more).min(free);
        fs::write(&lock, promised.to_string()).map_err(ImageError::io("write", &lock))?;
        Ok(Some((folder, free)))
    }
}

/// Bytes that are free and promised to nobody.
fn room(memory: &Memory) -> Result<u64, ImageError> {
    let partials = memory.root.join(PARTIAL);
    let mut promised = 0_u64;
    for id in ids(&partials)? {
        let text = fs::read_to_string(lock_path(&partials, &id)).unwrap_or_default();
        let bytes = text.parse::<u64>().unwrap_or(0);
        promised += bytes.saturating_sub(bytes_below(&partials.join(id))?);
    }
    let taken = Taken {
        there: bytes_below(&memory.root)?,
        promised,
    };
    // A ramfs has no limit, and says nothing of one.
    let tmpfs = file_system(&memory.root)?;
    let tmpfs = (tmpfs.total > 0).then_some(tmpfs.available);
    Ok(free(memory.quota, taken, tmpfs, node()?))
}

fn node() -> Result<Node, ImageError> {
    let path = Path::new("/proc/meminfo");
    let text = fs::read_to_string(path).map_err(ImageError::io("read", path))?;
    let bytes = |key: &str| {
        let line = text.lines().find_map(|line| line.strip_prefix(key))?;
        let kib = line.trim_start_matches(':').split_whitespace().next()?;
        Some(kib.parse::<u64>().ok()? << 10)
    };
    Ok(Node {
        total: bytes("MemTotal").unwrap_or(0),
        available: bytes("MemAvailable").unwrap_or(0),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_least_of_quota_file_system_and_node_is_free() {
        let node = Node {
            total: 1600,
            available: 1000,
        };
        let taken = |there, promised| Taken { there, promised };
        assert_eq!(free(500, taken(0, 0), None, node), 500);
        assert_eq!(free(500, taken(400, 0), None, node), 100);
        assert_eq!(free(500, taken(600, 0), None, node), 0);
        // A sixteenth of the node's memory is spared.
        assert_eq!(free(5000, taken(0, 0), None, node), 900);
        assert_eq!(free(5000, taken(0, 0), Some(70), node), 70);
        // What is promised is nobody else's, whichever of them is the least.
        assert_eq!(free(500, taken(100, 300), None, node), 100);
        assert_eq!(free(5000, taken(0, 300), None, node), 600);
        assert_eq!(free(5000, taken(0, 300), Some(70), node), 0);
    }
}
