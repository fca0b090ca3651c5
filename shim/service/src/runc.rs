//! runc, as a command line.
//!
//! Decisions are made by exit codes and by runc's own state, not by the words of its errors, with one
//! named exception ([`RuncError::is_gone`]).

use std::{
    fs,
    io::Read,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::atomic::{AtomicU64, Ordering},
    time::{Duration, Instant},
};

use serde::Deserialize;

use crate::{
    cgroups,
    error::Error,
    exits::{Child, Exit, Exits},
    programs, rootfs, sys,
};

/// runc's default root under containerd (`process/init.go`, `RuncRoot`).
pub(crate) const DEFAULT_ROOT: &str = "/run/containerd/runc";
/// runc's own words, and crun's, for a container or process that is no longer there.
const GONE: [&str; 5] = [
    "does not exist",
    "container not running",
    "is not running",
    "no such process",
    "process already finished",
];

/// Why runc failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RuncError {
    #[error("starting {binary}: {source}; is it installed, and on containerd's PATH?")]
    Spawn {
        binary: String,
        source: std::io::Error,
    },
    #[error("{binary} {action} of container {id} failed: {message}")]
    Failed {
        binary: String,
        action: &'static str,
        id: String,
        message: String,
    },
    #[error("{binary} {action} of container {id} did not end within {} s and was killed", after.as_secs())]
    Timeout {
        binary: String,
        action: &'static str,
        id: String,
        after: Duration,
    },
    #[error("{binary} {action} of container {id} was stopped: {reason}")]
    Stopped {
        binary: String,
        action: &'static str,
        id: String,
        reason: String,
    },
    #[error("{binary} {action} of container {id}: its answer is not understood: {reason}")]
    Answer {
        binary: String,
        action: &'static str,
        id: String,
        reason: String,
    },
}

impl RuncError {
    /// Whether the container or process is gone already. runc says it with exit code 1 like everything
    /// else, so its message has to be read, as go-runc's callers do.
    pub(crate) fn is_gone(&self) -> bool {
        let Self::Failed { message, .. } = self else {
            return false;
        };
        let message = message.to_lowercase();
        GONE.iter().any(|words| message.contains(words))
    }
}

/// One container's runc.
#[derive(Debug, Clone)]
pub(crate) struct Runc {
    pub(crate) binary: String,
    /// Root of runc's state, the containerd namespace included.
    pub(crate) root: PathBuf,
    pub(crate) systemd_cgroup: bool,
    /// Where runc may write its error: the bundle.
    pub(crate) bundle: PathBuf,
    pub(crate) id: String,
    pub(crate) exits: Exits,
}

/// A started runc.
#[derive(Debug)]
pub(crate) struct Running {
    child: Child,
    action: &'static str,
    log: PathBuf,
}

impl Running {
    /// runc's own pid.
    pub(crate) fn pid(&self) -> i32 {
        self.child.pid
    }
}

#[derive(Deserialize)]
struct Message {
    #[serde(default)]
    level: String,
    #[serde(default)]
    msg: String,
}

impl Runc {
    /// Prepares `runc <action> …`; the caller adds arguments and stdio.
    pub(crate) fn command(&self, action: &'static str) -> (Command, PathBuf) {
        static RUNS: AtomicU64 = AtomicU64::new(0);
        let log = self.bundle.join(format!(
            "runc-{action}-{}.json",
            RUNS.fetch_add(1, Ordering::Relaxed)
        ));
        #[allow(clippy::disallowed_methods, reason = "this module is runc's launch")]
        let mut command = Command::new(&self.binary);
        command
            .arg("--root")
            .arg(&self.root)
            .arg("--log")
            .arg(&log)
            .args(["--log-format", "json"]);
        if self.systemd_cgroup {
            command.arg("--systemd-cgroup");
        }
        // systemd's socket, which containerd inherits: runc would bind it into the container and wait for it.
        command.env_remove("NOTIFY_SOCKET");
        command.arg(action).current_dir(&self.bundle);
        command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        (command, log)
    }

    /// Starts what [`Runc::command`] prepared.
    pub(crate) fn spawn(
        &self,
        action: &'static str,
        mut command: Command,
        log: PathBuf,
    ) -> Result<Running, RuncError> {
        // A runc that outlived its shim could finish a container that `delete` has just cleaned up.
        sys::die_with_us(&mut command);
        match self.exits.spawn(&mut command) {
            Ok(child) => Ok(Running { child, action, log }),
            Err(source) => Err(RuncError::Spawn {
                binary: self.binary.clone(),
                source,
            }),
        }
    }

    /// Waits for a started runc; past `deadline` it is killed.
    pub(crate) async fn wait(&self, running: Running, deadline: Duration) -> Result<(), RuncError> {
        self.wait_unless(running, deadline, std::future::pending())
            .await
    }

    /// Waits for a started runc; past `deadline`, or once there is `trouble`, it is killed.
    pub(crate) async fn wait_unless(
        &self,
        running: Running,
        deadline: Duration,
        trouble: impl Future<Output = String>,
    ) -> Result<(), RuncError> {
        let Running { child, action, log } = running;
        let Child { pid, mut exit } = child;
        let ended = tokio::select! {
            // What goes wrong beside it makes it fail too: that is the reason then.
            biased;
            reason = trouble => Err(RuncError::Stopped {
                binary: self.binary.clone(),
                action,
                id: self.id.clone(),
                reason,
            }),
            exit = &mut exit => Ok(exit),
            () = tokio::time::sleep(deadline) => Err(RuncError::Timeout {
                binary: self.binary.clone(),
                action,
                id: self.id.clone(),
                after: deadline,
            }),
        };
        let result = match ended {
            Ok(Exit { status: 0, .. }) => Ok(()),
            Ok(exit) => Err(self.failed(
                action,
                last_error(&log).unwrap_or_else(|| {
                    format!("it ended with status {} and left no message", exit.status)
                }),
            )),
            Err(error) => {
                // Its children first, which are CRIU and what CRIU is making, and again and again, for it may
                // only be about to start them: runc then cleans up by itself. CRIU does not die with runc.
                let grace = Instant::now() + GRACE;
                loop {
                    sys::kill_children(pid);
                    if tokio::time::timeout(AGAIN, &mut exit).await.is_ok() {
                        break;
                    }
                    if Instant::now() >= grace {
                        let _ = sys::kill(pid, libc::SIGKILL);
                        (&mut exit).await;
                        break;
                    }
                }
                Err(error)
            }
        };
        let _ = fs::remove_file(&log);
        result
    }

    fn failed(&self, action: &'static str, message: String) -> RuncError {
        RuncError::Failed {
            binary: self.binary.clone(),
            action,
            id: self.id.clone(),
            message,
        }
    }

    async fn simple(&self, action: &'static str, args: &[&str]) -> Result<(), RuncError> {
        let (mut command, log) = self.command(action);
        command.args(args);
        let running = self.spawn(action, command, log)?;
        self.wait(running, DEADLINE).await
    }

    pub(crate) async fn start(&self) -> Result<(), RuncError> {
        self.simple("start", &[&self.id]).await
    }

    pub(crate) async fn pause(&self) -> Result<(), RuncError> {
        self.simple("pause", &[&self.id]).await
    }

    pub(crate) async fn resume(&self) -> Result<(), RuncError> {
        self.simple("resume", &[&self.id]).await
    }

    /// Signals the init, or with `all` every process of the container.
    pub(crate) async fn kill(&self, signal: u32, all: bool) -> Result<(), RuncError> {
        let signal = signal.to_string();
        if all {
            self.simple("kill", &["--all", &self.id, &signal]).await
        } else {
            self.simple("kill", &[&self.id, &signal]).await
        }
    }

    /// Removes runc's state. Without `force` unless needed: a forced delete sleeps 100 ms before it
    /// looks whether the process is gone (measured; `delete.go`).
    pub(crate) async fn delete(&self, force: bool) -> Result<(), RuncError> {
        if force {
            self.simple("delete", &["--force", &self.id]).await
        } else {
            self.simple("delete", &[&self.id]).await
        }
    }

    /// Whether runc has anything of this container. Its folder comes long before `state.json` does: a
    /// runc that was killed in between leaves the one without the other.
    pub(crate) fn has_state(&self) -> bool {
        self.state_folder().exists()
    }

    fn state_folder(&self) -> PathBuf {
        self.root.join(&self.id)
    }

    /// Removes whatever runc has of this container, and what an interrupted one left: the bind of the
    /// root that a restore makes in runc's folder, through which a forced delete would otherwise empty
    /// the container's layer, and the cgroup.
    pub(crate) async fn remove(&self, cgroup: Option<&str>) -> Result<(), RuncError> {
        let deleted = if self.has_state() {
            rootfs::unmount_all(&self.state_folder());
            self.delete(true).await
        } else {
            Ok(())
        };
        if let Some(cgroup) = cgroup {
            cgroups::remove(cgroup).await;
        }
        deleted.or_else(|error| if error.is_gone() { Ok(()) } else { Err(error) })
    }

    /// Applies resources, given as the OCI JSON that containerd sends.
    pub(crate) async fn update(&self, resources: &[u8]) -> Result<(), RuncError> {
        let file = self.bundle.join("resources.json");
        fs::write(&file, resources)
            .map_err(|e| self.failed("update", format!("writing {}: {e}", file.display())))?;
        let path = file.display().to_string();
        let result = self
            .simple("update", &["--resources", &path, &self.id])
            .await;
        let _ = fs::remove_file(&file);
        result
    }

    /// The pids of the container's cgroup, in the shim's PID namespace.
    pub(crate) async fn ps(&self) -> Result<Vec<u32>, RuncError> {
        let (mut command, log) = self.command("ps");
        command.args(["--format", "json", &self.id]);
        let answer = |reason: String| RuncError::Answer {
            binary: self.binary.clone(),
            action: "ps",
            id: self.id.clone(),
            reason,
        };
        let ran = programs::capture(&self.exits, command, DEADLINE)
            .await
            .map_err(|e| answer(e.to_string()))?;
        let error = last_error(&log);
        let _ = fs::remove_file(&log);
        let (status, text) = ran;
        if status != 0 {
            return Err(self.failed(
                "ps",
                error.unwrap_or_else(|| format!("it ended with status {status}")),
            ));
        }
        serde_json::from_str::<Option<Vec<u32>>>(&text)
            .map(Option::unwrap_or_default)
            .map_err(|e| answer(e.to_string()))
    }
}

/// Reads a pid file of runc's.
pub(crate) fn read_pid(path: &Path) -> Result<i32, Error> {
    let text = fs::read_to_string(path).map_err(Error::file("reading", path))?;
    text.trim().parse().map_err(|_| {
        let reason = format!(
            "{:?} is not a pid",
            text.chars().take(20).collect::<String>()
        );
        Error::Argument {
            key: path.display().to_string(),
            reason,
        }
    })
}

/// What a runc whose children were killed may take to clean up after them.
const GRACE: Duration = Duration::from_secs(5);
/// How often they are killed meanwhile.
const AGAIN: Duration = Duration::from_millis(10);
/// For calls that only talk to the kernel. The kubelet gives the fastest of its calls two minutes.
pub(crate) const DEADLINE: Duration = Duration::from_secs(60);

/// The last error that runc wrote, cut to what fits a message.
fn last_error(log: &Path) -> Option<String> {
    let mut text = String::new();
    fs::File::open(log)
        .ok()?
        .take(1 << 20)
        .read_to_string(&mut text)
        .ok()?;
    let said = messages(&text)
        .into_iter()
        .rfind(|message| matches!(message.level.as_str(), "error" | "fatal"))?;
    Some(said.msg.trim().chars().take(2000).collect())
}

/// The messages of a log: runc writes one into a line, crun over several. A line that is none is skipped.
fn messages(mut text: &str) -> Vec<Message> {
    let mut found = Vec::new();
    while !text.is_empty() {
        let mut stream = serde_json::Deserializer::from_str(text).into_iter();
        found.extend(stream.by_ref().map_while(Result::ok));
        let rest = &text[stream.byte_offset()..];
        text = rest.split_once('\n').map_or("", |(_, rest)| rest);
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_are_found_on_one_line_and_on_several() {
        let log = "{\"level\":\"warn\",\"msg\":\"a\"}\n{\"level\":\"error\",\"msg\":\"b\"}\n\
                   panic: c\n\n{\n  \"msg\": \"d\",\n  \"level\": \"error\"\n}\n{\"level\": \"err";
        let found: Vec<_> = messages(log).into_iter().map(|m| m.msg).collect();
        assert_eq!(found, ["a", "b", "d"]);
    }
}
