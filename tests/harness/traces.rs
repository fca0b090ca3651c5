//! What a container has left on its node.

use crate::{Node, node::cgroup, poll};
use anyhow::{Context, Result};

impl Node {
    /// Waits until neither a process, nor a mount, nor a cgroup, nor a folder of `id` is left; a shim counts as its pod's.
    pub async fn is_rid_of(&self, id: &str) -> Result<()> {
        let mut last = Vec::new();
        let gone = poll::until("the traces to go", async || {
            last = self.traces_of(id).await?;
            Ok(last.is_empty().then_some(()))
        });
        let outcome = gone.await;
        outcome.with_context(|| format!("what is left of {id}:\n{}", last.join("\n")))
    }

    /// Waits until there is no sandbox of the pod with this uid, whose id nobody was told.
    pub(crate) async fn is_rid_of_pod(&self, uid: &str) -> Result<()> {
        let script = format!(
            "grep -l {uid} /run/containerd/io.containerd.runtime.v2.task/k8s.io/*/config.json 2>/dev/null; \
             find /sys/fs/cgroup -mindepth 1 -type d -path '*{}/*'; true",
            self.cgroup_parent(uid)
        );
        let mut left = String::new();
        let gone = poll::until("the sandbox to go", async || {
            left = self.run(["sh", "-c", &script]).await?;
            Ok(left.is_empty().then_some(()))
        });
        let outcome = gone.await;
        outcome.with_context(|| format!("what is left of the refused pod:\n{left}"))
    }

    /// What there is of `id` now, a line for each.
    pub async fn traces_of(&self, id: &str) -> Result<Vec<String>> {
        // pids first: a process that ends meanwhile must not hide a mount that it held.
        let mut found = Vec::new();
        let mut processes = self.processes_of(id)?;
        processes.extend(self.processes_with(&[&format!("-id {id} ")])?);
        found.extend(
            processes
                .iter()
                .map(|(pid, line)| format!("process {pid}: {line}")),
        );
        let cgroups = cgroup::names(id).map(|name| format!("-name '{name}'"));
        let script = format!(
            "grep -E '/{id}(/| )' /proc/self/mountinfo; \
             find /sys/fs/cgroup -type d '(' {} ')'; \
             find /run/containerd /run/rekindle -path /run/rekindle/images -prune -o -name '{id}' -print 2>/dev/null; true",
            cgroups.join(" -o ")
        );
        let rest = self.run(["sh", "-c", &script]).await?;
        found.extend(rest.lines().map(str::to_owned));
        if self.is_a_machine() {
            // One that has failed has no cgroup any more, and would be in the way of the next.
            let scopes = cgroup::names(id).map(|name| format!("'{name}'"));
            let list = format!(
                "systemctl list-units --all --no-legend --plain {}",
                scopes.join(" ")
            );
            found.extend(
                self.run(["sh", "-c", &list])
                    .await?
                    .lines()
                    .map(str::to_owned),
            );
        }
        Ok(found)
    }

    /// The files in the writable layer of a container that was made through [`Node::container`].
    pub async fn layer_of(&self, id: &str) -> Result<Vec<String>> {
        let upper = format!("{}/fs", self.folder_of_layer(id).await?);
        let files = self.run(["find", &upper, "-mindepth", "1"]).await?;
        Ok(files.lines().map(str::to_owned).collect())
    }

    /// The folder that has it, as `fs`, and the overlay's `work`.
    pub async fn folder_of_layer(&self, id: &str) -> Result<String> {
        let key = format!("{id}-snapshot");
        let mount = self
            .run(["ctr", "snapshots", "mounts", "/mnt", &key])
            .await?;
        let begin = mount.split("upperdir=").nth(1);
        let upper = begin.and_then(|rest| rest.split([',', ' ']).next());
        let folder = upper.and_then(|upper| upper.strip_suffix("/fs"));
        let folder = folder.with_context(|| format!("snapshot {key} has no upper folder: {mount}"));
        Ok(folder?.to_owned())
    }

    /// The socket of the shim that serves `id`, which the shim itself has started.
    pub async fn shim_socket(&self, id: &str) -> Result<String> {
        // containerd 2 notes the whole answer of the shim's start, 1.7 only the address in it.
        let script = format!(
            "cd /run/containerd/io.containerd.runtime.v2.task/*/{id} && cat bootstrap.json address 2>/dev/null; true"
        );
        let text = self.run(["sh", "-c", &script]).await?;
        let begin = text
            .find("unix://")
            .with_context(|| format!("no socket is noted in the bundle of {id}: {text:?}"))?;
        let address = &text[begin + "unix://".len()..];
        let end = address.find(['"', '\n']).unwrap_or(address.len());
        Ok(address[..end].to_owned())
    }
}
