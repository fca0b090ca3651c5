//! `rekindle image import` and `export`: images out of checkpoint archives of containerd, and into them.

use std::{
    path::{Path, PathBuf},
    process::ExitCode,
    sync::atomic::{AtomicU64, Ordering},
};

use rekindle_checkpoint::{
    ImageStore,
    foreign::{self, Archive},
    manifest::Unknown,
};
use rekindle_core::{
    config::NodeConfig,
    name::{ImageName, ImageRef, Namespace},
    paths,
};
use serde_json::json;

use super::{failure, locate, opened::Room, with_bar};
use crate::{exit::Failure, keys, output};

#[derive(Debug, clap::Args)]
pub(super) struct ImportArgs {
    /// The archive: what the kubelet's checkpoint API wrote, or `ctr images export`.
    #[arg(value_name = "FILE.tar")]
    file: PathBuf,
    /// Call the image so; its generation is the next one [default: as the container is called].
    #[arg(long, value_name = "NAME")]
    name: Option<ImageName>,
    /// Put it into this namespace [default: that of the container's pod, or containerd's].
    #[arg(short, long, value_name = "NS")]
    namespace: Option<Namespace>,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
}

#[derive(Debug, clap::Args)]
pub(super) struct ExportArgs {
    /// The image: [NAMESPACE/]NAME[@GENERATION].
    image: ImageRef,
    /// The archive, which must not be there yet.
    #[arg(value_name = "FILE.tar")]
    file: PathBuf,
    /// Look in this namespace.
    #[arg(short, long, value_name = "NS")]
    namespace: Option<Namespace>,
    /// Also where the image is encrypted: the archive has its memory, files and registers in clear.
    #[arg(long)]
    plain: bool,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
}

pub(super) fn import(
    store: &ImageStore,
    config: &NodeConfig,
    args: &ImportArgs,
) -> anyhow::Result<ExitCode> {
    let archive = Archive::open(&args.file)?;
    let (namespace, name) = archive.named();
    let say = |what: &str, option: &str| {
        let reason = format!(
            "{} does not say what {what} an image of it should have: {option} does",
            args.file.display()
        );
        Failure::Refused(reason)
    };
    let namespace = args.namespace.clone().or(namespace);
    let namespace = namespace.ok_or_else(|| say("namespace", "--namespace"))?;
    let name = args.name.clone().or(name);
    let name = name.ok_or_else(|| say("name", "--name"))?;
    let key = config
        .key_of(None, &namespace)
        .map(keys::read)
        .transpose()?;
    let private = Path::new(paths::RUN_DIR).join(format!("import-{}", std::process::id()));
    let done = AtomicU64::new(0);
    let bytes = archive.bytes();
    let compression = config.images.compression;
    let imported = with_bar(
        &format!("{namespace}/{name}"),
        bytes,
        || done.load(Ordering::Relaxed),
        || {
            archive.import(
                store,
                (&namespace, &name),
                key,
                compression,
                &private,
                &done,
            )
        },
    )?;
    let reference = imported.image.reference();
    let manifest = imported.image.manifest();
    if args.json {
        output::json(&json!({
            "image": reference,
            "read": bytes,
            "bytes": manifest.total_bytes(),
            "written": manifest.written_bytes(),
            "processes": manifest.facts.processes.len(),
            "unknown": imported.unknown,
            "devices_left_out": imported.devices,
        }))?;
        return Ok(ExitCode::SUCCESS);
    }
    output::line(format!(
        "imported {reference}: {}, {} processes",
        output::bytes(manifest.total_bytes()),
        manifest.facts.processes.len()
    ));
    if imported.devices > 0 {
        output::line(format!(
            "left out: {} device nodes of its writable layer, which a container gets from its spec",
            imported.devices
        ));
    }
    for unknown in &imported.unknown {
        output::line(format!("not known: {}", sentence(*unknown)));
    }
    if !imported.unknown.is_empty() {
        output::line(
            "it is restored where the pod says `rekindle.dev/restore-force: host`, and refused elsewhere",
        );
    }
    Ok(ExitCode::SUCCESS)
}

/// What a restore cannot compare, or will not find.
fn sentence(unknown: Unknown) -> &'static str {
    match unknown {
        Unknown::Host => {
            "the CPU, kernel and CRIU of the host that it was made on (dumps by rekindle's shim say so)"
        }
        Unknown::Layer => {
            "what the container had written into its root (`ctr containers checkpoint --rw` keeps that)"
        }
        Unknown::Shm => {
            "what was in the /dev/shm of its pod; no process had a file of it open (`rekindle checkpoint` keeps that)"
        }
    }
}

pub(super) fn export(
    store: &ImageStore,
    config: &NodeConfig,
    args: &ExportArgs,
) -> anyhow::Result<ExitCode> {
    let (namespace, generation) = locate(store, &args.image, args.namespace.as_ref())?;
    let image = store.resolve(&namespace, &args.image.name, Some(generation));
    let image = image.map_err(failure)?;
    let reference = image.reference();
    let key = keys::of(config, &image)?;
    let room = Room::new(store, key.as_ref())?;
    let done = AtomicU64::new(0);
    let exported = with_bar(
        &reference,
        image.manifest().stored.bytes,
        || done.load(Ordering::Relaxed),
        || {
            let to = (room.path.as_path(), args.file.as_path());
            foreign::export(&image, key.as_ref(), args.plain, to, &done)
        },
    )?;
    if args.json {
        output::json(&json!({
            "image": reference,
            "file": args.file,
            "bytes": exported.bytes,
            "shm": exported.shm,
        }))?;
        return Ok(ExitCode::SUCCESS);
    }
    output::line(format!(
        "exported {reference} to {}: {}",
        args.file.display(),
        output::bytes(exported.bytes)
    ));
    if exported.shm {
        output::line(
            "its pod's /dev/shm is in it, which `rekindle image import` takes and containerd passes over",
        );
    }
    Ok(ExitCode::SUCCESS)
}
