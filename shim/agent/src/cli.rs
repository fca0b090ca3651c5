//! What was typed. Nothing here is resolved or checked beyond its own syntax.

use std::path::PathBuf;

use clap::{Parser, Subcommand};

use crate::{commands, exit};

/// Warm data and warm starts for containers, on containerd.
#[derive(Debug, Parser)]
#[command(
    name = "rekindle",
    version,
    about,
    after_help = exit::TABLE,
    disable_help_subcommand = true,
    propagate_version = false,
    max_term_width = 100
)]
pub(crate) struct Cli {
    /// Read the node's configuration from FILE instead of /etc/rekindle/config.toml.
    #[arg(
        long,
        global = true,
        value_name = "FILE",
        help_heading = "Global options"
    )]
    pub(crate) config: Option<PathBuf>,

    #[command(subcommand)]
    pub(crate) command: Command,
}

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Make a named image of a running container.
    Checkpoint(commands::checkpoint::CheckpointArgs),
    /// Start another container like one that there is from an image.
    Restore(commands::restore::RestoreArgs),
    /// Have a container stand still, with all of its memory.
    Suspend(commands::suspend::SuspendArgs),
    /// Have a suspended container go on.
    Resume(commands::suspend::ResumeArgs),
    /// List, show, verify and remove images.
    Image(commands::image::ImageArgs),
    /// Fetch a dataset into this node's cache, and wait until it is there.
    Prefetch(commands::prefetch::PrefetchArgs),
    /// List, verify and remove this node's datasets.
    Dataset(commands::dataset::DatasetArgs),
    /// Keep this node's images: copies in their tiers, room on the disk, nothing left by what was killed.
    Agent(commands::agent::AgentArgs),
    /// Check this node and print its resolved configuration.
    Doctor(commands::doctor::DoctorArgs),
    /// Print a completion script for a shell.
    Completion(commands::completion::CompletionArgs),
    /// For the shim, which links no network client: a container's image as JSON.
    #[command(hide = true)]
    ContainerImage(commands::container_image::ContainerImageArgs),
    /// For the shim: waits until a container is warm.
    #[command(hide = true)]
    Await(commands::await_warm::AwaitArgs),
    /// For the shim: brings in the memory of a lazily restored container.
    #[command(hide = true)]
    Pager(commands::pager::PagerArgs),
    /// For the shim: has processes open the descriptors by which their memory is watched.
    #[command(hide = true)]
    Userfaultfd(commands::userfaultfd::UserfaultfdArgs),
}
