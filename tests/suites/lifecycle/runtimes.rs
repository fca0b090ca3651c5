//! Another OCI runtime in runc's place, which has a log and words of its own; and where its options come from.

use crate::{Stage, code, process::is_gone};
use anyhow::{Context, Result};
use containerd_client::tonic::Code;
use rekindle_harness::Runtime;
use rekindle_harness::container::{Builder, State};
use std::fs;
use std::os::unix::fs::PermissionsExt;

/// A node with both versions of cgroups is one that crun refuses: it is shown the first alone.
const CRUN: &str = r#"#!/bin/sh
if [ -d /sys/fs/cgroup/unified ]; then
  exec unshare --mount sh -c 'umount /sys/fs/cgroup/unified && exec crun "$@"' sh "$@"
fi
exec crun "$@"
"#;

fn crun<'s>(stage: &'s Stage, id: &str) -> Result<Builder<'s>> {
    let program = format!("/run/{id}");
    let file = stage.node.path(&program);
    fs::write(&file, CRUN)?;
    fs::set_permissions(&file, fs::Permissions::from_mode(0o755))?;
    Ok(stage.container(id).binary(&program))
}

pub(crate) async fn crun_runs_a_container(stage: &Stage) -> Result<()> {
    let task = crun(stage, "crun-runs")?
        .stdin()
        .shell("echo one; echo two >&2; read line; exit $line")
        .create()
        .await?;
    assert_eq!(task.state().await?, State::Created);
    let state = "test -e /run/containerd/runc/default/crun-runs/status";
    stage.node.run(["sh", "-c", state]).await?;
    task.start().await?;
    assert_eq!(task.pids().await?.len(), 1);
    task.update(&serde_json::json!({"memory": {"limit": 64 << 20}}))
        .await?;
    task.metrics().await?;
    task.io().writer()?.write("7\n")?;
    assert_eq!(task.wait().await?.status, 7);
    assert_eq!(task.io().out()?.text().await?, "one\n");
    assert_eq!(task.io().err()?.text().await?, "two\n");
    assert_eq!(code(task.kill(9).await), Code::NotFound);
    task.delete().await?;
    is_gone(stage, "crun-runs").await?;
    task.remove().await
}

pub(crate) async fn crun_refuses_a_missing_program(stage: &Stage) -> Result<()> {
    let (task, refusal) = crun(stage, "crun-missing")?
        .args(&["/no/such/program"])
        .try_create()
        .await?;
    let refusal = refusal
        .err()
        .context("it was created without its program")?;
    assert!(refusal.message().contains("/no/such/program"), "{refusal}");
    is_gone(stage, "crun-missing").await?;
    task.remove().await
}

pub(crate) async fn crun_is_paused_and_killed(stage: &Stage) -> Result<()> {
    let task = crun(stage, "crun-paused")?
        .shell("sleep 1000 & sleep 1000 & wait")
        .run()
        .await?;
    task.pause().await?;
    assert_eq!(task.state().await?, State::Paused);
    task.resume().await?;
    assert_eq!(task.state().await?, State::Running);
    task.pause().await?;
    task.kill(9).await?;
    if stage.node.runtime() == Runtime::Go {
        // crun does not thaw what it kills, and this shim neither.
        task.resume().await?;
    }
    assert_eq!(task.wait().await?.status, 137);
    task.delete().await?;
    is_gone(stage, "crun-paused").await?;
    task.remove().await
}

pub(crate) async fn crun_runs_execs(stage: &Stage) -> Result<()> {
    let task = crun(stage, "crun-exec")?.shell("sleep 1000").run().await?;
    let exec = task
        .exec("terminal", &["sh", "-c", "test -t 1 && echo on a terminal"])
        .terminal()
        .run()
        .await?;
    assert_eq!(exec.wait().await?.status, 0);
    assert_eq!(exec.io().out()?.text().await?, "on a terminal\r\n");
    exec.delete().await?;
    let exec = task.exec("killed", &["sleep", "1000"]).run().await?;
    assert_eq!(task.pids().await?.len(), 2);
    exec.kill(9).await?;
    assert_eq!(exec.wait().await?.status, 137);
    assert_eq!(code(exec.kill(9).await), Code::NotFound);
    let missing = task.exec("missing", &["/no/such/program"]).add().await?;
    let refusal = missing.start().await.err().context("it was started")?;
    assert!(refusal.message().contains("/no/such/program"), "{refusal}");
    task.kill_all(9).await?;
    assert_eq!(task.wait().await?.status, 137);
    task.delete().await?;
    is_gone(stage, "crun-exec").await?;
    task.remove().await
}

/// `runtimeoptions.v1.Options`, which containerd sends for a runtime type that it does not know.
pub(crate) async fn our_own_type_has_its_options_in_a_file(stage: &Stage) -> Result<()> {
    const ID: &str = "own-options";
    if stage.node.runtime() == Runtime::Go {
        return Ok(());
    }
    let node = &stage.node;
    let (file, image) = ("/run/own-options.toml", stage.busybox.name.as_str());
    let run = [
        "ctr",
        "run",
        "--detach",
        "--runtime",
        "io.containerd.rekindle.v1",
        "--runtime-config-path",
        file,
        image,
        ID,
        "sleep",
        "1000",
    ];
    fs::write(node.path(file), "Roots = \"/run/own-root\"\n")?;
    let refused = node.exec(run).await?;
    let words = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(
        !refused.status.success() && words.contains("`Roots`"),
        "{words}"
    );
    node.exec(["ctr", "container", "delete", ID]).await?;
    fs::write(node.path(file), "Root = \"/run/own-root\"\n")?;
    node.run(run).await?;
    node.run(["ls", "/run/own-root/default/own-options/state.json"])
        .await?;
    node.run(["ctr", "task", "delete", "--force", ID]).await?;
    is_gone(stage, ID).await?;
    node.run(["ctr", "container", "delete", ID]).await?;
    Ok(())
}
