//! The kernel's side: what it tells about a process's memory, and how pages are put into it.
//!
//! Sources: `include/uapi/linux/userfaultfd.h` and `fs/userfaultfd.c` of Linux 6.12.
#![allow(unsafe_code, reason = "the system calls of a userfaultfd")]

use std::{
    io,
    os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd},
};

use linux_raw_sys::general::{
    UFFD_EVENT_FORK, UFFD_EVENT_PAGEFAULT, UFFD_EVENT_REMAP, UFFD_EVENT_REMOVE, UFFD_EVENT_UNMAP,
    UFFDIO, uffd_msg, uffdio_copy, uffdio_range, uffdio_zeropage,
};
use nix::errno::Errno;
use rustix::fs::{OFlags, fcntl_getfl, fcntl_setfl};

mod ioctl {
    use super::*;
    use linux_raw_sys::general::{_UFFDIO_COPY, _UFFDIO_WAKE, _UFFDIO_ZEROPAGE};

    nix::ioctl_readwrite!(copy, UFFDIO, _UFFDIO_COPY, uffdio_copy);
    nix::ioctl_readwrite!(zeropage, UFFDIO, _UFFDIO_ZEROPAGE, uffdio_zeropage);
    nix::ioctl_read!(wake, UFFDIO, _UFFDIO_WAKE, uffdio_range);
}

const MESSAGE: usize = size_of::<uffd_msg>();

/// What the kernel tells. The thread that caused anything but a fault waits until it has been read.
#[derive(Debug)]
pub(super) enum Event {
    /// A thread waits for the page at this address (not aligned).
    Fault(u64),
    /// The process has forked; the child's missing pages are those of its parent now.
    Fork(Userfaultfd),
    /// A mapping was moved with what is in it and what is missing of it.
    Moved {
        /// Where it was.
        from: u64,
        /// Where it is.
        to: u64,
        /// Its bytes.
        bytes: u64,
    },
    /// The contents of a range were given up (`MADV_DONTNEED`, `MADV_REMOVE`): they read as zeros.
    Discarded {
        /// First address.
        start: u64,
        /// First address behind it.
        end: u64,
    },
    /// A range was unmapped, by itself or as the end of a move.
    Unmapped {
        /// First address.
        start: u64,
        /// First address behind it.
        end: u64,
    },
}

/// Why the kernel did not put a page there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Refusal {
    /// A change of the address space is under way whose event is not read or not done yet: read, then
    /// try again.
    Busy,
    /// A page is there.
    Present,
    /// The range is not one registered mapping: it was unmapped, or a boundary lies in it since.
    NotMapped,
    /// The process has ended.
    Exited,
    /// Anything else.
    Failed(Errno),
}

impl From<Errno> for Refusal {
    fn from(errno: Errno) -> Self {
        match errno {
            Errno::EAGAIN => Self::Busy,
            Errno::EEXIST => Self::Present,
            Errno::ENOENT => Self::NotMapped,
            // ENOSPC until Linux 4.13.
            Errno::ESRCH | Errno::ENOSPC => Self::Exited,
            other => Self::Failed(other),
        }
    }
}

/// One process's userfaultfd.
#[derive(Debug)]
pub(super) struct Userfaultfd(OwnedFd);

impl AsFd for Userfaultfd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

impl Userfaultfd {
    /// Takes one over and makes sure that reading it never waits.
    pub(super) fn new(fd: OwnedFd) -> io::Result<Self> {
        let flags = fcntl_getfl(&fd)?;
        fcntl_setfl(&fd, flags | OFlags::NONBLOCK)?;
        Ok(Self(fd))
    }

    /// The next thing that has happened; none when there is nothing to tell.
    pub(super) fn read(&self) -> io::Result<Option<Event>> {
        let mut message = [0; MESSAGE];
        match rustix::io::read(&self.0, &mut message) {
            Ok(MESSAGE) => {}
            Ok(n) => {
                let what = format!("the kernel told {n} bytes in place of {MESSAGE}");
                return Err(io::Error::new(io::ErrorKind::InvalidData, what));
            }
            Err(rustix::io::Errno::AGAIN | rustix::io::Errno::INTR) => return Ok(None),
            Err(e) => return Err(e.into()),
        }
        // After the event's number and padding, three words; what they mean depends on the event.
        let word = |index: usize| {
            let bytes = message.iter().skip(8 + index * 8).take(8);
            bytes
                .rev()
                .fold(0, |word, byte| word << 8 | u64::from(*byte))
        };
        let event = match u32::from(message[0]) {
            UFFD_EVENT_PAGEFAULT => Event::Fault(word(1)),
            UFFD_EVENT_FORK => {
                let fd = word(0) as u32 as RawFd;
                // SAFETY: the kernel has made this descriptor in the read above, for whoever reads.
                Event::Fork(Self::new(unsafe { OwnedFd::from_raw_fd(fd) })?)
            }
            UFFD_EVENT_REMAP => Event::Moved {
                from: word(0),
                to: word(1),
                bytes: word(2),
            },
            UFFD_EVENT_REMOVE => Event::Discarded {
                start: word(0),
                end: word(1),
            },
            UFFD_EVENT_UNMAP => Event::Unmapped {
                start: word(0),
                end: word(1),
            },
            other => {
                let what = format!("the kernel told an event {other} that nobody asked for");
                return Err(io::Error::new(io::ErrorKind::InvalidData, what));
            }
        };
        Ok(Some(event))
    }

    /// Puts pages with these bytes at `vaddr`, and wakes who waits for them. Says how many bytes of them
    /// are in, and why not all.
    pub(super) fn copy(&self, vaddr: u64, bytes: &[u8]) -> (usize, Option<Refusal>) {
        let mut request = uffdio_copy {
            dst: vaddr,
            src: bytes.as_ptr() as u64,
            len: bytes.len() as u64,
            mode: 0,
            copy: 0,
        };
        // SAFETY: the kernel reads `len` bytes of `bytes` and writes `request`. What it fills are pages
        // that were missing in a process that has been told of this pager.
        match unsafe { ioctl::copy(self.0.as_raw_fd(), &raw mut request) } {
            Ok(_) => (bytes.len(), None),
            Err(errno) => done(request.copy, errno),
        }
    }

    /// Puts a page of zeros at `vaddr`, and wakes who waits for it.
    pub(super) fn zero(&self, vaddr: u64, bytes: u64) -> Option<Refusal> {
        let mut request = uffdio_zeropage {
            range: uffdio_range {
                start: vaddr,
                len: bytes,
            },
            mode: 0,
            zeropage: 0,
        };
        // SAFETY: the kernel writes `request` and nothing else of this process.
        let result = unsafe { ioctl::zeropage(self.0.as_raw_fd(), &raw mut request) };
        result.err().map(Refusal::from)
    }

    /// Wakes who waits for the page at `vaddr`, to look again.
    pub(super) fn wake(&self, vaddr: u64, bytes: u64) {
        let mut range = uffdio_range {
            start: vaddr,
            len: bytes,
        };
        // SAFETY: the kernel reads `range`.
        let woken = unsafe { ioctl::wake(self.0.as_raw_fd(), &raw mut range) };
        // Fails only for a range that is none.
        debug_assert!(woken.is_ok(), "waking {vaddr:#x}: {woken:?}");
    }
}

/// A copy that was not done wholly: the kernel says in the request how much is in, or why nothing is.
fn done(copied: i64, errno: Errno) -> (usize, Option<Refusal>) {
    match usize::try_from(copied) {
        // The reason comes with the next attempt.
        Ok(copied @ 1..) => (copied, None),
        _ => (0, Some(errno.into())),
    }
}
