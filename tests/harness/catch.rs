//! Striking a program of the node at a chosen moment.

use crate::{Node, poll};
use anyhow::{Context, Result};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::time::Duration;

/// How often is looked: shorter than what is to be caught lives.
const AGAIN: Duration = Duration::from_millis(1);

impl Node {
    /// Waits for a process of the node with all of `words` in its command line, looking all the time, and sends it a
    /// signal. After a SIGSTOP it stands still.
    pub async fn catch(&self, words: &[&str], signal: Signal) -> Result<Pid> {
        let look = async {
            loop {
                for (pid, _) in self.processes_with(words)? {
                    let pid = Pid::from_raw(pid.try_into()?);
                    // It may be gone, or be at its end: runc asks CRIU for its version first.
                    let sent = kill(pid, signal).is_ok();
                    if sent && (signal != Signal::SIGSTOP || stands_still(pid)) {
                        return anyhow::Ok(pid);
                    }
                }
                tokio::time::sleep(AGAIN).await;
            }
        };
        tokio::time::timeout(*poll::DEADLINE, look)
            .await
            .with_context(|| format!("no process with {words:?} was seen"))?
    }
}

fn stands_still(pid: Pid) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit(") ")
        .next()
        .is_some_and(|rest| rest.starts_with('T'))
}
