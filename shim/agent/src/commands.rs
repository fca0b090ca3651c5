//! The commands, one file each.

use std::process::ExitCode;

use crate::{
    cli::{Cli, Command},
    config,
};

pub(crate) mod agent;
pub(crate) mod await_warm;
pub(crate) mod checkpoint;
pub(crate) mod completion;
pub(crate) mod container_image;
pub(crate) mod dataset;
pub(crate) mod doctor;
pub(crate) mod image;
pub(crate) mod pager;
pub(crate) mod prefetch;
pub(crate) mod restore;
pub(crate) mod suspend;
pub(crate) mod userfaultfd;

/// Runs what was asked for. The configuration is read only by the commands that obey it, so that a
/// broken one does not break the shell's completion or the shim.
pub(crate) async fn run(cli: Cli) -> anyhow::Result<ExitCode> {
    let config = || config::load(cli.config.as_deref());
    match cli.command {
        Command::Checkpoint(args) => checkpoint::run(args, &config()?).await,
        Command::Restore(args) => restore::run(args, &config()?).await,
        Command::Suspend(args) => suspend::suspend(args).await,
        Command::Resume(args) => suspend::resume(args).await,
        Command::Image(args) => image::run(args, &config()?).await,
        Command::Agent(args) => agent::run(&args, cli.config.as_deref(), config).await,
        Command::Prefetch(args) => prefetch::run(args, &config()?).await,
        Command::Dataset(args) => dataset::run(args, &config()?).await,
        Command::Doctor(args) => doctor::run(args, &config()?).await,
        Command::Completion(args) => Ok(completion::run(args)),
        Command::ContainerImage(args) => container_image::run(args).await,
        Command::Await(args) => await_warm::run(&args),
        Command::Pager(args) => {
            tokio::task::block_in_place(|| pager::run(&args, cli.config.as_deref(), config))
        }
        Command::Userfaultfd(args) => userfaultfd::run(&args),
    }
}
