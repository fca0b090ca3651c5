//! A pod's datasets, and the image that it starts from: fetched by `rekindle prefetch` and `rekindle image fetch`, waited
//! for where the kubelet has time.
//!
//! The shim links no network client. It starts one such program for each thing that is wanted, reads its
//! lines, and shares the outcome among the pod's containers: the sandbox's create waits long, a
//! container's only for what is left.

use std::{
    collections::HashMap,
    fmt, io,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use rekindle_checkpoint::{ImageError, ImageStore};
use rekindle_core::{
    annotations::{DatasetRequest, Policy},
    config::{Deadlines, NodeConfig},
    identity::Role,
    name::{ImageName, Namespace},
    paths,
    plan::{Plan, RestorePlan},
    uri::DatasetUri,
};
use rekindle_dataset::{Cache, Lock};
use serde::Deserialize;
use tokio::{
    io::{AsyncBufReadExt, BufReader},
    net::unix::pipe,
    sync::watch,
};

use crate::{error::Error, error::sentence, exits::Exits, threads::blocking};

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
    fn args(&self, namespace: &Namespace) -> Vec<String> {
        let (command, what): (&[&str], _) = match self {
            Self::Dataset(uri) => (&["prefetch"], uri.to_string()),
            Self::Image(name) => (&["image", "fetch"], name.to_string()),
        };
        let more = ["--json", "--namespace", namespace.as_str()];
        let words = command.iter().chain(&more).map(|word| (*word).to_owned());
        words.chain([what]).collect()
    }

    /// That its program ended and said nothing.
    fn without_a_word(&self, status: impl fmt::Display) -> String {
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
    fn nothing_yet(&self) -> &'static str {
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

/// A dataset that a container mounts, leased for as long as this lives.
#[derive(Debug)]
pub(crate) struct DatasetMount {
    pub(crate) source: PathBuf,
    pub(crate) destination: String,
    _lease: Lock,
}

/// What a download is at.
#[derive(Debug, Clone, Default)]
enum Progress {
    #[default]
    Listing,
    Moving {
        done: u64,
        total: u64,
        per_second: f64,
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
    Ready {
        path: Option<PathBuf>,
    },
    Failed {
        reason: String,
    },
    #[serde(other)]
    Other,
}

/// By who asked for what: a namespace's permission is no other's.
type Running = HashMap<(Namespace, Wanted), watch::Receiver<Progress>>;

/// The downloads of one pod.
#[derive(Debug, Clone)]
pub(crate) struct Data {
    exits: Exits,
    running: Arc<Mutex<Running>>,
}

impl Data {
    pub(crate) fn new(exits: Exits) -> Self {
        Self {
            exits,
            running: Arc::default(),
        }
    }

    /// Waits until the plan's datasets are there, as long as this container's place in the pod allows.
    pub(crate) async fn ready(
        &self,
        plan: &Plan,
        node: &NodeConfig,
    ) -> Result<Vec<DatasetMount>, Error> {
        let (began, role) = (Instant::now(), plan.identity.role);
        // All at once; then one after the other is waited for.
        let downloads: Vec<_> = plan
            .datasets
            .iter()
            .map(|dataset| {
                let wanted = Wanted::Dataset(dataset.uri.clone());
                (dataset, self.download(wanted, &plan.identity.namespace))
            })
            .collect();
        let image = match &plan.ahead {
            Some(ahead) => self.ahead(ahead, node).await,
            None => None,
        };
        let mut mounts = Vec::new();
        for (dataset, download) in downloads {
            let waited = match download {
                Ok(download) => {
                    let limit = limit(role, dataset.policy, node.deadlines);
                    wait(download, role, node.deadlines, (began, limit)).await
                }
                Err(error) => Err(error),
            };
            // A sandbox fetches; its containers mount.
            let mounted = match waited {
                Ok(Ready::All(Some(path))) if role != Role::Sandbox => {
                    match mount(dataset, path, node).await {
                        Ok(Some(mount)) => Ok(Some(mount)),
                        // Removed since the pod's sandbox fetched it: it is fetched again.
                        Ok(None) => self.fetch_again(dataset, plan, node, began).await.map(Some),
                        Err(error) => Err(error),
                    }
                }
                other => other.map(|_| None),
            };
            match mounted {
                Ok(mount) => mounts.extend(mount),
                Err(error) if dataset.policy == Policy::Opportunistic => {
                    tracing::warn!(%error, "going on without it: its policy is Opportunistic");
                }
                Err(error) => return Err(error.into()),
            }
        }
        if let Some((ahead, download)) = image {
            self.settle(ahead, download, node.deadlines, began).await?;
        }
        Ok(mounts)
    }

    /// Begins to fetch the image that a container of the pod will start from, where it is not on the node.
    async fn ahead<'a>(
        &self,
        ahead: &'a RestorePlan,
        node: &NodeConfig,
    ) -> Option<(&'a RestorePlan, Download)> {
        if !in_a_tier(ahead, node) {
            return None;
        }
        let (root, of) = (node.images.root.clone(), ahead.clone());
        let here = blocking(move || {
            let store = ImageStore::open(&root)?;
            store.resolve(&of.namespace, &of.name, None).map(drop)
        });
        if !matches!(here.await, Ok(Err(ImageError::Unknown(_)))) {
            return None;
        }
        match self.download(Wanted::Image(ahead.name.clone()), &ahead.namespace) {
            Ok(download) => Some((ahead, download)),
            Err(error) => {
                tracing::warn!(%error, "the image is not fetched ahead");
                None
            }
        }
    }

    /// Waits as long as a sandbox can. That there is no image in the end is told by the container that wants it.
    async fn settle(
        &self,
        ahead: &RestorePlan,
        download: Download,
        deadlines: Deadlines,
        began: Instant,
    ) -> Result<(), DataError> {
        let limit = limit(Role::Sandbox, ahead.policy, deadlines);
        match wait(download, Role::Sandbox, deadlines, (began, limit)).await {
            Err(error @ DataError::NotYet { .. }) if ahead.policy == Policy::Required => Err(error),
            Err(error) => {
                tracing::warn!(%error, "the image was not fetched ahead");
                Ok(())
            }
            Ok(_) => Ok(()),
        }
    }

    /// Fetches an image that is not on the node, where its namespace has a tier; false where it has none. `until` is when
    /// whoever waits has to know.
    pub(crate) async fn image(
        &self,
        plan: &RestorePlan,
        node: &NodeConfig,
        until: Instant,
    ) -> Result<bool, Error> {
        if !in_a_tier(plan, node) {
            return Ok(false);
        }
        let download = self.download(Wanted::Image(plan.name.clone()), &plan.namespace)?;
        let began = Instant::now();
        let limit = until.saturating_duration_since(began);
        wait(download, Role::Container, node.deadlines, (began, limit)).await?;
        Ok(true)
    }

    async fn fetch_again(
        &self,
        dataset: &DatasetRequest,
        plan: &Plan,
        node: &NodeConfig,
        began: Instant,
    ) -> Result<DatasetMount, DataError> {
        let namespace = &plan.identity.namespace;
        self.running
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .remove(&(namespace.clone(), Wanted::Dataset(dataset.uri.clone())));
        let wanted = Wanted::Dataset(dataset.uri.clone());
        let download = self.download(wanted.clone(), namespace)?;
        let failed = |reason: &str| DataError::Failed {
            wanted: wanted.clone(),
            reason: reason.to_owned(),
        };
        let role = plan.identity.role;
        let limit = limit(role, dataset.policy, node.deadlines);
        let Ready::All(Some(path)) = wait(download, role, node.deadlines, (began, limit)).await?
        else {
            return Err(failed("it is not complete"));
        };
        mount(dataset, path, node)
            .await?
            .ok_or_else(|| failed("it was removed from the node twice while it was waited for"))
    }

    /// Joins this pod's download of something, or starts it; one that failed is started anew.
    fn download(&self, wanted: Wanted, namespace: &Namespace) -> Result<Download, DataError> {
        let key = (namespace.clone(), wanted.clone());
        let mut running = self.running.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(download) = running.get(&key)
            && !matches!(*download.borrow(), Progress::Failed(_))
        {
            let progress = download.clone();
            return Ok(Download { wanted, progress });
        }
        let program = program();
        let start = |e: io::Error| DataError::Start {
            wanted: wanted.clone(),
            program: program.clone(),
            reason: e.to_string(),
        };
        let (lines, stdout) =
            nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC).map_err(|e| start(e.into()))?;
        nix::fcntl::fcntl(
            &lines,
            nix::fcntl::FcntlArg::F_SETFL(nix::fcntl::OFlag::O_NONBLOCK),
        )
        .map_err(|e| start(e.into()))?;
        #[allow(clippy::disallowed_methods, reason = "the launch of the downloader")]
        let mut command = Command::new(&program);
        let args = wanted.args(namespace);
        command
            .args(&args)
            .stdin(Stdio::null())
            .stdout(stdout)
            .stderr(Stdio::null())
            .current_dir("/");
        let child = self.exits.spawn(&mut command).map_err(start)?;
        drop(command); // its copy of the pipe's other end
        let (sender, receiver) = watch::channel(Progress::default());
        let lines = pipe::Receiver::from_owned_fd(lines).map_err(start)?;
        let what = wanted.clone();
        tokio::spawn(async move {
            follow(lines, &sender).await;
            let exit = child.exit.await;
            sender.send_if_modified(|progress| {
                let silent = !matches!(progress, Progress::Ready(_) | Progress::Failed(_));
                if silent {
                    *progress = Progress::Failed(what.without_a_word(exit.status));
                }
                silent
            });
        });
        running.insert(key, receiver.clone());
        Ok(Download {
            wanted,
            progress: receiver,
        })
    }
}

/// Whether an image that is not on the node may be elsewhere. A generation's number is a node's own: nowhere else is that
/// image meant.
fn in_a_tier(plan: &RestorePlan, node: &NodeConfig) -> bool {
    plan.generation.is_none() && node.tier_for(&plan.namespace).is_some()
}

/// How long a container, by its place in the pod, waits for what it wants.
fn limit(role: Role, policy: Policy, deadlines: Deadlines) -> Duration {
    match (role, policy) {
        (Role::Container, Policy::Required) => deadlines.container,
        // It starts without it, and has to have the time for that.
        (Role::Container, Policy::Opportunistic) => {
            deadlines.container.saturating_sub(deadlines.cold_start())
        }
        // Nobody else waits for a standalone container, so it may wait as long as a sandbox.
        (Role::Sandbox | Role::Standalone, _) => deadlines.sandbox_data,
    }
}

/// A download that goes on, whoever waits for it.
#[derive(Debug)]
struct Download {
    wanted: Wanted,
    progress: watch::Receiver<Progress>,
}

/// How far a download came that was waited for.
#[derive(Debug)]
enum Ready {
    /// It is there; a dataset, with its folder.
    All(Option<PathBuf>),
    /// Not yet, and a container of the pod will wait for the rest.
    Soon,
}

/// Leases what a download has published, so that it stays until the container is gone; none when it has
/// been removed since.
async fn mount(
    dataset: &DatasetRequest,
    path: PathBuf,
    node: &NodeConfig,
) -> Result<Option<DatasetMount>, DataError> {
    let failed = |reason: String| DataError::Failed {
        wanted: Wanted::Dataset(dataset.uri.clone()),
        reason,
    };
    let (cache, source) = (Cache::open(&node.datasets), path.clone());
    let leased = blocking(move || match cache.at(&source)? {
        Some(info) => cache.lease(&info),
        None => Ok(None),
    });
    let lease = leased
        .await
        .map_err(|e| failed(e.to_string()))?
        .map_err(|e| failed(sentence(&e)))?;
    Ok(lease.map(|lease| DatasetMount {
        source: path,
        destination: dataset.mount.clone(),
        _lease: lease,
    }))
}

async fn follow(lines: pipe::Receiver, progress: &watch::Sender<Progress>) {
    let mut lines = BufReader::new(lines).lines();
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
                });
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
async fn wait(
    download: Download,
    role: Role,
    deadlines: Deadlines,
    (began, limit): (Instant, Duration),
) -> Result<Ready, DataError> {
    let Download {
        wanted,
        mut progress,
    } = download;
    loop {
        let now = progress.borrow_and_update().clone();
        match now {
            Progress::Ready(path) => return Ok(Ready::All(path)),
            Progress::Failed(reason) => return Err(DataError::Failed { wanted, reason }),
            // Half of a container's budget: the rate may fall, and the restore needs its share.
            Progress::Moving {
                done,
                total,
                per_second,
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

/// The CLI: beside the shim's own binary, where an installation puts both, else at its fixed place.
pub(crate) fn program() -> PathBuf {
    let beside = std::env::current_exe()
        .ok()
        .and_then(|exe| Some(exe.parent()?.join("rekindle")));
    beside
        .filter(|path| path.exists())
        .unwrap_or_else(|| Path::new(paths::CLI_BINARY).to_owned())
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
