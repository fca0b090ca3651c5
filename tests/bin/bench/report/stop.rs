//! What is printed of the time that a process stands still.

use super::{INCONCLUSIVE, conclusive, heading, rows, series, steps};
use crate::figures::Series;
use crate::stop::{Checkpoint, Compared, Measured};
use anyhow::Result;
use serde_json::{Value, json};
use std::io::{StdoutLock, Write};

/// Ours at most so much of the Go shim's, in memory and on the disk.
const TARGETS: [(&str, f64); 2] = [("in memory", 0.4), ("on the disk, synced", 0.6)];
/// Of what `dd` takes for as many bytes.
const OF_THE_DISK: f64 = 1.15;

fn stopped(checkpoint: &Checkpoint) -> f64 {
    checkpoint.stopped
}

fn total(checkpoint: &Checkpoint) -> f64 {
    checkpoint.total
}

pub(super) fn tables(out: &mut StdoutLock<'_>, measured: &Measured) -> Result<()> {
    heading(out, &measured.machine)?;
    for ((place, target), compared) in TARGETS.iter().zip([&measured.memory, &measured.disk]) {
        writeln!(
            out,
            "\nA heap of {} MiB, {place}; seconds",
            measured.heap_mib
        )?;
        let ceiling: Series = compared.ceiling.iter().copied().collect();
        let of_ceiling = compared.ours(stopped).median() / ceiling.median();
        rows(
            out,
            &[
                ("Go, stopped", compared.go(stopped), 2),
                ("ours, stopped", compared.ours(stopped), 2),
                ("Go, in all", compared.go(total), 2),
                ("ours, in all", compared.ours(total), 2),
                ("dd of as many bytes", ceiling, 2),
                ("ours / Go, stopped", compared.ratio(stopped), 2),
                ("ours / Go, in all", compared.ratio(total), 2),
            ],
        )?;
        let ratio = compared.ratio(stopped);
        writeln!(out, "ours, by its steps; ms")?;
        steps(out, &compared.steps)?;
        let verdict = match (conclusive(&ratio), ratio.median() <= *target) {
            (false, _) => INCONCLUSIVE.to_owned(),
            (true, true) => ": reached".to_owned(),
            (true, false) => ": missed".to_owned(),
        };
        writeln!(
            out,
            "stopped {:.2} of the Go shim's, target {target}{verdict}",
            ratio.median()
        )?;
        writeln!(
            out,
            "stopped {of_ceiling:.2} of dd's time (on the disk: target {OF_THE_DISK})"
        )?;
    }
    Ok(())
}

pub(super) fn json(measured: &Measured) -> Value {
    let of = |compared: &Compared| {
        json!({
            "go_stopped_s": series(&compared.go(stopped)), "ours_stopped_s": series(&compared.ours(stopped)),
            "go_total_s": series(&compared.go(total)), "ours_total_s": series(&compared.ours(total)),
            "ratio_stopped": series(&compared.ratio(stopped)), "ratio_total": series(&compared.ratio(total)),
            "dd_s": series(&compared.ceiling.iter().copied().collect()),
        })
    };
    json!({
        "machine": measured.machine.json(), "heap_mib": measured.heap_mib,
        "memory": of(&measured.memory), "disk": of(&measured.disk),
    })
}
