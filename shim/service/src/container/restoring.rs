//! A container's way from an image to running, and until all of its memory is in.

use std::{sync::Arc, time::Duration};

use rekindle_core::annotations::Policy;

use super::{Container, lock};
use crate::{
    error::Error,
    lifecycle::State,
    phases::{
        PhaseError,
        restore::{self, Loading, Restored},
        warm,
    },
    sys,
};

/// How long a container whose pager has died may take to end before it is killed once more.
const AGAIN: Duration = Duration::from_secs(5);

/// A restore under way.
#[derive(Debug, Default)]
pub(super) struct Restoring {
    /// The runc that does it, while there is one.
    runc: Option<i32>,
    /// The signal of a kill that came meanwhile.
    killed: Option<u32>,
}

impl Container {
    /// What a start does for a container that was created from an image. Whether it was restored, and not started cold.
    pub(super) async fn restore(self: &Arc<Self>) -> Result<bool, Error> {
        let taken = (lock(&self.source).take(), lock(&self.io).take());
        let (Some(source), Some(mut io)) = taken else {
            // A restore that failed: what it left behind is not tried again.
            return Err(Error::InitEnded(self.fixed.id.clone()));
        };
        *lock(&self.restoring) = Some(Restoring::default());
        let running = |pid| {
            if let Some(restoring) = lock(&self.restoring).as_mut() {
                restoring.runc = pid;
            }
        };
        let mut was_restored = true;
        let mut restored = restore::run(&self.fixed, &mut io, source, running).await;
        let plan = self.fixed.plan.restore.as_ref();
        if let Err(error) = &restored
            && self.kill_asked().is_none()
            && plan.is_some_and(|plan| plan.policy == Policy::Opportunistic)
        {
            tracing::warn!(id = self.fixed.id, %error, "starting cold: the restore policy is Opportunistic");
            warm::failed(&self.fixed, error).await;
            was_restored = false;
            let cold = restore::cold(&self.fixed, &mut io).await;
            restored = cold.map(|(pid, exit)| Restored {
                pid,
                exit,
                loading: None,
            });
        }
        *lock(&self.io) = Some(io);
        let killed = self.kill_asked();
        let restored = match restored {
            Ok(restored) => restored,
            Err(error) => {
                *lock(&self.restoring) = None;
                return Err(if killed.is_some() {
                    Error::Finished(self.fixed.id.clone())
                } else {
                    error
                });
            }
        };
        self.view.send_modify(|view| view.pid = restored.pid);
        self.watch_init(restored.exit);
        if let Some(loading) = restored.loading {
            self.supervise(loading);
        }
        // A kill that came too late to stop the restore still means the container.
        self.enter(State::Running);
        if let Some(restoring) = lock(&self.restoring).take()
            && let Some(signal) = restoring.killed
        {
            let this = Arc::clone(self);
            tokio::spawn(async move {
                if let Err(error) = this.fixed.runc.kill(signal, false).await {
                    tracing::debug!(%error, "delivering a kill that came during the restore");
                }
            });
        }
        Ok(was_restored)
    }

    fn kill_asked(&self) -> Option<u32> {
        lock(&self.restoring)
            .as_ref()
            .and_then(|restoring| restoring.killed)
    }

    /// A kill of a container that was created from an image and does not run yet.
    pub(super) fn kill_restore(&self, signal: u32) -> Result<(), Error> {
        let mut restoring = lock(&self.restoring);
        let Some(restoring) = restoring.as_mut() else {
            return Err(Error::Finished(self.fixed.id.clone()));
        };
        if ![libc::SIGKILL, libc::SIGTERM].contains(&signal.cast_signed()) {
            let reason = "it is being restored; only SIGTERM and SIGKILL reach it".to_owned();
            return Err(Error::Argument {
                key: format!("signal {signal} to container {}", self.fixed.id),
                reason,
            });
        }
        restoring.killed = Some(signal);
        if let Some(runc) = restoring.runc {
            // Its children are CRIU and what CRIU is making; runc itself is left to clean up after them.
            sys::kill_children(runc);
        }
        Ok(())
    }

    /// Looks after a lazily restored container until all of its memory is in.
    fn supervise(self: &Arc<Self>, loading: Loading) {
        self.loading.send_replace(true);
        let this = Arc::clone(self);
        tokio::spawn(async move {
            let ended = || async {
                this.wait().await;
            };
            // Until it has ended: its tasks wait for pages that nobody brings.
            let kill = async {
                loop {
                    let killed = this.fixed.runc.kill(libc::SIGKILL.cast_unsigned(), false);
                    if let Err(error) = killed.await {
                        tracing::error!(%error, "killing a container whose pager died");
                    }
                    if tokio::time::timeout(AGAIN, ended()).await.is_ok() {
                        break;
                    }
                }
            };
            loading.supervise(&this.fixed.id, kill, ended).await;
            this.loading.send_replace(false);
        });
    }

    /// Waits until no page of the image is missing any more: what is not there yet cannot be dumped.
    pub(super) async fn drained(&self) -> Result<(), Error> {
        let mut loading = self.loading.subscribe();
        let deadline = self.fixed.shared.node.deadlines.checkpoint;
        if tokio::time::timeout(deadline, loading.wait_for(|loading| !loading))
            .await
            .is_err()
        {
            let reason = format!("its memory is still loading after {} s", deadline.as_secs());
            return Err(PhaseError::CannotCheckpoint {
                id: self.fixed.id.clone(),
                reason,
            }
            .into());
        }
        Ok(())
    }
}
