//! `rekindle restore`: another container like one that there is, from an image.

use crate::command::fails;
use crate::damaged::Copy;
use crate::stage::{Stage, counts_to};
use anyhow::{Context, Result, ensure};
use rekindle_harness::{Count, poll};
use serde_json::Value;
use std::fs;

/// Removes a container that the command made, as its user would.
async fn removed(stage: &Stage, id: &str) -> Result<()> {
    stage.node.run(["ctr", "task", "rm", "--force", id]).await?;
    stage.node.run(["ctr", "container", "rm", id]).await?;
    stage.node.is_rid_of(id).await
}

/// The containers that containerd knows of, and its layers.
async fn made(stage: &Stage) -> Result<String> {
    let containers = stage.node.run(["ctr", "container", "ls", "-q"]).await?;
    let layers = stage.node.run(["ctr", "snapshot", "ls"]).await?;
    Ok(format!("{containers}\n{layers}"))
}

pub(crate) async fn a_container_like_another_one_goes_on_from_its_image(
    stage: &Stage,
) -> Result<()> {
    let (task, from) = stage.lived_in("like-1").await?;
    stage.checkpoint("like-1", "like", &[]).await?;
    let at = counts_to(task.io().out()?, from.n).await?;
    let log = "/run/like-2.log";
    let args = [
        "restore", "like", "like-2", "--like", "like-1", "--log", log, "--json",
    ];
    let output = stage.rekindle(&args).await?;
    ensure!(output.status.success(), "{output:?}");
    let answer: Value = serde_json::from_slice(&output.stdout)?;
    ensure!(
        answer["container"] == "like-2" && answer["image"] == "default/like@1",
        "{answer}"
    );
    let enough = |text: &String| Count::last(text).is_some_and(|count| count.n >= at.n + 3);
    let text = poll::until("the restored counter", async || {
        let text = fs::read_to_string(stage.node.path(log)).unwrap_or_default();
        Ok(Some(text).filter(enough))
    })
    .await?;
    from.continues_in(&text, at.n)?;
    // In a layer of its own, which has what the image had.
    let exec = [
        "ctr",
        "task",
        "exec",
        "--exec-id",
        "look",
        "like-2",
        "cat",
        "/root/note",
    ];
    assert_eq!(stage.node.run(exec).await?.trim(), "kept");
    let pid = answer["pid"].as_u64().context("no pid")?;
    let cgroup = stage
        .node
        .run(["cat", &format!("/proc/{pid}/cgroup")])
        .await?;
    ensure!(
        cgroup.contains("like-2") && !cgroup.contains("like-1"),
        "{cgroup}"
    );
    counts_to(task.io().out()?, at.n + 10).await?;
    removed(stage, "like-2").await?;
    task.remove().await
}

pub(crate) async fn what_cannot_be_made_leaves_nothing(stage: &Stage) -> Result<()> {
    let (task, _) = stage.lived_in("unlike-1").await?;
    stage.checkpoint("unlike-1", "unlike", &[]).await?;
    let copy = Copy::of(stage, "unlike", "unlike-damaged")?;
    copy.reseal("criu/files.img", |bytes| bytes.truncate(bytes.len() / 2))?;
    let ours = |text: &str| {
        let mut lines: Vec<String> = text
            .lines()
            .filter(|line| line.contains("unlike"))
            .map(str::to_owned)
            .collect();
        lines.sort();
        lines
    };
    let before = ours(&made(stage).await?);
    for (image, id, like, code, words) in [
        ("never-made", "unlike-2", "unlike-1", 4, &["never-made"][..]),
        ("unlike@7", "unlike-2", "unlike-1", 4, &["unlike@7"]),
        ("unlike", "unlike-2", "nobody", 4, &["nobody"]),
        (
            "unlike",
            "unlike-1",
            "unlike-1",
            3,
            &["unlike-1", "another id"],
        ),
        (
            "unlike-damaged",
            "unlike-2",
            "unlike-1",
            1,
            &["unlike-2", "CRIU"],
        ),
    ] {
        let output = stage
            .rekindle(&["restore", image, id, "--like", like])
            .await?;
        fails(&output, code, words).with_context(|| format!("{image} {id} {like}"))?;
        let after = ours(&made(stage).await?);
        ensure!(
            after == before,
            "{image} {id} {like}: {before:?} became {after:?}"
        );
    }
    stage.node.is_rid_of("unlike-2").await?;
    task.remove().await
}

pub(crate) async fn another_host_is_named_and_may_be_forced(stage: &Stage) -> Result<()> {
    let (task, _) = stage.lived_in("hosts-1").await?;
    stage.checkpoint("hosts-1", "hosts", &[]).await?;
    let copy = Copy::of(stage, "hosts", "hosts-newer")?;
    copy.change_manifest(|manifest| manifest["facts"]["host"]["kernel"] = "99.1".into())?;
    let args = ["restore", "hosts-newer", "hosts-2", "--like", "hosts-1"];
    let output = stage.rekindle(&args).await?;
    fails(&output, 3, &["kernel 99.1", "older"])?;
    let forced = [&args[..], &["--force"]].concat();
    let output = stage.rekindle(&forced).await?;
    ensure!(output.status.success(), "{output:?}");
    removed(stage, "hosts-2").await?;
    // What is not of the host is refused all the same.
    copy.change_manifest(|manifest| {
        manifest["facts"]["container"]["security"]["uid"] = 1000.into();
    })?;
    let output = stage.rekindle(&forced).await?;
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    fails(&output, 3, &["user 1000"])?;
    ensure!(!said.contains("99.1"), "{said}");
    task.remove().await
}
