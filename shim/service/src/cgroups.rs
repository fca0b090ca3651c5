//! Cgroups that a killed runc left behind.

use std::{
    fs,
    path::{Component, Path, PathBuf},
};

/// Removes the container's cgroup in every hierarchy where it is, if nothing is in it. `path` is the
/// spec's `cgroupsPath`; systemd's form (`slice:prefix:name`) is left to systemd, which removes a scope
/// with its last process.
pub(crate) fn remove(path: &str) {
    let path = Path::new(path);
    let plain = path.is_absolute()
        && path
            .components()
            .skip(1)
            .all(|part| matches!(part, Component::Normal(_)));
    if !plain {
        return;
    }
    let below: PathBuf = path.components().skip(1).collect();
    if below.as_os_str().is_empty() {
        return;
    }
    let Ok(table) = fs::read_to_string("/proc/self/mountinfo") else {
        return;
    };
    for line in table.lines() {
        let Some((mount, kind)) = line.split_once(" - ") else {
            continue;
        };
        if !kind.starts_with("cgroup") {
            continue;
        }
        if let Some(point) = mount.split(' ').nth(4) {
            // Not empty, or not there: both are fine.
            let _ = fs::remove_dir(Path::new(point).join(&below));
        }
    }
}
