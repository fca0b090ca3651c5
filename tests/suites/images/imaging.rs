//! Images that a container gets of itself because it asks for them.

use crate::stage::{Stage, continues, counts_to};
use anyhow::{Context, Result, ensure};
use rekindle_harness::container::{Builder, State};
use rekindle_harness::{Count, poll};

const EVERY: &str = "rekindle.dev/checkpoint-every";
const ON_TERM: &str = "rekindle.dev/checkpoint-on-term";
const NAME: &str = "rekindle.dev/checkpoint-name";
/// Says so when it hears of SIGTERM, and ends with 7.
const LINE: &str = "/counter & trap 'echo heard; kill $!; exit 7' TERM; while :; do wait $!; done";

fn counting<'s>(stage: &'s Stage, id: &str) -> Builder<'s> {
    stage.container(id).shell(LINE).annotation(NAME, id)
}

pub(crate) async fn on_a_timer(stage: &Stage) -> Result<()> {
    let task = counting(stage, "timer")
        .annotation(EVERY, "10s")
        .run()
        .await?;
    let from = counts_to(task.io().out()?, 1).await?;
    poll::until("an image", async || {
        Ok(stage
            .images()
            .await?
            .contains(&"timer".to_owned())
            .then_some(()))
    })
    .await?;
    assert_eq!(task.state().await?, State::Running);
    let at = counts_to(task.io().out()?, from.n).await?;
    counts_to(task.io().out()?, at.n + 3).await?;
    let shown = stage
        .rekindle(&["image", "show", "default/timer", "--json"])
        .await?;
    let manifest: serde_json::Value = serde_json::from_slice(&shown.stdout)?;
    // As one that a person asks for.
    let digest = manifest["facts"]["source"]["image_digest"].as_str();
    ensure!(
        digest.is_some_and(|digest| digest.starts_with("sha256:")),
        "{manifest}"
    );
    let warm = stage
        .container("timer-2")
        .shell(LINE)
        .annotation("rekindle.dev/restore-from", "timer");
    let warm = warm.run().await?;
    continues(&warm, &from, at.n).await?;
    warm.remove().await?;
    task.remove().await
}

pub(crate) async fn before_it_hears_of_sigterm(stage: &Stage) -> Result<()> {
    let task = counting(stage, "term")
        .annotation(ON_TERM, "true")
        .run()
        .await?;
    let from = counts_to(task.io().out()?, 3).await?;
    task.kill(15).await?;
    // The second one is not heard before the first.
    task.kill(15).await?;
    assert_eq!(task.wait().await?.status, 7);
    let said = task.io().out()?.text().await?;
    assert_eq!(said.matches("heard").count(), 1, "{said}");
    let at = Count::last(said.split("heard").next().unwrap_or(""))
        .context("the counter said nothing")?;
    task.remove().await?;
    let warm = stage
        .container("term-2")
        .shell(LINE)
        .annotation("rekindle.dev/restore-from", "term");
    let warm = warm.run().await?;
    let restored = continues(&warm, &from, at.n).await?;
    ensure!(restored.n > from.n, "{restored:?}");
    // Nothing asked for an image of this one: it hears at once.
    warm.kill(15).await?;
    assert_eq!(warm.wait().await?.status, 7);
    warm.remove().await
}

pub(crate) async fn a_sigkill_ends_it_without_an_image(stage: &Stage) -> Result<()> {
    let task = counting(stage, "sigkill")
        .annotation(ON_TERM, "true")
        .run()
        .await?;
    counts_to(task.io().out()?, 1).await?;
    task.kill(15).await?;
    task.kill(9).await?;
    assert_eq!(task.wait().await?.status, 137);
    task.remove().await?;
    stage.node.is_rid_of("sigkill").await?;
    let partial = stage.node.path("/var/lib/rekindle/images/.partial");
    // Either it came before the image was begun to be sealed, or the image is whole.
    if !stage.images().await?.contains(&"sigkill".to_owned()) {
        poll::until("no leftovers", async || {
            let left: Vec<_> = std::fs::read_dir(&partial)?
                .flatten()
                .filter_map(|entry| std::fs::read_to_string(entry.path().join("request.json")).ok())
                .filter(|request| request.contains("\"sigkill\""))
                .collect();
            Ok(left.is_empty().then_some(()))
        })
        .await?;
    }
    Ok(())
}
