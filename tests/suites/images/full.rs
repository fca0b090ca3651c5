//! A disk that is full.

use crate::interrupted::{more_for, partial};
use crate::stage::{BUCKET, POLICY, Stage, counts_to, one_sentence};
use anyhow::{Context, Result, ensure};
use rekindle_core::step::CheckpointStep as Step;
use rekindle_harness::container::{Builder, State};
use rekindle_harness::{Container, Count, poll};
use serde_json::json;
use std::fs;
use std::io::{ErrorKind, Write as _};
use std::path::PathBuf;

const IMAGES: &str = "/var/lib/rekindle/images";

/// A small disk in place of what lies there, until it is [let go](Disk::gone).
struct Disk<'s> {
    stage: &'s Stage,
    at: &'static str,
}

impl<'s> Disk<'s> {
    async fn of(stage: &'s Stage, at: &'static str, size: &str) -> Result<Self> {
        let size = format!("size={size},mode=0700");
        let mount = ["mount", "-t", "tmpfs", "-o", &size, "small", at];
        stage.node.run(["mkdir", "-p", at]).await?;
        stage.node.run(mount).await?;
        Ok(Self { stage, at })
    }

    /// What was there is there again, whatever came of the test.
    async fn gone<T>(self, outcome: Result<T>) -> Result<T> {
        let unmounted = self.stage.node.run(["umount", "--lazy", self.at]).await;
        outcome.and_then(|done| unmounted.map(|_| done))
    }

    fn filler(&self) -> PathBuf {
        self.stage.node.path(self.at).join("filler")
    }

    /// Takes all the room that there is, but for so many bytes.
    fn fill(&self, but: u64) -> Result<()> {
        let mut file = fs::File::create(self.filler())?;
        let piece = [0; 64 << 10];
        loop {
            match file.write(&piece) {
                Ok(_) => {}
                Err(e) if e.kind() == ErrorKind::StorageFull => break,
                Err(e) => return Err(e.into()),
            }
        }
        let taken = file.metadata()?.len();
        Ok(file.set_len(taken.saturating_sub(but))?)
    }

    fn free(&self) -> Result<()> {
        match fs::remove_file(self.filler()) {
            Err(e) if e.kind() != ErrorKind::NotFound => Err(e.into()),
            _ => Ok(()),
        }
    }
}

/// That a sentence names the disk as the reason.
fn says_full(said: &str) -> Result<()> {
    // CRIU and we say it as the C library does, and runc as Go. Where CRIU cannot even write its log, all that is known
    // is that it has ended, and where that log would be.
    let words = [
        "o space left on device",
        "bytes are needed below",
        "(CRIU's log: ",
    ];
    ensure!(
        said.trim().lines().count() == 1 && words.iter().any(|word| said.contains(word)),
        "not one sentence about a full disk: {said}"
    );
    Ok(())
}

/// That a container has lost nothing, and goes on.
async fn goes_on(task: &Container<'_>) -> Result<()> {
    let state = task.state().await?;
    ensure!(state == State::Running, "it is {state:?}");
    let out = task.io().out()?;
    let now = Count::last(&out.so_far()).context("it said nothing")?;
    counts_to(out, now.n + 3).await?;
    let text = out.so_far();
    ensure!(!text.contains("corrupt"), "its memory is another: {text}");
    let first = Count::first(&text).context("it said nothing")?;
    first.continues_in(&text, first.n)
}

/// The promise: the checkpoint fails with one sentence, or there is a whole image; and the container runs on either way.
pub(crate) async fn the_disk_is_full_in_each_step_of_a_checkpoint(stage: &Stage) -> Result<()> {
    let disk = Disk::of(stage, IMAGES, "16m").await?;
    let outcome = async {
        let mut made = 0;
        let with_exit = (Step::Seal, &["--exit"][..]);
        let steps = Step::ALL.iter().map(|step| (*step, more_for(*step)));
        let cases: Vec<_> = steps.chain([with_exit]).collect();
        for (number, (step, more)) in cases.iter().enumerate() {
            let id = format!("full-{number}");
            let filled = filled_at(&disk, &id, (*step, more)).await;
            let whole = filled.with_context(|| format!("full at {step:?} {more:?}"))?;
            // Until its folder is there, and beyond it, there is something to write.
            ensure!(
                !whole || *step >= Step::Release,
                "there was room at {step:?}"
            );
            made += usize::from(whole);
        }
        println!("{} steps, and {made} images", cases.len());
        Ok(())
    };
    let outcome = outcome.await;
    disk.gone(outcome).await
}

/// Whether an image was made.
async fn filled_at(disk: &Disk<'_>, id: &str, (step, more): (Step, &[&str])) -> Result<bool> {
    let stage = disk.stage;
    let task = stage.container(id).args(&["/counter"]).run().await?;
    counts_to(task.io().out()?, 2).await?;
    let args = [&["checkpoint", id, "--name", id], more].concat();
    let fill = async {
        let begins = format!("begins id={id:?} step={step:?}");
        stage.node.logs(&[&begins]).await?;
        disk.fill(0)
    };
    let (output, filled) = tokio::join!(stage.rekindle(&args), fill);
    filled?;
    let output = output?;
    let whole = stage.images().await?.contains(&id.to_owned());
    ensure!(output.status.success() == whole, "{output:?}");
    let left = partial(stage).await?;
    ensure!(left.is_empty(), "{left:?}");
    if !whole {
        says_full(&String::from_utf8_lossy(&output.stderr))?;
    }
    match whole && more.contains(&"--exit") {
        true => ensure!(task.wait().await?.status == 137),
        false => goes_on(&task).await?,
    }
    disk.free()?;
    if whole {
        let verified = stage.rekindle(&["image", "verify", id]).await?;
        ensure!(verified.status.success(), "{verified:?}");
    } else {
        // And with room again there is nothing in its way.
        stage.checkpoint(id, id, &[]).await?;
    }
    stage.rekindle(&["image", "rm", id]).await?;
    task.remove().await?;
    stage.node.is_rid_of(id).await?;
    Ok(whole)
}

/// 24 MiB, all of which are others in every round.
const REPLACED: &str = r#"
function fill(i,  s) { s = sprintf("%08d:%s:%08d:", i, nonce, n); while (length(s) < 4194304) s = s s; return s }
BEGIN {
  "cat /proc/sys/kernel/random/uuid" | getline nonce
  close("cat /proc/sys/kernel/random/uuid")
  while (1) {
    for (i = 0; i < 6; i++) a[i] = fill(i)
    for (i = 0; i < 6; i++) if (a[i] != fill(i)) { print "corrupt " i; fflush() }
    print nonce " " ++n; fflush()
  }
}"#;

/// Where an earlier generation has most of it as a rule, nobody asks for room before: it fills up in the midst.
pub(crate) async fn the_disk_is_full_while_memory_is_stored(stage: &Stage) -> Result<()> {
    let disk = Disk::of(stage, IMAGES, "64m").await?;
    let outcome = async {
        let task = stage.container("overfull").args(&["awk", REPLACED]);
        let task = task.run().await?;
        let before = counts_to(task.io().out()?, 1).await?;
        stage.checkpoint("overfull", "overfull", &[]).await?;
        counts_to(task.io().out()?, before.n + 2).await?;
        disk.fill(8 << 20)?;
        let args = ["checkpoint", "overfull", "--name", "overfull", "--exit"];
        let output = stage.rekindle(&args).await?;
        ensure!(!output.status.success(), "{output:?}");
        says_full(&String::from_utf8_lossy(&output.stderr))?;
        goes_on(&task).await?;
        let left = partial(stage).await?;
        ensure!(left.is_empty(), "{left:?}");
        let verified = stage.rekindle(&["image", "verify", "overfull@1"]).await?;
        ensure!(verified.status.success(), "{verified:?}");
        task.remove().await?;
        stage.node.is_rid_of("overfull").await
    };
    let outcome = outcome.await;
    disk.gone(outcome).await
}

/// However much room there is: it comes whole, or the start is refused with one sentence and nothing is left.
pub(crate) async fn there_is_no_room_for_an_image_that_is_fetched(stage: &Stage) -> Result<()> {
    let (task, before) = stage.lived_in("no-room").await?;
    stage.checkpoint("no-room", "no-room", &["--exit"]).await?;
    let at = Count::last(&task.io().out()?.text().await?).context("it said nothing")?;
    task.remove().await?;
    let place = format!("s3://{BUCKET}/default/");
    let pushed = stage
        .rekindle(&["image", "push", "no-room", &place])
        .await?;
    ensure!(pushed.status.success(), "{pushed:?}");
    let disk = Disk::of(stage, IMAGES, "16m").await?;
    let outcome = async {
        // From nothing on, and then twice as much each time.
        let rooms = (11..24).map(|power| (1 << power) & !((1 << 12) - 1));
        for (number, room) in rooms.enumerate() {
            disk.fill(room)?;
            let id = format!("no-room-{number}");
            let (warm, created) = stage.warm(&id, "no-room").try_create().await?;
            let Err(refusal) = created else {
                warm.start().await?;
                crate::stage::continues(&warm, &before, at.n).await?;
                warm.remove().await?;
                println!("{number} times there was no room");
                ensure!(number > 3, "it needs no room");
                return Ok(());
            };
            says_full(refusal.message()).with_context(|| format!("{room} bytes"))?;
            stage.node.is_rid_of(&id).await?;
            ensure!(stage.node.layer_of(&id).await?.is_empty());
            warm.remove().await?;
            ensure!(stage.images().await?.is_empty(), "half of it is there");
            poll::until("what came of it to go", async || {
                Ok(partial(stage).await?.is_empty().then_some(()))
            })
            .await?;
        }
        anyhow::bail!("there is never room for it")
    };
    let outcome = outcome.await;
    disk.gone(outcome).await
}

const SHM: &str = "/run/full-shm";

fn bound_shm(container: Builder<'_>) -> Builder<'_> {
    container.change_spec(|spec| {
        for mount in spec["mounts"].as_array_mut().into_iter().flatten() {
            if mount["destination"] == "/dev/shm" {
                *mount = json!({"destination": "/dev/shm", "type": "bind", "source": SHM, "options": ["rbind", "rw"]});
            }
        }
    })
}

/// Neither for the writable layer nor for `/dev/shm`: what was put there goes again, and an opportunistic container
/// starts without.
pub(crate) async fn there_is_no_room_for_what_is_staged(stage: &Stage) -> Result<()> {
    let line = |at: &str| format!("head -c 3000000 /dev/urandom > {at}/large; exec /counter");
    stage.node.run(["mkdir", "-p", SHM]).await?;
    let task = bound_shm(stage.container("cramped").shell(&line("/dev/shm")));
    let task = task.run().await?;
    counts_to(task.io().out()?, 2).await?;
    stage.checkpoint("cramped", "cramped", &[]).await?;
    task.remove().await?;
    stage.node.run(["rm", &format!("{SHM}/large")]).await?;
    let disk = Disk::of(stage, SHM, "1m").await?;
    let outcome = async {
        let empty = async || -> Result<()> {
            let found = stage.node.run(["ls", "-A", SHM]).await?;
            ensure!(found.is_empty(), "there is {found}");
            Ok(())
        };
        let warm = bound_shm(stage.warm("cramped-2", "cramped"));
        let words = ["No space left on device", "large"];
        stage.refuses("cramped-2", warm, &words).await?;
        empty().await?;
        let cold = bound_shm(stage.warm("cramped-3", "cramped"));
        let cold = cold.annotation(POLICY, "Opportunistic").run().await?;
        counts_to(cold.io().out()?, 3).await?;
        ensure!(cold.io().out()?.so_far().contains(" 1\n"), "not cold");
        empty().await?;
        cold.remove().await
    };
    let outcome = outcome.await;
    disk.gone(outcome).await?;

    let task = stage
        .container("crowded")
        .shell(&line("/root"))
        .run()
        .await?;
    counts_to(task.io().out()?, 2).await?;
    // Its layer is there before the image is.
    let late = stage.warm("crowded-2", "crowded");
    let (late, created) = late.try_create().await?;
    one_sentence(&created.err().context("from nothing")?, &["no image"])?;
    stage.checkpoint("crowded", "crowded", &[]).await?;
    task.remove().await?;
    let layer = stage.node.folder_of_layer("crowded-2").await?;
    let small = format!("mount -t tmpfs -o size=1m small {layer} && mkdir {layer}/fs {layer}/work");
    stage.node.run(["sh", "-c", &small]).await?;
    let (late, created) = late.next_task().await?;
    let refusal = created.err().context("it was created")?;
    one_sentence(&refusal, &["No space left on device", "large"])?;
    stage.node.is_rid_of("crowded-2").await?;
    assert_eq!(
        stage.node.layer_of("crowded-2").await?,
        Vec::<String>::new()
    );
    stage.node.run(["umount", &layer]).await?;
    late.remove().await?;
    // And with room there is nothing in its way.
    let warm = stage.warm("crowded-3", "crowded").run().await?;
    counts_to(warm.io().out()?, 3).await?;
    warm.remove().await
}
