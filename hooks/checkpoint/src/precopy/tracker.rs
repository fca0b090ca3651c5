//! How one process's writes are remembered.

use std::{io, ops::Range, os::fd::OwnedFd};

use super::{
    areas,
    kernel::{self, Ask},
    proc_file,
};

/// A userfaultfd of the process. Closed, it watches no more, and the process notices nothing.
#[derive(Debug)]
pub(super) struct Tracker(OwnedFd);

impl Tracker {
    /// None where the kernel cannot remember writes without somebody who answers them.
    pub(super) fn new(userfaultfd: OwnedFd) -> Option<Self> {
        kernel::watch_by(&userfaultfd).ok()?;
        Some(Self(userfaultfd))
    }

    /// Watches from here on; what was written until now is forgotten.
    ///
    /// # Errors
    /// Also for a process that reads asynchronously: what a disk writes into its memory for a read that has begun
    /// before is remembered by nobody.
    pub(super) fn mark(&self, pid: i32) -> io::Result<()> {
        if areas::reads_asynchronously(pid)? {
            return Err(io::Error::other("it reads asynchronously"));
        }
        let pagemap = proc_file(pid, "pagemap")?;
        for area in areas::anonymous(pid)? {
            // Not so where the process has a userfaultfd of its own, say: that area is not watched then.
            if kernel::register(&self.0, &area).is_ok() {
                kernel::unprotect(&self.0, &area)?;
                kernel::protect(&pagemap, &area)?;
            }
        }
        Ok(())
    }
}

/// The pages of a process that are asked for.
pub(super) fn find(pid: i32, ask: Ask) -> io::Result<Vec<Range<u64>>> {
    let pagemap = proc_file(pid, "pagemap")?;
    let mut found = Vec::new();
    for area in areas::anonymous(pid)? {
        found.extend(kernel::scan(&pagemap, &area, ask)?);
    }
    Ok(found)
}
