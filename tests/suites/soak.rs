//! Many containers, beside which shims and containerd are killed: afterwards nothing is left of any.
//!
//! `make soak` runs it at full size, `cargo test` a twentieth. `REKINDLE_SEED` repeats what is done to whom.

use anyhow::{Context, Result, ensure};
use containerd_client::tonic::Code;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use rekindle_harness::{Image, Node, NodeConfig, Runtime, images, poll};
use std::fs;
use std::sync::atomic::{AtomicUsize, Ordering};

const CONTAINERS: usize = 500;
const EXECS: usize = 1000;
/// So many at the same time.
const AT_ONCE: usize = 6;
/// One in so many loses its shim.
const SHIMS: u64 = 6;
/// After so many containerd is killed.
const CONTAINERDS: usize = 10;

/// Full size with `REKINDLE_SOAK`, else a twentieth.
fn size(full: usize) -> usize {
    match std::env::var_os("REKINDLE_SOAK") {
        Some(_) => full,
        None => full / 20,
    }
}

/// What happens to a container, drawn from the seed and its number: splitmix64.
fn draw(seed: u64, number: usize) -> u64 {
    let mut z = seed.wrapping_add((number as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

async fn node() -> Result<(Node, Image)> {
    let node = Node::start(NodeConfig::new(Runtime::Rekindle)?).await?;
    let busybox = images::busybox()?;
    node.import(&busybox).await?;
    Ok((node, busybox))
}

#[tokio::test]
async fn nothing_is_left_of_many() -> Result<()> {
    let seed = match std::env::var("REKINDLE_SEED") {
        Ok(seed) => seed.parse()?,
        Err(_) => std::time::UNIX_EPOCH.elapsed()?.as_nanos() as u64,
    };
    let (node, busybox) = node().await?;
    let outcome = many(&node, &busybox, seed).await;
    outcome.with_context(|| format!("REKINDLE_SEED={seed}"))?;
    left(&node)
        .await
        .with_context(|| format!("REKINDLE_SEED={seed}"))
}

async fn many(node: &Node, busybox: &Image, seed: u64) -> Result<()> {
    let (next, containers) = (AtomicUsize::new(0), size(CONTAINERS));
    let worker = async || -> Result<()> {
        loop {
            let number = next.fetch_add(1, Ordering::Relaxed);
            if number >= containers {
                return Ok(());
            }
            let id = format!("soak-{number}");
            // What is killed beside it may end it anywhere: only what is left counts.
            let _ = life(node, busybox, &id, draw(seed, number)).await;
            if number % CONTAINERDS == CONTAINERDS - 1 {
                let _ = node
                    .run(["sh", "-c", "kill -9 $(cat /run/containerd.pid)"])
                    .await;
            }
            remove(node, &id).await?;
        }
    };
    futures::future::try_join_all((0..AT_ONCE).map(|_| worker())).await?;
    Ok(())
}

async fn life(node: &Node, busybox: &Image, id: &str, fate: u64) -> Result<()> {
    let task = node
        .container(id)
        .image(busybox)
        .shell("sleep 1000 & sleep 1000")
        .create()
        .await?;
    if fate & 0x10 == 0 {
        task.start().await?;
        let one = task.exec("one", &["sleep", "1000"]).run().await?;
        let two = task.exec("two", &["sh", "-c", "exit 3"]).run().await?;
        if fate & 0x20 == 0 {
            two.wait().await?;
            two.delete().await?;
        }
        if fate & 0x40 == 0 {
            one.kill(9).await?;
        }
        if fate & 0x80 == 0 {
            task.pause().await?;
        }
    }
    if (fate >> 8).is_multiple_of(SHIMS) {
        let (shim, _) = node.shim_of(id)?;
        kill(Pid::from_raw(shim.try_into()?), Signal::SIGKILL)?;
    }
    Ok(())
}

/// Removes it as somebody would who finds it in whatever state.
async fn remove(node: &Node, id: &str) -> Result<()> {
    let line = format!(
        "ctr task kill --signal SIGKILL {id}; ctr task delete --force {id}; ctr container delete {id}; \
         there=$(ctr task ls --quiet && ctr container ls --quiet) && ! grep -x {id} <<< \"$there\""
    );
    poll::until("the container's removal", async || {
        let gone = node.exec(["bash", "-c", &line]).await?.status.success();
        Ok(gone.then_some(()))
    })
    .await?;
    let log = node.log_tail(usize::MAX);
    let of_it: Vec<&str> = log.lines().filter(|line| line.contains(id)).collect();
    let rid = node.is_rid_of(id).await;
    rid.with_context(|| format!("containerd's log has of it\n{}", of_it.join("\n")))
}

/// Waits until nothing is left that any of them could have brought. A bundle that containerd removes it hides first; one that
/// it was killed at then it passes over from there on (`core/runtime/v2/bundle.go`, `shim_load.go` of 2.1).
async fn left(node: &Node) -> Result<()> {
    let look = r#"
        pgrep -a 'containerd-shim|runc|sleep'
        grep io.containerd.runtime /proc/self/mountinfo
        find /run/containerd/s /run/containerd/runc /run/rekindle /run/containerd/io.containerd.runtime.v2.task \
          -mindepth 1 ! -path '*/default' ! -path '*/default/.*' 2>/dev/null
        find /sys/fs/cgroup -type d -path '*/default/*'
        true"#;
    let mut last = String::new();
    let nothing = poll::until("the last traces to go", async || {
        last = node.run(["bash", "-c", look]).await?;
        Ok(last.is_empty().then_some(()))
    });
    let outcome = nothing.await;
    outcome.with_context(|| format!("what is left:\n{last}"))
}

/// Resident memory of a shim in KiB.
fn rss(node: &Node, id: &str) -> Result<u64> {
    let (shim, _) = node.shim_of(id)?;
    let status = fs::read_to_string(format!("/proc/{shim}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kib = line.and_then(|line| line.split_whitespace().next());
    Ok(kib.context("no VmRSS")?.parse()?)
}

#[tokio::test]
async fn a_shim_does_not_grow_with_its_execs() -> Result<()> {
    let (node, busybox) = node().await?;
    let task = node
        .container("grows")
        .image(&busybox)
        .shell("sleep 100000")
        .run()
        .await?;
    let exec = async |number: usize| -> Result<()> {
        let exec = task
            .exec(&format!("exec-{number}"), &["echo", "warm"])
            .run()
            .await?;
        ensure!(exec.wait().await?.status == 0, "exec {number} failed");
        let deleted = exec.delete().await;
        ensure!(
            !matches!(&deleted, Err(e) if e.code() != Code::NotFound),
            "{deleted:?}"
        );
        Ok(())
    };
    // The first maps what an exec needs of the program.
    exec(0).await?;
    let fresh = rss(&node, "grows")?;
    for number in 1..=size(EXECS) {
        exec(number).await?;
    }
    let old = rss(&node, "grows")?;
    ensure!(
        old * 10 <= fresh * 11,
        "{fresh} KiB have become {old} KiB with {} execs",
        size(EXECS)
    );
    task.remove().await
}
