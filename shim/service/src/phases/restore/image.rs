//! From a name to an image that may be restored here: found, verified, compared, staged.

use std::{
    fs::File,
    io::{self, Read},
    path::PathBuf,
    process::Command,
    sync::Arc,
    time::{Duration, Instant},
};

use rekindle_checkpoint::{
    ImageError, ImageStore, VerifiedImage,
    archive::{Existing, Made, open_dir, unpack},
    criu_image::Task,
    fit::{container_facts, fit},
};
use rekindle_core::{config::Paging, plan::RestorePlan};
use serde::Deserialize;

use super::{PhaseError, late, step};
use crate::{
    bundle::{SHM, Spec},
    context::Fixed,
    data,
    error::{Error, sentence},
    programs,
    threads::blocking,
};

/// Opens the image that `plan` names for this container, and puts its upper layer and `/dev/shm` in
/// place, both by `until`. Also says whether its memory may come in lazily.
///
/// To be called before the root is mounted: an overlay must not change below its mount.
pub(super) async fn open(
    fixed: &Fixed,
    plan: &RestorePlan,
    spec: &Spec,
    until: Instant,
) -> Result<(Arc<VerifiedImage>, bool), Error> {
    let fitting = tokio::time::timeout_at(until.into(), fitting(fixed, plan, spec)).await;
    let (image, lazily) =
        fitting.unwrap_or_else(|_| Err(late(fixed, "the image was not verified")))?;
    let staging = stage(fixed, Arc::clone(&image), spec, until);
    step(&fixed.id, "stage", staging).await?;
    Ok((image, lazily))
}

/// The image, found, verified and compared.
async fn fitting(
    fixed: &Fixed,
    plan: &RestorePlan,
    spec: &Spec,
) -> Result<(Arc<VerifiedImage>, bool), Error> {
    let cannot = |reason: String| PhaseError::CannotRestore {
        id: fixed.id.clone(),
        reason,
    };
    let (image, host, digest, lazily) = tokio::join!(
        step(&fixed.id, "verify", verified(fixed, plan)),
        fixed.shared.host.get(&fixed.runc.exits, &fixed.runc.binary),
        digest(fixed),
        lazily(fixed),
    );
    let ((image, tasks), lazily) = (image?, lazily?);
    let host = host.map_err(cannot)?;
    let facts = &image.manifest().facts;
    fit(
        facts,
        &tasks,
        &host,
        &container_facts(&spec.parsed()?),
        digest.as_deref(),
    )
    .map_err(|misfit| cannot(format!("image {}: {misfit}", image.reference())))?;
    Ok((Arc::new(image), lazily))
}

/// The image, and what CRIU would give its tasks.
async fn verified(fixed: &Fixed, plan: &RestorePlan) -> Result<(VerifiedImage, Vec<Task>), Error> {
    let root = fixed.shared.node.images.root.clone();
    let (namespace, name, generation) =
        (plan.namespace.clone(), plan.name.clone(), plan.generation);
    let verified = blocking(move || {
        let sealed = ImageStore::open(&root)?.resolve(&namespace, &name, generation)?;
        let image = sealed.verify()?;
        let tasks = image.tasks()?;
        Ok::<_, ImageError>((image, tasks))
    })
    .await?;
    verified.map_err(|e| {
        PhaseError::CannotRestore {
            id: fixed.id.clone(),
            reason: sentence(&e),
        }
        .into()
    })
}

async fn lazily(fixed: &Fixed) -> Result<bool, Error> {
    let paging = fixed.shared.node.restore.paging;
    if paging == Paging::Eager {
        return Ok(false);
    }
    match (
        fixed.shared.host.can_page_lazily(&fixed.runc.exits).await,
        paging,
    ) {
        (false, Paging::Lazy) => {
            let reason = "restore.paging is \"lazy\" and this kernel or CRIU cannot (`criu check --feature uffd-noncoop`)";
            Err(PhaseError::CannotRestore {
                id: fixed.id.clone(),
                reason: reason.to_owned(),
            }
            .into())
        }
        (can, _) => Ok(can),
    }
}

#[derive(Deserialize)]
struct Answer {
    digest: String,
}

/// The digest of the container's image, which only containerd knows. Not known is not compared: CRIU
/// itself compares the build ids of the files it maps.
async fn digest(fixed: &Fixed) -> Option<String> {
    #[allow(
        clippy::disallowed_methods,
        reason = "asks containerd, whose client the shim does not link"
    )]
    let mut command = Command::new(data::program());
    command.args([
        "container-image",
        "--id",
        &fixed.id,
        "--namespace",
        &fixed.shared.namespace,
    ]);
    command.args(["--address", &fixed.shared.containerd]);
    match programs::capture(&fixed.runc.exits, command, Duration::from_secs(5)).await {
        Ok((0, text)) => {
            let answer: Answer = serde_json::from_str(&text).ok()?;
            Some(answer.digest).filter(|digest| !digest.is_empty())
        }
        other => {
            tracing::warn!(
                id = fixed.id,
                ?other,
                "the container image's digest is not known and not compared"
            );
            None
        }
    }
}

/// Not to be dropped half-way: its thread would go on, below a root that is mounted by then. It ends by
/// itself when `until` has come.
async fn stage(
    fixed: &Fixed,
    image: Arc<VerifiedImage>,
    spec: &Spec,
    until: Instant,
) -> Result<(), Error> {
    let cannot = |reason: String| PhaseError::CannotRestore {
        id: fixed.id.clone(),
        reason,
    };
    if fixed.rootfs.was_written() {
        let reason = "its writable layer is not empty: it ran before; restore into a new container";
        return Err(cannot(reason.to_owned()).into());
    }
    fixed.staged().upper = true;
    let upper = fixed.rootfs.upper_layer();
    let shm = spec.bind_source(SHM);
    let staged = blocking(move || {
        put(
            image.upper().map(|archive| Some(Until(archive?, until))),
            upper.as_ref(),
            Existing::Refuse,
            "the writable layer of its root (an overlay's upperdir)",
        )?;
        let made = put(
            image.shm().map(|archive| Some(Until(archive?, until))),
            shm.as_ref(),
            Existing::Replace,
            "a writable /dev/shm of the pod",
        )?;
        Ok(shm.zip(made))
    })
    .await?;
    match staged {
        Ok(shm) => {
            fixed.staged().shm = shm;
            Ok(())
        }
        Err(_) if Instant::now() >= until => Err(late(fixed, "the image was not staged")),
        Err(reason) => Err(cannot(reason).into()),
    }
}

/// Unpacks one archive of an image, if it has it; what that made.
fn put(
    archive: io::Result<Option<Until>>,
    into: Option<&PathBuf>,
    existing: Existing,
    what: &str,
) -> Result<Option<Made>, String> {
    let Some(archive) = archive.map_err(|e| format!("reading the image: {e}"))? else {
        return Ok(None);
    };
    let into = into.ok_or_else(|| {
        format!("the image has {what}, and this container has none to put it into")
    })?;
    let folder = open_dir(into).map_err(|e| format!("opening {}: {e}", into.display()))?;
    match unpack(archive, &folder, existing) {
        Ok(unpacked) => Ok(Some(unpacked.made)),
        Err(e) => Err(sentence(&e)),
    }
}

/// An archive that cannot be read any more when its time is over.
struct Until(File, Instant);

impl Read for Until {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if Instant::now() >= self.1 {
            return Err(io::ErrorKind::TimedOut.into());
        }
        self.0.read(buffer)
    }
}
