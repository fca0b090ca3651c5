//! A process with memory enough that loading it takes a while, and which looks at all of it again and again.

use crate::stage::{RESTORE_FROM, Stage, counts_to};
use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use rekindle_harness::container::{Builder, State};
use rekindle_harness::{Container, Count, poll};
use std::time::Duration;

/// A pager that was not seen in this time has done its work.
const SEEN: Duration = Duration::from_secs(3);
const ATTEMPTS: usize = 10;
/// Of 256 MiB: far more than a restore asks for before it is over.
const BEGUN: u64 = 16 << 20;

/// 64 strings of 4 MiB, each of its own pattern, compared with what they should be; a line as the counter's for each round.
const PROGRAM: &str = r#"
function fill(i,  s) { s = sprintf("%08d:%s:", i, nonce); while (length(s) < 4194304) s = s s; return s }
BEGIN {
  "cat /proc/sys/kernel/random/uuid" | getline nonce
  close("cat /proc/sys/kernel/random/uuid")
  for (i = 0; i < 64; i++) a[i] = fill(i)
  while (1) {
    for (i = 0; i < 64; i++) if (a[i] != fill(i)) { print "corrupt " i; fflush() }
    print nonce " " ++n; fflush()
  }
}"#;

pub(crate) fn heap<'s>(stage: &'s Stage, id: &str) -> Builder<'s> {
    stage.container(id).args(&["awk", PROGRAM])
}

fn sound(task: &Container<'_>) -> Result<()> {
    let text = task.io().out()?.so_far();
    ensure!(
        !text.contains("corrupt"),
        "the memory of {} is not what it was: {text}",
        task.id()
    );
    Ok(())
}

/// Waits until a restored heap has looked at all of its memory, twice.
async fn is_sound(task: &Container<'_>, from: &Count) -> Result<Count> {
    let now = counts_to(task.io().out()?, from.n + 3).await?;
    sound(task)?;
    assert_eq!(now.nonce, from.nonce);
    Ok(now)
}

async fn image(stage: &Stage, id: &str) -> Result<Count> {
    let task = heap(stage, id).run().await?;
    counts_to(task.io().out()?, 1).await?;
    stage.checkpoint(id, id, &["--exit"]).await?;
    let last = Count::last(&task.io().out()?.text().await?).context("the heap said nothing")?;
    sound(&task)?;
    task.remove().await?;
    Ok(last)
}

pub(crate) async fn memory_is_what_it_was(stage: &Stage) -> Result<()> {
    let last = image(stage, "heap").await?;
    let warm = heap(stage, "heap-2")
        .annotation(RESTORE_FROM, "heap")
        .run()
        .await?;
    is_sound(&warm, &last).await?;
    warm.remove().await?;
    stage.node.is_rid_of("heap-2").await
}

/// Waits for a pager that has brought in so much that CRIU's restore must be over, and is far from done.
async fn pager(stage: &Stage) -> Result<Pid> {
    loop {
        for (pid, line) in stage.node.processes()? {
            if line.contains("rekindle pager --images") && has_read(pid) >= BEGUN {
                return Ok(Pid::from_raw(pid.try_into()?));
            }
        }
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

/// Bytes that a process has read; none of one that has ended.
fn has_read(pid: u32) -> u64 {
    let io = std::fs::read_to_string(format!("/proc/{pid}/io")).unwrap_or_default();
    let read = io.lines().find_map(|line| line.strip_prefix("rchar: "));
    read.and_then(|bytes| bytes.parse().ok()).unwrap_or(0)
}

/// A heap in mid-load, whose pager stands still. A load that was over before it was seen is begun again.
async fn loading<'s>(stage: &'s Stage, id: &str, image: &str) -> Result<(Container<'s>, Pid)> {
    for _ in 0..ATTEMPTS {
        let warm = heap(stage, id)
            .annotation(RESTORE_FROM, image)
            .create()
            .await?;
        let found = async {
            let pager = tokio::time::timeout(SEEN, pager(stage)).await.ok()?.ok()?;
            kill(pager, Signal::SIGSTOP).is_ok().then_some(pager)
        };
        let (started, pager) = tokio::join!(warm.start(), found);
        started.context("starting from the image")?;
        if let Some(pager) = pager {
            return Ok((warm, pager));
        }
        warm.kill(9).await?;
        warm.wait().await?;
        warm.remove().await?;
    }
    bail!("in {ATTEMPTS} restores no pager was seen in mid-load")
}

pub(crate) async fn a_killed_pager_ends_the_container(stage: &Stage) -> Result<()> {
    image(stage, "orphaned").await?;
    let (warm, pager) = loading(stage, "orphaned-2", "orphaned").await?;
    assert_eq!(warm.state().await?, State::Running);
    kill(pager, Signal::SIGKILL)?;
    let ended = warm.wait().await?;
    assert_eq!(ended.status, 137);
    sound(&warm)?;
    warm.reaches(State::Stopped).await?;
    warm.remove().await?;
    stage.node.is_rid_of("orphaned-2").await
}

pub(crate) async fn a_checkpoint_while_still_loading_drains_first(stage: &Stage) -> Result<()> {
    let last = image(stage, "drained").await?;
    let (warm, pager) = loading(stage, "drained-2", "drained").await?;
    let checkpoint = stage.checkpoint("drained-2", "drained-again", &["--exit"]);
    tokio::pin!(checkpoint);
    // A dump now would have holes, so it waits for a pager that stands still.
    let early = tokio::time::timeout(Duration::from_secs(1), &mut checkpoint).await;
    ensure!(early.is_err(), "it was checkpointed in mid-load");
    kill(pager, Signal::SIGCONT)?;
    checkpoint.await?;
    sound(&warm)?;
    warm.remove().await?;
    let third = heap(stage, "drained-3")
        .annotation(RESTORE_FROM, "drained-again")
        .run()
        .await?;
    is_sound(&third, &last).await?;
    third.remove().await
}

pub(crate) async fn a_container_that_ends_while_loading_leaves_nothing(
    stage: &Stage,
) -> Result<()> {
    image(stage, "cut-short").await?;
    let (warm, pager) = loading(stage, "cut-short-2", "cut-short").await?;
    warm.kill(9).await?;
    assert_eq!(warm.wait().await?.status, 137);
    warm.remove().await?;
    stage.node.is_rid_of("cut-short-2").await?;
    poll::until("the pager's end", async || {
        Ok(stage
            .node
            .processes()?
            .iter()
            .all(|(pid, _)| i64::from(*pid) != i64::from(pager.as_raw()))
            .then_some(()))
    })
    .await
}
