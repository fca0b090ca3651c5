//! What a complete pages file is made of, read from the pagemap of a lazy dump.

use std::{
    fs::OpenOptions,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};

use rekindle_store::crc::file_crc;

use super::PagesError;
use crate::{
    criu_image::{CriuImageError, PE_LAZY, PE_PARENT, PE_PRESENT, Pagemap, Run, pages_file},
    manifest::{CRIU_DIR, FileEntry},
};

/// Bytes of one piece at most: what one thread takes at a time.
pub(super) const PIECE: u64 = 8 << 20;

/// Where bytes come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum From {
    /// The pages file that the dump wrote, at this offset.
    Dump(u64),
    /// The task's memory, at this address.
    Memory(u64),
}

/// One stretch of the new pages file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Stretch {
    pub(super) from: From,
    pub(super) bytes: u64,
}

/// A new pages file.
#[derive(Debug)]
pub(super) struct Plan {
    pub(super) pages: PathBuf,
    /// In the file's order, each of [`PIECE`] bytes but the last.
    pub(super) pieces: Vec<Vec<Stretch>>,
    /// Bytes that come from the task.
    pub(super) left_behind: u64,
    /// Where the flags of the lazy runs are.
    flags_at: Vec<u64>,
    /// Bytes that the last piece has room for.
    room: u64,
}

impl Plan {
    /// Reads a pagemap; none when the dump left nothing of it behind.
    pub(super) fn read(criu_dir: &Path, path: &Path) -> Result<Option<Self>, PagesError> {
        let page_size = rustix::param::page_size() as u64;
        let mut map = Pagemap::open(path)?;
        let mut plan = Self {
            pages: criu_dir.join(pages_file(map.pages_id)),
            pieces: Vec::new(),
            left_behind: 0,
            flags_at: Vec::new(),
            room: 0,
        };
        let mut dumped = 0;
        while let Some(run) = map.next_run()? {
            let mut from = if run.left_behind() {
                plan.flags_at.push(flags_at(path, &run)?);
                plan.left_behind += run.bytes(page_size);
                From::Memory(run.vaddr)
            } else if run.present() {
                From::Dump(dumped)
            } else if run.flags & PE_PARENT != 0 {
                let (path, place) = (path.to_owned(), "in a parent image");
                return Err(CriuImageError::Elsewhere {
                    path,
                    vaddr: run.vaddr,
                    place,
                }
                .into());
            } else {
                continue;
            };
            let mut left = run.bytes(page_size);
            while left > 0 {
                let bytes = plan.push(from, left);
                left -= bytes;
                from = match from {
                    From::Dump(offset) => From::Dump(offset + bytes),
                    From::Memory(vaddr) => From::Memory(vaddr + bytes),
                };
            }
            if !run.left_behind() {
                dumped += run.bytes(page_size);
            }
        }
        Ok((plan.left_behind > 0).then_some(plan))
    }

    /// Adds as many of `bytes` as the last piece has room for, beginning a new one if it has none.
    fn push(&mut self, from: From, bytes: u64) -> u64 {
        if self.room == 0 {
            self.pieces.push(Vec::new());
            self.room = PIECE;
        }
        let bytes = bytes.min(self.room);
        self.room -= bytes;
        if let Some(piece) = self.pieces.last_mut() {
            piece.push(Stretch { from, bytes });
        }
        bytes
    }
}

/// The flags of a lazy run are the one byte 2; any other spelling was not written by CRIU.
fn flags_at(path: &Path, run: &Run) -> Result<u64, CriuImageError> {
    match run.flags_at {
        Some(at) if run.flags == PE_LAZY => Ok(at),
        _ => Err(CriuImageError::Malformed {
            path: path.to_owned(),
            what: "the flags of a lazy run are not the byte that CRIU writes",
        }),
    }
}

/// Says in the pagemap that the lazy runs are in the pages file now. 2 becomes 6: the same length, so the
/// bytes are changed in place.
pub(super) fn mark_present(path: &Path, plan: &Plan) -> Result<FileEntry, PagesError> {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .open(path)
        .map_err(PagesError::file("change", path))?;
    for at in &plan.flags_at {
        file.write_all_at(&[(PE_LAZY | PE_PRESENT) as u8], *at)
            .map_err(PagesError::file("change", path))?;
    }
    entry(path)
}

fn entry(path: &Path) -> Result<FileEntry, PagesError> {
    let (crc64, size) =
        file_crc(path).map_err(|e| PagesError::file("checksum", path)(std::io::Error::other(e)))?;
    Ok(FileEntry {
        path: image_path(path),
        size,
        crc64,
    })
}

/// How a manifest names a file of the CRIU folder.
pub(super) fn image_path(path: &Path) -> String {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    format!("{CRIU_DIR}/{name}")
}
