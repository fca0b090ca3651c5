//! The ends of processes that nobody waits for yet, or that nobody knows.

use crate::{Stage, process::is_gone};
use anyhow::{Context, Result};
use rekindle_harness::container::State;
use rekindle_harness::poll;

pub(crate) async fn an_exit_is_kept_until_somebody_asks(stage: &Stage) -> Result<()> {
    let task = stage.container("unasked").shell("sleep 1000").run().await?;
    let mut execs = Vec::new();
    for status in 1..=12 {
        let line = format!("exit {status}");
        let exec = task.exec(&format!("exec-{status}"), &["sh", "-c", &line]);
        execs.push((exec.run().await?, status));
    }
    for (exec, _) in &execs {
        poll::until("the end of an exec", async || {
            Ok((exec.state().await? == State::Stopped).then_some(()))
        })
        .await?;
    }
    for (exec, status) in &execs {
        assert_eq!(exec.wait().await?.status, *status);
        assert_eq!(exec.delete().await?.status, *status);
    }
    task.remove().await
}

/// As in a pod with `shareProcessNamespace`: the kernel ends nobody with such an init.
pub(crate) async fn with_an_init_in_anothers_pid_namespace_all_end(stage: &Stage) -> Result<()> {
    let pod = stage.container("pids-pod").shell("sleep 1000").run();
    let pod = pod.await?;
    let events = stage.node.events().await?;
    let task = stage
        .container("pids-guest")
        .pids_of(pod.process().await?.pid);
    let task = task.shell("sleep 1000 & exec sleep 1000").run().await?;
    let rider = task.exec("rider", &["sleep", "1000"]).run().await?;
    assert_eq!(task.pids().await?.len(), 3);
    task.kill(9).await?;
    assert_eq!(task.wait().await?.status, 137);
    assert_eq!(rider.wait().await?.status, 137);
    let told = events.until_exit("pids-guest").await?;
    let exits = told.iter().filter(|event| event.name == "TaskExit");
    let exits: Vec<_> = exits.map(|event| event.process.as_str()).collect();
    assert_eq!(exits, ["rider", "pids-guest"]);
    task.delete().await?;
    is_gone(stage, "pids-guest").await?;
    assert_eq!(pod.state().await?, State::Running);
    task.remove().await?;
    pod.remove().await
}

/// Without a PID namespace of its own, a container's orphans come to the shim.
pub(crate) async fn an_orphan_is_adopted_and_reaped(stage: &Stage) -> Result<()> {
    let line = "sh -c 'sleep 1000 & echo $!'; sleep 1000";
    let task = stage.container("strays").shell(line).change_spec(|spec| {
        if let Some(namespaces) = spec["linux"]["namespaces"].as_array_mut() {
            namespaces.retain(|namespace| namespace["type"] != "pid");
        }
    });
    let task = task.run().await?;
    let out = task.io().out()?;
    let orphan = out.until("its pid", |text| text.ends_with('\n')).await?;
    let orphan = orphan.trim();
    let parent = format!("awk '/^PPid/ {{print $2}}' /proc/{orphan}/status");
    let shim = stage.node.pid_inside(stage.node.shim_of("strays")?.0)?;
    poll::until("the shim to adopt the orphan", async || {
        let parent = stage.node.run(["sh", "-c", &parent]).await?;
        Ok((parent.trim().parse() == Ok(shim)).then_some(()))
    })
    .await?;
    stage.node.run(["kill", "-9", orphan]).await?;
    // A zombie would still have its folder.
    let gone = format!("! test -e /proc/{orphan}");
    poll::until("the orphan to be reaped", async || {
        let answer = stage.node.exec(["sh", "-c", &gone]).await?;
        Ok(answer.status.success().then_some(()))
    })
    .await
    .context("it stays a zombie")?;
    assert_eq!(task.state().await?, State::Running);
    task.remove().await
}
