//! What the figures were measured on.

use anyhow::Result;
use rekindle_harness::{Node, root};
use serde_json::{Value, json};
use std::fs;

/// What of a machine and its node moves the figures.
#[derive(Debug, Clone)]
pub(crate) struct Machine {
    pub(crate) cores: usize,
    pub(crate) cpu: String,
    pub(crate) memory_gib: u64,
    pub(crate) kernel: String,
    /// `program version` of what starts a container.
    pub(crate) versions: Vec<String>,
    /// The cargo profile of the programs under test, by the folder they came from.
    pub(crate) profile: String,
}

impl Machine {
    pub(crate) fn json(&self) -> Value {
        json!({
            "cores": self.cores, "cpu": self.cpu, "memory_gib": self.memory_gib, "kernel": self.kernel,
            "versions": self.versions, "profile": self.profile,
        })
    }
}

pub(crate) fn facts(node: &Node) -> Result<Machine> {
    let here = root::node(node.suite())?;
    let versions: Result<Vec<_>> = ["containerd", "runc", "criu"]
        .iter()
        .map(|program| Ok(format!("{program} {}", root::version(&here, program)?)))
        .collect();
    let kib = field("/proc/meminfo", "MemTotal")
        .split(' ')
        .next()
        .and_then(|number| number.parse::<u64>().ok())
        .unwrap_or(0);
    Ok(Machine {
        cores: std::thread::available_parallelism().map_or(0, usize::from),
        cpu: field("/proc/cpuinfo", "model name"),
        memory_gib: kib >> 20,
        kernel: fs::read_to_string("/proc/sys/kernel/osrelease")?
            .trim()
            .to_owned(),
        versions: versions?,
        profile: std::env::var("REKINDLE_BIN_DIR")
            .ok()
            .and_then(|dir| Some(dir.rsplit('/').next()?.to_owned()))
            .unwrap_or_else(|| "debug".into()),
    })
}

/// The value of the first `name: value` of a file in /proc.
fn field(file: &str, name: &str) -> String {
    fs::read_to_string(file)
        .unwrap_or_default()
        .lines()
        .filter_map(|line| line.split_once(':'))
        .find(|(key, _)| key.trim() == name)
        .map_or_else(|| "unknown".into(), |(_, value)| value.trim().to_owned())
}
