//! `rekindle image`: what images are on this node.

use std::{
    io::{IsTerminal as _, stderr},
    process::ExitCode,
    sync::atomic::{AtomicU64, Ordering},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use clap::Subcommand;
use indicatif::{ProgressBar, ProgressStyle};
use rekindle_checkpoint::{
    ImageError, ImageStore, Manifest, SealedImage,
    image::{Listed, Place},
};
use rekindle_core::{
    config::NodeConfig,
    name::{ImageRef, Namespace},
};
use serde_json::json;

use crate::{
    exit::Failure,
    keys,
    output::{self, Paint},
};

mod diff;
mod fetch;
mod gc;
mod import;
mod oci;
pub(crate) mod opened;
mod remote;
mod show;

const EXAMPLES: &str = "\
Examples:
  rekindle image ls
  rekindle image ls -n team-a --json
  rekindle image ls s3://images/          # what is in a bucket
  rekindle image show team-a/warm
  rekindle image diff team-a/warm@1 team-a/warm@2
  rekindle image push team-a/warm oci:/mnt/images
  rekindle image pull oci:/mnt/images
  rekindle image push team-a/warm s3://images/
  rekindle image fetch team-a/warm
  rekindle image import checkpoint-pod_ns-main.tar --name warm
  rekindle image export team-a/warm warm.tar
  rekindle image verify team-a/warm@3
  rekindle image rm team-a/warm@1
  rekindle image rm s3://images/:team-a/warm@1764237600-9f86d081884c
  rekindle image gc --dry-run
  rekindle image gc --keep 2 --idle 72h --quota 200GiB
  rekindle image gc s3://images/ --keep 3

An image is named [NAMESPACE/]NAME[@GENERATION]. Without a generation, show and verify mean the newest,
and rm means all of them. Without a namespace all are searched, and the name must be in one only.

Exit codes: 0 done, 1 failed or damaged, 2 wrong usage, 3 refused (in use), 4 no such image.";

const DIFF_EXAMPLES: &str = "\
Examples:
  rekindle image diff team-a/warm@1 team-a/warm@2
  rekindle image diff -n team-a warm@1 warm --json

Memory is compared in chunks of 64 KiB: what is an image's own lies in chunks that the other one has not.
An encrypted image is compared with its key only, and two under different keys have no chunks in common
that could be told.

Exit codes: 0 done, whether they differ or not; 1 failed or damaged; 2 wrong usage; 4 no such image.";

const OCI_EXAMPLES: &str = "\
Examples:
  rekindle image push team-a/warm oci:/mnt/images
  rekindle image push team-a/warm@3 oci:/mnt/images:warm-3 --json
  rekindle image pull oci:/mnt/images:warm-3
  rekindle image pull oci:/mnt/images:warm-3 team-b/warm
  rekindle image push team-a/warm s3://images/node-1/
  rekindle image pull s3://images/node-1/:team-a/warm     # the newest of that name
  rekindle image push team-a/warm docker://registry.example.com/images
  rekindle image pull docker://registry.example.com/images:team-a/warm

A bucket or a registry is used as the configuration says in [[images.tier]], and for the namespaces that it says.

An encrypted image travels encrypted. Without its key it is pulled under its own name only, and its chunks
are compared when they are read.

Exit codes: 0 done, 1 failed or refused for what it is, 2 wrong usage, 3 refused (no tier of the configuration),
4 no such image or tag.";

const FETCH_EXAMPLES: &str = "\
Examples:
  rekindle image fetch team-a/warm
  rekindle image fetch -n team-a warm --json

A restore does the same by itself. The image is verified before it appears, and stays on the node.

Exit codes: 0 done, 1 failed, 2 wrong usage, 3 refused, 4 neither here nor in the tier.";

const ARCHIVE_EXAMPLES: &str = "\
Examples:
  rekindle image import /var/lib/kubelet/checkpoints/checkpoint-web_team-a-main-2026-11-27T10:00:00Z.tar --name warm
  ctr containers checkpoint --image --rw --task demo localhost/demo
  ctr images export --skip-manifest-json demo.tar localhost/demo
  rekindle image import demo.tar --namespace default --name demo --json
  rekindle image export team-a/warm@3 /tmp/warm.tar

An imported image is encrypted where its namespace has a key. What the archive does not say is told, and kept as
unknown: a restore of it is refused, unless its pod says `rekindle.dev/restore-force: host`.
An exported one is in clear, and in the form that containerd's CRI (2.1 and later) restores where a container's
image is the path of such a file. The file appears when all of it is there; one that is there is not replaced.

Exit codes: 0 done, 1 failed or refused for what it is, 2 wrong usage, 3 refused (no name, or --plain is missing),
4 no such image.";

const REMOTE_EXAMPLES: &str = "\
Examples:
  rekindle image rm team-a/warm@1
  rekindle image ls s3://images/          # the tags that there are
  rekindle image rm s3://images/:team-a/warm@1764237600-9f86d081884c
  rekindle image rm s3://images/:team-a/warm      # all of that name

The blobs of a tag of a bucket go with `rekindle image gc s3://images/`, a day after it.

Exit codes: 0 done, 1 failed, 2 wrong usage, 3 refused (in use; no tier of the configuration), 4 no such image or tag.";

const GC_EXAMPLES: &str = "\
Examples:
  rekindle image gc --dry-run             # what would go, by [images.retention] of the configuration
  rekindle image gc --keep 2 --idle 72h
  rekindle image gc -n team-a --quota 50GiB --json
  rekindle image gc s3://images/ --keep 3 --dry-run
  rekindle image gc s3://images/ --keep 3 --older-than 720h

Of a bucket go the tags beyond the newest ones of each name, and then blobs that no tag needs: not before they, and
the tags that needed them, have been gone for --grace. So uploads, and containers that still load, are not disturbed.

Without rules, the least recently used generations go until a fifth of the disk is free, but for the newest
of each name. What a container leases is never removed.

Exit codes: 0 done, also where nothing was removed; 1 failed; 2 wrong usage.";

#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct ImageArgs {
    #[command(subcommand)]
    command: ImageCommand,
}

#[derive(Debug, Subcommand)]
enum ImageCommand {
    /// List this node's images, or those of a bucket or a registry.
    Ls {
        /// What [[images.tier]] names: s3://BUCKET/PREFIX/, docker://HOST[:PORT]/REPOSITORY.
        #[arg(value_name = "PLACE")]
        place: Option<oci::Place>,
        /// Those of this namespace only.
        #[arg(short, long, value_name = "NS")]
        namespace: Option<Namespace>,
        /// Print one JSON array.
        #[arg(long)]
        json: bool,
    },
    /// Show what an image is: where it came from, what it needs, what is in it, what it shares with the
    /// generation before it.
    Show {
        #[command(flatten)]
        which: Which,
        /// Print the manifest as one line of JSON, with `place`, `contents`, `packs_shared_with`, `quarantined` and
        /// `kind` beside it.
        #[arg(long)]
        json: bool,
    },
    /// Show in what two images differ: memory by what it is for, files, processes.
    #[command(after_help = DIFF_EXAMPLES)]
    Diff(diff::DiffArgs),
    /// Read every byte of images again and compare it with their manifests.
    Verify {
        /// The images [default: all].
        #[arg(value_name = "IMAGE")]
        images: Vec<ImageRef>,
        /// Look in this namespace.
        #[arg(short, long, value_name = "NS")]
        namespace: Option<Namespace>,
    },
    /// Remove an image: one generation, or all; or a tag of a bucket.
    #[command(after_help = REMOTE_EXAMPLES)]
    Rm {
        /// The image: [NAMESPACE/]NAME[@GENERATION]. Or a tag as `image ls` tells it of a bucket that [[images.tier]]
        /// names: s3://BUCKET/PREFIX/:TAG, and without @… all of that name.
        #[arg(value_name = "IMAGE")]
        image: remote::Doomed,
        /// Look in this namespace.
        #[arg(short, long, value_name = "NS")]
        namespace: Option<Namespace>,
        /// Also while a container is being restored from it. One that still loads its memory keeps the
        /// bytes until it has them.
        #[arg(long)]
        force: bool,
        /// Print one line of JSON.
        #[arg(long)]
        json: bool,
    },
    /// Copy an image into an OCI image layout, in a folder or a bucket, or into a registry. What is there already is not
    /// written again.
    #[command(after_help = OCI_EXAMPLES)]
    Push(oci::PushArgs),
    /// Take an image out of an OCI image layout or a registry, verify it, and make it the next generation.
    #[command(after_help = OCI_EXAMPLES)]
    Pull(oci::PullArgs),
    /// Make an image of a checkpoint archive: the kubelet's, or what `ctr images export` writes of `ctr containers
    /// checkpoint`.
    #[command(after_help = ARCHIVE_EXAMPLES)]
    Import(import::ImportArgs),
    /// Write an image as a checkpoint archive, which containerd's CRI restores.
    #[command(after_help = ARCHIVE_EXAMPLES)]
    Export(import::ExportArgs),
    /// Have the newest image of a name on this node: fetch it from its namespace's tier, if it is not here.
    #[command(after_help = FETCH_EXAMPLES)]
    Fetch(fetch::FetchArgs),
    /// Make room: remove what the node's rules, or these, say may go, and what killed checkpoints left.
    #[command(after_help = GC_EXAMPLES)]
    Gc(gc::GcArgs),
}

#[derive(Debug, clap::Args)]
struct Which {
    /// The image: [NAMESPACE/]NAME[@GENERATION].
    image: ImageRef,
    /// Look in this namespace.
    #[arg(short, long, value_name = "NS")]
    namespace: Option<Namespace>,
}

pub(crate) async fn run(args: ImageArgs, config: &NodeConfig) -> anyhow::Result<ExitCode> {
    let store = ImageStore::of(&config.images)?;
    // Reads whole images, and blocks; nothing else runs in this process.
    tokio::task::block_in_place(|| match args.command {
        ImageCommand::Ls {
            place: Some(place),
            namespace,
            json,
        } => oci::ls(config, &place, namespace.as_ref(), json),
        ImageCommand::Ls {
            place: None,
            namespace,
            json,
        } => ls(&store, namespace.as_ref(), json),
        ImageCommand::Show { which, json } => show::run(&store, config, &which, json),
        ImageCommand::Push(args) => oci::push(&store, config, &args),
        ImageCommand::Pull(args) => oci::pull(&store, config, &args),
        ImageCommand::Import(args) => import::import(&store, config, &args),
        ImageCommand::Export(args) => import::export(&store, config, &args),
        ImageCommand::Fetch(args) => fetch::run(&store, config, &args),
        ImageCommand::Diff(args) => diff::run(&store, config, &args),
        ImageCommand::Verify { images, namespace } => {
            verify(&store, config, &images, namespace.as_ref())
        }
        ImageCommand::Rm {
            image: remote::Doomed::Tag(place),
            namespace,
            json,
            ..
        } => remote::rm(config, &place, namespace.as_ref(), json),
        ImageCommand::Rm {
            image: remote::Doomed::Image(image),
            namespace,
            force,
            json,
        } => rm(&store, &Which { image, namespace }, force, json),
        ImageCommand::Gc(args) => match &args.place {
            Some(place) => remote::gc(config, place, &args),
            None => gc::run(&store, config, &args),
        },
    })
}

fn ls(store: &ImageStore, namespace: Option<&Namespace>, json: bool) -> anyhow::Result<ExitCode> {
    let found = store.list(namespace)?;
    if json {
        let rows: Vec<_> = found.iter().map(row).collect();
        output::json(&rows)?;
        return Ok(ExitCode::SUCCESS);
    }
    if found.is_empty() {
        output::line("no images on this node (`rekindle checkpoint` makes one)");
        return Ok(ExitCode::SUCCESS);
    }
    let titles = [
        "NAMESPACE",
        "NAME",
        "GEN",
        "SIZE",
        "PROCESSES",
        "FROM",
        "PLACE",
        "AGE",
        "STATE",
    ];
    let mut table = vec![titles.map(str::to_owned)];
    table.extend(found.iter().map(cells));
    for row in &table {
        let mut text = String::new();
        for (column, cell) in row.iter().enumerate() {
            let width = table.iter().map(|row| row[column].chars().count()).max();
            text.push_str(&format!("{cell:<width$}  ", width = width.unwrap_or(0)));
        }
        output::line(text.trim_end());
    }
    Ok(ExitCode::SUCCESS)
}

fn cells(found: &Listed) -> [String; 9] {
    let state = match (&found.manifest, &found.quarantined) {
        (Err(_), _) => "refused",
        (Ok(_), Some(_)) => "quarantined",
        (Ok(_), None) if found.incoming => "coming in",
        (Ok(_), None) if found.in_use => "in use",
        (Ok(_), None) => "",
    };
    let manifest = found.manifest.as_ref().ok();
    let say = |say: fn(&Manifest) -> String| manifest.map_or_else(|| "?".to_owned(), say);
    [
        found.namespace.to_string(),
        found.name.to_string(),
        found.generation.to_string(),
        say(|manifest| output::bytes(manifest.total_bytes())),
        say(|manifest| manifest.facts.processes.len().to_string()),
        say(origin),
        found.places.to_string(),
        say(|manifest| age(manifest.created)),
        state.to_owned(),
    ]
}

fn row(found: &Listed) -> serde_json::Value {
    let manifest = found.manifest.as_ref();
    json!({
        "namespace": found.namespace,
        "name": found.name,
        "generation": found.generation,
        "place": found.places.to_string(),
        "in_use": found.in_use,
        "incoming": found.incoming,
        "quarantined": found.quarantined,
        "bytes": manifest.ok().map(Manifest::total_bytes),
        "created": manifest.ok().map(|manifest| manifest.created),
        "source": manifest.ok().map(|manifest| &manifest.facts.source),
        "refused": manifest.err().map(ToString::to_string),
    })
}

fn verify(
    store: &ImageStore,
    config: &NodeConfig,
    images: &[ImageRef],
    namespace: Option<&Namespace>,
) -> anyhow::Result<ExitCode> {
    let mut wanted = Vec::new();
    for image in images {
        let (namespace, generation) = locate(store, image, namespace)?;
        wanted.push((namespace, image.name.clone(), generation));
    }
    if images.is_empty() {
        let all = store.list(namespace)?.into_iter();
        wanted.extend(all.map(|found| (found.namespace, found.name, found.generation)));
    }
    if wanted.is_empty() {
        output::line("no images on this node");
    }
    let paint = Paint::for_stdout();
    let mut sound = true;
    for (namespace, name, generation) in wanted {
        let checked = store
            .resolve(&namespace, &name, Some(generation))
            .map_err(anyhow::Error::from)
            .and_then(|image| check(store, config, image));
        match checked {
            Ok(sentence) => output::line(format!("{sentence}: {}", paint.green("sound"))),
            Err(error) => {
                sound = false;
                output::line(format!(
                    "{namespace}/{name}@{generation}: {} {error:#}",
                    paint.red("unsound:")
                ));
            }
        }
    }
    Ok(if sound {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

/// Verifies all copies of one image, with a bar on a terminal, and says which it was.
fn check(store: &ImageStore, config: &NodeConfig, image: SealedImage) -> anyhow::Result<String> {
    let (reference, bytes) = (image.reference(), image.manifest().total_bytes());
    let packs = image.manifest().packs.iter().map(|pack| pack.size).sum();
    let key = keys::of(config, &image)?;
    let copies = [image.on_disk(), Some(image.alone())];
    for copy in copies.into_iter().flatten() {
        let place = copy.place();
        let room = opened::Room::new(store, key.as_ref())?;
        let check = || -> anyhow::Result<()> {
            let verified = copy.verify(&room.path, key.as_ref())?;
            let done = AtomicU64::new(0);
            with_bar(
                &reference,
                packs,
                || done.load(Ordering::Relaxed),
                || verified.verify_chunks(&done),
            )?;
            Ok(())
        };
        check().map_err(|error| match place {
            Place::Memory => error.context("its copy in memory"),
            Place::Disk => error,
        })?;
    }
    Ok(format!("{reference}  {}", output::bytes(bytes)))
}

/// Does some work with a bar on a terminal, which `done` moves up to `bytes`.
fn with_bar<T: Send>(
    title: &str,
    bytes: u64,
    done: impl Fn() -> u64,
    work: impl FnOnce() -> T + Send,
) -> T {
    let bar = bar(title, bytes);
    let result = std::thread::scope(|scope| {
        let working = scope.spawn(work);
        while !working.is_finished() {
            bar.set_position(done());
            // The bar is drawn this often; `unpark` is not needed, for nobody waits for less.
            std::thread::park_timeout(Duration::from_millis(50));
        }
        working.join()
    });
    bar.finish_and_clear();
    result.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

fn bar(reference: &str, bytes: u64) -> ProgressBar {
    if !stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let bar = ProgressBar::new(bytes);
    let template = "{spinner} {prefix}  {wide_bar} {bytes}/{total_bytes}  {bytes_per_sec}";
    if let Ok(style) = ProgressStyle::with_template(template) {
        bar.set_style(style);
    }
    bar.set_prefix(reference.to_owned());
    bar
}

fn rm(store: &ImageStore, which: &Which, force: bool, json: bool) -> anyhow::Result<ExitCode> {
    let told = |removed: &[String]| match json {
        true => output::json(&json!({"removed": removed})),
        false => {
            removed
                .iter()
                .for_each(|image| output::line(format!("removed {image}")));
            Ok(())
        }
    };
    let (name, generation) = (&which.image.name, which.image.generation);
    let namespace = match locate(store, &which.image, which.namespace.as_ref()) {
        Ok((namespace, _)) => namespace,
        Err(error) => {
            // Of images that containers made, and that are gone, it is known that they were of no use.
            let namespace = which.image.namespace.as_ref().or(which.namespace.as_ref());
            match namespace {
                Some(namespace)
                    if generation.is_none() && store.forget_warm(namespace, name)? =>
                {
                    match json {
                        true => told(&[])?,
                        false => {
                            output::line(format!("forgot what was known of {namespace}/{name}"))
                        }
                    }
                    return Ok(ExitCode::SUCCESS);
                }
                _ => return Err(error),
            }
        }
    };
    let removed = store
        .remove(&namespace, name, generation, force)
        .map_err(failure)?;
    let removed = removed.iter();
    let removed: Vec<String> = removed
        .map(|generation| format!("{namespace}/{name}@{generation}"))
        .collect();
    told(&removed)?;
    Ok(ExitCode::SUCCESS)
}

/// The namespace of an image that was named, and its generation, the newest where none was named.
fn locate(
    store: &ImageStore,
    image: &ImageRef,
    namespace: Option<&Namespace>,
) -> anyhow::Result<(Namespace, u64)> {
    let namespace = match (image.namespace.as_ref(), namespace) {
        (Some(a), Some(b)) if a != b => {
            let reason = format!("image {image}: it names namespace {a}, and --namespace is {b}");
            return Err(Failure::Refused(reason).into());
        }
        (a, b) => a.or(b),
    };
    let fits = |found: &Listed| {
        found.name == image.name
            && image
                .generation
                .is_none_or(|wanted| wanted == found.generation)
    };
    let found: Vec<Listed> = store.list(namespace)?.into_iter().filter(fits).collect();
    let Some(newest) = found.last() else {
        return Err(failure(ImageError::Unknown(image.to_string())));
    };
    if let Some(other) = found
        .iter()
        .find(|other| other.namespace != newest.namespace)
    {
        let reason = format!(
            "image {image} is in several namespaces ({}, {}): name one with -n",
            other.namespace, newest.namespace
        );
        return Err(Failure::Refused(reason).into());
    }
    Ok((newest.namespace.clone(), newest.generation))
}

fn failure(error: ImageError) -> anyhow::Error {
    match error {
        ImageError::Unknown(_) => Failure::NotFound(error.to_string()).into(),
        ImageError::InUse(_) => Failure::Refused(error.to_string()).into(),
        error => error.into(),
    }
}

/// The container image that the container ran, or the container where that is not known.
fn origin(manifest: &Manifest) -> String {
    let source = &manifest.facts.source;
    let text = source.image_ref.as_ref().unwrap_or(&source.container);
    // A reference by digest is longer than a screen is wide.
    let text = text
        .split_once("@sha256:")
        .map_or(text.as_str(), |(name, _)| name);
    text.chars().filter(|c| !c.is_control()).take(48).collect()
}

fn age(created: u64) -> String {
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    span(now.as_secs().saturating_sub(created))
}

fn span(seconds: u64) -> String {
    match seconds {
        0..60 => format!("{seconds}s"),
        60..3600 => format!("{}m", seconds / 60),
        3600..172_800 => format!("{}h", seconds / 3600),
        _ => format!("{}d", seconds / 86_400),
    }
}
