//! What the shim's log tells of the steps of a container.

use crate::figures::Series;
use anyhow::Result;
use rekindle_harness::Node;
use std::fs;

/// The steps of some containers: name, milliseconds.
#[derive(Debug, Default)]
pub(crate) struct Steps(pub(crate) Vec<(String, f64)>);

impl Steps {
    /// Each name in its order, with what it took.
    pub(crate) fn by_name(&self) -> Vec<(String, Series)> {
        let mut names: Vec<&String> = Vec::new();
        for (name, _) in &self.0 {
            if !names.contains(&name) {
                names.push(name);
            }
        }
        let of = |name: &String| {
            let all = self.0.iter().filter(|(step, _)| step == name);
            (name.clone(), all.map(|(_, ms)| *ms).collect())
        };
        names.into_iter().map(of).collect()
    }
}

/// The `id="…" step="…" ms=…` lines of a container in the log, in their order.
pub(crate) fn steps(node: &Node, id: &str) -> Result<Vec<(String, f64)>> {
    let log = fs::read_to_string(node.path("/var/log/containerd.log"))?;
    let quoted = |line: &str, name: &str| -> Option<String> {
        let (_, rest) = line.split_once(&format!(" {name}=\""))?;
        Some(rest.split_once('"')?.0.to_owned())
    };
    let step = |line: &str| {
        let step =
            quoted(line, "step").filter(|_| quoted(line, "id").is_some_and(|of| of == id))?;
        let ms = line.split_once(" ms=")?.1.split(' ').next()?;
        Some((step, ms.parse().ok()?))
    };
    Ok(log.lines().filter_map(step).collect())
}
