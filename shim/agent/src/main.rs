//! `rekindle`: what a person types, and what the shim starts when it needs a network.
//!
//! Two steps, as everywhere here: [`cli`] is what was typed; a command resolves it into what it needs
//! and never looks at it again.
#![forbid(unsafe_code)]

mod agent;
mod api;
mod cli;
mod cluster;
mod commands;
mod config;
mod containerd;
mod exit;
mod keys;
mod output;
mod tier;

use std::process::ExitCode;

use clap::Parser as _;

fn main() -> ExitCode {
    let cli = cli::Cli::parse();
    exit::code(run(cli))
}

fn run(cli: cli::Cli) -> anyhow::Result<ExitCode> {
    output::log_to_stderr(match cli.command {
        // A daemon's log is all that is known of it.
        cli::Command::Agent(_) => "warn,rekindle=info",
        _ => "warn",
    });
    if let cli::Command::Await(args) = &cli.command {
        return commands::await_warm::run(args);
    }
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .enable_all()
        .build()?;
    let outcome = runtime.block_on(commands::run(cli));
    // Threads that fetch chunks of an image use it until the process ends: without it they panic, beside the reason.
    std::mem::forget(runtime);
    outcome
}
