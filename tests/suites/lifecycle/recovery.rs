//! containerd and the shim die; what they promised stays true.

use crate::{Stage, code, process::is_gone};
use anyhow::{Context, Result};
use containerd_client::tonic::Code;
use rekindle_harness::container::State;
use rekindle_harness::{Node, NodeConfig, images, poll};

/// The tests of this module stop containerd, so each has a node of its own.
async fn own_stage(of: &Stage) -> Result<Stage> {
    let node = Node::start(NodeConfig::new(of.node.runtime())?).await?;
    let busybox = images::busybox()?;
    node.import(&busybox).await?;
    Ok(Stage { node, busybox })
}

pub(crate) async fn containers_are_found_again_after_a_restart_of_containerd(
    stage: &Stage,
) -> Result<()> {
    let stage = &own_stage(stage).await?;
    let task = stage
        .container("survivor")
        .stdin()
        .shell("read line; echo got $line; exit 6")
        .run()
        .await?;
    let paused = stage.container("paused").shell("sleep 1000").run().await?;
    paused.pause().await?;
    let (pid, shim) = (task.process().await?.pid, stage.node.shim_of("survivor")?);
    stage.node.restart_containerd().await?;

    let task = task.reconnected().await?;
    let paused = paused.reconnected().await?;
    let process = task.process().await?;
    assert_eq!((process.status(), process.pid), (State::Running, pid));
    assert_eq!(stage.node.shim_of("survivor")?, shim);
    assert_eq!(paused.state().await?, State::Paused);
    let exec = task
        .exec("after", &["sh", "-c", "echo works"])
        .run()
        .await?;
    assert_eq!(exec.io().out()?.text().await?, "works\n");
    let events = stage.node.events().await?;
    task.io().writer()?.write("on\n")?;
    assert_eq!(task.wait().await?.status, 6);
    assert_eq!(task.io().out()?.text().await?, "got on\n");
    events.until("survivor", "TaskExit").await?;
    task.delete().await?;
    is_gone(stage, "survivor").await?;
    paused.remove().await
}

/// containerd takes a shim without a process for one that leaked and cleans it up, exit status and all.
pub(crate) async fn an_exit_during_the_restart_leaves_nothing(stage: &Stage) -> Result<()> {
    let stage = &own_stage(stage).await?;
    let task = stage
        .container("meanwhile")
        .stdin()
        .shell("read line; exit 11")
        .run()
        .await?;
    let pid = task.process().await?.pid;
    stage.node.stop_containerd().await?;
    task.io().writer()?.write("go\n")?;
    poll::until("the end of the container's process", async || {
        Ok(stage
            .node
            .processes()?
            .iter()
            .all(|(other, line)| *other != pid || line.is_empty())
            .then_some(()))
    })
    .await?;
    stage.node.start_containerd().await?;
    let task = task.reconnected().await?;
    if task.state().await.is_ok() {
        assert_eq!(task.delete().await?.status, 11);
    }
    is_gone(stage, "meanwhile").await?;
    task.remove().await
}

pub(crate) async fn a_killed_shim_leaves_nothing(stage: &Stage) -> Result<()> {
    let events = stage.node.events().await?;
    let task = stage
        .container("orphan")
        .shell("sleep 1000 & sleep 1000 & wait")
        .run()
        .await?;
    let (shim, _) = stage.node.shim_of("orphan")?;
    let shim = nix::unistd::Pid::from_raw(shim.try_into().context("a pid beyond i32")?);
    nix::sys::signal::kill(shim, nix::sys::signal::Signal::SIGKILL)?;
    events.until("orphan", "TaskExit").await?;
    events.until("orphan", "TaskDelete").await?;
    poll::until("the task to be gone", async || {
        Ok((code(task.state().await) == Code::NotFound).then_some(()))
    })
    .await?;
    is_gone(stage, "orphan").await?;
    task.remove().await
}
