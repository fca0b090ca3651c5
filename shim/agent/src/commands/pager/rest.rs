//! What is not on the node of an image that a pager serves.
//!
//! One process of the node streams an image: the one that fetches it, as a rule, whose restore has just begun. Where
//! there is none, or it is killed, the pager does it, as long as it is needed, and leaves what no process asks for to
//! another `rekindle image fetch`.

use std::{
    path::Path,
    process::{Command, Stdio},
    sync::{Arc, Mutex, PoisonError, Weak},
    thread,
    time::Duration,
};

use anyhow::Context as _;
use rekindle_checkpoint::{SealedImage, chunks::Chunks};
use rekindle_core::name::{ImageName, Namespace};
use rekindle_store::Lock;

/// Between two looks whether the process that streams is gone. Nobody waits for that: what is touched comes anyway.
const TICK: Duration = Duration::from_millis(100);

/// The rest of an image, while a pager serves it.
#[derive(Debug)]
pub(super) struct Rest {
    namespace: Namespace,
    name: ImageName,
    /// Held where it is this process that streams.
    alone: Arc<Mutex<Option<Lock>>>,
}

impl Rest {
    /// Streams it as soon as nobody else does. `criu` has CRIU's files.
    pub(super) fn begin(
        image: &Arc<SealedImage>,
        chunks: &Arc<Chunks>,
        criu: &Path,
    ) -> anyhow::Result<Self> {
        let manifest = image.manifest();
        let rest = Self {
            namespace: manifest.namespace.clone(),
            name: manifest.name.clone(),
            alone: Arc::default(),
        };
        let (image, criu) = (Arc::clone(image), criu.to_owned());
        let (chunks, alone) = (Arc::downgrade(chunks), Arc::clone(&rest.alone));
        thread::Builder::new()
            .name("stream".to_owned())
            .spawn(move || stream(&image, &criu, &chunks, &alone))
            .context("starting a thread")?;
        Ok(rest)
    }

    /// Everything that a process asked for is in. Where nobody else fetches what is left, somebody begins to.
    pub(super) fn leave(self, config: Option<&Path>) {
        let mut alone = self.alone.lock().unwrap_or_else(PoisonError::into_inner);
        if alone.take().is_none() {
            return;
        }
        #[allow(clippy::disallowed_methods, reason = "it outlives this process")]
        let mut command = Command::new("/proc/self/exe");
        if let Some(config) = config {
            command.arg("--config").arg(config);
        }
        let image = format!("{}/{}", self.namespace, self.name);
        command.args(["image", "fetch", "--json", &image]);
        command
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        if let Err(error) = command.spawn() {
            tracing::debug!(%error, "the rest of the image is left for the next restore");
        }
    }
}

fn stream(image: &SealedImage, criu: &Path, chunks: &Weak<Chunks>, alone: &Mutex<Option<Lock>>) {
    let manifest = image.manifest();
    loop {
        let Some(chunks) = chunks.upgrade() else {
            return;
        };
        let fetching = image.store().fetching(&manifest.namespace, &manifest.name);
        match fetching {
            Ok(Some(lock)) => {
                *alone.lock().unwrap_or_else(PoisonError::into_inner) = Some(lock);
                return image.stream_rest(&chunks, criu);
            }
            Ok(None) => {}
            // That two may fetch the same is better than that nobody does.
            Err(error) => {
                tracing::warn!("whether somebody streams the image is not known: {error:#}");
                return image.stream_rest(&chunks, criu);
            }
        }
        drop(chunks);
        thread::park_timeout(TICK);
    }
}
