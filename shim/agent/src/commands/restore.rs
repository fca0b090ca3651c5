//! `rekindle restore`: another container like one that there is, started from an image.
//!
//! For clients of containerd (ctr, nerdctl). A pod's containers are the kubelet's to make; a pod names its image itself.

use std::{
    path::PathBuf,
    process::ExitCode,
    time::{Duration, Instant},
};

use anyhow::Context as _;
use clap::Args;
use containerd_client::services::v1;
use rekindle_checkpoint::ImageStore;
use rekindle_core::{
    annotations::PREFIX,
    config::NodeConfig,
    name::{ImageRef, Namespace},
};
use serde::Serialize;
use serde_json::{Value, json};

use crate::{
    containerd::{
        self, Containerd,
        shim::{self, Shim},
    },
    exit::Failure,
    output,
};

/// Where containers are that no kubelet has made, and nobody named another namespace.
const NAMESPACE: &str = "default";
/// What the kubelet's containers are called by containerd.
const OF_A_POD: &str = "io.cri-containerd.kind";

const EXAMPLES: &str = "\
Examples:
  rekindle restore warm web-2 --like web                  the newest image called warm
  rekindle restore team-a/warm@3 web-2 --like web         a generation of another namespace's, where it is exported
  rekindle restore warm web-2 --like web --log /var/log/web-2.log
  rekindle restore warm web-2 --like web --force          on a host with another kernel, CRIU or CPU

The new container has the container image, the command and the settings of the one that it is like, which may
run or not, and a writable layer of its own. What does not fit is named before anything starts: with --force
a difference of the host is not refused, but the program may crash on it. A failure leaves nothing behind.

Exit codes: 0 done, 1 failed, 2 wrong usage, 3 refused, 4 no such container or image.";

#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct RestoreArgs {
    /// The image: [NAMESPACE/]NAME[@GENERATION].
    image: ImageRef,
    /// The new container's id.
    id: String,
    /// The container that it is to be like, by its id.
    #[arg(long, value_name = "CONTAINER")]
    like: String,
    /// Append what it writes to this file [default: it goes nowhere].
    #[arg(long, value_name = "FILE")]
    log: Option<PathBuf>,
    /// Do not refuse a host that differs from the image's in its kernel, CRIU or CPU features.
    #[arg(long)]
    force: bool,
    /// containerd's namespace.
    #[arg(short = 'n', long, value_name = "NS", default_value = NAMESPACE)]
    containerd_namespace: String,
    /// containerd's socket.
    #[arg(long, default_value = containerd::ADDRESS)]
    address: PathBuf,
    /// Print one line of JSON.
    #[arg(long)]
    json: bool,
}

/// What is printed.
#[derive(Debug, Serialize)]
struct Answer {
    container: String,
    containerd_namespace: String,
    image: String,
    pid: u32,
    elapsed_ms: u64,
}

pub(crate) async fn run(args: RestoreArgs, config: &NodeConfig) -> anyhow::Result<ExitCode> {
    let spinner = output::spinner(&format!("restoring {} from {}", args.id, args.image));
    let answer = restore(&args, config).await;
    spinner.finish_and_clear();
    let answer = answer?;
    match args.json {
        true => output::json(&answer)?,
        false => output::line(format!(
            "{}  pid {}, from {} in {:.2}s",
            answer.container,
            answer.pid,
            answer.image,
            Duration::from_millis(answer.elapsed_ms).as_secs_f64()
        )),
    }
    Ok(ExitCode::SUCCESS)
}

async fn restore(args: &RestoreArgs, config: &NodeConfig) -> anyhow::Result<Answer> {
    let began = Instant::now();
    let log = args.log.as_ref().map(|path| {
        let path = std::path::absolute(path).with_context(|| format!("{}", path.display()))?;
        let text = path
            .to_str()
            .context("--log: not UTF-8, and containerd takes nothing else")?;
        Ok::<_, anyhow::Error>(format!("file://{text}"))
    });
    let log = log.transpose()?;
    // Before anything is made: the newest one of now, whatever is made meanwhile.
    let own: Namespace = args.containerd_namespace.parse()?;
    let namespace = args.image.namespace.as_ref().unwrap_or(&own);
    let store = ImageStore::of(&config.images)?;
    let image = store.resolve(namespace, &args.image.name, args.image.generation)?;

    let containerd = Containerd::connect(&args.address).await?;
    let namespace = &args.containerd_namespace;
    let like = containerd.record(namespace, &args.like).await?;
    if like.labels.contains_key(OF_A_POD) {
        return Err(Failure::Refused(format!(
            "container {} is a pod's: the kubelet makes those; annotate the pod with {PREFIX}restore-from: {}",
            args.like, args.image
        ))
        .into());
    }
    let (snapshotter, layer) = (like.snapshotter.clone(), like.snapshot_key.clone());
    let record = new_record(args, like, &image.reference())?;
    let making = make(&containerd, namespace, record, &layer, log);
    let mut interrupted = false;
    let made = {
        tokio::pin!(making);
        tokio::select! {
            made = &mut making => made,
            _ = tokio::signal::ctrl_c() => {
                // A call that is dropped half-way leaves what nobody knows of.
                interrupted = true;
                making.await
            }
        }
    };
    let pid = made?;
    if interrupted {
        containerd.end_task(namespace, &args.id).await;
        containerd.forget(namespace, &args.id).await;
        containerd
            .remove_layer(namespace, &snapshotter, &args.id)
            .await;
        anyhow::bail!("restore of {}: interrupted; it was taken back", args.id);
    }
    Ok(Answer {
        container: args.id.clone(),
        containerd_namespace: namespace.clone(),
        image: image.reference(),
        pid,
        elapsed_ms: u64::try_from(began.elapsed().as_millis()).unwrap_or(u64::MAX),
    })
}

/// The new container, like the other one but for its name, and with the image to start from.
fn new_record(
    args: &RestoreArgs,
    mut like: v1::Container,
    image: &str,
) -> anyhow::Result<v1::Container> {
    let old = std::mem::replace(&mut like.id, args.id.clone());
    like.snapshot_key.clone_from(&args.id);
    let spec = like.spec.as_mut().context("the container has no spec")?;
    let mut json: Value = serde_json::from_slice(&spec.value)
        .with_context(|| format!("the spec of container {old} is no JSON"))?;
    if json.pointer("/process/terminal") == Some(&Value::Bool(true)) {
        return Err(Failure::Refused(format!(
            "container {old} has a terminal, and nobody would be at that of another one: restore it with `ctr run -t --annotation {PREFIX}restore-from={image}`"
        ))
        .into());
    }
    if let Some(path) = json.pointer_mut("/linux/cgroupsPath")
        && let Some(text) = path.as_str()
    {
        // `/default/web`, or `slice:prefix:web` for systemd.
        let begin = text.rfind(['/', ':']).map_or(0, |at| at + 1);
        *path = json!(format!("{}{}", &text[..begin], args.id));
    }
    let annotations = json
        .as_object_mut()
        .context("the spec is no object")?
        .entry("annotations")
        .or_insert_with(|| json!({}));
    let annotations = annotations
        .as_object_mut()
        .context("the annotations are no object")?;
    for key in [
        "warm-start",
        "warm-when",
        "warm-ignore-env",
        "restore-force",
    ] {
        annotations.remove(&format!("{PREFIX}{key}"));
    }
    annotations.insert(format!("{PREFIX}restore-from"), json!(image));
    annotations.insert(format!("{PREFIX}restore-policy"), json!("Required"));
    if args.force {
        annotations.insert(format!("{PREFIX}restore-force"), json!("host"));
    }
    spec.value = serde_json::to_vec(&json)?;
    Ok(like)
}

/// Makes the container, on what `layer` lies on, and starts it; its pid. What was made before a failure is taken back.
async fn make(
    containerd: &Containerd,
    namespace: &str,
    record: v1::Container,
    layer: &str,
    log: Option<String>,
) -> anyhow::Result<u32> {
    let id = record.id.clone();
    let (snapshotter, snapshot) = (record.snapshotter.clone(), record.snapshot_key.clone());
    let cloned = containerd.clone_layer(namespace, &snapshotter, layer, &snapshot);
    let mounts = cloned.await?;
    let made = async {
        containerd.register(namespace, record).await?;
        let started = async {
            let released = containerd.release_layer(namespace, &snapshotter, &snapshot);
            released.await?;
            containerd.create_task(namespace, &id, mounts, log).await?;
            let started = async {
                let pid = containerd.start_task(namespace, &id).await?;
                match shim::of(pid).await {
                    Shim::Foreign => Err(Failure::Refused(format!(
                        "container {id}: its shim is not rekindle's, so it started from zero; the container that it is like needs --runtime io.containerd.rekindle.v1"
                    ))
                    .into()),
                    Shim::Ours | Shim::Unknown => Ok(pid),
                }
            };
            let started = started.await;
            if started.is_err() {
                containerd.end_task(namespace, &id).await;
            }
            started
        };
        let started = started.await;
        if started.is_err() {
            containerd.forget(namespace, &id).await;
        }
        started
    };
    let made = made.await;
    if made.is_err() {
        containerd
            .remove_layer(namespace, &snapshotter, &snapshot)
            .await;
    }
    made
}
