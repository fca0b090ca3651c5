//! What the API of a node's agent does with containers.

use crate::stage::{Stage, continues, counts_to};
use crate::unmade::with_gpu;
use agent::event::Kind;
use agent_ttrpc::AgentClient;
use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::Signal;
use rekindle_core::step::CheckpointStep;
use rekindle_harness::poll;
use std::process::Stdio;
use std::time::Duration;
use tokio::process::Child;

#[rustfmt::skip]
#[allow(warnings, clippy::all, reason = "generated")]
#[path = "../../../shim/agent/src/api/agent.rs"]
mod agent;
#[rustfmt::skip]
#[allow(warnings, clippy::all, reason = "generated")]
#[path = "../../../shim/agent/src/api/agent_ttrpc.rs"]
mod agent_ttrpc;

const SOCKET: &str = "/run/rekindle/agent.sock";

/// For a call that takes as long as a checkpoint may.
fn within() -> ttrpc::context::Context {
    ttrpc::context::with_timeout(120_000_000_000)
}

/// The node's agent, and a client of it.
async fn serving(stage: &Stage) -> Result<(Child, AgentClient)> {
    let command = stage.node.command(&["rekindle", "agent"]);
    let agent = tokio::process::Command::from(command)
        .stderr(Stdio::null())
        .kill_on_drop(true)
        .spawn()?;
    let address = format!("unix://{}", stage.node.path(SOCKET).display());
    let client = poll::until("the agent to serve", async || {
        Ok(ttrpc::r#async::Client::connect(&address).await.ok())
    })
    .await?;
    Ok((agent, AgentClient::new(client)))
}

/// Ends it: what entered the node for it is not it.
async fn ends(stage: &Stage) -> Result<()> {
    let agent = stage.node.catch(&["rekindle agent"], Signal::SIGKILL);
    agent.await.map(drop)
}

/// Waits for an event; what came before it.
async fn until(
    watching: &mut ttrpc::r#async::ClientStreamReceiver<agent::Event>,
    wanted: Kind,
) -> Result<(Vec<agent::Event>, agent::Event)> {
    let mut before = Vec::new();
    loop {
        let next = tokio::time::timeout(poll::patient(Duration::from_secs(60)), watching.recv());
        let event = next
            .await
            .with_context(|| format!("waiting for {wanted:?} after {before:?}"))??
            .context("the stream has ended")?;
        if event.kind.enum_value() == Ok(wanted) {
            return Ok((before, event));
        }
        before.push(event);
    }
}

fn refusal<T: std::fmt::Debug>(answer: ttrpc::Result<T>) -> Result<(ttrpc::Code, String)> {
    match answer {
        Err(ttrpc::Error::RpcStatus(status)) => Ok((status.code(), status.message)),
        other => bail!("{other:?}"),
    }
}

pub(crate) async fn a_checkpoint_is_made_by_a_call(stage: &Stage) -> Result<()> {
    let (_agent, client) = serving(stage).await?;
    let watch = agent::WatchRequest::new();
    let watching = client.watch(ttrpc::context::Context::default(), &watch);
    let mut watching = watching.await?;
    let (task, before) = stage.lived_in("called").await?;
    let mut request = agent::CheckpointRequest::new();
    (request.container, request.name) = ("called".to_owned(), "called".to_owned());
    let made = client.checkpoint(within(), &request).await?;
    assert_eq!(made.image, "default/called@1");
    ensure!(made.json.contains("\"exited\":false"), "{}", made.json);
    // Each of its steps was told, in their order, and how much there was.
    let (heard, event) = until(&mut watching, Kind::CHECKPOINTED).await?;
    let of_it = |event: &&agent::Event| {
        event.kind.enum_value() == Ok(Kind::CHECKPOINTING) && event.container == "called"
    };
    let heard: Vec<_> = heard.iter().filter(of_it).collect();
    let mut steps: Vec<&str> = heard.iter().map(|event| event.step.as_str()).collect();
    steps.dedup();
    let all = [
        CheckpointStep::Begin,
        CheckpointStep::Precopy,
        CheckpointStep::Hold,
        CheckpointStep::Dump,
        CheckpointStep::Release,
        CheckpointStep::Seal,
    ];
    assert_eq!(steps, all.map(CheckpointStep::name));
    assert_eq!(
        (event.image.as_str(), event.container.as_str()),
        ("default/called@1", "called")
    );
    ensure!(event.total > 0, "{event:?}");
    let at = counts_to(task.io().out()?, before.n).await?;
    let mut images = agent::ImagesRequest::new();
    images.namespace = "default".to_owned();
    let images = client.images(within(), &images).await?.images;
    let found = images.iter().find(|image| image.name == "called");
    ensure!(
        found.context("it is not there")?.generation == 1,
        "{images:?}"
    );
    let warm = stage.warm("called-2", "called").run().await?;
    continues(&warm, &before, at.n).await?;
    warm.remove().await?;

    request.exit = true;
    assert_eq!(
        client.checkpoint(within(), &request).await?.image,
        "default/called@2"
    );
    task.wait().await?;
    request.container = "never-run".to_owned();
    let (code, said) = refusal(client.checkpoint(within(), &request).await)?;
    assert_eq!(code, ttrpc::Code::NOT_FOUND, "{said}");
    let (_, failed) = until(&mut watching, Kind::FAILED).await?;
    assert_eq!(
        (failed.container.as_str(), &failed.message),
        ("never-run", &said)
    );
    task.remove().await?;
    ends(stage).await
}

pub(crate) async fn a_container_is_suspended_resumed_and_restored_by_calls(
    stage: &Stage,
) -> Result<()> {
    let (_agent, client) = serving(stage).await?;
    let watch = agent::WatchRequest::new();
    let watching = client.watch(ttrpc::context::Context::default(), &watch);
    let mut watching = watching.await?;
    let (task, _) = stage.lived_in("standing").await?;
    let mut suspend = agent::SuspendRequest::new();
    suspend.container = "standing".to_owned();
    let suspended = client.suspend(within(), &suspend).await?;
    assert_eq!(
        (suspended.container.as_str(), suspended.already),
        ("standing", false)
    );
    let (_, event) = until(&mut watching, Kind::SUSPENDED).await?;
    assert_eq!(event.container, "standing");
    let still = task.io().out()?.so_far();
    tokio::time::sleep(Duration::from_millis(500)).await;
    assert_eq!(task.io().out()?.so_far(), still);
    ensure!(client.suspend(within(), &suspend).await?.already);
    stage.checkpoint("standing", "standing", &[]).await?;
    let mut resume = agent::ResumeRequest::new();
    resume.container = "standing".to_owned();
    ensure!(!client.resume(within(), &resume).await?.already);
    ensure!(client.resume(within(), &resume).await?.already);
    let at = rekindle_harness::Count::last(&still).context("it has not counted")?;
    counts_to(task.io().out()?, at.n + 3).await?;
    until(&mut watching, Kind::RESUMED).await?;

    let mut restore = agent::RestoreRequest::new();
    (restore.image, restore.id) = ("standing".to_owned(), "standing-2".to_owned());
    restore.like = "standing".to_owned();
    let restored = client.restore(within(), &restore).await?;
    assert_eq!(restored.image, "default/standing@1");
    ensure!(restored.pid > 0, "{restored:?}");
    let (_, event) = until(&mut watching, Kind::RESTORED).await?;
    assert_eq!(
        (event.container.as_str(), event.image.as_str()),
        ("standing-2", "default/standing@1")
    );
    // Its writable layer is that of the image.
    let cat = [
        "ctr",
        "task",
        "exec",
        "--exec-id",
        "cat",
        "standing-2",
        "cat",
        "/root/note",
    ];
    assert_eq!(stage.node.run(cat).await?.trim_end(), "kept");
    let (code, said) = refusal(client.restore(within(), &restore).await)?;
    assert_eq!(code, ttrpc::Code::FAILED_PRECONDITION, "{said}");
    stage
        .node
        .run(["ctr", "task", "rm", "-f", "standing-2"])
        .await?;
    stage
        .node
        .run(["ctr", "container", "rm", "standing-2"])
        .await?;
    task.remove().await?;

    let gpu = with_gpu(stage.container("standing-gpu").args(&["/counter"]));
    let gpu = gpu.run().await?;
    suspend.container = "standing-gpu".to_owned();
    let (code, said) = refusal(client.suspend(within(), &suspend).await)?;
    assert_eq!(code, ttrpc::Code::FAILED_PRECONDITION, "{said}");
    gpu.remove().await?;
    ends(stage).await
}
