//! The benchmark: how much sooner a warm start answers than a cold one. `make bench` runs it.

#[path = "bench/figures.rs"]
mod figures;
#[path = "bench/machine.rs"]
mod machine;
#[path = "bench/report.rs"]
mod report;
#[path = "bench/starts.rs"]
mod starts;

use anyhow::{Context, Result, bail};
use std::io::Write;
use std::process::ExitCode;

const USAGE: &str = "\
Usage: bench [--pairs N] [--json]

  --pairs N  measure N cold and N warm starts, one after the other [default: 10]
  --json     print one line of JSON in place of the tables";

/// What was typed.
#[derive(Debug)]
struct Args {
    pairs: usize,
    json: bool,
}

impl Args {
    fn parse(mut typed: impl Iterator<Item = String>) -> Result<Option<Args>> {
        let mut args = Args {
            pairs: 10,
            json: false,
        };
        while let Some(word) = typed.next() {
            match word.as_str() {
                "--json" => args.json = true,
                "--pairs" => {
                    let number = typed.next().context("--pairs wants a number")?;
                    args.pairs = number
                        .parse()
                        .ok()
                        .filter(|&n| n > 0)
                        .with_context(|| format!("--pairs {number:?}: a number from 1 on"))?;
                }
                "-h" | "--help" => return Ok(None),
                other => bail!("{other:?} is not understood\n\n{USAGE}"),
            }
        }
        Ok(Some(args))
    }
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<ExitCode> {
    let Some(args) = Args::parse(std::env::args().skip(1))? else {
        writeln!(std::io::stdout(), "{USAGE}")?;
        return Ok(ExitCode::SUCCESS);
    };
    tokio::select! {
        measured = starts::measure(args.pairs) => {
            let measured = measured?;
            if args.json {
                report::json(&measured)?;
            } else {
                report::tables(&measured)?;
            }
            Ok(ExitCode::SUCCESS)
        }
        // The node goes with the future that held it.
        _ = tokio::signal::ctrl_c() => Ok(ExitCode::from(130)),
    }
}
