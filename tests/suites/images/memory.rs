//! Images in memory in front of those on the disk. The agent goes round where a test says so.

use crate::heap::{heap, is_sound};
use crate::interrupted::killed_at;
use crate::stage::{MEMORY, Stage, continues, counts_to};
use anyhow::{Context, Result, ensure};
use rekindle_core::step::CheckpointStep;
use rekindle_harness::Count;
use serde_json::Value;

/// Where the generation of an image lies.
async fn place(stage: &Stage, name: &str, generation: u64) -> Result<String> {
    let output = stage.rekindle(&["image", "ls", "--json"]).await?;
    let rows: Vec<Value> = serde_json::from_slice(&output.stdout)?;
    let is = |row: &&Value| row["name"] == name && row["generation"] == generation;
    let row = rows.iter().find(is).context("there is no such image")?;
    Ok(row["place"].as_str().unwrap_or_default().to_owned())
}

/// What the agent does in a round.
async fn round(stage: &Stage) -> Result<()> {
    let output = stage.rekindle(&["agent", "--once"]).await?;
    ensure!(output.status.success(), "{output:?}");
    Ok(())
}

/// What a restart of the node does.
async fn restart(stage: &Stage) -> Result<()> {
    let line = format!("rm -rf {MEMORY}/* {MEMORY}/.partial {MEMORY}/.room.lock");
    stage.node.run(["sh", "-c", &line]).await.map(drop)
}

/// What images that are being made have left in either place.
async fn left(stage: &Stage) -> Result<String> {
    let line =
        format!("ls -A /var/lib/rekindle/images/.partial {MEMORY}/.partial | grep -v :; true");
    let found = stage.node.run(["sh", "-c", &line]).await?;
    Ok(found.trim().to_owned())
}

/// A counter goes on from the newest image of a name.
async fn goes_on(stage: &Stage, id: &str, image: &str, from: &Count, until: u64) -> Result<()> {
    let warm = stage.warm(id, image).run().await?;
    continues(&warm, from, until).await?;
    warm.remove().await
}

pub(crate) async fn it_is_made_in_memory_settles_and_outlives_a_restart(
    stage: &Stage,
) -> Result<()> {
    let (task, from) = stage.lived_in("in-memory").await?;
    let made = stage
        .checkpoint("in-memory", "in-memory", &["--exit"])
        .await?;
    ensure!(made["generation"] == 1, "{made}");
    let last = Count::last(&task.io().out()?.text().await?).context("the counter said nothing")?;
    task.remove().await?;
    assert_eq!(place(stage, "in-memory", 1).await?, "memory");
    goes_on(stage, "in-memory-2", "in-memory", &from, last.n).await?;

    round(stage).await?;
    assert_eq!(place(stage, "in-memory", 1).await?, "memory+disk");
    goes_on(stage, "in-memory-3", "in-memory", &from, last.n).await?;
    restart(stage).await?;
    assert_eq!(place(stage, "in-memory", 1).await?, "disk");
    goes_on(stage, "in-memory-4", "in-memory@1", &from, last.n).await?;
    // Who starts from it has it in memory again, and the number of one that is gone never means another image.
    round(stage).await?;
    assert_eq!(place(stage, "in-memory", 1).await?, "memory+disk");
    let removed = stage.rekindle(&["image", "rm", "in-memory"]).await?;
    ensure!(removed.status.success(), "{removed:?}");
    assert_eq!(left(stage).await?, "");
    Ok(())
}

pub(crate) async fn one_that_never_settled_is_gone_and_its_number_too(stage: &Stage) -> Result<()> {
    let task = stage
        .container("unsettled")
        .args(&["/counter"])
        .run()
        .await?;
    counts_to(task.io().out()?, 2).await?;
    stage.checkpoint("unsettled", "unsettled", &[]).await?;
    assert_eq!(place(stage, "unsettled", 1).await?, "memory");
    restart(stage).await?;
    stage
        .refuses(
            "unsettled-2",
            stage.warm("unsettled-2", "unsettled"),
            &["there is no image"],
        )
        .await?;
    let made = stage.checkpoint("unsettled", "unsettled", &[]).await?;
    ensure!(made["generation"] == 2, "{made}");
    task.remove().await
}

/// Its memory of 256 MiB does not fit into what is allowed.
pub(crate) async fn what_does_not_fit_is_made_on_the_disk(stage: &Stage) -> Result<()> {
    let task = heap(stage, "large").run().await?;
    counts_to(task.io().out()?, 1).await?;
    stage.checkpoint("large", "large", &["--exit"]).await?;
    let last = Count::last(&task.io().out()?.text().await?).context("the heap said nothing")?;
    task.remove().await?;
    assert_eq!(place(stage, "large", 1).await?, "disk");
    let warm = stage.warm("large-2", "large");
    let warm = warm.args(&["awk", "1"]).run().await?;
    is_sound(&warm, &last).await?;
    warm.remove().await
}

/// Somebody else fills the tmpfs before the image is complete.
pub(crate) async fn what_turns_out_not_to_fit_is_made_once_more_on_the_disk(
    stage: &Stage,
) -> Result<()> {
    // Of which no two chunks are alike.
    let program = "dd if=/dev/urandom of=/root/noise bs=1M count=40 2>/dev/null; exec /counter";
    let task = stage.container("full").shell(program).run().await?;
    let before = counts_to(task.io().out()?, 2).await?;
    // When room was found for it, somebody else takes all but 8 MiB: its layer is stored later, when CRIU has started.
    let line = format!(
        "free=$(df --output=avail -m {MEMORY} | tail -1); fallocate -l $((free - 8))M {MEMORY}/filler"
    );
    let filling = async {
        let held = ["begins id=\"full\" step=\"hold\""];
        stage.node.logs(&held).await?;
        stage.node.run(["sh", "-c", &line]).await
    };
    let made = stage.checkpoint("full", "full", &[]);
    let (filled, made) = tokio::join!(filling, made);
    filled?;
    let made = made?;
    ensure!(made["generation"] == 1, "{made}");
    assert_eq!(place(stage, "full", 1).await?, "disk");
    assert_eq!(left(stage).await?, "");
    let last = counts_to(task.io().out()?, before.n + 5).await?;
    stage.node.run(["rm", &format!("{MEMORY}/filler")]).await?;
    // With room again the next one is in memory.
    stage.checkpoint("full", "full", &["--exit"]).await?;
    assert_eq!(place(stage, "full", 2).await?, "memory");
    task.remove().await?;
    goes_on(stage, "full-2", "full@1", &before, last.n).await
}

/// The shim is killed in each step of a checkpoint into memory: there is a whole image or none, and nothing else.
pub(crate) async fn the_shim_is_killed_in_each_step(stage: &Stage) -> Result<()> {
    for step in CheckpointStep::ALL {
        let id = format!("memory-dies-at-{}", step.name());
        let task = stage.container(&id).args(&["/counter"]).run().await?;
        counts_to(task.io().out()?, 1).await?;
        let killed = killed_at(stage, task, *step).await;
        killed.with_context(|| format!("killed at {step:?}"))?;
        round(stage).await?;
        assert_eq!(left(stage).await?, "");
    }
    Ok(())
}

/// A damaged copy in memory, of one that has settled, is not what a container gets.
pub(crate) async fn damage_in_memory_is_made_up_for_by_the_disk(stage: &Stage) -> Result<()> {
    let task = stage.container("mended").args(&["/counter"]).run().await?;
    let from = counts_to(task.io().out()?, 3).await?;
    stage.checkpoint("mended", "mended", &["--exit"]).await?;
    let last = Count::last(&task.io().out()?.text().await?).context("the counter said nothing")?;
    task.remove().await?;
    round(stage).await?;
    let folder = format!("{MEMORY}/default/mended/1");
    for (turn, line) in [
        // In its pages, which are compared one by one; in the index, which is compared as a whole; and all of it.
        format!("for p in {folder}/pack-*; do dd if=/dev/zero of=$p bs=$(stat -c %s $p) count=1 conv=notrunc 2>/dev/null; done"),
        format!("echo x >> {folder}/chunks.index"),
        format!("rm -r {folder}"),
    ]
    .iter()
    .enumerate()
    {
        assert_eq!(place(stage, "mended", 1).await?, "memory+disk");
        stage.node.run(["sh", "-c", line]).await?;
        goes_on(stage, &format!("mended-{turn}"), "mended", &from, last.n).await?;
        round(stage).await?;
    }
    Ok(())
}
