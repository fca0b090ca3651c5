//! From a name to an image that may be restored here: found, verified, compared, staged.

use std::{
    path::PathBuf,
    process::Command,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

use rekindle_checkpoint::{
    ImageError, ImageStore, VerifiedImage,
    archive::{Existing, open_dir, unpack},
    criu_image::Task,
    fit::{container_facts, fit},
};
use rekindle_core::{config::Paging, plan::RestorePlan};
use serde::Deserialize;

use super::{PhaseError, step};
use crate::{
    bundle::Spec,
    context::Fixed,
    data,
    error::{Error, sentence},
    programs,
    threads::blocking,
};

/// Opens the image that `plan` names for this container, and puts its upper layer and `/dev/shm` in
/// place. Also says whether its memory may come in lazily.
///
/// To be called before the root is mounted: an overlay must not change below its mount.
pub(super) async fn open(
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
    // CRIU's pager frees a process that is complete and relies on its descriptor being closed, which our
    // duplicate prevents: with a second process beside it, it can spin on the stale one for ever. Until
    // there is a pager of our own, several processes come in eagerly unless the node insists.
    let several = image.manifest().facts.processes.len() > 1;
    let lazily = lazily && (!several || fixed.shared.node.restore.paging == Paging::Lazy);
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
    let image = Arc::new(image);
    step(&fixed.id, "stage", stage(fixed, Arc::clone(&image), spec)).await?;
    Ok((image, lazily))
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
    match fixed.shared.node.restore.paging {
        Paging::Eager => Ok(false),
        Paging::Auto => Ok(fixed.shared.host.can_page_lazily(&fixed.runc.exits).await),
        Paging::Lazy if fixed.shared.host.can_page_lazily(&fixed.runc.exits).await => Ok(true),
        Paging::Lazy => {
            let reason = "restore.paging is \"lazy\" and this kernel or CRIU cannot (`criu check --feature uffd-noncoop`)";
            Err(PhaseError::CannotRestore {
                id: fixed.id.clone(),
                reason: reason.to_owned(),
            }
            .into())
        }
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

async fn stage(fixed: &Fixed, image: Arc<VerifiedImage>, spec: &Spec) -> Result<(), Error> {
    let cannot = |reason: String| PhaseError::CannotRestore {
        id: fixed.id.clone(),
        reason,
    };
    if fixed.rootfs.was_written() {
        let reason = "its writable layer is not empty: it ran before; restore into a new container";
        return Err(cannot(reason.to_owned()).into());
    }
    fixed.staged.store(true, Ordering::Relaxed);
    let upper = fixed.rootfs.upper_layer();
    let shm = spec.bind_source("/dev/shm");
    let staged = blocking(move || {
        put(
            image.upper(),
            upper,
            Existing::Refuse,
            "the writable layer of its root (an overlay's upperdir)",
        )?;
        put(
            image.shm(),
            shm,
            Existing::Replace,
            "a writable /dev/shm of the pod",
        )
    })
    .await?;
    Ok(staged.map_err(cannot)?)
}

/// Unpacks one archive of an image, if it has it.
fn put(
    archive: std::io::Result<Option<std::fs::File>>,
    into: Option<PathBuf>,
    existing: Existing,
    what: &str,
) -> Result<(), String> {
    let Some(archive) = archive.map_err(|e| format!("reading the image: {e}"))? else {
        return Ok(());
    };
    let into = into.ok_or_else(|| {
        format!("the image has {what}, and this container has none to put it into")
    })?;
    let folder = open_dir(&into).map_err(|e| format!("opening {}: {e}", into.display()))?;
    unpack(archive, &folder, existing)
        .map(drop)
        .map_err(|e| sentence(&e))
}
