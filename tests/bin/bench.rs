//! The benchmarks: what our shim costs beside the one that containerd ships, how much sooner a warm start answers than a
//! cold one, how its memory comes in, and what the format of images costs. `make bench` runs them.

#[path = "bench/figures.rs"]
mod figures;
#[path = "bench/filling.rs"]
mod filling;
#[path = "bench/format.rs"]
mod format;
#[path = "bench/held.rs"]
mod held;
#[path = "bench/machine.rs"]
mod machine;
#[path = "bench/pager.rs"]
mod pager;
#[path = "bench/report.rs"]
mod report;
#[path = "bench/shim.rs"]
mod shim;
#[path = "bench/small.rs"]
mod small;
#[path = "bench/starts.rs"]
mod starts;
#[path = "bench/steps.rs"]
mod steps;
#[path = "bench/stop.rs"]
mod stop;

use anyhow::{Context, Result, bail};
use std::io::Write;
use std::process::ExitCode;

const USAGE: &str = "\
Usage: bench [shim] [starts] [stop] [pager] [small] [format] [--pairs N] [--json]

  shim       ours against the one that containerd ships: run, exec, memory
  starts     warm starts of a model server against cold ones
  stop       how long a process of 2 GiB stands still while it is checkpointed
  pager      a model server's first answer and all of its memory: by our pager from the disk and from a bucket, eagerly,
             and by CRIU's daemon
  small      up to what size a container goes on sooner when all of its memory is read before it runs
  format     digests, chunks and generations of images, without a node
             (without any of these: all)
  --pairs N  measure N pairs, one after the other [default: 15]
  --json     print one line of JSON for each in place of the tables";

/// What was typed.
#[derive(Debug)]
struct Args {
    shim: bool,
    starts: bool,
    stop: bool,
    pager: bool,
    small: bool,
    format: bool,
    pairs: usize,
    json: bool,
}

impl Args {
    fn parse(mut typed: impl Iterator<Item = String>) -> Result<Option<Args>> {
        let mut args = Args {
            shim: false,
            starts: false,
            stop: false,
            pager: false,
            small: false,
            format: false,
            pairs: 15,
            json: false,
        };
        while let Some(word) = typed.next() {
            match word.as_str() {
                "shim" => args.shim = true,
                "starts" => args.starts = true,
                "stop" => args.stop = true,
                "pager" => args.pager = true,
                "small" => args.small = true,
                "format" => args.format = true,
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
        let one = [
            &mut args.shim,
            &mut args.starts,
            &mut args.stop,
            &mut args.pager,
            &mut args.small,
            &mut args.format,
        ];
        if one.iter().all(|wanted| !**wanted) {
            one.into_iter().for_each(|wanted| *wanted = true);
        }
        Ok(Some(args))
    }
}

async fn measure(args: &Args) -> Result<()> {
    if args.shim {
        report::shims(&shim::measure(args.pairs).await?, args.json)?;
    }
    if args.starts {
        report::starts(&starts::measure(args.pairs).await?, args.json)?;
    }
    if args.stop {
        report::stop(&stop::measure(args.pairs).await?, args.json)?;
    }
    if args.pager {
        report::pager(&pager::measure(args.pairs).await?, args.json)?;
    }
    if args.small {
        report::small(&small::measure(args.pairs).await?, args.json)?;
    }
    if args.format {
        report::format(&format::measure(args.pairs)?, args.json)?;
    }
    Ok(())
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<ExitCode> {
    let Some(args) = Args::parse(std::env::args().skip(1))? else {
        writeln!(std::io::stdout(), "{USAGE}")?;
        return Ok(ExitCode::SUCCESS);
    };
    tokio::select! {
        measured = measure(&args) => measured.map(|()| ExitCode::SUCCESS),
        // The node goes with the future that held it.
        _ = tokio::signal::ctrl_c() => Ok(ExitCode::from(130)),
    }
}
