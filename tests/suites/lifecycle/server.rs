//! The shim as a process: whom it serves, where it lives, when it ends.

use crate::{Stage, code, process::is_gone, recovery::own_stage, refusals::speaks_version_3};
use anyhow::{Context, Result, ensure};
use containerd_client::tonic::Code;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use rekindle_harness::container::State;
use rekindle_harness::options::Options;
use rekindle_harness::shim::{api, deadline, protobuf::Message};
use rekindle_harness::{Container, Runtime, Suite};
use std::fs;

/// What puts containers into one shim; the first that is there counts.
const LABELS: [&str; 2] = [
    "io.containerd.runc.v2.group",
    "io.kubernetes.cri.sandbox-id",
];

/// Where the shim under test lies.
fn program(stage: &Stage) -> &'static str {
    match stage.node.runtime() {
        Runtime::Go => "/usr/bin/containerd-shim-runc-v2",
        Runtime::Rekindle => "/opt/rekindle/bin/containerd-shim-rekindle-v1",
    }
}

pub(crate) async fn connect_tells_the_pids_of_shim_and_task(stage: &Stage) -> Result<()> {
    if !speaks_version_3(stage) {
        return Ok(());
    }
    let task = stage.container("pids-told").shell("sleep 1000").run();
    let task = task.await?;
    let shim = stage.node.shim("pids-told").await?;
    let expected = stage.node.pid_inside(stage.node.shim_of("pids-told")?.0)?;
    let request = |id: &str| api::ConnectRequest {
        id: id.to_owned(),
        ..Default::default()
    };
    let of_it = shim.connect(deadline(), &request("pids-told")).await?;
    let pids = (of_it.shim_pid, of_it.task_pid);
    assert_eq!(pids, (expected, task.process().await?.pid));
    let of_none = shim.connect(deadline(), &request("unknown")).await?;
    assert_eq!((of_none.shim_pid, of_none.task_pid), (expected, 0));
    task.remove().await
}

pub(crate) async fn a_shutdown_is_ignored_while_there_is_a_container(stage: &Stage) -> Result<()> {
    if !speaks_version_3(stage) {
        return Ok(());
    }
    let task = stage.container("stays").shell("sleep 1000").create();
    let task = task.await?;
    let shim = stage.node.shim("stays").await?;
    let request = api::ShutdownRequest {
        id: "stays".to_owned(),
        now: true,
        ..Default::default()
    };
    // While it is created, and while it runs.
    shim.shutdown(deadline(), &request).await?;
    task.start().await?;
    shim.shutdown(deadline(), &request).await?;
    let exec = task.exec("after", &["sh", "-c", "exit 2"]).run().await?;
    assert_eq!(exec.wait().await?.status, 2);
    assert_eq!(task.state().await?, State::Running);
    task.remove().await?;
    is_gone(stage, "stays").await
}

/// The shim that containerd ships logs its stacks at USR1. At TERM and INT it ends, and containerd ends the container.
pub(crate) async fn a_signal_to_the_shim_ends_no_container(stage: &Stage) -> Result<()> {
    let task = stage.container("signalled").shell("sleep 1000").run();
    let task = task.await?;
    let shim = Pid::from_raw(stage.node.shim_of("signalled")?.0.try_into()?);
    let signals: &[Signal] = match stage.node.runtime() {
        Runtime::Go => &[Signal::SIGUSR1],
        Runtime::Rekindle => &[Signal::SIGUSR1, Signal::SIGTERM, Signal::SIGINT],
    };
    for signal in signals {
        kill(shim, *signal)?;
        let exec = task.exec(signal.as_str(), &["sh", "-c", "exit 2"]).run();
        assert_eq!(exec.await?.wait().await?.status, 2);
    }
    task.remove().await
}

pub(crate) async fn the_shim_dies_of_no_memory_before_containerd(stage: &Stage) -> Result<()> {
    let task = stage.container("score").shell("sleep 1000").run().await?;
    let score = |path: String| -> Result<i32> { Ok(fs::read_to_string(path)?.trim().parse()?) };
    let (shim, _) = stage.node.shim_of("score")?;
    let file = "cat /proc/$(pidof -s containerd)/oom_score_adj";
    let containerd: i32 = stage.node.run(["sh", "-c", file]).await?.trim().parse()?;
    let shim = score(format!("/proc/{shim}/oom_score_adj"))?;
    assert_eq!(shim, (containerd + 1).min(1000));
    task.remove().await
}

pub(crate) async fn the_shim_lives_in_the_cgroup_of_the_options(stage: &Stage) -> Result<()> {
    let make = "for h in /sys/fs/cgroup /sys/fs/cgroup/*; do \
                  [ -e $h/cgroup.procs ] && mkdir -p $h/shims; \
                  for set in cpus mems; do \
                    [ -e $h/cpuset.$set ] && cat $h/cpuset.$set > $h/shims/cpuset.$set; done; done; true";
    stage.node.run(["sh", "-c", make]).await?;
    let task = stage.container("in-cgroup").shell("sleep 1000");
    let task = task.options(Options {
        shim_cgroup: "/shims".into(),
        ..Default::default()
    });
    let task = task.run().await?;
    let (shim, _) = stage.node.shim_of("in-cgroup")?;
    let groups = fs::read_to_string(format!("/proc/{shim}/cgroup"))?;
    // Under version 1 each controller has its own; the one of memory is there on every node.
    let memory = groups.lines().find(|line| {
        let mut parts = line.splitn(3, ':').skip(1);
        let controllers = parts.next().unwrap_or_default();
        controllers.is_empty() || controllers.split(',').any(|one| one == "memory")
    });
    let memory = memory.context("the shim has no cgroup")?;
    ensure!(memory.ends_with("/shims"), "the shim is in {groups}");
    let pid = task.process().await?.pid;
    let of_task = stage
        .node
        .run(["cat", &format!("/proc/{pid}/cgroup")])
        .await?;
    ensure!(!of_task.contains("shims"), "the container is in {of_task}");
    task.remove().await
}

pub(crate) async fn a_shim_cgroup_that_is_missing_fails_the_creation(stage: &Stage) -> Result<()> {
    let task = stage.container("no-cgroup").shell("sleep 1000");
    let task = task.options(Options {
        shim_cgroup: "/no-such-cgroup".into(),
        ..Default::default()
    });
    let (task, created) = task.try_create().await?;
    let refusal = created.err().context("the cgroup was not missed")?;
    ensure!(refusal.message().contains("cgroup"), "{refusal}");
    is_gone(stage, "no-cgroup").await?;
    task.remove().await
}

pub(crate) async fn containers_of_a_group_share_a_shim(stage: &Stage) -> Result<()> {
    for (n, label) in LABELS.into_iter().enumerate() {
        let (one, two) = (format!("group-{n}-one"), format!("group-{n}-two"));
        let member = |id: &str| {
            let task = stage.container(id).shell("sleep 1000");
            task.annotation(label, &format!("group-{n}"))
        };
        let first = member(&one).run().await?;
        let second = member(&two).run().await?;
        // The first label counts, where there are both.
        let third = format!("group-{n}-three");
        let torn = member(&third).annotation(LABELS[1 - n], "group-of-others");
        let torn = torn.run().await?;
        let socket = stage.node.shim_socket(&one).await?;
        assert_eq!(stage.node.shim_socket(&two).await?, socket);
        assert_eq!(stage.node.shim_socket(&third).await? == socket, n == 0);
        first.remove().await?;
        is_rid_of_task(stage, &one).await?;
        assert_eq!(second.state().await?, State::Running);
        let exec = second.exec("after", &["sh", "-c", "exit 1"]).run().await?;
        assert_eq!(exec.wait().await?.status, 1);
        torn.remove().await?;
        second.remove().await?;
        is_gone(stage, &one).await?;
    }
    Ok(())
}

/// What was a container's, and not the shim that it began.
async fn is_rid_of_task(stage: &Stage, id: &str) -> Result<()> {
    let script = format!(
        "! grep -F /{id}/ /proc/self/mountinfo && ! test -e /run/containerd/runc/default/{id} && \
         ! test -e /run/containerd/io.containerd.runtime.v2.task/default/{id}"
    );
    stage.node.run(["sh", "-c", &script]).await.map(drop)
}

pub(crate) async fn a_binary_that_is_replaced_changes_no_running_container(
    stage: &Stage,
) -> Result<()> {
    let stage = &own_stage(stage).await?;
    let member = |id: &str| {
        let task = stage.container(id).shell("sleep 1000");
        task.annotation(LABELS[1], "old-pod")
    };
    let works = async |task: &Container<'_>| -> Result<()> {
        let exec = task.exec("works", &["sh", "-c", "exit 4"]).run().await?;
        assert_eq!(exec.wait().await?.status, 4);
        exec.delete().await?;
        Ok(())
    };
    let old = member("old").run().await?;
    let program = program(stage);
    let replace = format!("cp {program} {program}.new && mv {program}.new {program}");
    stage.node.run(["sh", "-c", &replace]).await?;
    let runs = |id: &str| -> Result<String> {
        let (pid, _) = stage.node.shim_of(id)?;
        let program = fs::read_link(format!("/proc/{pid}/exe"))?;
        Ok(program.to_string_lossy().into_owned())
    };
    ensure!(runs("old")?.ends_with("(deleted)"), "{}", runs("old")?);
    works(&old).await?;
    let joined = member("joined").run().await?;
    works(&joined).await?;
    let socket = stage.node.shim_socket("old").await?;
    assert_eq!(stage.node.shim_socket("joined").await?, socket);
    let new = stage.container("new").shell("sleep 1000").run().await?;
    ensure!(runs("new")?.ends_with(program), "{}", runs("new")?);
    works(&new).await?;
    for task in [joined, old, new] {
        task.kill(9).await?;
        assert_eq!(task.wait().await?.status, 137);
        assert_eq!(task.delete().await?.status, 137);
        assert_eq!(code(task.state().await), Code::NotFound);
        task.remove().await?;
    }
    for id in ["old", "joined", "new"] {
        is_gone(stage, id).await?;
    }
    Ok(())
}

/// What containerd asks after a creation that came to nothing.
pub(crate) async fn the_delete_command_answers_for_what_never_was(stage: &Stage) -> Result<()> {
    if stage.node.runtime() == Runtime::Go && stage.node.suite() == Suite::Trixie {
        return Ok(()); // the shim of containerd 1.7 gives up without the file that its create makes
    }
    let line = "mkdir -p /tmp/bundles/never && cd /tmp/bundles/never && echo '{}' > config.json && \
                containerd-shim-runc-v2 -namespace default -id never \
                -address /run/containerd/containerd.sock -bundle /tmp/bundles/never delete";
    let out = stage.node.exec(["sh", "-c", line]).await?;
    let said = String::from_utf8_lossy(&out.stderr);
    ensure!(out.status.success(), "{}: {said}", out.status);
    let answer = api::DeleteResponse::parse_from_bytes(&out.stdout)?;
    // containerd's own shim makes a pid of the -1 that it has for none.
    let none = match stage.node.runtime() {
        Runtime::Go => u32::MAX,
        Runtime::Rekindle => 0,
    };
    assert_eq!((answer.pid, answer.exit_status), (none, 137));
    Ok(())
}

pub(crate) async fn start_fails_where_the_spec_is_no_json(stage: &Stage) -> Result<()> {
    let line = "mkdir -p /tmp/bundles/garbled && cd /tmp/bundles/garbled && echo garbled > config.json && \
                containerd-shim-runc-v2 -namespace default -id garbled \
                -address /run/containerd/containerd.sock start";
    let out = stage.node.exec(["sh", "-c", line]).await?;
    ensure!(!out.status.success(), "it started");
    is_gone(stage, "garbled").await
}

/// The shim that containerd ships fails without runc, whose features it cannot tell then.
pub(crate) async fn the_shim_tells_about_itself_without_runc(stage: &Stage) -> Result<()> {
    let program = program(stage);
    let out = stage
        .node
        .exec(["env", "PATH=/nowhere", program, "-info"])
        .await?;
    let told = out.status.success() && !out.stdout.is_empty();
    assert_eq!(told, stage.node.runtime() == Runtime::Rekindle);
    Ok(())
}
