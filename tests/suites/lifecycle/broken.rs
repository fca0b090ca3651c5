//! A runc that fails, and streams that are gone: an error of theirs is told, and nothing else changes.

use crate::{Stage, code, process::is_gone};
use anyhow::{Context, Result, ensure};
use containerd_client::tonic::Code;
use rekindle_harness::Runtime;
use rekindle_harness::container::State;
use rekindle_harness::options::{CheckpointOptions, Options};
use serde_json::json;

/// A runc that fails at an action, without a word, while there is a file named for it.
struct Runc<'s> {
    stage: &'s Stage,
    path: String,
}

impl<'s> Runc<'s> {
    async fn new(stage: &'s Stage, name: &str) -> Result<Self> {
        let path = format!("/tmp/failing-{name}");
        let script = format!(
            "printf '#!/bin/sh\\nfor word; do [ -e {path}.$word ] && exit 9; done\\nexec runc \"$@\"\\n' > {path} && chmod 755 {path}"
        );
        stage.node.run(["sh", "-c", &script]).await?;
        Ok(Self { stage, path })
    }

    fn options(&self) -> Options {
        Options {
            binary_name: self.path.clone(),
            ..Default::default()
        }
    }

    async fn fails_at(&self, action: &str) -> Result<()> {
        let file = format!("{}.{action}", self.path);
        self.stage.node.run(["touch", &file]).await.map(drop)
    }

    async fn works_again(&self, action: &str) -> Result<()> {
        let file = format!("{}.{action}", self.path);
        self.stage.node.run(["rm", &file]).await.map(drop)
    }
}

pub(crate) async fn what_runc_fails_at_has_not_happened(stage: &Stage) -> Result<()> {
    let runc = Runc::new(stage, "running").await?;
    let task = stage.container("runc-fails").shell("sleep 1000");
    let task = task.options(runc.options()).run().await?;
    let image = CheckpointOptions {
        image_path: "/tmp/runc-fails".into(),
        ..Default::default()
    };
    let exec = task.exec("one", &["true"]).add().await?;
    for action in ["pause", "kill", "update", "ps", "checkpoint", "exec"] {
        runc.fails_at(action).await?;
        let answer = match action {
            "pause" => task.pause().await,
            "kill" => task.kill(15).await,
            "update" => task.update(&json!({})).await,
            "ps" => task.pids().await.map(drop),
            "checkpoint" => task.checkpoint(&image).await.map(drop),
            _ => exec.start().await.map(drop),
        };
        assert_eq!(code(answer), Code::Unknown, "{action}");
        assert_eq!(task.state().await?, State::Running, "{action}");
        runc.works_again(action).await?;
    }
    task.pause().await?;
    runc.fails_at("resume").await?;
    assert_eq!(code(task.resume().await), Code::Unknown);
    assert_eq!(task.state().await?, State::Paused);
    runc.works_again("resume").await?;
    task.resume().await?;
    task.kill(9).await?;
    task.wait().await?;
    task.reaches(State::Stopped).await?;
    runc.fails_at("delete").await?;
    assert_eq!(code(task.delete().await), Code::Unknown);
    assert_eq!(task.state().await?, State::Stopped);
    runc.works_again("delete").await?;
    assert_eq!(task.delete().await?.status, 137);
    is_gone(stage, "runc-fails").await?;
    task.remove().await
}

pub(crate) async fn a_start_that_runc_fails_at_can_be_tried_again(stage: &Stage) -> Result<()> {
    let runc = Runc::new(stage, "starting").await?;
    let task = stage.container("start-fails").shell("sleep 1000");
    let task = task.options(runc.options()).create().await?;
    runc.fails_at("start").await?;
    let refusal = task.start().await.err().context("it started")?;
    assert_eq!(refusal.code(), Code::Unknown);
    // Where runc has no word for it, the exit status is told.
    let status = match stage.node.runtime() {
        Runtime::Go => "exit status 9",
        Runtime::Rekindle => "status 9",
    };
    ensure!(refusal.message().contains(status), "{refusal}");
    assert_eq!(task.state().await?, State::Created);
    runc.works_again("start").await?;
    task.start().await?;
    assert_eq!(task.state().await?, State::Running);
    task.remove().await
}

pub(crate) async fn without_a_pid_there_is_no_container(stage: &Stage) -> Result<()> {
    // The pid file of a create is its bundle's.
    let script = "printf '#!/bin/sh\\nrunc \"$@\"; ended=$?\\nfor word; do [ $word = create ] && rm -f /run/containerd/io.containerd.runtime.v2.task/default/no-pid/init.pid; done\\nexit $ended\\n' > /tmp/runc-no-pid && chmod 755 /tmp/runc-no-pid";
    stage.node.run(["sh", "-c", script]).await?;
    let task = stage.container("no-pid").shell("sleep 1000");
    let task = task.options(Options {
        binary_name: "/tmp/runc-no-pid".into(),
        ..Default::default()
    });
    let (task, created) = task.try_create().await?;
    let refusal = created.err().context("it was created")?;
    ensure!(refusal.message().contains("pid"), "{refusal}");
    is_gone(stage, "no-pid").await?;
    task.remove().await
}

/// Takes a FIFO away.
async fn lose(stage: &Stage, fifo: &str) -> Result<()> {
    stage.node.run(["rm", fifo]).await.map(drop)
}

pub(crate) async fn a_stream_that_is_gone_fails_the_creation(stage: &Stage) -> Result<()> {
    for (id, terminal, lost) in [
        ("lost-stdin", false, "stdin"),
        ("lost-stdout", false, "stdout"),
        ("lost-console-in", true, "stdin"),
        ("lost-console-out", true, "stdout"),
    ] {
        let task = stage.container(id).stdin().shell("sleep 1000");
        let task = if terminal { task.terminal() } else { task };
        let prepared = task.prepare().await?;
        lose(stage, &format!("/run/rekindle-test-io/{id}-{lost}")).await?;
        let refusal = prepared.create().await.err().context("it was created")?;
        let refusal = format!("{refusal:#}");
        ensure!(refusal.contains(&format!("{id}-{lost}")), "{refusal}");
        is_gone(stage, id).await?;
    }
    Ok(())
}

/// The shim that containerd ships leaves the process running, and nobody knows of it.
pub(crate) async fn a_stream_that_is_gone_fails_the_exec_alone(stage: &Stage) -> Result<()> {
    let task = stage.container("lost-exec").shell("sleep 1000").run();
    let task = task.await?;
    for (id, terminal, lost) in [
        ("in", false, "stdin"),
        ("out", false, "stdout"),
        ("console-in", true, "stdin"),
        ("console-out", true, "stdout"),
    ] {
        let exec = task.exec(id, &["sleep", "1000"]).stdin();
        let exec = if terminal { exec.terminal() } else { exec };
        let exec = exec.add().await?;
        lose(
            stage,
            &format!("/run/rekindle-test-io/lost-exec-{id}-{lost}"),
        )
        .await?;
        let refusal = exec.start().await.err().context("it started")?;
        assert_eq!(refusal.code(), Code::Unknown, "{id}");
        if stage.node.runtime() == Runtime::Rekindle {
            assert_eq!(exec.state().await?, State::Created, "{id}");
            assert_eq!(task.pids().await?.len(), 1, "{id}");
        }
    }
    assert_eq!(task.state().await?, State::Running);
    task.remove().await
}

/// Ours has had them open since the create. With the shim that containerd ships it runs then, counts as created, and
/// cannot be deleted.
pub(crate) async fn a_stream_that_is_gone_is_none_to_a_restore(stage: &Stage) -> Result<()> {
    let image = "/tmp/lost-image";
    let options = CheckpointOptions {
        exit: true,
        image_path: image.into(),
        ..Default::default()
    };
    let task = stage.container("lost-0").stdin().args(&["/counter"]).run();
    let task = task.await?;
    task.checkpoint(&options).await?;
    task.wait().await?;
    task.remove().await?;
    for lost in ["stdin", "stdout"] {
        let id = format!("lost-restore-{lost}");
        let task = stage.container(&id).stdin().args(&["/counter"]);
        let task = task.restore_from(image).create().await?;
        lose(stage, &format!("/run/rekindle-test-io/{id}-{lost}")).await?;
        let started = task.start().await;
        if stage.node.runtime() == Runtime::Rekindle {
            started?;
            assert_eq!(task.state().await?, State::Running);
            task.remove().await?;
        } else {
            let refusal = started.err().context("it was restored")?;
            ensure!(refusal.message().contains(lost), "{refusal}");
        }
    }
    Ok(())
}

/// What ours has staged for it is gone then; the shim that containerd ships asks runc once more.
pub(crate) async fn a_restore_that_failed_is_not_tried_again(stage: &Stage) -> Result<()> {
    stage.node.run(["mkdir", "-p", "/tmp/empty-image"]).await?;
    let task = stage.container("restore-twice").args(&["/counter"]);
    let task = task.restore_from("/tmp/empty-image").create().await?;
    assert_eq!(code(task.start().await), Code::Unknown);
    assert_eq!(task.state().await?, State::Created);
    let again = match stage.node.runtime() {
        Runtime::Go => Code::Unknown,
        Runtime::Rekindle => Code::FailedPrecondition,
    };
    assert_eq!(code(task.start().await), again);
    task.delete().await?;
    is_gone(stage, "restore-twice").await?;
    task.remove().await
}

pub(crate) async fn a_busy_root_is_let_go(stage: &Stage) -> Result<()> {
    let task = stage.container("busy").shell("exit 1").run().await?;
    task.wait().await?;
    task.reaches(State::Stopped).await?;
    let line = "cd /run/containerd/io.containerd.runtime.v2.task/default/busy/rootfs && \
                { sleep 1000 >/dev/null 2>&1 & echo $!; }";
    let holder = stage.node.run(["sh", "-c", line]).await?;
    let deleted = code(task.delete().await);
    stage.node.run(["kill", "-9", holder.trim()]).await?;
    match stage.node.runtime() {
        Runtime::Go => {
            assert_eq!(deleted, Code::Unknown);
            task.delete().await?;
        }
        Runtime::Rekindle => assert_eq!(deleted, Code::Ok),
    }
    is_gone(stage, "busy").await?;
    task.remove().await
}

/// The shim that containerd ships gives up, and leaves what there is.
pub(crate) async fn delete_goes_on_without_the_notes_of_the_create(stage: &Stage) -> Result<()> {
    let line = "mkdir -p /tmp/bundles/noted/rootfs && cd /tmp/bundles/noted && \
                mount -t tmpfs none rootfs && echo garbled | tee options.json rekindle-shim.json && \
                containerd-shim-runc-v2 -namespace default -id noted \
                -address /run/containerd/containerd.sock -bundle /tmp/bundles/noted delete";
    let out = stage.node.exec(["sh", "-c", line]).await?;
    let ours = stage.node.runtime() == Runtime::Rekindle;
    assert_eq!(out.status.success(), ours);
    let mounts = "grep -c /tmp/bundles/noted /proc/self/mountinfo; true";
    let left = stage.node.run(["sh", "-c", mounts]).await?;
    assert_eq!(left.trim() == "0", ours);
    Ok(())
}
