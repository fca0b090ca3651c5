//! The node of a process that runs in a virtual machine (`vm`): the machine itself, whose systemd runs containerd and
//! makes the cgroups of containers. There is one at a time; who starts it anew has it.

use super::{NodeConfig, config, install_shadow};
use crate::vm;
use anyhow::{Result, ensure};
use std::fs;
use std::path::Path;
use std::process::{Command, Stdio};

/// Whether this process runs in the machine that is to be its node.
pub(crate) fn is_here() -> bool {
    std::env::var("REKINDLE_NODE").is_ok_and(|node| node == "here")
}

/// Gives the machine's containerd another configuration and starts it.
pub(super) fn start(config: &NodeConfig) -> Result<()> {
    // The node before may have had more of it.
    vm::remove(Path::new("/etc/rekindle"))?;
    config::write(config, Path::new("/"))?;
    fs::create_dir_all("/images")?;
    install_shadow(Path::new("/opt/rekindle"), config.runtime)?;
    let started = command(&["systemctl", "restart", "containerd"]).status()?;
    ensure!(
        started.success(),
        "systemd could not start containerd ({started})"
    );
    Ok(())
}

/// A command of the machine's.
pub(super) fn command(command: &[&str]) -> Command {
    let (program, arguments) = command.split_first().unwrap_or((&"true", &[]));
    let mut command = Command::new(program);
    command.args(arguments).stdin(Stdio::null());
    command
}
