//! Containers with users of their own, whose root containerd wants to be shown with those.

use crate::{Stage, process::is_gone};
use anyhow::{Context, Result};
use rekindle_harness::{Runtime, Suite, poll};
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;

/// Runs a container through `ctr` with 200000 for root, and waits until it has said `expected`. Answers with what
/// `/proc` of the node has of it.
async fn run(stage: &Stage, id: &str, flag: &str, line: &str, expected: &str) -> Result<PathBuf> {
    const MAPS: &str = "--remap-labels --uidmap 0:200000:65536 --gidmap 0:200000:65536";
    let (node, image) = (&stage.node, &stage.busybox.name);
    let log = format!("/run/{id}");
    let ctr = format!(
        "ctr run --detach {flag} {MAPS} --log-uri file://{log} {image} {id} sh -c '{line}; sleep 1000'"
    );
    node.run(["sh", "-c", &ctr]).await?;
    let mut said = String::new();
    let told = poll::until("the users", async || {
        said = fs::read_to_string(node.path(&log))?;
        Ok((said == expected).then_some(()))
    });
    let outcome = told.await;
    outcome.with_context(|| format!("it said {said:?}"))?;
    let tasks = node.run(["ctr", "task", "list"]).await?;
    let pid = tasks.lines().find_map(|line| {
        let mut words = line.split_whitespace();
        (words.next() == Some(id)).then(|| words.next())?
    });
    let pid = pid.context("the task is not listed")?;
    Ok(node.path("/proc").join(pid))
}

async fn remove(stage: &Stage, id: &str) -> Result<()> {
    let node = &stage.node;
    node.run(["ctr", "task", "delete", "--force", id]).await?;
    is_gone(stage, id).await?;
    node.run(["ctr", "container", "delete", id]).await?;
    Ok(())
}

pub(crate) async fn a_container_has_users_of_its_own(stage: &Stage) -> Result<()> {
    let line = "id -u; stat -c %u:%g /bin/busybox /; echo mine > /file; stat -c %u:%g /file";
    let expected = "0\n0:0\n0:0\n0:0\n";
    let process = run(stage, "users-own", "", line, expected).await?;
    let status = fs::read_to_string(process.join("status"))?;
    assert!(status.contains("Uid:\t200000\t"), "{status}");
    // On the disk the image's files are root's, and shown as the container's; its own are not.
    for file in ["root/bin/busybox", "root/file"] {
        let owner = fs::metadata(process.join(file))?.uid();
        assert_eq!(owner, 200_000, "{file}");
    }
    remove(stage, "users-own").await
}

/// Of an image with one layer that is a bind mount, and no overlay.
pub(crate) async fn a_read_only_root_is_shown_with_them_too(stage: &Stage) -> Result<()> {
    // The shim that containerd ships forgets the users where it makes a bind read-only, and the `ctr` of containerd 1.7
    // makes no such view.
    if stage.node.runtime() == Runtime::Go || stage.node.suite() == Suite::Trixie {
        return Ok(());
    }
    let line = "stat -c %u:%g /bin/busybox /; touch /file 2>/dev/null || echo read-only";
    let expected = "0:0\n0:0\nread-only\n";
    run(stage, "users-read-only", "--read-only", line, expected).await?;
    remove(stage, "users-read-only").await
}
