//! What is printed of pagers.

use super::{INCONCLUSIVE, conclusive, heading, rows, series, steps};
use crate::figures::Series;
use crate::pager::{Beside, Measured, Round};
use anyhow::Result;
use serde_json::{Value, json};
use std::io::{StdoutLock, Write};

/// Ours at most so much of the other's.
const OF_EAGER: f64 = 0.25;
const AFAR_OF_EAGER: f64 = 0.5;
const OF_CRIU: f64 = 1.0;
const OF_CRIU_ALL_IN: f64 = 0.6;
const LARGE_OF_SMALL: f64 = 1.3;
/// MiB, and its window, which is below one.
const PAGER: f64 = 64.0;

fn of_eager(round: &Round) -> Option<f64> {
    Some(round.ours.answered / round.eager.answered)
}

fn afar_of_eager(round: &Round) -> Option<f64> {
    Some(round.afar.answered / round.eager.answered)
}

fn of_criu(round: &Round) -> Option<f64> {
    Some(round.ours.answered / round.criu.answered)
}

fn of_criu_all_in(round: &Round) -> Option<f64> {
    Some(round.ours.all_in? / round.criu.all_in?)
}

fn pager_mib(round: &Round) -> Option<f64> {
    round.ours.pager_mib
}

/// Every series of one heap by its name, with how many digits.
fn all(beside: &Beside) -> Vec<(&'static str, Series, usize)> {
    vec![
        ("answer, ours, ms", beside.of(|r| Some(r.ours.answered)), 0),
        (
            "answer, from a bucket, ms",
            beside.of(|r| Some(r.afar.answered)),
            0,
        ),
        (
            "answer, eagerly, ms",
            beside.of(|r| Some(r.eager.answered)),
            0,
        ),
        (
            "answer, CRIU's, ms",
            beside.of(|r| Some(r.criu.answered)),
            0,
        ),
        ("all in, ours, ms", beside.of(|r| r.ours.all_in), 0),
        ("all in, from a bucket, ms", beside.of(|r| r.afar.all_in), 0),
        ("all in, CRIU's, ms", beside.of(|r| r.criu.all_in), 0),
        ("pager's peak, ours, MiB", beside.of(pager_mib), 1),
        (
            "pager's peak, from a bucket, MiB",
            beside.of(|r| r.afar.pager_mib),
            1,
        ),
        (
            "pager's peak, CRIU's, MiB",
            beside.of(|r| r.criu.pager_mib),
            1,
        ),
        ("answer, ours / eagerly", beside.of(of_eager), 2),
        (
            "answer, from a bucket / eagerly",
            beside.of(afar_of_eager),
            2,
        ),
        ("answer, ours / CRIU's", beside.of(of_criu), 2),
        ("all in, ours / CRIU's", beside.of(of_criu_all_in), 2),
    ]
}

pub(super) fn tables(out: &mut StdoutLock<'_>, measured: &Measured) -> Result<()> {
    heading(out, &measured.machine)?;
    writeln!(
        out,
        "from the task's create; a model server, restored {} times in each way",
        measured.small.rounds.len()
    )?;
    for beside in [&measured.small, &measured.large] {
        writeln!(out, "\n{} MiB of noise beside it\n", beside.mib)?;
        rows(out, &all(beside))?;
        verdict(
            out,
            "the first answer of the eager restore's",
            &beside.of(of_eager),
            OF_EAGER,
        )?;
        verdict(
            out,
            "the first answer from a bucket of the eager restore's",
            &beside.of(afar_of_eager),
            AFAR_OF_EAGER,
        )?;
        verdict(
            out,
            "the first answer of that by CRIU's daemon",
            &beside.of(of_criu),
            OF_CRIU,
        )?;
        let all_in = beside.of(of_criu_all_in);
        verdict(out, "all in, of CRIU's daemon's", &all_in, OF_CRIU_ALL_IN)?;
        verdict(out, "the pager's peak, MiB", &beside.of(pager_mib), PAGER)?;
        writeln!(out, "\nfrom a bucket, by the shim's steps; ms")?;
        steps(out, &beside.afar)?;
    }
    writeln!(
        out,
        "\nthe kernel's own UFFDIO_COPY, nothing read or compared\n"
    )?;
    rows(out, &ceilings(measured))?;
    writeln!(out)?;
    let ratio = measured.large_of_small();
    let what = format!(
        "the first answer with {} MiB of that with {} MiB",
        measured.large.mib, measured.small.mib
    );
    verdict(out, &what, &ratio, LARGE_OF_SMALL)
}

fn ceilings(measured: &Measured) -> Vec<(&'static str, Series, usize)> {
    let [one, two] = &measured.filling;
    vec![
        ("one thread, GB/s", one.clone(), 2),
        ("two threads, GB/s", two.clone(), 2),
    ]
}

fn verdict(out: &mut StdoutLock<'_>, what: &str, found: &Series, target: f64) -> Result<()> {
    let verdict = match (conclusive(found), found.median() <= target) {
        (false, _) => INCONCLUSIVE,
        (true, true) => ": reached",
        (true, false) => ": missed",
    };
    let median = found.median();
    Ok(writeln!(
        out,
        "{what}: {median:.2}, target {target}{verdict}"
    )?)
}

pub(super) fn json(measured: &Measured) -> Value {
    let of = |beside: &Beside| {
        let all = all(beside).into_iter();
        let all = all.map(|(name, of, _)| (name.to_owned(), series(&of)));
        json!({"mib": beside.mib, "series": all.collect::<serde_json::Map<_, _>>()})
    };
    json!({
        "machine": measured.machine.json(), "small": of(&measured.small), "large": of(&measured.large),
        "large_of_small": series(&measured.large_of_small()),
        "filling": measured.filling.iter().map(series).collect::<Vec<_>>(),
    })
}
