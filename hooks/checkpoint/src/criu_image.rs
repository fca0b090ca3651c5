//! As much of CRIU's image files as we need, read without trust.
//!
//! A CRIU image is a magic (two for all but the inventory) and then records: a little-endian u32 length
//! and a protobuf message. Sources of the facts here: CRIU's `images/*.proto` and `criu/include/magic.h`
//! (4.1, 4.2). Nothing is allocated from a length that a file claims: memory grows with bytes read.

use std::{
    fs,
    io::{self, BufReader, Read},
    path::{Path, PathBuf},
};

mod areas;
mod credentials;
mod files;
mod folder;
mod mappings;
#[cfg(feature = "archives")]
mod processes;
mod remaps;
pub(crate) mod wire;

pub use areas::{Area, AreaKind, areas};
pub use credentials::{CapabilityBits, Credentials, Task, credentials};
pub use files::{OpenFiles, Socket, SocketKind};
pub use folder::check_folder;
pub(crate) use mappings::Mappings;
#[cfg(feature = "archives")]
pub(crate) use processes::{Process, processes};
#[cfg(feature = "archives")]
pub(crate) use remaps::kept;
pub use remaps::{LinkRemap, link_remaps};

/// The first word of every image but the inventory.
const COMMON_MAGIC: u32 = 0x5456_4319;
/// The second word of a pagemap.
const PAGEMAP_MAGIC: u32 = 0x5608_4025;
/// Largest record that is read. The largest real ones are `mm-*.img`: about 60 bytes for each mapping,
/// of which the kernel allows 65,530 by default.
const MAX_RECORD: u32 = 32 << 20;

/// The page is in the parent image. We make none and accept none.
pub const PE_PARENT: u32 = 1;
/// The page may be restored lazily.
pub const PE_LAZY: u32 = 2;
/// The page's bytes are in the pages file.
pub const PE_PRESENT: u32 = 4;

/// Why a file is not an image that we would give to CRIU.
#[derive(Debug, thiserror::Error)]
pub enum CriuImageError {
    /// It could not be read.
    #[error("cannot read the CRIU image {}", path.display())]
    Read {
        /// Which.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// It does not begin as such a file must.
    #[error("{} does not begin as a CRIU image of that name does", .0.display())]
    Magic(PathBuf),
    /// It ends in the middle of a record, or a record is no protobuf message.
    #[error("the CRIU image {} is malformed: {what}", path.display())]
    Malformed {
        /// Which.
        path: PathBuf,
        /// What is wrong.
        what: &'static str,
    },
    /// It claims pages that are not there.
    #[error("the CRIU image {} claims {claimed} pages, and {pages_file} holds {held}", path.display())]
    Claim {
        /// Which pagemap.
        path: PathBuf,
        /// Pages that it claims, at least.
        claimed: u64,
        /// The pages file that it names.
        pages_file: String,
        /// Whole pages in that file.
        held: u64,
    },
    /// It needs an image that is not part of it, or was never completed.
    #[error("the CRIU image {} says that page {vaddr:#x} is {place}: such an image is not complete in itself", path.display())]
    Elsewhere {
        /// Which pagemap.
        path: PathBuf,
        /// Virtual address.
        vaddr: u64,
        /// "in a parent image", "still in the dumped process".
        place: &'static str,
    },
    /// A file that every image has is absent.
    #[error("the CRIU image folder has no {0}")]
    Absent(&'static str),
    /// A file by which the others come to mean something else.
    #[error("the CRIU image folder has {name}, {what}, which no image made by rekindle has")]
    Foreign {
        /// Which.
        name: String,
        /// What it holds.
        what: &'static str,
    },
}

/// One run of pages in a pagemap.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Run {
    /// Virtual address of the first, page aligned.
    pub vaddr: u64,
    /// How many pages.
    pub pages: u64,
    /// `PE_*`.
    pub flags: u32,
    /// Where in the file the byte of `flags` is, when it is one byte; to change it in place.
    pub flags_at: Option<u64>,
}

impl Run {
    /// Bytes that it covers. Cannot overflow: checked when read.
    pub fn bytes(&self, page_size: u64) -> u64 {
        self.pages * page_size
    }

    /// Whether its bytes are in the pages file.
    pub fn present(&self) -> bool {
        self.flags & PE_PRESENT != 0
    }

    /// Whether a lazy restore leaves it to the pager.
    pub fn lazy(&self) -> bool {
        self.flags & PE_LAZY != 0
    }

    /// Whether it was left in the process by a lazy dump.
    pub fn left_behind(&self) -> bool {
        self.flags & (PE_LAZY | PE_PRESENT | PE_PARENT) == PE_LAZY
    }
}

/// A pagemap, read run by run.
#[derive(Debug)]
pub struct Pagemap<R> {
    path: PathBuf,
    records: Records<R>,
    page_size: u64,
    end: u64,
    /// The number of the pages file: `pages-<id>.img`.
    pub pages_id: u32,
}

impl Pagemap<BufReader<fs::File>> {
    /// Opens one.
    ///
    /// # Errors
    /// When it cannot be read or does not begin as a pagemap.
    pub fn open(path: &Path) -> Result<Self, CriuImageError> {
        let file = fs::File::open(path).map_err(|source| CriuImageError::Read {
            path: path.to_owned(),
            source,
        })?;
        Self::read(path, BufReader::new(file))
    }
}

impl<R: Read> Pagemap<R> {
    /// Reads one from `reader`; `path` is only named in errors.
    ///
    /// # Errors
    /// When it does not begin as a pagemap.
    pub fn read(path: &Path, reader: R) -> Result<Self, CriuImageError> {
        let mut records = Records::new(path, reader, PAGEMAP_MAGIC)?;
        let (_, head) = records
            .next()?
            .ok_or_else(|| records.malformed("it has no head"))?;
        let mut pages_id = None;
        wire::fields(&head, |field, _| {
            if field.number == 1 {
                pages_id = field.value;
            }
        })
        .map_err(|what| records.malformed(what))?;
        let pages_id = pages_id
            .and_then(|id| u32::try_from(id).ok())
            .ok_or_else(|| records.malformed("its head names no pages file"))?;
        Ok(Self {
            path: path.to_owned(),
            records,
            page_size: rustix::param::page_size() as u64,
            end: 0,
            pages_id,
        })
    }

    /// The next run; none at the end. Runs are in ascending order and do not overlap.
    ///
    /// # Errors
    /// When the file ends early, is no pagemap, or has a run that no process could have.
    pub fn next_run(&mut self) -> Result<Option<Run>, CriuImageError> {
        let Some((at, bytes)) = self.records.next()? else {
            return Ok(None);
        };
        let (mut vaddr, mut compat, mut pages) = (None, None, None);
        let (mut parent, mut flags, mut flags_at) = (false, None, None);
        let mut numbers = true;
        wire::fields(&bytes, |field, (offset, length)| {
            match field.number {
                1 => vaddr = field.value,
                2 => compat = field.value,
                3 => parent = field.value.is_some_and(|value| value != 0),
                4 => {
                    flags = field.value;
                    flags_at = (length == 1).then_some(at + offset as u64);
                }
                5 => pages = field.value,
                _ => return,
            }
            numbers &= field.value.is_some();
        })
        .map_err(|what| self.records.malformed(what))?;
        // Not as if it were absent: an empty text for the flags would have its length changed in their place.
        if !numbers {
            return Err(self
                .records
                .malformed("a run has something else where a number belongs"));
        }
        let (Some(vaddr), Some(compat)) = (vaddr, compat) else {
            return Err(self
                .records
                .malformed("a run has no address or no page count"));
        };
        let pages = pages.unwrap_or(compat);
        // Images of CRIU before 3.0 have no flags: what is not in the parent is present. And the older field counts
        // for CRIU also where there are flags (`init_compat_pagemap_entry`).
        let (absent, parent) = match parent {
            true => (0, PE_PARENT),
            false => (PE_PRESENT, 0),
        };
        let flags = flags.map_or(absent, |flags| flags as u32) | parent;
        // No address space of Linux reaches 2^57 (x86 with five levels), so sums stay far from 2^64.
        let end = pages
            .checked_mul(self.page_size)
            .and_then(|bytes| bytes.checked_add(vaddr))
            .filter(|end| *end <= 1 << 57)
            .ok_or_else(|| {
                self.records
                    .malformed("a run lies outside any address space")
            })?;
        if vaddr % self.page_size != 0 || vaddr < self.end {
            return Err(self
                .records
                .malformed("its runs are not aligned or not in order"));
        }
        self.end = end;
        Ok(Some(Run {
            vaddr,
            pages,
            flags,
            flags_at,
        }))
    }

    /// Which file this is.
    pub fn path(&self) -> &Path {
        &self.path
    }
}

/// The name of a pages file.
pub fn pages_file(id: u32) -> String {
    format!("pages-{id}.img")
}

/// The records of an image file, with the offset in the file at which each message begins.
#[derive(Debug)]
struct Records<R> {
    path: PathBuf,
    reader: R,
    at: u64,
}

impl<R: Read> Records<R> {
    fn new(path: &Path, mut reader: R, magic: u32) -> Result<Self, CriuImageError> {
        let mut head = [0; 8];
        let read = reader.read_exact(&mut head);
        let [a, b, c, d, rest @ ..] = head;
        let found = (u32::from_le_bytes([a, b, c, d]), u32::from_le_bytes(rest));
        if read.is_err() || found != (COMMON_MAGIC, magic) {
            return Err(CriuImageError::Magic(path.to_owned()));
        }
        Ok(Self {
            path: path.to_owned(),
            reader,
            at: 8,
        })
    }

    fn next(&mut self) -> Result<Option<(u64, Vec<u8>)>, CriuImageError> {
        let mut length = Vec::with_capacity(4);
        self.take(4, &mut length)?;
        let Ok(length) = <[u8; 4]>::try_from(length.as_slice()) else {
            if length.is_empty() {
                return Ok(None);
            }
            return Err(self.malformed("it ends inside a record"));
        };
        let length = u32::from_le_bytes(length);
        if length > MAX_RECORD {
            return Err(self.malformed("a record claims more bytes than any real one has"));
        }
        let at = self.at;
        let mut bytes = Vec::new();
        self.take(u64::from(length), &mut bytes)?;
        if bytes.len() as u64 != u64::from(length) {
            return Err(self.malformed("it ends inside a record"));
        }
        Ok(Some((at, bytes)))
    }

    /// As many of the next `count` bytes as there are. `read_to_end` grows with what comes.
    fn take(&mut self, count: u64, into: &mut Vec<u8>) -> Result<(), CriuImageError> {
        let read = (&mut self.reader).take(count).read_to_end(into);
        let n = read.map_err(|source| CriuImageError::Read {
            path: self.path.clone(),
            source,
        })?;
        self.at += n as u64;
        Ok(())
    }

    fn malformed(&self, what: &'static str) -> CriuImageError {
        CriuImageError::Malformed {
            path: self.path.clone(),
            what,
        }
    }
}

#[cfg(test)]
pub(crate) mod tests;
