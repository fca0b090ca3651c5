//! The process that makes a node's namespaces, and removes what is left of them when its pipe ends.

use super::{PATH, leftovers};
use anyhow::{Context, Result, bail};
use std::fs;
use std::io::{BufRead, BufReader};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, ChildStdin, Command, Stdio};

/// Dropped, the node is gone.
#[derive(Debug)]
pub(super) struct Keeper {
    _claim: leftovers::Claim,
    child: Child,
    pipe: Option<ChildStdin>,
}

impl Keeper {
    /// Lets a node begin in a claimed folder over a root; answers with the pid of its first process.
    pub(super) fn start(claim: leftovers::Claim, log: Stdio, root: &Path) -> Result<(Keeper, u32)> {
        let dir = claim.dir.clone();
        fs::write(dir.join("keeper.sh"), include_str!("keeper.sh"))?;
        fs::write(dir.join("init.sh"), include_str!("init.sh"))?;
        let mut child = Command::new("unshare")
            .args(["--mount", "--net", "--propagation", "private", "bash"])
            .arg(dir.join("keeper.sh"))
            .args([dir.as_path(), root])
            .env("NODE_PATH", PATH)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(log)
            // Ctrl-C on a terminal goes to a process group; the keeper shall live until its work is done.
            .process_group(0)
            .spawn()
            .context("starting the node's keeper with unshare (util-linux): run `make deps`")?;
        let said = child.stdout.take().context("the keeper has no stdout")?;
        let keeper = Keeper {
            _claim: claim,
            pipe: child.stdin.take(),
            child,
        };
        let mut line = String::new();
        BufReader::new(said).read_line(&mut line)?;
        let Ok(pid) = line.trim().parse() else {
            let log = fs::read_to_string(dir.join("keeper.log")).unwrap_or_default();
            bail!(
                "the node could not be set up in {}: {}",
                dir.display(),
                log.trim()
            );
        };
        Ok((keeper, pid))
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        drop(self.pipe.take());
        let _ = self.child.wait();
    }
}
