//! What a throwaway node promises: it is alone, and nothing of it stays.

use anyhow::{Context, Result};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use rekindle_harness::container::State;
use rekindle_harness::{Node, NodeConfig, Runtime, images, poll};
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

async fn node() -> Result<Node> {
    let node = Node::start(NodeConfig::new(Runtime::Go)?).await?;
    node.import(&images::busybox()?).await?;
    Ok(node)
}

#[tokio::test]
async fn two_nodes_do_not_see_each_other() -> Result<()> {
    let busybox = images::busybox()?;
    let (one, two) = (node().await?, node().await?);
    let here = one
        .container("same")
        .image(&busybox)
        .args(&["/counter"])
        .run()
        .await?;
    let there = two
        .container("same")
        .image(&busybox)
        .args(&["/counter"])
        .run()
        .await?;
    here.pause().await?;
    assert_eq!(here.state().await?, State::Paused);
    assert_eq!(there.state().await?, State::Running);
    let text = there.io().out()?.so_far();
    there
        .io()
        .out()?
        .until("the other counter to go on", |now| now.len() > text.len())
        .await?;
    assert_ne!(
        one.run(["cat", "/proc/sys/kernel/hostname"]).await?,
        two.run(["cat", "/proc/sys/kernel/hostname"]).await?
    );
    Ok(())
}

#[tokio::test]
async fn a_dropped_node_leaves_nothing() -> Result<()> {
    let node = node().await?;
    let busybox = images::busybox()?;
    // A frozen process is what is hardest to end on cgroup v1.
    node.container("frozen")
        .image(&busybox)
        .args(&["/counter"])
        .run()
        .await?
        .pause()
        .await?;
    let name = node.name();
    assert!(!traces(&name)?.is_empty());
    drop(node);
    assert_eq!(traces(&name)?, Vec::<PathBuf>::new());
    Ok(())
}

#[tokio::test]
async fn a_node_whose_owner_is_killed_leaves_nothing() -> Result<()> {
    let (mut owner, name) = owned_node()?;
    assert!(!traces(&name)?.is_empty());
    owner.kill()?;
    owner.wait()?;
    poll::until("the keeper to clean up", async || {
        Ok(traces(&name)?.is_empty().then_some(()))
    })
    .await
}

#[tokio::test]
async fn a_node_whose_keeper_is_killed_dies_and_is_swept() -> Result<()> {
    let (mut owner, name) = owned_node()?;
    let keeper = process_with(&["keeper.sh", &name])?.context("the node has no keeper")?;
    kill(Pid::from_raw(keeper), Signal::SIGKILL)?;
    poll::until("the node's first process to die", async || {
        Ok(process_with(&["init.sh", &name])?.is_none().then_some(()))
    })
    .await?;
    owner.kill()?;
    owner.wait()?;
    // Any next node sweeps.
    drop(node().await?);
    assert_eq!(traces(&name)?, Vec::<PathBuf>::new());
    Ok(())
}

/// A process that holds a node, and the node's name.
fn owned_node() -> Result<(std::process::Child, String)> {
    let mut owner = Command::new(env!("CARGO_BIN_EXE_rekindle-node"))
        .args(["sh", "-c", "hostname; exec sleep 1000"])
        .env("REKINDLE_RUNTIMES", "go")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()?;
    let mut name = String::new();
    BufReader::new(owner.stdout.take().context("no stdout")?).read_line(&mut name)?;
    Ok((owner, name.trim().to_owned()))
}

/// What of a node is on the host: its folder, and its cgroups.
fn traces(name: &str) -> Result<Vec<PathBuf>> {
    let temporary = std::env::var_os("REKINDLE_TMP").unwrap_or_else(|| "/var/tmp".into());
    let mut places = vec![
        Path::new(&temporary).join(name),
        Path::new("/sys/fs/cgroup").join(name),
    ];
    for hierarchy in std::fs::read_dir("/sys/fs/cgroup")? {
        places.push(hierarchy?.path().join(name));
    }
    Ok(places.into_iter().filter(|place| place.exists()).collect())
}

fn process_with(words: &[&str]) -> Result<Option<i32>> {
    for entry in std::fs::read_dir("/proc")?.flatten() {
        let Some(pid) = entry
            .file_name()
            .to_str()
            .and_then(|name| name.parse().ok())
        else {
            continue;
        };
        let line = std::fs::read(entry.path().join("cmdline")).unwrap_or_default();
        let line = String::from_utf8_lossy(&line).replace('\0', " ");
        if line.starts_with("bash ") && words.iter().all(|word| line.contains(word)) {
            return Ok(Some(pid));
        }
    }
    Ok(None)
}
