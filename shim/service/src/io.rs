//! Standard streams: containerd's FIFOs and files on one side, a process's pipes or terminal on the other.
//!
//! A process always gets pipes, never the FIFOs themselves: runc can hand pipes to a restored process
//! (it notes `pipe:[…]` in the image), and FIFOs of the host cannot be dumped at all.

mod console;
mod copy;

use std::{
    os::fd::OwnedFd,
    path::PathBuf,
    process::{Command, Stdio},
    time::Duration,
};

pub(crate) use console::{Console, ConsoleSocket};
use nix::unistd::{Gid, Uid, fchown};
use tokio::{sync::watch, task::JoinSet};

use crate::error::Error;

/// How long `Delete` waits for the last output to be read. Go waits as long.
const DRAIN: Duration = Duration::from_secs(10);

/// Where a process's streams go, as containerd says it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Streams {
    pub(crate) stdin: String,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
    pub(crate) terminal: bool,
}

/// One end of a stream.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Endpoint {
    Fifo(PathBuf),
    File(PathBuf),
}

impl Endpoint {
    /// Understands a path and `fifo://` and `file://` URIs.
    fn parse(text: &str) -> Result<Option<Self>, Error> {
        let refuse = |reason: &str| Error::Argument {
            key: format!("stream {text:?}"),
            reason: reason.to_owned(),
        };
        match text.split_once("://") {
            _ if text.is_empty() => Ok(None),
            None => Ok(Some(Self::Fifo(text.into()))),
            Some(("fifo", path)) => Ok(Some(Self::Fifo(path.into()))),
            Some(("file", path)) if path.starts_with('/') => Ok(Some(Self::File(path.into()))),
            Some(("file", _)) => Err(refuse("a file:// stream needs an absolute path")),
            Some(_) => Err(refuse(
                "allowed are a FIFO's path, fifo:// and file://; binary:// is not built yet",
            )),
        }
    }
}

/// A process's streams, made before it is started.
#[derive(Debug)]
pub(crate) struct ProcessIo {
    streams: Streams,
    ours: Ours,
    copies: JoinSet<()>,
    /// Ended with this, whoever still writes.
    input: JoinSet<()>,
    /// Dropping it closes our write side of the stdin FIFO, so that the process sees its end.
    stdin_open: Option<watch::Sender<()>>,
    console: Option<Console>,
}

/// Our ends, until the copying starts.
#[derive(Debug, Default)]
struct Ours {
    stdin: Option<OwnedFd>,
    stdout: Option<OwnedFd>,
    stderr: Option<OwnedFd>,
}

/// The process's ends: dropped once it has been started.
#[derive(Debug, Default)]
pub(crate) struct Theirs {
    stdin: Option<OwnedFd>,
    stdout: Option<OwnedFd>,
    stderr: Option<OwnedFd>,
}

impl Theirs {
    /// Gives them to a command; what is absent stays /dev/null.
    pub(crate) fn give(self, command: &mut Command) {
        let stdio = |fd: Option<OwnedFd>| fd.map_or_else(Stdio::null, Stdio::from);
        command
            .stdin(stdio(self.stdin))
            .stdout(stdio(self.stdout))
            .stderr(stdio(self.stderr));
    }
}

impl ProcessIo {
    /// Checks the streams and makes pipes owned by `uid`:`gid`; with a terminal there are none.
    pub(crate) fn prepare(streams: Streams, uid: u32, gid: u32) -> Result<(Self, Theirs), Error> {
        let mut ours = Ours::default();
        let mut theirs = Theirs::default();
        let wanted = (
            Endpoint::parse(&streams.stdin)?,
            Endpoint::parse(&streams.stdout)?,
            Endpoint::parse(&streams.stderr)?,
        );
        if !streams.terminal {
            if wanted.0.is_some() {
                let (read, write) = pipe(uid, gid)?;
                (theirs.stdin, ours.stdin) = (Some(read), Some(write));
            }
            if wanted.1.is_some() {
                let (read, write) = pipe(uid, gid)?;
                (ours.stdout, theirs.stdout) = (Some(read), Some(write));
            }
            if wanted.2.is_some() {
                let (read, write) = pipe(uid, gid)?;
                (ours.stderr, theirs.stderr) = (Some(read), Some(write));
            }
        }
        Ok((
            Self {
                streams,
                ours,
                copies: JoinSet::new(),
                input: JoinSet::new(),
                stdin_open: None,
                console: None,
            },
            theirs,
        ))
    }

    /// What containerd asked for.
    pub(crate) fn streams(&self) -> &Streams {
        &self.streams
    }

    /// Starts copying, once the process exists. `console` is its terminal, where it has one.
    pub(crate) fn start(&mut self, console: Option<Console>) -> Result<(), Error> {
        let stdin = Endpoint::parse(&self.streams.stdin)?;
        let stdout = Endpoint::parse(&self.streams.stdout)?;
        let stderr = Endpoint::parse(&self.streams.stderr)?;
        if let Some(console) = console {
            if let Some(Endpoint::Fifo(path)) = stdin {
                self.copy_stdin(path, console.input()?)?;
            }
            if let Some(to) = stdout {
                self.copies
                    .spawn(copy::output(console.output()?, copy::Sink::open(&to)?));
            }
            self.console = Some(console);
            return Ok(());
        }
        if let (Some(Endpoint::Fifo(path)), Some(fd)) = (stdin, self.ours.stdin.take()) {
            self.copy_stdin(path, copy::Writer::pipe(fd)?)?;
        }
        for (to, from) in [
            (stdout, self.ours.stdout.take()),
            (stderr, self.ours.stderr.take()),
        ] {
            if let (Some(to), Some(from)) = (to, from) {
                self.copies.spawn(copy::output(
                    copy::Reader::pipe(from)?,
                    copy::Sink::open(&to)?,
                ));
            }
        }
        Ok(())
    }

    fn copy_stdin(&mut self, path: PathBuf, to: copy::Writer) -> Result<(), Error> {
        let (open, closed) = watch::channel(());
        let from = copy::Stdin::open(&path, closed)?;
        // Not among the copies that `drain` waits for: a client may hold its end for ever.
        self.input.spawn(copy::input(from, to));
        self.stdin_open = Some(open);
        Ok(())
    }

    /// The caller has no more input.
    pub(crate) fn close_stdin(&mut self) {
        self.stdin_open = None;
    }

    /// Sets the terminal's size; without a terminal it does nothing, as Go's.
    pub(crate) fn resize(&self, width: u16, height: u16) -> Result<(), Error> {
        self.console
            .as_ref()
            .map_or(Ok(()), |console| console.resize(width, height))
    }

    /// Waits until all output has been passed on, or the time is over.
    pub(crate) async fn drain(&mut self) {
        self.close_stdin();
        let all = async { while self.copies.join_next().await.is_some() {} };
        if tokio::time::timeout(DRAIN, all).await.is_err() {
            tracing::warn!(
                "output was not read within {} s and is given up",
                DRAIN.as_secs()
            );
            self.copies.abort_all();
        }
    }
}

fn pipe(uid: u32, gid: u32) -> Result<(OwnedFd, OwnedFd), Error> {
    let (read, write) =
        nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC).map_err(Error::io("making a pipe"))?;
    if (uid, gid) != (0, 0) {
        for end in [&read, &write] {
            fchown(end, Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid)))
                .map_err(Error::io("giving a pipe to the container's user"))?;
        }
    }
    Ok((read, write))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn endpoints() {
        assert_eq!(Endpoint::parse("").unwrap(), None);
        assert_eq!(
            Endpoint::parse("/run/x").unwrap(),
            Some(Endpoint::Fifo("/run/x".into()))
        );
        assert_eq!(
            Endpoint::parse("file:///var/log/x").unwrap(),
            Some(Endpoint::File("/var/log/x".into()))
        );
        for bad in ["file://x", "binary:///bin/x", "http://x"] {
            assert!(Endpoint::parse(bad).unwrap_err().to_string().contains(bad));
        }
    }
}
