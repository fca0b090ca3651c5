//! What a container may expect of its datasets, and what a wait for one that need not be there leaves it.
//!
//! The node's deadlines are short, and one of its stores takes connections and never answers.

use anyhow::{Context, Result, anyhow, bail, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use rekindle_harness::container::{Builder, Container};
use rekindle_harness::cri::PodBuilder;
use rekindle_harness::halting::{self, HaltingStore};
use rekindle_harness::{Image, Node, NodeConfig, Runtime, images, poll, schema};
use serde_json::Value;
use std::net::TcpListener;
use std::process::Output;
use std::time::{Duration, Instant};
use tokio::sync::{Mutex, OnceCell};

const DATASET: &str = "rekindle.dev/dataset";
const DATASET_MOUNT: &str = "rekindle.dev/dataset-mount";
const DATASET_POLICY: &str = "rekindle.dev/dataset-policy";
const WEIGHTS: &str = "file:///srv/data/weights/";
const SILENT: &str = "s3://silent/weights/";
const SILENT_ADDRESS: ([u8; 4], u16) = ([127, 0, 0, 1], 9001);
const HALTING: &str = "s3://halting/weights";
const HALTING_ADDRESS: ([u8; 4], u16) = ([127, 0, 0, 1], 9002);
const ORPHANED: &str = "s3://orphaned/weights";
const ORPHANED_ADDRESS: ([u8; 4], u16) = ([127, 0, 0, 1], 9003);
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

[[datasets.source]]
allow = "s3://halting/"
namespaces = ["*"]
endpoint = "http://127.0.0.1:9002"
anonymous = true

[[datasets.source]]
allow = "s3://orphaned/"
namespaces = ["*"]
endpoint = "http://127.0.0.1:9003"
anonymous = true

[[images.tier]]
url = "s3://silent/images/"
namespaces = ["waits"]
endpoint = "http://127.0.0.1:9001"
anonymous = true

[deadlines]
sandbox-data = "2s"
container = "9s"
"#;

/// Far more than a sandbox waits here, for a loaded machine.
const SOON: Duration = Duration::from_secs(20);

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

    /// `rekindle dataset …` on the node.
    async fn dataset(&self, args: &[&str]) -> Result<Output> {
        let command = [&["rekindle", "dataset"], args].concat();
        let mut command = tokio::process::Command::from(self.node.command(&command));
        Ok(command.kill_on_drop(true).output().await?)
    }

    /// What `rekindle dataset ls --json` says of a dataset, if it is there.
    async fn listed(&self, uri: &str) -> Result<Option<Value>> {
        let output = self.dataset(&["ls", "--json"]).await?;
        assert_eq!(output.status.code(), Some(0), "{output:?}");
        schema::check(&["dataset", "ls", "--json"], &output.stdout);
        let rows: Vec<Value> = serde_json::from_slice(&output.stdout)?;
        Ok(rows.into_iter().find(|row| row["uri"] == uri))
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

/// Asserts that a pod's sandbox is refused in one sentence with all of `words`, soon; `try_run` sees to it that nothing
/// stays of it.
async fn refuses_pod(pod: PodBuilder<'_>, words: &[&str]) -> Result<()> {
    let since = Instant::now();
    let refusal = pod
        .try_run()
        .await?
        .err()
        .context("the sandbox was run without its data")?;
    let (took, text) = (since.elapsed(), refusal.message());
    ensure!(
        !text.trim().contains('\n'),
        "the refusal is more than a line: {text:?}"
    );
    for word in words {
        ensure!(text.contains(word), "{word:?} is not in: {text}");
    }
    // Two seconds, by the node's deadlines; what the stores take to be given up is minutes.
    ensure!(took < SOON, "the refusal took {took:?}");
    Ok(())
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
    let task = stage.container("writer", WEIGHTS).shell(line);
    let task = task.run().await?;
    counts(&task).await?;
    let said = task.io().out()?.so_far();
    ensure!(said.starts_with("weights\n"), "it is not as it was: {said}");
    task.remove().await?;
    let next = stage.container("reader", WEIGHTS);
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

/// Of the tests that restore, one at a time: the node's CRIU hangs meanwhile.
static CRIU: Mutex<()> = Mutex::const_new(());

#[tokio::test]
async fn a_wait_for_an_image_leaves_time_to_start() -> Result<()> {
    let stage = stage().await?;
    let _turn = CRIU.lock().await;
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
    let left = stage.node.processes_with(&["sleep 1000"])?;
    stage
        .node
        .run(["sh", "-c", r#"umount "$(command -v criu)""#])
        .await?;
    let warm = warm?;
    ensure!(left.is_empty(), "what was given up is left: {left:?}");
    counts(&warm).await?;
    ensure!(
        warm.io().out()?.so_far().contains(" 1\n"),
        "it was restored"
    );
    warm.remove().await
}

#[tokio::test]
async fn a_pod_finds_its_data_at_its_mount() -> Result<()> {
    let stage = stage().await?;
    let cri = stage.node.cri().await?;
    let pod = cri.pod("finds").annotation(DATASET, WEIGHTS);
    let pod = pod.annotation(DATASET_MOUNT, "/models/weights");
    let pod = pod.run().await?;
    // It is there before the first instruction.
    let line = "cat /models/weights/file; exec /counter";
    let task = pod.container("main").shell(line).run().await?;
    task.counts_to(1).await?;
    let said = task.said("stdout")?;
    ensure!(said.starts_with("weights\n"), "it is not there: {said}");
    let options = "grep ' /models/weights ' /proc/mounts | cut -d ' ' -f 4 | cut -d , -f 1";
    assert_eq!(task.shell(options).await?, "ro");
    let written = task
        .exec(&["sh", "-c", "echo more >> /models/weights/file"])
        .await?;
    ensure!(
        written.code != 0 && written.err.contains("Read-only file system"),
        "{written:?}"
    );
    assert_eq!(task.shell("cat /models/weights/file").await?, "weights");
    pod.remove().await
}

#[tokio::test]
async fn a_pod_without_its_data_is_refused_at_its_sandbox() -> Result<()> {
    let stage = stage().await?;
    let cri = stage.node.cri().await?;
    // Nobody answers: it is told how far it came.
    let words = [
        SILENT,
        "the source has not answered the listing",
        "after 2 s",
    ];
    for attempt in ["first", "second"] {
        let pod = cri.pod(&format!("silent-{attempt}"));
        refuses_pod(pod.annotation(DATASET, SILENT), &words).await?;
    }
    // There is none: it is told so.
    let absent = "file:///srv/data/absent/";
    refuses_pod(cri.pod("absent").annotation(DATASET, absent), &[absent]).await
}

/// An image that is asked of a store which does not answer is waited for as data is.
#[tokio::test]
async fn a_wait_for_a_tier_leaves_time_to_start() -> Result<()> {
    let stage = stage().await?;
    let _turn = CRIU.lock().await;
    let cri = stage.node.cri().await?;
    let pod = |name: &str| {
        let pod = cri.pod(name).namespace("waits");
        pod.annotation("rekindle.dev/restore-from", "never-made")
    };
    let words = [
        "image never-made: its tier has not answered after 2 s",
        "the next attempt joins it",
    ];
    refuses_pod(pod("tier-required"), &words).await?;
    let pod = pod("tier-cold").annotation("rekindle.dev/restore-policy", "Opportunistic");
    let pod = pod.run().await?;
    let since = Instant::now();
    let task = pod.container("main").args(&["/counter"]);
    let task = task.run().await?;
    task.counts_to(2).await?;
    let took = since.elapsed();
    ensure!(took < SOON, "it waited {took:?}");
    ensure!(task.said("stdout")?.contains(" 1\n"), "it was restored");
    pod.remove().await
}

/// Nothing that the node's configuration does not allow, whether it is there or not.
#[tokio::test]
async fn a_pod_with_a_source_that_is_not_allowed_is_refused_at_its_sandbox() -> Result<()> {
    let stage = stage().await?;
    let cri = stage.node.cri().await?;
    for (name, uri) in [
        ("etc", "file:///etc/"),
        ("above", "file:///srv/"),
        ("bucket", "s3://others/weights/"),
    ] {
        for policy in ["Required", "Opportunistic"] {
            let pod = cri.pod(&format!("not-allowed-{name}-{}", policy.to_lowercase()));
            let pod = pod.annotation(DATASET, uri);
            let words = [uri, "namespace default", "[[datasets.source]]"];
            refuses_pod(pod.annotation(DATASET_POLICY, policy), &words).await?;
        }
    }
    Ok(())
}

/// As the kubelet does it: the sandbox is asked for again and again, until the data is there.
#[tokio::test]
async fn a_sandbox_that_is_asked_for_again_joins_the_download() -> Result<()> {
    let stage = stage().await?;
    let store = HaltingStore::start(&stage.node, HALTING_ADDRESS.into()).await?;
    let cri = stage.node.cri().await?;
    let pod = |attempt: u32| {
        let pod = cri.pod(&format!("joins-{attempt}"));
        pod.annotation(DATASET, HALTING)
    };
    let here = format!("of {} bytes are here", halting::SIZE);
    let words = [HALTING, &here, "the next attempt joins it"];
    refuses_pod(pod(1), &words).await?;
    refuses_pod(pod(2), &words).await?;
    assert_eq!(
        store.begun(),
        1,
        "the second attempt has a download of its own"
    );
    store.go_on();
    let pod = pod(3).run().await?;
    let task = pod.container("main").args(&["/counter"]).run().await?;
    let size = task.shell("wc -c < /data/weights").await?;
    assert_eq!(size, halting::SIZE.to_string());
    assert_eq!(store.begun(), 1, "it was fetched again");
    // Those that were begun for the refused attempts end by themselves.
    poll::until("the end of the downloads", async || {
        let left = stage.node.processes_with(&[HALTING])?;
        Ok(left.is_empty().then_some(()))
    })
    .await?;
    pod.remove().await
}

/// The process that a pod's shim has started, and that outlives the pod.
#[tokio::test]
async fn a_download_that_is_killed_is_taken_over() -> Result<()> {
    let stage = stage().await?;
    let store = HaltingStore::start(&stage.node, ORPHANED_ADDRESS.into()).await?;
    let cri = stage.node.cri().await?;
    let pod = |name: &str| cri.pod(name).annotation(DATASET, ORPHANED);
    refuses_pod(pod("taken-over-1"), &[ORPHANED]).await?;
    let downloads = || stage.node.processes_with(&["rekindle prefetch", ORPHANED]);
    let first = downloads()?;
    let [(first, _)] = first.as_slice() else {
        bail!("there should be one download: {first:?}");
    };
    let strike = async {
        poll::until("the second pod's download", async || {
            Ok((downloads()?.len() == 2).then_some(()))
        })
        .await?;
        kill(Pid::from_raw((*first).try_into()?), Signal::SIGKILL)?;
        store.go_on();
        Ok::<_, anyhow::Error>(())
    };
    let (pod, struck) = tokio::join!(pod("taken-over-2").run(), strike);
    struck?;
    let pod = pod?;
    let task = pod.container("main").args(&["/counter"]).run().await?;
    let size = task.shell("wc -c < /data/weights").await?;
    assert_eq!(size, halting::SIZE.to_string());
    pod.remove().await
}

fn ends_with(output: &Output, code: i32, words: &[&str]) -> Result<()> {
    assert_eq!(output.status.code(), Some(code), "{output:?}");
    let said = match code {
        4 | 3 => String::from_utf8_lossy(&output.stderr),
        _ => String::from_utf8_lossy(&output.stdout),
    };
    for word in words {
        ensure!(said.contains(word), "{word:?} is not in: {said}");
    }
    Ok(())
}

#[tokio::test]
async fn a_dataset_is_listed_verified_and_removed() -> Result<()> {
    let stage = stage().await?;
    let shelf = "file:///srv/data/shelf/";
    let make =
        "mkdir -p /srv/data/shelf; echo one > /srv/data/shelf/one; echo two > /srv/data/shelf/two";
    stage.node.run(["sh", "-c", make]).await?;
    assert_eq!(stage.listed(shelf).await?, None);
    ends_with(&stage.dataset(&["verify", shelf]).await?, 4, &[shelf])?;
    ends_with(&stage.dataset(&["rm", shelf]).await?, 4, &[shelf])?;

    let task = stage.container("reads", shelf).run().await?;
    counts(&task).await?;
    let row = stage.listed(shelf).await?.context("it is not listed")?;
    assert_eq!((&row["files"], &row["bytes"]), (&2.into(), &8.into()));
    let version = row["version"].as_str().context("no version")?;
    ends_with(
        &stage.dataset(&["verify", shelf]).await?,
        0,
        &[shelf, "sound"],
    )?;
    // By its version too, and whole: nothing of it goes while it is mounted.
    for name in [shelf, &version[..8]] {
        let output = stage.dataset(&["rm", name]).await?;
        ends_with(&output, 3, &[shelf, "in use"])?;
    }
    assert_eq!(stage.listed(shelf).await?, Some(row.clone()));
    let read = task
        .exec("read", &["cat", "/data/one", "/data/two"])
        .run()
        .await?;
    assert_eq!(read.io().out()?.text().await?, "one\ntwo\n");
    read.wait().await?;
    read.delete().await?;
    task.remove().await?;

    let path = row["path"].as_str().context("no path")?;
    stage
        .node
        .run([
            "sh",
            "-c",
            &format!("printf 0 | dd of={path}/one conv=notrunc"),
        ])
        .await?;
    let output = stage.dataset(&["verify", shelf]).await?;
    ends_with(&output, 1, &["one: ", "expected", "1 files damaged"])?;
    // The shim lets go of it when the container is gone.
    poll::until("the dataset to be free", async || {
        let output = stage.dataset(&["rm", shelf]).await?;
        Ok((output.status.code() != Some(3)).then_some(output))
    })
    .await
    .and_then(|output| ends_with(&output, 0, &["removed", shelf]))?;
    assert_eq!(stage.listed(shelf).await?, None);
    ensure!(!stage.node.path(path).exists(), "its files are there");
    ends_with(&stage.dataset(&["rm", shelf]).await?, 4, &[shelf])
}
