//! The two forms in which such an archive comes, and where their parts lie.

use std::{
    collections::BTreeMap,
    fs::File,
    os::unix::fs::FileExt as _,
    path::{Path, PathBuf},
};

use oci_spec::runtime::Spec;
use serde::Deserialize;
use tar::EntryType;

use super::{
    About, Archive, CHECKPOINT, CONFIG_DUMP, Extent, ForeignError, MAX_JSON, Nested, ROOTFS_DIFF,
    SHM_TAR, SPEC_DUMP, small, wrong,
};
use crate::{
    archive::members::{Members, Section},
    criu_image::wire,
    layout::BlobDigest,
    manifest::{DumpFlags, MAX_FILES, shorten},
};

/// What containerd calls the parts of a checkpoint (`core/images/mediatypes.go`).
const CRIU_TAR: &str = "application/vnd.containerd.container.criu.checkpoint.criu.tar";
const CONFIG: &str = "application/vnd.containerd.container.checkpoint.config.v1+proto";
const OPTIONS: &str = "application/vnd.containerd.container.checkpoint.options.v1+proto";
/// And OCI a layer, whatever it is compressed with.
const LAYER: &str = "application/vnd.oci.image.layer.v1.tar";
const INDEX: &str = "application/vnd.oci.image.index.v1+json";
/// What a container image is: either, in OCI's form or in Docker's.
const IMAGES: &[&str] = &[
    INDEX,
    "application/vnd.oci.image.manifest.v1+json",
    "application/vnd.docker.distribution.manifest.list.v2+json",
    "application/vnd.docker.distribution.manifest.v2+json",
];
const REF_NAME: &str = "org.opencontainers.image.ref.name";
const INDEX_JSON: &str = "index.json";
const LAYOUT_FILE: &str = "oci-layout";

/// OCI's image index, as much as is needed.
#[derive(Deserialize)]
struct OciIndex {
    #[serde(default)]
    manifests: Vec<Descriptor>,
    #[serde(default)]
    annotations: BTreeMap<String, String>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Descriptor {
    media_type: String,
    digest: String,
    size: u64,
}

/// The files of an archive, and where they lie.
type Files = BTreeMap<String, Extent>;

pub(super) fn open(path: PathBuf, file: File) -> Result<Archive, ForeignError> {
    refuse_compressed(&path, &file)?;
    let size = file
        .metadata()
        .map_err(ForeignError::io("look at", &path))?
        .len();
    let whole = Extent { at: 0, size };
    let files = list((&file, &path), whole, "the archive")?;
    if files.contains_key(LAYOUT_FILE) && files.contains_key(INDEX_JSON) {
        return exported(path, file, &files);
    }
    if files.keys().any(|name| name.starts_with(CHECKPOINT)) {
        return kubelets(path, file, files);
    }
    let reason = "it has neither a folder checkpoint/, as the kubelet's have, nor an index.json, as what `ctr images export` writes has";
    Err(ForeignError::NotOne {
        path,
        reason: reason.to_owned(),
    })
}

fn refuse_compressed(path: &Path, file: &File) -> Result<(), ForeignError> {
    let mut head = [0; 6];
    // What is shorter is told of by who lists it.
    let _ = file.read_exact_at(&mut head, 0);
    let (with, unpack) = match head {
        [0x1f, 0x8b, ..] => ("gzip", "gunzip"),
        [0x28, 0xb5, 0x2f, 0xfd, ..] => ("zstd", "unzstd"),
        [0xfd, b'7', b'z', b'X', b'Z', 0] => ("xz", "unxz"),
        _ => return Ok(()),
    };
    Err(ForeignError::Compressed {
        path: path.to_owned(),
        with,
        unpack,
    })
}

/// The regular files of an archive in a part of the file. Folders may be beside them, and nothing else.
fn list(
    (file, path): (&File, &Path),
    whole: Extent,
    what: &'static str,
) -> Result<Files, ForeignError> {
    let refuse = |source| ForeignError::Archive {
        what,
        path: path.to_owned(),
        source,
    };
    let mut members = Members::new(Section::new(file, whole.at, whole.size));
    let mut files = Files::new();
    while let Some(member) = members.next().map_err(refuse)? {
        let name = member.path.to_string_lossy().into_owned();
        match member.kind {
            EntryType::Directory => continue,
            EntryType::Regular => {}
            _ => return Err(wrong(path, &name, "is neither a file nor a folder")),
        }
        let at = whole.at + member.at;
        // All of it has to be there: what is read later is what was listed.
        if at.saturating_add(member.size) > whole.at.saturating_add(whole.size) {
            return Err(wrong(path, &name, "is cut short"));
        }
        let extent = Extent {
            at,
            size: member.size,
        };
        if files.insert(name.clone(), extent).is_some() {
            return Err(wrong(path, &name, "is there twice"));
        }
    }
    Ok(files)
}

/// CRIU's files among those of an archive, in their order there.
fn criu_files(
    path: &Path,
    files: impl Iterator<Item = (String, Extent)>,
) -> Result<Vec<(String, Extent)>, ForeignError> {
    let mut criu: Vec<_> = files.collect();
    if criu.len() > MAX_FILES {
        let what = format!(
            "has {} files, and at most {MAX_FILES} are accepted",
            criu.len()
        );
        return Err(wrong(path, CHECKPOINT, what));
    }
    if let Some((name, _)) = criu.iter().find(|(name, _)| name.contains('/')) {
        return Err(wrong(
            path,
            name,
            "lies in a folder, which CRIU makes none of",
        ));
    }
    criu.sort_by_key(|(_, extent)| extent.at);
    Ok(criu)
}

/// `config.dump`, as much as is needed.
#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct ConfigDump {
    id: String,
    rootfs_image_ref: String,
    rootfs_image_name: String,
    rootfs_image: String,
}

/// What `CheckpointContainer` of CRI writes.
fn kubelets(path: PathBuf, file: File, mut files: Files) -> Result<Archive, ForeignError> {
    let read = |name: &str| match files.get(name) {
        Some(extent) => small((&file, &path), (name, *extent), MAX_JSON),
        None => Err(wrong(&path, name, "is missing")),
    };
    let spec = spec(&path, SPEC_DUMP, &read(SPEC_DUMP)?)?;
    let config: ConfigDump = serde_json::from_slice(&read(CONFIG_DUMP)?).map_err(|e| {
        wrong(
            &path,
            CONFIG_DUMP,
            format_args!("cannot be understood: {e}"),
        )
    })?;
    let some = |text: String| Some(text).filter(|text| !text.is_empty());
    let mut about = annotated(&spec);
    about.container = shorten(&config.id);
    about.image_ref = some(config.rootfs_image_name).or(some(config.rootfs_image));
    // `NAME@sha256:…`, or the digest of the image's configuration, which is another one.
    about.image_digest = config
        .rootfs_image_ref
        .split_once('@')
        .and_then(|(_, digest)| digest.parse::<BlobDigest>().ok())
        .map(|digest| digest.to_string());
    let nested = |extent: Extent| Nested {
        extent,
        digest: None,
    };
    let upper = files.remove(ROOTFS_DIFF).map(nested);
    let shm = files.remove(SHM_TAR).map(nested);
    let criu = files.into_iter().filter_map(|(name, extent)| {
        let name = name.strip_prefix(CHECKPOINT)?;
        Some((name.to_owned(), extent))
    });
    Ok(Archive {
        criu: criu_files(&path, criu)?,
        criu_archive: None,
        upper,
        shm,
        spec,
        about,
        file,
        path,
    })
}

/// What `ctr images export` writes of what `ctr containers checkpoint` has made.
fn exported(path: PathBuf, file: File, files: &Files) -> Result<Archive, ForeignError> {
    let from = (&file, path.as_path());
    let json = |name: &str, extent: Extent| -> Result<OciIndex, ForeignError> {
        serde_json::from_slice(&small(from, (name, extent), MAX_JSON)?)
            .map_err(|e| wrong(&path, name, format_args!("cannot be understood: {e}")))
    };
    let blob = |of: &Descriptor| -> Result<Nested, ForeignError> {
        let digest: BlobDigest = of.digest.parse()?;
        let name = digest.path();
        match files.get(&name) {
            Some(extent) if extent.size == of.size => Ok(Nested {
                extent: *extent,
                digest: Some(digest),
            }),
            Some(_) => Err(wrong(
                &path,
                &name,
                "has another size than its descriptor says",
            )),
            None => Err(wrong(&path, &name, "is missing")),
        }
    };
    let top = json(INDEX_JSON, files[INDEX_JSON])?;
    let mut found = Vec::new();
    for of in top.manifests.iter().filter(|of| of.media_type == INDEX) {
        let index = json(&of.digest, blob(of)?.extent)?;
        if index.manifests.iter().any(|of| of.media_type == CRIU_TAR) {
            found.push(index);
        }
    }
    let (Some(index), true) = (found.pop(), found.is_empty()) else {
        let reason = match found.is_empty() {
            true => {
                "no index in it has a checkpoint of a task (`ctr containers checkpoint --task`)"
            }
            false => "it has several checkpoints: export one image at a time",
        };
        return Err(ForeignError::NotOne {
            path: path.clone(),
            reason: reason.to_owned(),
        });
    };
    let only = |media_type: &str| {
        let mut all = index
            .manifests
            .iter()
            .filter(|of| of.media_type.starts_with(media_type));
        match (all.next(), all.next()) {
            (Some(_), Some(_)) => Err(wrong(&path, media_type, "is there twice")),
            (first, _) => Ok(first),
        }
    };
    let small_blob = |of: &Descriptor| -> Result<Vec<u8>, ForeignError> {
        let Nested { extent, digest } = blob(of)?;
        let bytes = small(from, (&of.digest, extent), MAX_JSON)?;
        match digest == Some(BlobDigest::of(&bytes)) {
            true => Ok(bytes),
            false => Err(wrong(&path, &of.digest, "does not have that digest")),
        }
    };
    let missing = |what: &str| wrong(&path, what, "is missing");
    let config = only(CONFIG)?.ok_or_else(|| missing(CONFIG))?;
    let bytes = any(&small_blob(config)?).map_err(|what| wrong(&path, CONFIG, what))?;
    let spec = spec(&path, CONFIG, &bytes)?;
    let flags = only(OPTIONS)?.map(|of| {
        let message = any(&small_blob(of)?).and_then(|bytes| flags(&bytes));
        message.map_err(|what| wrong(&path, OPTIONS, what))
    });
    let mut about = annotated(&spec);
    about.flags = flags.transpose()?;
    about.image_ref = index.annotations.get(REF_NAME).map(|name| shorten(name));
    let image = index
        .manifests
        .iter()
        .find(|of| IMAGES.contains(&of.media_type.as_str()));
    about.image_digest = image.map(|of| of.digest.clone());
    let upper = only(LAYER)?.map(blob).transpose()?;
    let criu_archive = blob(only(CRIU_TAR)?.ok_or_else(|| missing(CRIU_TAR))?)?;
    let criu = list(from, criu_archive.extent, "CRIU's files")?;
    Ok(Archive {
        criu: criu_files(&path, criu.into_iter())?,
        criu_archive: Some(criu_archive),
        upper,
        shm: None,
        spec,
        about,
        file,
        path,
    })
}

fn spec(path: &Path, file: &str, bytes: &[u8]) -> Result<Spec, ForeignError> {
    serde_json::from_slice(bytes)
        .map_err(|e| wrong(path, file, format_args!("is no container's spec: {e}")))
}

/// What a spec says of whose it is: CRI's annotations, or the cgroup that `ctr` has named.
fn annotated(spec: &Spec) -> About {
    let annotation = |key: &str| {
        let all = spec.annotations().as_ref()?;
        all.get(&format!("io.kubernetes.cri.{key}")).cloned()
    };
    let (namespace, pod) = (annotation("sandbox-namespace"), annotation("sandbox-name"));
    if let (Some(namespace), Some(pod)) = (&namespace, &pod) {
        return About {
            pod: Some(shorten(&format!("{namespace}/{pod}"))),
            name: annotation("container-name"),
            namespace: Some(namespace.clone()),
            ..About::default()
        };
    }
    let cgroup = spec
        .linux()
        .as_ref()
        .and_then(|linux| linux.cgroups_path().as_ref());
    let mut names = cgroup.into_iter().flat_map(|path| path.components().rev());
    let mut next = || Some(names.next()?.as_os_str().to_string_lossy().into_owned());
    let container = next();
    About {
        container: shorten(container.as_deref().unwrap_or("unknown")),
        name: container,
        namespace: next(),
        ..About::default()
    }
}

/// The message in a `google.protobuf.Any`.
fn any(bytes: &[u8]) -> Result<Vec<u8>, &'static str> {
    let mut value = None;
    wire::fields(bytes, |field, _| {
        if field.number == 2 {
            value = Some(field.bytes.to_vec());
        }
    })?;
    value.ok_or("has no message in it")
}

/// `containerd.runc.v1.CheckpointOptions`.
fn flags(bytes: &[u8]) -> Result<DumpFlags, &'static str> {
    let mut flags = DumpFlags::default();
    wire::fields(bytes, |field, _| {
        let on = field.value.is_some_and(|value| value != 0);
        let text = || shorten(&String::from_utf8_lossy(field.bytes));
        match field.number {
            2 => flags.open_tcp = on,
            3 => flags.external_unix_sockets = on,
            4 => flags.terminal = on,
            5 => flags.file_locks = on,
            6 => flags.empty_namespaces.push(text()),
            7 => flags.cgroups_mode = text(),
            _ => {}
        }
    })?;
    Ok(flags)
}
