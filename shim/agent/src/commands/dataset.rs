//! `rekindle dataset`: what is on this node.

use std::{process::ExitCode, time::SystemTime};

use anyhow::Context as _;
use clap::Subcommand;
use rekindle_core::config::NodeConfig;
use rekindle_dataset::{Cache, DatasetError, DatasetInfo, Verification};
use serde_json::json;

use crate::{exit::Failure, output};

/// Hex digits of a version that are shown, and enough to name it.
const SHORT: usize = 12;

#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  rekindle dataset ls
  rekindle dataset verify s3://models/all-minilm-l6-v2/
  rekindle dataset rm 3f9c01d2a4b7")]
pub(crate) struct DatasetArgs {
    #[command(subcommand)]
    command: DatasetCommand,
}

#[derive(Debug, Subcommand)]
enum DatasetCommand {
    /// List this node's datasets.
    Ls {
        /// One JSON array on stdout.
        #[arg(long)]
        json: bool,
    },
    /// Read every file again and compare it with the manifest.
    Verify {
        /// URIs, or the first digits of versions (at least 6); none means all.
        #[arg(value_name = "DATASET")]
        which: Vec<String>,
    },
    /// Remove datasets that no container uses.
    Rm {
        /// URIs (all their versions), or the first digits of versions (at least 6).
        #[arg(value_name = "DATASET", required = true)]
        which: Vec<String>,
    },
}

pub(crate) async fn run(args: DatasetArgs, config: &NodeConfig) -> anyhow::Result<ExitCode> {
    let cache = Cache::open(&config.datasets);
    // Reads whole datasets, and blocks; nothing else runs in this process.
    tokio::task::block_in_place(|| match args.command {
        DatasetCommand::Ls { json } => ls(&cache, json),
        DatasetCommand::Verify { which } => verify(&cache, &which),
        DatasetCommand::Rm { which } => rm(&cache, &which),
    })
}

fn ls(cache: &Cache, json: bool) -> anyhow::Result<ExitCode> {
    let found = cache.list()?;
    if json {
        let rows: Vec<_> = found.iter().map(row).collect();
        output::json(&rows)?;
        return Ok(ExitCode::SUCCESS);
    }
    if found.is_empty() {
        output::line("no datasets on this node");
        return Ok(ExitCode::SUCCESS);
    }
    let mut table = vec![["URI", "VERSION", "SIZE", "FILES", "VERIFIED", "AGE"].map(str::to_owned)];
    table.extend(found.iter().map(|info| {
        [
            info.uri.clone(),
            short(info).to_owned(),
            output::bytes(info.bytes),
            info.files.to_string(),
            verified(info.verified),
            age(info.published),
        ]
    }));
    for cells in &table {
        let mut text = String::new();
        for (column, cell) in cells.iter().enumerate() {
            let width = table.iter().map(|row| row[column].chars().count()).max();
            text.push_str(&format!("{cell:<width$}  ", width = width.unwrap_or(0)));
        }
        output::line(text.trim_end());
    }
    Ok(ExitCode::SUCCESS)
}

fn row(info: &DatasetInfo) -> serde_json::Value {
    let published = info.published.duration_since(SystemTime::UNIX_EPOCH);
    json!({
        "uri": info.uri,
        "endpoint": info.endpoint,
        "version": info.version,
        "path": info.path,
        "bytes": info.bytes,
        "files": info.files,
        "verified": info.verified,
        "published": published.map_or(0, |since| since.as_secs()),
    })
}

fn verify(cache: &Cache, which: &[String]) -> anyhow::Result<ExitCode> {
    let mut sound = true;
    for info in select(cache, which)? {
        let spinner = output::spinner(&format!("reading {}", info.uri));
        let damaged = cache.verify(&info, |_| {})?;
        spinner.finish_and_clear();
        for damage in &damaged {
            output::line(format!("{}: {}: {}", info.uri, damage.path, damage.found));
        }
        sound &= damaged.is_empty();
        let verdict = match damaged.len() {
            0 => "sound".to_owned(),
            n => format!(
                "{n} files damaged: remove it with `rekindle dataset rm {}`",
                short(&info)
            ),
        };
        output::line(format!("{} {}: {verdict}", info.uri, short(&info)));
    }
    Ok(if sound {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}

fn rm(cache: &Cache, which: &[String]) -> anyhow::Result<ExitCode> {
    for info in select(cache, which)? {
        match cache.remove(&info) {
            Ok(()) => output::line(format!("removed {} {}", info.uri, short(&info))),
            Err(error @ DatasetError::InUse { .. }) => {
                return Err(Failure::Refused(error.to_string()).into());
            }
            Err(error) => return Err(error).context(format!("cannot remove {}", info.uri)),
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// The datasets that were named; all when none was.
fn select(cache: &Cache, which: &[String]) -> anyhow::Result<Vec<DatasetInfo>> {
    let all = cache.list()?;
    if which.is_empty() {
        return Ok(all);
    }
    let named = |info: &DatasetInfo, name: &String| {
        info.uri == *name || (name.len() >= 6 && info.version.as_str().starts_with(name.as_str()))
    };
    for name in which {
        if !all.iter().any(|info| named(info, name)) {
            let reason =
                format!("no dataset {name:?} on this node: `rekindle dataset ls` shows them");
            return Err(Failure::NotFound(reason).into());
        }
    }
    Ok(all
        .into_iter()
        .filter(|info| which.iter().any(|name| named(info, name)))
        .collect())
}

fn short(info: &DatasetInfo) -> &str {
    &info.version.as_str()[..SHORT]
}

fn verified(verified: Verification) -> String {
    match verified {
        Verification::TransportOnly => "transport-only",
        Verification::EtagMd5 => "etag-md5",
        Verification::StoreChecksum => "store-checksum",
    }
    .to_owned()
}

fn age(published: SystemTime) -> String {
    let seconds = published.elapsed().map_or(0, |age| age.as_secs());
    match seconds {
        0..60 => format!("{seconds}s"),
        60..3600 => format!("{}m", seconds / 60),
        3600..172_800 => format!("{}h", seconds / 3600),
        _ => format!("{}d", seconds / 86_400),
    }
}
