//! What is missing or wrong around a container: refused with its name, and nothing stays.

use crate::{Stage, process::is_gone};
use anyhow::{Context, Result};
use rekindle_harness::Runtime;
use rekindle_harness::container::State;
use rekindle_harness::options::CheckpointOptions;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::time::{Duration, Instant};

pub(crate) async fn a_missing_runtime_is_named(stage: &Stage) -> Result<()> {
    let (task, refusal) = stage
        .container("wrong-runtime")
        .binary("/no/such/runc")
        .shell("sleep 1000")
        .try_create()
        .await?;
    let refusal = refusal.err().context("it was created without a runtime")?;
    assert!(refusal.message().contains("/no/such/runc"), "{refusal}");
    is_gone(stage, "wrong-runtime").await?;
    task.remove().await
}

pub(crate) async fn a_missing_criu_is_named(stage: &Stage) -> Result<()> {
    let program = stage.node.path("/run/runc-without-criu");
    fs::write(
        &program,
        "#!/bin/sh\nPATH=/nowhere exec /usr/sbin/runc \"$@\"\n",
    )?;
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755))?;
    let task = stage
        .container("wrong-criu")
        .binary("/run/runc-without-criu")
        .shell("sleep 1000")
        .run()
        .await?;
    let options = CheckpointOptions {
        image_path: "/tmp/wrong-criu".to_owned(),
        ..Default::default()
    };
    let refusal = task.checkpoint(&options).await;
    let refusal = refusal.err().context("it was dumped without CRIU")?;
    assert!(refusal.message().contains("criu"), "{refusal}");
    assert_eq!(task.state().await?, State::Running);
    task.remove().await
}

pub(crate) async fn an_exec_that_is_no_process_is_refused(stage: &Stage) -> Result<()> {
    let task = stage
        .container("wrong-exec")
        .shell("sleep 1000")
        .run()
        .await?;
    for spec in ["sh", "[]", "", "{\"args\": 1}"] {
        let refused = async {
            task.add_exec("none", spec).await?;
            task.start_exec("none").await.map(drop)
        };
        let refusal = refused
            .await
            .err()
            .with_context(|| format!("{spec:?} was started"))?;
        assert!(!refusal.message().is_empty(), "{spec:?}");
        // One that was added is deleted again; of one that was not, nothing is known.
        let _ = task.delete_exec("none").await;
    }
    assert_eq!(task.pids().await?.len(), 1);
    task.remove().await
}

pub(crate) async fn output_that_nobody_reads_holds_nobody_up(stage: &Stage) -> Result<()> {
    // The shim that containerd ships waits 30 s for a reader, and fails the creation.
    if stage.node.runtime() == Runtime::Go {
        return Ok(());
    }
    stage.node.run(["mkfifo", "/run/wrong-unread"]).await?;
    let task = stage
        .container("wrong-unread")
        .log_uri("/run/wrong-unread")
        .shell("echo one; echo two >&2; exit 5")
        .run()
        .await?;
    assert_eq!(task.wait().await?.status, 5);
    let since = Instant::now();
    task.delete().await?;
    // The output is in the FIFO: the ten seconds that are waited for a reader are not for it.
    assert!(
        since.elapsed() < Duration::from_secs(8),
        "{:?}",
        since.elapsed()
    );
    task.remove().await
}

pub(crate) async fn a_fifo_that_is_not_there_is_refused(stage: &Stage) -> Result<()> {
    let (task, refusal) = stage
        .container("wrong-fifo")
        .log_uri("/run/no/such/fifo")
        .shell("sleep 1000")
        .try_create()
        .await?;
    let refusal = refusal.err().context("it was created without its FIFO")?;
    assert!(refusal.message().contains("/run/no/such/fifo"), "{refusal}");
    is_gone(stage, "wrong-fifo").await?;
    task.remove().await
}

pub(crate) async fn ten_thousand_mounts_are_refused_by_the_first_that_fails(
    stage: &Stage,
) -> Result<()> {
    let (task, refusal) = stage
        .container("wrong-mounts")
        .change_spec(|spec| {
            let mounts = (0..10_000).map(|n| {
                serde_json::json!({
                    "destination": format!("/m{n}"), "type": "bind", "source": "/no/such/source", "options": ["bind"],
                })
            });
            if let Some(all) = spec["mounts"].as_array_mut() {
                all.extend(mounts);
            }
        })
        .shell("sleep 1000")
        .try_create()
        .await?;
    let refusal = refusal.err().context("it was created without its mounts")?;
    assert!(refusal.message().contains("/no/such/source"), "{refusal}");
    is_gone(stage, "wrong-mounts").await?;
    task.remove().await
}
