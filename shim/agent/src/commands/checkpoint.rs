//! `rekindle checkpoint`: a named image of a running container.
//!
//! The folder is ours and so is the name; what lies in the folder is written, sealed and published by
//! the container's shim, which is the only one that sees the frozen container.

use std::{
    path::PathBuf,
    process::ExitCode,
    time::{Duration, Instant},
};

use clap::Args;
use indicatif::ProgressBar;
use rekindle_checkpoint::{ImageError, ImageStore, Request, SealedImage, manifest::Source};
use rekindle_core::{
    config::NodeConfig,
    duration,
    name::{ImageName, Namespace, WARM_PREFIX},
};
use serde::Serialize;
use serde_json::json;

use crate::{
    containerd::{
        self, CheckpointOptions, Containerd,
        select::Container,
        shim::{self, Shim},
    },
    exit::Failure,
    output,
};

/// Between two looks how far it is.
const TICK: Duration = Duration::from_millis(200);

const EXAMPLES: &str = "\
Examples:
  rekindle checkpoint demo --name warm                     a container of ctr, by id
  rekindle checkpoint web-0/server --name warm             a pod's container, by name
  rekindle checkpoint team-a/web-0/server --name warm      the same, where two pods are called web-0
  rekindle checkpoint 4f2a --name warm --exit              by the beginning of its id; ends it

Established TCP connections, file locks, connected unix sockets and deleted files that are still open
never stand in the way. At the restore the connections are closed and the program sees a reset, for the
new pod has another address; --keep-tcp keeps them, for a restore at the same address.

Exit codes: 0 done, 1 failed, 2 wrong usage, 3 refused, 4 no such container.";

#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct CheckpointArgs {
    /// The container: its id, the beginning of its id, or [NAMESPACE/]POD/CONTAINER.
    container: String,
    /// The image's name, in the pod's namespace (under ctr: containerd's).
    #[arg(long)]
    name: ImageName,
    /// containerd's namespace [default: k8s.io, then default].
    #[arg(short = 'n', long, value_name = "NS")]
    containerd_namespace: Option<String>,
    /// End the container once its image is published. Otherwise it runs on.
    #[arg(long)]
    exit: bool,
    /// Restore established TCP connections instead of closing them. Only a container that gets the
    /// same address can be restored from such an image.
    #[arg(long)]
    keep_tcp: bool,
    /// Give up after this long [default: deadlines.checkpoint of the configuration, 110s].
    #[arg(long, value_parser = duration::parse, value_name = "DURATION")]
    timeout: Option<Duration>,
    /// containerd's socket.
    #[arg(long, default_value = containerd::ADDRESS)]
    address: PathBuf,
    /// Print one line of JSON.
    #[arg(long)]
    json: bool,
    /// With --json: before that, a line for each step that begins and for how much is stored.
    #[arg(long, requires = "json")]
    progress: bool,
}

/// What was typed, resolved: everything a checkpoint needs, checked.
#[derive(Debug)]
struct Resolved {
    container: Container,
    digest: Option<String>,
    namespace: Namespace,
    timeout: Duration,
}

pub(crate) async fn run(args: CheckpointArgs, config: &NodeConfig) -> anyhow::Result<ExitCode> {
    let spinner = output::spinner("looking for the container");
    let answer = tokio::select! {
        answer = checkpoint(&args, config, &spinner) => answer,
        // Dropping the request takes the call back, and with it the partial image.
        _ = tokio::signal::ctrl_c() => Err(anyhow::anyhow!(
            "checkpoint of {}: interrupted; it was given up", args.container
        )),
    };
    spinner.finish_and_clear();
    let answer = answer?;
    if args.json {
        output::json(&answer)?;
    } else {
        output::line(answer.sentence());
    }
    Ok(ExitCode::SUCCESS)
}

async fn checkpoint(
    args: &CheckpointArgs,
    config: &NodeConfig,
    spinner: &ProgressBar,
) -> anyhow::Result<Answer> {
    let began = Instant::now();
    if args.name.as_str().starts_with(WARM_PREFIX) {
        return Err(Failure::Refused(format!(
            "checkpoint of {}: names that begin with {WARM_PREFIX} are those of rekindle.dev/warm-start; give the image another one",
            args.container
        ))
        .into());
    }
    let containerd = Containerd::connect(&args.address).await?;
    let request = resolve(args, config, &containerd).await?;
    let store = ImageStore::of(&config.images)?;
    // Dropped on any way out, it takes the partial folder along.
    let mut partial = store.begin(&request.namespace, &args.name, request.source())?;
    let options = CheckpointOptions {
        exit: args.exit,
        open_tcp: args.keep_tcp,
        external_unix_sockets: true,
        terminal: request.container.state.terminal,
        file_locks: true,
        image_path: utf8(partial.dir())?,
        work_path: String::new(),
    };
    spinner.set_message(format!(
        "checkpoint of {} to {}/{}",
        args.container, request.namespace, args.name
    ));
    let made = containerd.checkpoint(&request.container, &options, request.timeout);
    watched(args, spinner, &mut partial, made).await?;
    let image = partial.finish().map_err(|error| match error {
        ImageError::Unknown(_) => Failure::Refused(format!(
            "checkpoint of container {}: its shim made no image in {}; the configuration that it read when the pod was created has another images.root, or it is older than this program",
            request.container.id,
            config.images.root.display()
        ))
        .into(),
        error => anyhow::Error::from(error),
    })?;
    Ok(Answer::new(&request, args, &image, began.elapsed()))
}

/// Waits for the image, and tells how far it is to who wants to know.
async fn watched(
    args: &CheckpointArgs,
    spinner: &ProgressBar,
    partial: &mut Request,
    made: impl Future<Output = anyhow::Result<()>>,
) -> anyhow::Result<()> {
    let mut made = std::pin::pin!(made);
    let mut ticks = tokio::time::interval(TICK);
    let mut step = String::new();
    let mut told = 0;
    loop {
        let ended = tokio::select! {
            ended = &mut made => Some(ended),
            _ = ticks.tick() => None,
        };
        for begun in partial.steps()? {
            if args.progress {
                output::json(&json!({"event": "step", "step": begun}))?;
            }
            step = begun;
        }
        // With the last step the image leaves the folder.
        let stored = partial.stored().unwrap_or(told);
        if !step.is_empty() && ended.is_none() {
            spinner.set_message(format!("{step}, {}", output::bytes(stored)));
        }
        if stored > told && args.progress {
            output::json(&json!({"event": "progress", "step": step, "done": stored}))?;
        }
        told = stored.max(told);
        if let Some(ended) = ended {
            return ended;
        }
    }
}

async fn resolve(
    args: &CheckpointArgs,
    config: &NodeConfig,
    containerd: &Containerd,
) -> anyhow::Result<Resolved> {
    let namespace = args.containerd_namespace.as_deref();
    let container = containerd
        .find(&args.container, namespace, "checkpointed")
        .await?;
    require_our_shim(&container, args.exit).await?;
    let digest = containerd
        .image_digest(&container.namespace, &container.image)
        .await?;
    Ok(Resolved {
        namespace: container.image_namespace().parse()?,
        timeout: args.timeout.unwrap_or(config.deadlines.checkpoint),
        container,
        digest,
    })
}

impl Resolved {
    fn source(&self) -> Source {
        Source {
            image_ref: Some(self.container.image.clone()).filter(|name| !name.is_empty()),
            image_digest: self.digest.clone(),
            container: self.container.id.clone(),
            pod: self.container.pod(),
            warm: None,
        }
    }
}

fn utf8(path: PathBuf) -> anyhow::Result<String> {
    path.into_os_string().into_string().map_err(|path| {
        anyhow::anyhow!("images.root {path:?}: not UTF-8, and containerd takes nothing else")
    })
}

/// Another shim would make a plain checkpoint, which nobody wants, and with `--exit` then end the
/// container: all of its memory would be lost.
async fn require_our_shim(container: &Container, exit: bool) -> Result<(), Failure> {
    let id = &container.id;
    match shim::of(container.state.pid).await {
        Shim::Ours => Ok(()),
        Shim::Foreign => Err(Failure::Refused(format!(
            "checkpoint of container {id}: its shim is not rekindle's and makes no image; run it with runtimeClassName: rekindle"
        ))),
        Shim::Unknown if exit => Err(Failure::Refused(format!(
            "checkpoint of container {id}: its shim's process is not found, so it may not be rekindle's, and --exit would end the container without an image; run this where containerd runs, in its PID namespace"
        ))),
        // What it makes will tell.
        Shim::Unknown => Ok(()),
    }
}

/// What is printed.
#[derive(Debug, Serialize)]
struct Answer {
    image: String,
    namespace: Namespace,
    name: ImageName,
    generation: u64,
    bytes: u64,
    /// Of these, what no earlier generation had.
    written: u64,
    elapsed_ms: u64,
    container: String,
    exited: bool,
}

impl Answer {
    fn new(
        request: &Resolved,
        args: &CheckpointArgs,
        image: &SealedImage,
        elapsed: Duration,
    ) -> Self {
        Self {
            image: image.reference(),
            namespace: request.namespace.clone(),
            name: args.name.clone(),
            generation: image.generation(),
            bytes: image.manifest().total_bytes(),
            written: image.manifest().written_bytes(),
            elapsed_ms: u64::try_from(elapsed.as_millis()).unwrap_or(u64::MAX),
            container: request.container.id.clone(),
            exited: args.exit,
        }
    }

    fn sentence(&self) -> String {
        let size = output::bytes(self.bytes);
        let took = self.elapsed_ms as f64 / 1e3;
        let after = if self.exited {
            "; the container has ended"
        } else {
            ""
        };
        let new = match self.written < self.bytes {
            true => format!(" ({} of it new)", output::bytes(self.written)),
            false => String::new(),
        };
        format!("{}  {size}{new}, made in {took:.2}s{after}", self.image)
    }
}
