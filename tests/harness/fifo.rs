//! The ends of a container's stdio that a client of containerd holds.

use crate::{Node, poll};
use anyhow::{Context, Result, bail};
use nix::sys::stat::Mode;
use std::fs::{self, File, OpenOptions};
use std::io::{Read, Write};
use std::path::PathBuf;
use tokio::sync::watch;

/// The folder in the node that holds the FIFOs.
const FOLDER: &str = "/run/rekindle-test-io";

/// A process's stdin, stdout and stderr; absent ones are empty paths for containerd.
#[derive(Debug, Clone)]
pub struct Stdio {
    /// The paths as the node sees them.
    pub stdin: String,
    /// As [`Stdio::stdin`].
    pub stdout: String,
    /// As [`Stdio::stdin`]; empty with a terminal, which has but one output.
    pub stderr: String,
    /// Is it a terminal's?
    pub terminal: bool,
    host_stdin: Option<PathBuf>,
    out: Option<Reader>,
    err: Option<Reader>,
}

impl Stdio {
    /// Makes the FIFOs of process `name` and begins to read its outputs.
    pub fn open(node: &Node, name: &str, stdin: bool, terminal: bool) -> Result<Stdio> {
        let host = node.path(FOLDER);
        fs::create_dir_all(&host).with_context(|| format!("making {}", host.display()))?;
        let fifo = |kind: &str| -> Result<(String, PathBuf)> {
            let file = format!("{name}-{kind}");
            let path = host.join(&file);
            nix::unistd::mkfifo(&path, Mode::from_bits_truncate(0o600))
                .with_context(|| format!("making the FIFO {}", path.display()))?;
            Ok((format!("{FOLDER}/{file}"), path))
        };
        let mut stdio = Stdio {
            stdin: String::new(),
            stdout: String::new(),
            stderr: String::new(),
            terminal,
            host_stdin: None,
            out: None,
            err: None,
        };
        if stdin {
            let (inside, outside) = fifo("stdin")?;
            stdio.stdin = inside;
            stdio.host_stdin = Some(outside);
        }
        let (inside, outside) = fifo("stdout")?;
        stdio.stdout = inside;
        stdio.out = Some(Reader::of(outside));
        if !terminal {
            let (inside, outside) = fifo("stderr")?;
            stdio.stderr = inside;
            stdio.err = Some(Reader::of(outside));
        }
        Ok(stdio)
    }

    /// No stdio at all, as a detached container may have.
    pub fn none() -> Stdio {
        let none = String::new;
        Stdio {
            stdin: none(),
            stdout: none(),
            stderr: none(),
            terminal: false,
            host_stdin: None,
            out: None,
            err: None,
        }
    }

    /// Output to a URI that the shim understands, as clients name it: for both streams.
    pub fn to(uri: &str, terminal: bool) -> Stdio {
        Stdio {
            stdout: uri.to_owned(),
            stderr: uri.to_owned(),
            terminal,
            ..Stdio::none()
        }
    }

    /// A writer to stdin. Both ends are opened, so this does not wait for the shim.
    pub fn writer(&self) -> Result<Writer> {
        let path = self
            .host_stdin
            .as_ref()
            .context("this process was made without stdin")?;
        Ok(Writer(
            OpenOptions::new().read(true).write(true).open(path)?,
        ))
    }

    /// What the process writes to stdout, or to its terminal.
    pub fn out(&self) -> Result<&Reader> {
        self.out
            .as_ref()
            .context("this process was made without stdout")
    }

    /// What it writes to stderr.
    pub fn err(&self) -> Result<&Reader> {
        self.err
            .as_ref()
            .context("this process was made without stderr")
    }
}

/// Writes to a stdin; dropped, its end is closed.
#[derive(Debug)]
pub struct Writer(File);

impl Writer {
    /// Writes all of `text`, which must fit a pipe (64 KiB) while nobody reads.
    pub fn write(&mut self, text: &str) -> Result<()> {
        Ok(self.0.write_all(text.as_bytes())?)
    }
}

#[derive(Debug, Default)]
struct Seen {
    bytes: Vec<u8>,
    ended: bool,
}

/// Collects an output. A thread reads, because opening a FIFO waits for the other end; it ends with the output.
#[derive(Debug, Clone)]
pub struct Reader(watch::Receiver<Seen>);

impl Reader {
    fn of(path: PathBuf) -> Reader {
        let (seen, reader) = watch::channel(Seen::default());
        std::thread::spawn(move || {
            if let Ok(mut fifo) = File::open(path) {
                let mut buffer = [0; 1 << 16];
                while let Ok(n @ 1..) = fifo.read(&mut buffer) {
                    seen.send_modify(|seen| seen.bytes.extend_from_slice(&buffer[..n]));
                }
            }
            seen.send_modify(|seen| seen.ended = true);
        });
        Reader(reader)
    }

    /// What has come until now.
    pub fn so_far(&self) -> String {
        String::from_utf8_lossy(&self.0.borrow().bytes).into_owned()
    }

    /// Waits until what has come satisfies `enough`.
    pub async fn until(&self, what: &str, enough: impl Fn(&str) -> bool) -> Result<String> {
        let text = |seen: &Seen| String::from_utf8_lossy(&seen.bytes).into_owned();
        let mut seen = self.0.clone();
        let wait = seen.wait_for(|seen| seen.ended || enough(&text(seen)));
        let Ok(Ok(_)) = tokio::time::timeout(*poll::DEADLINE, wait).await else {
            bail!(
                "waited {:?} for {what}; the output is {:?}",
                *poll::DEADLINE,
                self.so_far()
            );
        };
        let now = self.so_far();
        if !enough(&now) {
            bail!("the output ended without {what}: {now:?}");
        }
        Ok(now)
    }

    /// Waits for the output's end and answers with all of it.
    pub async fn to_end(&self) -> Result<Vec<u8>> {
        let mut seen = self.0.clone();
        match tokio::time::timeout(*poll::DEADLINE, seen.wait_for(|seen| seen.ended)).await {
            Ok(Ok(seen)) => Ok(seen.bytes.clone()),
            _ => bail!(
                "waited {:?} for the output's end; until now it is {:?}",
                *poll::DEADLINE,
                self.so_far()
            ),
        }
    }

    /// [`Reader::to_end`] as text.
    pub async fn text(&self) -> Result<String> {
        Ok(String::from_utf8_lossy(&self.to_end().await?).into_owned())
    }
}
