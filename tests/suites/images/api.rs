//! What the API of a node's agent does with containers.

use crate::stage::{Stage, continues, counts_to};
use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;
use rekindle_harness::poll;
use std::process::Stdio;

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

pub(crate) async fn a_checkpoint_is_made_by_a_call(stage: &Stage) -> Result<()> {
    let command = stage.node.command(&["rekindle", "agent"]);
    let _agent = tokio::process::Command::from(command)
        .stderr(Stdio::null())
        .kill_on_drop(true)
        .spawn()?;
    let address = format!("unix://{}", stage.node.path(SOCKET).display());
    let client = poll::until("the agent to serve", async || {
        Ok(ttrpc::r#async::Client::connect(&address).await.ok())
    })
    .await?;
    let client = agent_ttrpc::AgentClient::new(client);
    let (task, before) = stage.lived_in("called").await?;
    let mut request = agent::CheckpointRequest::new();
    (request.container, request.name) = ("called".to_owned(), "called".to_owned());
    let made = client.checkpoint(within(), &request).await?;
    assert_eq!(made.image, "default/called@1");
    ensure!(made.json.contains("\"exited\":false"), "{}", made.json);
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
    let refused = client.checkpoint(within(), &request).await;
    let Err(ttrpc::Error::RpcStatus(status)) = refused else {
        anyhow::bail!("{refused:?}");
    };
    assert_eq!(status.code(), ttrpc::Code::NOT_FOUND, "{}", status.message);
    task.remove().await?;
    // What entered the node for it is not it.
    stage
        .node
        .catch(&["rekindle agent"], Signal::SIGKILL)
        .await?;
    Ok(())
}
