//! How one process's writes are remembered.

use std::{hint::black_box, io, ops::Range, os::fd::OwnedFd, sync::OnceLock};

use super::{
    areas,
    kernel::{self, Ask},
    page_size, proc_file,
};

/// Bytes of address space for each byte of memory that are looked at by soft-dirty bits: a pagemap has 8 bytes for
/// each page, whether there is one or not, and some programs reserve terabytes.
const SPARSE: u64 = 64;

/// Who remembers.
#[derive(Debug)]
pub(super) enum Tracker {
    /// Bits in the page tables that the kernel clears and sets.
    SoftDirty,
    /// This userfaultfd. Closed, it watches no more, and the process notices nothing.
    WriteProtect(OwnedFd),
}

impl Tracker {
    /// None where the kernel cannot remember writes without somebody who answers them.
    pub(super) fn write_protect(userfaultfd: OwnedFd) -> Option<Self> {
        kernel::watch_by(&userfaultfd).ok()?;
        Some(Self::WriteProtect(userfaultfd))
    }

    /// Watches from here on; what was written until now is forgotten.
    pub(super) fn mark(&self, pid: i32) -> io::Result<()> {
        let Self::WriteProtect(userfaultfd) = self else {
            return kernel::clear_soft_dirty(pid);
        };
        let pagemap = proc_file(pid, "pagemap")?;
        for area in areas::anonymous(pid)? {
            // Not so where the process has a userfaultfd of its own, say: that area is not watched then.
            if kernel::register(userfaultfd, &area).is_ok() {
                kernel::unprotect(userfaultfd, &area)?;
                kernel::protect(&pagemap, &area)?;
            }
        }
        Ok(())
    }

    /// The pages that were written since the last mark.
    pub(super) fn written(&self, pid: i32) -> io::Result<Vec<Range<u64>>> {
        self.find(pid, Ask::Written)
    }

    /// The pages that were not written since the last mark, and that were watched all the time.
    pub(super) fn unwritten(&self, pid: i32) -> io::Result<Vec<Range<u64>>> {
        self.find(pid, Ask::Unwritten)
    }

    /// The pages that are there.
    pub(super) fn present(&self, pid: i32) -> io::Result<Vec<Range<u64>>> {
        self.find(pid, Ask::Present)
    }

    fn find(&self, pid: i32, ask: Ask) -> io::Result<Vec<Range<u64>>> {
        let areas = areas::anonymous(pid)?;
        let bytes: u64 = areas.iter().map(|area| area.end - area.start).sum();
        let soft_dirty = matches!(self, Self::SoftDirty);
        if soft_dirty && bytes > areas::resident(pid)?.saturating_mul(SPARSE) {
            return Err(io::Error::other("too large an address space"));
        }
        let pagemap = proc_file(pid, "pagemap")?;
        let mut found = Vec::new();
        for area in &areas {
            found.extend(match self {
                Self::SoftDirty => kernel::read(&pagemap, area, ask)?,
                Self::WriteProtect(_) => kernel::scan(&pagemap, area, ask)?,
            });
        }
        Ok(found)
    }
}

/// Whether this kernel has soft-dirty bits. Tried once, on a page of this process: a kernel without them answers the
/// same calls, and never sets a bit.
pub fn has_soft_dirty() -> bool {
    static FOUND: OnceLock<bool> = OnceLock::new();
    *FOUND.get_or_init(|| try_soft_dirty().unwrap_or(false))
}

fn try_soft_dirty() -> io::Result<bool> {
    let me = std::process::id().cast_signed();
    let page = page_size();
    let mut memory = vec![1_u8; 3 * page as usize];
    let at = (memory.as_ptr() as u64).next_multiple_of(page);
    let dirty = || -> io::Result<bool> {
        let found = kernel::read(&proc_file(me, "pagemap")?, &(at..at + page), Ask::Written)?;
        Ok(!found.is_empty())
    };
    kernel::clear_soft_dirty(me)?;
    let before = dirty()?;
    let inside = (at - memory.as_ptr() as u64) as usize;
    memory[inside] = 2;
    black_box(&mut memory);
    Ok(!before && dirty()?)
}
