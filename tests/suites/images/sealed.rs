//! Images of a namespace that has a key.

use crate::stage::{KEY, RESTORE_FROM, Stage};
use anyhow::{Context, Result, ensure};
use rekindle_harness::Count;
use rekindle_harness::cri::Pod;
use std::fs;
use std::path::Path;

/// A counter of namespace `sealed`, checkpointed and gone: what it said last.
async fn image(stage: &Stage, id: &str) -> Result<Count> {
    let cri = stage.node.cri().await?;
    let pod = cri.pod(id).namespace("sealed").run().await?;
    let task = pod.container("main").args(&["/counter"]).run().await?;
    task.counts_to(3).await?;
    stage
        .checkpoint(&format!("sealed/{id}/main"), id, &["--exit"])
        .await?;
    task.ended().await?;
    let last = Count::last(&task.said("stdout")?).context("the counter said nothing")?;
    pod.remove().await?;
    Ok(last)
}

async fn warm<'n>(stage: &'n Stage, id: &str, image: &str) -> Result<Pod<'n>> {
    let cri = stage.node.cri().await?;
    let pod = cri.pod(id).namespace("sealed");
    pod.annotation(RESTORE_FROM, image).run().await
}

/// Files below `folder` in which `word` is.
pub(crate) fn with(word: &str, folder: &Path) -> Result<Vec<String>> {
    let mut found = Vec::new();
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        if path.is_dir() {
            found.extend(with(word, &path)?);
        } else if fs::read(&path)?
            .windows(word.len())
            .any(|bytes| bytes == word.as_bytes())
        {
            found.push(path.display().to_string());
        }
    }
    Ok(found)
}

pub(crate) async fn it_continues_and_nothing_is_in_clear(stage: &Stage) -> Result<()> {
    let name = "sealed-clear";
    let at = image(stage, name).await?;
    let folder = stage.image("sealed", name);
    // Its number by chance is in its memory, and in no other place.
    let store = folder.ancestors().nth(3).context("no store")?;
    let found = with(&at.nonce, store)?;
    ensure!(found.is_empty(), "{} is in {found:?}", at.nonce);
    let shown = stage
        .rekindle(&["image", "show", &format!("sealed/{name}")])
        .await?;
    let shown = String::from_utf8(shown.stdout)?;
    ensure!(shown.contains("sealed-1"), "{shown}");
    let verified = stage
        .rekindle(&["image", "verify", &format!("sealed/{name}")])
        .await?;
    ensure!(verified.status.success(), "{verified:?}");

    let new = warm(stage, "sealed-clear-2", name).await?;
    let task = new.container("main").args(&["/counter"]).run().await?;
    task.counts_to(at.n + 3).await?;
    at.continues_in(&task.said("stdout")?, at.n)?;
    new.remove().await
}

/// The same memory of a namespace without a key is found, so that the other test looks in the right place.
pub(crate) async fn without_a_key_it_is_in_clear(stage: &Stage) -> Result<()> {
    let (task, count) = stage.lived_in("in-clear").await?;
    stage.checkpoint("in-clear", "in-clear", &[]).await?;
    task.remove().await?;
    let found = with(&count.nonce, &stage.image("default", "in-clear"))?;
    ensure!(!found.is_empty(), "{} is nowhere", count.nonce);
    Ok(())
}

pub(crate) async fn another_key_or_none_is_refused(stage: &Stage) -> Result<()> {
    let name = "sealed-locked";
    image(stage, name).await?;
    let file = stage.node.path("/etc/rekindle/config.toml");
    let right = fs::read_to_string(&file)?;
    let mut refusals = Vec::new();
    for (from, to) in [
        (KEY, KEY.replace("00", "ff")),
        ("sealed-1", "sealed-2".to_owned()),
        ("/bin/echo", "/bin/false".to_owned()),
        (KEY, "short".to_owned()),
    ] {
        fs::write(&file, right.replace(from, &to))?;
        let pod = warm(stage, &format!("sealed-locked-{}", refusals.len()), name).await?;
        let created = pod.container("main").args(&["/counter"]).create().await?;
        let refusal = created.start().await.err().map(|e| e.to_string());
        refusals.push(refusal);
        fs::write(&file, &right)?;
        pod.remove().await?;
    }
    for (refusal, words) in refusals.iter().zip([
        "is another one",
        "which this node does not have",
        "ended with 1",
        "is no key",
    ]) {
        let said = refusal.as_deref().context("it was started")?;
        ensure!(said.contains(words), "{words:?} is not in: {said}");
        ensure!(!said.contains(KEY), "the key is told: {said}");
    }
    Ok(())
}
