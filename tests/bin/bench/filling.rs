//! The kernel's own ceiling of a pager: how fast fresh memory is filled by `UFFDIO_COPY` from memory that is there, with
//! nothing read, compared or waited for.
#![allow(unsafe_code, reason = "the system calls of a userfaultfd")]

use anyhow::{Context, Result};
use linux_raw_sys::general::{
    _UFFDIO_API, _UFFDIO_COPY, _UFFDIO_REGISTER, UFFD_API, UFFDIO, UFFDIO_REGISTER_MODE_MISSING,
    uffdio_api, uffdio_copy, uffdio_range, uffdio_register,
};
use nix::libc;
use rustix::mm::{MapFlags, ProtFlags, mmap_anonymous, munmap};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::time::Instant;

/// What is filled, and how much at a time: as much as our pager copies in one call.
const BYTES: usize = 1 << 30;
const PIECE: usize = 128 << 10;
/// Where it is copied from, again and again: more than a processor's cache.
const SOURCE: usize = 64 << 20;

mod ioctl {
    use super::*;

    nix::ioctl_readwrite!(api, UFFDIO, _UFFDIO_API, uffdio_api);
    nix::ioctl_readwrite!(register, UFFDIO, _UFFDIO_REGISTER, uffdio_register);
    nix::ioctl_readwrite!(copy, UFFDIO, _UFFDIO_COPY, uffdio_copy);
}

/// Memory of this process.
struct Memory(*mut libc::c_void, usize);

impl Memory {
    fn new(bytes: usize) -> Result<Self> {
        let both = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: fresh memory at an address of the kernel's choice, unmapped when this is dropped.
        let begin =
            unsafe { mmap_anonymous(std::ptr::null_mut(), bytes, both, MapFlags::PRIVATE) }?;
        Ok(Self(begin, bytes))
    }

    fn address(&self) -> u64 {
        self.0 as u64
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: mapped by `new`, and nobody has a reference into it.
        let _ = unsafe { munmap(self.0, self.1) };
    }
}

/// GB/s at which so many threads fill fresh memory.
pub(crate) fn rate(threads: usize) -> Result<f64> {
    let source = Memory::new(SOURCE)?;
    // SAFETY: all of it is mapped and writable, and nothing else knows of it.
    unsafe { std::ptr::write_bytes(source.0.cast::<u8>(), 7, SOURCE) };
    let target = Memory::new(BYTES)?;
    // SAFETY: the call has no pointers; its descriptor is nobody else's.
    let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC) };
    let fd = nix::errno::Errno::result(fd).context("opening a userfaultfd")?;
    // SAFETY: just opened.
    let fd = unsafe { OwnedFd::from_raw_fd(fd as i32) };
    let mut api = uffdio_api {
        api: u64::from(UFFD_API),
        features: 0,
        ioctls: 0,
    };
    let mut register = uffdio_register {
        range: uffdio_range {
            start: target.address(),
            len: BYTES as u64,
        },
        mode: u64::from(UFFDIO_REGISTER_MODE_MISSING),
        ioctls: 0,
    };
    // SAFETY: the kernel reads and writes the two structures.
    unsafe {
        ioctl::api(fd.as_raw_fd(), &raw mut api)?;
        ioctl::register(fd.as_raw_fd(), &raw mut register)?;
    }
    let (from, to) = (source.address(), target.address());
    let fill = &|thread: usize| -> Result<()> {
        let share = BYTES / PIECE / threads;
        for piece in thread * share..(thread + 1) * share {
            let mut copy = uffdio_copy {
                dst: to + (piece * PIECE) as u64,
                src: from + (piece * PIECE % SOURCE) as u64,
                len: PIECE as u64,
                mode: 0,
                copy: 0,
            };
            // SAFETY: both ranges are mapped, and each piece is filled by one thread.
            unsafe { ioctl::copy(fd.as_raw_fd(), &raw mut copy) }?;
        }
        Ok(())
    };
    let began = Instant::now();
    std::thread::scope(|scope| {
        let working: Vec<_> = (0..threads).map(|n| scope.spawn(move || fill(n))).collect();
        working
            .into_iter()
            .map(std::thread::ScopedJoinHandle::join)
            .try_for_each(|done| done.unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
    })?;
    Ok(BYTES as f64 / began.elapsed().as_secs_f64() / 1e9)
}
