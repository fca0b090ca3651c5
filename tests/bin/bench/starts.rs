//! The measurement: cold and warm starts of one model server in turn, so that whatever else the machine does meets both.

use crate::machine::{self, Machine};
use crate::steps::steps;
use anyhow::{Context, Result, ensure};
use rekindle_harness::model::{self, Embedding};
use rekindle_harness::progress::Progress;
use rekindle_harness::s3::S3Server;
use rekindle_harness::{Image, Node};
use serde_json::Value;
use std::time::Instant;

const WARM_IMAGE: &str = "bench";

/// One start: how many milliseconds after the task's create was asked for.
#[derive(Debug, Clone)]
pub(crate) struct Start {
    pub(crate) created: f64,
    pub(crate) started: f64,
    pub(crate) answered: f64,
    /// What the shim says its steps took, in their order.
    pub(crate) steps: Vec<(String, f64)>,
}

/// Everything that was measured.
#[derive(Debug)]
pub(crate) struct Measured {
    pub(crate) machine: Machine,
    pub(crate) image_bytes: u64,
    pub(crate) checkpoint_ms: u64,
    /// Cold and warm, in the order they were measured in.
    pub(crate) pairs: Vec<(Start, Start)>,
}

pub(crate) async fn measure(pairs: usize) -> Result<Measured> {
    let mut prepared = model::prepare().await?;
    // The shim tells at debug how long each step took; both kinds of start pay for it.
    prepared.config.log_level = "debug";
    let node = Node::start(prepared.config.clone()).await?;
    let _s3 = S3Server::start(&node, model::BUCKET, model::PREFIX, &prepared.weights).await?;
    let image = &prepared.image;
    let progress = Progress::live("measuring");

    // Not measured: it fetches the data, and the page cache learns the image's files.
    progress.step("the first cold start");
    let (_, began) = start(&node, image, "first", None).await?;
    let answer = node
        .run([
            "rekindle",
            "checkpoint",
            "first",
            "--name",
            WARM_IMAGE,
            "--exit",
            "--json",
        ])
        .await?;
    let kept: Value = serde_json::from_str(&answer).context("reading what it printed")?;

    let mut measured = Vec::new();
    for pair in 0..pairs {
        progress.step(&format!("pair {} of {pairs}", pair + 1));
        let cold = async || start(&node, image, &format!("cold-{pair}"), None).await;
        let warm = async || start(&node, image, &format!("warm-{pair}"), Some(WARM_IMAGE)).await;
        // In turn, so that neither profits from its place.
        let (cold, warm) = if pair % 2 == 0 {
            let cold = cold().await?;
            (cold, warm().await?)
        } else {
            let warm = warm().await?;
            (cold().await?, warm)
        };
        same(&began, &cold.1, &warm.1)?;
        measured.push((cold.0, warm.0));
    }
    progress.hide();
    Ok(Measured {
        machine: machine::facts(&node)?,
        image_bytes: kept["bytes"].as_u64().unwrap_or(0),
        checkpoint_ms: kept["elapsed_ms"].as_u64().unwrap_or(0),
        pairs: measured,
    })
}

/// A warm start that answers something else than a cold one is no start.
fn same(first: &Embedding, cold: &Embedding, warm: &Embedding) -> Result<()> {
    ensure!(
        warm.boot == first.boot && warm.n == first.n + 1,
        "a warm start answered request {} as process {}; its image was made of {} after request {}",
        warm.n,
        warm.boot,
        first.boot,
        first.n
    );
    ensure!(
        cold.boot != first.boot && cold.n == 1,
        "a cold start answered request {} as process {}",
        cold.n,
        cold.boot
    );
    ensure!(
        cold.sha256 == first.sha256 && warm.sha256 == first.sha256,
        "the same text gave three vectors: {first:?}, {cold:?}, {warm:?}"
    );
    Ok(())
}

async fn start(
    node: &Node,
    image: &Image,
    id: &str,
    restore_from: Option<&str>,
) -> Result<(Start, Embedding)> {
    let mut server = model::server(node, image, id);
    if let Some(name) = restore_from {
        server = server.annotation("rekindle.dev/restore-from", name);
    }
    let prepared = server.prepare().await?;
    let began = Instant::now();
    let container = prepared.create().await?;
    let created = began.elapsed();
    container.start().await?;
    let started = began.elapsed();
    let (answer, at) = model::first_answer(&container).await?;
    if id != "first" {
        container.remove().await?;
    }
    let start = Start {
        created: created.as_secs_f64() * 1e3,
        started: started.as_secs_f64() * 1e3,
        answered: (at - began).as_secs_f64() * 1e3,
        steps: steps(node, id)?,
    };
    Ok((start, answer))
}
