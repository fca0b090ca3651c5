//! Where a container's processes are accounted: in a cgroup called as it is, or in a scope of systemd's.

use super::{NAMESPACE, Node};
use anyhow::Result;
use std::fs;

impl Node {
    /// The cgroup of a container made through the API, below the root of a hierarchy.
    pub fn cgroup_of(&self, id: &str) -> String {
        match self.is_a_machine() {
            true => format!("/system.slice/{NAMESPACE}-{id}.scope"),
            false => format!("/{NAMESPACE}/{id}"),
        }
    }

    /// The same as its specification has it.
    pub(crate) fn cgroups_path(&self, id: &str) -> String {
        match self.is_a_machine() {
            true => format!("system.slice:{NAMESPACE}:{id}"),
            false => self.cgroup_of(id),
        }
    }

    /// Where the kubelet puts the containers of the pod with this uid.
    pub(crate) fn cgroup_parent(&self, uid: &str) -> String {
        match self.is_a_machine() {
            // A dash in a slice's name is a level of the tree.
            true => format!(
                "/kubepods.slice/kubepods-pod{}.slice",
                uid.replace('-', "_")
            ),
            false => format!("/kubepods/pod{uid}"),
        }
    }

    /// The processes in the cgroup of container `id`, as [`Node::processes`] tells them.
    pub fn processes_of(&self, id: &str) -> Result<Vec<(u32, String)>> {
        let names = names(id);
        let mut all = self.processes()?;
        all.retain(|(pid, _)| {
            let groups = fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap_or_default();
            let mut last = groups.lines().filter_map(|group| group.rsplit('/').next());
            last.any(|name| names.iter().any(|one| one == name))
        });
        Ok(all)
    }
}

/// What the cgroup of a container may be called, whoever made it: runc, or systemd for the API or for CRI.
pub(crate) fn names(id: &str) -> [String; 3] {
    [
        id.to_owned(),
        format!("{NAMESPACE}-{id}.scope"),
        format!("cri-containerd-{id}.scope"),
    ]
}
