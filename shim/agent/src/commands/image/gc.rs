//! `rekindle image gc`: makes room, by the rules of `[images.retention]`.

use std::{
    process::ExitCode,
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use rekindle_checkpoint::{
    ImageStore,
    image::{Evicted, Leftovers, Place},
    retention::{Held, Plan, Reason, demotions, plan},
};
use rekindle_core::{
    config::{NodeConfig, Retention},
    duration,
    name::Namespace,
    size,
};
use serde_json::{Value, json};

use crate::output;

#[derive(Debug, clap::Args)]
pub(super) struct GcArgs {
    /// A bucket that [[images.tier]] names, s3://BUCKET/PREFIX/ [default: this node's images].
    #[arg(value_name = "PLACE", conflicts_with_all = ["idle", "quota"])]
    pub(super) place: Option<super::oci::Place>,
    /// Say what would be removed, and remove nothing.
    #[arg(long)]
    pub(super) dry_run: bool,
    /// Print one JSON object.
    #[arg(long)]
    pub(super) json: bool,
    /// Keep so many generations of each name, at least 1 [default: images.retention.keep; of a
    /// bucket all].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..))]
    pub(super) keep: Option<u32>,
    /// Remove what no container was started from for this long (90s, 5m, 72h), but for the newest generation of a
    /// name [default: images.retention.idle].
    #[arg(long, value_name = "DURATION", value_parser = duration::parse)]
    idle: Option<Duration>,
    /// What all images may take on the disk (200GiB); with -n, those of that namespace [default:
    /// images.retention.quota, or what leaves a fifth of the disk free; with -n images.retention.namespace-quota].
    #[arg(long, value_name = "SIZE", value_parser = size::parse)]
    quota: Option<u64>,
    /// Look at the images of this namespace only.
    #[arg(short, long, value_name = "NS")]
    pub(super) namespace: Option<Namespace>,
    /// Of a bucket: remove tags of images that were made longer ago (720h), but for the newest one of each name.
    #[arg(long, value_name = "DURATION", value_parser = duration::parse, requires = "place")]
    pub(super) older_than: Option<Duration>,
    /// Of a bucket: how long blobs stay that no tag needs any more.
    #[arg(long, value_name = "DURATION", value_parser = duration::parse, default_value = "24h", requires = "place")]
    pub(super) grace: Duration,
}

impl GcArgs {
    /// The node's rules, with what was typed in their place.
    fn policy(&self, node: Retention) -> Retention {
        let (quota, namespace_quota) = match self.namespace {
            Some(_) => (None, self.quota.or(node.namespace_quota)),
            None => (self.quota.or(node.quota), node.namespace_quota),
        };
        Retention {
            keep: self.keep.or(node.keep),
            idle: self.idle.or(node.idle),
            quota,
            namespace_quota,
            ..node
        }
    }
}

/// One image that the plan removes, and what became of it.
struct Outcome<'a> {
    place: Place,
    image: &'a Held,
    reason: Reason,
    evicted: Evicted,
}

pub(super) fn run(
    store: &ImageStore,
    config: &NodeConfig,
    args: &GcArgs,
) -> anyhow::Result<ExitCode> {
    let leftovers = store.leftovers(!args.dry_run)?;
    let images = store.inventory(args.namespace.as_ref())?;
    // Of one namespace's images nobody can say whether all of them fit.
    let disk = match args.namespace {
        Some(_) => None,
        None => Some(store.disk()?),
    };
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    let policy = args.policy(config.images.retention);
    let plan = plan(&images, &policy, disk, now.as_secs());
    let mut outcomes = Vec::new();
    for removal in &plan.removals {
        let image = &images[removal.image];
        let evicted = match args.dry_run {
            true => Evicted::Freed(removal.frees),
            false => store.evict(image)?,
        };
        outcomes.push(Outcome {
            place: Place::Disk,
            image,
            reason: removal.reason,
            evicted,
        });
    }
    let in_memory = match &config.images.memory {
        Some(memory) => demotions(&images, memory, now.as_secs(), |_| false).removals,
        None => Vec::new(),
    };
    for removal in &in_memory {
        let image = &images[removal.image];
        // One that goes from the node has left memory too.
        if plan.removals.iter().any(|gone| gone.image == removal.image) {
            continue;
        }
        let evicted = match args.dry_run {
            true => Evicted::Freed(removal.frees),
            false => store.demote(image)?,
        };
        outcomes.push(Outcome {
            place: Place::Memory,
            image,
            reason: removal.reason,
            evicted,
        });
    }
    if !args.json {
        for outcome in &outcomes {
            output::line(sentence(outcome, args.dry_run));
        }
    }
    match args.json {
        true => output::json(&report(args, &plan, &outcomes, leftovers))?,
        false => summary(args, &plan, &outcomes, leftovers),
    }
    Ok(ExitCode::SUCCESS)
}

fn reference(image: &Held) -> String {
    format!("{}/{}@{}", image.namespace, image.name, image.generation)
}

fn sentence(outcome: &Outcome<'_>, dry_run: bool) -> String {
    let image = match outcome.place {
        Place::Disk => reference(outcome.image),
        Place::Memory => format!("{} from memory", reference(outcome.image)),
    };
    let why = match outcome.reason {
        Reason::Keep { keep: 1 } => "there is a newer generation".to_owned(),
        Reason::Keep { keep } => format!("there are {keep} newer generations"),
        Reason::Idle { seconds } => format!("not used for {}", super::span(seconds)),
        Reason::NamespaceQuota { quota } => format!(
            "namespace {} has more than {}",
            outcome.image.namespace,
            output::bytes(quota)
        ),
        Reason::Quota { quota } => format!("all images have more than {}", output::bytes(quota)),
    };
    match outcome.evicted {
        Evicted::Freed(bytes) if dry_run => {
            format!("would remove {image}: {why}; {} free", output::bytes(bytes))
        }
        Evicted::Freed(bytes) => format!("removed {image}: {why}; {} freed", output::bytes(bytes)),
        Evicted::Used => format!("kept {image}: a container started from it meanwhile"),
        Evicted::Gone => format!("{image} is gone already"),
    }
}

/// Bytes that came free on the disk.
fn freed(outcomes: &[Outcome<'_>], leftovers: Leftovers) -> u64 {
    leftovers.bytes + freed_in(Place::Disk, outcomes)
}

fn freed_in(place: Place, outcomes: &[Outcome<'_>]) -> u64 {
    let there = outcomes.iter().filter(|outcome| outcome.place == place);
    let images = there.map(|outcome| match outcome.evicted {
        Evicted::Freed(bytes) => bytes,
        Evicted::Used | Evicted::Gone => 0,
    });
    images.sum()
}

fn summary(args: &GcArgs, plan: &Plan, outcomes: &[Outcome<'_>], leftovers: Leftovers) {
    let (removed, freed_word) = match args.dry_run {
        true => ("would remove", "would be free"),
        false => ("removed", "freed"),
    };
    if leftovers.folders > 0 {
        output::line(format!(
            "{removed} {} folders that killed checkpoints, restores or removals left; {} {freed_word}",
            leftovers.folders,
            output::bytes(leftovers.bytes)
        ));
    }
    let freed = freed(outcomes, leftovers);
    output::line(format!("{} {freed_word}", output::bytes(freed)));
    let memory = freed_in(Place::Memory, outcomes);
    if memory > 0 {
        output::line(format!("{} of memory {freed_word}", output::bytes(memory)));
    }
    if plan.over() > 0 {
        output::line(format!(
            "{} more than the quota of {} stay: containers use them, or something else has links to them",
            output::bytes(plan.over()),
            output::bytes(plan.quota.unwrap_or(0))
        ));
    }
}

fn report(args: &GcArgs, plan: &Plan, outcomes: &[Outcome<'_>], leftovers: Leftovers) -> Value {
    let rows = outcomes.iter().map(|outcome| {
        let (result, bytes) = match outcome.evicted {
            Evicted::Freed(bytes) => ("removed", bytes),
            Evicted::Used => ("used-meanwhile", 0),
            Evicted::Gone => ("gone", 0),
        };
        json!({
            "namespace": outcome.image.namespace,
            "name": outcome.image.name,
            "generation": outcome.image.generation,
            "place": outcome.place.to_string(),
            "last_used": outcome.image.last_used,
            "why": outcome.reason,
            "result": result,
            "freed": bytes,
        })
    });
    json!({
        "dry_run": args.dry_run,
        "images": rows.collect::<Vec<_>>(),
        "leftovers": {"folders": leftovers.folders, "freed": leftovers.bytes},
        "freed": freed(outcomes, leftovers),
        "memory_freed": freed_in(Place::Memory, outcomes),
        "before": plan.before,
        "after": plan.after,
        "quota": plan.quota,
        "over": plan.over(),
    })
}
