//! pid → exit. The only place that reaps.
//!
//! The shim is the subreaper of its containers, so children arrive that it never started, and a
//! container's init may be dead before its pid is known. Therefore every `waitpid` happens here, and
//! whoever is about to create a process of unknown pid first opens a [`Window`]: exits seen while it
//! is open are kept until they are claimed by pid.

use std::{
    collections::HashMap,
    io,
    pin::Pin,
    process::Command,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll},
    time::SystemTime,
};

use containerd_shim_protos::protobuf::{MessageField, well_known_types::timestamp::Timestamp};
use nix::{
    errno::Errno,
    sys::wait::{WaitPidFlag, WaitStatus, waitpid},
};
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::oneshot,
};

use crate::sys;

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Exit {
    /// The exit code, or 128 plus the signal's number.
    pub(crate) status: u32,
    /// When it was reaped.
    pub(crate) at: SystemTime,
}

/// Handle to the table of exits.
#[derive(Debug, Clone, Default)]
pub(crate) struct Exits(Arc<Mutex<Table>>);

#[derive(Debug, Default)]
struct Table {
    claims: HashMap<i32, oneshot::Sender<Exit>>,
    windows: HashMap<u64, HashMap<i32, Exit>>,
    next_window: u64,
}

/// Resolves when the process has ended.
#[derive(Debug)]
pub(crate) struct ExitOf(oneshot::Receiver<Exit>);

impl ExitOf {
    /// Whether the process has been reaped, heard of here or not.
    fn has_come(&self) -> bool {
        self.0.is_terminated() || !self.0.is_empty()
    }
}

impl Future for ExitOf {
    type Output = Exit;

    /// The table answers every claim, so the other case is a shim that goes away.
    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Exit> {
        let exit = Pin::new(&mut self.0).poll(context);
        exit.map(|exit| {
            exit.unwrap_or(Exit {
                status: 255,
                at: SystemTime::now(),
            })
        })
    }
}

/// A process that the shim started itself.
#[derive(Debug)]
pub(crate) struct Child {
    pub(crate) pid: i32,
    pub(crate) exit: ExitOf,
}

/// Keeps exits of unknown pids from here until it is dropped.
#[derive(Debug)]
pub(crate) struct Window {
    exits: Exits,
    id: u64,
}

impl Exits {
    fn table(&self) -> MutexGuard<'_, Table> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Starts a process. The table is locked meanwhile, so that its exit cannot be seen before its claim.
    pub(crate) fn spawn(&self, command: &mut Command) -> io::Result<Child> {
        sys::descriptors_as_before(command);
        let mut table = self.table();
        #[allow(
            clippy::disallowed_methods,
            reason = "the one place where the shim starts processes"
        )]
        let child = command.spawn()?;
        let pid = child.id() as i32;
        let (sender, receiver) = oneshot::channel();
        table.claims.insert(pid, sender);
        Ok(Child {
            pid,
            exit: ExitOf(receiver),
        })
    }

    /// Kills a process that was started here, unless it has been reaped: its number may be another's then.
    pub(crate) fn kill(&self, child: &Child) {
        self.signal(child, libc::SIGKILL);
    }

    /// Signals a process that was started here, unless it has been reaped.
    pub(crate) fn signal(&self, child: &Child, signal: i32) {
        // Exits are told with the table locked.
        let _table = self.table();
        if !child.exit.has_come() {
            let _ = sys::kill(child.pid, signal);
        }
    }

    /// Opens a window for a process whose pid is not known yet.
    pub(crate) fn window(&self) -> Window {
        let mut table = self.table();
        let id = table.next_window;
        table.next_window += 1;
        table.windows.insert(id, HashMap::new());
        Window {
            exits: self.clone(),
            id,
        }
    }

    /// Reaps until the runtime ends.
    pub(crate) async fn reap(self) -> io::Result<()> {
        let mut children = signal(SignalKind::child())?;
        loop {
            self.sweep();
            if children.recv().await.is_none() {
                return Ok(());
            }
        }
    }

    fn sweep(&self) {
        loop {
            // Locked over both: a claim that is there is of a process that has its number still.
            let mut table = self.table();
            let (pid, status) = match waitpid(None, Some(WaitPidFlag::WNOHANG)) {
                Ok(WaitStatus::Exited(pid, code)) => (pid.as_raw(), code as u32),
                Ok(WaitStatus::Signaled(pid, signal, _)) => (pid.as_raw(), 128 + signal as u32),
                Ok(WaitStatus::StillAlive) | Err(Errno::ECHILD) => return,
                Ok(_) | Err(_) => continue,
            };
            let exit = Exit {
                status,
                at: SystemTime::now(),
            };
            match table.claims.remove(&pid) {
                Some(claim) => {
                    let _ = claim.send(exit);
                }
                None => {
                    for window in table.windows.values_mut() {
                        window.insert(pid, exit);
                    }
                }
            }
        }
    }
}

impl Window {
    /// Claims the exit of `pid`, whether it has been seen already or not.
    pub(crate) fn claim(self, pid: i32) -> ExitOf {
        let (sender, receiver) = oneshot::channel();
        let mut table = self.exits.table();
        match table
            .windows
            .get(&self.id)
            .and_then(|seen| seen.get(&pid))
            .copied()
        {
            Some(exit) => {
                let _ = sender.send(exit);
            }
            None => {
                table.claims.insert(pid, sender);
            }
        }
        ExitOf(receiver)
    }
}

impl Drop for Window {
    fn drop(&mut self) {
        self.exits.table().windows.remove(&self.id);
    }
}

/// Seconds and nanoseconds since 1970, as the task API wants it.
pub(crate) fn timestamp(at: SystemTime) -> MessageField<Timestamp> {
    let since = at
        .duration_since(SystemTime::UNIX_EPOCH)
        .unwrap_or_default();
    let mut stamp = Timestamp::new();
    stamp.seconds = i64::try_from(since.as_secs()).unwrap_or(i64::MAX);
    stamp.nanos = since.subsec_nanos().cast_signed();
    MessageField::some(stamp)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn an_exit_is_known_whether_claimed_before_or_after_it_happened() {
        let exits = Exits::default();
        let reaper = tokio::spawn(exits.clone().reap());
        let child = exits
            .spawn(Command::new("sh").args(["-c", "exit 7"]))
            .unwrap();
        assert_eq!(child.exit.await.status, 7);

        // As a container's init: nobody claims it until it is dead.
        let window = exits.window();
        let orphan = exits
            .spawn(Command::new("sh").args(["-c", "kill -9 $$"]))
            .unwrap();
        let unclaimed = exits.table().claims.remove(&orphan.pid);
        assert!(unclaimed.is_some());
        let marker = exits.spawn(&mut Command::new("true")).unwrap();
        marker.exit.await;
        while !exits.table().windows[&window.id].contains_key(&orphan.pid) {
            tokio::task::yield_now().await;
        }
        assert_eq!(window.claim(orphan.pid).await.status, 137);
        assert!(exits.table().windows.is_empty());
        reaper.abort();
    }
}
