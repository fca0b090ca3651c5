//! Kills for want of memory.

use crate::Stage;
use anyhow::Result;
use rekindle_harness::Runtime;

const LIMIT: u64 = 16 << 20;

pub(crate) async fn a_kill_for_want_of_memory_is_told_while_the_task_runs(
    stage: &Stage,
) -> Result<()> {
    let events = stage.node.events().await?;
    let task = stage
        .container("oom-child")
        .memory_limit(LIMIT)
        .shell("dd if=/dev/zero of=/dev/null bs=64M count=1; while :; do sleep 1; done")
        .run()
        .await?;
    let got = events.until("oom-child", "TaskOOM").await?;
    assert!(got.iter().all(|event| event.name != "TaskExit"), "{got:?}");
    task.remove().await
}

pub(crate) async fn an_end_for_want_of_memory_is_told_with_its_reason(stage: &Stage) -> Result<()> {
    let events = stage.node.events().await?;
    let task = stage
        .container("oom-init")
        .memory_limit(LIMIT)
        .shell("exec dd if=/dev/zero of=/dev/null bs=64M count=1")
        .run()
        .await?;
    let got = match stage.node.runtime() {
        // On version 1 of cgroups it promises no order.
        Runtime::Go => events.until("oom-init", "TaskOOM").await?,
        Runtime::Rekindle => events.until_exit("oom-init").await?,
    };
    assert_eq!(
        got.iter().filter(|event| event.name == "TaskOOM").count(),
        1
    );
    task.remove().await?;
    let kills = events.of("oom-init");
    assert_eq!(
        kills.iter().filter(|event| event.name == "TaskOOM").count(),
        1
    );
    Ok(())
}
