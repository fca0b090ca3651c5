//! Killed at the worst time.

use crate::command::generations;
use crate::heap::{CHANGING, heap};
use crate::stage::{RESTORE_FROM, Stage, continues, counts_to, one_sentence};
use anyhow::{Context, Result, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use rekindle_core::step::CheckpointStep as Step;
use rekindle_harness::container::State;
use rekindle_harness::{Container, Count, poll};
use std::time::{Duration, Instant};

/// The folders of images that are being made, or were.
pub(crate) async fn partial(stage: &Stage) -> Result<Vec<String>> {
    let found = stage
        .node
        .run([
            "sh",
            "-c",
            "find /var/lib/rekindle/images/.partial -mindepth 1 -maxdepth 1 2>/dev/null; true",
        ])
        .await?;
    Ok(found.lines().map(str::to_owned).collect())
}

/// What a checkpoint is that comes to the step. A step that is new has to say it, and then is killed in, and has its disk
/// full, too.
pub(crate) fn more_for(step: Step) -> &'static [&'static str] {
    match step {
        Step::Facts
        | Step::Where
        | Step::Begin
        | Step::Precopy
        | Step::Hold
        | Step::Dump
        | Step::Release
        | Step::Seal => &[],
        Step::Kill => &["--exit"],
    }
}

/// Whatever the shim is doing: the container ends, and there is a whole image or none, and nothing else.
pub(crate) async fn the_shim_is_killed_in_each_step_of_a_checkpoint(stage: &Stage) -> Result<()> {
    for step in Step::ALL {
        let id = format!("dies-at-{}", step.name());
        let task = stage.container(&id).args(&["awk", CHANGING]).run().await?;
        counts_to(task.io().out()?, 1).await?;
        let killed = killed_at(stage, task, *step).await;
        killed.with_context(|| format!("killed at {step:?}"))?;
    }
    Ok(())
}

/// Kills the shim of a container when its checkpoint comes to a step: it ends, and its image is whole or none.
pub(crate) async fn killed_at(stage: &Stage, task: Container<'_>, step: Step) -> Result<()> {
    let id = task.id().to_owned();
    let id = id.as_str();
    let (shim, _) = stage.node.shim_of(id)?;
    let args = [&["checkpoint", id, "--name", id], more_for(step)].concat();
    let strike = async {
        stage
            .node
            .logs(&[&format!("begins id={id:?} step={step:?}")])
            .await?;
        Ok::<_, anyhow::Error>(kill(Pid::from_raw(shim.try_into()?), Signal::SIGKILL)?)
    };
    let (output, struck) = tokio::join!(stage.rekindle(&args), strike);
    struck?;
    let output = output?;
    stage.node.is_rid_of(id).await?;
    // Killed behind its last act it may have answered.
    let whole = stage.images().await?.contains(&id.to_owned());
    ensure!(whole || output.status.code() == Some(1), "{output:?}");
    if whole {
        let verified = stage.rekindle(&["image", "verify", id]).await?;
        ensure!(verified.status.success(), "{verified:?}");
        stage.rekindle(&["image", "rm", id]).await?;
    }
    poll::until("the partial image to go", async || {
        Ok(partial(stage).await?.is_empty().then_some(()))
    })
    .await?;
    task.remove().await
}

/// Whoever asks for it: the container runs on, or has ended as it was asked for, and there is a whole image or none.
pub(crate) async fn the_command_is_killed_in_each_step_of_a_checkpoint(
    stage: &Stage,
) -> Result<()> {
    for step in Step::ALL {
        let id = format!("asker-dies-at-{}", step.name());
        let killed = asker_killed_at(stage, &id, *step).await;
        killed.with_context(|| format!("killed at {step:?}"))?;
    }
    println!("{} steps", Step::ALL.len());
    Ok(())
}

async fn asker_killed_at(stage: &Stage, id: &str, step: Step) -> Result<()> {
    let task = stage.container(id).args(&["/counter"]).run().await?;
    let before = counts_to(task.io().out()?, 2).await?;
    let more = more_for(step);
    let args = [&["checkpoint", id, "--name", id], more].concat();
    let strike = async {
        stage
            .node
            .logs(&[&format!("begins id={id:?} step={step:?}")])
            .await?;
        let words = format!("rekindle checkpoint {id}");
        for (pid, _) in stage.node.processes_with(&[&words])? {
            kill(Pid::from_raw(pid.try_into()?), Signal::SIGKILL)?;
        }
        anyhow::Ok(())
    };
    let (output, struck) = tokio::join!(stage.rekindle(&args), strike);
    struck?;
    // It may have been over.
    let asked = output?.status.success();
    poll::until("the partial image to go", async || {
        Ok(partial(stage).await?.is_empty().then_some(()))
    })
    .await?;
    let whole = stage.images().await?.contains(&id.to_owned());
    ensure!(whole || !asked, "it was told of an image that is not there");
    if whole && more.contains(&"--exit") {
        assert_eq!(task.wait().await?.status, 137);
    } else {
        counts_to(task.io().out()?, before.n + 3).await?;
        let text = task.io().out()?.so_far();
        let first = Count::first(&text).context("the counter said nothing")?;
        first.continues_in(&text, first.n)?;
        assert_eq!(task.state().await?, State::Running);
    }
    if whole {
        let verified = stage.rekindle(&["image", "verify", id]).await?;
        ensure!(verified.status.success(), "{verified:?}");
        stage.rekindle(&["image", "rm", id]).await?;
    }
    task.remove().await?;
    stage.node.is_rid_of(id).await
}

/// Where CRIU stands still, and holds the tasks.
pub(crate) async fn the_shim_is_killed_during_a_checkpoint(stage: &Stage) -> Result<()> {
    let task = heap(stage, "shim-dies").run().await?;
    counts_to(task.io().out()?, 1).await?;
    let (shim, _) = stage.node.shim_of("shim-dies")?;
    let args = ["checkpoint", "shim-dies", "--name", "shim-dies"];
    let strike = async {
        // The dump has begun, and stands still.
        stage.node.catch(&["criu", "swrk"], Signal::SIGSTOP).await?;
        Ok::<_, anyhow::Error>(kill(Pid::from_raw(shim.try_into()?), Signal::SIGKILL)?)
    };
    let (output, struck) = tokio::join!(stage.rekindle(&args), strike);
    struck?;
    let output = output?;
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    stage.node.is_rid_of("shim-dies").await?;
    assert!(!stage.images().await?.contains(&"shim-dies".to_owned()));
    poll::until("the partial image to go", async || {
        Ok(partial(stage).await?.is_empty().then_some(()))
    })
    .await?;
    task.remove().await
}

pub(crate) async fn the_command_is_killed_during_a_checkpoint(stage: &Stage) -> Result<()> {
    let task = stage
        .container("command-dies")
        .args(&["/counter"])
        .run()
        .await?;
    let before = counts_to(task.io().out()?, 2).await?;
    let args = ["checkpoint", "command-dies", "--name", "command-dies"];
    let strike = async {
        let dump = stage.node.catch(&["criu", "swrk"], Signal::SIGSTOP).await?;
        stage
            .node
            .catch(&["rekindle checkpoint command-dies"], Signal::SIGKILL)
            .await?;
        Ok::<_, anyhow::Error>(kill(dump, Signal::SIGCONT)?)
    };
    let (output, struck) = tokio::join!(stage.rekindle(&args), strike);
    struck?;
    ensure!(!output?.status.success(), "a killed command ended well");
    // It goes on as before; what was begun is either whole or nowhere.
    counts_to(task.io().out()?, before.n + 20).await?;
    assert_eq!(task.state().await?, State::Running);
    poll::until("the partial image to go", async || {
        Ok(partial(stage).await?.is_empty().then_some(()))
    })
    .await?;
    let whole = generations(stage, "command-dies").await?;
    ensure!(whole.is_empty() || whole == [1], "{whole:?}");
    // The next one of that name is the next in number, and nothing that was begun is in its way.
    let made = stage
        .checkpoint("command-dies", "command-dies", &[])
        .await?;
    let all: Vec<u64> = (1..=whole.len() as u64 + 1).collect();
    assert_eq!(made["generation"].as_u64().as_ref(), all.last());
    assert_eq!(generations(stage, "command-dies").await?, all);
    let at = counts_to(task.io().out()?, before.n).await?;
    for generation in all {
        let image = format!("command-dies@{generation}");
        let verified = stage.rekindle(&["image", "verify", &image]).await?;
        ensure!(verified.status.success(), "{verified:?}");
        let warm = stage.warm(&format!("command-dies-{generation}"), &image);
        let warm = warm.run().await?;
        continues(&warm, &before, at.n).await?;
        warm.remove().await?;
    }
    task.remove().await
}

/// A restore that stands still, because its CRIU does.
pub(crate) async fn calls_are_answered_while_a_restore_runs(stage: &Stage) -> Result<()> {
    let (task, before) = stage.lived_in("slow").await?;
    stage.checkpoint("slow", "slow", &[]).await?;
    let at = counts_to(task.io().out()?, before.n).await?;
    let warm = stage.warm("slow-2", "slow").create().await?;
    let meanwhile = async {
        let criu = stage.node.catch(&["criu", "swrk"], Signal::SIGSTOP).await?;
        let since = Instant::now();
        let state = warm.state().await?;
        let took = since.elapsed();
        // Nothing on the way waits for the restore; a loaded machine may still take its time.
        ensure!(took < Duration::from_secs(5), "State took {took:?}");
        ensure!(
            state == State::Created,
            "a container that is being restored is {state:?}"
        );
        Ok::<_, anyhow::Error>(kill(criu, Signal::SIGCONT)?)
    };
    let (started, met) = tokio::join!(warm.start(), meanwhile);
    met?;
    started?;
    continues(&warm, &before, at.n).await?;
    warm.remove().await?;
    task.remove().await
}

/// In one pod, and so in one shim. The restore stands still; what waited for it would not be answered.
pub(crate) async fn a_long_restore_delays_nobody_else(stage: &Stage) -> Result<()> {
    let cri = stage.node.cri().await?;
    let old = cri.pod("long-old").run().await?;
    let task = old.container("main").args(&["/counter"]).run().await?;
    let before = task.counts_to(3).await?;
    stage
        .checkpoint("long-old/main", "long", &["--exit"])
        .await?;
    let at = Count::last(&task.said("stdout")?).context("the counter said nothing")?;
    old.remove().await?;

    let pod = cri.pod("long-new").annotation(RESTORE_FROM, "long");
    let pod = pod.annotation("rekindle.dev/container", "main");
    let pod = pod.run().await?;
    let beside = pod.container("beside").args(&["/counter"]).run().await?;
    let doomed = pod.container("doomed").args(&["/counter"]).run().await?;
    let warm = pod.container("main").args(&["/counter"]).create().await?;
    let calls = async {
        assert_eq!(beside.shell("echo answered").await?, "answered");
        doomed.stop(0).await?;
        assert_eq!(doomed.ended().await?.exit_code, 137);
        doomed.remove().await?;
        let more = pod.container("more").shell("exit 7").run().await?;
        assert_eq!(more.ended().await?.exit_code, 7);
        // containerd asks for the state of each; what is being restored is not running yet.
        let ctr = ["ctr", "--namespace", "k8s.io", "tasks", "ls"];
        let listed = stage.node.run(ctr).await?;
        let state = |id: &str| {
            let mut line = listed
                .lines()
                .find(|line| line.starts_with(id))?
                .split_whitespace();
            line.nth(2).map(str::to_owned)
        };
        assert_eq!(state(beside.id()).as_deref(), Some("RUNNING"), "{listed}");
        assert_eq!(state(warm.id()).as_deref(), Some("CREATED"), "{listed}");
        let ctr = [
            "ctr",
            "--namespace",
            "k8s.io",
            "tasks",
            "exec",
            "--exec-id",
            "early",
        ];
        let exec = [&ctr[..], &[warm.id(), "true"]].concat();
        let mut exec = tokio::process::Command::from(stage.node.command(&exec));
        let refused = exec.kill_on_drop(true).output().await?;
        ensure!(
            !refused.status.success(),
            "something ran in it: {refused:?}"
        );
        anyhow::Ok(())
    };
    let meanwhile = async {
        let criu = stage.node.catch(&["criu", "swrk"], Signal::SIGSTOP).await?;
        // Less than a restore may take: nothing ends in the meantime by itself.
        let answered = tokio::time::timeout(*poll::DEADLINE, calls).await;
        kill(criu, Signal::SIGCONT)?;
        answered.context("a call waited for the restore of another container")?
    };
    let (started, met) = tokio::join!(warm.start(), meanwhile);
    met?;
    started?;
    warm.counts_to(at.n + 3).await?;
    before.continues_in(&warm.said("stdout")?, at.n)?;
    pod.remove().await
}

pub(crate) async fn a_restore_is_killed(stage: &Stage) -> Result<()> {
    let (task, _) = stage.lived_in("given-up").await?;
    stage.checkpoint("given-up", "given-up", &[]).await?;
    task.remove().await?;
    let warm = stage
        .container("given-up-2")
        .args(&["/counter"])
        .annotation(RESTORE_FROM, "given-up")
        .create()
        .await?;
    let meanwhile = async {
        stage.node.catch(&["criu", "swrk"], Signal::SIGSTOP).await?;
        let since = Instant::now();
        warm.kill(9).await?;
        Ok::<_, anyhow::Error>(since.elapsed())
    };
    let (started, killed) = tokio::join!(warm.start(), meanwhile);
    let took = killed?;
    ensure!(took < Duration::from_secs(10), "Kill took {took:?}");
    ensure!(started.is_err(), "a restore that was killed ended well");
    warm.delete().await?;
    stage.node.is_rid_of("given-up-2").await?;
    warm.remove().await
}

/// The steps of a start from an image, as the shim's log has them.
const STEPS: [&str; 7] = [
    "data",
    "streams",
    "image",
    "verify",
    "stage",
    "rootfs",
    "runc restore",
];

/// Whoever makes room asks for it then: the image stays, and the container goes on, or it is gone, and the container is
/// refused for that.
pub(crate) async fn an_image_is_removed_in_each_step_of_a_start_from_it(
    stage: &Stage,
) -> Result<()> {
    let task = stage.container("goes").args(&["/counter"]).run().await?;
    let (mut started, mut refused) = (0, 0);
    for step in STEPS {
        let from = counts_to(task.io().out()?, 2).await?;
        let name = format!("goes-at-{}", step.replace(' ', "-"));
        stage.checkpoint("goes", &name, &[]).await?;
        let at = counts_to(task.io().out()?, from.n).await?;
        let line = format!("begins id={name:?} step={step:?}");
        let line = [line.as_str()];
        let remove = async {
            stage.node.logs(&line).await?;
            stage.rekindle(&["image", "rm", &name]).await
        };
        let begin = async {
            let (warm, created) = stage.warm(&name, &name).try_create().await?;
            if let Err(refusal) = created {
                // It has come no further.
                one_sentence(&refusal, &["there is no image"])?;
                warm.remove().await?;
                return Ok(None);
            }
            warm.start().await?;
            Ok::<_, anyhow::Error>(Some(warm))
        };
        let (removed, begun) = tokio::join!(remove, begin);
        let (removed, begun) = (removed?, begun.with_context(|| format!("at {step:?}"))?);
        let said = String::from_utf8_lossy(&removed.stderr);
        ensure!(
            removed.status.success() || said.contains("in use"),
            "at {step:?}: {removed:?}"
        );
        match begun {
            Some(warm) => {
                continues(&warm, &from, at.n).await?;
                warm.remove().await?;
                started += 1;
            }
            None => refused += 1,
        }
        // What was kept is nobody's by now.
        if !removed.status.success() {
            stage.rekindle(&["image", "rm", &name]).await?;
        }
    }
    println!(
        "removed in {} steps: {started} went on, {refused} were refused",
        STEPS.len()
    );
    task.remove().await
}
