//! `rekindle pager`: hidden; the process that a shim starts beside a lazy restore, and that outlives it.

use std::{
    io,
    os::{fd::AsFd as _, unix::net::UnixStream},
    path::PathBuf,
    process::ExitCode,
};

use anyhow::Context as _;
use clap::Args;
use rekindle_checkpoint::pager;

/// Its standard input is the connection to the shim, over which the processes come.
#[derive(Debug, Args)]
pub(crate) struct PagerArgs {
    /// The folder of CRIU's images.
    #[arg(long)]
    images: PathBuf,
}

pub(crate) fn run(args: &PagerArgs) -> anyhow::Result<ExitCode> {
    let stdin = io::stdin();
    let relay = stdin.as_fd().try_clone_to_owned();
    let relay = UnixStream::from(relay.context("duplicating the connection to the shim")?);
    more_descriptors();
    match pager::serve(relay, &args.images) {
        Ok(_) => Ok(ExitCode::SUCCESS),
        Err(pager::ServeError::Abandoned) => Ok(ExitCode::from(pager::ABANDONED)),
        Err(e) => Err(e.into()),
    }
}

/// Every process that is forked while memory comes in has a descriptor, and may be one of very many.
fn more_descriptors() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let now = getrlimit(Resource::Nofile);
    let more = Rlimit {
        current: now.maximum,
        ..now
    };
    // Those that there are do for most programs.
    let _ = setrlimit(Resource::Nofile, more);
}
