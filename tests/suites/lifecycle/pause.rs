//! Frozen and thawed.

use crate::{Stage, code};
use anyhow::Result;
use containerd_client::tonic::Code;
use rekindle_harness::container::State;
use std::time::Duration;

pub(crate) async fn a_paused_task_stands_still_and_goes_on(stage: &Stage) -> Result<()> {
    let task = stage.container("still").args(&["/counter"]).run().await?;
    let out = task.io().out()?;
    out.until("a first line", |text| !text.is_empty()).await?;
    task.pause().await?;
    assert_eq!(task.state().await?, State::Paused);
    // What was written before the freeze may still be on its way; five periods later nothing may follow.
    let period = Duration::from_millis(250);
    tokio::time::sleep(period).await;
    let before = out.so_far();
    tokio::time::sleep(period).await;
    assert_eq!(out.so_far(), before);
    task.resume().await?;
    assert_eq!(task.state().await?, State::Running);
    out.until("the next line", |text| text.len() > before.len())
        .await?;
    task.remove().await
}

pub(crate) async fn wait_on_a_paused_task_waits(stage: &Stage) -> Result<()> {
    let task = stage
        .container("wait-paused")
        .shell("trap 'exit 8' TERM; echo ready; while :; do sleep 0.05; done")
        .run()
        .await?;
    // runc answers a start when its own process is about to become the shell.
    let ready = task.io().out()?;
    ready
        .until("its word", |text| text.contains("ready"))
        .await?;
    task.pause().await?;
    let early = tokio::time::timeout(Duration::from_millis(300), task.wait()).await;
    assert!(early.is_err(), "wait answered {early:?} for a paused task");
    task.kill(15).await?;
    let (ended, resumed) = tokio::join!(task.wait(), task.resume());
    resumed?;
    assert_eq!(ended?.status, 8);
    task.remove().await
}

pub(crate) async fn sigkill_ends_a_paused_task(stage: &Stage) -> Result<()> {
    let task = stage
        .container("kill-paused")
        .shell("sleep 1000")
        .run()
        .await?;
    task.pause().await?;
    task.kill(9).await?;
    assert_eq!(task.wait().await?.status, 137);
    task.reaches(State::Stopped).await?;
    task.delete().await?;
    crate::process::is_gone(stage, "kill-paused").await?;
    task.remove().await
}

pub(crate) async fn what_a_state_does_not_allow_is_refused(stage: &Stage) -> Result<()> {
    let task = stage
        .container("refusals")
        .shell("sleep 1000")
        .create()
        .await?;
    assert_eq!(code(task.pause().await), Code::Unknown);
    assert_eq!(code(task.resume().await), Code::Unknown);
    task.start().await?;
    assert_eq!(code(task.resume().await), Code::Unknown);
    task.pause().await?;
    assert_eq!(code(task.pause().await), Code::Unknown);
    assert_eq!(code(task.start().await), Code::Unknown);
    assert_eq!(code(task.delete().await), Code::Unknown);
    let (_exec, added) = task.exec("frozen", &["true"]).try_add().await?;
    assert_eq!(code(added), Code::Unknown);
    assert_eq!(task.state().await?, State::Paused);
    task.resume().await?;
    task.kill(9).await?;
    task.wait().await?;
    assert_eq!(code(task.pause().await), Code::Unknown);
    assert_eq!(code(task.resume().await), Code::Unknown);
    assert_eq!(code(task.start().await), Code::Unknown);
    task.remove().await
}
