//! What the kernel tells of a process's pages, and how it is asked to watch them.
//!
//! Sources: `Documentation/admin-guide/mm/{pagemap,userfaultfd}.rst` and `fs/proc/task_mmu.c` of
//! Linux 6.12.
#![allow(unsafe_code, reason = "the system calls of pagemap and userfaultfd")]

use std::{
    fs::File,
    io,
    ops::Range,
    os::fd::{AsRawFd, OwnedFd},
};

use linux_raw_sys::general::{
    _UFFDIO_API, _UFFDIO_REGISTER, _UFFDIO_WRITEPROTECT, PAGE_IS_PFNZERO, PAGE_IS_PRESENT,
    PAGE_IS_SWAPPED, PAGE_IS_WPALLOWED, PAGE_IS_WRITTEN, PM_SCAN_CHECK_WPASYNC,
    PM_SCAN_WP_MATCHING, UFFD_API, UFFD_FEATURE_WP_ASYNC, UFFDIO, UFFDIO_REGISTER_MODE_WP,
    page_region, pm_scan_arg, uffdio_api, uffdio_range, uffdio_register, uffdio_writeprotect,
};

mod ioctl {
    use super::*;

    nix::ioctl_readwrite!(api, UFFDIO, _UFFDIO_API, uffdio_api);
    nix::ioctl_readwrite!(register, UFFDIO, _UFFDIO_REGISTER, uffdio_register);
    nix::ioctl_readwrite!(
        writeprotect,
        UFFDIO,
        _UFFDIO_WRITEPROTECT,
        uffdio_writeprotect
    );
    // `PAGEMAP_SCAN` of `linux/fs.h`.
    nix::ioctl_readwrite!(pagemap_scan, b'f', 16, pm_scan_arg);
}

/// Ranges that one call of `PAGEMAP_SCAN` tells.
const REGIONS: usize = 1024;
/// Which pages are asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Ask {
    /// All that are there, but for the kernel's one page of zeros.
    Present,
    /// Of these, those that were written.
    Written,
    /// Of these, those that are watched and were not written.
    Unwritten,
}

/// The pages of `area` that are asked for, in order.
pub(super) fn scan(pagemap: &File, area: &Range<u64>, ask: Ask) -> io::Result<Vec<Range<u64>>> {
    let (mask, inverted) = match ask {
        Ask::Present => (0, 0),
        Ask::Written => (PAGE_IS_WRITTEN, 0),
        Ask::Unwritten => (PAGE_IS_WPALLOWED | PAGE_IS_WRITTEN, PAGE_IS_WRITTEN),
    };
    walk(pagemap, area, 0, mask, inverted)
}

/// Watches the pages of a registered area for the next write of each.
pub(super) fn protect(pagemap: &File, area: &Range<u64>) -> io::Result<()> {
    let flags = PM_SCAN_WP_MATCHING | PM_SCAN_CHECK_WPASYNC;
    walk(pagemap, area, flags, PAGE_IS_WRITTEN, 0)?;
    Ok(())
}

fn walk(
    pagemap: &File,
    area: &Range<u64>,
    flags: u32,
    mask: u32,
    inverted: u32,
) -> io::Result<Vec<Range<u64>>> {
    let zeros = u64::from(PAGE_IS_PFNZERO);
    let mut found = Vec::new();
    let mut regions = vec![
        page_region {
            start: 0,
            end: 0,
            categories: 0
        };
        REGIONS
    ];
    let mut start = area.start;
    while start < area.end {
        let mut request = pm_scan_arg {
            size: size_of::<pm_scan_arg>() as u64,
            flags: u64::from(flags),
            start,
            end: area.end,
            walk_end: 0,
            vec: regions.as_mut_ptr() as u64,
            vec_len: REGIONS as u64,
            max_pages: 0,
            category_inverted: u64::from(inverted) | zeros,
            category_mask: u64::from(mask) | zeros,
            category_anyof_mask: u64::from(PAGE_IS_PRESENT | PAGE_IS_SWAPPED),
            return_mask: u64::from(PAGE_IS_PRESENT),
        };
        // SAFETY: the kernel writes at most `vec_len` regions to `vec`, and `request`.
        let told = unsafe { ioctl::pagemap_scan(pagemap.as_raw_fd(), &raw mut request) }?;
        for region in regions.iter().take(told.unsigned_abs() as usize) {
            push(&mut found, region.start..region.end);
        }
        if request.walk_end <= start {
            break;
        }
        start = request.walk_end;
    }
    Ok(found)
}

fn push(found: &mut Vec<Range<u64>>, range: Range<u64>) {
    match found.last_mut() {
        Some(last) if last.end == range.start => last.end = range.end,
        _ => found.push(range),
    }
}

/// Makes a new userfaultfd remember writes without telling anyone of them.
pub(super) fn watch_by(userfaultfd: &OwnedFd) -> io::Result<()> {
    let mut api = uffdio_api {
        api: u64::from(UFFD_API),
        features: u64::from(UFFD_FEATURE_WP_ASYNC),
        ioctls: 0,
    };
    // SAFETY: the kernel reads and writes `api`.
    unsafe { ioctl::api(userfaultfd.as_raw_fd(), &raw mut api) }?;
    Ok(())
}

/// Puts a range under its watch; again, if it is already.
pub(super) fn register(userfaultfd: &OwnedFd, range: &Range<u64>) -> io::Result<()> {
    let mut register = uffdio_register {
        range: uffdio_range {
            start: range.start,
            len: range.end - range.start,
        },
        mode: u64::from(UFFDIO_REGISTER_MODE_WP),
        ioctls: 0,
    };
    // SAFETY: the kernel reads and writes `register`. It changes no page of the process.
    unsafe { ioctl::register(userfaultfd.as_raw_fd(), &raw mut register) }?;
    Ok(())
}

/// Forgets what was watched in a range. Until Linux 6.13 a mapping that is moved loses its watch and its pages keep
/// the mark, writable: registered anew, they would look unwritten for ever.
pub(super) fn unprotect(userfaultfd: &OwnedFd, range: &Range<u64>) -> io::Result<()> {
    let mut request = uffdio_writeprotect {
        range: uffdio_range {
            start: range.start,
            len: range.end - range.start,
        },
        mode: 0,
    };
    // SAFETY: the kernel reads `request`. It changes no page of the process.
    unsafe { ioctl::writeprotect(userfaultfd.as_raw_fd(), &raw mut request) }?;
    Ok(())
}
