//! What a complete pages file is made of, read from the pagemap of a lazy dump.

use std::{
    fs::OpenOptions,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};

use super::PagesError;
use crate::{
    chunks::CHUNK,
    criu_image::{CriuImageError, PE_LAZY, PE_PARENT, PE_PRESENT, Pagemap, Run, pages_file},
    parallel::BUFFER,
};

/// Where bytes come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum From {
    /// The pages file that the dump wrote, at this offset.
    Dump(u64),
    /// The task's memory, at the address where the page is.
    Memory,
}

/// Some of the pages of one chunk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Stretch {
    pub(crate) from: From,
    pub(crate) vaddr: u64,
    pub(crate) bytes: u64,
}

impl Stretch {
    /// Which chunk it is in: one has the pages of one aligned block of addresses, so that a page that is new
    /// in the next generation changes the chunk that it is in, and shifts no other.
    pub(crate) fn block(&self) -> u64 {
        self.vaddr / CHUNK as u64
    }
}

/// A new pages file.
#[derive(Debug)]
pub(crate) struct Plan {
    pub(crate) pages: PathBuf,
    /// In the file's order, each of whole chunks, and of no more than a thread's buffer holds.
    pub(crate) pieces: Vec<Vec<Stretch>>,
    /// Whether any of it comes from the task.
    pub(crate) left_behind: bool,
    /// Where the flags of the lazy runs are.
    flags_at: Vec<u64>,
    /// Bytes of the last piece.
    filled: u64,
}

impl Plan {
    pub(crate) fn read(criu_dir: &Path, path: &Path) -> Result<Self, PagesError> {
        let page_size = rustix::param::page_size() as u64;
        let mut map = Pagemap::open(path)?;
        let mut plan = Self {
            pages: criu_dir.join(pages_file(map.pages_id)),
            pieces: Vec::new(),
            left_behind: false,
            flags_at: Vec::new(),
            filled: 0,
        };
        let mut dumped = 0;
        while let Some(run) = map.next_run()? {
            let bytes = run.bytes(page_size);
            if run.left_behind() {
                plan.flags_at.push(flags_at(path, &run)?);
                plan.left_behind = true;
                plan.add(run.vaddr, bytes, |_| From::Memory);
            } else if run.present() {
                plan.add(run.vaddr, bytes, |done| From::Dump(dumped + done));
                dumped += bytes;
            } else if run.flags & PE_PARENT != 0 {
                let (path, place) = (path.to_owned(), "in a parent image");
                return Err(CriuImageError::Elsewhere {
                    path,
                    vaddr: run.vaddr,
                    place,
                }
                .into());
            }
        }
        Ok(plan)
    }

    /// Adds a run, cut where a chunk ends. `from` is given the bytes of it before a stretch.
    fn add(&mut self, vaddr: u64, bytes: u64, from: impl Fn(u64) -> From) {
        let mut done = 0;
        while done < bytes {
            let at = vaddr + done;
            let room = CHUNK as u64 - at % CHUNK as u64;
            let stretch = Stretch {
                from: from(done),
                vaddr: at,
                bytes: room.min(bytes - done),
            };
            done += stretch.bytes;
            self.push(stretch);
        }
    }

    fn push(&mut self, stretch: Stretch) {
        // What a chunk that has begun may still get has to fit too, or it would be cut in two.
        let full = self.filled + CHUNK as u64 > BUFFER as u64;
        match self.pieces.last_mut() {
            Some(piece)
                if !full
                    || piece
                        .last()
                        .is_some_and(|last| last.block() == stretch.block()) =>
            {
                piece.push(stretch);
                self.filled += stretch.bytes;
            }
            _ => {
                self.pieces.push(vec![stretch]);
                self.filled = stretch.bytes;
            }
        }
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
pub(crate) fn mark_present(path: &Path, plan: &Plan) -> Result<(), PagesError> {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .open(path)
        .map_err(PagesError::file("change", path))?;
    for at in &plan.flags_at {
        file.write_all_at(&[(PE_LAZY | PE_PRESENT) as u8], *at)
            .map_err(PagesError::file("change", path))?;
    }
    Ok(())
}
