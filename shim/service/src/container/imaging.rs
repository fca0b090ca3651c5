//! Images that a container gets of itself because its pod asks for them: on a timer, and before it hears of SIGTERM.
//!
//! A failed one is told in the log and changes nothing: the container runs on, and the next one is made in its time.

use std::sync::Arc;

use containerd_shim_protos::events::task::TaskCheckpointed;
use rekindle_checkpoint::{
    ImageError, ImageStore,
    manifest::{DumpFlags, Source},
};
use rekindle_core::{annotations::CheckpointRequest as Wanted, name::ImageName};

use super::{Container, lock};
use crate::{
    container_image,
    criu::CheckpointRequest,
    error::{Error, sentence},
    lifecycle::State,
    phases::PhaseError,
    threads::blocking,
};

/// Generations of an image that stay. Two, so that there is one while the newest may turn out to be useless.
const KEPT: usize = 2;

/// An image that a container is to have of itself.
#[derive(Debug)]
pub(super) struct Wish {
    pub(super) name: ImageName,
    /// What is known of where it comes from; the container image is asked for where it is not.
    pub(super) source: Source,
}

/// Where a container is on its way from a SIGTERM to hearing of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) enum Term {
    /// None has come.
    #[default]
    Awaited,
    /// Its image is being made.
    Imaging,
    /// It has heard, and will hear of all others.
    Heard,
}

impl Container {
    fn wanted(&self) -> Option<&Wanted> {
        self.fixed.plan.checkpoint.as_ref()
    }

    /// Makes its images on their timer until it ends.
    pub(super) fn keep_imaging(self: &Arc<Self>) {
        let Some(every) = self.wanted().and_then(|wanted| wanted.every) else {
            return;
        };
        let this = Arc::clone(self);
        tokio::spawn(async move {
            loop {
                tokio::select! {
                    _ = this.wait() => return,
                    () = tokio::time::sleep(every) => {}
                }
                // One that is paused has not gone on since it was.
                if this.view().state == State::Running {
                    this.image("checkpoint-every").await;
                }
            }
        });
    }

    /// Whether a signal that has come is held back, since an image is made first. The caller's answer does not wait
    /// for that: the kubelet counts the time that the pod has from there.
    pub(super) fn hold_back(self: &Arc<Self>, signal: u32, all: bool) -> bool {
        let asked = self.wanted().is_some_and(|wanted| wanted.on_term)
            && signal == libc::SIGTERM.cast_unsigned()
            && self.view().state == State::Running;
        if !asked {
            return false;
        }
        let mut term = lock(&self.term);
        match *term {
            Term::Heard => return false,
            Term::Imaging => return true,
            Term::Awaited => *term = Term::Imaging,
        }
        drop(term);
        let this = Arc::clone(self);
        tokio::spawn(async move {
            this.image("checkpoint-on-term").await;
            *lock(&this.term) = Term::Heard;
            if let Err(error) = this.kill(signal, all).await {
                tracing::debug!(id = this.fixed.id, %error, "it has ended before it could hear of SIGTERM");
            }
        });
        true
    }

    async fn image(self: &Arc<Self>, why: &str) {
        let Some(wanted) = self.wanted() else { return };
        let wish = Wish {
            name: wanted.name.clone(),
            source: Source::default(),
        };
        match self.make_image(wish).await {
            Ok(image) => tracing::info!(id = self.fixed.id, why, image, "image made"),
            Err(error) => {
                tracing::warn!(
                    id = self.fixed.id,
                    why,
                    error = sentence(&error),
                    "no image was made"
                );
            }
        }
    }

    /// Makes one; its reference.
    pub(super) async fn make_image(self: &Arc<Self>, wish: Wish) -> Result<String, Error> {
        let cannot = |error: ImageError| PhaseError::CannotCheckpoint {
            id: self.fixed.id.clone(),
            reason: sentence(&error),
        };
        let container = container_image::ask(&self.fixed).await.unwrap_or_default();
        let Wish { name, mut source } = wish;
        source.image_ref = source.image_ref.or(container.reference);
        source.image_digest = source.image_digest.or(container.digest);
        let node = Arc::clone(&self.fixed.shared.node);
        let namespace = self.fixed.plan.identity.namespace.clone();
        let begun = blocking(move || {
            let store = ImageStore::of(&node.images)?;
            let request = store.begin(&namespace, &name, source)?;
            Ok((store, request))
        });
        let (store, request) = begun.await?.map_err(cannot)?;
        let dir = request.dir();
        let made = self
            .checkpoint(CheckpointRequest {
                image: dir.clone(),
                // As `rekindle checkpoint` has it.
                flags: DumpFlags {
                    external_unix_sockets: true,
                    file_locks: true,
                    terminal: self.streams.terminal,
                    ..DumpFlags::default()
                },
                ..CheckpointRequest::default()
            })
            .await;
        let finished = blocking(move || match made {
            Ok(()) => Ok(request.finish()),
            // Removes what there is of it.
            Err(error) => {
                drop(request);
                Err(error)
            }
        });
        let image = finished.await??.map_err(cannot)?;
        let mut event = TaskCheckpointed::new();
        event.container_id.clone_from(&self.fixed.id);
        event.checkpoint = dir.to_string_lossy().into_owned();
        self.events.send(event);
        let reference = image.reference();
        blocking(move || {
            let manifest = image.manifest();
            store.keep_newest(&manifest.namespace, &manifest.name, KEPT)
        })
        .await?
        .map_err(cannot)?;
        Ok(reference)
    }
}
