//! A lazily restored container's memory, until all of it is in.

use std::{
    path::Path,
    process::{Command, Stdio},
    sync::Arc,
};

use rekindle_checkpoint::{
    VerifiedImage,
    pager::{DaemonExit, Ended, Pager},
};

use super::PhaseError;
use crate::{
    context::Fixed,
    error::{Error, sentence},
    exits::{Child, Exit},
    host::CRIU,
    sys,
};

/// The pid of a lazily restored container's pager, for a `delete` after the shim was killed. The pager
/// itself must not die with the shim: it holds the last userfaultfds then.
pub(crate) const PAGER_PID: &str = "pager.pid";

/// A lazily restored container's memory, while it is still coming in.
#[derive(Debug)]
pub(crate) struct Loading {
    pager: Pager,
    daemon: Child,
}

/// Starts the pager of a restore that is about to begin.
pub(super) fn start(
    fixed: &Fixed,
    image: Arc<VerifiedImage>,
    work: &Path,
) -> Result<Loading, Error> {
    let cannot = |reason: String| PhaseError::CannotRestore {
        id: fixed.id.clone(),
        reason,
    };
    let pager = Pager::start(Path::new(CRIU), image, work).map_err(|e| cannot(sentence(&e)))?;
    let argv = pager.daemon();
    #[allow(clippy::disallowed_methods, reason = "the launch of CRIU's pager")]
    let mut command = Command::new(&argv.program);
    command.args(&argv.args).current_dir("/");
    command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    match fixed.runc.exits.spawn(&mut command) {
        Ok(daemon) => {
            let file = fixed.bundle.join(PAGER_PID);
            if let Err(error) = std::fs::write(&file, daemon.pid.to_string()) {
                tracing::warn!(%error, "a killed shim's delete will not find the pager");
            }
            Ok(Loading { pager, daemon })
        }
        Err(error) => {
            let _ = pager.abandon(|| Ok::<(), ()>(()));
            Err(cannot(format!("starting {CRIU} lazy-pages: {error}")).into())
        }
    }
}

impl Loading {
    /// Waits until all memory is in, or `ended` says that the container has ended. Any other end of the
    /// pager is the container's: `kill` has to end it, and only then is its memory let go, for what is
    /// missing of it would read as zeros.
    pub(crate) async fn supervise<K, E>(self, id: &str, kill: K, ended: impl Fn() -> E)
    where
        K: Future<Output = ()>,
        E: Future<Output = ()>,
    {
        let Self { pager, daemon } = self;
        let pid = daemon.pid;
        let exit = daemon.exit.wait();
        tokio::pin!(exit);
        let exit = tokio::select! {
            exit = &mut exit => exit,
            () = ended() => {
                let _ = sys::kill(pid, libc::SIGKILL);
                exit.await;
                let _ = pager.abandon(|| Ok::<(), ()>(()));
                return;
            }
        };
        match pager.ended(daemon_exit(exit)) {
            Ended::Loaded => tracing::info!(id, "all memory is in"),
            Ended::Died(orphans) => {
                tracing::error!(id, reason = orphans.reason(), "the container is ended");
                kill.await;
                ended().await;
                let _ = orphans.kill_then_release(|| Ok::<(), ()>(()));
            }
        }
    }
}

impl Loading {
    /// Gives up on a restore whose tasks are gone.
    pub(super) async fn abandon(self) {
        let Self { pager, daemon } = self;
        let _ = sys::kill(daemon.pid, libc::SIGKILL);
        daemon.exit.wait().await;
        let _ = pager.abandon(|| Ok::<(), ()>(()));
    }
}

fn daemon_exit(exit: Exit) -> DaemonExit {
    match i32::try_from(exit.status) {
        Ok(status @ 129..) => DaemonExit::Signal(status - 128),
        Ok(status) => DaemonExit::Code(status),
        Err(_) => DaemonExit::Code(255),
    }
}
