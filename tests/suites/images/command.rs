//! The command line on a node: what it tells of images, and how it ends.

use crate::damaged::Copy;
use crate::stage::{Stage, counts_to};
use crate::unmade::with_gpu;
use anyhow::{Context, Result, ensure};
use rekindle_harness::Count;
use serde_json::Value;
use std::fs;
use std::process::Output;

/// Asserts that a command ended with `code` and one line on stderr that has all of `words`.
pub(crate) fn fails(output: &Output, code: i32, words: &[&str]) -> Result<()> {
    assert_eq!(output.status.code(), Some(code), "{output:?}");
    let text = String::from_utf8_lossy(&output.stderr);
    ensure!(
        text.trim().lines().count() == 1,
        "stderr is not one line: {text:?}"
    );
    for word in words {
        ensure!(text.contains(word), "{word:?} is not in: {text}");
    }
    Ok(())
}

/// The stdout of a command, which must succeed.
async fn says(stage: &Stage, args: &[&str]) -> Result<String> {
    let output = stage.rekindle(args).await?;
    ensure!(output.status.success(), "{args:?}: {output:?}");
    Ok(String::from_utf8(output.stdout)?)
}

/// The generations of an image that `rekindle image ls` lists.
pub(crate) async fn generations(stage: &Stage, name: &str) -> Result<Vec<u64>> {
    let rows: Value = serde_json::from_str(&says(stage, &["image", "ls", "--json"]).await?)?;
    let rows = rows.as_array().context("no array")?;
    let ours = rows.iter().filter(|row| row["name"] == name);
    ours.map(|row| row["generation"].as_u64().context("no generation"))
        .collect()
}

pub(crate) async fn an_image_is_shown(stage: &Stage) -> Result<()> {
    let (task, _) = stage.lived_in("shown").await?;
    stage.checkpoint("shown", "shown", &[]).await?;
    let text = says(stage, &["image", "show", "shown"]).await?;
    let value = |title: &str| {
        let mut lines = text.lines();
        lines.find_map(|line| Some(line.strip_prefix(title)?.trim().to_owned()))
    };
    assert_eq!(
        value("image ").as_deref(),
        Some("default/shown@1"),
        "{text}"
    );
    assert_eq!(value("container ").as_deref(), Some("shown"), "{text}");
    assert_eq!(value("user ").as_deref(), Some("0:0"), "{text}");
    let process = value("process ").context("no process")?;
    ensure!(process.starts_with("1 "), "{process:?} in {text}");

    let json = says(stage, &["image", "show", "default/shown@1", "--json"]).await?;
    assert_eq!(json.lines().count(), 1, "{json}");
    let mut manifest: Value = serde_json::from_str(&json)?;
    assert_eq!(
        (&manifest["namespace"], &manifest["name"]),
        (&"default".into(), &"shown".into())
    );
    let told = manifest.as_object_mut().context("no object")?;
    let contents = told.remove("contents").context("no contents")?;
    for beside in ["packs_shared_with", "quarantined", "kind", "place"] {
        told.remove(beside).context(beside)?;
    }
    let memory = contents["memory"].as_array().context("no memory")?;
    let stack = memory.iter().find(|of| of["kind"] == "stack");
    let stack = stack.context("the counter has no stack")?;
    ensure!(
        stack["pid"] == 1 && stack["bytes"].as_u64() > Some(0),
        "{stack}"
    );
    let written = fs::read(stage.image("default", "shown").join("manifest.json"))?;
    assert_eq!(manifest, serde_json::from_slice::<Value>(&written)?);

    for missing in ["never-shown", "shown@2", "elsewhere/shown"] {
        let output = stage.rekindle(&["image", "show", missing]).await?;
        fails(&output, 4, &[missing])?;
    }
    task.remove().await
}

pub(crate) async fn an_image_is_removed(stage: &Stage) -> Result<()> {
    let (task, _) = stage.lived_in("removed").await?;
    for _ in 1..=3 {
        stage.checkpoint("removed", "removed", &[]).await?;
    }
    task.remove().await?;
    assert_eq!(generations(stage, "removed").await?, [1, 2, 3]);
    let folder = stage.image("default", "removed");
    // One is named, and then all are meant.
    let said = says(stage, &["image", "rm", "removed@1"]).await?;
    assert_eq!(said, "removed default/removed@1\n");
    assert_eq!(generations(stage, "removed").await?, [2, 3]);
    ensure!(!folder.exists(), "its files are there");
    fails(
        &stage.rekindle(&["image", "rm", "removed@1"]).await?,
        4,
        &["removed@1"],
    )?;
    says(stage, &["image", "rm", "removed"]).await?;
    assert_eq!(generations(stage, "removed").await?, [0; 0]);
    fails(
        &stage.rekindle(&["image", "rm", "removed"]).await?,
        4,
        &["removed"],
    )?;
    // Its container is told too.
    let warm = stage.warm("removed-2", "removed");
    let words = ["default/removed", "no image"];
    stage.refuses("removed-2", warm, &words).await.map(drop)
}

pub(crate) async fn a_damaged_image_is_told(stage: &Stage) -> Result<()> {
    let (task, _) = stage.lived_in("told").await?;
    stage.checkpoint("told", "told", &[]).await?;
    task.remove().await?;
    let said = says(stage, &["image", "verify", "told"]).await?;
    ensure!(
        said.contains("default/told@1") && said.contains("sound"),
        "{said}"
    );

    let copy = Copy::of(stage, "told", "told-copy")?;
    let core = copy.path("criu/core-1.img");
    let mut bytes = fs::read(&core)?;
    *bytes.last_mut().context("the file is empty")? ^= 1;
    fs::write(&core, bytes)?;
    // The sound one beside it is told as such, and does not make up for it.
    let output = stage
        .rekindle(&["image", "verify", "told", "told-copy"])
        .await?;
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    let said = String::from_utf8(output.stdout)?;
    let lines: Vec<&str> = said.lines().collect();
    ensure!(lines.len() == 2, "{said}");
    ensure!(
        lines[0].starts_with("default/told@1 ") && lines[0].ends_with(": sound"),
        "{said}"
    );
    for word in ["default/told-copy@1: unsound:", "core-1.img"] {
        ensure!(lines[1].contains(word), "{word:?} is not in: {}", lines[1]);
    }
    // One whose manifest is none is told as damaged by whoever reads it.
    fs::write(copy.path("manifest.json"), "{}")?;
    for command in ["verify", "show"] {
        let output = stage.rekindle(&["image", command, "told-copy"]).await?;
        assert_eq!(output.status.code(), Some(1), "{output:?}");
    }
    let output = stage.rekindle(&["image", "verify", "never-told"]).await?;
    fails(&output, 4, &["never-told"])?;
    says(stage, &["image", "rm", "told-copy"]).await.map(drop)
}

pub(crate) async fn no_image_is_made_of_a_container_that_is_missing(stage: &Stage) -> Result<()> {
    for missing in ["nobody", "no-pod/nobody", "default/no-pod/nobody"] {
        let args = ["checkpoint", missing, "--name", "of-nobody"];
        fails(&stage.rekindle(&args).await?, 4, &[missing])?;
    }
    // One that has no task any more is there, and in no state for it.
    let task = stage.container("gone-by").shell("exit 0").run().await?;
    task.wait().await?;
    let args = ["checkpoint", "gone-by", "--name", "of-nobody"];
    fails(&stage.rekindle(&args).await?, 3, &["gone-by", "stopped"])?;
    assert_eq!(generations(stage, "of-nobody").await?, [0; 0]);
    task.remove().await
}

pub(crate) async fn a_container_is_suspended_and_resumed(stage: &Stage) -> Result<()> {
    let task = stage.container("still").args(&["/counter"]).run().await?;
    counts_to(task.io().out()?, 2).await?;
    let answers = async |command: &str| {
        let said = says(stage, &[command, "still"]).await?;
        Ok::<_, anyhow::Error>(said.trim_end().to_owned())
    };
    assert_eq!(answers("suspend").await?, "still is suspended");
    let still = task.io().out()?.so_far();
    tokio::time::sleep(std::time::Duration::from_millis(500)).await;
    assert_eq!(task.io().out()?.so_far(), still, "it goes on");
    assert_eq!(answers("suspend").await?, "still is suspended already");
    assert_eq!(answers("resume").await?, "still is running again");
    let at = Count::last(&still).context("it has not counted")?;
    counts_to(task.io().out()?, at.n + 3).await?;
    assert_eq!(answers("resume").await?, "still is running already");
    let json = says(stage, &["suspend", "--json", "-n", "default", "still"]).await?;
    let json: Value = serde_json::from_str(&json)?;
    let wanted = serde_json::json!({
        "container": "still", "containerd_namespace": "default", "state": "suspended", "already": false,
    });
    assert_eq!(json, wanted);
    task.kill(9).await?;
    task.wait().await?;
    let gone = stage.rekindle(&["resume", "still"]).await?;
    fails(
        &gone,
        3,
        &["still", "only a running or paused container can be resumed"],
    )?;
    task.remove().await?;
    let none = stage.rekindle(&["suspend", "still"]).await?;
    fails(&none, 4, &["still", "k8s.io or default"])
}

/// Its memory would stay where it is, and nobody else would have the GPU.
pub(crate) async fn one_with_gpu_devices_is_not_suspended(stage: &Stage) -> Result<()> {
    let gpu = with_gpu(stage.container("still-gpu").args(&["/counter"]));
    let task = gpu.run().await?;
    let before = counts_to(task.io().out()?, 2).await?;
    let refused = stage.rekindle(&["suspend", "still-gpu"]).await?;
    fails(
        &refused,
        3,
        &["still-gpu", "/dev/nvidia0", "cannot free the GPU memory"],
    )?;
    counts_to(task.io().out()?, before.n + 5).await?;
    task.remove().await
}
