//! Two threads between a stopped task's memory and a file.

use std::{
    fs::{self, File, OpenOptions},
    io::{self, IoSliceMut},
    os::unix::fs::{FileExt, OpenOptionsExt},
    path::Path,
};

use nix::{
    sys::uio::{RemoteIoVec, process_vm_readv},
    unistd::Pid,
};
use rekindle_store::crc::{Crc64, Running};

use super::{
    PagesError,
    plan::{From, Plan, Stretch, image_path},
    tasks::Task,
};
use crate::{manifest::FileEntry, parallel::in_parallel};

/// Most remote ranges of one `process_vm_readv`: `UIO_MAXIOV`.
const MAX_RANGES: usize = 1024;

/// Writes the plan's pages file in the place of the dump's.
pub(super) fn pages(plan: &Plan, task: &Task) -> Result<FileEntry, PagesError> {
    let path = &plan.pages;
    // The dump's own pages stay readable through this descriptor when their name is gone.
    let dump = File::open(path).map_err(PagesError::file("read", path))?;
    fs::remove_file(path).map_err(PagesError::file("replace", path))?;
    let file = OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)
        .map_err(PagesError::file("write", path))?;
    let offsets: Vec<u64> = plan
        .pieces
        .iter()
        .scan(0, |at, piece| {
            let begin = *at;
            *at += bytes_of(piece);
            Some(begin)
        })
        .collect();
    let job = Job {
        path,
        dump,
        file,
        task,
        memory: File::open(format!("/proc/{}/mem", task.pid)).ok(),
    };
    let sums = in_parallel(plan.pieces.len(), |index, buffer| {
        job.copy(&plan.pieces[index], offsets[index], buffer)
    })?;
    let whole = plan.pieces.iter().zip(&sums);
    let (crc64, size) = whole.fold((Crc64::EMPTY, 0), |(crc, size), (piece, next)| {
        let bytes = bytes_of(piece);
        (crc.then(*next, bytes), size + bytes)
    });
    Ok(FileEntry {
        path: image_path(path),
        size,
        crc64,
    })
}

struct Job<'a> {
    path: &'a Path,
    dump: File,
    file: File,
    task: &'a Task,
    /// None where it may not be opened: then only what `process_vm_readv` reads can be copied.
    memory: Option<File>,
}

impl Job<'_> {
    /// Copies one piece to `offset` of the file, and says its checksum.
    fn copy(&self, piece: &[Stretch], offset: u64, buffer: &mut [u8]) -> Result<Crc64, PagesError> {
        let mut running = Running::default();
        let mut at = offset;
        let mut batch = Vec::new();
        let mut filled = 0;
        for stretch in piece {
            let mut rest = *stretch;
            while rest.bytes > 0 {
                let room = (buffer.len() - filled) as u64;
                let (head, tail) = split(rest, room);
                filled += head.bytes as usize;
                batch.push(head);
                rest = tail;
                if filled == buffer.len() || batch.len() == MAX_RANGES {
                    self.flush(&batch, &mut buffer[..filled], &mut at, &mut running)?;
                    batch.clear();
                    filled = 0;
                }
            }
        }
        self.flush(&batch, &mut buffer[..filled], &mut at, &mut running)?;
        Ok(running.crc())
    }

    fn flush(
        &self,
        batch: &[Stretch],
        buffer: &mut [u8],
        at: &mut u64,
        running: &mut Running,
    ) -> Result<(), PagesError> {
        let mut rest = &mut *buffer;
        for same in batch.chunk_by(|a, b| from_memory(a) == from_memory(b)) {
            let (head, tail) = rest.split_at_mut(bytes_of(same) as usize);
            self.read(same, head)?;
            rest = tail;
        }
        running.update(buffer);
        self.file
            .write_all_at(buffer, *at)
            .map_err(PagesError::file("write", self.path))?;
        *at += buffer.len() as u64;
        Ok(())
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
                From::Memory(vaddr) => ranges.push(RemoteIoVec {
                    base: vaddr as usize,
                    len: stretch.bytes as usize,
                }),
            }
        }
        if ranges.is_empty() {
            return Ok(());
        }
        let pid = Pid::from_raw(self.task.pid);
        let read = process_vm_readv(pid, &mut [IoSliceMut::new(into)], &ranges).unwrap_or(0);
        self.read_rest(&ranges, into, read)
    }

    /// Reads what `process_vm_readv` did not: it stops at pages without read permission (a guard that was
    /// memory before, a JIT's code), which `/proc/<pid>/mem` gives to a tracer with the right to trace.
    fn read_rest(
        &self,
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
                pid: self.task.pid,
                vaddr,
                bytes: rest.len() as u64,
                source,
            })?;
        }
        Ok(())
    }
}

fn bytes_of(stretches: &[Stretch]) -> u64 {
    stretches.iter().map(|stretch| stretch.bytes).sum()
}

fn from_memory(stretch: &Stretch) -> bool {
    matches!(stretch.from, From::Memory(_))
}

/// The first `bytes` of a stretch, and the rest.
fn split(stretch: Stretch, bytes: u64) -> (Stretch, Stretch) {
    let head = stretch.bytes.min(bytes);
    let from = match stretch.from {
        From::Dump(offset) => From::Dump(offset + head),
        From::Memory(vaddr) => From::Memory(vaddr + head),
    };
    let (bytes, left) = (head, stretch.bytes - head);
    (Stretch { bytes, ..stretch }, Stretch { from, bytes: left })
}
