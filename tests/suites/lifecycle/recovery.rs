//! containerd and the shim die; what they promised stays true.

use crate::{Stage, code, process::is_gone};
use anyhow::{Context, Result};
use containerd_client::tonic::Code;
use rekindle_harness::container::State;
use rekindle_harness::{Node, NodeConfig, Runtime, images, poll};
use tokio::net::UnixListener;

/// The tests of this module stop containerd, so each has a node of its own.
pub(crate) async fn own_stage(of: &Stage) -> Result<Stage> {
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
    reaped(stage, pid).await?;
    stage.node.start_containerd().await?;
    let task = task.reconnected().await?;
    if task.state().await.is_ok() {
        assert_eq!(task.delete().await?.status, 11);
    }
    is_gone(stage, "meanwhile").await?;
    task.remove().await
}

/// Waits until a process, by its pid in the node, was reaped.
async fn reaped(stage: &Stage, pid: u32) -> Result<()> {
    let gone = format!("! kill -0 {pid} 2>/dev/null");
    poll::until("the end of a process", async || {
        let answer = stage.node.exec(["sh", "-c", &gone]).await?;
        Ok(answer.status.success().then_some(()))
    })
    .await
}

/// Takes in so many attempts, and hangs up, that a shim waits for ten seconds before the next.
async fn in_vain(listener: UnixListener) -> Result<()> {
    for _ in 0..3 {
        let attempt = tokio::time::timeout(*poll::DEADLINE, listener.accept());
        attempt.await.context("the shim does not try again")??;
    }
    Ok(())
}

/// The shim that containerd ships tries five times, and keeps no order.
pub(crate) async fn events_wait_for_containerd_in_their_order(stage: &Stage) -> Result<()> {
    if stage.node.runtime() == Runtime::Go {
        return Ok(());
    }
    let stage = &own_stage(stage).await?;
    let events = stage.node.events().await?;
    let task = stage.container("patient").shell("sleep 1000").run().await?;
    let mut processes = Vec::new();
    for (id, status) in [("one", 21), ("two", 22), ("three", 23)] {
        let line = format!("read line; exit {status}");
        let exec = task.exec(id, &["sh", "-c", &line]).stdin().run().await?;
        processes.push((exec.process().await?.pid, exec.io().clone()));
    }
    events.until("patient", "TaskExecStarted").await?;
    stage.node.kill_containerd().await?;
    let listener = stage.node.in_place_of_containerd()?;
    for (pid, io) in processes {
        io.writer()?.write("go\n")?;
        reaped(stage, pid).await?;
    }
    // That is time to listen before it tries again.
    in_vain(listener).await?;
    stage.node.start_containerd().await?;
    let events = stage.node.events().await?;
    let task = task.reconnected().await?;
    let exits = events
        .until_all("patient", 3)
        .await?
        .into_iter()
        .map(|event| (event.name, event.process, event.status));
    let exit = |id: &str, status| ("TaskExit".to_owned(), id.to_owned(), status);
    assert_eq!(
        exits.collect::<Vec<_>>(),
        [exit("one", 21), exit("two", 22), exit("three", 23)]
    );
    // Nothing comes twice, and what happens now comes after it.
    task.kill(9).await?;
    let all = events.until_exit("patient").await?;
    assert_eq!(all.len(), 4, "{all:?}");
    assert_eq!((all[3].process.as_str(), all[3].status), ("patient", 137));
    task.remove().await
}

/// containerd cleans such a container up while it starts, and ends its shim, before it takes in events.
pub(crate) async fn the_exit_of_a_container_waits_for_containerd(stage: &Stage) -> Result<()> {
    if stage.node.runtime() == Runtime::Go {
        return Ok(());
    }
    let mut config = NodeConfig::new(stage.node.runtime())?;
    // It then notes the events that it takes in: who subscribes comes too late for this one.
    config.log_level = "trace";
    let node = Node::start(config).await?;
    let busybox = images::busybox()?;
    node.import(&busybox).await?;
    let stage = &Stage { node, busybox };
    let events = stage.node.events().await?;
    let line = "read line; exit 11";
    let task = stage.container("unheard").stdin().shell(line).run().await?;
    let pid = task.process().await?.pid;
    events.until("unheard", "TaskStart").await?;
    stage.node.kill_containerd().await?;
    let told = |log: String| -> Vec<String> {
        let taken = log.lines().filter(|line| line.contains("event forwarded"));
        let topics = taken.filter_map(|line| line.split("topic=").nth(1)?.split(' ').next());
        topics.map(str::to_owned).collect()
    };
    let before = told(stage.node.log_tail(usize::MAX)).len();
    let listener = stage.node.in_place_of_containerd()?;
    task.io().writer()?.write("go\n")?;
    reaped(stage, pid).await?;
    in_vain(listener).await?;
    stage.node.start_containerd().await?;
    // The shim's end too: what it has not told by then nobody will hear.
    stage.node.is_rid_of("unheard").await?;
    let since = told(stage.node.log_tail(usize::MAX)).split_off(before);
    assert_eq!(since, ["/tasks/exit", "/tasks/delete"]);
    task.reconnected().await?.remove().await
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
