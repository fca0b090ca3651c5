//! What is printed of the format.

use crate::format::{CHANGED, Measured};
use anyhow::Result;
use serde_json::{Value, json};
use std::io::{StdoutLock, Write};

use super::series;

pub(super) fn tables(out: &mut StdoutLock<'_>, measured: &Measured) -> Result<()> {
    writeln!(out, "\nGB/s of one thread, medians")?;
    writeln!(
        out,
        "{:<24}{:>10}{:>10}{:>10}",
        "bytes", "copy", "CRC-64", "BLAKE3"
    )?;
    for (bytes, digests) in &measured.digests {
        write!(out, "{bytes:<24}")?;
        for speed in digests {
            write!(out, "{:>10.1}", speed.median())?;
        }
        writeln!(out)?;
    }
    writeln!(
        out,
        "\nGB/s of two threads, medians, into and out of memory"
    )?;
    writeln!(
        out,
        "{:<26}{:>8}{:>6}{:>12}{:>6}{:>10}",
        "", "store", "IQR", "verify", "IQR", "stored"
    )?;
    for (name, store, read, size) in &measured.kinds {
        write!(
            out,
            "{name:<26}{:>8.2}{:>5.0}%",
            store.median(),
            store.spread() * 100.0
        )?;
        match read.median().is_nan() {
            true => write!(out, "{:>12}{:>6}", "", "")?,
            false => write!(
                out,
                "{:>12.2}{:>5.0}%",
                read.median(),
                read.spread() * 100.0
            )?,
        }
        writeln!(out, "{:>9.0}%", size * 100.0)?;
    }
    writeln!(
        out,
        "\nsecond generation, {:.0} % changed: {:.1} % stored when changed in runs of 256 KiB (target 8), {:.1} % when in single pages",
        CHANGED * 100.0,
        measured.runs * 100.0,
        measured.scattered * 100.0
    )?;
    Ok(())
}

pub(super) fn json(measured: &Measured) -> Value {
    let digests = measured.digests.iter().map(|(bytes, [copy, crc, blake3])| {
        json!({"bytes": bytes, "copy": series(copy), "crc64": series(crc), "blake3": series(blake3)})
    });
    let kinds = measured.kinds.iter().map(|(name, store, verify, size)| {
        json!({"name": name, "store": series(store), "verify": series(verify), "stored": size})
    });
    json!({
        "digests_gb_s": digests.collect::<Value>(),
        "kinds_gb_s": kinds.collect::<Value>(),
        "second_generation": {"changed": CHANGED, "runs_stored": measured.runs, "pages_stored": measured.scattered},
    })
}
