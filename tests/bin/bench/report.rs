//! What is printed: for a reader, or for a program.

use crate::figures::Series;
use crate::starts::{Measured, Start};
use anyhow::Result;
use serde_json::{Value, json};
use std::io::Write;

/// A middle half wider than this says that something else was measured as well.
const CONCLUSIVE: f64 = 0.2;
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

pub(crate) fn tables(measured: &Measured) -> Result<()> {
    let mut out = std::io::stdout().lock();
    let machine = &measured.machine;
    writeln!(
        out,
        "{} cores ({}), {} GiB, Linux {}\n{}; programs: {}\nimage {:.1} MB, made in {} ms; {} pairs of starts, in turn",
        machine.cores,
        machine.cpu,
        machine.memory_gib,
        machine.kernel,
        machine.versions.join(", "),
        machine.profile,
        measured.image_bytes as f64 / 1e6,
        measured.checkpoint_ms,
        measured.pairs.len()
    )?;
    writeln!(
        out,
        "\nfrom the task's create to the first answer, data on the node, images verified\n"
    )?;
    writeln!(
        out,
        "{:<24}{:>10}{:>10}{:>10}{:>8}",
        "", "median", "min", "max", "IQR"
    )?;
    let answered = |start: &Start| start.answered;
    for (name, series, unit) in [
        ("cold, ms", measured.cold(answered), 0),
        ("warm, ms", measured.warm(answered), 0),
        ("cold / warm, per pair", measured.ratio(), 1),
    ] {
        writeln!(
            out,
            "{name:<24}{:>10.unit$}{:>10.unit$}{:>10.unit$}{:>7.0}%",
            series.median(),
            series.min(),
            series.max(),
            series.spread() * 100.0
        )?;
    }

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
        if ratio.spread() > CONCLUSIVE {
            ": inconclusive, the middle half of the ratios is wider than 20 % of their median; is the machine busy?"
        } else {
            ""
        }
    )?;
    Ok(())
}

pub(crate) fn json(measured: &Measured) -> Result<()> {
    let series = |series: Series| -> Value {
        json!({"median": series.median(), "min": series.min(), "max": series.max(), "iqr_of_median": series.spread()})
    };
    let machine = &measured.machine;
    let steps: Vec<Value> = measured
        .steps()
        .into_iter()
        .map(|(step, cold, warm)| json!({"step": step, "cold_ms": cold, "warm_ms": warm}))
        .collect();
    let answer = json!({
        "machine": {
            "cores": machine.cores, "cpu": machine.cpu, "memory_gib": machine.memory_gib, "kernel": machine.kernel,
            "versions": machine.versions, "profile": machine.profile,
        },
        "image_bytes": measured.image_bytes,
        "checkpoint_ms": measured.checkpoint_ms,
        "pairs": measured.pairs.iter().map(|(cold, warm)| json!([cold.answered, warm.answered])).collect::<Vec<_>>(),
        "cold_ms": series(measured.cold(|s| s.answered)),
        "warm_ms": series(measured.warm(|s| s.answered)),
        "ratio": series(measured.ratio()),
        "conclusive": measured.ratio().spread() <= CONCLUSIVE,
        "steps": steps,
    });
    writeln!(std::io::stdout(), "{answer}")?;
    Ok(())
}
