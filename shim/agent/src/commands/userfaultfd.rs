//! `rekindle userfaultfd`: hidden; the process that a shim starts so that it can watch what a container's tasks write.
//! It is a process of its own for the time that it traces the tasks.

use std::{
    io,
    os::{fd::AsFd as _, unix::net::UnixStream},
    process::ExitCode,
};

use anyhow::Context as _;
use clap::Args;
use rekindle_checkpoint::precopy::userfaultfd;

use crate::output;

/// Its standard input is the connection to the shim, to which the descriptors go.
#[derive(Debug, Args)]
pub(crate) struct UserfaultfdArgs {
    /// The processes, by their numbers here.
    #[arg(required = true)]
    pids: Vec<i32>,
}

pub(crate) fn run(args: &UserfaultfdArgs) -> anyhow::Result<ExitCode> {
    let stdin = io::stdin();
    let shim = stdin.as_fd().try_clone_to_owned();
    let mut shim = UnixStream::from(shim.context("duplicating the connection to the shim")?);
    for (pid, reason) in userfaultfd::lend(&args.pids, &mut shim)? {
        output::note(&format!("process {pid}: no userfaultfd of it: {reason}"));
    }
    Ok(ExitCode::SUCCESS)
}
