//! A pod's datasets, and the image that it starts from: fetched by `rekindle prefetch` and `rekindle image fetch`, waited
//! for where the kubelet has time.
//!
//! The shim links no network client. It starts one such program for each thing that is wanted, reads its
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

use rekindle_checkpoint::{ImageError, ImageStore};
use rekindle_core::{
    annotations::{DatasetRequest, Policy},
    config::{Deadlines, NodeConfig, Paging},
    identity::Role,
    name::Namespace,
    paths,
    plan::{Plan, RestorePlan},
};
use rekindle_dataset::{Cache, Lock};
use tokio::{net::unix::pipe, sync::watch};

use crate::{error::Error, error::sentence, exits::Exits, threads::blocking};

use download::{Download, Progress, Ready, follow, wait};

mod download;

pub(crate) use download::{DataError, Wanted};

/// A dataset that a container mounts, leased for as long as this lives.
#[derive(Debug)]
pub(crate) struct DatasetMount {
    pub(crate) source: PathBuf,
    pub(crate) destination: String,
    _lease: Lock,
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
        let (images, of) = (node.images.clone(), ahead.clone());
        let here = blocking(move || {
            let store = ImageStore::of(&images)?;
            store.resolve(&of.namespace, &of.name, None).map(drop)
        });
        if !matches!(here.await, Ok(Err(ImageError::Unknown(_)))) {
            return None;
        }
        match self.download(Wanted::Image(ahead.name.clone()), &ahead.namespace) {
            Ok(download) => Some((
                ahead,
                Download {
                    // Where it turns out that this host cannot do that, the container waits for the rest.
                    lazily: node.restore.paging != Paging::Eager,
                    ..download
                },
            )),
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

    /// Fetches an image that is not on the node, or not all of it, where its namespace has a tier; false where it has none.
    /// `lazily` is whether the rest may come while its container runs. `until` is when whoever waits has to know.
    pub(crate) async fn image(
        &self,
        plan: &RestorePlan,
        node: &NodeConfig,
        lazily: bool,
        until: Instant,
    ) -> Result<bool, Error> {
        if !in_a_tier(plan, node) {
            return Ok(false);
        }
        let download = self.download(Wanted::Image(plan.name.clone()), &plan.namespace)?;
        let download = Download { lazily, ..download };
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
            return Ok(Download {
                wanted,
                progress,
                lazily: false,
            });
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
            lazily: false,
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

/// The CLI: beside the shim's own binary, where an installation puts both, else at its fixed place.
pub(crate) fn program() -> PathBuf {
    let beside = std::env::current_exe()
        .ok()
        .and_then(|exe| Some(exe.parent()?.join("rekindle")));
    beside
        .filter(|path| path.exists())
        .unwrap_or_else(|| Path::new(paths::CLI_BINARY).to_owned())
}
