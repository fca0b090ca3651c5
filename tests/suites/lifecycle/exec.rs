//! Further processes in a running container.

use crate::{Stage, code};
use anyhow::{Context, Result};
use containerd_client::tonic::Code;
use rekindle_harness::container::State;

pub(crate) async fn exec_has_its_own_environment_folder_and_user(stage: &Stage) -> Result<()> {
    let task = stage
        .container("exec-own")
        .env("WHO=init")
        .shell("sleep 1000")
        .run()
        .await?;
    let exec = task
        .exec(
            "own",
            &[
                "sh",
                "-c",
                "echo $WHO $PWD $(id -u):$(id -g); echo oops >&2",
            ],
        )
        .env("WHO=exec")
        .cwd("/tmp")
        .user(65534, 65534)
        .run()
        .await?;
    assert_eq!(exec.wait().await?.status, 0);
    assert_eq!(exec.io().out()?.text().await?, "exec /tmp 65534:65534\n");
    assert_eq!(exec.io().err()?.text().await?, "oops\n");
    task.remove().await
}

pub(crate) async fn exec_has_its_own_limits(stage: &Stage) -> Result<()> {
    let task = stage
        .container("exec-limits")
        .shell("ulimit -n; sleep 1000");
    let task = task.run().await?;
    let exec = task.exec("limited", &["sh", "-c", "ulimit -n"]);
    let exec = exec.open_files(77).run().await?;
    assert_eq!(exec.io().out()?.text().await?, "77\n");
    let out = task.io().out()?;
    out.until("its own limit", |text| text == "1024\n").await?;
    task.remove().await
}

pub(crate) async fn exec_reports_its_own_status(stage: &Stage) -> Result<()> {
    let task = stage
        .container("exec-status")
        .shell("sleep 1000")
        .run()
        .await?;
    let exec = task.exec("seven", &["sh", "-c", "exit 7"]).add().await?;
    assert_eq!(exec.state().await?, State::Created);
    let pid = exec.start().await?;
    assert_eq!(exec.wait().await?.status, 7);
    assert_eq!(exec.state().await?, State::Stopped);
    let ended = exec.delete().await?;
    assert_eq!((ended.status, ended.pid), (7, pid));
    assert_eq!(task.state().await?, State::Running);
    task.remove().await
}

pub(crate) async fn exec_on_a_terminal(stage: &Stage) -> Result<()> {
    let task = stage
        .container("exec-terminal")
        .shell("sleep 1000")
        .run()
        .await?;
    let line = "test -t 0 && echo terminal; read line; stty size; echo got $line";
    let exec = task
        .exec("tty", &["sh", "-c", line])
        .terminal()
        .stdin()
        .run()
        .await?;
    exec.io()
        .out()?
        .until("the prompt", |text| text.contains("terminal\r\n"))
        .await?;
    exec.resize(81, 25).await?;
    let mut stdin = exec.io().writer()?;
    stdin.write("word\n")?;
    assert_eq!(exec.wait().await?.status, 0);
    assert_eq!(
        exec.io().out()?.text().await?,
        "terminal\r\nword\r\n25 81\r\ngot word\r\n"
    );
    task.remove().await
}

pub(crate) async fn exec_stdin_can_be_closed(stage: &Stage) -> Result<()> {
    let task = stage
        .container("exec-stdin")
        .shell("sleep 1000")
        .run()
        .await?;
    let exec = task
        .exec("cat", &["sh", "-c", "cat; exit 5"])
        .stdin()
        .run()
        .await?;
    exec.io().writer()?.write("through\n")?;
    exec.io()
        .out()?
        .until("the echo", |text| text == "through\n")
        .await?;
    exec.close_stdin().await?;
    assert_eq!(exec.wait().await?.status, 5);
    task.remove().await
}

pub(crate) async fn exec_is_killed_alone(stage: &Stage) -> Result<()> {
    let task = stage
        .container("exec-killed")
        .shell("sleep 1000")
        .run()
        .await?;
    let exec = task.exec("victim", &["sleep", "1000"]).run().await?;
    exec.kill(9).await?;
    assert_eq!(exec.wait().await?.status, 137);
    assert_eq!(code(exec.kill(9).await), Code::NotFound);
    assert_eq!(task.state().await?, State::Running);
    task.remove().await
}

pub(crate) async fn a_second_exec_of_the_same_id_is_refused(stage: &Stage) -> Result<()> {
    let task = stage
        .container("exec-twice")
        .shell("sleep 1000")
        .run()
        .await?;
    let first = task.exec("same", &["sleep", "1000"]).run().await?;
    assert_eq!(code(task.exec_again("same").await), Code::AlreadyExists);
    assert_eq!(first.state().await?, State::Running);
    task.remove().await
}

pub(crate) async fn a_missing_program_fails_the_exec_alone(stage: &Stage) -> Result<()> {
    let task = stage
        .container("exec-missing")
        .shell("sleep 1000")
        .run()
        .await?;
    let exec = task.exec("missing", &["/no/such/program"]).add().await?;
    let refusal = exec
        .start()
        .await
        .err()
        .context("an exec without its program was started")?;
    assert!(refusal.message().contains("/no/such/program"), "{refusal}");
    assert_eq!(refusal.code(), Code::Unknown);
    assert_ne!(exec.state().await?, State::Running);
    exec.delete().await?;
    assert_eq!(task.state().await?, State::Running);
    task.remove().await
}

pub(crate) async fn exec_in_a_stopped_task_is_refused(stage: &Stage) -> Result<()> {
    let task = stage.container("exec-late").shell("exit 0").run().await?;
    task.wait().await?;
    let (_exec, added) = task.exec("late", &["true"]).try_add().await?;
    assert_eq!(code(added), Code::Unknown);
    task.remove().await
}

pub(crate) async fn the_inits_end_is_told_last(stage: &Stage) -> Result<()> {
    let events = stage.node.events().await?;
    let task = stage
        .container("exec-last")
        .shell("sleep 1000")
        .run()
        .await?;
    task.exec("rider", &["sleep", "1000"]).run().await?;
    task.kill(9).await?;
    task.wait().await?;
    task.delete().await?;
    let got = events.until_exit("exec-last").await?;
    let exits: Vec<_> = got
        .iter()
        .filter(|e| e.name == "TaskExit")
        .map(|e| (e.process.as_str(), e.status))
        .collect();
    assert_eq!(exits, [("rider", 137), ("exec-last", 137)]);
    task.remove().await
}
