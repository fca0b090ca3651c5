//! The words between CRIU's restore, the relay and the pager, as `criu/uffd.c` has them.
//!
//! For each process its number in the container (4 bytes; negative for a zombie, and then nothing
//! follows) and one byte that carries its userfaultfd. When all is restored, the word [`FINISHED`]. No
//! process has that number: Linux ends at 2^22.
//!
//! Ours is the way back: for each process that a restored one has forked since, the word [`CHILD`] and
//! one byte that carries the descriptor that the kernel made for it; and [`LOADED`] at the end.

use std::{
    io::{self, IoSlice, IoSliceMut, Read, Write},
    mem::MaybeUninit,
    os::{
        fd::{AsFd, BorrowedFd, OwnedFd},
        unix::net::UnixStream,
    },
};

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};

/// "ReSTore Finished".
const FINISHED: u32 = 0x5253_5446;
/// "All LoadeD".
const LOADED: u32 = 0x414c_4c44;
/// No process of a container has this number.
const CHILD: u32 = 0;

/// One message.
#[derive(Debug)]
pub(crate) enum Word {
    /// A process, by its number in the container, with its userfaultfd.
    Process(i32, OwnedFd),
    /// A process that has ended and was not waited for: it has no memory.
    Zombie(i32),
    /// All processes are restored and about to run.
    Finished,
    /// A process that a restored one has forked.
    Child(OwnedFd),
    /// No page is missing any more.
    Loaded,
}

/// The next message; none when the other end is closed.
pub(crate) fn receive(from: &mut UnixStream) -> io::Result<Option<Word>> {
    let mut word = [0; 4];
    match from.read_exact(&mut word) {
        Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
        other => other?,
    }
    Ok(Some(match u32::from_ne_bytes(word) {
        FINISHED => Word::Finished,
        LOADED => Word::Loaded,
        CHILD => Word::Child(receive_fd(from)?),
        number => match number.cast_signed() {
            pid @ 1.. => Word::Process(pid, receive_fd(from)?),
            pid => Word::Zombie(pid.saturating_neg()),
        },
    }))
}

/// Sends one message.
pub(crate) fn send(to: &mut UnixStream, word: &Word) -> io::Result<()> {
    let (number, fd) = match word {
        Word::Process(pid, fd) => (pid.cast_unsigned(), Some(fd)),
        Word::Zombie(pid) => (pid.saturating_neg().cast_unsigned(), None),
        Word::Finished => (FINISHED, None),
        Word::Loaded => (LOADED, None),
        Word::Child(fd) => (CHILD, Some(fd)),
    };
    to.write_all(&number.to_ne_bytes())?;
    fd.map_or(Ok(()), |fd| send_fd(to, fd.as_fd()))
}

fn receive_fd(from: &UnixStream) -> io::Result<OwnedFd> {
    let mut byte = [0];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut data = [IoSliceMut::new(&mut byte)];
    recvmsg(from, &mut data, &mut control, RecvFlags::CMSG_CLOEXEC)?;
    let fds = control.drain().filter_map(|message| match message {
        RecvAncillaryMessage::ScmRights(fds) => Some(fds),
        _ => None,
    });
    fds.flatten()
        .next()
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "no descriptor came"))
}

fn send_fd(to: &UnixStream, fd: BorrowedFd<'_>) -> io::Result<()> {
    let fds = [fd];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    control.push(SendAncillaryMessage::ScmRights(&fds));
    sendmsg(to, &[IoSlice::new(&[0])], &mut control, SendFlags::NOSIGNAL)?;
    Ok(())
}
