//! Creation, start, signals, the end, and what is told on the way.

use crate::{Stage, code};
use anyhow::{Context, Result, ensure};
use containerd_client::tonic::Code;
use prost::Message;
use rekindle_harness::container::State;
use rekindle_harness::{Runtime, Suite, poll};
use serde_json::json;

pub(crate) async fn a_created_task_has_a_pid_and_is_not_running(stage: &Stage) -> Result<()> {
    let task = stage
        .container("created")
        .shell("echo ran")
        .create()
        .await?;
    let process = task.process().await?;
    assert_eq!(process.status(), State::Created);
    assert!(process.pid > 0);
    assert_eq!(process.stdout, task.io().stdout);
    assert_eq!(task.pids().await?, [process.pid]);
    assert_eq!(task.io().out()?.so_far(), "");
    task.remove().await
}

pub(crate) async fn a_created_task_can_be_deleted(stage: &Stage) -> Result<()> {
    let task = stage
        .container("created-deleted")
        .shell("sleep 1000")
        .create()
        .await?;
    task.delete().await?;
    assert_eq!(code(task.state().await), Code::NotFound);
    task.remove().await
}

pub(crate) async fn start_runs_it_once(stage: &Stage) -> Result<()> {
    let task = stage
        .container("started")
        .shell("echo ran; sleep 1000")
        .create()
        .await?;
    let created = task.process().await?.pid;
    assert_eq!(task.start().await?, created);
    assert_eq!(task.state().await?, State::Running);
    task.io()
        .out()?
        .until("its output", |text| text == "ran\n")
        .await?;
    assert_eq!(code(task.start().await), Code::Unknown);
    task.remove().await
}

pub(crate) async fn exit_statuses_arrive(stage: &Stage) -> Result<()> {
    for status in [0, 7] {
        let task = stage
            .container(&format!("exits-{status}"))
            .shell(&format!("exit {status}"))
            .create()
            .await?;
        let pid = task.start().await?;
        assert_eq!(task.wait().await?.status, status);
        let process = task.process().await?;
        assert_eq!(
            (process.status(), process.exit_status),
            (State::Stopped, status)
        );
        assert!(process.exited_at.is_some_and(|at| at.seconds > 0));
        let ended = task.delete().await?;
        assert_eq!((ended.status, ended.pid), (status, pid));
        task.remove().await?;
    }
    Ok(())
}

pub(crate) async fn a_signal_counts_from_128(stage: &Stage) -> Result<()> {
    let task = stage.container("killed").shell("sleep 1000").run().await?;
    task.kill(9).await?;
    assert_eq!(task.wait().await?.status, 137);
    assert_eq!(task.delete().await?.status, 137);
    task.remove().await
}

pub(crate) async fn wait_answers_after_the_end_too(stage: &Stage) -> Result<()> {
    let task = stage
        .container("waited")
        .stdin()
        .shell("read line; exit 3")
        .run()
        .await?;
    let (early, _) = tokio::join!(task.wait(), async {
        task.io().writer().and_then(|mut to| to.write("go\n"))
    });
    assert_eq!(early?.status, 3);
    assert_eq!(task.wait().await?.status, 3);
    task.remove().await
}

pub(crate) async fn what_does_not_exist_is_not_found(stage: &Stage) -> Result<()> {
    let task = stage.container("known").shell("sleep 1000").run().await?;
    assert_eq!(code(task.kill_exec("unknown", 15).await), Code::NotFound);
    let (exec, added) = task.exec("known-exec", &["true"]).try_add().await?;
    added?;
    exec.start().await?;
    exec.wait().await?;
    exec.delete().await?;
    assert_eq!(code(exec.state().await), Code::NotFound);
    assert_eq!(code(exec.wait().await), Code::NotFound);
    assert_eq!(code(exec.delete().await), Code::NotFound);
    assert_eq!(code(exec.start().await), Code::NotFound);
    assert_eq!(code(exec.resize(10, 10).await), Code::NotFound);
    assert_eq!(code(exec.close_stdin().await), Code::NotFound);
    task.kill(9).await?;
    task.wait().await?;
    task.delete().await?;
    for answer in [
        task.kill(15).await,
        task.wait().await.map(drop),
        task.state().await.map(drop),
        task.pause().await,
    ] {
        assert_eq!(code(answer), Code::NotFound);
    }
    task.remove().await
}

pub(crate) async fn a_second_task_of_the_same_id_is_refused(stage: &Stage) -> Result<()> {
    let task = stage.container("twice").shell("sleep 1000").run().await?;
    assert_eq!(code(task.create_again().await), Code::AlreadyExists);
    assert_eq!(task.state().await?, State::Running);
    task.remove().await
}

pub(crate) async fn a_missing_program_fails_the_creation_and_leaves_nothing(
    stage: &Stage,
) -> Result<()> {
    let (task, created) = stage
        .container("no-program")
        .args(&["/no/such/program"])
        .try_create()
        .await?;
    let refusal = created
        .err()
        .context("a container without its program was created")?;
    assert!(refusal.message().contains("/no/such/program"), "{refusal}");
    assert_eq!(refusal.code(), Code::Unknown);
    assert_eq!(code(task.state().await), Code::NotFound);
    is_gone(stage, "no-program").await?;
    task.remove().await
}

pub(crate) async fn kill_reaches_one_process(stage: &Stage) -> Result<()> {
    let line = "trap 'echo caught; exit 5' USR1; echo armed; while :; do sleep 0.05; done";
    let task = stage.container("trap").shell(line).run().await?;
    task.io()
        .out()?
        .until("the trap", |text| text.contains("armed"))
        .await?;
    task.kill(10).await?;
    assert_eq!(task.wait().await?.status, 5);
    assert_eq!(task.io().out()?.text().await?, "armed\ncaught\n");
    task.remove().await
}

/// SIGKILL, because runc from 1.2 on sends any other signal to the first process alone.
pub(crate) async fn kill_all_ends_every_process(stage: &Stage) -> Result<()> {
    let line =
        "trap '' TERM; (trap '' TERM; echo armed; while :; do sleep 1; done) & echo armed; wait";
    let task = stage.container("kill-all").shell(line).run().await?;
    let exec = task.exec("rider", &["sleep", "1000"]).run().await?;
    task.io()
        .out()?
        .until("both processes", |text| text.matches("armed").count() == 2)
        .await?;
    task.kill_all(9).await?;
    assert_eq!(task.wait().await?.status, 137);
    assert_eq!(exec.wait().await?.status, 137);
    task.delete().await?;
    is_gone(stage, "kill-all").await?;
    task.remove().await
}

pub(crate) async fn kill_after_the_exit_is_not_found(stage: &Stage) -> Result<()> {
    let task = stage.container("kill-late").shell("exit 0").run().await?;
    task.wait().await?;
    assert_eq!(code(task.kill(15).await), Code::NotFound);
    assert_eq!(code(task.kill(9).await), Code::NotFound);
    task.remove().await
}

pub(crate) async fn a_running_task_is_not_deleted(stage: &Stage) -> Result<()> {
    let task = stage
        .container("delete-early")
        .shell("sleep 1000")
        .run()
        .await?;
    assert_eq!(code(task.delete().await), Code::Unknown);
    assert_eq!(task.state().await?, State::Running);
    task.remove().await
}

pub(crate) async fn pids_are_those_of_the_cgroup(stage: &Stage) -> Result<()> {
    let task = stage
        .container("pids")
        .shell("sleep 1000 & sleep 1000 & wait")
        .create()
        .await?;
    let init = task.start().await?;
    let exec = task.exec("one", &["sleep", "1000"]).add().await?;
    let exec_pid = exec.start().await?;
    let all = poll::until("four processes", async || {
        Ok(Some(task.processes().await?).filter(|all| all.len() == 4))
    });
    let all = all.await?;
    assert!(
        all.iter()
            .any(|process| process.pid == init && process.info.is_none())
    );
    let info = all
        .iter()
        .find(|process| process.pid == exec_pid)
        .and_then(|process| process.info.clone());
    let info = info.context("the exec's process comes without details")?;
    assert!(
        info.type_url.ends_with("containerd.runc.v1.ProcessDetails"),
        "{}",
        info.type_url
    );
    assert!(info.value.ends_with(b"one"));
    task.remove().await
}

pub(crate) async fn resources_can_be_updated(stage: &Stage) -> Result<()> {
    let task = stage
        .container("update")
        .memory_limit(64 << 20)
        .shell("sleep 1000")
        .run()
        .await?;
    assert_eq!(memory_limit(stage, &task).await?, 64 << 20);
    task.update(&json!({"memory": {"limit": 96 << 20}})).await?;
    assert_eq!(memory_limit(stage, &task).await?, 96 << 20);
    task.kill(9).await?;
    task.wait().await?;
    assert_eq!(
        code(task.update(&json!({"memory": {"limit": 64 << 20}})).await),
        Code::Unknown
    );
    task.remove().await
}

async fn memory_limit(stage: &Stage, task: &rekindle_harness::Container<'_>) -> Result<u64> {
    let cgroup = stage.node.cgroup_of(task.id());
    let script = format!(
        "cat /sys/fs/cgroup/memory{cgroup}/memory.limit_in_bytes 2>/dev/null || cat /sys/fs/cgroup{cgroup}/memory.max"
    );
    Ok(stage
        .node
        .run(["sh", "-c", &script])
        .await?
        .trim()
        .parse()?)
}

pub(crate) async fn events_come_in_order(stage: &Stage) -> Result<()> {
    let events = stage.node.events().await?;
    let task = stage
        .container("events")
        .stdin()
        .shell("read line; exit 4")
        .create()
        .await?;
    let pid = task.start().await?;
    let exec = task.exec("extra", &["sh", "-c", "exit 9"]).add().await?;
    let exec_pid = exec.start().await?;
    exec.wait().await?;
    exec.delete().await?;
    task.pause().await?;
    task.resume().await?;
    task.io().writer()?.write("go\n")?;
    task.wait().await?;
    task.delete().await?;
    // containerd's own shim may be shut down before it has sent the last event; ours may not lose it.
    let got = match stage.node.runtime() {
        Runtime::Go => events.until_exit("events").await?,
        Runtime::Rekindle => events.until("events", "TaskDelete").await?,
    };
    let told: Vec<_> = got
        .iter()
        .map(|e| (e.name.as_str(), e.process.as_str(), e.pid, e.status))
        .collect();
    let expected = [
        ("TaskCreate", "", pid, 0),
        ("TaskStart", "", pid, 0),
        ("TaskExecAdded", "extra", 0, 0),
        ("TaskExecStarted", "extra", exec_pid, 0),
        ("TaskExit", "extra", exec_pid, 9),
        ("TaskPaused", "", 0, 0),
        ("TaskResumed", "", 0, 0),
        ("TaskExit", "events", pid, 4),
        ("TaskDelete", "", pid, 4),
    ];
    assert_eq!(told, expected[..told.len().max(8)]);
    task.remove().await
}

#[derive(Clone, PartialEq, Message)]
struct RuntimeInfo {
    #[prost(string, tag = "1")]
    name: String,
}

pub(crate) async fn the_shim_tells_about_itself(stage: &Stage) -> Result<()> {
    if stage.node.runtime() == Runtime::Go && stage.node.suite() == Suite::Trixie {
        return Ok(()); // containerd 1.7 does not ask, and its shim does not know the flag
    }
    let out = stage
        .node
        .exec(["containerd-shim-runc-v2", "-info"])
        .await?;
    ensure!(
        out.status.success(),
        "-info ended with {}: {}",
        out.status,
        String::from_utf8_lossy(&out.stderr)
    );
    let info = RuntimeInfo::decode(out.stdout.as_slice())?;
    assert!(info.name.starts_with("io.containerd."), "{info:?}");
    Ok(())
}

pub(crate) async fn the_shim_is_the_one_under_test(stage: &Stage) -> Result<()> {
    let task = stage.container("which").shell("sleep 1000").run().await?;
    let (pid, _) = stage.node.shim_of("which")?;
    let program = std::fs::read_link(format!("/proc/{pid}/exe"))?;
    let expected = match stage.node.runtime() {
        Runtime::Go => "/usr/bin/containerd-shim-runc-v2",
        Runtime::Rekindle => "/opt/rekindle/bin/containerd-shim-rekindle-v1",
    };
    assert!(
        program.ends_with(expected.trim_start_matches('/')),
        "the shim is {}",
        program.display()
    );
    task.remove().await
}

pub(crate) async fn our_shim_answers_to_its_own_name(stage: &Stage) -> Result<()> {
    if stage.node.runtime() == Runtime::Go {
        return Ok(());
    }
    let task = stage
        .container("own-name")
        .runtime("io.containerd.rekindle.v1")
        .shell("exit 7")
        .run()
        .await?;
    assert_eq!(task.wait().await?.status, 7);
    task.remove().await
}

pub(crate) async fn nothing_stays_after_delete(stage: &Stage) -> Result<()> {
    let task = stage
        .container("traceless")
        .shell("sleep 1000 & wait")
        .run()
        .await?;
    task.kill(9).await?;
    task.wait().await?;
    task.delete().await?;
    is_gone(stage, "traceless").await?;
    task.remove().await
}

/// Waits until nothing of a container is left on the node.
pub(crate) async fn is_gone(stage: &Stage, id: &str) -> Result<()> {
    stage.node.is_rid_of(id).await
}
