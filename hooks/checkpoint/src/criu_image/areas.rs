//! What the mappings of a process are for.

use std::path::Path;

use serde::Serialize;

use super::{
    CriuImageError,
    mappings::{GUARD, MM_MAGIC},
    remaps::each_record,
    wire,
};

/// Bits of a mapping's status (`VMA_*` of `criu/include/image.h`).
const VSYSCALL: u64 = 1 << 2;
const VDSO: u64 = 1 << 3;
const HEAP: u64 = 1 << 5;
const FILE_PRIVATE: u64 = 1 << 6;
const FILE_SHARED: u64 = 1 << 7;
const ANON_SHARED: u64 = 1 << 8;
const SYSVIPC: u64 = 1 << 10;
const VVAR: u64 = 1 << 12;
const SHADOW_STACK: u64 = 1 << 15;

/// What a mapping is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum AreaKind {
    /// The heap that grows by `brk`.
    Heap,
    /// The first thread's stack. Those of further threads are anonymous.
    Stack,
    /// Memory of no file, of this process alone: `malloc`, arenas, further stacks.
    Anonymous,
    /// Pages of a file, that the process has changed.
    File,
    /// Memory that processes share.
    Shared,
    /// The kernel's own: vdso, vvar.
    Kernel,
}

/// A mapping of a process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Area {
    /// Its first address.
    pub start: u64,
    /// The first address behind it.
    pub end: u64,
    /// What it is for.
    pub kind: AreaKind,
    /// The number of its file, or of its shared memory; 0 where it has none.
    pub object: u64,
}

/// The mappings of process `pid` of the image in `dir`, ascending; none where there is no such process.
///
/// # Errors
/// When the file that lists them cannot be read, or lists what no process could have.
pub fn areas(dir: &Path, pid: u32) -> Result<Vec<Area>, CriuImageError> {
    let mut all: Vec<Area> = Vec::new();
    let mut stack = None;
    let path = dir.join(format!("mm-{pid}.img"));
    each_record(&path, MM_MAGIC, |message| {
        let mut malformed = None;
        wire::fields(message, |field, _| match field.number {
            5 => stack = field.value,
            14 => match area(field.bytes) {
                Ok(area) => all.extend(area),
                Err(what) => malformed = Some(what),
            },
            _ => {}
        })?;
        malformed.map_or(Ok(()), Err)
    })?;
    // CRIU has a bit for the stack, and does not set it; it says where the stack began.
    let is_stack = |area: &&mut Area| {
        let here = stack.is_some_and(|stack| (area.start..area.end).contains(&stack));
        here && area.kind == AreaKind::Anonymous
    };
    for area in all.iter_mut().filter(is_stack) {
        area.kind = AreaKind::Stack;
    }
    all.sort_by_key(|area| (area.start, area.end));
    if all.windows(2).any(|pair| pair[0].end > pair[1].start) {
        return Err(CriuImageError::Malformed {
            path,
            what: "its mappings overlap",
        });
    }
    Ok(all)
}

/// A mapping; none for a range of guard pages.
fn area(message: &[u8]) -> Result<Option<Area>, &'static str> {
    let (mut start, mut end, mut object, mut status) = (None, None, 0, 0);
    wire::fields(message, |field, _| match field.number {
        1 => start = field.value,
        2 => end = field.value,
        4 => object = field.value.unwrap_or_default(),
        7 => status = field.value.unwrap_or_default(),
        _ => {}
    })?;
    let (start, end) = start.zip(end).ok_or("a mapping has no address")?;
    if start >= end {
        return Err("a mapping ends before it begins");
    }
    let has = |bits: u64| status & bits != 0;
    let kind = if has(VDSO | VVAR | VSYSCALL) {
        AreaKind::Kernel
    } else if has(ANON_SHARED | SYSVIPC) {
        AreaKind::Shared
    } else if has(FILE_PRIVATE | FILE_SHARED) {
        AreaKind::File
    } else if has(HEAP) {
        AreaKind::Heap
    } else if has(SHADOW_STACK) {
        AreaKind::Stack
    } else {
        AreaKind::Anonymous
    };
    let named = matches!(kind, AreaKind::File | AreaKind::Shared);
    let area = Area {
        start,
        end,
        kind,
        object: if named { object } else { 0 },
    };
    Ok((status & GUARD == 0).then_some(area))
}
