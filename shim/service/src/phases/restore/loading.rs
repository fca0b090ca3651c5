//! A lazily restored container's memory, until all of it is in.

use std::{
    path::Path,
    process::{Command, Stdio},
    sync::Arc,
};

use rekindle_checkpoint::{
    VerifiedImage,
    pager::{Ended, Pager, PagerExit},
};

use super::PhaseError;
use crate::{
    context::Fixed,
    data,
    error::{Error, sentence},
    exits::{Child, Exit},
    sys,
};

/// The pid of a lazily restored container's pager, for a `delete` after the shim was killed. The pager
/// itself must not die with the shim: it holds the last userfaultfds then.
pub(crate) const PAGER_PID: &str = "pager.pid";

/// A lazily restored container's memory, while it is still coming in.
#[derive(Debug)]
pub(crate) struct Loading {
    pager: Pager,
    process: Child,
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
    let program = data::program();
    let (pager, launch) = Pager::start(&program, image, work).map_err(|e| cannot(sentence(&e)))?;
    #[allow(clippy::disallowed_methods, reason = "the launch of the pager")]
    let mut command = Command::new(&launch.argv.program);
    command.args(&launch.argv.args).current_dir("/");
    command
        .stdin(launch.stdin)
        .stdout(Stdio::null())
        .stderr(launch.stderr);
    match fixed.runc.exits.spawn(&mut command) {
        Ok(process) => {
            let file = fixed.bundle.join(PAGER_PID);
            if let Err(error) = std::fs::write(&file, process.pid.to_string()) {
                tracing::warn!(%error, "a killed shim's delete will not find the pager");
            }
            Ok(Loading { pager, process })
        }
        Err(error) => {
            let _ = pager.abandon(|| Ok::<(), ()>(()));
            let program = program.display();
            Err(cannot(format!("starting the pager, {program}: {error}")).into())
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
        let Self { pager, process } = self;
        let pid = process.pid;
        let exit = process.exit.wait();
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
        match pager.ended(pager_exit(exit)) {
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
        let Self { pager, process } = self;
        let _ = sys::kill(process.pid, libc::SIGKILL);
        process.exit.wait().await;
        let _ = pager.abandon(|| Ok::<(), ()>(()));
    }
}

fn pager_exit(exit: Exit) -> PagerExit {
    match i32::try_from(exit.status) {
        Ok(status @ 129..) => PagerExit::Signal(status - 128),
        Ok(status) => PagerExit::Code(status),
        Err(_) => PagerExit::Code(255),
    }
}
