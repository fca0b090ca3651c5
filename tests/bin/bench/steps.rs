//! What the shim's log tells of the steps of a container.

use anyhow::Result;
use rekindle_harness::Node;
use std::fs;

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
