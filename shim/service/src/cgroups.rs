//! Cgroups that a killed runc left behind.

use std::{
    fs, io,
    path::{Component, Path, PathBuf},
    time::Duration,
};

/// How long killed processes may take to leave their cgroup.
const DYING: Duration = Duration::from_secs(2);

/// Removes the container's cgroup in every hierarchy where it is, once the processes that were killed in
/// it are gone. `path` is the spec's `cgroupsPath`; systemd's form (`slice:prefix:name`) is left to systemd,
/// which removes a scope with its last process.
pub(crate) async fn remove(path: &str) {
    let gone = async {
        while !remove_empty(path) {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    if tokio::time::timeout(DYING, gone).await.is_err() {
        tracing::warn!(path, "the cgroup is still in use, and is left");
    }
}

/// Removes it where nothing is in it. Says whether none is left.
pub(crate) fn remove_empty(path: &str) -> bool {
    let path = Path::new(path);
    let plain = path.is_absolute()
        && path
            .components()
            .skip(1)
            .all(|part| matches!(part, Component::Normal(_)));
    if !plain {
        return true;
    }
    let below: PathBuf = path.components().skip(1).collect();
    if below.as_os_str().is_empty() {
        return true;
    }
    let Ok(table) = fs::read_to_string("/proc/self/mountinfo") else {
        return true;
    };
    let mut none = true;
    for line in table.lines() {
        let Some((mount, kind)) = line.split_once(" - ") else {
            continue;
        };
        if !kind.starts_with("cgroup") {
            continue;
        }
        if let Some(point) = mount.split(' ').nth(4) {
            let removed = fs::remove_dir(Path::new(point).join(&below));
            none &= !removed.is_err_and(|e| e.kind() == io::ErrorKind::ResourceBusy);
        }
    }
    none
}
