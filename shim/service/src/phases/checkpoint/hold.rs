//! Stops a container's tasks where CRIU can dump them.

use std::{fs, time::Duration};

use rekindle_checkpoint::pages::Tasks;

use super::PhaseError;
use crate::{context::Fixed, error::Error, sys};

/// How often the tasks are stopped anew. Each time takes two calls of runc, and a program that starts others
/// without a pause spends about a tenth of its time between vfork and exec.
const ATTEMPTS: u32 = 20;
/// How long they run in between; what stands between vfork and exec mostly needs far less to get past it.
const BETWEEN: Duration = Duration::from_millis(2);

/// Freezes the container, with no task between `vfork` and `exec`. After an error it may be frozen or not.
///
/// By runc and before CRIU looks: on cgroup v1 a tree that forks can keep CRIU's own freezing from ever
/// ending, which runc knows how to get round. And a parent in `vfork` cannot be stopped by ptrace before its
/// child has called `exec`; CRIU, which has stopped the child, waits ten seconds for it and fails.
pub(super) async fn hold(fixed: &Fixed, init: i32) -> Result<(), Error> {
    fixed.runc.pause().await?;
    for _ in 1..ATTEMPTS {
        if in_vfork(init).is_none() {
            return Ok(());
        }
        fixed.runc.resume().await?;
        tokio::time::sleep(BETWEEN).await;
        fixed.runc.pause().await?;
    }
    match in_vfork(init) {
        None => Ok(()),
        Some(pid) => Err(stuck(fixed, pid, "try again")),
    }
}

/// The same for a container that its user has paused, and that is not to be moved.
pub(super) fn require_dumpable(fixed: &Fixed, init: i32) -> Result<(), Error> {
    match in_vfork(init) {
        None => Ok(()),
        Some(pid) => Err(stuck(fixed, pid, "resume it, pause it and try again")),
    }
}

/// Refuses a container with a process that somebody has stopped, where that is frozen too. Under cgroup v1 it cannot come
/// to where `ptrace` waits for it: CRIU would wait as long as it is let, and all others with it (Linux 6.18, CRIU 4.2).
pub(super) fn refuse_stopped(fixed: &Fixed, init: i32) -> Result<(), Error> {
    let groups = fs::read_to_string(format!("/proc/{init}/cgroup")).unwrap_or_default();
    if !groups.lines().any(|line| line.contains(":freezer:")) {
        return Ok(());
    }
    let tasks = Tasks::below(init).unwrap_or_default().all();
    let Some(task) = tasks.iter().find(|task| is_stopped(task.pid)) else {
        return Ok(());
    };
    let reason = format!(
        "its process {} ({}) is stopped (SIGSTOP), which CRIU cannot dump under cgroup v1; let it go on (`kill -CONT`)",
        task.pid, task.comm
    );
    Err(PhaseError::CannotCheckpoint {
        id: fixed.id.clone(),
        reason,
    }
    .into())
}

/// Also of a process that is frozen: that has another state, but waits in the kernel where it was stopped.
fn is_stopped(pid: i32) -> bool {
    let read = |file: &str| fs::read_to_string(format!("/proc/{pid}/{file}")).unwrap_or_default();
    read("wchan").contains("do_signal_stop") || read("status").contains("\nState:\tT ")
}

fn stuck(fixed: &Fixed, pid: i32, advice: &str) -> Error {
    let reason = format!(
        "its process {pid} shares its memory with its parent (it is between vfork and exec), which CRIU cannot dump; {advice}"
    );
    PhaseError::CannotCheckpoint {
        id: fixed.id.clone(),
        reason,
    }
    .into()
}

/// A task, by its number on the node, that has its parent's memory. What cannot be looked at is for the dump
/// to say.
fn in_vfork(init: i32) -> Option<i32> {
    let tasks = Tasks::below(init).ok()?.all();
    let mut below = tasks.iter().filter(|task| task.pid != init);
    let task = below.find(|task| sys::share_memory(task.pid, task.parent))?;
    Some(task.pid)
}
