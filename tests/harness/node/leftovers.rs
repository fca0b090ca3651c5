//! The folders of nodes on the host: claimed under a lock, and swept when their keeper is gone.

use anyhow::{Context, Result};
use nix::fcntl::{Flock, FlockArg};
use std::fs::{self, File};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::sync::atomic::{AtomicU32, Ordering};

const PREFIX: &str = "rekindle-node-";

/// A folder that no sweep touches while this or the keeper's copy of the lock is there.
#[derive(Debug)]
pub(super) struct Claim {
    pub(super) dir: PathBuf,
    _lock: Flock<File>,
}

/// Removes what killed keepers left, then makes a folder for a new node. A keeper holds the lock of its folder as long as it
/// lives: the lock belongs to the open file, and the file is its stderr.
pub(super) fn sweep_then_claim() -> Result<(Claim, Stdio)> {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    let base = PathBuf::from(std::env::var_os("REKINDLE_TMP").unwrap_or_else(|| "/var/tmp".into()));
    // Between a folder's birth and its lock nobody else may look at it.
    let gate = crate::root::cache().join("nodes.lock");
    let gate =
        File::create(&gate).with_context(|| format!("making the lock {}", gate.display()))?;
    let _gate = Flock::lock(gate, FlockArg::LockExclusive).map_err(|(_, e)| e)?;
    for entry in fs::read_dir(&base)?.flatten() {
        if entry.file_name().to_string_lossy().starts_with(PREFIX) && entry.path().is_dir() {
            sweep(&entry.path());
        }
    }
    let number = COUNT.fetch_add(1, Ordering::Relaxed);
    let dir = base.join(format!("{PREFIX}{}-{number}", std::process::id()));
    fs::create_dir(&dir).with_context(|| format!("making the node's folder {}", dir.display()))?;
    let log = File::create(dir.join("keeper.log"))?;
    let claim = Flock::lock(log, FlockArg::LockExclusiveNonblock).map_err(|(_, e)| e)?;
    let copy = Stdio::from(claim.as_fd().try_clone_to_owned()?);
    Ok((Claim { dir, _lock: claim }, copy))
}

/// Best effort: what cannot be removed now is tried again at the next start.
fn sweep(dir: &Path) {
    let held = |log| Flock::lock(log, FlockArg::LockExclusiveNonblock).is_err();
    if File::open(dir.join("keeper.log")).is_ok_and(held) {
        return;
    }
    let name = dir.file_name().unwrap_or_default();
    for hierarchy in hierarchies() {
        remove_cgroup(&hierarchy.join(name));
    }
    let _ = fs::remove_dir_all(dir);
}

fn remove_cgroup(cgroup: &Path) {
    let Ok(entries) = fs::read_dir(cgroup) else {
        return;
    };
    let _ = fs::write(cgroup.join("freezer.state"), "THAWED");
    for entry in entries.flatten().filter(|entry| entry.path().is_dir()) {
        remove_cgroup(&entry.path());
    }
    let _ = fs::remove_dir(cgroup);
}

fn hierarchies() -> Vec<PathBuf> {
    let table = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let cgroup = |line: &&str| line.contains(" - cgroup ") || line.contains(" - cgroup2 ");
    table
        .lines()
        .filter(cgroup)
        .filter_map(|line| line.split(' ').nth(4))
        .map(PathBuf::from)
        .collect()
}
