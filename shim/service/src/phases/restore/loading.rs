//! A lazily restored container's memory, until all of it is in.

use std::{
    io,
    path::Path,
    process::{Command, Stdio},
    sync::Arc,
};

use rekindle_checkpoint::{
    StagedImage,
    pager::{Ended, Pager, PagerExit},
    pages::start_time,
};

use super::PhaseError;
use crate::{
    context::Fixed,
    data,
    error::{Error, sentence},
    exits::{Child, Exit, Exits},
    sys,
};

/// In the bundle: the pid of the pager, and when it was started, by which its number is told from the same
/// number of a later process.
const PAGER_PID: &str = "pager.pid";

/// A lazily restored container's memory, while it is still coming in.
#[derive(Debug)]
pub(crate) struct Loading {
    pager: Pager,
    exits: Exits,
    process: Child,
    /// Of the process, once it is known.
    ended: Option<Exit>,
}

/// Starts the pager of a restore that is about to begin.
pub(super) fn start(fixed: &Fixed, image: Arc<StagedImage>, work: &Path) -> Result<Loading, Error> {
    let cannot = |reason: String| PhaseError::CannotRestore {
        id: fixed.id.clone(),
        reason,
    };
    sys::more_descriptors();
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
            if let Err(error) = remember(&fixed.bundle, process.pid) {
                tracing::warn!(%error, "a killed shim's delete will not find the pager");
            }
            Ok(Loading {
                pager,
                exits: fixed.runc.exits.clone(),
                process,
                ended: None,
            })
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
    pub(crate) async fn supervise<K, E>(mut self, id: &str, kill: K, ended: impl Fn() -> E)
    where
        K: Future<Output = ()>,
        E: Future<Output = ()>,
    {
        let exit = tokio::select! {
            exit = self.process_ended() => exit,
            () = ended() => return self.abandon().await,
        };
        match self.pager.ended(pager_exit(exit)) {
            Ended::Loaded { said } => {
                tracing::info!(id, pager = said.unwrap_or_default(), "all memory is in");
            }
            Ended::Died(orphans) => {
                tracing::error!(id, reason = orphans.reason(), "the container is ended");
                kill.await;
                ended().await;
                let _ = orphans.kill_then_release(|| Ok::<(), ()>(()));
            }
        }
    }

    /// Waits until the restore cannot succeed any more, because of the pager; the reason.
    pub(super) async fn trouble(&mut self) -> String {
        let exit = self.process_ended().await;
        match self.pager.trouble(pager_exit(exit)) {
            Some(reason) => reason,
            None => std::future::pending().await,
        }
    }

    /// Gives up on a container whose tasks are gone.
    pub(super) async fn abandon(mut self) {
        self.exits.kill(&self.process);
        self.process_ended().await;
        let _ = self.pager.abandon(|| Ok::<(), ()>(()));
    }

    async fn process_ended(&mut self) -> Exit {
        match self.ended {
            Some(exit) => exit,
            None => *self.ended.insert((&mut self.process.exit).await),
        }
    }
}

fn remember(bundle: &Path, pid: i32) -> io::Result<()> {
    let begun = start_time(pid)?;
    std::fs::write(bundle.join(PAGER_PID), format!("{pid} {begun}"))
}

/// Ends the pager of a container whose shim was killed while its memory was still coming in, and whose tasks
/// are gone. It does not die with the shim: it holds the last userfaultfds then.
pub(crate) fn end_orphaned(bundle: &Path) {
    let Ok(text) = std::fs::read_to_string(bundle.join(PAGER_PID)) else {
        return;
    };
    let Some((pid, begun)) = text.split_once(' ') else {
        return;
    };
    if let (Ok(pid), Ok(begun)) = (pid.parse(), begun.parse::<u64>())
        && start_time(pid).is_ok_and(|now| now == begun)
    {
        let _ = sys::kill(pid, libc::SIGKILL);
    }
}

fn pager_exit(exit: Exit) -> PagerExit {
    match i32::try_from(exit.status) {
        Ok(status @ 129..) => PagerExit::Signal(status - 128),
        Ok(status) => PagerExit::Code(status),
        Err(_) => PagerExit::Code(255),
    }
}
