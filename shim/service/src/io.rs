//! Standard streams: containerd's FIFOs and files on one side, a process's pipes or terminal on the other.
//!
//! A process always gets pipes, never the FIFOs themselves: runc can hand pipes to a restored process
//! (it notes `pipe:[…]` in the image), and FIFOs of the host cannot be dumped at all.

mod console;
mod copy;
mod endpoint;
mod logger;

use std::{
    os::fd::OwnedFd,
    path::Path,
    process::{Command, Stdio},
    time::Duration,
};

pub(crate) use console::{Console, ConsoleSocket};
use nix::unistd::{Gid, Uid, fchown};
use tokio::{sync::watch, task::JoinSet};

use crate::{error::Error, exits::Exits};
use endpoint::{Endpoints, Output, Target};
use logger::Logger;

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

impl Streams {
    /// Refuses what is not understood, before anything is made for it.
    pub(crate) fn admit(&self) -> Result<(), Error> {
        Endpoints::parse(self).map(drop)
    }
}

/// Whose streams they are.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Owner<'a> {
    pub(crate) namespace: &'a str,
    /// The container's id, or the exec's.
    pub(crate) id: &'a str,
    /// To whom the pipes belong.
    pub(crate) uid: u32,
    pub(crate) gid: u32,
    /// Who reaps a logging program.
    pub(crate) exits: &'a Exits,
}

/// A process's streams, made before it is started.
#[derive(Debug)]
pub(crate) struct ProcessIo {
    streams: Streams,
    far: Far,
    ours: Ours,
    copies: JoinSet<()>,
    /// Ended with this, whoever still writes.
    input: JoinSet<()>,
    /// Dropping it closes our write side of the stdin FIFO, so that the process sees its end.
    stdin_open: Option<watch::Sender<()>>,
    console: Option<Console>,
    logger: Option<Logger>,
}

/// Containerd's ends, until the copying starts.
#[derive(Debug, Default)]
struct Far {
    stdin: Option<copy::Stdin>,
    stdout: Option<copy::Sink>,
    stderr: Option<copy::Sink>,
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
    /// Opens what the streams lead to and makes the process's pipes; with a terminal there are none. A logging
    /// program is ready when this returns.
    pub(crate) async fn prepare(
        streams: Streams,
        owner: Owner<'_>,
    ) -> Result<(Self, Theirs), Error> {
        let Endpoints { stdin, output } = Endpoints::parse(&streams)?;
        let mut theirs = Theirs::default();
        let mut this = Self {
            streams,
            far: Far::default(),
            ours: Ours::default(),
            copies: JoinSet::new(),
            input: JoinSet::new(),
            stdin_open: None,
            console: None,
            logger: None,
        };
        if let Some(path) = stdin {
            this.open_stdin(&path)?;
            if !this.streams.terminal {
                let (read, write) = pipe(owner)?;
                (theirs.stdin, this.ours.stdin) = (Some(read), Some(write));
            }
        }
        match output {
            Output::Apart(stdout, stderr) => {
                this.open_outputs(stdout.as_ref(), stderr.as_ref(), &mut theirs, owner)?;
            }
            Output::Program(program) => {
                let (out, to_out) = pipe(owner)?;
                let (err, to_err) = pipe(owner)?;
                this.logger = Some(Logger::start(&program, owner, out, err).await?);
                if this.streams.terminal {
                    // It has but one output: in the place of the other the program finds the end at once.
                    this.far.stdout = Some(copy::Sink::pipe(to_out)?);
                } else {
                    (theirs.stdout, theirs.stderr) = (Some(to_out), Some(to_err));
                }
            }
        }
        Ok((this, theirs))
    }

    /// Makes all anew for another try at the process. Who reads a FIFO of it sees no end in between.
    pub(crate) async fn renew(&mut self, owner: Owner<'_>) -> Result<Theirs, Error> {
        if let Some(logger) = self.logger.take() {
            // It may hold what its successor needs, and has to see the end of its input.
            self.far = Far::default();
            logger.end().await;
        }
        let (fresh, theirs) = Self::prepare(self.streams.clone(), owner).await?;
        *self = fresh;
        Ok(theirs)
    }

    fn open_stdin(&mut self, path: &Path) -> Result<(), Error> {
        let (open, closed) = watch::channel(());
        self.far.stdin = Some(copy::Stdin::open(path, closed)?);
        self.stdin_open = Some(open);
        Ok(())
    }

    fn open_outputs(
        &mut self,
        stdout: Option<&Target>,
        stderr: Option<&Target>,
        theirs: &mut Theirs,
        owner: Owner<'_>,
    ) -> Result<(), Error> {
        let terminal = self.streams.terminal;
        if let Some(to) = stdout {
            self.far.stdout = Some(copy::Sink::open(to)?);
            if !terminal {
                let (read, write) = pipe(owner)?;
                (self.ours.stdout, theirs.stdout) = (Some(read), Some(write));
            }
        }
        // A terminal has but one output.
        if let Some(to) = stderr.filter(|_| !terminal) {
            self.far.stderr = Some(match &self.far.stdout {
                Some(copy::Sink::File(file)) if stdout == Some(to) => copy::Sink::share(file)?,
                _ => copy::Sink::open(to)?,
            });
            let (read, write) = pipe(owner)?;
            (self.ours.stderr, theirs.stderr) = (Some(read), Some(write));
        }
        Ok(())
    }

    /// What containerd asked for.
    pub(crate) fn streams(&self) -> &Streams {
        &self.streams
    }

    /// Starts copying, once the process exists. `console` is its terminal, where it has one.
    pub(crate) fn start(&mut self, console: Option<Console>) -> Result<(), Error> {
        let Far {
            stdin,
            stdout,
            stderr,
        } = std::mem::take(&mut self.far);
        if let Some(console) = console {
            if let Some(from) = stdin {
                self.input.spawn(copy::input(from, console.input()?));
            }
            if let Some(to) = stdout {
                self.copies.spawn(copy::output(console.output()?, to));
            }
            self.console = Some(console);
            return Ok(());
        }
        if let (Some(from), Some(fd)) = (stdin, self.ours.stdin.take()) {
            // Not among the copies that `drain` waits for: a client may hold its end for ever.
            self.input.spawn(copy::input(from, copy::Writer::pipe(fd)?));
        }
        for (to, from) in [
            (stdout, self.ours.stdout.take()),
            (stderr, self.ours.stderr.take()),
        ] {
            if let (Some(to), Some(from)) = (to, from) {
                self.copies
                    .spawn(copy::output(copy::Reader::pipe(from)?, to));
            }
        }
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

    /// Waits until all output has been passed on, or the time is over, and until a logging program has ended.
    /// To be called when the process is gone.
    pub(crate) async fn drain(&mut self) {
        self.close_stdin();
        // What was never started.
        (self.far, self.ours) = Default::default();
        let all = async { while self.copies.join_next().await.is_some() {} };
        if tokio::time::timeout(DRAIN, all).await.is_err() {
            tracing::warn!(
                "output was not read within {} s and is given up",
                DRAIN.as_secs()
            );
            // With them their ends of the pipes are closed, one of which a logger may read.
            self.copies.shutdown().await;
        }
        if let Some(logger) = self.logger.take() {
            logger.end().await;
        }
    }
}

/// The read and the write end of a pipe that belongs to the process's user.
fn pipe(owner: Owner<'_>) -> Result<(OwnedFd, OwnedFd), Error> {
    let (uid, gid) = (owner.uid, owner.gid);
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
