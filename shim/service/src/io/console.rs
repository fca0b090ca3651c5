//! A process's terminal: runc makes it and sends its master over a socket.

use std::{
    fs,
    io::{self, IoSliceMut},
    os::{
        fd::{AsRawFd, FromRawFd, OwnedFd},
        unix::net::{UnixListener, UnixStream},
    },
    path::{Path, PathBuf},
    sync::atomic::{AtomicU64, Ordering},
    time::Duration,
};

use nix::{
    cmsg_space,
    poll::{PollFd, PollFlags, PollTimeout, poll},
    sys::socket::{ControlMessageOwned, MsgFlags, recvmsg},
};
use rekindle_core::paths;
use std::os::fd::AsFd;

use super::copy;
use crate::error::Error;

/// runc connects before it returns, so this only bounds a runc that never did.
const ARRIVAL: Duration = Duration::from_secs(10);

/// The socket that runc sends the terminal to; its path must stay below 108 bytes, which a bundle's
/// does not.
#[derive(Debug)]
pub(crate) struct ConsoleSocket {
    listener: UnixListener,
    path: PathBuf,
}

impl ConsoleSocket {
    pub(crate) fn bind() -> Result<Self, Error> {
        static SOCKETS: AtomicU64 = AtomicU64::new(0);
        let folder = Path::new(paths::RUN_DIR).join("console");
        fs::create_dir_all(&folder).map_err(Error::file("creating", &folder))?;
        let name = format!(
            "{}-{}",
            std::process::id(),
            SOCKETS.fetch_add(1, Ordering::Relaxed)
        );
        let path = folder.join(name);
        let _ = fs::remove_file(&path);
        let listener =
            UnixListener::bind(&path).map_err(Error::file("binding the console socket", &path))?;
        Ok(Self { listener, path })
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Takes the terminal. Blocks for at most ten seconds.
    pub(crate) async fn receive(self) -> Result<Console, Error> {
        let received = tokio::task::spawn_blocking(move || self.receive_blocking()).await;
        received.map_err(|e| Error::Io {
            doing: "receiving the terminal",
            source: io::Error::other(e),
        })?
    }

    fn receive_blocking(&self) -> Result<Console, Error> {
        let failed = |source| Error::Io {
            doing: "receiving the terminal from runc",
            source,
        };
        let wait = |fd: &dyn AsFd| -> io::Result<()> {
            let mut fds = [PollFd::new(fd.as_fd(), PollFlags::POLLIN)];
            let timeout = PollTimeout::try_from(ARRIVAL).unwrap_or(PollTimeout::MAX);
            match poll(&mut fds, timeout)? {
                0 => Err(io::Error::new(
                    io::ErrorKind::TimedOut,
                    "it did not come within 10 s",
                )),
                _ => Ok(()),
            }
        };
        wait(&self.listener).map_err(failed)?;
        let (stream, _) = self.listener.accept().map_err(failed)?;
        wait(&stream).map_err(failed)?;
        receive_fd(&stream).map(Console).map_err(failed)
    }
}

impl Drop for ConsoleSocket {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path);
    }
}

#[allow(unsafe_code, reason = "descriptors arrive as bare numbers")]
fn receive_fd(stream: &UnixStream) -> io::Result<OwnedFd> {
    let mut name = [0u8; 4096];
    let mut space = cmsg_space!([i32; 1]);
    let mut iov = [IoSliceMut::new(&mut name)];
    let message = recvmsg::<()>(
        stream.as_raw_fd(),
        &mut iov,
        Some(&mut space),
        MsgFlags::MSG_CMSG_CLOEXEC,
    )?;
    for control in message.cmsgs()? {
        if let ControlMessageOwned::ScmRights(fds) = control
            && let Some(&fd) = fds.first()
        {
            // SAFETY: the kernel has just installed this descriptor for us; nobody else knows it.
            return Ok(unsafe { OwnedFd::from_raw_fd(fd) });
        }
    }
    Err(io::Error::other("the message carried no descriptor"))
}

/// The master side of a terminal.
#[derive(Debug)]
pub(crate) struct Console(OwnedFd);

impl Console {
    fn duplicate(&self) -> Result<OwnedFd, Error> {
        self.0
            .try_clone()
            .map_err(Error::io("duplicating a terminal"))
    }

    pub(crate) fn input(&self) -> Result<copy::Writer, Error> {
        copy::Writer::terminal(self.duplicate()?)
    }

    pub(crate) fn output(&self) -> Result<copy::Reader, Error> {
        copy::Reader::terminal(self.duplicate()?)
    }

    pub(crate) fn resize(&self, width: u16, height: u16) -> Result<(), Error> {
        let size = rustix::termios::Winsize {
            ws_row: height,
            ws_col: width,
            ws_xpixel: 0,
            ws_ypixel: 0,
        };
        rustix::termios::tcsetwinsize(&self.0, size).map_err(Error::io("resizing the terminal"))
    }
}
