//! `warm-start: auto` of a running container: whether its image was any good, or when it is worth one.

use std::{
    process::Command,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use rekindle_checkpoint::{ImageError, manifest::Source, warm::NotMade};
use rekindle_core::annotations::WarmWhen;

use super::{Container, imaging::Wish};
use crate::{
    data,
    error::{Error, sentence},
    lifecycle::State,
    phases::{PhaseError, warm::Warm},
    programs,
    threads::blocking,
};

/// A checkpoint can be refused for what is soon over: an exec that runs, say, as probes do.
const TRIES: u32 = 5;
/// Between two of them.
const PAUSE: Duration = Duration::from_secs(3);

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

    /// Notes whether a restored container goes on, or fails early by itself.
    async fn judge(&self, generation: u64) {
        let Some(warm) = &self.fixed.warm else { return };
        let node = self.fixed.shared.node.warm_start;
        let began = tokio::time::Instant::now();
        let ended = tokio::time::timeout(node.early, self.wait()).await;
        let images = warm.images.clone();
        let noted = match ended {
            Err(_) => blocking(move || images.went_on(generation).map(|()| false)).await,
            Ok(exit) if exit.status != 0 && !self.signalled.load(Ordering::Relaxed) => {
                let after = began.elapsed().as_secs();
                let why = format!(
                    "{} ended with status {} after {after} s",
                    self.fixed.id, exit.status
                );
                tracing::warn!(id = self.fixed.id, why, "it counts against its image");
                blocking(move || images.ended_early(generation, &why, node.failures)).await
            }
            Ok(_) => return,
        };
        warm.tell(generation, noted);
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
        if !is_warm {
            tracing::warn!(id, when = %warm.request.when, within = within.as_secs(), "it has not become warm; no image is made");
            return;
        }
        for again in 1..=TRIES {
            match self.make_warm(warm).await {
                Ok(Ok(image)) => {
                    return tracing::info!(id, image, "image made for others of its kind");
                }
                Ok(Err(NotMade::Hopeless)) => {
                    return tracing::warn!(id, reason = %NotMade::Hopeless, "no image is made");
                }
                Ok(Err(reason)) => return tracing::debug!(id, %reason, "no image is made"),
                Err(error) => {
                    let error = sentence(&error);
                    tracing::warn!(id, error, again, of = TRIES, "no image was made");
                }
            }
            tokio::select! {
                _ = self.wait() => return,
                () = tokio::time::sleep(PAUSE) => {}
            }
        }
    }

    /// Whether it becomes warm in time.
    async fn is_warm(&self, when: &WarmWhen, within: Duration) -> bool {
        if let WarmWhen::After(after) = when {
            tokio::time::sleep(*after).await;
            return true;
        }
        #[allow(clippy::disallowed_methods, reason = "the launch of the CLI")]
        let mut command = Command::new(data::program());
        command.args(["await", "--pid", &self.view().pid.to_string()]);
        command.args(["--within", &format!("{}ms", within.as_millis())]);
        command.arg(when.to_string());
        // Its own clock is the one that counts.
        let deadline = within + Duration::from_secs(10);
        let answer = programs::capture(&self.fixed.runc.exits, command, deadline).await;
        matches!(answer, Ok((0, _)))
    }

    async fn make_warm(self: &Arc<Self>, warm: &Warm) -> Result<Result<String, NotMade>, Error> {
        let cannot = |error: ImageError| PhaseError::CannotCheckpoint {
            id: self.fixed.id.clone(),
            reason: sentence(&error),
        };
        let state = self.view().state;
        if state != State::Running {
            let reason = "it does not run just now".to_owned();
            let id = self.fixed.id.clone();
            return Err(PhaseError::CannotCheckpoint { id, reason }.into());
        }
        let images = warm.images.clone();
        let making = blocking(move || images.make()).await?.map_err(cannot)?;
        let making = match making {
            Ok(making) => making,
            Err(reason) => return Ok(Err(reason)),
        };
        let (images, kind) = (warm.images.clone(), warm.kind.clone());
        blocking(move || images.describe(&kind))
            .await?
            .map_err(cannot)?;
        let (_, name) = warm.images.name();
        let wish = Wish {
            name: name.clone(),
            source: Source {
                // What its kind was taken from, whatever the tag points to by now.
                image_digest: Some(warm.kind.image.clone()),
                warm: true,
                ..Source::default()
            },
        };
        let image = self.make_image(wish).await?;
        drop(making);
        self.make_room(warm).await;
        Ok(Ok(image))
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
