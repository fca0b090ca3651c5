//! Checkpoint and restore through containerd's task API, with plain CRIU images.

use crate::{Stage, code, process::is_gone};
use anyhow::{Context, Result, ensure};
use containerd_client::tonic::Code;
use rekindle_harness::container::State;
use rekindle_harness::fifo::Reader;
use rekindle_harness::options::CheckpointOptions;
use rekindle_harness::{Container, Runtime};

fn to(folder: &str, exit: bool) -> CheckpointOptions {
    CheckpointOptions {
        exit,
        image_path: folder.to_owned(),
        ..Default::default()
    }
}

/// The counter's nonce and last number in an output.
fn last(text: &str) -> Option<(String, u64)> {
    let whole = &text[..text.rfind('\n')?];
    let (nonce, n) = whole.lines().last()?.split_once(' ')?;
    Some((nonce.to_owned(), n.parse().ok()?))
}

fn first(text: &str) -> Option<(String, u64)> {
    last(&text[..=text.find('\n')?])
}

async fn counts_to(out: &Reader, at_least: u64) -> Result<(String, u64)> {
    let text = out
        .until("the counter", |text| {
            last(text).is_some_and(|(_, n)| n >= at_least)
        })
        .await?;
    last(&text).context("the counter's output is not a counter's")
}

/// Asserts that the restored counter is the dumped one, gone on without a gap or a repetition.
async fn continues(
    restored: &Container<'_>,
    nonce: &str,
    dumped_from: u64,
    dumped_until: u64,
) -> Result<u64> {
    let out = restored.io().out()?;
    let text = out
        .until("the restored counter", |text| {
            last(text).is_some_and(|(_, n)| n > dumped_until)
        })
        .await?;
    let (other, n) = first(&text).context("the restored counter said nothing")?;
    ensure!(
        other == nonce,
        "the restored counter's nonce is {other}, the dumped one's was {nonce}"
    );
    ensure!(
        (dumped_from..=dumped_until + 1).contains(&n),
        "the restored counter begins with {n}; it was dumped between {dumped_from} and {dumped_until}"
    );
    Ok(n)
}

pub(crate) async fn leave_running_goes_on_and_the_image_continues(stage: &Stage) -> Result<()> {
    let task = stage
        .container("dump-leave")
        .args(&["/counter"])
        .run()
        .await?;
    let (nonce, before) = counts_to(task.io().out()?, 5).await?;
    task.checkpoint(&to("/tmp/dump-leave", false)).await?;
    assert_eq!(task.state().await?, State::Running);
    let (_, after) = counts_to(task.io().out()?, before).await?;
    counts_to(task.io().out()?, after + 5).await?;

    let restored = stage
        .container("dump-leave-2")
        .args(&["/counter"])
        .restore_from("/tmp/dump-leave")
        .create()
        .await?;
    let process = restored.process().await?;
    assert_eq!((process.status(), process.pid), (State::Created, 0));
    let pid = restored.start().await?;
    assert!(pid > 0);
    let process = restored.process().await?;
    assert_eq!((process.status(), process.pid), (State::Running, pid));
    continues(&restored, &nonce, before, after + 1).await?;
    // The restored task is a task like any other.
    let exec = restored.exec("in", &["sh", "-c", "exit 3"]).run().await?;
    assert_eq!(exec.wait().await?.status, 3);
    restored.pause().await?;
    restored.resume().await?;
    restored.kill(9).await?;
    assert_eq!(restored.wait().await?.status, 137);
    restored.delete().await?;
    is_gone(stage, "dump-leave-2").await?;
    restored.remove().await?;
    task.remove().await
}

/// What CRIU refuses without the options that allow it: a terminal, and a lock on a file.
pub(crate) async fn a_task_with_a_terminal_and_a_lock_continues(stage: &Stage) -> Result<()> {
    let line = "exec 9< /counter; flock 9; echo ready; while read line; do echo got $line; done";
    let with = |id| stage.container(id).terminal().stdin().shell(line);
    let says = async |task: &Container<'_>, typed: &str| {
        task.io().writer()?.write(&format!("{typed}\n"))?;
        let answer = format!("got {typed}\r\n");
        let out = task.io().out()?;
        out.until("the answer", |text| text.contains(&answer))
            .await
            .map(drop)
    };
    let task = with("dump-terminal").run().await?;
    let out = task.io().out()?;
    out.until("the shell", |text| text.contains("ready\r\n"))
        .await?;
    says(&task, "before").await?;
    let options = CheckpointOptions {
        terminal: true,
        file_locks: true,
        work_path: "/tmp/dump-terminal-work".to_owned(),
        ..to("/tmp/dump-terminal", true)
    };
    task.checkpoint(&options).await?;
    assert_eq!(task.wait().await?.status, 137);
    task.reaches(State::Stopped).await?;
    // The folder is the caller's, with CRIU's log in it.
    stage
        .node
        .run(["test", "-e", "/tmp/dump-terminal-work/dump.log"])
        .await?;
    task.delete().await?;
    let restored = with("dump-terminal-2");
    let restored = restored.restore_from("/tmp/dump-terminal").run().await?;
    says(&restored, "after").await?;
    restored.remove().await?;
    task.remove().await
}

pub(crate) async fn exit_ends_the_task_and_the_image_continues(stage: &Stage) -> Result<()> {
    let task = stage
        .container("dump-exit")
        .args(&["/counter"])
        .run()
        .await?;
    let (nonce, before) = counts_to(task.io().out()?, 5).await?;
    task.checkpoint(&to("/tmp/dump-exit", true)).await?;
    assert_eq!(task.wait().await?.status, 137);
    task.reaches(State::Stopped).await?;
    let (_, at) = last(&task.io().out()?.text().await?).context("the counter said nothing")?;
    task.delete().await?;
    is_gone(stage, "dump-exit").await?;
    let restored = stage
        .container("dump-exit-2")
        .args(&["/counter"])
        .restore_from("/tmp/dump-exit")
        .run()
        .await?;
    continues(&restored, &nonce, before, at).await?;
    restored.remove().await?;
    task.remove().await
}

pub(crate) async fn an_image_in_the_content_store_continues(stage: &Stage) -> Result<()> {
    let task = stage
        .container("dump-content")
        .args(&["/counter"])
        .run()
        .await?;
    let (nonce, before) = counts_to(task.io().out()?, 5).await?;
    let stored = task.checkpoint(&to("", true)).await?;
    assert_eq!(task.wait().await?.status, 137);
    let (_, at) = last(&task.io().out()?.text().await?).context("the counter said nothing")?;
    let kind = "application/vnd.containerd.container.criu.checkpoint.criu.tar";
    let image = stored.into_iter().find(|one| one.media_type == kind);
    let image = image.context("the answer names no CRIU image in the content store")?;
    let restored = stage
        .container("dump-content-2")
        .args(&["/counter"])
        .restore_from_content(image)
        .run()
        .await?;
    continues(&restored, &nonce, before, at).await?;
    restored.remove().await?;
    task.remove().await
}

pub(crate) async fn a_paused_task_stays_paused_over_a_checkpoint(stage: &Stage) -> Result<()> {
    let task = stage
        .container("dump-paused")
        .args(&["/counter"])
        .run()
        .await?;
    let (nonce, before) = counts_to(task.io().out()?, 5).await?;
    task.pause().await?;
    task.checkpoint(&to("/tmp/dump-paused", false)).await?;
    assert_eq!(task.state().await?, State::Paused);
    task.resume().await?;
    assert_eq!(task.state().await?, State::Running);
    counts_to(task.io().out()?, before + 5).await?;
    let restored = stage
        .container("dump-paused-2")
        .args(&["/counter"])
        .restore_from("/tmp/dump-paused")
        .run()
        .await?;
    continues(&restored, &nonce, before, before + 10).await?;
    restored.remove().await?;
    task.remove().await
}

pub(crate) async fn a_restored_task_can_be_checkpointed_again(stage: &Stage) -> Result<()> {
    let task = stage.container("again").args(&["/counter"]).run().await?;
    let (nonce, mut from) = counts_to(task.io().out()?, 5).await?;
    task.checkpoint(&to("/tmp/again-1", true)).await?;
    task.wait().await?;
    let (_, mut until) =
        last(&task.io().out()?.text().await?).context("the counter said nothing")?;
    task.remove().await?;
    for round in 1..=2 {
        let image = format!("/tmp/again-{round}");
        let restored = stage
            .container(&format!("again-r{round}"))
            .args(&["/counter"])
            .restore_from(&image)
            .run()
            .await?;
        continues(&restored, &nonce, from, until).await?;
        (_, from) = counts_to(restored.io().out()?, until + 5).await?;
        restored
            .checkpoint(&to(&format!("/tmp/again-{}", round + 1), true))
            .await?;
        restored.wait().await?;
        (_, until) =
            last(&restored.io().out()?.text().await?).context("the counter said nothing")?;
        restored.remove().await?;
    }
    Ok(())
}

pub(crate) async fn a_created_task_is_not_checkpointed(stage: &Stage) -> Result<()> {
    let task = stage
        .container("dump-created")
        .args(&["/counter"])
        .create()
        .await?;
    assert_eq!(
        code(task.checkpoint(&to("/tmp/dump-created", false)).await),
        Code::Unknown
    );
    assert_eq!(task.state().await?, State::Created);
    task.remove().await
}

pub(crate) async fn a_broken_image_fails_the_start_and_leaves_nothing(stage: &Stage) -> Result<()> {
    stage.node.run(["mkdir", "-p", "/tmp/no-image"]).await?;
    let (task, created) = stage
        .container("no-image")
        .args(&["/counter"])
        .restore_from("/tmp/no-image")
        .try_create()
        .await?;
    let refusal = match created {
        Err(refusal) => refusal,
        Ok(_) => {
            let started = task.start().await;
            task.delete().await?;
            started
                .err()
                .context("a task was restored from an empty folder")?
        }
    };
    let text = refusal.message();
    ensure!(
        !text.trim().contains('\n'),
        "the refusal is more than a line: {text:?}"
    );
    let mut words = vec!["restore", "failed", "/tmp/no-image/"];
    // The shim that containerd ships does not say whose it was.
    if stage.node.runtime() == Runtime::Rekindle {
        words.push("container no-image");
    }
    for word in words {
        ensure!(
            text.contains(word),
            "{word:?} is not in the refusal: {text}"
        );
    }
    is_gone(stage, "no-image").await?;
    task.remove().await
}
