//! The story: one PyTorch server, started cold, kept as an image, and started again from it.

use crate::tell::{self, Step};
use anyhow::{Context, Result, ensure};
use rekindle_harness::model::{self, Embedding, Prepared};
use rekindle_harness::s3::S3Server;
use rekindle_harness::{Container, Image, Node, root};
use serde_json::Value;
use std::time::{Duration, Instant};

/// What the image is called.
const WARM_IMAGE: &str = "minilm";
/// Further requests before the checkpoint, so that a counter that begins anew could not be taken for one that goes on.
const MORE: usize = 3;
/// So much of the log shows the shim's last words and not containerd's whole start.
const LOG_LINES: usize = 15;

/// How long a start took, until three moments.
#[derive(Debug, Clone, Copy)]
struct Start {
    created: Duration,
    started: Duration,
    answered: Duration,
}

pub(crate) async fn tell() -> Result<()> {
    let began = Instant::now();
    tell::line(
        "rekindle: a PyTorch server gets its weights from S3, starts cold, and starts again warm.",
    );
    let prepared = model::prepare().await?;

    tell::chapter("A node of its own");
    let step = Step::begin("starting a node");
    let node = Node::start(prepared.config.clone()).await?;
    step.done(&format!("a node: {}", versions(&node)?));
    if let Err(error) = on_node(&node, &prepared).await {
        return Err(error.context(format!(
            "the node's log, where the shims log too, ends with\n{}\n",
            node.log_tail(LOG_LINES)
        )));
    }

    let step = Step::begin("removing the node");
    drop(node);
    step.done("the node is gone, and nothing of it is left on this machine");
    tell::line(&format!(
        "\n  all in all {}",
        tell::seconds(began.elapsed())
    ));
    Ok(())
}

async fn on_node(node: &Node, prepared: &Prepared) -> Result<()> {
    let image = &prepared.image;
    let step = Step::begin("starting an S3 server");
    let _s3 = S3Server::start(node, model::BUCKET, model::PREFIX, &prepared.weights).await?;
    step.done(&format!(
        "an S3 server (SigV4, TLS) with {}",
        model::DATASET
    ));

    tell::chapter("Cold: once with the weights still in S3, once with the weights on the node");
    let (first_start, first) = cold(node, image, "first").await?;
    let data = node.run(["rekindle", "dataset", "ls"]).await?;
    data.lines().for_each(tell::fact);
    first.remove().await?;
    let (cold_start, cold) = cold(node, image, "cold").await?;
    let mut last = model::ask(node).await?;
    for _ in 0..MORE {
        last = model::ask(node).await?;
    }
    tell::fact(&format!("then: {}", describe(&last)));
    checkpoint(node, &cold).await?;
    cold.remove().await?;

    tell::chapter("Warm: a new container continues where the image was made");
    let (warm_start, warm) = warm(node, image, &last).await?;
    paused(node, &warm, &last).await?;
    warm.remove().await?;

    tell::chapter("From the task's create to the first answer, through containerd");
    summary(first_start, cold_start, warm_start);
    Ok(())
}

/// Starts a container and waits for its first answer; every moment counts from the task's create.
async fn start<'n>(
    node: &'n Node,
    image: &Image,
    id: &str,
    restore_from: Option<&str>,
) -> Result<(Start, Container<'n>, Embedding)> {
    let mut server = model::server(node, image, id);
    if let Some(name) = restore_from {
        server = server.annotation("rekindle.dev/restore-from", name);
    }
    let server = server.prepare().await?;
    let began = Instant::now();
    let container = server.create().await?;
    let created = began.elapsed();
    container
        .start()
        .await
        .with_context(|| format!("starting {id}"))?;
    let started = began.elapsed();
    let (answer, at) = model::first_answer(&container).await?;
    let start = Start {
        created,
        started,
        answered: at - began,
    };
    Ok((start, container, answer))
}

async fn cold<'n>(node: &'n Node, image: &Image, id: &str) -> Result<(Start, Container<'n>)> {
    let step = Step::begin("waiting for the data, importing torch, loading the model");
    let (start, container, answer) = start(node, image, id, None).await?;
    step.took(&format!("{id}: {}", describe(&answer)), start.answered);
    ensure!(
        answer.n == 1,
        "a new process began with request {}",
        answer.n
    );
    Ok((start, container))
}

/// The image of a running server, which ends with it.
async fn checkpoint(node: &Node, container: &Container<'_>) -> Result<()> {
    let command = format!(
        "rekindle checkpoint {} --name {WARM_IMAGE} --exit",
        container.id()
    );
    let step = Step::begin(&command);
    let answer = node
        .run([
            "rekindle",
            "checkpoint",
            container.id(),
            "--name",
            WARM_IMAGE,
            "--exit",
            "--json",
        ])
        .await?;
    step.done(&command);
    let answer: Value = serde_json::from_str(&answer).context("reading what it printed")?;
    tell::fact(&format!(
        "image {}, {}, every file checksummed; the container is gone",
        answer["image"].as_str().unwrap_or(WARM_IMAGE),
        tell::size(answer["bytes"].as_u64().unwrap_or(0))
    ));
    Ok(())
}

async fn warm<'n>(
    node: &'n Node,
    image: &Image,
    last: &Embedding,
) -> Result<(Start, Container<'n>)> {
    let step = Step::begin("restoring");
    let (start, container, answer) = start(node, image, "warm", Some(WARM_IMAGE)).await?;
    step.took(&format!("warm: {}", describe(&answer)), start.answered);
    continues(last, &answer)?;
    tell::fact(&format!(
        "the same process (boot {}), the next request ({} after {}), the same vector to the last bit",
        answer.boot, answer.n, last.n
    ));
    Ok((start, container))
}

/// Whether `now` came from the process that gave `last`, and is the same answer.
fn continues(last: &Embedding, now: &Embedding) -> Result<()> {
    ensure!(
        now.boot == last.boot,
        "the process was called {} and is now {}: it is another one",
        last.boot,
        now.boot
    );
    ensure!(
        now.n > last.n,
        "request {} came after request {}: the counter did not go on",
        now.n,
        last.n
    );
    ensure!(
        now.sha256 == last.sha256 && now.vector == last.vector,
        "the same text gave another vector: {:?}, and {:?} before",
        now.vector,
        last.vector
    );
    Ok(())
}

async fn paused(node: &Node, container: &Container<'_>, last: &Embedding) -> Result<()> {
    let step = Step::begin("pausing");
    container.pause().await.context("pausing")?;
    let waiting = tokio::time::timeout(Duration::from_millis(300), model::ask(node)).await;
    ensure!(waiting.is_err(), "a paused server has answered");
    container.resume().await.context("resuming")?;
    let resumed = Instant::now();
    let answer = model::ask(node).await?;
    continues(last, &answer)?;
    step.took(
        &format!("paused: no answer; resumed: {}", describe(&answer)),
        resumed.elapsed(),
    );
    Ok(())
}

fn summary(first: Start, cold: Start, warm: Start) {
    let row = |name: &str, of: fn(Start) -> Duration| {
        [first, cold, warm]
            .map(of)
            .map(tell::seconds)
            .into_iter()
            .fold(vec![name.to_owned()], |mut row, cell| {
                row.push(cell);
                row
            })
    };
    let heads = ["", "cold, data fetched", "cold", "warm"].map(str::to_owned);
    tell::table(&[
        heads.to_vec(),
        row("created (weights there and mounted)", |s| s.created),
        row("started", |s| s.started),
        row("first answer", |s| s.answered),
    ]);
    tell::line(&format!(
        "\n  warm answers {:.1} times sooner than cold, the data on the node in both",
        cold.answered.as_secs_f64() / warm.answered.as_secs_f64()
    ));
}

fn describe(answer: &Embedding) -> String {
    let begin: Vec<String> = answer
        .vector
        .iter()
        .take(3)
        .map(|v| format!("{v:.3}"))
        .collect();
    format!(
        "process {} answers request {}: [{}, …]",
        &answer.boot[..answer.boot.len().min(8)],
        answer.n,
        begin.join(", ")
    )
}

fn versions(node: &Node) -> Result<String> {
    let here = root::node(node.suite())?;
    let versions: Result<Vec<_>> = ["containerd", "runc", "criu"]
        .iter()
        .map(|program| Ok(format!("{program} {}", root::version(&here, program)?)))
        .collect();
    Ok(versions?.join(", "))
}
