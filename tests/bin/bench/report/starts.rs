//! What is printed of warm and cold starts.

use super::{INCONCLUSIVE, conclusive, heading, series};
use crate::figures::Series;
use crate::starts::{Measured, Start};
use anyhow::Result;
use serde_json::{Value, json};
use std::io::{StdoutLock, Write};

/// Steps below a millisecond explain nothing.
const WORTH_TELLING: f64 = 1.0;

/// One part of a start, in milliseconds.
type Part = fn(&Start) -> f64;

impl Measured {
    fn cold(&self, of: impl Fn(&Start) -> f64) -> Series {
        self.pairs.iter().map(|(cold, _)| of(cold)).collect()
    }

    fn warm(&self, of: impl Fn(&Start) -> f64) -> Series {
        self.pairs.iter().map(|(_, warm)| of(warm)).collect()
    }

    fn ratio(&self) -> Series {
        let ratio = |(cold, warm): &(Start, Start)| cold.answered / warm.answered;
        self.pairs.iter().map(ratio).collect()
    }

    /// The steps in their order, and what they took in the median: cold and warm. A step that came twice counts with
    /// its sum.
    fn steps(&self) -> Vec<(String, f64, f64)> {
        let mut names: Vec<&String> = Vec::new();
        let warm_first = self.pairs.iter().flat_map(|(cold, warm)| [warm, cold]);
        for (name, _) in warm_first.flat_map(|start| &start.steps) {
            if !names.contains(&name) {
                names.push(name);
            }
        }
        let sum = |start: &Start, name: &str| -> f64 {
            let steps = start.steps.iter().filter(|(step, _)| step == name);
            steps.map(|(_, ms)| ms).sum()
        };
        names
            .into_iter()
            .map(|name| {
                let cold = self.cold(|start| sum(start, name)).median();
                (
                    name.clone(),
                    cold,
                    self.warm(|start| sum(start, name)).median(),
                )
            })
            .filter(|(_, cold, warm)| cold.max(*warm) >= WORTH_TELLING)
            .collect()
    }
}

pub(super) fn tables(out: &mut StdoutLock<'_>, measured: &Measured) -> Result<()> {
    heading(out, &measured.machine)?;
    writeln!(
        out,
        "image {:.1} MB, made in {} ms; {} pairs of starts, in turn",
        measured.image_bytes as f64 / 1e6,
        measured.checkpoint_ms,
        measured.pairs.len()
    )?;
    writeln!(
        out,
        "\nfrom the task's create to the first answer, data on the node, images verified\n"
    )?;
    let answered = |start: &Start| start.answered;
    super::rows(
        out,
        &[
            ("cold, ms", measured.cold(answered), 0),
            ("warm, ms", measured.warm(answered), 0),
            ("cold / warm, per pair", measured.ratio(), 1),
        ],
    )?;

    writeln!(out, "\n{:<24}{:>10}{:>10}", "median, ms", "cold", "warm")?;
    let parts: [(&str, Part); 3] = [
        ("create", |s| s.created),
        ("start", |s| s.started - s.created),
        ("to the first answer", |s| s.answered - s.started),
    ];
    for (name, of) in parts {
        writeln!(
            out,
            "{name:<24}{:>10.0}{:>10.0}",
            measured.cold(of).median(),
            measured.warm(of).median()
        )?;
    }
    writeln!(
        out,
        "\n{:<24}{:>10}{:>10}",
        "steps of the shim, ms", "cold", "warm"
    )?;
    for (name, cold, warm) in measured.steps() {
        writeln!(out, "{name:<24}{cold:>10.0}{warm:>10.0}")?;
    }

    let ratio = measured.ratio();
    writeln!(
        out,
        "\na warm start answers {:.1} times sooner than a cold one{}",
        ratio.median(),
        if conclusive(&ratio) { "" } else { INCONCLUSIVE }
    )?;
    Ok(())
}

pub(super) fn json(measured: &Measured) -> Value {
    let steps: Vec<Value> = measured
        .steps()
        .into_iter()
        .map(|(step, cold, warm)| json!({"step": step, "cold_ms": cold, "warm_ms": warm}))
        .collect();
    json!({
        "machine": measured.machine.json(),
        "image_bytes": measured.image_bytes,
        "checkpoint_ms": measured.checkpoint_ms,
        "pairs": measured.pairs.iter().map(|(cold, warm)| json!([cold.answered, warm.answered])).collect::<Vec<_>>(),
        "cold_ms": series(&measured.cold(|s| s.answered)),
        "warm_ms": series(&measured.warm(|s| s.answered)),
        "ratio": series(&measured.ratio()),
        "conclusive": conclusive(&measured.ratio()),
        "steps": steps,
    })
}
