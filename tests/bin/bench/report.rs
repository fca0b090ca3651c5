//! What is printed: for a reader, or for a program.

#[path = "report/format.rs"]
mod format;
#[path = "report/pager.rs"]
mod pager;
#[path = "report/shims.rs"]
mod shims;
#[path = "report/small.rs"]
mod small;
#[path = "report/starts.rs"]
mod starts;
#[path = "report/stop.rs"]
mod stop;

use crate::figures::Series;
use crate::machine::Machine;
use crate::shim::Compared;
use crate::starts::Measured;
use crate::steps::Steps;
use anyhow::Result;
use serde_json::{Value, json};
use std::io::{StdoutLock, Write};

/// A middle half wider than this part of the median says that something else was measured as well.
const CONCLUSIVE: f64 = 0.2;
const INCONCLUSIVE: &str = ": inconclusive, the middle half of the ratios is wider than 20 % of their median; is the machine busy?";

fn conclusive(ratio: &Series) -> bool {
    ratio.spread() <= CONCLUSIVE
}

pub(crate) fn starts(measured: &Measured, json: bool) -> Result<()> {
    let mut out = std::io::stdout().lock();
    match json {
        true => Ok(writeln!(out, "{}", starts::json(measured))?),
        false => starts::tables(&mut out, measured),
    }
}

pub(crate) fn shims(compared: &Compared, json: bool) -> Result<()> {
    let mut out = std::io::stdout().lock();
    match json {
        true => Ok(writeln!(out, "{}", shims::json(compared))?),
        false => shims::tables(&mut out, compared),
    }
}

pub(crate) fn stop(measured: &crate::stop::Measured, json: bool) -> Result<()> {
    let mut out = std::io::stdout().lock();
    match json {
        true => Ok(writeln!(out, "{}", stop::json(measured))?),
        false => stop::tables(&mut out, measured),
    }
}

pub(crate) fn pager(measured: &crate::pager::Measured, json: bool) -> Result<()> {
    let mut out = std::io::stdout().lock();
    match json {
        true => Ok(writeln!(out, "{}", pager::json(measured))?),
        false => pager::tables(&mut out, measured),
    }
}

pub(crate) fn small(measured: &crate::small::Measured, json: bool) -> Result<()> {
    let mut out = std::io::stdout().lock();
    match json {
        true => Ok(writeln!(out, "{}", small::json(measured))?),
        false => small::tables(&mut out, measured),
    }
}

pub(crate) fn format(measured: &crate::format::Measured, json: bool) -> Result<()> {
    let mut out = std::io::stdout().lock();
    match json {
        true => Ok(writeln!(out, "{}", format::json(measured))?),
        false => format::tables(&mut out, measured),
    }
}

/// What everything below it was measured on.
fn heading(out: &mut StdoutLock<'_>, machine: &Machine) -> Result<()> {
    writeln!(
        out,
        "{} cores ({}), {} GiB, Linux {}\n{}; programs: {}",
        machine.cores,
        machine.cpu,
        machine.memory_gib,
        machine.kernel,
        machine.versions.join(", "),
        machine.profile,
    )?;
    Ok(())
}

/// A table with a row for each series: its name, and with how many digits.
/// What steps took, in milliseconds.
fn steps(out: &mut StdoutLock<'_>, steps: &Steps) -> Result<()> {
    let by_name = steps.by_name();
    let named = by_name.iter();
    let all: Vec<_> = named
        .map(|(name, took)| (name.as_str(), took.clone(), 0))
        .collect();
    rows(out, &all)
}

fn rows(out: &mut StdoutLock<'_>, rows: &[(&str, Series, usize)]) -> Result<()> {
    writeln!(
        out,
        "{:<28}{:>10}{:>10}{:>10}{:>8}",
        "", "median", "min", "max", "IQR"
    )?;
    for (name, series, digits) in rows {
        writeln!(
            out,
            "{name:<28}{:>10.digits$}{:>10.digits$}{:>10.digits$}{:>7.0}%",
            series.median(),
            series.min(),
            series.max(),
            series.spread() * 100.0
        )?;
    }
    Ok(())
}

fn series(series: &Series) -> Value {
    json!({"median": series.median(), "min": series.min(), "max": series.max(), "iqr_of_median": series.spread()})
}
