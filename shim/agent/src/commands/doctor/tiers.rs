//! The tiers of images: whether each can be asked for an image.

use std::time::Duration;

use rekindle_core::{
    config::{NodeConfig, Tier},
    name::{ImageName, Namespace},
    uri::ImagePlace,
};
use rekindle_store::s3::Tuning;

use super::{Check, checks::PATIENCE};
use crate::tier;

const NAME: &str = "image tier";

pub(super) async fn check(config: &NodeConfig, tier: &Tier) -> Check {
    let (config, of) = (config.clone(), tier.clone());
    let asking = tokio::task::spawn_blocking(move || ask(&config, &of));
    let url = &tier.url;
    match tokio::time::timeout(PATIENCE, asking).await {
        Ok(Ok(Ok(()))) => Check::passed(
            NAME,
            format!("{url} answers, for {}", tier.namespaces.join(", ")),
        ),
        Ok(Ok(Err(error))) => failed(format!("{error:#}")),
        Ok(Err(panic)) => failed(panic.to_string()),
        Err(_) => failed(format!(
            "{url} did not answer within {}s",
            PATIENCE.as_secs()
        )),
    }
}

fn failed(found: String) -> Check {
    Check::failed(
        NAME,
        found,
        "look at the way to it, its credentials and its rights; until then images that are not on this node are missed",
    )
}

/// Asks for an image that nobody has, as a start on this node would.
fn ask(config: &NodeConfig, tier: &Tier) -> anyhow::Result<()> {
    let place: ImagePlace = tier.url.parse()?;
    let namespace = tier.namespaces.iter().find_map(|name| name.parse().ok());
    let namespace: Namespace = match namespace {
        Some(namespace) => namespace,
        None => "default".parse()?,
    };
    let name: ImageName = "rekindle-doctor".parse()?;
    let tuning = Tuning {
        attempts: 1,
        // A thread that blocks cannot be given up: it has to end before the check does.
        stall: PATIENCE.saturating_sub(Duration::from_secs(2)),
        ..Tuning::default()
    };
    let layout = tier::open(config, tier, &place, tuning)?;
    layout.newest(&namespace, &name)?;
    Ok(())
}
