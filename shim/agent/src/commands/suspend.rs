//! `rekindle suspend` and `rekindle resume`: a container stands still, with all of its memory, and goes on.

use std::{path::PathBuf, process::ExitCode};

use clap::Args;
use rekindle_checkpoint::gpu;
use serde::Serialize;

use crate::{
    containerd::{self, Containerd, select::Container},
    exit::Failure,
    output,
};

const SUSPEND_EXAMPLES: &str = "\
Examples:
  rekindle suspend demo                         a container of ctr, by id
  rekindle suspend team-a/web-0/server          a pod's container, by name
  rekindle resume team-a/web-0/server

None of its processes runs until it is resumed, and its memory stays where it is. A kubelet's probe that asks it
is not answered meanwhile: one for liveness has it restarted. One that stands still already is no failure. A
container with GPU devices is refused, for this build cannot free what it holds of the GPU's memory.

Exit codes: 0 done, 1 failed, 2 wrong usage, 3 refused, 4 no such container.";

const RESUME_EXAMPLES: &str = "\
Examples:
  rekindle resume demo
  rekindle resume team-a/web-0/server --json

One that runs already is no failure.

Exit codes: 0 done, 1 failed, 2 wrong usage, 3 refused, 4 no such container.";

#[derive(Debug, Args)]
#[command(after_help = SUSPEND_EXAMPLES)]
pub(crate) struct SuspendArgs {
    #[command(flatten)]
    which: Which,
}

#[derive(Debug, Args)]
#[command(after_help = RESUME_EXAMPLES)]
pub(crate) struct ResumeArgs {
    #[command(flatten)]
    which: Which,
}

#[derive(Debug, Args)]
struct Which {
    /// The container: its id, the beginning of its id, or [NAMESPACE/]POD/CONTAINER.
    container: String,
    /// containerd's namespace [default: k8s.io, then default].
    #[arg(short = 'n', long, value_name = "NS")]
    containerd_namespace: Option<String>,
    /// containerd's socket.
    #[arg(long, default_value = containerd::ADDRESS)]
    address: PathBuf,
    /// Print one line of JSON.
    #[arg(long)]
    json: bool,
}

/// What a container is to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum Wanted {
    Suspended,
    Running,
}

/// What is printed.
#[derive(Debug, Serialize)]
struct Answer {
    container: String,
    containerd_namespace: String,
    state: Wanted,
    /// It was so before.
    already: bool,
}

pub(crate) async fn suspend(args: SuspendArgs) -> anyhow::Result<ExitCode> {
    told(&args.which, Wanted::Suspended).await
}

pub(crate) async fn resume(args: ResumeArgs) -> anyhow::Result<ExitCode> {
    told(&args.which, Wanted::Running).await
}

async fn told(which: &Which, wanted: Wanted) -> anyhow::Result<ExitCode> {
    let containerd = Containerd::connect(&which.address).await?;
    let answer = change(&containerd, which, wanted).await?;
    if which.json {
        output::json(&answer)?;
        return Ok(ExitCode::SUCCESS);
    }
    let state = match (wanted, answer.already) {
        (Wanted::Suspended, false) => "suspended",
        (Wanted::Suspended, true) => "suspended already",
        (Wanted::Running, false) => "running again",
        (Wanted::Running, true) => "running already",
    };
    output::line(format!("{} is {state}", answer.container));
    Ok(ExitCode::SUCCESS)
}

async fn change(containerd: &Containerd, which: &Which, wanted: Wanted) -> anyhow::Result<Answer> {
    let doing = match wanted {
        Wanted::Suspended => "suspended",
        Wanted::Running => "resumed",
    };
    let namespace = which.containerd_namespace.as_deref();
    let find = || containerd.find(&which.container, namespace, doing);
    let container = find().await?;
    let already = |container: &Container| container.state.paused == (wanted == Wanted::Suspended);
    let answer = |container: Container, already| Answer {
        container: container.id,
        containerd_namespace: container.namespace,
        state: wanted,
        already,
    };
    if already(&container) {
        return Ok(answer(container, true));
    }
    let changed = match wanted {
        Wanted::Suspended => {
            refuse_gpus(containerd, &container).await?;
            containerd.pause(&container).await
        }
        Wanted::Running => containerd.resume(&container).await,
    };
    match changed {
        Ok(()) => Ok(answer(container, false)),
        // Somebody else has done it meanwhile.
        Err(error) => match find().await {
            Ok(now) if now.id == container.id && already(&now) => Ok(answer(now, true)),
            _ => Err(error),
        },
    }
}

/// It would stand still, and what it holds of the GPU's memory would be nobody else's.
async fn refuse_gpus(containerd: &Containerd, container: &Container) -> anyhow::Result<()> {
    let id = &container.id;
    let record = containerd.record(&container.namespace, id).await?;
    let spec = record.spec.unwrap_or_default();
    let mut gpus = serde_json::from_slice(&spec.value)
        .map(|spec| gpu::of_spec(&spec))
        .unwrap_or_default();
    if gpus.is_empty() {
        gpus = gpu::of_process(container.state.pid.cast_signed());
    }
    if gpus.is_empty() {
        return Ok(());
    }
    Err(Failure::Refused(format!(
        "cannot suspend container {id}: it has GPU devices ({}), and this build cannot free the GPU memory that it holds",
        gpus.join(", ")
    ))
    .into())
}
