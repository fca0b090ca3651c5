//! Programs that fetch: what they say of their progress, and who waits for it how long.

use std::{
    fmt,
    path::PathBuf,
    time::{Duration, Instant},
};

use rekindle_core::{
    config::Deadlines,
    identity::Role,
    name::{ImageName, Namespace},
    uri::DatasetUri,
};
use serde::Deserialize;
use tokio::{
    io::{AsyncBufReadExt, BufReader},
    net::unix::pipe,
    sync::watch,
};

/// Why a container has no data.
#[derive(Debug, Clone, thiserror::Error)]
pub(crate) enum DataError {
    #[error("{wanted}: {reason}")]
    Failed { wanted: Wanted, reason: String },
    #[error("{wanted}: {done} after {} s; the download goes on and the next attempt joins it", waited.as_secs())]
    NotYet {
        wanted: Wanted,
        done: String,
        waited: Duration,
    },
    #[error("{wanted}: starting {program}: {reason}; install rekindle beside the shim", program = program.display())]
    Start {
        wanted: Wanted,
        program: PathBuf,
        reason: String,
    },
}

/// What is fetched.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) enum Wanted {
    Dataset(DatasetUri),
    Image(ImageName),
}

impl Wanted {
    /// The program that fetches it for a namespace.
    pub(super) fn args(&self, namespace: &Namespace) -> Vec<String> {
        let (command, what): (&[&str], _) = match self {
            Self::Dataset(uri) => (&["prefetch"], uri.to_string()),
            Self::Image(name) => (&["image", "fetch"], name.to_string()),
        };
        let more = ["--json", "--namespace", namespace.as_str()];
        let words = command.iter().chain(&more).map(|word| (*word).to_owned());
        words.chain([what]).collect()
    }

    /// That its program ended and said nothing.
    pub(super) fn without_a_word(&self, status: impl fmt::Display) -> String {
        match self {
            Self::Dataset(_) => {
                format!("rekindle prefetch ended with status {status} and no reason")
            }
            Self::Image(_) => {
                format!("rekindle image fetch ended with status {status} and no reason")
            }
        }
    }

    /// What is known before the first byte.
    pub(super) fn nothing_yet(&self) -> &'static str {
        match self {
            Self::Dataset(_) => "the source has not answered the listing",
            Self::Image(_) => "its tier has not answered",
        }
    }
}

impl fmt::Display for Wanted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Dataset(uri) => write!(f, "dataset {uri}"),
            Self::Image(name) => write!(f, "image {name}"),
        }
    }
}

/// What a download is at.
#[derive(Debug, Clone, Default)]
pub(super) enum Progress {
    #[default]
    Listing,
    /// An image has what a restore with a pager needs to begin.
    Begun,
    Moving {
        done: u64,
        total: u64,
        per_second: f64,
        begun: bool,
    },
    /// Where a dataset is; an image is found by its name.
    Ready(Option<PathBuf>),
    Failed(String),
}

/// One line of `rekindle prefetch --json` and of `rekindle image fetch --json`.
#[derive(Debug, Deserialize)]
#[serde(tag = "event", rename_all = "lowercase")]
enum Line {
    Progress {
        done: u64,
        total: u64,
        #[serde(default)]
        bytes_per_second: f64,
    },
    Begun,
    Ready {
        path: Option<PathBuf>,
    },
    Failed {
        reason: String,
    },
    #[serde(other)]
    Other,
}

/// A download that goes on, whoever waits for it.
#[derive(Debug)]
pub(super) struct Download {
    pub(super) wanted: Wanted,
    pub(super) progress: watch::Receiver<Progress>,
    /// Whether it is enough that it has begun: the rest of an image comes while its container runs.
    pub(super) lazily: bool,
}

/// How far a download came that was waited for.
#[derive(Debug)]
pub(super) enum Ready {
    /// It is there; a dataset, with its folder.
    All(Option<PathBuf>),
    /// As much of an image is there as a restore with a pager needs to begin.
    Begun,
    /// Not yet, and a container of the pod will wait for the rest.
    Soon,
}

pub(super) async fn follow(lines: pipe::Receiver, progress: &watch::Sender<Progress>) {
    let mut lines = BufReader::new(lines).lines();
    let mut begun = false;
    while let Ok(Some(line)) = lines.next_line().await {
        match serde_json::from_str(&line) {
            Ok(Line::Progress {
                done,
                total,
                bytes_per_second,
            }) => {
                progress.send_replace(Progress::Moving {
                    done,
                    total,
                    per_second: bytes_per_second,
                    begun,
                });
            }
            Ok(Line::Begun) => {
                begun = true;
                progress.send_replace(Progress::Begun);
            }
            Ok(Line::Ready { path }) => {
                progress.send_replace(Progress::Ready(path));
            }
            Ok(Line::Failed { reason }) => {
                progress.send_replace(Progress::Failed(reason));
            }
            Ok(Line::Other) => {}
            Err(error) => {
                tracing::warn!(%error, line, "a line of a download is not understood")
            }
        }
    }
}

/// Waits for one download, for `limit` from `began` on.
pub(super) async fn wait(
    download: Download,
    role: Role,
    deadlines: Deadlines,
    (began, limit): (Instant, Duration),
) -> Result<Ready, DataError> {
    let Download {
        wanted,
        mut progress,
        lazily,
    } = download;
    loop {
        let now = progress.borrow_and_update().clone();
        match now {
            Progress::Ready(path) => return Ok(Ready::All(path)),
            Progress::Failed(reason) => return Err(DataError::Failed { wanted, reason }),
            Progress::Begun | Progress::Moving { begun: true, .. } if lazily => {
                return Ok(Ready::Begun);
            }
            // Half of a container's budget: the rate may fall, and the restore needs its share.
            Progress::Moving {
                done,
                total,
                per_second,
                ..
            } if role == Role::Sandbox
                && fits(total - done.min(total), per_second, deadlines.container / 2) =>
            {
                return Ok(Ready::Soon);
            }
            _ => {}
        }
        let left = limit.saturating_sub(began.elapsed());
        if tokio::time::timeout(left, progress.changed())
            .await
            .is_err()
        {
            let done = match &*progress.borrow() {
                Progress::Moving { done, total, .. } => format!("{done} of {total} bytes are here"),
                _ => wanted.nothing_yet().to_owned(),
            };
            return Err(DataError::NotYet {
                wanted,
                done,
                waited: began.elapsed(),
            });
        }
    }
}

/// Whether `left` bytes arrive within `budget` at the present rate.
fn fits(left: u64, per_second: f64, budget: Duration) -> bool {
    per_second > 0.0 && (left as f64) / per_second < budget.as_secs_f64()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sandbox_lets_go_when_the_rest_fits_the_containers_budget() {
        let budget = Duration::from_secs(45);
        assert!(fits(40_000, 1_000.0, budget));
        assert!(!fits(50_000, 1_000.0, budget));
        assert!(!fits(1, 0.0, budget));
    }

    #[test]
    fn the_lines_of_a_download_are_understood() {
        let parse = |line: &str| serde_json::from_str::<Line>(line).unwrap();
        assert!(matches!(parse(r#"{"event":"listing"}"#), Line::Other));
        let begun = r#"{"event":"begun","image":"team-a/warm@1"}"#;
        assert!(matches!(parse(begun), Line::Begun));
        assert!(matches!(
            parse(r#"{"event":"progress","done":1,"total":2,"files_done":0,"files_total":1}"#),
            Line::Progress {
                done: 1,
                total: 2,
                ..
            }
        ));
        assert!(matches!(
            parse(r#"{"event":"ready","path":"/x","hit":true}"#),
            Line::Ready { path: Some(_) }
        ));
        assert!(matches!(
            parse(r#"{"event":"ready","image":"team-a/warm@1","hit":false}"#),
            Line::Ready { path: None }
        ));
        assert!(matches!(
            parse(r#"{"event":"failed","reason":"403","retryable":false}"#),
            Line::Failed { .. }
        ));
    }
}
