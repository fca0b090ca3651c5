//! A pod's datasets: fetched by `rekindle prefetch`, waited for where the kubelet has time.
//!
//! The shim links no network client. It starts one `rekindle prefetch --json` per dataset, reads its
//! lines, and shares the outcome among the pod's containers: the sandbox's create waits long, a
//! container's only for what is left.

use std::{
    collections::HashMap,
    io,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use rekindle_core::{
    annotations::{DatasetRequest, Policy},
    config::{Deadlines, NodeConfig},
    identity::Role,
    name::Namespace,
    paths,
    plan::Plan,
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
    #[error("dataset {uri}: {reason}")]
    Failed { uri: DatasetUri, reason: String },
    #[error("dataset {uri}: {done} after {} s; the download goes on and the next attempt joins it", waited.as_secs())]
    NotYet {
        uri: DatasetUri,
        done: String,
        waited: Duration,
    },
    #[error("dataset {uri}: starting {program}: {reason}; install rekindle beside the shim", program = program.display())]
    Start {
        uri: DatasetUri,
        program: PathBuf,
        reason: String,
    },
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
    Ready(PathBuf),
    Failed(String),
}

/// One line of `rekindle prefetch --json`.
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
        path: PathBuf,
    },
    Failed {
        reason: String,
    },
    #[serde(other)]
    Other,
}

/// By who asked for what: a namespace's permission is no other's.
type Running = HashMap<(Namespace, DatasetUri), watch::Receiver<Progress>>;

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
            .map(|dataset| (dataset, self.download(dataset, &plan.identity.namespace)))
            .collect();
        let mut mounts = Vec::new();
        for (dataset, download) in downloads {
            let waited = match download {
                Ok(download) => {
                    wait(dataset, download, plan.identity.role, node.deadlines, began).await
                }
                Err(error) => Err(error),
            };
            // A sandbox fetches; its containers mount.
            let mounted = match waited {
                Ok(Some(path)) if role != Role::Sandbox => match mount(dataset, path, node).await {
                    Ok(Some(mount)) => Ok(Some(mount)),
                    // Removed since the pod's sandbox fetched it: it is fetched again.
                    Ok(None) => self.fetch_again(dataset, plan, node, began).await.map(Some),
                    Err(error) => Err(error),
                },
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
        Ok(mounts)
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
            .remove(&(namespace.clone(), dataset.uri.clone()));
        let download = self.download(dataset, namespace)?;
        let failed = |reason: &str| DataError::Failed {
            uri: dataset.uri.clone(),
            reason: reason.to_owned(),
        };
        let ready = wait(dataset, download, plan.identity.role, node.deadlines, began).await?;
        let path = ready.ok_or_else(|| failed("it is not complete"))?;
        mount(dataset, path, node)
            .await?
            .ok_or_else(|| failed("it was removed from the node twice while it was waited for"))
    }

    /// Joins this pod's download of a dataset, or starts it; one that failed is started anew.
    fn download(
        &self,
        dataset: &DatasetRequest,
        namespace: &Namespace,
    ) -> Result<watch::Receiver<Progress>, DataError> {
        let key = (namespace.clone(), dataset.uri.clone());
        let mut running = self.running.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(download) = running.get(&key)
            && !matches!(*download.borrow(), Progress::Failed(_))
        {
            return Ok(download.clone());
        }
        let program = program();
        let start = |e: io::Error| DataError::Start {
            uri: dataset.uri.clone(),
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
        command
            .args(["prefetch", "--json", "--namespace", namespace.as_str()])
            .arg(dataset.uri.to_string());
        command
            .stdin(Stdio::null())
            .stdout(stdout)
            .stderr(Stdio::null())
            .current_dir("/");
        let child = self.exits.spawn(&mut command).map_err(start)?;
        drop(command); // its copy of the pipe's other end
        let (sender, receiver) = watch::channel(Progress::default());
        let lines = pipe::Receiver::from_owned_fd(lines).map_err(start)?;
        tokio::spawn(async move {
            follow(lines, &sender).await;
            let exit = child.exit.await;
            sender.send_if_modified(|progress| {
                let silent = !matches!(progress, Progress::Ready(_) | Progress::Failed(_));
                if silent {
                    *progress = Progress::Failed(format!(
                        "rekindle prefetch ended with status {} and no reason",
                        exit.status
                    ));
                }
                silent
            });
        });
        running.insert(key, receiver.clone());
        Ok(receiver)
    }
}

/// Leases what a download has published, so that it stays until the container is gone; none when it has
/// been removed since.
async fn mount(
    dataset: &DatasetRequest,
    path: PathBuf,
    node: &NodeConfig,
) -> Result<Option<DatasetMount>, DataError> {
    let failed = |reason: String| DataError::Failed {
        uri: dataset.uri.clone(),
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
                tracing::warn!(%error, line, "a line of rekindle prefetch is not understood")
            }
        }
    }
}

/// Waits for one download. `None`: not there yet, and a container of the pod will wait for the rest.
async fn wait(
    dataset: &DatasetRequest,
    mut download: watch::Receiver<Progress>,
    role: Role,
    deadlines: Deadlines,
    began: Instant,
) -> Result<Option<PathBuf>, DataError> {
    let limit = match (role, dataset.policy) {
        (Role::Container, Policy::Required) => deadlines.container,
        // It starts without it, and has to have the time for that.
        (Role::Container, Policy::Opportunistic) => {
            deadlines.container.saturating_sub(deadlines.cold_start())
        }
        // Nobody else waits for a standalone container, so it may wait as long as a sandbox.
        (Role::Sandbox | Role::Standalone, _) => deadlines.sandbox_data,
    };
    let uri = || dataset.uri.clone();
    loop {
        let now = download.borrow_and_update().clone();
        match now {
            Progress::Ready(path) => return Ok(Some(path)),
            Progress::Failed(reason) => return Err(DataError::Failed { uri: uri(), reason }),
            // Half of a container's budget: the rate may fall, and the restore needs its share.
            Progress::Moving {
                done,
                total,
                per_second,
            } if role == Role::Sandbox
                && fits(total - done.min(total), per_second, deadlines.container / 2) =>
            {
                return Ok(None);
            }
            _ => {}
        }
        let left = limit.saturating_sub(began.elapsed());
        if tokio::time::timeout(left, download.changed())
            .await
            .is_err()
        {
            let done = match &*download.borrow() {
                Progress::Moving { done, total, .. } => format!("{done} of {total} bytes are here"),
                _ => "the source has not answered the listing".to_owned(),
            };
            return Err(DataError::NotYet {
                uri: uri(),
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
            Line::Ready { .. }
        ));
        assert!(matches!(
            parse(r#"{"event":"failed","reason":"403","retryable":false}"#),
            Line::Failed { .. }
        ));
    }
}
