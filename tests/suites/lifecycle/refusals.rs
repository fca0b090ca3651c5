//! What is refused, and with which code: containerd's clients act on codes.

use crate::{Stage, code};
use anyhow::{Context, Result};
use containerd_client::tonic::Code;
use rekindle_harness::container::State;
use rekindle_harness::options::CheckpointOptions;
use rekindle_harness::shim::{self, ShimCode, api, deadline, protobuf};
use rekindle_harness::{Runtime, Suite};
use serde_json::json;

/// The codes of calls to a shim, in their order.
macro_rules! codes {
    ($shim:ident: $($method:ident $request:ident { $($field:ident),* })*) => {
        [$((
            stringify!($method),
            shim::code($shim.$method(deadline(), &api::$request { $($field: $field.to_owned(),)* ..Default::default() }).await)?,
        )),*]
    };
}

/// A process to be added to a container.
fn exec(id: &str, process: &[u8]) -> api::ExecProcessRequest {
    let mut spec = protobuf::well_known_types::any::Any::new();
    spec.value = process.to_vec();
    api::ExecProcessRequest {
        id: id.to_owned(),
        exec_id: "wrong".to_owned(),
        spec: protobuf::MessageField::some(spec),
        ..Default::default()
    }
}

/// The shim of containerd 1.7 knows only version 2 of the task service.
pub(crate) fn speaks_version_3(stage: &Stage) -> bool {
    stage.node.runtime() == Runtime::Rekindle || stage.node.suite() != Suite::Trixie
}

pub(crate) async fn an_unknown_container_is_not_found_by_the_shim(stage: &Stage) -> Result<()> {
    if !speaks_version_3(stage) {
        return Ok(());
    }
    let task = stage.container("known-shim").shell("sleep 1000").run();
    let task = task.await?;
    let shim = stage.node.shim("known-shim").await?;
    let id = "unknown";
    let answers = codes! { shim:
        state StateRequest { id }
        start StartRequest { id }
        delete DeleteRequest { id }
        resize_pty ResizePtyRequest { id }
        pause PauseRequest { id }
        resume ResumeRequest { id }
        kill KillRequest { id }
        pids PidsRequest { id }
        close_io CloseIORequest { id }
        checkpoint CheckpointTaskRequest { id }
        update UpdateTaskRequest { id }
        wait WaitRequest { id }
        stats StatsRequest { id }
    };
    for (call, code) in answers {
        assert_eq!(code, ShimCode::NOT_FOUND, "{call}");
    }
    let answer = shim.exec(deadline(), &exec(id, b"{}")).await;
    assert_eq!(shim::code(answer)?, ShimCode::NOT_FOUND, "exec");
    task.remove().await
}

pub(crate) async fn an_unknown_process_is_not_found_by_the_shim(stage: &Stage) -> Result<()> {
    if !speaks_version_3(stage) {
        return Ok(());
    }
    let task = stage.container("known-init").shell("sleep 1000").run();
    let task = task.await?;
    let shim = stage.node.shim("known-init").await?;
    let (id, exec_id) = ("known-init", "unknown");
    let answers = codes! { shim:
        state StateRequest { id, exec_id }
        start StartRequest { id, exec_id }
        delete DeleteRequest { id, exec_id }
        resize_pty ResizePtyRequest { id, exec_id }
        kill KillRequest { id, exec_id }
        wait WaitRequest { id, exec_id }
    };
    for (call, code) in answers {
        assert_eq!(code, ShimCode::NOT_FOUND, "{call}");
    }
    // containerd's own shim forgets the class here. Through containerd nobody sees it: it asks for the state first.
    let expected = match stage.node.runtime() {
        Runtime::Go => ShimCode::UNKNOWN,
        Runtime::Rekindle => ShimCode::NOT_FOUND,
    };
    let [(_, answer)] = codes! { shim: close_io CloseIORequest { id, exec_id } };
    assert_eq!(answer, expected);
    task.remove().await
}

/// containerd asks for no second one. Its own shim would forget the first, were the bundle of the second in order.
pub(crate) async fn a_second_create_changes_nothing(stage: &Stage) -> Result<()> {
    if !speaks_version_3(stage) {
        return Ok(());
    }
    let task = stage.container("create-twice").shell("sleep 1000").run();
    let task = task.await?;
    let (shim, id) = (stage.node.shim("create-twice").await?, "create-twice");
    let bundle = "/tmp/no-such-bundle";
    let expected = match stage.node.runtime() {
        Runtime::Go => ShimCode::NOT_FOUND, // the bundle
        Runtime::Rekindle => ShimCode::ALREADY_EXISTS,
    };
    let [(_, answer)] = codes! { shim: create CreateTaskRequest { id, bundle } };
    assert_eq!(answer, expected);
    assert_eq!(task.state().await?, State::Running);
    task.remove().await
}

pub(crate) async fn a_root_that_cannot_be_mounted_leaves_nothing(stage: &Stage) -> Result<()> {
    if !speaks_version_3(stage) {
        return Ok(());
    }
    let task = stage.container("mounted").shell("sleep 1000").run().await?;
    let bundle = "/tmp/bundles/unmounted";
    let make =
        format!("mkdir -p {bundle} && echo '{{\"ociVersion\": \"1.1.0\"}}' > {bundle}/config.json");
    stage.node.run(["sh", "-c", &make]).await?;
    let mount = |kind: &str| api::Mount {
        type_: kind.to_owned(),
        source: "none".to_owned(),
        ..Default::default()
    };
    let request = api::CreateTaskRequest {
        id: "unmounted".to_owned(),
        bundle: bundle.to_owned(),
        rootfs: vec![mount("tmpfs"), mount("no-such-filesystem")],
        ..Default::default()
    };
    let shim = stage.node.shim("mounted").await?;
    let answer = shim.create(deadline(), &request).await;
    assert_eq!(shim::code(answer)?, ShimCode::UNKNOWN);
    let mounts = format!("! grep -F {bundle}/ /proc/self/mountinfo");
    stage.node.run(["sh", "-c", &mounts]).await?;
    task.remove().await
}

pub(crate) async fn checkpoint_options_of_another_kind_are_refused(stage: &Stage) -> Result<()> {
    if !speaks_version_3(stage) {
        return Ok(());
    }
    let task = stage.container("other-options").shell("sleep 1000").run();
    let task = task.await?;
    let mut options = protobuf::well_known_types::any::Any::new();
    options.type_url = "some.other.Options".to_owned();
    options.value = vec![8, 1];
    let request = api::CheckpointTaskRequest {
        id: "other-options".to_owned(),
        path: "/tmp/other-options".to_owned(),
        options: protobuf::MessageField::some(options),
        ..Default::default()
    };
    let expected = match stage.node.runtime() {
        Runtime::Go => ShimCode::UNKNOWN,
        Runtime::Rekindle => ShimCode::INVALID_ARGUMENT,
    };
    let shim = stage.node.shim("other-options").await?;
    let answer = shim.checkpoint(deadline(), &request).await;
    assert_eq!(shim::code(answer)?, expected);
    assert_eq!(task.state().await?, State::Running);
    task.remove().await
}

pub(crate) async fn an_exec_that_was_not_started_waits_or_goes(stage: &Stage) -> Result<()> {
    let task = stage.container("exec-idle").shell("sleep 1000").run();
    let task = task.await?;
    let exec = task.exec("idle", &["sh", "-c", "exit 4"]).add().await?;
    assert_eq!(exec.process().await?.pid, 0);
    assert_eq!(code(exec.kill(9).await), Code::FailedPrecondition);
    exec.resize(80, 25).await?;
    exec.close_stdin().await?;
    assert_eq!(exec.state().await?, State::Created);
    assert_eq!(exec.delete().await?.pid, 0);
    assert_eq!(code(exec.state().await), Code::NotFound);
    // Its id is free again.
    task.exec_again("idle").await?;
    task.remove().await
}

/// With containerd's own shim it has ended in the year 1.
pub(crate) async fn what_never_ran_ends_when_it_is_deleted(stage: &Stage) -> Result<()> {
    if !speaks_version_3(stage) {
        return Ok(());
    }
    let task = stage.container("never-ran").shell("sleep 1000").create();
    let task = task.await?;
    task.exec_again("never").await?;
    let request = api::DeleteRequest {
        id: "never-ran".to_owned(),
        exec_id: "never".to_owned(),
        ..Default::default()
    };
    let shim = stage.node.shim("never-ran").await?;
    let exited = shim.delete(deadline(), &request).await?.exited_at;
    let after_1970 = exited.seconds > 0;
    assert_eq!(after_1970, stage.node.runtime() == Runtime::Rekindle);
    task.remove().await
}

/// containerd's own shim counts an exec that is started twice twice, and then never tells the container's end.
pub(crate) async fn a_running_exec_is_neither_started_again_nor_deleted(
    stage: &Stage,
) -> Result<()> {
    let task = stage.container("exec-busy").shell("sleep 1000").run();
    let task = task.await?;
    let exec = task.exec("busy", &["sleep", "1000"]).run().await?;
    if stage.node.runtime() == Runtime::Rekindle {
        assert_eq!(code(exec.start().await), Code::Unknown);
    }
    assert_eq!(code(exec.delete().await), Code::Unknown);
    assert_eq!(exec.state().await?, State::Running);
    task.remove().await
}

pub(crate) async fn an_ended_exec_is_only_deleted(stage: &Stage) -> Result<()> {
    let task = stage.container("exec-ended").shell("sleep 1000").run();
    let task = task.await?;
    let exec = task.exec("ended", &["sh", "-c", "exit 6"]).terminal();
    let exec = exec.run().await?;
    assert_eq!(exec.wait().await?.status, 6);
    assert_eq!(code(exec.start().await), Code::Unknown);
    assert_eq!(code(exec.resize(80, 25).await), Code::Unknown);
    assert_eq!(code(exec.kill(9).await), Code::NotFound);
    exec.close_stdin().await?;
    assert_eq!(exec.delete().await?.status, 6);
    task.remove().await
}

/// Both show it as created. A second start would end the Go shim.
pub(crate) async fn an_exec_that_could_not_start_is_only_deleted(stage: &Stage) -> Result<()> {
    let task = stage.container("exec-failed").shell("sleep 1000").run();
    let task = task.await?;
    let exec = task.exec("failed", &["/no/such/program"]).add().await?;
    assert_eq!(code(exec.start().await), Code::Unknown);
    assert_eq!(exec.state().await?, State::Created);
    let status = match stage.node.runtime() {
        Runtime::Go => 0,
        Runtime::Rekindle => 255,
    };
    assert_eq!(exec.wait().await?.status, status);
    if stage.node.runtime() == Runtime::Rekindle {
        assert_eq!(code(exec.start().await), Code::Unknown);
    }
    assert_eq!(exec.delete().await?.status, 0);
    task.remove().await
}

pub(crate) async fn of_two_execs_of_one_id_one_is_added(stage: &Stage) -> Result<()> {
    let task = stage.container("exec-race").shell("sleep 1000").run();
    let task = task.await?;
    for round in 0..20 {
        let id = format!("same-{round}");
        let (one, other) = tokio::join!(task.exec_again(&id), task.exec_again(&id));
        let mut codes = [code(one), code(other)];
        codes.sort_by_key(|&code| code as i32);
        assert_eq!(codes, [Code::Ok, Code::AlreadyExists]);
    }
    task.remove().await
}

/// The class of containerd's own shim says nothing; ours says whose mistake it is.
pub(crate) async fn an_exec_that_is_no_json_is_refused(stage: &Stage) -> Result<()> {
    if !speaks_version_3(stage) {
        return Ok(());
    }
    let task = stage.container("exec-json").shell("sleep 1000").run();
    let task = task.await?;
    let shim = stage.node.shim("exec-json").await?;
    let expected = match stage.node.runtime() {
        Runtime::Go => ShimCode::UNKNOWN,
        Runtime::Rekindle => ShimCode::INVALID_ARGUMENT,
    };
    let answer = shim.exec(deadline(), &exec("exec-json", b"not JSON")).await;
    assert_eq!(shim::code(answer)?, expected);
    // Its id is not taken.
    task.exec_again("wrong").await?;
    task.remove().await
}

pub(crate) async fn a_created_task_takes_an_exec_and_a_kill(stage: &Stage) -> Result<()> {
    let events = stage.node.events().await?;
    let task = stage.container("created-killed").shell("sleep 1000");
    let task = task.create().await?;
    task.update(&json!({"memory": {"limit": 96 << 20}})).await?;
    let exec = task.exec("early", &["sh", "-c", "exit 5"]).run().await?;
    assert_eq!(exec.wait().await?.status, 5);
    assert_eq!(task.state().await?, State::Created);
    task.kill(9).await?;
    assert_eq!(task.wait().await?.status, 137);
    assert_eq!(code(task.start().await), Code::Unknown);
    let told = events.until_exit("created-killed").await?;
    assert_eq!(told.last().context("no event")?.status, 137);
    assert_eq!(task.delete().await?.status, 137);
    crate::process::is_gone(stage, "created-killed").await?;
    task.remove().await
}

pub(crate) async fn a_stopped_task_is_only_looked_at_and_deleted(stage: &Stage) -> Result<()> {
    let task = stage.container("stopped").shell("exit 3").run().await?;
    task.wait().await?;
    task.reaches(State::Stopped).await?;
    let options = CheckpointOptions {
        image_path: "/tmp/stopped".into(),
        ..Default::default()
    };
    let (_exec, added) = task.exec("late", &["true"]).try_add().await?;
    for (call, answer) in [
        ("start", task.start().await.map(drop)),
        ("pause", task.pause().await),
        ("resume", task.resume().await),
        ("update", task.update(&json!({})).await),
        ("checkpoint", task.checkpoint(&options).await.map(drop)),
        ("exec", added),
    ] {
        assert_eq!(code(answer), Code::Unknown, "{call}");
    }
    assert_eq!(code(task.kill(9).await), Code::NotFound);
    // To end all there is of what has ended is no mistake.
    task.kill_all(9).await?;
    task.resize(80, 25).await?;
    task.close_stdin().await?;
    assert!(task.pids().await?.is_empty());
    if speaks_version_3(stage) {
        let (shim, id) = (stage.node.shim("stopped").await?, "stopped");
        let [(_, answer)] = codes! { shim: stats StatsRequest { id } };
        // A scope goes with its last process, as soon as systemd comes to it.
        let gone = [ShimCode::NOT_FOUND, ShimCode::UNKNOWN];
        let scope = stage.node.is_a_machine() && gone.contains(&answer);
        assert!(scope || answer == ShimCode::OK, "{answer:?}");
    }
    assert_eq!(task.delete().await?.status, 3);
    task.remove().await
}

pub(crate) async fn a_paused_tasks_execs_are_paused(stage: &Stage) -> Result<()> {
    let task = stage.container("exec-paused").shell("sleep 1000").run();
    let task = task.await?;
    let exec = task.exec("rider", &["sleep", "1000"]).run().await?;
    let idle = task.exec("idle", &["true"]).add().await?;
    task.pause().await?;
    assert_eq!(exec.state().await?, State::Paused);
    assert_eq!(idle.state().await?, State::Paused);
    assert_eq!(code(idle.start().await), Code::Unknown);
    task.update(&json!({"memory": {"limit": 96 << 20}})).await?;
    task.resume().await?;
    assert_eq!(exec.state().await?, State::Running);
    task.remove().await
}

pub(crate) async fn a_task_from_an_image_has_no_process_yet(stage: &Stage) -> Result<()> {
    let image = "/tmp/from-image";
    let options = CheckpointOptions {
        exit: true,
        image_path: image.into(),
        ..Default::default()
    };
    let task = stage.container("from-image-0").args(&["/counter"]);
    let task = task.run().await?;
    task.checkpoint(&options).await?;
    task.wait().await?;
    task.remove().await?;
    let task = stage.container("from-image").args(&["/counter"]);
    let task = task.restore_from(image).create().await?;
    let (_exec, added) = task.exec("early", &["true"]).try_add().await?;
    for (call, answer) in [
        ("pause", task.pause().await),
        ("resume", task.resume().await),
        ("update", task.update(&json!({})).await),
        ("checkpoint", task.checkpoint(&options).await.map(drop)),
        ("exec", added),
        ("pids", task.pids().await.map(drop)),
    ] {
        assert_eq!(code(answer), Code::Unknown, "{call}");
    }
    assert_eq!(code(task.kill(9).await), Code::NotFound);
    assert_eq!(task.state().await?, State::Created);
    if speaks_version_3(stage) {
        let (shim, id) = (stage.node.shim("from-image").await?, "from-image");
        let [(_, answer)] = codes! { shim: stats StatsRequest { id } };
        assert_eq!(answer, ShimCode::NOT_FOUND);
    }
    task.delete().await?;
    crate::process::is_gone(stage, "from-image").await?;
    task.remove().await
}
