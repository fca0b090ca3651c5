//! `rekindle agent`: the daemon of a node.

use std::process::ExitCode;

use rekindle_core::{config::NodeConfig, step::AgentStep};
use rekindle_store::Lock;

use crate::{agent::Agent, exit::Failure};

const EXAMPLES: &str = "\
Examples:
  rekindle agent               # as rekindle-agent.service does
  rekindle agent --once        # one round, for a timer of one's own

In each round it removes what killed processes left, puts images that are not in their namespace's tier there
([[images.tier]]), and removes those that may go by [images.retention], but no image of a namespace with a
tier that is not whole in there, and none that a container leases. The configuration is read in each round.

It can be killed at any time, and keeps nothing that the next one would need.

Exit codes: 0 done (--once), 1 failed, also where a tier did not take an image, 2 wrong usage, 3 there is one already.";

#[derive(Debug, clap::Args)]
#[command(after_help = EXAMPLES)]
pub(crate) struct AgentArgs {
    /// Go round once, and end.
    #[arg(long)]
    once: bool,
}

pub(crate) async fn run(
    args: &AgentArgs,
    config: impl Fn() -> anyhow::Result<NodeConfig>,
) -> anyhow::Result<ExitCode> {
    let mut node = config()?;
    let mut agent = Agent::new(&node)?;
    let lock = node.images.root.join(".agent.lock");
    let Some(_alone) = Lock::try_acquire(&lock)? else {
        let reason = format!("there is an agent already: it holds {}", lock.display());
        return Err(Failure::Refused(reason).into());
    };
    loop {
        // It reads and writes whole images, and blocks; the store's client has the runtime's other threads.
        let failed = tokio::task::block_in_place(|| agent.round(&node));
        if args.once {
            return Ok(match failed {
                0 => ExitCode::SUCCESS,
                _ => ExitCode::FAILURE,
            });
        }
        agent.begins(AgentStep::Rest);
        tokio::time::sleep(node.agent.every).await;
        match config() {
            Ok(read) if read.images.root == node.images.root => node = read,
            Ok(_) => tracing::warn!("images.root has changed: start the agent again"),
            Err(error) => tracing::warn!("going on with the configuration as it was: {error:#}"),
        }
    }
}
