//! Many at once.

use crate::Stage;
use anyhow::{Result, ensure};
use futures::future::try_join_all;
use rekindle_harness::container::State;

pub(crate) async fn fifty_execs_at_once_end_each_with_its_own_status(stage: &Stage) -> Result<()> {
    let task = stage.container("crowd").shell("sleep 1000").run().await?;
    let exec = async |number: u32| -> Result<()> {
        let (id, line) = (
            format!("exec-{number}"),
            format!("echo {number}; exit {number}"),
        );
        let exec = task.exec(&id, &["sh", "-c", &line]).run().await?;
        ensure!(
            exec.wait().await?.status == number,
            "{id} has another's status"
        );
        ensure!(
            exec.delete().await?.status == number,
            "{id} has another's status"
        );
        ensure!(exec.io().out()?.text().await?.trim() == number.to_string());
        Ok(())
    };
    try_join_all((1..=50).map(exec)).await?;
    assert_eq!(task.state().await?, State::Running);
    assert_eq!(task.pids().await?.len(), 1);
    task.remove().await
}

/// The shim of a pod has them all.
pub(crate) async fn thirty_containers_of_a_pod_come_and_go_at_once(stage: &Stage) -> Result<()> {
    let one = async |number: u32| -> Result<()> {
        let id = format!("crowded-{number}");
        let line = format!("exit {number}");
        let task = stage
            .container(&id)
            .annotation("io.kubernetes.cri.sandbox-id", "crowded-0")
            .shell(&line)
            .create()
            .await?;
        task.start().await?;
        ensure!(
            task.wait().await?.status == number,
            "{id} has another's status"
        );
        ensure!(
            task.delete().await?.status == number,
            "{id} has another's status"
        );
        task.remove().await
    };
    let first = stage
        .container("crowded-0")
        .annotation("io.kubernetes.cri.sandbox-id", "crowded-0")
        .shell("sleep 1000")
        .run()
        .await?;
    try_join_all((1..=30).map(one)).await?;
    assert_eq!(first.state().await?, State::Running);
    first.remove().await
}
