//! `warm-start: auto` at create: of what kind the container is, and whether there is an image of that kind.
//!
//! Nothing here fails a container. Whatever is not known makes it start cold, and the log says why.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::Read,
    path::{Path, PathBuf},
};

use rekindle_checkpoint::{
    ImageError, ImageStore,
    warm::{Kind, Surroundings, WarmImages},
};
use rekindle_core::{
    annotations::{Policy, WarmRequest},
    identity::Identity,
    plan::RestorePlan,
};
use serde::Deserialize;

use super::PhaseError;
use crate::{
    bundle::{Mount, Spec},
    container_image,
    context::Fixed,
    error::{Error, sentence},
    runc::RuncError,
    threads::blocking,
};

/// Where Kubernetes mounts the token of a pod's service account.
const ACCOUNT: &str = "/var/run/secrets/kubernetes.io/serviceaccount";
/// The kubelet's folders for volumes whose files are compared: `pods/UID/volumes/kubernetes.io~KIND/NAME`
/// (kubernetes `pkg/volume/{configmap,secret}`).
const COMPARED: [&str; 2] = ["/kubernetes.io~configmap/", "/kubernetes.io~secret/"];
/// The kubelet's binds of single files and folders of volumes.
const SUBPATHS: &str = "/volume-subpaths/";
/// Most bytes and files of a volume that are compared. etcd takes no object of more than 1.5 MiB.
const MAX_BYTES: u64 = 4 << 20;
const MAX_FILES: usize = 1000;

/// What a container with `warm-start: auto` goes by.
#[derive(Debug)]
pub(crate) struct Warm {
    pub(crate) images: WarmImages,
    pub(crate) kind: Kind,
    pub(crate) request: WarmRequest,
    /// The image that it starts from; none: cold, and it may make one.
    pub(crate) generation: Option<u64>,
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

    /// Itself, with the image that it starts from.
    pub(crate) fn started_from(&self) -> Option<(&Self, u64)> {
        Some((self, self.generation?))
    }

    /// Tells what became of a note about an image: whether it is in quarantine now.
    pub(crate) fn tell(&self, generation: u64, noted: Result<Result<bool, ImageError>, Error>) {
        let (namespace, name) = self.images.name();
        let image = format!("{namespace}/{name}@{generation}");
        match noted {
            Ok(Ok(true)) => tracing::warn!(image, "put into quarantine"),
            Ok(Ok(false)) => {}
            Ok(Err(error)) => {
                tracing::warn!(image, error = sentence(&error), "nothing was noted of it")
            }
            Err(error) => tracing::warn!(image, %error, "nothing was noted of it"),
        }
    }
}

/// Finds out what the container goes by. None: it did not ask, or its kind cannot be told.
pub(crate) async fn choose(fixed: &Fixed, spec: &Spec) -> Option<Warm> {
    let request = fixed.plan.warm.clone()?;
    match find(fixed, spec, request).await {
        Ok(warm) => Some(warm),
        Err(error) => {
            tracing::warn!(id = fixed.id, %error, "starting cold, and no image will be made");
            None
        }
    }
}

async fn find(fixed: &Fixed, spec: &Spec, request: WarmRequest) -> Result<Warm, Error> {
    let cannot = |reason: String| PhaseError::CannotRestore {
        id: fixed.id.clone(),
        reason,
    };
    if !fixed.gpu_devices.is_empty() {
        let reason = "it has GPU devices, of which this build makes no images";
        return Err(cannot(reason.to_owned()).into());
    }
    let (image, host) = tokio::join!(
        container_image::ask(fixed),
        fixed.shared.host.get(&fixed.runc.exits, &fixed.runc.binary),
    );
    let digest = image.and_then(|image| image.digest);
    let digest = digest.ok_or_else(|| {
        cannot(
            "its kind is not known: containerd does not tell the digest of its container image"
                .to_owned(),
        )
    })?;
    let host = host.map_err(cannot)?;
    let parsed = spec.parsed()?;
    let Identity {
        namespace,
        pod,
        pod_uid,
        container_name,
        ..
    } = fixed.plan.identity.clone();
    let pod_name = pod.and_then(|pod| Some(pod.split_once('/')?.1.to_owned()));
    let contents = Contents::of(fixed, spec);
    let root = fixed.shared.node.images.root.clone();
    let ignore = request.ignore_env.clone();
    let found = blocking(move || {
        let around = Surroundings {
            image: digest,
            container: container_name,
            ignore_env: &ignore,
            own: [pod_name, pod_uid].into_iter().flatten().collect(),
            contents: contents.read(),
            account: contents.account(),
        };
        let kind = Kind::of(&parsed, &host, around);
        let Some(name) = kind.image_name() else {
            return Ok(None);
        };
        let images = WarmImages::new(ImageStore::open(&root)?, namespace, name);
        let generation = images.usable()?;
        if generation.is_none()
            && let Some((name, differences)) = images.nearest(&kind)?
        {
            tracing::info!(%name, differs = differences.join(", "), "no image of its kind; the nearest one");
        }
        Ok::<_, ImageError>(Some((images, kind, generation)))
    });
    let unknown = |error: ImageError| cannot(sentence(&error));
    let (images, kind, generation) = found
        .await?
        .map_err(unknown)?
        .ok_or_else(|| cannot("its name cannot be part of an image's".to_owned()))?;
    let (_, name) = images.name();
    tracing::info!(id = fixed.id, %name, generation, "warm-start: auto");
    Ok(Warm {
        images,
        kind,
        request,
        generation,
    })
}

/// Notes that the container could not be restored from the image of its kind. Nobody is any more, unless that was no
/// fault of the image.
pub(crate) async fn failed(fixed: &Fixed, error: &Error) {
    let Some((warm, generation)) = fixed.warm.as_ref().and_then(Warm::started_from) else {
        return;
    };
    let (images, why) = (warm.images.clone(), sentence(error));
    let failures = fixed.shared.node.warm_start.failures;
    let noted = match error {
        Error::Phase(PhaseError::CannotRestoreHere { .. }) => return,
        // A node that is too busy, or an image that is too large.
        Error::Phase(PhaseError::TooLate { .. }) | Error::Runc(RuncError::Timeout { .. }) => {
            blocking(move || images.ended_early(generation, &why, failures)).await
        }
        _ => blocking(move || images.failed(generation, &why).map(|()| true)).await,
    };
    warm.tell(generation, noted);
}

/// Where what is mounted can be looked at.
#[derive(Debug)]
struct Contents {
    /// Versions of datasets, by destination.
    datasets: BTreeMap<String, String>,
    /// Folders and files to compare, by destination.
    compared: Vec<(String, PathBuf)>,
    token: Option<PathBuf>,
}

impl Contents {
    fn of(fixed: &Fixed, spec: &Spec) -> Self {
        let root = &fixed.shared.node.datasets.root;
        let versions = fixed.datasets.iter().map(|mount| {
            let version = mount.source.strip_prefix(root).unwrap_or(&mount.source);
            (mount.destination.clone(), version.display().to_string())
        });
        let is_compared = |mount: &Mount<'_>| {
            mount.kind == "bind"
                && (COMPARED.iter().any(|kind| mount.source.contains(kind))
                    // Also a file of a volume of another kind; a large one is not looked at.
                    || mount.source.contains(SUBPATHS) && Path::new(mount.source).is_file())
        };
        let compared = spec
            .mounts()
            .filter(is_compared)
            .map(|mount| (mount.destination.to_owned(), mount.source.into()));
        let account = spec.mounts().find(|mount| mount.destination == ACCOUNT);
        Self {
            datasets: versions.collect(),
            compared: compared.collect(),
            token: account.map(|mount| Path::new(mount.source).join("token")),
        }
    }

    /// What is known of what is mounted.
    fn read(&self) -> BTreeMap<String, String> {
        let mut all = self.datasets.clone();
        for (destination, source) in &self.compared {
            all.insert(destination.clone(), hash(source));
        }
        all
    }

    /// The service account, as its token has it. Who restores an image gets what is in its memory, and that may be what
    /// only another account could read.
    fn account(&self) -> Option<String> {
        #[derive(Deserialize)]
        struct Claims {
            sub: String,
        }
        let mut token = String::new();
        File::open(self.token.as_ref()?)
            .ok()?
            .take(1 << 16)
            .read_to_string(&mut token)
            .ok()?;
        let claims = token.split('.').nth(1)?;
        let claims = base64_simd::URL_SAFE_NO_PAD.decode_to_vec(claims).ok()?;
        let claims: Claims = serde_json::from_slice(&claims).ok()?;
        Some(claims.sub)
    }
}

/// The names and contents of the files of a volume, as one hash; what is too large counts by its size only.
fn hash(volume: &Path) -> String {
    let mut hasher = blake3::Hasher::new();
    let mut left = MAX_BYTES;
    for file in files(volume) {
        let name = file.strip_prefix(volume).unwrap_or(&file);
        hasher.update(name.as_os_str().as_encoded_bytes());
        let size = fs::metadata(&file).map_or(0, |file| file.len());
        hasher.update(&size.to_le_bytes());
        if size <= left
            && let Ok(bytes) = fs::read(&file)
        {
            left -= size;
            hasher.update(&bytes);
        }
    }
    hasher.finalize().to_hex()[..16].to_owned()
}

/// The files of a volume, sorted. The kubelet shows each through a symlink into a folder with the time in its name
/// (`pkg/volume/util/atomic_writer.go`), so what begins with a dot is left out and links are followed.
fn files(volume: &Path) -> Vec<PathBuf> {
    if volume.is_file() {
        return vec![volume.to_owned()];
    }
    let (mut found, mut folders) = (Vec::new(), vec![volume.to_owned()]);
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).into_iter().flatten().flatten() {
            let path = entry.path();
            match () {
                () if entry.file_name().as_encoded_bytes().starts_with(b"..") => {}
                () if found.len() + folders.len() >= MAX_FILES => {}
                () if path.is_dir() => folders.push(path),
                () if path.is_file() => found.push(path),
                () => {}
            }
        }
    }
    found.sort();
    found
}

#[cfg(test)]
mod tests;
