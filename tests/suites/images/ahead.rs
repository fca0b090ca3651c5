//! What a restore was asked for first is brought in first by the next.

use crate::heap::{loading, sound};
use crate::stage::{RESTORE_FROM, Stage, counts_to, shell};
use anyhow::{Context, Result, ensure};
use nix::sys::signal::{Signal, kill};
use rekindle_checkpoint::touches::{self, Touch};
use rekindle_harness::container::Builder;
use rekindle_harness::{Container, Count, poll};

/// 64 strings of 4 MiB, each of its own pattern. Once a line comes through the FIFO they are compared with what they
/// should be, the last one first; until then nothing of them is looked at.
const PROGRAM: &str = r#"
function fill(i,  s) { s = sprintf("%08d:%s:", i, nonce); while (length(s) < 4194304) s = s s; return s }
BEGIN {
  "cat /proc/sys/kernel/random/uuid" | getline nonce
  close("cat /proc/sys/kernel/random/uuid")
  for (i = 0; i < 64; i++) a[i] = fill(i)
  print nonce " " ++n; fflush()
  while (1) {
    getline line < "/root/go"; close("/root/go")
    for (i = 63; i >= 0; i--) if (a[i] != fill(i)) { print "corrupt " i; fflush() }
    print nonce " " ++n; fflush()
  }
}"#;

fn sleeper<'s>(stage: &'s Stage, id: &str) -> Builder<'s> {
    let line = r#"[ -p /root/go ] || mkfifo /root/go; exec awk "$PROGRAM""#;
    let program = format!("PROGRAM={PROGRAM}");
    stage.container(id).env(&program).shell(line)
}

/// Lets it look at its memory, and waits until it has.
async fn looks(task: &Container<'_>, from: &Count) -> Result<()> {
    shell(task, "go", "echo > /root/go").await?;
    let now = counts_to(task.io().out()?, from.n + 1).await?;
    sound(task)?;
    ensure!(now.nonce == from.nonce, "it is another process");
    Ok(())
}

/// What the pager of a container has said at its end: blocks that it was asked for, and that it brought in ahead.
async fn served(stage: &Stage, id: &str) -> Result<(usize, usize)> {
    let (id, number) = (format!("{id:?}"), |line: &str, name: &str| {
        let (_, rest) = line.split_once(&format!(" {name}="))?;
        let end = rest.find(|c: char| !c.is_ascii_digit());
        rest[..end.unwrap_or(rest.len())].parse().ok()
    });
    poll::until("the pager's last word", async || {
        let log = std::fs::read_to_string(stage.node.path("/var/log/containerd.log"))?;
        let line = log
            .lines()
            .find(|line| line.contains("all memory is in") && line.contains(&id));
        Ok(line.and_then(|line| Some((number(line, "asked")?, number(line, "ahead")?))))
    })
    .await
}

/// What the last restore of an image has noted.
fn noted(stage: &Stage, image: &str) -> Result<Vec<Touch>> {
    let folder = stage.image("default", image);
    let note = folder.with_file_name(".1.touches");
    let bytes = std::fs::read(&note).with_context(|| format!("reading {}", note.display()))?;
    let manifest = std::fs::read(folder.join("manifest.json"))?;
    Ok(touches::read(&bytes, &manifest)?)
}

/// A heap that sleeps, checkpointed; and restored once with a pager that was held up, so that what it looks at has to be
/// asked for. Gives what it counted to, and how many blocks were asked for.
async fn looked_at_once(stage: &Stage, id: &str) -> Result<(Count, usize)> {
    let task = sleeper(stage, id).run().await?;
    let last = counts_to(task.io().out()?, 1).await?;
    stage.checkpoint(id, id, &["--exit"]).await?;
    task.remove().await?;
    let first = format!("{id}-2");
    let (warm, pager) = loading(stage, || sleeper(stage, &first), id).await?;
    let (looked, _) = tokio::join!(looks(&warm, &last), async {
        // It sleeps no more when it waits for its memory.
        tokio::time::sleep(std::time::Duration::from_millis(500)).await;
        kill(pager, Signal::SIGCONT)
    });
    looked?;
    let (asked, ahead) = served(stage, &first).await?;
    ensure!(asked > 0 && ahead == 0, "asked={asked} ahead={ahead}");
    warm.remove().await?;
    Ok((last, asked))
}

pub(crate) async fn the_next_restore_brings_in_first_what_this_one_was_asked_for(
    stage: &Stage,
) -> Result<()> {
    let (last, asked_before) = looked_at_once(stage, "ahead").await?;
    let before = noted(stage, "ahead")?;
    ensure!(!before.is_empty() && before.len() <= asked_before);
    let warm = sleeper(stage, "ahead-3").annotation(RESTORE_FROM, "ahead");
    let warm = warm.run().await?;
    // It sleeps: of its heap nothing is asked for, and all that was is brought in ahead.
    let (asked, ahead) = served(stage, "ahead-3").await?;
    let now = noted(stage, "ahead")?;
    let told = format!(
        "asked {asked_before} and noted {}, then asked {asked} and brought {ahead} in ahead",
        before.len()
    );
    ensure!(
        asked < asked_before && ahead > 0 && asked + ahead >= before.len(),
        "{told}"
    );
    // In the order of the note, but for what was asked for before its turn.
    let places = now
        .iter()
        .filter_map(|touch| before.iter().position(|of| of == touch));
    let places: Vec<usize> = places.collect();
    let back = places.windows(2).filter(|pair| pair[1] < pair[0]).count();
    ensure!(back <= asked, "{told}; {back} came too early: {places:?}");
    looks(&warm, &last).await?;
    warm.remove().await?;
    let verified = stage.rekindle(&["image", "verify", "ahead"]).await?;
    ensure!(verified.status.success(), "{verified:?}");
    stage.rekindle(&["image", "rm", "ahead"]).await?;
    let note = stage.image("default", "ahead").with_file_name(".1.touches");
    ensure!(!note.exists(), "the note is left");
    stage.node.is_rid_of("ahead-3").await
}

/// Whoever can write into the store changes an order by it, and nothing else.
pub(crate) async fn a_note_that_lies_or_is_none_changes_nothing(stage: &Stage) -> Result<()> {
    let (last, _) = looked_at_once(stage, "lies").await?;
    let folder = stage.image("default", "lies");
    let note = folder.with_file_name(".1.touches");
    let manifest = std::fs::read(folder.join("manifest.json"))?;
    let lies: Vec<Touch> = (0..5000_u64)
        .map(|n| Touch::at(1 + n as i32 % 3, n.wrapping_mul(0x9e37_79b9_7f4a_7c15)))
        .chain(noted(stage, "lies")?.into_iter().rev())
        .collect();
    let mut torn = touches::write(&lies, &manifest);
    torn.truncate(1000);
    let whole = touches::write(&lies, &manifest);
    for (round, bytes) in [whole, torn, b"\xff".repeat(2 << 20)].iter().enumerate() {
        std::fs::write(&note, bytes)?;
        let id = format!("lies-{round}-3");
        let warm = sleeper(stage, &id).annotation(RESTORE_FROM, "lies");
        let warm = warm.run().await?;
        looks(&warm, &last).await?;
        served(stage, &id).await?;
        warm.remove().await?;
        // What is noted now is true.
        noted(stage, "lies")?;
    }
    Ok(())
}
