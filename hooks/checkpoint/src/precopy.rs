//! Pre-copy: most of the memory is stored while the tasks still run, so that they are stopped only for what
//! they have written since.
//!
//! ```text
//!  tasks   ──run──┤mark├──run──┤mark├──run──┤ stopped for the dump ├──▶
//!  we                   copy all     copy what     settle: what is still
//!                                    was written   as it was copied ─▶ Precopied
//! ```
//! [`Precopy::mark`] asks the kernel to remember from now on which pages are written. It is to be called only while
//! the tasks are held: what the hardware writes into a page for a call that is under way (a read past the page cache)
//! is not remembered. [`Precopy::settle`] is called when they are stopped for good, and keeps what is as it was copied:
//! a page that is still there, in a mapping that is still watched, and was not written since its mark. Everything else is
//! read by the dump itself. So nothing here is needed, and whatever it does not understand it leaves out.
//!
//! The kernel remembers by asynchronous write protection (Linux 6.7), for which the process itself has to open a
//! [`userfaultfd`]. Soft-dirty bits, by which CRIU's pre-dump goes, need nothing of the process and are of no use: each
//! new mapping that the kernel joins to one beside it makes all of that look written (measured on 6.12: a program that
//! allocates megabytes at a time had no clean page left).

use std::{
    collections::HashMap,
    fs::File,
    io::{self, IoSliceMut},
    mem,
    ops::Range,
    os::fd::OwnedFd,
    time::Instant,
};

use nix::{
    sys::uio::{RemoteIoVec, process_vm_readv},
    unistd::Pid,
};

use crate::{
    chunks::{CHUNK, ChunkError, ChunkWriter, Part, Room},
    pages::{Task, Tasks, start_time},
    parallel::{BUFFER, in_parallel},
};

mod areas;
mod kernel;
mod tracker;
pub mod userfaultfd;

use kernel::Ask;
use tracker::{Tracker, find};

/// Blocks that are read at a time.
const BATCH: usize = BUFFER / CHUNK;

/// The memory of a container's tasks, while they run.
#[derive(Debug)]
pub struct Precopy(Vec<Memory>);

/// What is stored of the memory of stopped tasks already.
#[derive(Debug, Default)]
pub struct Precopied(HashMap<i32, HashMap<u64, Cell>>);

/// One task's.
#[derive(Debug)]
struct Memory {
    task: Task,
    begun: u64,
    tracker: Tracker,
    /// What was copied, by block, and was as it was copied at the last mark.
    cells: HashMap<u64, Cell>,
}

/// The pages of one aligned block of [`CHUNK`] bytes, as one chunk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Cell {
    /// Which: bit n is the page n of the block.
    pages: u64,
    part: Part,
}

/// The pages of one block that are there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Block {
    number: u64,
    pages: u64,
}

impl Precopy {
    /// For tasks that run, as far as there are userfaultfds of them, by their numbers here. None where no task can be
    /// watched.
    pub fn new(tasks: &Tasks, mut userfaultfds: HashMap<i32, OwnedFd>) -> Option<Self> {
        let watched = tasks.all().into_iter().filter_map(|task| {
            Some(Memory {
                tracker: Tracker::new(userfaultfds.remove(&task.pid)?)?,
                begun: start_time(task.pid).ok()?,
                task,
                cells: HashMap::new(),
            })
        });
        let memories: Vec<Memory> = watched.collect();
        (!memories.is_empty()).then_some(Self(memories))
    }

    /// Watches from here on. Only while the tasks are held.
    pub fn mark(&mut self) {
        self.0.retain_mut(|memory| {
            memory.settle();
            // What cannot be watched is left to the dump: it has ended, say.
            memory.tracker.mark(memory.task.pid).is_ok()
        });
    }

    /// Stores, while the tasks run, what has not been stored as it was at the last mark. What is left at `until` is
    /// left to the dump. Bytes that were stored.
    ///
    /// # Errors
    /// When a chunk cannot be stored.
    pub fn copy(&mut self, writer: &ChunkWriter, until: Instant) -> Result<u64, ChunkError> {
        let mut bytes = 0;
        for memory in &mut self.0 {
            bytes += memory.copy(writer, until)?;
        }
        Ok(bytes)
    }

    /// Bytes in blocks that have been written since the last mark, about.
    pub fn written(&self) -> u64 {
        let written = self.0.iter().map(|memory| {
            let pages = find(memory.task.pid, Ask::Written).unwrap_or_default();
            split(&pages).len() as u64 * CHUNK as u64
        });
        written.sum()
    }

    /// What need not be read again. Only while the tasks are stopped, and until they go on.
    pub fn settle(&mut self) -> Precopied {
        let settle = |memory: &mut Memory| {
            memory.settle();
            (memory.task.container_pid, mem::take(&mut memory.cells))
        };
        Precopied(self.0.iter_mut().map(settle).collect())
    }
}

impl Precopied {
    /// Bytes of memory that it has.
    pub fn bytes(&self) -> u64 {
        let cells = self.0.values().flat_map(HashMap::values);
        cells
            .map(|cell| u64::from(cell.pages.count_ones()) * page_size())
            .sum()
    }

    /// The part that has exactly these pages of a block of a task, by its number in the container. `pages` are
    /// the bytes of its address space, whole pages in their order.
    pub(crate) fn part(&self, pid: i32, pages: impl Iterator<Item = Range<u64>>) -> Option<Part> {
        let cells = self.0.get(&pid)?;
        let mut block = None;
        let mut mask = 0;
        for range in pages {
            let number = *block.get_or_insert(range.start / CHUNK as u64);
            if number != range.start / CHUNK as u64 {
                return None;
            }
            mask |= pages_in(number, &range);
        }
        let cell = cells.get(&block?)?;
        (cell.pages == mask).then_some(cell.part)
    }
}

impl Memory {
    fn copy(&mut self, writer: &ChunkWriter, until: Instant) -> Result<u64, ChunkError> {
        let Ok(present) = find(self.task.pid, Ask::Present) else {
            return Ok(0);
        };
        let mut blocks = split(&present);
        blocks.retain(|block| {
            let cell = self.cells.get(&block.number);
            cell.is_none_or(|cell| cell.pages != block.pages)
        });
        let pid = Pid::from_raw(self.task.pid);
        let batches: Vec<&[Block]> = blocks.chunks(BATCH).collect();
        let copied = in_parallel(batches.len(), |index, buffer| {
            if Instant::now() >= until {
                return Ok(Vec::new());
            }
            copy_blocks(pid, batches[index], buffer, writer)
        })?;
        let mut bytes = 0;
        for (number, cell) in copied.into_iter().flatten() {
            bytes += u64::from(cell.pages.count_ones()) * page_size();
            self.cells.insert(number, cell);
        }
        Ok(bytes)
    }

    /// Drops the cells that may not be what is in memory now.
    fn settle(&mut self) {
        // Its number may be another process's by now, a copy of which may look unwritten.
        let same = start_time(self.task.pid).is_ok_and(|begun| begun == self.begun);
        let unwritten = match same {
            true => find(self.task.pid, Ask::Unwritten).unwrap_or_default(),
            false => Vec::new(),
        };
        let sure: HashMap<u64, u64> = split(&unwritten)
            .into_iter()
            .map(|block| (block.number, block.pages))
            .collect();
        self.cells
            .retain(|number, cell| cell.pages & !sure.get(number).copied().unwrap_or(0) == 0);
    }
}

/// Reads these blocks and stores each as a chunk. One that cannot be read whole is left to the dump.
fn copy_blocks(
    pid: Pid,
    blocks: &[Block],
    buffer: &mut [u8],
    writer: &ChunkWriter,
) -> Result<Vec<(u64, Cell)>, ChunkError> {
    let mut ranges = Vec::new();
    for block in blocks {
        for range in block.ranges() {
            ranges.push(RemoteIoVec {
                base: range.start as usize,
                len: (range.end - range.start) as usize,
            });
        }
    }
    // At most 16 ranges in each of 16 blocks: fewer than UIO_MAXIOV.
    let mut read = process_vm_readv(pid, &mut [IoSliceMut::new(buffer)], &ranges).unwrap_or(0);
    let (mut rest, mut cells, mut room) = (&*buffer, Vec::new(), Room::default());
    for block in blocks {
        let bytes = (u64::from(block.pages.count_ones()) * page_size()) as usize;
        // It stops at the first page that it may not read.
        if bytes > read {
            break;
        }
        let (head, tail) = rest.split_at(bytes);
        let part = writer.put(head, &mut room)?;
        let pages = block.pages;
        cells.push((block.number, Cell { pages, part }));
        (rest, read) = (tail, read - bytes);
    }
    Ok(cells)
}

impl Block {
    /// Its pages as ranges of addresses.
    fn ranges(self) -> impl Iterator<Item = Range<u64>> {
        let (mut pages, mut at) = (self.pages, self.number * CHUNK as u64);
        std::iter::from_fn(move || {
            let skipped = pages.trailing_zeros();
            pages = pages.checked_shr(skipped).filter(|pages| *pages != 0)?;
            at += u64::from(skipped) * page_size();
            let run = pages.trailing_ones();
            pages = pages.checked_shr(run).unwrap_or(0);
            let start = at;
            at += u64::from(run) * page_size();
            Some(start..at)
        })
    }
}

fn page_size() -> u64 {
    rustix::param::page_size() as u64
}

/// The pages of `range` that are in a block, as its mask. With pages as large as a block there is one.
fn pages_in(number: u64, range: &Range<u64>) -> u64 {
    let begin = number * CHUNK as u64;
    let first = range.start.max(begin).saturating_sub(begin) / page_size();
    let last = range.end.min(begin + CHUNK as u64).saturating_sub(begin) / page_size();
    (first..last).fold(0, |mask, page| mask | 1 << page)
}

/// Sorted ranges of pages, by blocks.
fn split(ranges: &[Range<u64>]) -> Vec<Block> {
    let mut blocks: Vec<Block> = Vec::new();
    for range in ranges.iter().filter(|range| !range.is_empty()) {
        for number in range.start / CHUNK as u64..range.end.div_ceil(CHUNK as u64) {
            let pages = pages_in(number, range);
            match blocks.last_mut() {
                Some(last) if last.number == number => last.pages |= pages,
                _ => blocks.push(Block { number, pages }),
            }
        }
    }
    blocks
}

/// `/proc/<pid>/<name>`, opened.
fn proc_file(pid: i32, name: &str) -> io::Result<File> {
    File::open(format!("/proc/{pid}/{name}"))
}

#[cfg(test)]
mod tests;
