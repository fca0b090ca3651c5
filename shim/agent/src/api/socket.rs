//! The socket: who may connect to it.

use std::{fs, io, os::unix::fs::PermissionsExt as _, path::Path, time::Duration};

use anyhow::{Context as _, bail};
use futures::{Stream, stream};
use tokio::net::{UnixListener, UnixStream, unix::UCred};

/// Before the next try where the kernel has no descriptor left for a connection.
const EXHAUSTED: Duration = Duration::from_millis(100);

/// The number of a group, which is a name of `/etc/group` or the number itself.
pub(super) fn gid(group: &str) -> anyhow::Result<u32> {
    if let Ok(number) = group.parse() {
        return Ok(number);
    }
    let file = "/etc/group";
    let all = fs::read_to_string(file).with_context(|| format!("reading {file}"))?;
    let found = all.lines().find_map(|line| {
        let mut fields = line.split(':');
        (fields.next() == Some(group)).then(|| fields.nth(1)?.parse().ok())?
    });
    match found {
        Some(number) => Ok(number),
        None => bail!("agent.group = {group:?}: there is no such group in {file}"),
    }
}

/// Nobody but whom the permissions of the socket name can connect to it.
pub(super) fn bind(socket: &Path, group: Option<u32>) -> io::Result<UnixListener> {
    if let Some(folder) = socket.parent() {
        fs::create_dir_all(folder)?;
    }
    // Of one that was killed: whoever comes here holds the lock of the node's agent.
    match fs::remove_file(socket) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
        _ => {}
    }
    let listener = UnixListener::bind(socket)?;
    let mode = if group.is_some() { 0o660 } else { 0o600 };
    fs::set_permissions(socket, fs::Permissions::from_mode(mode))?;
    if group.is_some() {
        std::os::unix::fs::chown(socket, None, group)?;
        // The way to it, whatever the umask is; what lies beside it has permissions of its own.
        if let Some(folder) = socket.parent() {
            let mode = fs::metadata(folder)?.permissions().mode();
            fs::set_permissions(folder, fs::Permissions::from_mode(mode | 0o011))?;
        }
    }
    Ok(listener)
}

/// The connections of those who may.
pub(super) fn admitted(
    listener: UnixListener,
    group: Option<u32>,
) -> impl Stream<Item = io::Result<UnixStream>> + Send + 'static {
    stream::unfold(listener, move |listener| async move {
        loop {
            match listener.accept().await {
                Ok((stream, _)) => match stream.peer_cred() {
                    Ok(peer) if admits(&peer, group) => return Some((Ok(stream), listener)),
                    peer => tracing::warn!(?peer, "a caller of the API was refused"),
                },
                Err(error) => {
                    tracing::warn!(%error, "taking in a caller of the API");
                    tokio::time::sleep(EXHAUSTED).await;
                }
            }
        }
    })
}

/// Root, whom the agent runs as, and members of the group.
fn admits(peer: &UCred, group: Option<u32>) -> bool {
    if peer.uid() == 0 || peer.uid() == rustix::process::geteuid().as_raw() {
        return true;
    }
    let Some(group) = group else { return false };
    peer.gid() == group || peer.pid().is_some_and(|pid| groups(pid).contains(&group))
}

/// The further groups of a process; none where it is gone.
fn groups(pid: i32) -> Vec<u32> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("Groups:"));
    let numbers = line.unwrap_or_default().split_whitespace();
    numbers.filter_map(|number| number.parse().ok()).collect()
}
