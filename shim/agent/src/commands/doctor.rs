//! `rekindle doctor`: the resolved configuration, and whether this node can do what it is asked.

use std::{path::PathBuf, process::ExitCode};

use clap::Args;
use rekindle_core::config::NodeConfig;
use serde::Serialize;

use crate::{
    containerd,
    output::{self, Paint},
};

mod apiserver;
mod checks;
mod cri;
mod shown;
mod tiers;

const EXAMPLES: &str = "\
Examples:
  rekindle doctor                                  the checks, then the resolved configuration
  rekindle doctor --json | jq '.checks[] | select(.state == \"failed\")'
  rekindle --config ./new.toml doctor              would this configuration do?

Exit codes: 0 all required checks pass, 1 one does not.";

#[derive(Debug, Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct DoctorArgs {
    /// containerd's socket.
    #[arg(long, default_value = containerd::ADDRESS)]
    address: PathBuf,
    /// containerd's configuration.
    #[arg(
        long,
        value_name = "FILE",
        default_value = "/etc/containerd/config.toml"
    )]
    containerd_config: PathBuf,
    /// Print one line of JSON.
    #[arg(long)]
    json: bool,
}

/// How a check ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum State {
    Passed,
    /// Works, with less; or worth knowing.
    Noted,
    /// Required, and not so.
    Failed,
}

/// One check: what was looked at, what was found, what to do.
#[derive(Debug, Serialize)]
struct Check {
    name: &'static str,
    state: State,
    found: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    advice: Option<String>,
}

impl Check {
    fn passed(name: &'static str, found: impl Into<String>) -> Self {
        Self {
            name,
            state: State::Passed,
            found: found.into(),
            advice: None,
        }
    }

    fn noted(name: &'static str, found: impl Into<String>, advice: impl Into<String>) -> Self {
        Self {
            name,
            state: State::Noted,
            found: found.into(),
            advice: Some(advice.into()),
        }
    }

    fn failed(name: &'static str, found: impl Into<String>, advice: impl Into<String>) -> Self {
        Self {
            name,
            state: State::Failed,
            found: found.into(),
            advice: Some(advice.into()),
        }
    }

    fn print(&self, paint: Paint) {
        let mark = match self.state {
            State::Passed => paint.green("✓"),
            State::Noted => paint.yellow("!"),
            State::Failed => paint.red("✗"),
        };
        output::line(format!("{mark} {:<20} {}", self.name, self.found));
        if let Some(advice) = &self.advice {
            output::line(format!("  {:<20} → {advice}", ""));
        }
    }
}

#[derive(Debug, Serialize)]
struct Report<'a> {
    ok: bool,
    checks: &'a [Check],
    config: shown::Shown<'a>,
}

pub(crate) async fn run(args: DoctorArgs, config: &NodeConfig) -> anyhow::Result<ExitCode> {
    let checks = checks::all(&args, config).await;
    let report = Report {
        ok: checks.iter().all(|check| check.state != State::Failed),
        checks: &checks,
        config: shown::Shown::from(config),
    };
    if args.json {
        output::json(&report)?;
    } else {
        let paint = Paint::for_stdout();
        checks.iter().for_each(|check| check.print(paint));
        output::line("\n# the resolved configuration");
        output::line(toml::to_string(&report.config)?.trim_end());
    }
    Ok(if report.ok {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}
