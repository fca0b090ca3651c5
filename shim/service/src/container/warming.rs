//! `warm-start: auto` of a running container: whether its image was any good, or when it is worth one.

use std::{
    process::Command,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use rekindle_checkpoint::{
    ImageError, ImageStore,
    manifest::Source,
    warm::{End, NotMade},
};
use rekindle_core::annotations::{AfterRestore, WarmWhen};

use super::{Container, imaging::Wish};
use crate::{
    data,
    error::{Error, sentence},
    lifecycle::State,
    phases::{
        PhaseError,
        warm::{self, Warm},
    },
    programs,
    threads::blocking,
};

/// Tries to make an image while something is in the way that is soon over: an exec, as probes are, or another container
/// that makes one.
const TRIES: u32 = 20;
/// Between two of them.
const PAUSE: Duration = Duration::from_secs(3);

/// Why there is no image.
#[derive(Debug)]
enum Unmade {
    /// Something is in the way that is soon over.
    NotNow(String),
    /// Nobody wants one, or there is no room.
    No(NotMade),
    /// It has changed, or is about to end: what it is now, no other container is to become.
    NotThis(&'static str),
    Failed(Error),
}

impl From<Error> for Unmade {
    fn from(error: Error) -> Self {
        match error {
            Error::Phase(PhaseError::ExecRunning { .. }) => Self::NotNow(error.to_string()),
            error => Self::Failed(error),
        }
    }
}

impl Container {
    /// To be called when it has started: `restored` from an image, or cold.
    pub(super) fn keep_warm(self: &Arc<Self>, restored: bool) {
        let Some(warm) = &self.fixed.warm else { return };
        let this = Arc::clone(self);
        match (restored, warm.generation) {
            (true, Some(generation)) => {
                tokio::spawn(async move { this.judge(generation).await });
            }
            _ => {
                tokio::spawn(async move { this.warm_up().await });
            }
        }
    }

    /// Whether somebody has signalled it: then its end is not its own doing, and it may be about to end.
    fn was_signalled(&self) -> bool {
        self.signalled.load(Ordering::Relaxed)
    }

    /// The status with which it ends where the signal that it is told by after its restore kills it.
    fn told_by(&self) -> Option<u32> {
        match self.fixed.plan.after_restore {
            Some(AfterRestore::Signal(number)) => Some(128 + number.unsigned_abs()),
            _ => None,
        }
    }

    /// Notes whether a restored container goes on, or ends early.
    async fn judge(&self, generation: u64) {
        let Some(warm) = &self.fixed.warm else { return };
        let node = self.fixed.shared.node.warm_start;
        let began = tokio::time::Instant::now();
        let ended = tokio::time::timeout(node.early, self.wait()).await;
        let images = warm.images.clone();
        let Ok(exit) = ended else {
            let noted = blocking(move || images.went_on(generation).map(|()| false)).await;
            return warm.tell(generation, noted);
        };
        let end = match self.was_signalled() {
            true => End::Signalled,
            // It has done what it had to do.
            false if exit.status == 0 => return,
            // It had no handler for what its own pod has it told.
            false if self.told_by() == Some(exit.status) => return,
            false => End::Failed,
        };
        let (id, after) = (&self.fixed.id, began.elapsed().as_secs());
        let why = format!("{id} ended with status {} after {after} s", exit.status);
        tracing::info!(id, why, ?end, "it counts against its image");
        let note = move || images.ended_early(generation, &why, end, node.failures);
        warm.tell(generation, blocking(note).await);
    }

    /// Waits until it is warm, and makes an image of it unless somebody else has.
    async fn warm_up(self: &Arc<Self>) {
        let Some(warm) = &self.fixed.warm else { return };
        let within = self.fixed.shared.node.warm_start.within;
        let is_warm = tokio::select! {
            _ = self.wait() => return,
            is_warm = self.is_warm(&warm.request.when, within) => is_warm,
        };
        let id = &self.fixed.id;
        if let Err(reason) = is_warm {
            tracing::warn!(id, when = %warm.request.when, reason, "it has not become warm; no image is made");
            return;
        }
        for _ in 0..TRIES {
            match self.make_warm(warm).await {
                Ok(image) => return tracing::info!(id, image, "image made for others of its kind"),
                Err(Unmade::NotNow(reason)) => tracing::info!(id, reason, "trying again"),
                Err(Unmade::No(reason @ NotMade::Exists)) => {
                    return tracing::debug!(id, %reason, "no image is made");
                }
                Err(Unmade::No(reason)) => {
                    return tracing::warn!(id, %reason, "no image is made");
                }
                Err(Unmade::NotThis(reason)) => {
                    return tracing::info!(id, reason, "no image is made");
                }
                Err(Unmade::Failed(error)) => {
                    tracing::warn!(id, error = sentence(&error), "no image was made");
                    // The next one of its kind would stand still for nothing, too.
                    let images = warm.images.clone();
                    if !self.was_signalled()
                        && let Ok(Err(error)) = blocking(move || images.not_made()).await
                    {
                        tracing::warn!(id, error = sentence(&error), "nothing was noted of it");
                    }
                    return;
                }
            }
            tokio::select! {
                _ = self.wait() => return,
                () = tokio::time::sleep(PAUSE) => {}
            }
        }
    }

    /// Waits until it is warm; why it has not become so.
    async fn is_warm(&self, when: &WarmWhen, within: Duration) -> Result<(), String> {
        if let WarmWhen::After(after) = when {
            tokio::time::sleep(*after).await;
            return Ok(());
        }
        #[allow(clippy::disallowed_methods, reason = "the launch of the CLI")]
        let mut command = Command::new(data::program());
        command.args(["await", "--pid", &self.view().pid.to_string()]);
        command.args(["--within", &format!("{}ms", within.as_millis())]);
        command.arg(when.to_string());
        if *when == WarmWhen::Ready {
            let identity = &self.fixed.plan.identity;
            let (Some(pod), Some(uid)) = (&identity.pod, &identity.pod_uid) else {
                return Err("its pod has no name or no uid".to_owned());
            };
            let kubeconfig = warm::kubeconfig(&self.fixed.shared.node)?;
            command.arg("--kubeconfig").arg(kubeconfig);
            command.args(["--pod", pod, "--uid", uid, "--container", &self.fixed.id]);
        }
        // Its own clock is the one that counts.
        let deadline = within + Duration::from_secs(10);
        match programs::outcome(&self.fixed.runc.exits, command, deadline).await {
            Ok((0, _)) => Ok(()),
            Ok((1, reason)) if !reason.is_empty() => Err(reason.trim_end().to_owned()),
            Ok((status, _)) => Err(format!("`rekindle await` ended with status {status}")),
            Err(error) => Err(format!("`rekindle await`: {error}")),
        }
    }

    async fn make_warm(self: &Arc<Self>, warm: &Warm) -> Result<String, Unmade> {
        let failed = |error: ImageError| {
            Unmade::Failed(
                PhaseError::CannotCheckpoint {
                    id: self.fixed.id.clone(),
                    reason: sentence(&error),
                }
                .into(),
            )
        };
        if self.view().state != State::Running {
            return Err(Unmade::NotNow("it does not run just now".to_owned()));
        }
        let min_free = self.fixed.shared.node.warm_start.min_free;
        let images = warm.images.clone();
        let making = blocking(move || images.make(min_free)).await?;
        let making = match making.map_err(failed)? {
            Ok(making) => making,
            Err(NotMade::Busy) => return Err(Unmade::NotNow(NotMade::Busy.to_string())),
            Err(reason) => return Err(Unmade::No(reason)),
        };
        if self.was_signalled() {
            return Err(Unmade::NotThis("it was signalled, and may be about to end"));
        }
        if !warm.is_of_its_kind().await? {
            return Err(Unmade::NotThis(
                "what is mounted has been changed since it was created",
            ));
        }
        let (namespace, name) = warm.images.name();
        let wish = Wish {
            name: name.clone(),
            source: Source {
                // What its kind was taken from, whatever the tag points to by now.
                image_digest: Some(warm.images.kind().image.clone()),
                warm: Some(warm.images.hash().to_owned()),
                ..Source::default()
            },
        };
        let image = self.make_image(wish).await?;
        if self.was_signalled() {
            let node = Arc::clone(&self.fixed.shared.node);
            let (namespace, name) = (namespace.clone(), name.clone());
            let newest = image
                .rsplit_once('@')
                .and_then(|(_, number)| number.parse().ok());
            let remove =
                move || ImageStore::of(&node.images)?.remove(&namespace, &name, newest, false);
            blocking(remove).await?.map_err(failed)?;
            return Err(Unmade::NotThis("it was signalled meanwhile"));
        }
        // Where images are encrypted, nothing of their containers lies beside them in clear.
        let describe = self.fixed.shared.node.key_for(namespace).is_none();
        let images = warm.images.clone();
        blocking(move || images.made(describe))
            .await?
            .map_err(failed)?;
        drop(making);
        self.make_room(warm).await;
        Ok(image)
    }

    /// Each version of a container image makes a kind of its own, and nobody removes the old ones' images by hand.
    async fn make_room(&self, warm: &Warm) {
        let (images, rules) = (warm.images.clone(), self.fixed.shared.node.images.retention);
        match blocking(move || images.make_room(&rules)).await {
            Ok(Ok(removed)) if removed.is_empty() => {}
            Ok(Ok(removed)) => tracing::info!(images = removed.join(", "), "removed to make room"),
            Ok(Err(error)) => tracing::warn!(error = sentence(&error), "making room"),
            Err(error) => tracing::warn!(%error, "making room"),
        }
    }
}
