//! `rekindle image rm` and `gc` of a bucket.

use std::{
    process::ExitCode,
    str::FromStr,
    time::{SystemTime, UNIX_EPOCH},
};

use rekindle_checkpoint::layout::{Collected, Layout, Rules, expired, tag_tells};
use rekindle_core::{
    config::NodeConfig,
    name::{ImageRef, Namespace},
    uri::ImagePlace,
};
use serde_json::json;

use super::{
    gc::GcArgs,
    oci::{At, Place},
};
use crate::{exit::Failure, output, tier};

/// What is to be removed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Doomed {
    /// An image on this node.
    Image(ImageRef),
    /// A tag elsewhere.
    Tag(Place),
}

impl FromStr for Doomed {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        if text.contains("://") || text.starts_with("oci:") {
            return text.parse().map(Self::Tag);
        }
        text.parse()
            .map(Self::Image)
            .map_err(|e: <ImageRef as FromStr>::Err| e.to_string())
    }
}

/// The bucket of a place.
fn bucket(place: &Place) -> Result<&ImagePlace, Failure> {
    match &place.at {
        At::Away(uri @ ImagePlace::Bucket { .. }) => Ok(uri),
        At::Away(uri @ ImagePlace::Registry(_)) => {
            let reason = format!("{uri} is a registry: it removes tags and blobs by its own rules");
            Err(Failure::Refused(reason))
        }
        At::Folder(folder) => {
            let reason = format!(
                "{} is a folder: remove it, or what of it no tag of index.json needs",
                folder.display()
            );
            Err(Failure::Refused(reason))
        }
    }
}

pub(super) fn rm(
    config: &NodeConfig,
    place: &Place,
    namespace: Option<&Namespace>,
    json: bool,
) -> anyhow::Result<ExitCode> {
    let uri = bucket(place)?;
    let Some(wanted) = &place.tag else {
        let reason = format!("{uri} names no tag: `rekindle image ls {uri}` shows them");
        return Err(Failure::Refused(reason).into());
    };
    let whose = tag_tells(wanted).map(|told| told.namespace);
    if let (Some(whose), Some(namespace)) = (&whose, namespace)
        && whose != namespace
    {
        let reason = format!("{wanted} is of namespace {whose}, and --namespace is {namespace}");
        return Err(Failure::Refused(reason).into());
    }
    let layout = tier::at(config, uri, whose.as_ref().or(namespace))?;
    let all = layout.all_tags()?;
    let of_name = format!("{wanted}@");
    let found: Vec<&String> = match all.iter().find(|tag| *tag == wanted) {
        Some(tag) => vec![tag],
        None => all.iter().filter(|tag| tag.starts_with(&of_name)).collect(),
    };
    if found.is_empty() {
        let reason = format!("{uri} has no tag {wanted} (`rekindle image ls {uri}` shows them)");
        return Err(Failure::NotFound(reason).into());
    }
    let mut removed = Vec::new();
    for tag in found {
        if layout.remove(tag)? {
            if !json {
                output::line(format!("removed {tag} from {uri}"));
            }
            removed.push(tag);
        }
    }
    if json {
        output::json(&json!({"removed": removed}))?;
    }
    Ok(ExitCode::SUCCESS)
}

pub(super) fn gc(config: &NodeConfig, place: &Place, args: &GcArgs) -> anyhow::Result<ExitCode> {
    let uri = bucket(place)?;
    if place.tag.is_some() {
        let reason = "a bucket is tidied as a whole: leave the tag out, or `rekindle image rm` it";
        return Err(Failure::Refused(reason.to_owned()).into());
    }
    let layout = tier::at(config, uri, args.namespace.as_ref())?;
    let ours = |owner: &Namespace| match &args.namespace {
        Some(only) => only == owner,
        None => config.tier_at(uri, Some(owner)).is_some(),
    };
    let rules = Rules {
        keep: args.keep.map(|keep| keep as usize),
        older_than: args.older_than,
    };
    let now = SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .unwrap_or_default();
    let going = expired(&layout.all_tags()?, rules, ours, now.as_secs());
    if !args.dry_run {
        remove(&layout, &going)?;
    }
    let collected = layout.collect(args.grace, args.dry_run.then_some(&going[..]))?;
    if args.json {
        output::json(&json!({
            "url": uri.to_string(),
            "dry_run": args.dry_run,
            "tags": going,
            "blobs": collected.blobs,
            "freed": collected.bytes,
            "waiting": collected.waiting,
            "uploading": collected.uploading,
        }))?;
        return Ok(ExitCode::SUCCESS);
    }
    let removed = if args.dry_run {
        "would remove"
    } else {
        "removed"
    };
    for tag in &going {
        output::line(format!("{removed} {tag}"));
    }
    say(collected, removed, args);
    Ok(ExitCode::SUCCESS)
}

/// All tags first: what one needs another may need too.
fn remove(layout: &Layout, going: &[String]) -> anyhow::Result<()> {
    for tag in going {
        layout.remove(tag)?;
    }
    Ok(())
}

fn say(collected: Collected, removed: &str, args: &GcArgs) {
    let when = if args.dry_run {
        ", when --grace is over"
    } else {
        ""
    };
    output::line(format!(
        "{removed} {} blobs: {}{when}",
        collected.blobs,
        output::bytes(collected.bytes)
    ));
    if collected.uploading {
        output::line("an image is being added just now: blobs go when that is over");
    }
    if collected.waiting > 0 {
        output::line(format!(
            "{} that no tag needs stay until {} s are over (--grace)",
            output::bytes(collected.waiting),
            args.grace.as_secs()
        ));
    }
}
