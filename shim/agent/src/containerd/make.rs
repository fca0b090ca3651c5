//! Making a container like another one, and taking it back.

use std::time::Duration;

use containerd_client::{
    services::v1::{
        Container, CreateContainerRequest, CreateTaskRequest, DeleteContainerRequest,
        DeleteTaskRequest, GetContainerRequest, KillRequest, StartRequest, WaitRequest,
        containers_client::ContainersClient,
        snapshots::{
            Info, PrepareSnapshotRequest, RemoveSnapshotRequest, StatSnapshotRequest,
            UpdateSnapshotRequest, snapshots_client::SnapshotsClient,
        },
        tasks_client::TasksClient,
    },
    tonic::{Code, Status},
    types::Mount,
};
use prost_types::FieldMask;

use super::{Containerd, failure, within};
use crate::exit::Failure;

/// Keeps the garbage collector from a snapshot that no container has yet.
const ROOT: &str = "containerd.io/gc.root";
/// How long a container that is taken back may take to end.
const END: Duration = Duration::from_secs(10);

impl Containerd {
    /// A container as containerd has it.
    pub(crate) async fn record(&self, namespace: &str, id: &str) -> anyhow::Result<Container> {
        let request = GetContainerRequest { id: id.to_owned() };
        let answer = ContainersClient::new(self.channel.clone())
            .get(within(namespace, request)?)
            .await
            .map_err(|status| {
                failure(&format!("looking up container {namespace}/{id}"), &status)
            })?;
        Ok(answer.into_inner().container.unwrap_or_default())
    }

    /// A writable layer called `key`, on that which the layer `other` lies on; its mounts.
    pub(crate) async fn clone_layer(
        &self,
        namespace: &str,
        snapshotter: &str,
        other: &str,
        key: &str,
    ) -> anyhow::Result<Vec<Mount>> {
        let mut snapshots = SnapshotsClient::new(self.channel.clone());
        let stat = StatSnapshotRequest {
            snapshotter: snapshotter.to_owned(),
            key: other.to_owned(),
        };
        let found = snapshots.stat(within(namespace, stat)?).await;
        let found = found
            .map_err(|status| failure(&format!("looking up the layer {other}"), &status))?
            .into_inner();
        let prepare = PrepareSnapshotRequest {
            snapshotter: snapshotter.to_owned(),
            key: key.to_owned(),
            parent: found.info.unwrap_or_default().parent,
            labels: [(ROOT.to_owned(), "rekindle restore".to_owned())].into(),
        };
        let prepared = snapshots.prepare(within(namespace, prepare)?).await;
        let prepared = prepared
            .map_err(|status| exists(key, &format!("preparing the layer {key}"), &status))?;
        Ok(prepared.into_inner().mounts)
    }

    /// Leaves a layer to its container: with that it goes.
    pub(crate) async fn release_layer(
        &self,
        namespace: &str,
        snapshotter: &str,
        key: &str,
    ) -> anyhow::Result<()> {
        let request = UpdateSnapshotRequest {
            snapshotter: snapshotter.to_owned(),
            info: Some(Info {
                name: key.to_owned(),
                ..Info::default()
            }),
            update_mask: Some(FieldMask {
                paths: vec![format!("labels.{ROOT}")],
            }),
        };
        SnapshotsClient::new(self.channel.clone())
            .update(within(namespace, request)?)
            .await
            .map_err(|status| failure(&format!("changing the layer {key}"), &status))?;
        Ok(())
    }

    pub(crate) async fn remove_layer(&self, namespace: &str, snapshotter: &str, key: &str) {
        let request = RemoveSnapshotRequest {
            snapshotter: snapshotter.to_owned(),
            key: key.to_owned(),
        };
        let Ok(request) = within(namespace, request) else {
            return;
        };
        let removed = SnapshotsClient::new(self.channel.clone())
            .remove(request)
            .await;
        told("removing its layer", removed.err());
    }

    /// Makes the container itself.
    pub(crate) async fn register(&self, namespace: &str, record: Container) -> anyhow::Result<()> {
        let id = record.id.clone();
        let request = CreateContainerRequest {
            container: Some(record),
        };
        ContainersClient::new(self.channel.clone())
            .create(within(namespace, request)?)
            .await
            .map_err(|status| exists(&id, &format!("making container {id}"), &status))?;
        Ok(())
    }

    pub(crate) async fn forget(&self, namespace: &str, id: &str) {
        let request = DeleteContainerRequest { id: id.to_owned() };
        let Ok(request) = within(namespace, request) else {
            return;
        };
        let removed = ContainersClient::new(self.channel.clone())
            .delete(request)
            .await;
        told("removing the container", removed.err());
    }

    /// Creates its task, which writes to `log`, a URI, or nowhere.
    pub(crate) async fn create_task(
        &self,
        namespace: &str,
        id: &str,
        rootfs: Vec<Mount>,
        log: Option<String>,
    ) -> anyhow::Result<()> {
        let log = log.unwrap_or_default();
        let request = CreateTaskRequest {
            container_id: id.to_owned(),
            rootfs,
            stdout: log.clone(),
            stderr: log,
            ..CreateTaskRequest::default()
        };
        TasksClient::new(self.channel.clone())
            .create(within(namespace, request)?)
            .await
            .map_err(|status| failure(&format!("creating {id}"), &status))?;
        Ok(())
    }

    /// Starts its task; the pid.
    pub(crate) async fn start_task(&self, namespace: &str, id: &str) -> anyhow::Result<u32> {
        let request = StartRequest {
            container_id: id.to_owned(),
            ..StartRequest::default()
        };
        let started = TasksClient::new(self.channel.clone())
            .start(within(namespace, request)?)
            .await
            .map_err(|status| failure(&format!("starting {id}"), &status))?;
        Ok(started.into_inner().pid)
    }

    /// Ends a task that is taken back, whether it runs or not.
    pub(crate) async fn end_task(&self, namespace: &str, id: &str) {
        let mut tasks = TasksClient::new(self.channel.clone());
        let kill = KillRequest {
            container_id: id.to_owned(),
            signal: 9,
            all: true,
            ..KillRequest::default()
        };
        let wait = WaitRequest {
            container_id: id.to_owned(),
            ..WaitRequest::default()
        };
        let delete = DeleteTaskRequest {
            container_id: id.to_owned(),
        };
        let (Ok(kill), Ok(wait), Ok(delete)) = (
            within(namespace, kill),
            within(namespace, wait),
            within(namespace, delete),
        ) else {
            return;
        };
        // One that was not started has nobody to kill, and its end is never told.
        if tasks.kill(kill).await.is_ok() {
            let _ = tokio::time::timeout(END, tasks.wait(wait)).await;
        }
        told("deleting the task", tasks.delete(delete).await.err());
    }
}

/// What is left behind has to be known.
fn told(doing: &str, error: Option<Status>) {
    if let Some(error) = error {
        tracing::warn!("{doing}: {}", error.message());
    }
}

fn exists(id: &str, doing: &str, status: &Status) -> anyhow::Error {
    match status.code() {
        Code::AlreadyExists => Failure::Refused(format!(
            "there is a container or a layer called {id} already; give the new one another id"
        ))
        .into(),
        _ => failure(doing, status),
    }
}
