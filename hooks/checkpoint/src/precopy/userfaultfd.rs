//! A userfaultfd of another process: only the process itself can open one for its memory, so it is made to.
//!
//! A process is stopped in one thread, as CRIU stops it for its dump; that thread opens the descriptor by an
//! instruction of its own vDSO, closes it once it was duplicated here, and goes on where it was. Nothing is
//! written into its memory. While this runs its thread has registers that are not its own: whoever does this is a
//! short program of its own, which nobody has a reason to kill, and not the shim.

use std::{
    collections::HashMap,
    io,
    os::{fd::OwnedFd, unix::net::UnixStream},
};

use crate::pager::protocol::{self, Word};

#[cfg(target_arch = "x86_64")]
mod inject;

/// Opens a userfaultfd in each of these processes and sends it, with the process's number, to `to`. Those in which that
/// cannot be done are left out; the reasons.
///
/// # Errors
/// When `to` takes no more.
pub fn lend(pids: &[i32], to: &mut UnixStream) -> io::Result<Vec<(i32, String)>> {
    let mut refused = Vec::new();
    for pid in pids {
        match open_in(*pid) {
            Ok(fd) => protocol::send(to, &Word::Process(*pid, fd))?,
            Err(reason) => refused.push((*pid, reason)),
        }
    }
    protocol::send(to, &Word::Finished)?;
    Ok(refused)
}

/// What [`lend`] sends, by the numbers of processes, until it ends.
///
/// # Errors
/// When the connection breaks, or something else is sent.
pub fn borrow(from: &mut UnixStream) -> io::Result<HashMap<i32, OwnedFd>> {
    let mut lent = HashMap::new();
    loop {
        match protocol::receive(from)? {
            Some(Word::Process(pid, fd)) => {
                lent.insert(pid, fd);
            }
            Some(Word::Finished) => return Ok(lent),
            Some(Word::Zombie(_) | Word::Child(_) | Word::Loaded) => {
                return Err(io::Error::new(
                    io::ErrorKind::InvalidData,
                    "an unknown word",
                ));
            }
            None => return Err(io::ErrorKind::UnexpectedEof.into()),
        }
    }
}

#[cfg(target_arch = "x86_64")]
pub(super) fn open_in(pid: i32) -> Result<OwnedFd, String> {
    inject::userfaultfd(pid).map_err(|e| e.to_string())
}

#[cfg(not(target_arch = "x86_64"))]
pub(super) fn open_in(_pid: i32) -> Result<OwnedFd, String> {
    Err("not known how on this architecture".to_owned())
}
