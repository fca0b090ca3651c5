//! What is printed of our shim and the one that containerd ships.

use super::{INCONCLUSIVE, conclusive, heading, series};
use crate::figures::Series;
use crate::shim::{Compared, Cost};
use anyhow::Result;
use serde_json::{Value, json};
use std::io::{StdoutLock, Write};

type Once = fn(&Cost) -> f64;
type Often = fn(&Cost) -> &Vec<f64>;

/// What is compared, and the most that ours may take of theirs.
const COMPARED: [(&str, &str, Often, f64); 3] = [
    ("run", "run --rm true, ms", |cost| &cost.runs, 0.75),
    ("exec", "exec true, ms", |cost| &cost.execs, 0.8),
    ("rss", "RSS of a shim, KiB", |cost| &cost.rss, 0.3),
];

fn all(values: &[f64]) -> Series {
    values.iter().copied().collect()
}

pub(super) fn tables(out: &mut StdoutLock<'_>, compared: &Compared) -> Result<()> {
    let (go, ours) = (&compared.go, &compared.ours);
    heading(out, &compared.machine)?;
    writeln!(out, "{} pairs, in turn\n", ours.runs.len())?;
    let mut rows = Vec::new();
    for (_, name, of, _) in COMPARED {
        rows.push((format!("{name}: Go"), all(of(go)), 0));
        rows.push((format!("{name}: ours"), all(of(ours)), 0));
        rows.push(("  ours / Go, per pair".to_owned(), compared.ratio(of), 2));
    }
    let held = &compared.held;
    rows.push(("State in a restore, ms".to_owned(), held.state.clone(), 1));
    rows.push(("Kill in a restore, ms".to_owned(), held.kill.clone(), 1));
    let rows: Vec<_> = rows
        .iter()
        .map(|(name, series, digits)| (name.as_str(), series.clone(), *digits))
        .collect();
    super::rows(out, &rows)?;

    writeln!(out, "\n{:<32}{:>10}{:>10}", "", "Go", "ours")?;
    let once: [(&str, Once, usize); 5] = [
        ("threads of a shim", |c| c.threads as f64, 0),
        ("binary, MB", |c| c.binary_bytes as f64 / 1e6, 1),
        ("100 pods at once, s", |c| c.pods_s, 1),
        ("their shims' RSS, MiB", |c| c.pods.rss as f64 / 1024.0, 0),
        ("their shims' PSS, MiB", |c| c.pods.pss as f64 / 1024.0, 0),
    ];
    for (name, of, digits) in once {
        writeln!(
            out,
            "{name:<32}{:>10.digits$}{:>10.digits$}",
            of(go),
            of(ours)
        )?;
    }
    writeln!(out)?;
    for (name, _, of, target) in COMPARED {
        let ratio = compared.ratio(of);
        let verdict = match (conclusive(&ratio), ratio.median() <= target) {
            (false, _) => INCONCLUSIVE,
            (true, true) => ": reached",
            (true, false) => ": missed",
        };
        writeln!(
            out,
            "{name}: {:.2} of the Go shim's, target {target:.2}{verdict}",
            ratio.median()
        )?;
    }
    Ok(())
}

pub(super) fn json(compared: &Compared) -> Value {
    let side = |cost: &Cost| {
        json!({
            "run_ms": series(&all(&cost.runs)), "exec_ms": series(&all(&cost.execs)), "rss_kib": series(&all(&cost.rss)),
            "threads": cost.threads, "binary_bytes": cost.binary_bytes, "pods_s": cost.pods_s,
            "pods_rss_kib": cost.pods.rss, "pods_pss_kib": cost.pods.pss,
        })
    };
    let ratios: serde_json::Map<String, Value> = COMPARED
        .iter()
        .map(|&(key, _, of, target)| {
            let ratio = compared.ratio(of);
            let value = json!({"ratio": series(&ratio), "target": target, "conclusive": conclusive(&ratio)});
            (key.to_owned(), value)
        })
        .collect();
    json!({
        "machine": compared.machine.json(),
        "go": side(&compared.go),
        "ours": side(&compared.ours),
        "ours_by_go": ratios,
        "in_a_restore": {"state_ms": series(&compared.held.state), "kill_ms": series(&compared.held.kill)},
    })
}
