//! `warm-start: auto` at create: of what kind the container is, and whether there is an image of that kind.
//!
//! Nothing here fails a container. Whatever is not known makes it start cold, and the log says why.

mod mounted;

use std::{fs, os::unix::fs::MetadataExt, path::Path, sync::Arc, time::Duration};

use containerd_shim_protos::api::CreateTaskRequest;
use mounted::Mounted;
use rekindle_checkpoint::{
    ImageError, ImageStore,
    warm::{End, Kind, Surroundings, WarmImages},
};
use rekindle_core::{
    annotations::{Policy, WarmRequest, WarmWhen},
    config::NodeConfig,
    plan::RestorePlan,
};

use super::PhaseError;
use crate::{
    bundle::Spec,
    container_image,
    context::Fixed,
    error::{Error, sentence},
    threads::blocking,
};

/// What it may take to find out of what kind a container is.
const PATIENCE: Duration = Duration::from_secs(10);
/// The types of namespaces that a container may share with the host.
const NAMESPACES: [&str; 6] = ["network", "ipc", "uts", "pid", "cgroup", "mount"];

/// What a container with `warm-start: auto` goes by.
#[derive(Debug)]
pub(crate) struct Warm {
    pub(crate) images: WarmImages,
    pub(crate) request: WarmRequest,
    /// The image that it starts from; none: cold, and it may make one.
    pub(crate) generation: Option<u64>,
    mounted: Mounted,
}

impl Warm {
    /// That image, as if the pod had named it.
    pub(crate) fn restore(&self) -> Option<RestorePlan> {
        let (namespace, name) = self.images.name();
        let generation = self.generation?;
        Some(RestorePlan {
            namespace: namespace.clone(),
            name: name.clone(),
            generation: Some(generation),
            policy: Policy::Opportunistic,
            force: false,
        })
    }

    /// Whether it is of its kind still: a ConfigMap may have been changed, and the program may know.
    pub(crate) async fn is_of_its_kind(&self) -> Result<bool, Error> {
        let mounted = self.mounted.clone();
        let now = blocking(move || mounted.look()).await?;
        Ok(now == self.images.kind().mounts)
    }

    /// Tells what became of a note about an image: whether it is in quarantine now.
    pub(crate) fn tell(&self, generation: u64, noted: Result<Result<bool, ImageError>, Error>) {
        let (namespace, name) = self.images.name();
        let image = format!("{namespace}/{name}@{generation}");
        match noted {
            Ok(Ok(true)) => tracing::warn!(image, "in quarantine"),
            Ok(Ok(false)) => {}
            Ok(Err(error)) => {
                tracing::warn!(image, error = sentence(&error), "nothing was noted of it");
            }
            Err(error) => tracing::warn!(image, %error, "nothing was noted of it"),
        }
    }
}

/// Finds out what the container goes by. None: it did not ask, it is restored from something else, or its kind cannot be
/// told.
pub(crate) async fn choose(fixed: &Fixed, spec: &Spec, create: &CreateTaskRequest) -> Option<Warm> {
    let request = fixed.plan.warm.clone()?;
    if !create.checkpoint.is_empty() || !fixed.options.criu_image_path.is_empty() {
        return None;
    }
    let found = tokio::time::timeout(PATIENCE, find(fixed, spec, request)).await;
    let late = || {
        let reason = format!("its kind was not found out within {} s", PATIENCE.as_secs());
        Err(cannot(fixed, reason))
    };
    match found.unwrap_or_else(|_| late()) {
        Ok(warm) => Some(warm),
        Err(error) => {
            tracing::warn!(id = fixed.id, %error, "starting cold, and no image will be made");
            None
        }
    }
}

/// What the apiserver is asked with for a pod's readiness; why it cannot be.
pub(crate) fn kubeconfig(node: &NodeConfig) -> Result<&Path, String> {
    let all = node.kubernetes.kubeconfigs();
    let found = all.iter().find(|path| path.exists());
    found.copied().ok_or_else(|| {
        let all: Vec<_> = all.iter().map(|path| path.display().to_string()).collect();
        format!(
            "the apiserver cannot be asked whether its pod is ready: there is no kubeconfig at {} (kubernetes.kubeconfig)",
            all.join(" or ")
        )
    })
}

fn cannot(fixed: &Fixed, reason: String) -> Error {
    PhaseError::CannotRestoreHere {
        id: fixed.id.clone(),
        reason,
    }
    .into()
}

async fn find(fixed: &Fixed, spec: &Spec, request: WarmRequest) -> Result<Warm, Error> {
    let cannot = |reason: &str| cannot(fixed, reason.to_owned());
    if !fixed.gpu_devices.is_empty() {
        return Err(cannot(
            "it has GPU devices, of which this build makes no images",
        ));
    }
    // `user:role:type:level:c1,c2`
    let label = spec.text("/process/selinuxLabel").unwrap_or_default();
    if label.split(':').count() > 4 {
        return Err(cannot(
            "its SELinux label has categories, which no other pod's has",
        ));
    }
    let (image, host) = tokio::join!(
        container_image::ask(fixed),
        fixed.shared.host.get(&fixed.runc.exits, &fixed.runc.binary),
    );
    let digest = image.and_then(|image| image.digest);
    let digest = digest.ok_or_else(|| {
        cannot("its kind is not known: containerd does not tell the digest of its container image")
    })?;
    let host = host.map_err(|reason| cannot(&reason))?;
    let parsed = spec.parsed()?;
    let identity = fixed.plan.identity.clone();
    let pod_name = identity
        .pod
        .and_then(|pod| Some(pod.split_once('/')?.1.to_owned()));
    let uid = identity.pod_uid;
    let own: Vec<String> = pod_name.into_iter().chain(uid.clone()).collect();
    let mounted = Mounted::of(spec, uid.as_deref(), own.clone());
    let joined: Vec<_> = NAMESPACES
        .iter()
        .filter_map(|kind| Some((*kind, spec.namespace_path(kind)?)))
        .collect();
    let node = Arc::clone(&fixed.shared.node);
    let ignore = request.ignore_env.clone();
    let found = blocking(move || {
        let is_the_hosts = |kind: &str, path: &Path| {
            let name = if kind == "network" { "net" } else { kind };
            let name = if name == "mount" { "mnt" } else { name };
            let identity = |of: fs::Metadata| (of.dev(), of.ino());
            let here = fs::metadata(format!("/proc/self/ns/{name}")).map(identity);
            here.is_ok_and(|here| fs::metadata(path).map(identity).ok() == Some(here))
        };
        let of_the_host = joined
            .iter()
            .filter(|(kind, path)| is_the_hosts(kind, path))
            .map(|(kind, _)| (*kind).to_owned());
        let around = Surroundings {
            image: digest,
            container: identity.container_name,
            ignore_env: &ignore,
            own: &own,
            mounts: mounted.look(),
            account: mounted.account(),
            of_the_host: of_the_host.collect(),
        };
        let kind = Kind::of(&parsed, &host, around);
        let store = ImageStore::of(&node.images)?;
        let Some(images) = WarmImages::of(store, identity.namespace, kind) else {
            return Ok(None);
        };
        let generation = images.usable()?;
        if generation.is_none()
            && let Some((name, differences)) = images.nearest()?
        {
            tracing::info!(%name, differs = differences.join(", "), "no image of its kind; the nearest one");
        }
        Ok::<_, ImageError>(Some((images, generation, mounted)))
    });
    let unknown = |error: ImageError| cannot(&sentence(&error));
    let found = found.await?.map_err(unknown)?;
    let (images, generation, mounted) =
        found.ok_or_else(|| cannot("its name cannot be part of an image's"))?;
    let (_, name) = images.name();
    tracing::info!(id = fixed.id, %name, generation, "warm-start: auto");
    if generation.is_none()
        && request.when == WarmWhen::Ready
        && let Err(reason) = kubeconfig(&fixed.shared.node)
    {
        tracing::warn!(id = fixed.id, reason, "no image will be made");
    }
    Ok(Warm {
        images,
        request,
        generation,
        mounted,
    })
}

/// Notes that the container could not be restored from the image of its kind. A damaged image is used by no one any more;
/// what may have been the node's fault counts as a container that ended early; what is this container's own, not at all.
pub(crate) async fn failed(fixed: &Fixed, error: &Error) {
    let Some(warm) = &fixed.warm else { return };
    let Some(generation) = warm.generation else {
        return;
    };
    let (images, why) = (warm.images.clone(), sentence(error));
    let failures = fixed.shared.node.warm_start.failures;
    let noted = match error {
        Error::Phase(PhaseError::CannotRestoreHere { .. }) => return,
        Error::Phase(PhaseError::BadImage { .. }) => {
            blocking(move || images.is_bad(generation, &why).map(|()| true)).await
        }
        _ => {
            let note = move || images.ended_early(generation, &why, End::Failed, failures);
            blocking(note).await
        }
    };
    warm.tell(generation, noted);
}
