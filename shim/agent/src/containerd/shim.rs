//! Whose shim a container has. containerd's records do not tell: the runtime's name is runc's for both.

use std::{fs, path::PathBuf, time::Duration};

use tokio::{process::Command, time::timeout};

/// What the shim prints for `-v`, before its version.
const OURS: &str = "containerd-shim-rekindle-v1";
/// Linux cuts a process's name to 15 bytes, so this is what any shim's begins with.
const ANY: &str = "containerd-shim";
/// A program that prints its version needs milliseconds.
const PATIENCE: Duration = Duration::from_secs(5);

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Shim {
    /// rekindle's.
    Ours,
    /// Another one.
    Foreign,
    /// Its process is not found, as from another PID namespace.
    Unknown,
}

/// The shim of the container whose init is `pid`: the parent of it, asked for its version. By its file's
/// name it could not be told: it may be installed under runc's.
pub(crate) async fn of(pid: u32) -> Shim {
    let Some(parent) = parent(pid) else {
        return Shim::Unknown;
    };
    let named = fs::read_to_string(format!("/proc/{parent}/comm"));
    if !named.is_ok_and(|name| name.starts_with(ANY)) {
        return Shim::Unknown;
    }
    let mut command = Command::new(PathBuf::from(format!("/proc/{parent}/exe")));
    command.arg("-v").kill_on_drop(true);
    match timeout(PATIENCE, command.output()).await {
        Ok(Ok(output)) if output.stdout.starts_with(OURS.as_bytes()) => Shim::Ours,
        Ok(Ok(_)) => Shim::Foreign,
        Ok(Err(_)) | Err(_) => Shim::Unknown,
    }
}

fn parent(pid: u32) -> Option<u32> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("PPid:"))?;
    line.trim().parse().ok().filter(|parent| *parent > 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_parent_that_is_no_shim_is_not_asked() {
        assert_eq!(
            parent(std::process::id()),
            Some(std::os::unix::process::parent_id())
        );
        assert_eq!(of(std::process::id()).await, Shim::Unknown);
        assert_eq!(of(u32::MAX).await, Shim::Unknown);
    }
}
