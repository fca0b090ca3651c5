//! Containers of which no image is made: the command says why, and they run on as before.

use crate::stage::{Stage, counts_to, shell};
use anyhow::{Result, ensure};
use rekindle_harness::container::Builder;
use serde_json::json;
use std::path::Path;

/// Asserts that no image `name` is made of a container, in one sentence with all of `words`, and that nothing of the
/// attempt is left.
async fn is_refused(stage: &Stage, container: &str, name: &str, words: &[&str]) -> Result<()> {
    let output = stage
        .rekindle(&["checkpoint", container, "--name", name])
        .await?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(
        output.status.code() == Some(3) && said.trim().lines().count() == 1,
        "the command ended with {}: {said}",
        output.status
    );
    for word in words {
        ensure!(
            said.contains(word),
            "{word:?} is not in the refusal: {said}"
        );
    }
    ensure!(
        !stage.images().await?.contains(&name.to_owned()),
        "an image was made"
    );
    let partial = format!("grep -rl {name} /var/lib/rekindle/images/.partial 2>/dev/null; true");
    let left = stage.node.run(["sh", "-c", &partial]).await?;
    ensure!(left.is_empty(), "the refused checkpoint has left {left}");
    Ok(())
}

pub(crate) async fn of_a_shared_pid_namespace(stage: &Stage) -> Result<()> {
    let words = ["PID namespace", "no other container could be restored"];
    let hosts = stage.container("unmade-pids").args(&["/counter"]);
    let hosts = hosts.change_spec(|spec| {
        if let Some(namespaces) = spec["linux"]["namespaces"].as_array_mut() {
            namespaces.retain(|namespace| namespace["type"] != "pid");
        }
    });
    let task = hosts.run().await?;
    let before = counts_to(task.io().out()?, 2).await?;
    is_refused(stage, "unmade-pids", "unmade-pids", &words).await?;
    counts_to(task.io().out()?, before.n + 5).await?;
    task.remove().await?;

    let cri = stage.node.cri().await?;
    let pod = cri.pod("unmade-shared").shared_pids().run().await?;
    let task = pod.container("main").args(&["/counter"]).run().await?;
    let before = task.counts_to(2).await?;
    is_refused(stage, "unmade-shared/main", "unmade-shared", &words).await?;
    task.counts_to(before.n + 5).await?;
    pod.remove().await
}

pub(crate) async fn of_a_user_namespace(stage: &Stage) -> Result<()> {
    let own = stage.container("unmade-users").args(&["/counter"]);
    let own = own.change_spec(|spec| {
        if let Some(namespaces) = spec["linux"]["namespaces"].as_array_mut() {
            namespaces.push(json!({"type": "user"}));
        }
        let mapping = json!([{"containerID": 0, "hostID": 0, "size": 65536}]);
        spec["linux"]["uidMappings"] = mapping.clone();
        spec["linux"]["gidMappings"] = mapping;
    });
    let task = own.run().await?;
    let before = counts_to(task.io().out()?, 2).await?;
    let words = ["user namespace", "hostUsers: false"];
    is_refused(stage, "unmade-users", "unmade-users", &words).await?;
    counts_to(task.io().out()?, before.n + 5).await?;
    task.remove().await
}

/// The node has no such GPU; a device node of its number is what the container gets of one.
pub(crate) fn with_gpu(container: Builder<'_>) -> Builder<'_> {
    container.change_spec(|spec| {
        spec["linux"]["devices"] =
            json!([{"path": "/dev/nvidia0", "type": "c", "major": 195, "minor": 0}]);
    })
}

pub(crate) async fn of_gpu_devices(stage: &Stage) -> Result<()> {
    let gpu = with_gpu(stage.container("unmade-gpu").args(&["/counter"]));
    let task = gpu.run().await?;
    let before = counts_to(task.io().out()?, 2).await?;
    let words = ["/dev/nvidia0", "built without GPU support"];
    is_refused(stage, "unmade-gpu", "unmade-gpu", &words).await?;
    counts_to(task.io().out()?, before.n + 5).await?;
    task.remove().await
}

/// Under cgroup v1, where nobody can take hold of a process that is stopped and frozen.
pub(crate) async fn of_a_stopped_process(stage: &Stage) -> Result<()> {
    let line = "sleep 1000 & kill -STOP $!; exec /counter";
    let task = stage.container("unmade-stopped").shell(line).run().await?;
    let before = counts_to(task.io().out()?, 2).await?;
    if !Path::new("/sys/fs/cgroup/cgroup.controllers").exists() {
        let words = ["is stopped (SIGSTOP)", "kill -CONT"];
        is_refused(stage, "unmade-stopped", "unmade-stopped", &words).await?;
        counts_to(task.io().out()?, before.n + 5).await?;
        // A user's own pause changes what is seen of it, and nothing else.
        task.pause().await?;
        is_refused(stage, "unmade-stopped", "unmade-stopped", &words).await?;
        task.resume().await?;
        shell(&task, "continue", "kill -CONT -1").await?;
    }
    stage
        .checkpoint("unmade-stopped", "unmade-stopped", &[])
        .await?;
    task.remove().await
}

/// As NVIDIA's runtime does it: in a hook, and the spec says nothing.
pub(crate) async fn of_gpu_devices_that_a_hook_made(stage: &Stage) -> Result<()> {
    let gpu = stage.container("unmade-hook");
    let gpu = gpu.shell("mknod /dev/nvidiactl c 195 255; exec /counter");
    let task = gpu.run().await?;
    let before = counts_to(task.io().out()?, 2).await?;
    let words = ["/dev/nvidiactl", "built without GPU support"];
    is_refused(stage, "unmade-hook", "unmade-hook", &words).await?;
    counts_to(task.io().out()?, before.n + 5).await?;
    task.remove().await
}

/// Its /dev/shm is the node's.
pub(crate) async fn of_the_nodes_ipc_namespace(stage: &Stage) -> Result<()> {
    let cri = stage.node.cri().await?;
    let pod = cri.pod("unmade-ipc").host_ipc().run().await?;
    let task = pod.container("main").args(&["/counter"]).run().await?;
    let before = task.counts_to(2).await?;
    let words = ["shares the node's IPC namespace (hostIPC)", "/dev/shm"];
    is_refused(stage, "unmade-ipc/main", "unmade-ipc", &words).await?;
    task.counts_to(before.n + 5).await?;
    pod.remove().await
}

/// A /dev/shm of the container's own is nobody else's, whatever the namespace.
pub(crate) async fn none_of_its_own_ipc_namespace_is_no_reason(stage: &Stage) -> Result<()> {
    fn without_ipc(container: Builder<'_>) -> Builder<'_> {
        container.change_spec(|spec| {
            if let Some(namespaces) = spec["linux"]["namespaces"].as_array_mut() {
                namespaces.retain(|namespace| namespace["type"] != "ipc");
            }
            // mqueue belongs to the namespace that is not its own.
            if let Some(mounts) = spec["mounts"].as_array_mut() {
                mounts.retain(|mount| mount["destination"] != "/dev/mqueue");
            }
        })
    }
    let line = "echo own > /dev/shm/note; exec /counter";
    let task = without_ipc(stage.container("no-ipc").shell(line));
    let task = task.run().await?;
    counts_to(task.io().out()?, 3).await?;
    stage.checkpoint("no-ipc", "no-ipc", &[]).await?;
    let warm = without_ipc(stage.warm("no-ipc-2", "no-ipc")).run().await?;
    counts_to(warm.io().out()?, 5).await?;
    assert_eq!(shell(&warm, "shm", "cat /dev/shm/note").await?, "own");
    warm.remove().await?;
    task.remove().await
}
