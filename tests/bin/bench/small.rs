//! The measurement: up to what size a container goes on sooner when all of its memory is read before it runs. A pager costs
//! a process, and a fault for each block that the program touches first.

use crate::figures::Series;
use crate::machine::{self, Machine};
use anyhow::{Context, Result};
use rekindle_harness::progress::Progress;
use rekindle_harness::{Image, Node, NodeConfig, Runtime, images};
use serde_json::Value;
use std::fs;
use std::time::Instant;

/// MiB of noise in a Python process, which has some of its own beside it.
const HEAPS: [u64; 5] = [0, 8, 16, 32, 64];

/// Says every millisecond that it goes on, and looks at a page of its heap each time.
const PROGRAM: &str = r#"
import os, sys, time
heap = [os.urandom(1 << 20) for _ in range(int(sys.argv[1]))]
n = 0
while True:
    time.sleep(0.001)
    n += 1
    print(n, heap[n % len(heap)][0] if heap else 0, flush=True)
"#;

/// One heap.
#[derive(Debug)]
pub(crate) struct Heap {
    pub(crate) mib: u64,
    /// Of its image, all of it.
    pub(crate) image_mib: f64,
    /// Milliseconds from the task's create to its first word, lazily and eagerly.
    pub(crate) pairs: Vec<(f64, f64)>,
}

impl Heap {
    pub(crate) fn lazily(&self) -> Series {
        self.pairs.iter().map(|(lazily, _)| *lazily).collect()
    }

    pub(crate) fn eagerly(&self) -> Series {
        self.pairs.iter().map(|(_, eagerly)| *eagerly).collect()
    }

    pub(crate) fn ratio(&self) -> Series {
        let ratio = |(lazily, eagerly): &(f64, f64)| eagerly / lazily;
        self.pairs.iter().map(ratio).collect()
    }
}

/// Everything that was measured.
#[derive(Debug)]
pub(crate) struct Measured {
    pub(crate) machine: Machine,
    pub(crate) heaps: Vec<Heap>,
}

pub(crate) async fn measure(pairs: usize) -> Result<Measured> {
    let image = images::torch()?;
    let config = NodeConfig::new(Runtime::Rekindle)?
        .with_image(&image)
        .await?;
    let node = Node::start(config).await?;
    let machine = machine::facts(&node)?;
    let progress = Progress::live("measuring");
    let mut heaps = Vec::new();
    for mib in HEAPS {
        progress.step(&format!("the image of {mib} MiB"));
        let image_mib = checkpoint(&node, &image, mib).await?;
        heaps.push(Heap {
            mib,
            image_mib,
            pairs: Vec::new(),
        });
    }
    let mut started = 0;
    // The first pair fills caches, and the pager's note.
    for pair in 0..=pairs {
        progress.step(&format!("pair {pair} of {pairs}"));
        for heap in &mut heaps {
            let mut both = [0.0; 2];
            for turn in 0..2 {
                // In turn, so that neither profits from its place.
                let way = (pair + turn) % 2;
                started += 1;
                let id = format!("small-{started}");
                both[way] = start(&node, &image, &id, heap.mib, ["lazy", "eager"][way]).await?;
            }
            if pair > 0 {
                heap.pairs.push((both[0], both[1]));
            }
        }
    }
    progress.hide();
    Ok(Measured { machine, heaps })
}

async fn checkpoint(node: &Node, image: &Image, mib: u64) -> Result<f64> {
    let id = format!("first-{mib}");
    let task = node.container(&id).image(image);
    let task = task
        .args(&["python3", "-c", PROGRAM, &mib.to_string()])
        .run()
        .await?;
    let goes_on = |text: &str| text.lines().count() > 100;
    task.io().out()?.until("its words", goes_on).await?;
    let name = name(mib);
    let made = node
        .run([
            "rekindle",
            "checkpoint",
            &id,
            "--name",
            &name,
            "--exit",
            "--json",
        ])
        .await?;
    task.remove().await?;
    let made: Value = serde_json::from_str(&made).context("reading what it printed")?;
    Ok(made["bytes"].as_f64().unwrap_or(f64::NAN) / f64::from(1 << 20))
}

async fn start(node: &Node, image: &Image, id: &str, mib: u64, paging: &str) -> Result<f64> {
    // Shims read the node's configuration when they start.
    fs::write(
        node.path("/etc/rekindle/config.toml"),
        format!("[restore]\npaging = \"{paging}\"\n"),
    )?;
    let prepared = node
        .container(id)
        .image(image)
        .args(&["python3", "-c", PROGRAM, &mib.to_string()])
        .annotation("rekindle.dev/restore-from", &name(mib))
        .prepare()
        .await?;
    let began = Instant::now();
    let task = prepared.create().await?;
    task.start().await?;
    let spoke = |text: &str| text.contains('\n');
    task.io().out()?.until("its first word", spoke).await?;
    let took = began.elapsed();
    task.remove().await?;
    Ok(took.as_secs_f64() * 1e3)
}

fn name(mib: u64) -> String {
    format!("small-{mib}")
}
