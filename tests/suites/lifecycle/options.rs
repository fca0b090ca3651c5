//! The options of `io.containerd.runc.v2`, as a node's configuration of containerd sets them.

use crate::{Stage, process::is_gone};
use anyhow::{Result, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use rekindle_harness::options::{CheckpointOptions, Options};

/// A runc that notes how it is called and who owns its standard output, in a file beside it.
async fn noting_runc(stage: &Stage, name: &str) -> Result<String> {
    let path = format!("/tmp/runc-{name}");
    let script = format!(
        "printf '#!/bin/sh\\necho \"$* $(stat -Lc %%u:%%g /proc/$$/fd/1)\" >> {path}.calls\\nexec runc \"$@\"\\n' > {path} && chmod 755 {path}"
    );
    stage.node.run(["sh", "-c", &script]).await?;
    Ok(path)
}

/// The calls of such a runc with this action.
async fn calls(stage: &Stage, runc: &str, action: &str) -> Result<Vec<String>> {
    let text = stage.node.run(["cat", &format!("{runc}.calls")]).await?;
    let word = format!(" {action} ");
    let found = text.lines().filter(|line| line.contains(&word));
    Ok(found.map(str::to_owned).collect())
}

pub(crate) async fn runc_is_called_as_the_options_say(stage: &Stage) -> Result<()> {
    let runc = noting_runc(stage, "options").await?;
    let task = stage.container("options").shell("sleep 1000");
    let task = task.options(Options {
        binary_name: runc.clone(),
        root: "/run/elsewhere".into(),
        no_pivot_root: true,
        no_new_keyring: true,
        ..Default::default()
    });
    let task = task.run().await?;
    let state = "/run/elsewhere/default/options";
    stage.node.run(["test", "-e", state]).await?;
    let exec = task.exec("in", &["sh", "-c", "exit 3"]).run().await?;
    assert_eq!(exec.wait().await?.status, 3);
    task.pause().await?;
    task.resume().await?;
    task.kill(9).await?;
    task.wait().await?;
    task.delete().await?;
    for action in [
        "create", "start", "exec", "pause", "resume", "kill", "delete",
    ] {
        let calls = calls(stage, &runc, action).await?;
        ensure!(!calls.is_empty(), "{runc} was not asked to {action}");
        for call in calls {
            ensure!(call.contains("--root /run/elsewhere/default "), "{call}");
        }
    }
    let create = calls(stage, &runc, "create").await?.join("\n");
    for flag in ["--no-pivot ", "--no-new-keyring "] {
        ensure!(create.contains(flag), "{flag}is not in {create}");
    }
    stage.node.run(["test", "!", "-e", state]).await?;
    is_gone(stage, "options").await?;
    task.remove().await
}

pub(crate) async fn a_killed_shims_container_is_found_where_the_options_say(
    stage: &Stage,
) -> Result<()> {
    let runc = noting_runc(stage, "orphaned").await?;
    let events = stage.node.events().await?;
    let task = stage.container("orphaned").shell("sleep 1000");
    let task = task.options(Options {
        binary_name: runc.clone(),
        root: "/run/elsewhere".into(),
        ..Default::default()
    });
    let task = task.run().await?;
    let pid = task.process().await?.pid;
    let (shim, _) = stage.node.shim_of("orphaned")?;
    kill(Pid::from_raw(shim.try_into()?), Signal::SIGKILL)?;
    let told = events.until("orphaned", "TaskDelete").await?;
    let exit = told.iter().find(|event| event.name == "TaskExit");
    assert_eq!(
        exit.map(|event| (event.pid, event.status)),
        Some((pid, 137))
    );
    is_gone(stage, "orphaned").await?;
    let state = "/run/elsewhere/default/orphaned";
    stage.node.run(["test", "!", "-e", state]).await?;
    ensure!(!calls(stage, &runc, "delete").await?.is_empty());
    task.remove().await
}

/// runc gives them to the container's user then, and leaves the group.
pub(crate) async fn stdio_belongs_to_whom_the_options_say(stage: &Stage) -> Result<()> {
    let runc = noting_runc(stage, "owner").await?;
    let line = "stat -Lc %g /proc/self/fd/0 /proc/self/fd/1 /proc/self/fd/2; sleep 1000";
    let task = stage.container("owner").stdin().shell(line);
    let task = task.options(Options {
        binary_name: runc.clone(),
        io_uid: 1000,
        io_gid: 1001,
        ..Default::default()
    });
    let task = task.run().await?;
    let out = task.io().out()?;
    out.until("the groups", |text| text == "1001\n".repeat(3))
        .await?;
    task.exec("too", &["true"]).stdin().run().await?;
    for action in ["create", "exec"] {
        let call = calls(stage, &runc, action).await?.join("\n");
        ensure!(call.ends_with(" 1000:1001"), "{call}");
    }
    task.remove().await
}

pub(crate) async fn criu_works_where_the_options_say(stage: &Stage) -> Result<()> {
    let image = CheckpointOptions {
        exit: true,
        image_path: "/tmp/work-image".into(),
        ..Default::default()
    };
    let task = stage.container("work-0").args(&["/counter"]).run().await?;
    task.checkpoint(&image).await?;
    task.wait().await?;
    task.remove().await?;
    let runc = noting_runc(stage, "work").await?;
    let task = stage.container("work").args(&["/counter"]);
    let task = task.options(Options {
        binary_name: runc.clone(),
        criu_work_path: "/tmp/work-here".into(),
        ..Default::default()
    });
    let task = task.restore_from("/tmp/work-image").run().await?;
    let restore = calls(stage, &runc, "restore").await?.join("\n");
    ensure!(restore.contains("--work-path /tmp/work-here "), "{restore}");
    task.remove().await
}
