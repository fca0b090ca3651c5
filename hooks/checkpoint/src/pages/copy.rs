//! Some threads between a stopped task's memory and the chunks of an image.

use std::{
    fs::{self, File},
    io::{self, IoSliceMut},
    os::unix::fs::FileExt,
    path::Path,
};

use nix::{
    sys::uio::{RemoteIoVec, process_vm_readv},
    unistd::Pid,
};

use super::{
    PagesError,
    plan::{From, Plan, Stretch},
    tasks::Task,
};
use crate::{
    chunks::{ChunkWriter, Part, Room, Stream},
    manifest::criu_path,
    parallel::in_parallel,
    precopy::Precopied,
};

/// Most remote ranges of one `process_vm_readv`: `UIO_MAXIOV`.
const MAX_RANGES: usize = 1024;

/// Stores the plan's pages, and removes the file that the dump made of some of them.
pub(super) fn pages(
    plan: &Plan,
    task: Option<&Task>,
    before: &Precopied,
    writer: &ChunkWriter,
) -> Result<(), PagesError> {
    if plan.pieces.is_empty() {
        return Ok(());
    }
    let path = &plan.pages;
    let dump = File::open(path).map_err(PagesError::file("read", path))?;
    let job = Job {
        path,
        dump,
        task,
        memory: task.and_then(|task| File::open(format!("/proc/{}/mem", task.pid)).ok()),
        before,
        writer,
    };
    let parts = in_parallel(plan.pieces.len(), |index, buffer| {
        job.store(&plan.pieces[index], buffer)
    })?;
    let mut stream = Stream {
        name: criu_path(path),
        parts: Vec::new(),
    };
    for part in parts.into_iter().flatten() {
        stream.push(part);
    }
    writer.add(stream);
    fs::remove_file(path).map_err(PagesError::file("remove", path))
}

struct Job<'a> {
    path: &'a Path,
    dump: File,
    /// None where the dump left nothing behind.
    task: Option<&'a Task>,
    /// None where it may not be opened: then only what `process_vm_readv` reads can be copied.
    memory: Option<File>,
    before: &'a Precopied,
    writer: &'a ChunkWriter,
}

impl Job<'_> {
    /// Reads one piece and stores its chunks, but for those that were stored before.
    fn store(&self, piece: &[Stretch], buffer: &mut [u8]) -> Result<Vec<Part>, PagesError> {
        let chunks = || piece.chunk_by(|a, b| a.block() == b.block());
        let mut parts: Vec<Option<Part>> = chunks().map(|chunk| self.stored(chunk)).collect();
        let unread = chunks().zip(&parts).filter(|(_, part)| part.is_none());
        let unread: Vec<Stretch> = unread.flat_map(|(chunk, _)| chunk).copied().collect();
        let mut rest = &mut buffer[..bytes_of(&unread)];
        for same in unread.chunk_by(|a, b| from_memory(a) == from_memory(b)) {
            for batch in same.chunks(MAX_RANGES) {
                let (head, tail) = rest.split_at_mut(bytes_of(batch));
                self.read(batch, head)?;
                rest = tail;
            }
        }
        let mut room = Room::default();
        let mut rest = &*buffer;
        for (chunk, part) in chunks().zip(&mut parts) {
            if part.is_none() {
                let (head, tail) = rest.split_at(bytes_of(chunk));
                *part = Some(self.writer.put(head, &mut room)?);
                rest = tail;
            }
        }
        Ok(parts.into_iter().flatten().collect())
    }

    /// The part that these pages are, where it was stored while the task still ran.
    fn stored(&self, chunk: &[Stretch]) -> Option<Part> {
        let task = self.task.filter(|_| chunk.iter().all(from_memory))?;
        let pages = chunk
            .iter()
            .map(|stretch| stretch.vaddr..stretch.vaddr + stretch.bytes);
        self.before.part(task.container_pid, pages)
    }

    /// Fills `into` with these stretches, which all come from the same place.
    fn read(&self, stretches: &[Stretch], into: &mut [u8]) -> Result<(), PagesError> {
        let mut ranges = Vec::with_capacity(stretches.len());
        let mut rest = &mut *into;
        for stretch in stretches {
            let (head, tail) = rest.split_at_mut(stretch.bytes as usize);
            rest = tail;
            match stretch.from {
                From::Dump(offset) => self
                    .dump
                    .read_exact_at(head, offset)
                    .map_err(PagesError::file("read", self.path))?,
                From::Memory => ranges.push(RemoteIoVec {
                    base: stretch.vaddr as usize,
                    len: stretch.bytes as usize,
                }),
            }
        }
        let (false, Some(task)) = (ranges.is_empty(), self.task) else {
            return Ok(());
        };
        let pid = Pid::from_raw(task.pid);
        let read = process_vm_readv(pid, &mut [IoSliceMut::new(into)], &ranges).unwrap_or(0);
        self.read_rest(task, &ranges, into, read)
    }

    /// Reads what `process_vm_readv` did not: it stops at pages without read permission (a guard that was
    /// memory before, a JIT's code), which `/proc/<pid>/mem` gives to a tracer with the right to trace.
    fn read_rest(
        &self,
        task: &Task,
        ranges: &[RemoteIoVec],
        into: &mut [u8],
        read: usize,
    ) -> Result<(), PagesError> {
        let mut begin = 0;
        for range in ranges {
            let done = read.saturating_sub(begin).min(range.len);
            let rest = &mut into[begin + done..begin + range.len];
            begin += range.len;
            if rest.is_empty() {
                continue;
            }
            let vaddr = (range.base + done) as u64;
            let result = match &self.memory {
                Some(memory) => memory.read_exact_at(rest, vaddr),
                None => Err(io::ErrorKind::PermissionDenied.into()),
            };
            result.map_err(|source| PagesError::Memory {
                pid: task.pid,
                vaddr,
                bytes: rest.len() as u64,
                source,
            })?;
        }
        Ok(())
    }
}

fn bytes_of(stretches: &[Stretch]) -> usize {
    stretches.iter().map(|stretch| stretch.bytes as usize).sum()
}

fn from_memory(stretch: &Stretch) -> bool {
    stretch.from == From::Memory
}
