//! Creations whose caller is gone before they are done.

use crate::{Stage, code, process::is_gone};
use anyhow::{Result, ensure};
use containerd_client::tonic::Code;
use nix::sys::signal::{Signal, kill};
use rekindle_harness::container::State;
use rekindle_harness::{Runtime, poll};
use std::time::Duration;

/// What puts containers into one shim.
const GROUP: &str = "io.kubernetes.cri.sandbox-id";
/// Long enough that runc is there when it is over; were it not, the test would show the same.
const LIMIT: Duration = Duration::from_secs(3);

pub(crate) async fn a_create_past_its_deadline_is_taken_back(stage: &Stage) -> Result<()> {
    // The shim that containerd ships leaves it running.
    if stage.node.runtime() == Runtime::Go {
        return Ok(());
    }
    let task = stage.container("too-late").shell("sleep 1000");
    let held = stage
        .node
        .catch(&["runc ", " create ", "too-late"], Signal::SIGSTOP);
    let (given_up, held) = tokio::join!(
        task.prepare().await?.create_within(poll::patient(LIMIT)),
        held
    );
    let ((task, given_up), held) = (given_up?, held?);
    ensure!(
        [Code::DeadlineExceeded, Code::Cancelled].contains(&given_up.code()),
        "it was refused, and not given up: {given_up}"
    );
    kill(held, Signal::SIGCONT)?;
    stage.node.is_rid_of("too-late").await?;
    is_gone(stage, "too-late").await?;
    assert_eq!(code(task.state().await), Code::NotFound);
    task.remove().await
}

/// Without a deadline the shim is not told of it, and its answer goes nowhere.
pub(crate) async fn a_create_whose_caller_went_away_is_taken_back(stage: &Stage) -> Result<()> {
    if stage.node.runtime() == Runtime::Go {
        return Ok(());
    }
    let of_one_shim = |id: &str| stage.container(id).annotation(GROUP, "left-beside");
    let beside = of_one_shim("left-beside").shell("sleep 1000").run().await?;
    let mut held = None;
    let gone = async {
        held = Some(
            stage
                .node
                .catch(&["runc ", " create ", "left-alone"], Signal::SIGSTOP)
                .await?,
        );
        Ok(())
    };
    let task = of_one_shim("left-alone")
        .shell("sleep 1000")
        .prepare()
        .await?;
    let task = task.create_until(gone).await?;
    // containerd has noticed when it does not know the task any more.
    poll::until("containerd to forget the task", async || {
        Ok((code(task.state().await) == Code::NotFound).then_some(()))
    })
    .await?;
    if let Some(held) = held {
        kill(held, Signal::SIGCONT)?;
    }
    stage.node.is_rid_of("left-alone").await?;
    is_gone(stage, "left-alone").await?;
    assert_eq!(beside.state().await?, State::Running);
    task.remove().await?;
    beside.remove().await
}
