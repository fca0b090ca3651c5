//! `rekindle agent`: the daemon of a node.

use std::{
    path::{Path, PathBuf},
    process::ExitCode,
};

use rekindle_core::{config::NodeConfig, paths, step::AgentStep};
use rekindle_store::Lock;

use crate::{
    agent::Agent,
    api::{self, Asked},
    exit::Failure,
};

const EXAMPLES: &str = "\
Examples:
  rekindle agent               # as rekindle-agent.service does
  rekindle agent --once        # one round, for a timer of one's own

In each round it removes what killed processes left, copies images that are in memory only to the disk, and those
that containers start from into memory ([images.memory]), puts images that are not in their namespace's tier there
([[images.tier]]), and removes those that may go by [images.retention], but no image of a namespace with a
tier that is not whole in there, and none that a container leases. The configuration is read in each round.

It can be killed at any time, and keeps nothing that the next one would need. Its API is for root and the group
that agent.group names.

Exit codes: 0 done (--once), 1 failed, also where a tier did not take an image, 2 wrong usage, 3 there is one already.";

#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct AgentArgs {
    /// Go round once, and end.
    #[arg(long)]
    once: bool,
    /// Serve the API at this socket; not with --once.
    #[arg(long, value_name = "PATH", default_value = paths::AGENT_SOCKET)]
    socket: PathBuf,
}

pub(crate) async fn run(
    args: &AgentArgs,
    file: Option<&Path>,
    config: impl Fn() -> anyhow::Result<NodeConfig>,
) -> anyhow::Result<ExitCode> {
    let mut node = config()?;
    let mut agent = Agent::new(&node)?;
    let lock = node.images.root.join(".agent.lock");
    let Some(_alone) = Lock::try_acquire(&lock)? else {
        let reason = format!("there is an agent already: it holds {}", lock.display());
        return Err(Failure::Refused(reason).into());
    };
    let mut waiting: Vec<Asked> = Vec::new();
    let mut api = match args.once {
        true => None,
        false => {
            let group = node.agent.group.as_deref();
            let (store, told) = (agent.store(), agent.told());
            Some(api::serve(&args.socket, group, store, told, file).await?)
        }
    };
    loop {
        // It reads and writes whole images, and blocks; the store's client has the runtime's other threads.
        let failed = tokio::task::block_in_place(|| agent.round(&node));
        for asked in waiting.drain(..) {
            // Who asked may be gone.
            let _ = asked.send(u32::try_from(failed).unwrap_or(u32::MAX));
        }
        let Some((_, rounds)) = &mut api else {
            return Ok(match failed {
                0 => ExitCode::SUCCESS,
                _ => ExitCode::FAILURE,
            });
        };
        agent.begins(AgentStep::Rest);
        tokio::select! {
            () = tokio::time::sleep(node.agent.every) => {}
            Some(asked) = rounds.recv() => waiting.push(asked),
        }
        match config() {
            Ok(read) if roots(&read) == roots(&node) => node = read,
            Ok(_) => {
                tracing::warn!("images.root or images.memory has changed: start the agent again")
            }
            Err(error) => tracing::warn!("going on with the configuration as it was: {error:#}"),
        }
    }
}

/// Where images lie, which does not change while it runs.
fn roots(node: &NodeConfig) -> (&Path, Option<&Path>) {
    let memory = node.images.memory.as_ref();
    (
        &node.images.root,
        memory.map(|memory| memory.root.as_path()),
    )
}
