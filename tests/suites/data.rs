//! What a container may expect of its datasets, and what a wait for one that need not be there leaves it.
//!
//! The node's deadlines are short, and one of its stores takes connections and never answers.

use anyhow::{Context, Result, anyhow, ensure};
use rekindle_harness::container::{Builder, Container};
use rekindle_harness::{Image, Node, NodeConfig, Runtime, images};
use std::net::TcpListener;
use tokio::sync::OnceCell;

const DATASET: &str = "rekindle.dev/dataset";
const DATASET_POLICY: &str = "rekindle.dev/dataset-policy";
const SILENT: &str = "s3://silent/weights/";
const SILENT_ADDRESS: ([u8; 4], u16) = ([127, 0, 0, 1], 9001);
/// A cold start has a third of `container`.
const CONFIG: &str = r#"
[[datasets.source]]
allow = "file:///srv/data/"
namespaces = ["*"]

[[datasets.source]]
allow = "s3://silent/"
namespaces = ["*"]
endpoint = "http://127.0.0.1:9001"
anonymous = true

[deadlines]
sandbox-data = "2s"
container = "9s"
"#;

struct Stage {
    node: Node,
    busybox: Image,
    _silent: TcpListener,
}

/// The node, made by the first test that asks. It is never dropped: its keeper ends it after this program.
async fn stage() -> Result<&'static Stage> {
    static STAGE: OnceCell<Result<Stage, String>> = OnceCell::const_new();
    let make = async || -> Result<Stage> {
        let busybox = images::busybox()?;
        let mut config = NodeConfig::new(Runtime::Rekindle)?;
        config.rekindle_toml = Some(CONFIG.to_owned());
        let node = Node::start(config).await?;
        node.import(&images::pause()?).await?;
        node.import(&busybox).await?;
        let data = "mkdir -p /srv/data/weights; echo weights > /srv/data/weights/file";
        node.run(["sh", "-c", data]).await?;
        let _silent = node.silent_server(SILENT_ADDRESS.into()).await?;
        Ok(Stage {
            node,
            busybox,
            _silent,
        })
    };
    let made = STAGE
        .get_or_init(async || make().await.map_err(|e| format!("{e:#}")))
        .await;
    made.as_ref().map_err(|e| anyhow!("{e}"))
}

impl Stage {
    /// A container that counts and wants a dataset.
    fn container(&self, id: &str, dataset: &str) -> Builder<'_> {
        let container = self.node.container(id).image(&self.busybox);
        container.args(&["/counter"]).annotation(DATASET, dataset)
    }

    /// Asserts that a container is refused in a sentence with all of `words`.
    async fn refuses(&self, id: &str, dataset: &str, words: &[&str]) -> Result<()> {
        let (task, created) = self.container(id, dataset).try_create().await?;
        let refusal = created.err().context("it was created")?;
        for word in words {
            ensure!(
                refusal.message().contains(word),
                "{word:?} is not in: {refusal}"
            );
        }
        self.node.is_rid_of(id).await?;
        task.remove().await
    }

    /// Asserts that a container whose dataset is opportunistic runs, and has nothing mounted in its place.
    async fn goes_without(&self, id: &str, dataset: &str) -> Result<()> {
        let container = self.container(id, dataset);
        let task = container
            .annotation(DATASET_POLICY, "Opportunistic")
            .run()
            .await?;
        counts(&task).await?;
        let looks = task
            .exec("look", &["grep", " /data ", "/proc/mounts"])
            .run()
            .await?;
        assert_eq!(looks.io().out()?.text().await?, "");
        looks.wait().await?;
        looks.delete().await?;
        task.remove().await
    }
}

async fn counts(task: &Container<'_>) -> Result<()> {
    let said = task
        .io()
        .out()?
        .until("the counter", |text| text.contains(" 2\n"));
    said.await.map(drop)
}

#[tokio::test]
async fn a_dataset_that_cannot_be_had_is_gone_without() -> Result<()> {
    let stage = stage().await?;
    let absent = "file:///srv/data/absent/";
    stage.refuses("needs-absent", absent, &[absent]).await?;
    stage.goes_without("likes-absent", absent).await
}

#[tokio::test]
async fn a_dataset_that_does_not_arrive_in_time_is_gone_without() -> Result<()> {
    let stage = stage().await?;
    let words = [SILENT, "the source has not answered the listing"];
    stage.refuses("needs-silent", SILENT, &words).await?;
    stage.goes_without("likes-silent", SILENT).await
}

/// Not as root, and not by mounting it again.
#[tokio::test]
async fn a_container_cannot_write_to_its_datasets() -> Result<()> {
    let stage = stage().await?;
    let line = r#"
        for try in 'echo more >> file' ': > file' 'rm file' 'touch new' 'mkdir new' 'mv file new' 'ln file new' \
                   'chmod 777 file' 'chown 1 file' 'touch -d 2001-01-01 file' 'mount -o remount,rw,bind /data' \
                   'umount /data'; do
          (cd /data && eval "$try") 2>/dev/null && echo "could $try"
        done
        cat /data/file; exec /counter"#;
    let task = stage
        .container("writer", "file:///srv/data/weights/")
        .shell(line);
    let task = task.run().await?;
    counts(&task).await?;
    let said = task.io().out()?.so_far();
    ensure!(said.starts_with("weights\n"), "it is not as it was: {said}");
    task.remove().await?;
    let next = stage.container("reader", "file:///srv/data/weights/");
    let next = next
        .shell("ls -A /data; cat /data/file; exec /counter")
        .run()
        .await?;
    counts(&next).await?;
    let said = next.io().out()?.so_far();
    ensure!(
        said.starts_with("file\nweights\n"),
        "it is not as it was: {said}"
    );
    next.remove().await
}

/// The kubelet's clock runs while a pod's container waits; all of it was spent on the wait once.
#[tokio::test]
async fn a_wait_for_data_leaves_time_to_start() -> Result<()> {
    let stage = stage().await?;
    let cri = stage.node.cri().await?;
    let pod = cri.pod("waits").annotation(DATASET, SILENT);
    let pod = pod
        .annotation(DATASET_POLICY, "Opportunistic")
        .run()
        .await?;
    let task = pod.container("main").args(&["/counter"]).run().await?;
    task.counts_to(2).await?;
    pod.remove().await
}

#[tokio::test]
async fn a_wait_for_an_image_leaves_time_to_start() -> Result<()> {
    let stage = stage().await?;
    let container = |id| {
        let container = stage.node.container(id).image(&stage.busybox);
        container.args(&["/counter"])
    };
    let task = container("slow-image").run().await?;
    counts(&task).await?;
    let made = [
        "rekindle",
        "checkpoint",
        "slow-image",
        "--name",
        "slow-image",
    ];
    stage.node.run(made).await?;
    task.remove().await?;
    let warm = container("slow-image-2").annotation("rekindle.dev/restore-from", "slow-image");
    let warm = warm.annotation("rekindle.dev/restore-policy", "Opportunistic");
    // Part of finding out whether the image fits; it has ten seconds, which is more than there are.
    let hanging = r#"
cp "$(command -v criu)" /run/criu
printf '%s\n' '#!/bin/sh' '[ "$1" != check ] || exec sleep 1000' 'exec /run/criu "$@"' > /run/hanging
chmod +x /run/hanging
mount --bind /run/hanging "$(command -v criu)""#;
    stage.node.run(["sh", "-c", hanging]).await?;
    let warm = warm.run().await;
    let left = stage.node.processes()?;
    stage
        .node
        .run(["sh", "-c", r#"umount "$(command -v criu)""#])
        .await?;
    let warm = warm?;
    ensure!(
        !left.iter().any(|(_, line)| line.contains("sleep 1000")),
        "what was given up is left: {left:?}"
    );
    counts(&warm).await?;
    ensure!(
        warm.io().out()?.so_far().contains(" 1\n"),
        "it was restored"
    );
    warm.remove().await
}
