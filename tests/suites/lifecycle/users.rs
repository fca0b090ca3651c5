//! Containers with users of their own, whose root containerd wants to be shown with those.

use crate::{Stage, process::is_gone};
use anyhow::{Context, Result};
use rekindle_harness::poll;
use std::fs;
use std::os::unix::fs::MetadataExt;

pub(crate) async fn a_container_has_users_of_its_own(stage: &Stage) -> Result<()> {
    const ID: &str = "users-own";
    const MAP: &str = "0:200000:65536";
    let node = &stage.node;
    let line =
        "id -u; stat -c %u:%g /bin/busybox /; echo mine > /file; stat -c %u:%g /file; sleep 1000";
    let log = "file:///run/users-own";
    let image = stage.busybox.name.as_str();
    node.run([
        "ctr",
        "run",
        "--detach",
        "--remap-labels",
        "--uidmap",
        MAP,
        "--gidmap",
        MAP,
        "--log-uri",
        log,
        image,
        ID,
        "sh",
        "-c",
        line,
    ])
    .await?;
    let said = poll::until("the users", async || {
        let text = fs::read_to_string(node.path("/run/users-own"))?;
        Ok((text.lines().count() == 4).then_some(text))
    })
    .await?;
    assert_eq!(said, "0\n0:0\n0:0\n0:0\n");
    // As the node has them: the image's files are root's, shown as the container's; its own are not.
    let tasks = node.run(["ctr", "task", "list"]).await?;
    let pid = tasks.lines().find_map(|line| {
        let mut words = line.split_whitespace();
        (words.next() == Some(ID)).then(|| words.next())?
    });
    let pid = pid.context("the task is not listed")?;
    let inside = node.path("/proc").join(pid);
    let status = fs::read_to_string(inside.join("status"))?;
    assert!(status.contains("Uid:\t200000\t"), "{status}");
    for file in ["bin/busybox", "file"] {
        assert_eq!(
            fs::metadata(inside.join("root").join(file))?.uid(),
            200_000,
            "{file}"
        );
    }
    node.run(["ctr", "task", "delete", "--force", ID]).await?;
    is_gone(stage, ID).await?;
    node.run(["ctr", "container", "delete", ID]).await?;
    Ok(())
}
