//! Where the memory lies that restores have asked for first: what is fetched first of an image that is not on the node.

use std::{
    collections::{BTreeMap, btree_map::Entry},
    ops::Range,
    path::Path,
};

use super::serve::{FAULT_BLOCK, Missing, pages_stream};
use crate::touches::Touch;

/// The parts of an image's streams that have the noted blocks, in the order of the note. `criu_dir` has CRIU's files; of a
/// process whose files are not there or cannot be read, there is none.
pub(crate) fn first_parts(criu_dir: &Path, noted: &[Touch]) -> Vec<(String, Range<u64>)> {
    let mut processes = BTreeMap::new();
    let mut parts = Vec::new();
    for touch in noted {
        let process = match processes.entry(touch.pid()) {
            Entry::Occupied(known) => known.into_mut(),
            Entry::Vacant(new) => new.insert(Missing::read(criu_dir, touch.pid()).ok()),
        };
        let Some((memory, pages_id)) = process else {
            continue;
        };
        let end = touch.vaddr().saturating_add(FAULT_BLOCK);
        let pieces = memory.overlapping(touch.vaddr(), end);
        let name = pages_stream(*pages_id);
        parts.extend(pieces.map(|piece| (name.clone(), piece.at..piece.at + piece.bytes)));
    }
    parts
}
