//! `rekindle image fetch`: an image is on this node, from its tier where it was not. For the shim, whose restore waits
//! for it, and for a person who knows what will be wanted.
//!
//! ```text
//!  (elsewhere) ──▶ begun: a restore with a pager can use it ──▶ whole
//! ```
//! With `--json` it writes one object per line: `begun` where that is so, and as the last one `ready` or `failed`. Nobody
//! reading them does not stop it. One process of the node fetches an image; whoever else wants it waits until that is
//! over, and goes on where it was killed.

use std::{
    fs,
    io::{Write as _, stdout},
    process::ExitCode,
    sync::atomic::{AtomicU64, Ordering},
    time::{Duration, Instant},
};

use rekindle_checkpoint::{ImageError, ImageStore, SealedImage, layout::LayoutError};
use rekindle_core::{
    config::NodeConfig,
    name::{ImageName, ImageRef, Namespace},
};
use rekindle_store::{Lock, s3::Tuning};
use serde_json::{Value, json};

use super::{opened::Room, with_bar};
use crate::{exit::Failure, keys, output, tier};

/// A start waits for it, and can do something else: a store that is not there is known within seconds, and one that takes
/// connections and says nothing within less than a minute.
const TUNING: Tuning = Tuning {
    attempts: 4,
    first_pause: Duration::from_millis(200),
    longest_pause: Duration::from_secs(2),
    stall: Duration::from_secs(10),
    rounds: 1,
};
/// Between two looks whether another process has it, and between two lines of progress.
const TICK: Duration = Duration::from_millis(250);
/// Weight of the last tick in the reported rate: it settles within about two seconds.
const NEWEST: f64 = 0.2;

#[derive(Debug, clap::Args)]
pub(super) struct FetchArgs {
    /// The image: [NAMESPACE/]NAME. Its newest generation is meant.
    image: ImageRef,
    /// It is of this namespace [default: default].
    #[arg(short, long, value_name = "NS")]
    namespace: Option<Namespace>,
    /// One JSON object per line on stdout.
    #[arg(long)]
    json: bool,
}

pub(super) fn run(
    store: &ImageStore,
    config: &NodeConfig,
    args: &FetchArgs,
) -> anyhow::Result<ExitCode> {
    let (namespace, name) = wanted(args)?;
    let fetched = fetch(store, config, (&namespace, &name), args.json);
    let fetched = fetched.map(|Fetched { image, hit, alone }| {
        let told = (image.reference(), image.manifest().total_bytes(), hit);
        // In this order: who has waited for this process finds that nobody uses the image.
        drop(image);
        drop(alone);
        told
    });
    // The lock, which is nobody's by now. What cannot be removed is left to the next sweep.
    let _ = store.sweep();
    if args.json {
        line(&match &fetched {
            Ok((image, bytes, hit)) => {
                json!({"event": "ready", "image": image, "bytes": bytes, "hit": hit})
            }
            Err(error) => json!({"event": "failed", "reason": format!("{error:#}")}),
        });
    }
    let (image, bytes, hit) = fetched?;
    if !args.json {
        let how = if hit { "is here already" } else { "fetched" };
        output::line(format!("{image} ({}) {how}", output::bytes(bytes)));
    }
    Ok(ExitCode::SUCCESS)
}

/// An image that is on the node.
struct Fetched {
    image: SealedImage,
    /// Whether it was there.
    hit: bool,
    /// Others wait for this process as long as it has this.
    alone: Option<Lock>,
}

fn wanted(args: &FetchArgs) -> anyhow::Result<(Namespace, ImageName)> {
    let image = &args.image;
    if image.generation.is_some() {
        let reason = format!(
            "image {image}: a generation's number is a node's own; what is fetched is the newest image of a name"
        );
        return Err(Failure::Refused(reason).into());
    }
    let namespace = match (&image.namespace, &args.namespace) {
        (Some(a), Some(b)) if a != b => {
            let reason = format!("image {image}: it names namespace {a}, and --namespace is {b}");
            return Err(Failure::Refused(reason).into());
        }
        (Some(namespace), _) | (None, Some(namespace)) => namespace.clone(),
        (None, None) => "default".parse()?,
    };
    Ok((namespace, image.name.clone()))
}

fn fetch(
    store: &ImageStore,
    config: &NodeConfig,
    (namespace, name): (&Namespace, &ImageName),
    json: bool,
) -> anyhow::Result<Fetched> {
    let hit = |image, alone| Fetched {
        image,
        hit: true,
        alone,
    };
    let here = || match store.resolve(namespace, name, None) {
        Err(ImageError::Unknown(_)) => Ok(None),
        found => found.map(Some),
    };
    if let Some(image) = here()?
        && image.origin()?.is_none()
    {
        return Ok(hit(image, None));
    }
    let mut told = false;
    let mut begun = |image: &SealedImage| {
        if json && !std::mem::replace(&mut told, true) {
            line(&json!({"event": "begun", "image": image.reference()}));
        }
    };
    let alone = loop {
        if let Some(lock) = store.fetching(namespace, name)? {
            break lock;
        }
        if let Some(image) = here()? {
            begun(&image);
        }
        if json {
            line(&json!({"event": "waiting"}));
        }
        std::thread::park_timeout(TICK);
    };
    let image = match here()? {
        Some(image) if image.origin()?.is_none() => return Ok(hit(image, Some(alone))),
        Some(image) => image,
        None => begin(store, config, (namespace, name), json)?,
    };
    begun(&image);
    if json {
        stand_back();
    }
    complete(config, &image, json)?;
    Ok(Fetched {
        image,
        hit: false,
        alone: Some(alone),
    })
}

/// Has as much of it come as a restore with a pager needs to begin; all of it from a registry that gives no parts.
fn begin(
    store: &ImageStore,
    config: &NodeConfig,
    (namespace, name): (&Namespace, &ImageName),
    json: bool,
) -> anyhow::Result<SealedImage> {
    let (Some(tier), Some(layout)) = (
        config.tier_for(namespace),
        tier::of(config, namespace, TUNING)?,
    ) else {
        let reason = format!(
            "there is no image {namespace}/{name} on this node, and no [[images.tier]] for namespace {namespace}"
        );
        return Err(Failure::NotFound(reason).into());
    };
    let found = layout.find_image(namespace, name).map_err(not_found)?;
    let encryption = found.manifest().encryption.as_ref();
    let key = config.key_of(encryption.map(|of| of.key.as_str()), namespace);
    let key = key.map(keys::read).transpose()?;
    let room = Room::new(store, key.as_ref())?;
    if !found.comes_in_parts()? {
        let (total, done) = (found.bytes(), AtomicU64::new(0));
        let (count, checked) = (|| done.load(Ordering::Relaxed), AtomicU64::new(0));
        let to = (namespace, name);
        let work = || found.pull(store, to, key.as_ref(), &room.path, (&done, &checked));
        let pulled = match json {
            true => with_lines(total, count, work)?,
            false => with_bar(&format!("{namespace}/{name}"), total, count, work)?,
        };
        return Ok(pulled.image);
    }
    let at = (key.as_ref(), room.path.as_path());
    Ok(found.begin(store, (namespace, name), at, &tier.url, &AtomicU64::new(0))?)
}

/// Has all threads of this process stand back behind those that a start is waiting for: what builds its processes, and its
/// pager. They have a tenth of a processor beside one of these, and all of one that nobody else wants.
fn stand_back() {
    const NICE: i32 = 10;
    let threads = fs::read_dir("/proc/self/task").into_iter().flatten();
    for thread in threads.flatten() {
        let id = thread.file_name().to_str().and_then(|id| id.parse().ok());
        let id = id.and_then(rustix::process::Pid::from_raw);
        // It is only an order.
        let _ = id.map(|id| rustix::process::setpriority_process(Some(id), NICE));
    }
}

/// Has the rest of it come.
fn complete(config: &NodeConfig, image: &SealedImage, json: bool) -> anyhow::Result<()> {
    let Some(source) = tier::rest_of(config, image)? else {
        return Ok(());
    };
    let key = keys::of(config, image)?;
    let total = image.manifest().packs.iter().map(|pack| pack.size).sum();
    let done = AtomicU64::new(0);
    let count = || done.load(Ordering::Relaxed);
    let work = || image.complete(key.as_ref(), source, &done);
    match json {
        true => with_lines(total, count, work)?,
        false => with_bar(&image.reference(), total, count, work)?,
    }
    Ok(())
}

/// That the tier has no such image is no failure of the store.
fn not_found(error: LayoutError) -> anyhow::Error {
    match matches!(error, LayoutError::NoTag { .. }) || error.is_missing() {
        true => Failure::NotFound(error.to_string()).into(),
        false => error.into(),
    }
}

/// Does some work, with a line of progress every now and then.
fn with_lines<T: Send>(total: u64, done: impl Fn() -> u64, work: impl FnOnce() -> T + Send) -> T {
    let result = std::thread::scope(|scope| {
        let working = scope.spawn(work);
        let (mut last, mut rate) = ((Instant::now(), 0), None);
        while !working.is_finished() {
            std::thread::park_timeout(TICK);
            let now = (Instant::now(), done());
            let newest = (now.1 - last.1) as f64 / (now.0 - last.0).as_secs_f64().max(0.001);
            let settled = rate.map_or(newest, |rate: f64| rate + NEWEST * (newest - rate));
            (last, rate) = (now, Some(settled));
            line(&json!({
                "event": "progress",
                "done": now.1,
                "total": total,
                "bytes_per_second": settled as u64,
            }));
        }
        working.join()
    });
    result.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

fn line(value: &Value) {
    // The reader may be gone (a shim that was killed); the fetch goes on for the next one.
    let _ = writeln!(stdout().lock(), "{value}");
}
