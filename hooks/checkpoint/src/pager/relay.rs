//! Between CRIU's restore and its pager: one connection in, one out, descriptors duplicated on the way.
//!
//! The protocol, as `criu/uffd.c` has it: for each process its number (4 bytes; negative for a zombie, and
//! then nothing follows) and then one byte that carries its userfaultfd. When all is restored, the word
//! [`FINISHED`]. No process has that number: Linux ends at 2^22.

use std::{
    fs::File,
    io::{self, IoSlice, IoSliceMut, Read, Write},
    mem::MaybeUninit,
    os::{
        fd::{AsFd, AsRawFd, OwnedFd},
        unix::net::{UnixListener, UnixStream},
    },
    path::{Path, PathBuf},
    sync::{PoisonError, atomic::Ordering},
    time::{Duration, Instant},
};

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};

use super::{PagerError, SOCKET, Shared};

/// "ReSTore Finished".
const FINISHED: u32 = 0x5253_5446;
/// How long the daemon may take until it listens. It takes 20 ms here; a loaded node takes longer.
const DAEMON_DEADLINE: Duration = Duration::from_secs(20);
/// How often it is asked whether it does.
const DAEMON_POLL: Duration = Duration::from_millis(2);

/// Relays one restore. Returns when CRIU has said that it is finished, or when cancelled.
pub(super) fn run(
    listener: &UnixListener,
    daemon_dir: &Path,
    shared: &Shared,
) -> Result<(), PagerError> {
    let failed = |what| move |source| PagerError::Relay { what, source };
    let mut criu = match listener.accept() {
        Ok((criu, _)) => criu,
        Err(_) if shared.cancelled.load(Ordering::Acquire) => return Ok(()),
        Err(e) => return Err(failed("waiting for CRIU's restore")(e)),
    };
    let copy = criu
        .try_clone()
        .map_err(failed("keeping CRIU's connection"))?;
    *shared.criu.lock().unwrap_or_else(PoisonError::into_inner) = Some(copy);
    // Cancelled before the copy was there: nobody will wake this thread.
    if shared.cancelled.load(Ordering::Acquire) {
        return Ok(());
    }
    let mut daemon = connect(daemon_dir, shared).map_err(failed("connecting to the pager"))?;
    loop {
        let mut word = [0; 4];
        match criu.read_exact(&mut word) {
            // CRIU's restore failed; it has killed what it had restored.
            Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => return Ok(()),
            other => other.map_err(failed("reading from CRIU's restore"))?,
        }
        if u32::from_ne_bytes(word) == FINISHED {
            daemon
                .write_all(&word)
                .map_err(failed("writing to the pager"))?;
            shared.finished.store(true, Ordering::Release);
            return Ok(());
        }
        let userfaultfd = if i32::from_ne_bytes(word) > 0 {
            let fd = receive(&criu).map_err(failed("receiving a userfaultfd"))?;
            let copy = fd
                .try_clone()
                .map_err(failed("duplicating a userfaultfd"))?;
            // Held before the daemon has it: from then on its death is ours to survive.
            shared.held.add(copy);
            Some(fd)
        } else {
            None
        };
        daemon
            .write_all(&word)
            .map_err(failed("writing to the pager"))?;
        if let Some(fd) = userfaultfd {
            send(&daemon, &fd).map_err(failed("sending a userfaultfd to the pager"))?;
        }
    }
}

/// Connects to the daemon's socket, which it may not have bound yet.
fn connect(dir: &Path, shared: &Shared) -> io::Result<UnixStream> {
    let dir = File::open(dir)?;
    let begun = Instant::now();
    loop {
        match UnixStream::connect(short_path(&dir)) {
            Ok(stream) => return Ok(stream),
            Err(e) if begun.elapsed() > DAEMON_DEADLINE => return Err(e),
            Err(e) if shared.cancelled.load(Ordering::Acquire) => return Err(e),
            Err(_) => {
                #[allow(clippy::disallowed_methods, reason = "the relay's own thread")]
                std::thread::sleep(DAEMON_POLL);
            }
        }
    }
}

/// A path of the socket in `dir` that fits into the 108 bytes of a socket address; that of a container's
/// folder with its id of 64 digits does not.
pub(super) fn short_path(dir: &File) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}", dir.as_raw_fd())).join(SOCKET)
}

fn receive(from: &UnixStream) -> io::Result<OwnedFd> {
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

fn send(to: &UnixStream, fd: &OwnedFd) -> io::Result<()> {
    let fds = [fd.as_fd()];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    control.push(SendAncillaryMessage::ScmRights(&fds));
    sendmsg(to, &[IoSlice::new(&[0])], &mut control, SendFlags::NOSIGNAL)?;
    Ok(())
}
