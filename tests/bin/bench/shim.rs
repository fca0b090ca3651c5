//! The measurement: our shim and the one that containerd ships, each on a node of its own, in turn.

use crate::figures::Series;
use crate::held::{self, Answers};
use crate::machine::{self, Machine};
use anyhow::{Context, Result, ensure};
use rekindle_harness::progress::Progress;
use rekindle_harness::{Image, Node, NodeConfig, Runtime, images};
use std::fs;

/// So many execs make one measurement, their median: where a cgroup is joined the kernel waits, or does not, for 10 ms.
const EXECS: usize = 9;
/// Pods that run at once, for the memory that their shims take together.
const PODS: usize = 100;
/// What runs for ever without doing anything.
const IDLE: &str = "tail -f /dev/null";

/// Prints how many microseconds a command took, as the node's own shell sees it.
const TIMED: &str = r#"began=$EPOCHREALTIME; "$@" >/dev/null || exit; ended=$EPOCHREALTIME
    echo $(( ${ended/./} - ${began/./} ))"#;

/// What a set of processes takes, in KiB.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Memory {
    /// Resident.
    pub(crate) rss: u64,
    /// The same, what several share divided among them.
    pub(crate) pss: u64,
}

/// What one shim costs.
#[derive(Debug, Clone, Default)]
pub(crate) struct Cost {
    /// Milliseconds of each `ctr run --rm IMAGE ID true`.
    pub(crate) runs: Vec<f64>,
    /// Milliseconds of `ctr task exec … true`.
    pub(crate) execs: Vec<f64>,
    /// A shim's memory in KiB, measured after each exec.
    pub(crate) rss: Vec<f64>,
    pub(crate) threads: u64,
    pub(crate) binary_bytes: u64,
    /// Seconds until [`PODS`] pods that are asked for at once run.
    pub(crate) pods_s: f64,
    /// Of their shims.
    pub(crate) pods: Memory,
}

/// Both, measured in turn.
#[derive(Debug)]
pub(crate) struct Compared {
    pub(crate) machine: Machine,
    pub(crate) go: Cost,
    pub(crate) ours: Cost,
    /// Ours, of a container that is being restored.
    pub(crate) held: Answers,
}

impl Compared {
    /// Ours divided by theirs, pair by pair.
    pub(crate) fn ratio(&self, of: fn(&Cost) -> &Vec<f64>) -> Series {
        let pairs = of(&self.ours).iter().zip(of(&self.go));
        pairs.map(|(ours, go)| ours / go).collect()
    }
}

pub(crate) async fn measure(pairs: usize) -> Result<Compared> {
    let busybox = images::busybox()?;
    let (go, ours) = (
        Side::ready(Runtime::Go, &busybox).await?,
        Side::ready(Runtime::Rekindle, &busybox).await?,
    );
    let mut compared = Compared {
        machine: machine::facts(&ours.node)?,
        go: Cost::default(),
        ours: Cost::default(),
        held: Answers::default(),
    };
    let progress = Progress::live("measuring");
    for pair in 0..pairs {
        progress.step(&format!("pair {} of {pairs}", pair + 1));
        // In turn, so that neither profits from its place.
        if pair % 2 == 0 {
            go.once(pair, &mut compared.go).await?;
            ours.once(pair, &mut compared.ours).await?;
        } else {
            ours.once(pair, &mut compared.ours).await?;
            go.once(pair, &mut compared.go).await?;
        }
    }
    progress.step("restores that stand still");
    compared.held = held::measure(&ours.node, &busybox, pairs).await?;
    progress.step(&format!("{PODS} pods at once"));
    go.many(&mut compared.go).await?;
    ours.many(&mut compared.ours).await?;
    progress.hide();
    Ok(compared)
}

/// A node with one of the shims, and an idle container on it.
struct Side {
    node: Node,
    image: String,
}

impl Side {
    async fn ready(runtime: Runtime, image: &Image) -> Result<Side> {
        let node = Node::start(NodeConfig::new(runtime)?).await?;
        node.import(image).await?;
        let side = Side {
            node,
            image: image.name.clone(),
        };
        side.idle("idle").await?;
        // Not measured: the page cache learns the programs.
        side.run("first").await?;
        Ok(side)
    }

    async fn idle(&self, id: &str) -> Result<()> {
        let line = format!("ctr run --detach {} {id} {IDLE}", self.image);
        self.node.run(["sh", "-c", &line]).await.map(drop)
    }

    /// Milliseconds.
    async fn run(&self, id: &str) -> Result<f64> {
        self.timed(&["ctr", "run", "--rm", &self.image, id, "true"])
            .await
    }

    async fn timed(&self, command: &[&str]) -> Result<f64> {
        let line = [&["bash", "-c", TIMED, "bash"], command].concat();
        let out = tokio::process::Command::from(self.node.command(&line))
            .output()
            .await?;
        ensure!(
            out.status.success(),
            "{command:?}: {}",
            String::from_utf8_lossy(&out.stderr).trim()
        );
        let micros: f64 = String::from_utf8_lossy(&out.stdout).trim().parse()?;
        Ok(micros / 1e3)
    }

    async fn once(&self, pair: usize, cost: &mut Cost) -> Result<()> {
        cost.runs.push(self.run(&format!("run-{pair}")).await?);
        let mut execs = Vec::new();
        for exec in 0..EXECS {
            let id = format!("exec-{pair}-{exec}");
            let exec = ["ctr", "task", "exec", "--exec-id", &id, "idle", "true"];
            execs.push(self.timed(&exec).await?);
        }
        cost.execs
            .push(execs.into_iter().collect::<Series>().median());
        let (pid, _) = self.node.shim_of("idle")?;
        cost.rss.push(memory(pid)?.rss as f64);
        cost.threads = field(pid, "status", "Threads")?;
        cost.binary_bytes = fs::metadata(format!("/proc/{pid}/exe"))?.len();
        Ok(())
    }

    async fn many(&self, cost: &mut Cost) -> Result<()> {
        let line = format!(
            "seq {PODS} | xargs -P {PODS} -I{{}} ctr run --detach {} pod-{{}} {IDLE}",
            self.image
        );
        cost.pods_s = self.timed(&["sh", "-c", &line]).await? / 1e3;
        let shims = self.node.processes_with(&["containerd-shim", "-id pod-"])?;
        ensure!(
            shims.len() == PODS,
            "{PODS} pods have {} shims",
            shims.len()
        );
        for (pid, _) in shims {
            let Memory { rss, pss } = memory(pid)?;
            cost.pods.rss += rss;
            cost.pods.pss += pss;
        }
        Ok(())
    }
}

fn memory(pid: u32) -> Result<Memory> {
    Ok(Memory {
        rss: field(pid, "smaps_rollup", "Rss")?,
        pss: field(pid, "smaps_rollup", "Pss")?,
    })
}

/// The number in a `name: number` line of a file of a process.
fn field(pid: u32, file: &str, name: &str) -> Result<u64> {
    let path = format!("/proc/{pid}/{file}");
    let text = fs::read_to_string(&path).with_context(|| path.clone())?;
    let value = text.lines().find_map(|line| {
        let (key, value) = line.split_once(':')?;
        (key == name).then(|| value.split_whitespace().next())?
    });
    let value = value.with_context(|| format!("{path} has no {name}"))?;
    Ok(value.parse()?)
}
