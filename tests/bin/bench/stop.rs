//! The measurement: how long a process of 2 GiB stands still while it is checkpointed, by us and by the shim that
//! containerd ships, in turn.

use crate::figures::Series;
use crate::machine::{self, Machine};
use crate::steps::{Steps, steps};
use anyhow::{Context, Result};
use rekindle_harness::progress::Progress;
use rekindle_harness::{Container, Image, Node, NodeConfig, Runtime, images};
use std::time::Instant;

/// MiB that no two pages of are alike.
const HEAP: u64 = 2048;
/// Where both write: a folder of the node's disk, or memory.
const STORE: &str = "/mnt/store";
const ID: &str = "stopped";

/// A heap of noise, and how long it could not look at the clock: the scheduler's own pauses are shorter than 10 ms.
const PROGRAM: &str = r#"
import os, sys, time
heap = [os.urandom(1 << 20) for _ in range(int(sys.argv[1]))]
print("ready", flush=True)
last = time.monotonic()
while True:
    time.sleep(0.002)
    now = time.monotonic()
    if now - last > 0.01:
        print("gap", now - last, flush=True)
    last = now
"#;

/// One checkpoint, seconds.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Checkpoint {
    /// The process stood still.
    pub(crate) stopped: f64,
    /// Until it was complete, and on the disk where that is one.
    pub(crate) total: f64,
}

/// Both kinds of stores.
#[derive(Debug)]
pub(crate) struct Measured {
    pub(crate) machine: Machine,
    pub(crate) heap_mib: u64,
    pub(crate) memory: Compared,
    pub(crate) disk: Compared,
}

/// The shim that containerd ships, and ours.
#[derive(Debug, Default)]
pub(crate) struct Compared {
    pub(crate) pairs: Vec<(Checkpoint, Checkpoint)>,
    /// What the steps of ours took.
    pub(crate) steps: Steps,
    /// Seconds that `dd` takes for as many bytes, past the page cache where there is one.
    pub(crate) ceiling: Vec<f64>,
}

impl Compared {
    pub(crate) fn go(&self, of: fn(&Checkpoint) -> f64) -> Series {
        self.pairs.iter().map(|(go, _)| of(go)).collect()
    }

    pub(crate) fn ours(&self, of: fn(&Checkpoint) -> f64) -> Series {
        self.pairs.iter().map(|(_, ours)| of(ours)).collect()
    }

    pub(crate) fn ratio(&self, of: fn(&Checkpoint) -> f64) -> Series {
        let ratio = |(go, ours): &(Checkpoint, Checkpoint)| of(ours) / of(go);
        self.pairs.iter().map(ratio).collect()
    }
}

pub(crate) async fn measure(pairs: usize) -> Result<Measured> {
    let image = images::torch()?;
    let progress = Progress::live("measuring");
    progress.step("two nodes, each with a heap of 2 GiB");
    let (go, ours) = (
        ready(Runtime::Go, &image).await?,
        ready(Runtime::Rekindle, &image).await?,
    );
    let (theirs, our) = (heap(&go, &image).await?, heap(&ours, &image).await?);
    let mut measured = Measured {
        machine: machine::facts(&ours)?,
        heap_mib: HEAP,
        memory: Compared::default(),
        disk: Compared::default(),
    };
    let mut told = steps(&ours, ID)?.len();
    for on_disk in [false, true] {
        if !on_disk {
            for node in [&go, &ours] {
                node.run(["mount", "-t", "tmpfs", "-o", "size=80%", "store", STORE])
                    .await?;
            }
        }
        let compared = match on_disk {
            true => &mut measured.disk,
            false => &mut measured.memory,
        };
        let place = if on_disk { "disk" } else { "memory" };
        for pair in 0..pairs {
            progress.step(&format!("{place}, pair {} of {pairs}", pair + 1));
            // In turn, so that neither profits from its place.
            let both = if pair % 2 == 0 {
                let first = once(&go, &theirs, &plain(on_disk)).await?;
                (first, once(&ours, &our, &named()).await?)
            } else {
                let first = once(&ours, &our, &named()).await?;
                (once(&go, &theirs, &plain(on_disk)).await?, first)
            };
            compared.pairs.push(both);
            // The log grows: those of the last checkpoints are behind the others.
            let all = steps(&ours, ID)?;
            compared.steps.0.extend_from_slice(&all[told..]);
            told = all.len();
            compared.ceiling.push(ceiling(&ours, on_disk).await?);
        }
        if !on_disk {
            for node in [&go, &ours] {
                node.run(["umount", STORE]).await?;
            }
        }
    }
    progress.done();
    Ok(measured)
}

async fn ready(runtime: Runtime, image: &Image) -> Result<Node> {
    let mut config = NodeConfig::new(runtime)?.with_image(image).await?;
    // The shim tells at debug how long each step took.
    config.log_level = "debug";
    config.rekindle_toml = Some(format!("[images]\nroot = \"{STORE}/images\"\n"));
    let node = Node::start(config).await?;
    node.run(["mkdir", "-p", STORE]).await?;
    Ok(node)
}

async fn heap<'n>(node: &'n Node, image: &Image) -> Result<Container<'n>> {
    let size = HEAP.to_string();
    let task = node
        .container(ID)
        .image(image)
        .args(&["python3", "-c", PROGRAM, &size])
        .run()
        .await?;
    let ready = |text: &str| text.contains("ready");
    task.io().out()?.until("a heap", ready).await?;
    Ok(task)
}

/// What makes a checkpoint in a shell of the node, and what removes it.
struct Way {
    make: String,
    remove: String,
}

fn plain(on_disk: bool) -> Way {
    let sync = if on_disk {
        format!("find {STORE}/plain -type f -exec sync {{}} + && sync {STORE}/plain")
    } else {
        "true".to_owned()
    };
    Way {
        make: format!("ctr task checkpoint --image-path {STORE}/plain {ID} && {sync}"),
        remove: format!("rm -rf {STORE}/plain"),
    }
}

/// Ours syncs by itself.
fn named() -> Way {
    Way {
        make: format!("rekindle checkpoint {ID} --name stop"),
        // Otherwise the next one would have nothing to store.
        remove: "rekindle image rm default/stop".to_owned(),
    }
}

async fn once(node: &Node, task: &Container<'_>, way: &Way) -> Result<Checkpoint> {
    let out = task.io().out()?;
    let before = out.so_far().len();
    let begun = Instant::now();
    node.run(["sh", "-c", &way.make]).await?;
    let total = begun.elapsed().as_secs_f64();
    let told = |text: &str| text[before..].contains("gap") && text.ends_with('\n');
    let text = out.until("the heap's own word", told).await?;
    let gaps = text[before..]
        .lines()
        .filter_map(|line| line.strip_prefix("gap ")?.parse::<f64>().ok());
    let stopped = gaps.sum();
    node.run(["sh", "-c", &way.remove]).await?;
    node.run(["sync"]).await?;
    Ok(Checkpoint { stopped, total })
}

/// As many bytes, written by `dd`.
async fn ceiling(node: &Node, on_disk: bool) -> Result<f64> {
    let direct = if on_disk {
        "oflag=direct conv=fsync"
    } else {
        ""
    };
    let line = format!(
        "began=$(date +%s%N); dd if=/dev/zero of={STORE}/dd bs=4M count={} {direct} 2>/dev/null; \
         ended=$(date +%s%N); rm {STORE}/dd; echo $((ended - began))",
        HEAP / 4
    );
    let text = node.run(["sh", "-c", &line]).await?;
    let nanoseconds: f64 = text.trim().parse().context("reading what dd took")?;
    Ok(nanoseconds / 1e9)
}
