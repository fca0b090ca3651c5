//! A program that takes a process's output (`binary://`). It has the read ends of the process's own pipes, and
//! nothing passes through the shim.
//!
//! The contract is the Go shim's (`process/io.go`): stdout is descriptor 3, stderr 4, and on 5 it says that it
//! is ready, by a byte or by closing it. It reads to the end of the output, which comes with the end of the
//! container, also when the shim was killed; with the container it is asked to end.

use std::{
    io,
    os::fd::{AsRawFd, OwnedFd},
    process::{Command, Stdio},
    time::Duration,
};

use tokio::{net::unix::pipe, sync::oneshot, task::JoinHandle, time::timeout};

use super::{Owner, endpoint::Program};
use crate::{
    error::Error,
    exits::{Child, Exits},
    sys,
};

/// The first of the descriptors it gets.
const FIRST_FD: i32 = 3;
/// How long it may take to be ready. Go waits for as long as containerd does.
const READY: Duration = Duration::from_secs(10);
/// How long it may take to end by itself, at the end of the output: what SIGTERM meets, has not written all.
const OWN_END: Duration = Duration::from_secs(1);
/// How long it may take to end at SIGTERM. Go waits as long.
const GRACE: Duration = Duration::from_secs(12);

/// A logging program that runs. Dropped, it is asked to end.
#[derive(Debug)]
pub(super) struct Logger {
    _asked: oneshot::Sender<()>,
    ended: JoinHandle<()>,
}

impl Logger {
    /// Starts it, and waits until it is ready.
    pub(super) async fn start(
        program: &Program,
        owner: Owner<'_>,
        stdout: OwnedFd,
        stderr: OwnedFd,
    ) -> Result<Self, Error> {
        let failed = |reason: String| Error::Logger {
            program: program.path.clone(),
            id: owner.id.to_owned(),
            reason,
        };
        let child_and_ready = spawn(program, owner, stdout, stderr);
        let (child, ready) = child_and_ready.map_err(|e| failed(format!("starting it: {e}")))?;
        if timeout(READY, byte_or_end(&ready)).await.is_err() {
            owner.exits.kill(&child);
            child.exit.await;
            let seconds = READY.as_secs();
            return Err(failed(format!(
                "it did not say within {seconds} s that it is ready: it has to write a byte to descriptor 5, or to close it"
            )));
        }
        let (asked, until) = oneshot::channel();
        let name = program.path.display().to_string();
        Ok(Self {
            _asked: asked,
            ended: tokio::spawn(see_out(name, child, owner.exits.clone(), until)),
        })
    }

    /// Asks it to end, and waits until it has.
    pub(super) async fn end(self) {
        drop(self._asked);
        let _ = self.ended.await;
    }
}

fn spawn(
    program: &Program,
    owner: Owner<'_>,
    stdout: OwnedFd,
    stderr: OwnedFd,
) -> io::Result<(Child, pipe::Receiver)> {
    let (ready, says) = nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC)?;
    let mut given = Vec::with_capacity(3);
    for fd in [stdout, stderr, says] {
        given.push(sys::out_of_the_way(&fd, FIRST_FD + 3)?);
    }
    #[allow(clippy::disallowed_methods, reason = "the launch of a logging program")]
    let mut command = Command::new(&program.path);
    command.args(&program.args).env_clear();
    command
        .env("CONTAINER_ID", owner.id)
        .env("CONTAINER_NAMESPACE", owner.namespace);
    command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    for (fd, number) in given.iter().zip(FIRST_FD..) {
        sys::pass_fd(&mut command, fd.as_raw_fd(), number);
    }
    let child = owner.exits.spawn(&mut command)?;
    let ready = pipe::Receiver::from_owned_fd(ready)?;
    Ok((child, ready))
}

async fn byte_or_end(ready: &pipe::Receiver) {
    loop {
        let read = match ready.readable().await {
            Ok(()) => ready.try_read(&mut [0]),
            Err(error) => Err(error),
        };
        match read {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            _ => return,
        }
    }
}

/// Waits for its end, which is wanted once `asked` is over.
async fn see_out(name: String, child: Child, exits: Exits, asked: oneshot::Receiver<()>) {
    let mut child = child;
    tokio::select! {
        exit = &mut child.exit => {
            // At a container's end it ends first, for it sees the end of the output.
            tracing::debug!(name, status = exit.status, "a logging program has ended");
            return;
        }
        _ = asked => {}
    }
    if timeout(OWN_END, &mut child.exit).await.is_ok() {
        return;
    }
    exits.signal(&child, libc::SIGTERM);
    if timeout(GRACE, &mut child.exit).await.is_err() {
        let seconds = GRACE.as_secs();
        tracing::warn!(
            name,
            "a logging program did not end within {seconds} s and is killed"
        );
        exits.kill(&child);
        child.exit.await;
    }
}
