//! From a name to an image that may be restored here: found, verified, compared, staged.

use std::{
    io::{self, Read},
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant},
};

use rekindle_checkpoint::{
    ImageError, ImageStore, SealedImage, StagedImage, VerifiedImage,
    archive::{Existing, Made, open_dir, unpack},
    chunks::StreamReader,
    criu_image::Task,
    fit::{container_facts, fit},
};
use rekindle_core::{config::Paging, plan::RestorePlan};

use super::{PhaseError, late, step};
use crate::{
    bundle::{SHM, Spec},
    container_image,
    context::Fixed,
    error::{Error, sentence},
    keys,
    threads::blocking,
};

/// In the bundle: CRIU's files of the image.
const IMAGE: &str = "criu-image";

/// Up to so many bytes of memory a container goes on no later when they are all read before it runs, and then no pager has
/// to start. Measured: `make bench ARGS="small"`, see docs/BENCHMARKS.md.
const SOONER_EAGERLY: u64 = 4 << 20;

/// Before its time is over a wait for an image ends with how far that came.
const TELLING: Duration = Duration::from_millis(200);

/// Opens the image that `plan` names for this container, and puts its upper layer and `/dev/shm` in
/// place, both by `until`. Also says whether its memory may come in lazily.
///
/// To be called before the root is mounted: an overlay must not change below its mount.
pub(super) async fn open(
    fixed: &Fixed,
    plan: &RestorePlan,
    spec: &Spec,
    until: Instant,
) -> Result<(Arc<StagedImage>, bool), Error> {
    let fitting = fitting(fixed, plan, spec, until);
    let fitting = tokio::time::timeout_at(until.into(), fitting).await;
    let (image, lazily) =
        fitting.unwrap_or_else(|_| Err(late(fixed, "the image was not verified")))?;
    let staged = step(&fixed.id, "stage", stage(fixed, image, spec, until)).await?;
    Ok((Arc::new(staged), lazily))
}

/// The image, found, verified and compared.
async fn fitting(
    fixed: &Fixed,
    plan: &RestorePlan,
    spec: &Spec,
    until: Instant,
) -> Result<(VerifiedImage, bool), Error> {
    let cannot = |reason: String| PhaseError::CannotRestore {
        id: fixed.id.clone(),
        reason,
    };
    let (image, host, digest, lazily) = tokio::join!(
        step(&fixed.id, "verify", verified(fixed, plan, until)),
        fixed.shared.host.get(&fixed.runc.exits, &fixed.runc.binary),
        digest(fixed),
        lazily(fixed),
    );
    let (verified, lazily) = (image?, lazily?);
    let Verified {
        image,
        tasks,
        small,
    } = verified;
    let host = host.map_err(cannot)?;
    let facts = &image.manifest().facts;
    let container = container_facts(&spec.parsed()?);
    if let Err(misfit) = fit(facts, &tasks, &host, &container, digest.as_deref()) {
        let refused = match plan.force {
            true => misfit.clone().beyond_the_host(),
            false => Some(misfit.clone()),
        };
        if let Some(misfit) = refused {
            return Err(cannot(format!("image {}: {misfit}", image.reference())).into());
        }
        tracing::warn!(id = fixed.id, %misfit, "restoring all the same: restore-force is host");
    }
    let lazily = lazily && !small;
    let image = match lazily {
        true => image,
        false => step(&fixed.id, "read pages", eagerly(fixed, image)).await?,
    };
    Ok((image, lazily))
}

/// An image that is what was sealed.
struct Verified {
    image: VerifiedImage,
    /// What CRIU would give its tasks.
    tasks: Vec<Task>,
    /// Whether all of its memory is to be read before its container runs, where nobody has said how it comes in.
    small: bool,
}

/// The image, whole or with what a restore with a pager needs to begin.
async fn verified(fixed: &Fixed, plan: &RestorePlan, until: Instant) -> Result<Verified, Error> {
    let cannot = |reason: String| PhaseError::CannotRestore {
        id: fixed.id.clone(),
        reason,
    };
    let unfit = |e: ImageError| {
        let (id, reason) = (fixed.id.clone(), sentence(&e));
        match e {
            ImageError::Damaged { .. }
            | ImageError::Manifest { .. }
            | ImageError::Chunks { .. } => PhaseError::BadImage { id, reason },
            ImageError::Unknown(_) | ImageError::Incoming { .. } => {
                PhaseError::CannotRestoreHere { id, reason }
            }
            _ => PhaseError::CannotRestore { id, reason },
        }
    };
    let here = match resolve(fixed, plan).await? {
        Ok(image) => match image.require_whole() {
            Err(incoming) if !lazily(fixed).await? => Err(incoming),
            _ => Ok(image),
        },
        unknown => unknown,
    };
    let sealed = match here {
        Err(missing @ (ImageError::Unknown(_) | ImageError::Incoming { .. })) => {
            match fetch(fixed, plan, until).await {
                Ok(true) => resolve(fixed, plan).await?.map_err(unfit)?,
                Ok(false) => return Err(unfit(missing).into()),
                Err(error) => {
                    let reason = format!("{}; {}", sentence(&missing), sentence(&error));
                    let id = fixed.id.clone();
                    return Err(PhaseError::CannotRestoreHere { id, reason }.into());
                }
            }
        }
        found => found.map_err(unfit)?,
    };
    let key = keys::for_image(&fixed.shared, &plan.namespace, sealed.key()).await;
    let key = key.map_err(cannot)?;
    if key.is_some() {
        keys::require_memory(&fixed.bundle).map_err(cannot)?;
    }
    let into = fixed.bundle.join(IMAGE);
    let auto = fixed.shared.node.restore.paging == Paging::Auto;
    let verified = blocking(move || {
        if let Err(e) = sealed.mark_used() {
            tracing::warn!("the image counts as not used: {}", sentence(&e));
        }
        let whole = sealed.origin()?.is_none();
        let image = sealed.verify_begun(&into, key.as_ref())?;
        let tasks = image.tasks()?;
        let small = auto && whole && image.lazy_bytes()? <= SOONER_EAGERLY;
        Ok::<_, ImageError>(Verified {
            image,
            tasks,
            small,
        })
    });
    Ok(verified.await?.map_err(unfit)?)
}

/// Has it come from its tier; all of it where there is no pager, and else what a restore needs to begin. False where it
/// has none.
async fn fetch(fixed: &Fixed, plan: &RestorePlan, until: Instant) -> Result<bool, Error> {
    let lazily = lazily(fixed).await?;
    // One reason, while there is still time to tell it.
    let known = until.checked_sub(TELLING).unwrap_or(until);
    let shared = &fixed.shared;
    let fetched = shared.data.image(plan, &shared.node, lazily, known);
    step(&fixed.id, "fetch", fetched).await
}

/// Looks for the image on this node.
async fn resolve(
    fixed: &Fixed,
    plan: &RestorePlan,
) -> Result<Result<SealedImage, ImageError>, Error> {
    let node = Arc::clone(&fixed.shared.node);
    let (namespace, name, generation) =
        (plan.namespace.clone(), plan.name.clone(), plan.generation);
    blocking(move || ImageStore::of(&node.images)?.resolve(&namespace, &name, generation)).await
}

/// Reads all pages, for a restore without a pager.
async fn eagerly(fixed: &Fixed, mut image: VerifiedImage) -> Result<VerifiedImage, Error> {
    let loaded = blocking(move || {
        image.load_eagerly()?;
        Ok::<_, ImageError>(image)
    });
    let loaded = loaded.await?.map_err(|e| PhaseError::CannotRestore {
        id: fixed.id.clone(),
        reason: sentence(&e),
    })?;
    Ok(loaded)
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

/// The digest of the container's image. Not known is not compared: CRIU itself compares the build ids of the files
/// it maps.
async fn digest(fixed: &Fixed) -> Option<String> {
    container_image::ask(fixed).await?.digest
}

/// Not to be dropped half-way: its thread would go on, below a root that is mounted by then. It ends by
/// itself when `until` has come.
async fn stage(
    fixed: &Fixed,
    image: VerifiedImage,
    spec: &Spec,
    until: Instant,
) -> Result<StagedImage, Error> {
    let cannot = |reason: String| PhaseError::CannotRestore {
        id: fixed.id.clone(),
        reason,
    };
    if fixed.rootfs.was_written() {
        let reason = "its writable layer is not empty: it ran before; restore into a new container";
        return Err(PhaseError::CannotRestoreHere {
            id: fixed.id.clone(),
            reason: reason.to_owned(),
        }
        .into());
    }
    fixed.staged().upper = true;
    let upper = fixed.rootfs.upper_layer();
    let shm = spec.bind_source(SHM);
    let staged = blocking(move || {
        put(
            image.upper().map(|archive| Until(archive, until)),
            upper.as_ref(),
            Existing::Refuse,
            "the writable layer of its root (an overlay's upperdir)",
        )?;
        let made = put(
            image.shm().map(|archive| Until(archive, until)),
            shm.as_ref(),
            Existing::Replace,
            "a writable /dev/shm of the pod",
        )?;
        Ok((image.staged(), shm.zip(made)))
    })
    .await?;
    match staged {
        Ok((image, shm)) => {
            fixed.staged().shm = shm;
            Ok(image)
        }
        Err(_) if Instant::now() >= until => Err(late(fixed, "the image was not staged")),
        Err(reason) => Err(cannot(reason).into()),
    }
}

/// Unpacks one archive of an image, if it has it; what that made.
fn put(
    archive: Option<Until>,
    into: Option<&PathBuf>,
    existing: Existing,
    what: &str,
) -> Result<Option<Made>, String> {
    let Some(archive) = archive else {
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
struct Until(StreamReader, Instant);

impl Read for Until {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if Instant::now() >= self.1 {
            return Err(io::ErrorKind::TimedOut.into());
        }
        self.0.read(buffer)
    }
}
