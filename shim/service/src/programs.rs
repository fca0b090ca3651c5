//! Short programs whose answer is wanted: started, read to the end, reaped by the one reaper.

use std::{
    io::{self, Read},
    process::{Command, Stdio},
    time::Duration,
};

use tokio::{io::AsyncReadExt as _, net::unix::pipe};

use crate::{
    exits::{Child, Exits},
    sys,
};

/// Most that is read of an answer.
const MAX_ANSWER: u64 = 1 << 20;

/// Kills a program whose answer is not waited for any more.
struct Asked<'a>(&'a Exits, Child);

impl Drop for Asked<'_> {
    fn drop(&mut self) {
        self.0.kill(&self.1);
    }
}

/// Runs a command and returns its exit status and what it wrote to stdout. It is killed at the deadline, and
/// when this is dropped before.
pub(crate) async fn capture(
    exits: &Exits,
    mut command: Command,
    deadline: Duration,
) -> io::Result<(u32, String)> {
    let (reader, writer) = io::pipe()?;
    command
        .stdin(Stdio::null())
        .stdout(writer)
        .stderr(Stdio::null());
    let child = exits.spawn(&mut command)?;
    drop(command); // its copy of the pipe's other end
    let output = tokio::task::spawn_blocking(move || {
        let mut bytes = Vec::new();
        reader
            .take(MAX_ANSWER)
            .read_to_end(&mut bytes)
            .map(|_| String::from_utf8_lossy(&bytes).into_owned())
    });
    let mut asked = Asked(exits, child);
    let answer = async {
        let exit = (&mut asked.1.exit).await;
        // A child of the program may still hold its stdout: no longer than the deadline is that waited for.
        let text = output.await.map_err(io::Error::other)??;
        Ok((exit.status, text))
    };
    tokio::time::timeout(deadline, answer)
        .await
        .unwrap_or_else(|_| {
            let words = format!("no answer within {} s", deadline.as_secs());
            Err(io::Error::new(io::ErrorKind::TimedOut, words))
        })
}

/// Runs a command that may take long, and returns its exit status and what it wrote to stdout. Nobody waits for it on a
/// thread; it is killed at the deadline, when this is dropped before, and with the shim.
pub(crate) async fn outcome(
    exits: &Exits,
    mut command: Command,
    deadline: Duration,
) -> io::Result<(u32, String)> {
    let (reader, writer) = io::pipe()?;
    command
        .stdin(Stdio::null())
        .stdout(writer)
        .stderr(Stdio::null());
    sys::die_with_us(&mut command);
    let mut asked = Asked(exits, exits.spawn(&mut command)?);
    drop(command); // its copy of the pipe's other end
    let reader = pipe::Receiver::from_owned_fd(reader.into())?;
    let answer = async {
        let mut bytes = Vec::new();
        reader.take(MAX_ANSWER).read_to_end(&mut bytes).await?;
        let exit = (&mut asked.1.exit).await;
        Ok((exit.status, String::from_utf8_lossy(&bytes).into_owned()))
    };
    let late = |_| io::Error::new(io::ErrorKind::TimedOut, "it did not end");
    tokio::time::timeout(deadline, answer).await.map_err(late)?
}

/// The version in what a program prints with `--version`: the first word that begins with a digit.
pub(crate) async fn version(exits: &Exits, program: &str) -> io::Result<String> {
    #[allow(clippy::disallowed_methods, reason = "asks a program its version")]
    let mut command = Command::new(program);
    command.arg("--version");
    let (_, text) = capture(exits, command, Duration::from_secs(10)).await?;
    let version = text
        .split_whitespace()
        .find(|word| word.starts_with(|c: char| c.is_ascii_digit()));
    // Debian's runc is "1.3.6+ds1": what follows the number is the packager's.
    let number = version.map(|v| v.split(['+', '-', '~']).next().unwrap_or(v).to_owned());
    number.ok_or_else(|| io::Error::other(format!("{program} --version prints no version")))
}
