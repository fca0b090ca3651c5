//! What is printed of small containers.

use super::{heading, rows, series};
use crate::small::{Heap, Measured};
use anyhow::Result;
use serde_json::{Value, json};
use std::io::{StdoutLock, Write};

pub(super) fn tables(out: &mut StdoutLock<'_>, measured: &Measured) -> Result<()> {
    heading(out, &measured.machine)?;
    writeln!(out, "from the task's create to the first word; ms")?;
    for heap in &measured.heaps {
        writeln!(
            out,
            "\n{} MiB of noise, an image of {:.0} MiB\n",
            heap.mib, heap.image_mib
        )?;
        rows(
            out,
            &[
                ("lazily", heap.lazily(), 0),
                ("eagerly", heap.eagerly(), 0),
                ("eagerly / lazily", heap.ratio(), 2),
            ],
        )?;
    }
    Ok(())
}

pub(super) fn json(measured: &Measured) -> Value {
    let of = |heap: &Heap| {
        json!({
            "mib": heap.mib, "image_mib": heap.image_mib, "lazily_ms": series(&heap.lazily()),
            "eagerly_ms": series(&heap.eagerly()), "ratio": series(&heap.ratio()),
        })
    };
    json!({
        "machine": measured.machine.json(),
        "heaps": measured.heaps.iter().map(of).collect::<Vec<_>>(),
    })
}
