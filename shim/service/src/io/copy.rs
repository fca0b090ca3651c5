//! The copying itself: small buffers, and none while nothing flows.

use std::{
    fs::{self, File},
    io::{self, Write},
    os::{fd::OwnedFd, unix::fs::FileTypeExt},
    path::{Path, PathBuf},
    time::Duration,
};

use nix::fcntl::{FcntlArg, OFlag, fcntl};
use tokio::{io::unix::AsyncFd, net::unix::pipe, sync::watch};

use super::Target;
use crate::{error::Error, sys};

/// One read. A FIFO holds 64 KiB; 16 KiB keeps a hundred idle pods small and costs a busy one little.
const CHUNK: usize = 16 << 10;
/// How long an output that has ended waits for its first reader: less than `Delete` waits for all output.
const LATE: Duration = Duration::from_secs(5);
/// How often it is looked for.
const AGAIN: Duration = Duration::from_millis(20);

fn nonblocking(fd: &OwnedFd) -> Result<(), Error> {
    fcntl(fd, FcntlArg::F_SETFL(OFlag::O_NONBLOCK))
        .map(drop)
        .map_err(Error::io("making a stream non-blocking"))
}

/// Where output comes from.
#[derive(Debug)]
pub(crate) enum Reader {
    Pipe(pipe::Receiver),
    Terminal(AsyncFd<OwnedFd>),
}

/// Where input goes to.
#[derive(Debug)]
pub(crate) enum Writer {
    Pipe(pipe::Sender),
    Terminal(AsyncFd<OwnedFd>),
}

/// Where output goes to.
#[derive(Debug)]
pub(crate) enum Sink {
    /// A FIFO, or a pipe to a logging program.
    Pipe(pipe::Sender),
    /// A FIFO that nobody had opened yet.
    Unread(pipe::Sender, PathBuf),
    File(File),
}

impl Reader {
    pub(crate) fn pipe(fd: OwnedFd) -> Result<Self, Error> {
        nonblocking(&fd)?;
        pipe::Receiver::from_owned_fd_unchecked(fd)
            .map(Self::Pipe)
            .map_err(Error::io("reading a pipe"))
    }

    pub(crate) fn terminal(fd: OwnedFd) -> Result<Self, Error> {
        nonblocking(&fd)?;
        sys::async_fd(fd)
            .map(Self::Terminal)
            .map_err(Error::io("reading a terminal"))
    }

    /// The next bytes; none at the end.
    async fn next(&self, buffer: &mut Vec<u8>) -> io::Result<usize> {
        loop {
            let read = match self {
                Self::Pipe(pipe) => {
                    pipe.readable().await?;
                    buffer.resize(CHUNK, 0);
                    pipe.try_read(buffer)
                }
                Self::Terminal(fd) => {
                    let mut ready = fd.readable().await?;
                    buffer.resize(CHUNK, 0);
                    match ready
                        .try_io(|fd| nix::unistd::read(fd.get_ref(), buffer).map_err(Into::into))
                    {
                        // The other side of a terminal is gone: that is its end, not an error.
                        Ok(Err(error)) if error.raw_os_error() == Some(libc::EIO) => Ok(0),
                        Ok(result) => result,
                        Err(_would_block) => continue,
                    }
                }
            };
            match read {
                Err(error)
                    if matches!(
                        error.kind(),
                        io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted
                    ) => {}
                other => return other,
            }
        }
    }
}

impl Writer {
    pub(crate) fn pipe(fd: OwnedFd) -> Result<Self, Error> {
        nonblocking(&fd)?;
        pipe::Sender::from_owned_fd_unchecked(fd)
            .map(Self::Pipe)
            .map_err(Error::io("writing a pipe"))
    }

    pub(crate) fn terminal(fd: OwnedFd) -> Result<Self, Error> {
        nonblocking(&fd)?;
        sys::async_fd(fd)
            .map(Self::Terminal)
            .map_err(Error::io("writing a terminal"))
    }

    async fn all(&self, mut bytes: &[u8]) -> io::Result<()> {
        while !bytes.is_empty() {
            let written = match self {
                Self::Pipe(pipe) => try_pipe(pipe, bytes).await,
                Self::Terminal(fd) => {
                    let mut ready = fd.writable().await?;
                    match ready
                        .try_io(|fd| nix::unistd::write(fd.get_ref(), bytes).map_err(Into::into))
                    {
                        Ok(result) => result,
                        Err(_would_block) => continue,
                    }
                }
            };
            match written {
                Ok(n) => bytes = &bytes[n..],
                Err(error)
                    if matches!(
                        error.kind(),
                        io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted
                    ) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

async fn try_pipe(pipe: &pipe::Sender, bytes: &[u8]) -> io::Result<usize> {
    pipe.writable().await?;
    pipe.try_write(bytes)
}

impl Sink {
    pub(super) fn open(target: &Target) -> Result<Self, Error> {
        match target {
            Target::Path(path) => {
                let kind = fs::metadata(path).map_err(Error::file("opening the output", path))?;
                if !kind.file_type().is_fifo() {
                    return Self::append(path, false);
                }
                let reader = reader_of(path);
                // Read and write: opening does not wait for a reader, and a reader that goes away (a
                // restart of containerd) is no error. The reader sees the end when we close.
                let fifo = pipe::OpenOptions::new()
                    .read_write(true)
                    .open_sender(path)
                    .map_err(Error::file("opening the output FIFO", path))?;
                Ok(match reader {
                    Some(_) => Self::Pipe(fifo),
                    None => Self::Unread(fifo, path.clone()),
                })
            }
            Target::File(path) => {
                if let Some(folder) = path.parent() {
                    fs::create_dir_all(folder).map_err(Error::file("creating", folder))?;
                }
                Self::append(path, true)
            }
        }
    }

    fn append(path: &Path, create: bool) -> Result<Self, Error> {
        File::options()
            .create(create)
            .append(true)
            .open(path)
            .map(Self::File)
            .map_err(Error::file("opening the output file", path))
    }

    /// One more for a file that is open.
    pub(super) fn share(file: &File) -> Result<Self, Error> {
        let shared = file.try_clone().map(Self::File);
        shared.map_err(Error::io("duplicating an output file"))
    }

    pub(super) fn pipe(fd: OwnedFd) -> Result<Self, Error> {
        nonblocking(&fd)?;
        pipe::Sender::from_owned_fd_unchecked(fd)
            .map(Self::Pipe)
            .map_err(Error::io("writing a pipe"))
    }

    async fn all(&mut self, mut bytes: &[u8]) -> io::Result<()> {
        match self {
            Self::File(file) => file.write_all(bytes),
            Self::Pipe(pipe) | Self::Unread(pipe, _) => {
                while !bytes.is_empty() {
                    match try_pipe(pipe, bytes).await {
                        Ok(n) => bytes = &bytes[n..],
                        Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                        Err(error) => return Err(error),
                    }
                }
                Ok(())
            }
        }
    }
}

impl Sink {
    /// No more comes. A client that has not opened its end yet would find neither the output nor its end any more,
    /// and wait for ever: its end is waited for.
    async fn end(self) {
        let Self::Unread(fifo, path) = self else {
            return;
        };
        // For writing only, and instead of the one that reads, too: what is in the FIFO stays, and the kernel tells
        // whether anyone reads.
        let Ok(_held) = pipe::OpenOptions::new().open_sender(&path) else {
            return;
        };
        drop(fifo);
        let read = async {
            while reader_of(&path).is_none() {
                tokio::time::sleep(AGAIN).await;
            }
        };
        if tokio::time::timeout(LATE, read).await.is_err() {
            tracing::debug!(fifo = %path.display(), "nobody has read this output");
        }
    }
}

/// A writer to a FIFO, where somebody reads or waits to read it. To be held until there is another one: to a reader the
/// last writer is the end.
fn reader_of(path: &Path) -> Option<OwnedFd> {
    // Without a reader, opening for writing fails at once.
    let flags = OFlag::O_WRONLY | OFlag::O_NONBLOCK | OFlag::O_CLOEXEC;
    nix::fcntl::open(path, flags, nix::sys::stat::Mode::empty()).ok()
}

/// Copies output until its end. If it cannot be written it is read all the same, so that the process
/// does not stop at a full pipe.
pub(crate) async fn output(from: Reader, mut to: Sink) {
    let mut broken = false;
    loop {
        // Allocated anew for each burst: an idle stream holds no buffer.
        let mut buffer = Vec::new();
        match from.next(&mut buffer).await {
            Ok(0) => return to.end().await,
            Ok(n) if !broken => {
                if let Err(error) = to.all(&buffer[..n]).await {
                    tracing::warn!(%error, "output is lost from here on");
                    broken = true;
                }
            }
            Ok(_) => {}
            Err(error) => {
                tracing::warn!(%error, "reading output failed");
                return;
            }
        }
    }
}

/// The stdin FIFO, held open for writing by us until the caller closes it: a client that detaches does
/// not end a container's input, only `CloseIO` does.
#[derive(Debug)]
pub(crate) struct Stdin {
    fifo: pipe::Receiver,
    keep_open: pipe::Sender,
    closed: watch::Receiver<()>,
}

impl Stdin {
    pub(crate) fn open(path: &Path, closed: watch::Receiver<()>) -> Result<Self, Error> {
        let failed = || Error::file("opening the input FIFO", path);
        let fifo = pipe::OpenOptions::new()
            .open_receiver(path)
            .map_err(failed())?;
        let keep_open = pipe::OpenOptions::new()
            .open_sender(path)
            .map_err(failed())?;
        Ok(Self {
            fifo,
            keep_open,
            closed,
        })
    }
}

/// Copies input until its end, or until the process no longer reads.
pub(crate) async fn input(from: Stdin, to: Writer) {
    let Stdin {
        fifo,
        keep_open,
        mut closed,
    } = from;
    let mut keep_open = Some(keep_open);
    let from = Reader::Pipe(fifo);
    loop {
        let mut buffer = Vec::new();
        let read = tokio::select! {
            read = from.next(&mut buffer) => read,
            // The sender is never used, only dropped.
            _ = closed.changed(), if keep_open.is_some() => {
                keep_open = None;
                continue;
            }
        };
        match read {
            Ok(n) if n > 0 => {
                if to.all(&buffer[..n]).await.is_err() {
                    return;
                }
            }
            _ => return,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read;

    use nix::{sys::stat::Mode, unistd::mkfifo};

    use super::*;

    #[tokio::test]
    async fn output_reaches_a_reader_that_comes_late_and_ends() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("out");
        mkfifo(&path, Mode::S_IRWXU).unwrap();
        let (read, write) = nix::unistd::pipe2(OFlag::O_CLOEXEC).unwrap();
        let copying = tokio::spawn(output(
            Reader::pipe(read).unwrap(),
            Sink::open(&Target::Path(path.clone())).unwrap(),
        ));
        let big = vec![7u8; 300_000];
        let expected = big.clone();
        let reader = tokio::task::spawn_blocking(move || {
            let mut all = Vec::new();
            File::open(path).unwrap().read_to_end(&mut all).unwrap();
            all
        });
        tokio::task::spawn_blocking(move || File::from(write).write_all(&big).unwrap())
            .await
            .unwrap();
        assert_eq!(reader.await.unwrap(), expected);
        copying.await.unwrap();
    }

    /// A regression: the output of a short exec was lost, and its reader waited for ever, where the machine was so
    /// busy that the client opened its end after the process had ended.
    #[tokio::test]
    async fn output_reaches_a_reader_that_comes_when_all_is_over() {
        for said in [&b"77\n"[..], b""] {
            let folder = tempfile::tempdir().unwrap();
            let path = folder.path().join("out");
            mkfifo(&path, Mode::S_IRWXU).unwrap();
            let (read, write) = nix::unistd::pipe2(OFlag::O_CLOEXEC).unwrap();
            let sink = Sink::open(&Target::Path(path.clone())).unwrap();
            let copying = tokio::spawn(output(Reader::pipe(read).unwrap(), sink));
            File::from(write).write_all(said).unwrap();
            // Time enough for all that is to be copied.
            tokio::time::sleep(Duration::from_millis(200)).await;
            let reader = tokio::task::spawn_blocking(move || fs::read(path).unwrap());
            let all = tokio::time::timeout(Duration::from_secs(4), reader).await;
            assert_eq!(all.expect("its reader waits for ever").unwrap(), said);
            copying.await.unwrap();
        }
    }

    #[tokio::test]
    async fn input_ends_when_closed_and_not_when_a_client_detaches() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("in");
        mkfifo(&path, Mode::S_IRWXU).unwrap();
        let (read, write) = nix::unistd::pipe2(OFlag::O_CLOEXEC).unwrap();
        let (open, closed) = watch::channel(());
        let copying = tokio::spawn(input(
            Stdin::open(&path, closed).unwrap(),
            Writer::pipe(write).unwrap(),
        ));
        for _ in 0..2 {
            let path = path.clone();
            tokio::task::spawn_blocking(move || {
                File::options()
                    .write(true)
                    .open(path)
                    .unwrap()
                    .write_all(b"hello")
                    .unwrap();
            })
            .await
            .unwrap();
        }
        let mut process = File::from(read);
        let read = tokio::task::spawn_blocking(move || {
            let mut ten = [0; 10];
            process.read_exact(&mut ten).unwrap();
            (process, ten)
        });
        let (mut process, ten) = read.await.unwrap();
        assert_eq!(&ten, b"hellohello");
        assert!(!copying.is_finished());
        drop(open);
        copying.await.unwrap();
        assert_eq!(process.read(&mut [0; 1]).unwrap(), 0);
    }
}
