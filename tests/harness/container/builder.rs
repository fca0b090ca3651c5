//! From a description to a created task.

use super::{Answer, Container, ask};
use crate::fifo::Stdio;
use crate::{Image, Node, options::Options, spec};
use anyhow::{Context, Result, bail};
use containerd_client::Client;
use containerd_client::services::v1::snapshots::PrepareSnapshotRequest;
use containerd_client::services::v1::{self as api, container::Runtime};
use containerd_client::tonic::Status;
use containerd_client::types::{Descriptor, Mount};
use prost_types::Any;
use std::collections::BTreeMap;
use std::time::Duration;

/// A container that is being described.
#[derive(Debug)]
pub struct Builder<'n> {
    pub(crate) node: &'n Node,
    pub(crate) id: String,
    image: Option<Image>,
    pub(crate) args: Vec<String>,
    pub(crate) env: Vec<String>,
    pub(crate) cwd: String,
    pub(crate) user: (u32, u32),
    pub(crate) terminal: bool,
    stdin: bool,
    detached: bool,
    log_uri: Option<String>,
    pub(crate) host_network: bool,
    pub(crate) memory_limit: Option<u64>,
    pub(crate) pids_of: Option<u32>,
    pub(crate) annotations: BTreeMap<String, String>,
    pub(crate) binds: Vec<(String, String, bool)>,
    runtime: String,
    options: Options,
    checkpoint: Option<Descriptor>,
    changes: Vec<fn(&mut serde_json::Value)>,
}

impl<'n> Builder<'n> {
    pub(crate) fn new(node: &'n Node, id: &str) -> Builder<'n> {
        Builder {
            node,
            id: id.to_owned(),
            image: None,
            args: Vec::new(),
            env: Vec::new(),
            cwd: "/".into(),
            user: (0, 0),
            terminal: false,
            stdin: false,
            detached: false,
            log_uri: None,
            host_network: false,
            memory_limit: None,
            pids_of: None,
            annotations: BTreeMap::new(),
            binds: Vec::new(),
            runtime: "io.containerd.runc.v2".into(),
            options: Options {
                systemd_cgroup: node.is_a_machine(),
                ..Default::default()
            },
            checkpoint: None,
            changes: Vec::new(),
        }
    }

    /// The image whose files it sees; it must have been imported.
    pub fn image(mut self, image: &Image) -> Self {
        self.image = Some(image.clone());
        self
    }

    /// What it runs.
    pub fn args(mut self, args: &[&str]) -> Self {
        self.args = args.iter().map(|&arg| arg.to_owned()).collect();
        self
    }

    /// A shell line for it to run.
    pub fn shell(self, line: &str) -> Self {
        self.args(&["sh", "-c", line])
    }

    /// One more variable, `NAME=value`.
    pub fn env(mut self, pair: &str) -> Self {
        self.env.push(pair.to_owned());
        self
    }

    /// Where it starts.
    pub fn cwd(mut self, cwd: &str) -> Self {
        self.cwd = cwd.to_owned();
        self
    }

    /// As whom it runs.
    pub fn user(mut self, uid: u32, gid: u32) -> Self {
        self.user = (uid, gid);
        self
    }

    /// Gives it a terminal.
    pub fn terminal(mut self) -> Self {
        self.terminal = true;
        self
    }

    /// Gives it a stdin.
    pub fn stdin(mut self) -> Self {
        self.stdin = true;
        self
    }

    /// Gives it no stdio.
    pub fn detached(mut self) -> Self {
        self.detached = true;
        self
    }

    /// Sends its output to a URI (`binary://`, `file://`).
    pub fn log_uri(mut self, uri: &str) -> Self {
        self.log_uri = Some(uri.to_owned());
        self
    }

    /// Lets it share the node's network.
    pub fn host_network(mut self) -> Self {
        self.host_network = true;
        self
    }

    /// Limits its memory.
    pub fn memory_limit(mut self, bytes: u64) -> Self {
        self.memory_limit = Some(bytes);
        self
    }

    /// Lets it join the PID namespace of a process of the node.
    pub fn pids_of(mut self, pid: u32) -> Self {
        self.pids_of = Some(pid);
        self
    }

    /// One more annotation.
    pub fn annotation(mut self, key: &str, value: &str) -> Self {
        self.annotations.insert(key.to_owned(), value.to_owned());
        self
    }

    /// Binds a folder of the node into it.
    pub fn bind(mut self, from: &str, to: &str, writable: bool) -> Self {
        self.binds.push((from.to_owned(), to.to_owned(), writable));
        self
    }

    /// Changes its OCI specification, where none of the above does.
    pub fn change_spec(mut self, change: fn(&mut serde_json::Value)) -> Self {
        self.changes.push(change);
        self
    }

    /// The runtime's name for containerd, where it is not `io.containerd.runc.v2`.
    pub fn runtime(mut self, name: &str) -> Self {
        self.runtime = name.to_owned();
        self
    }

    /// The options of its runtime; comes before [`Builder::restore_from`], which sets one of them.
    pub fn options(mut self, options: Options) -> Self {
        self.options = options;
        self
    }

    /// The OCI runtime to use in place of `runc`.
    pub fn binary(mut self, program: &str) -> Self {
        self.options.binary_name = program.to_owned();
        self
    }

    /// Creates the task from a CRIU image in a folder of the node: its start restores.
    pub fn restore_from(mut self, folder: &str) -> Self {
        self.options.criu_image_path = folder.to_owned();
        self
    }

    /// Creates the task from a CRIU image in containerd's content store.
    pub fn restore_from_content(mut self, checkpoint: Descriptor) -> Self {
        self.checkpoint = Some(checkpoint);
        self
    }

    /// Makes the container and creates its task.
    pub async fn create(self) -> Result<Container<'n>> {
        self.prepare().await?.create().await
    }

    /// [`Builder::create`], with the answer to the task's creation on its own, for tests of refusals.
    pub async fn try_create(self) -> Result<(Container<'n>, Answer<u32>)> {
        Ok(self.prepare().await?.try_create().await)
    }

    /// Makes the container with its snapshot and its stdio, but no task: what comes before the moment that a start is
    /// timed from.
    pub async fn prepare(self) -> Result<Prepared<'n>> {
        let client = self.node.containerd().await?;
        let image = self
            .image
            .as_ref()
            .with_context(|| format!("container {} was given no image", self.id))?;
        let io = match &self.log_uri {
            _ if self.detached => Stdio::none(),
            Some(uri) => Stdio::to(uri, self.terminal),
            None => Stdio::open(self.node, &self.id, self.stdin, self.terminal)?,
        };
        let snapshot = format!("{}-snapshot", self.id);
        let prepare = PrepareSnapshotRequest {
            snapshotter: "overlayfs".into(),
            key: snapshot.clone(),
            parent: image.layer.clone(),
            // Else the garbage collector may come between this and the container that refers to it.
            labels: [("containerd.io/gc.root".to_owned(), "test".to_owned())].into(),
        };
        let prepared = client.snapshots().prepare(ask(prepare)).await;
        let rootfs = prepared
            .with_context(|| format!("preparing the snapshot of {}", self.id))?
            .into_inner()
            .mounts;
        self.register(&client, &snapshot, image).await?;
        let container = Container {
            node: self.node,
            client,
            id: self.id.clone(),
            snapshot,
            io,
        };
        let request = self.create_task(&container, rootfs);
        Ok(Prepared { container, request })
    }

    /// Creates the task and starts it.
    pub async fn run(self) -> Result<Container<'n>> {
        let container = self.create().await?;
        container
            .start()
            .await
            .with_context(|| format!("starting the task of {}", container.id))?;
        Ok(container)
    }

    async fn register(&self, client: &Client, snapshot: &str, image: &Image) -> Result<()> {
        let mut spec = spec::container(self);
        for change in &self.changes {
            change(&mut spec);
        }
        let spec = Any {
            type_url: "types.containerd.io/opencontainers/runtime-spec/1/Spec".into(),
            value: serde_json::to_vec(&spec)?,
        };
        let container = api::Container {
            id: self.id.clone(),
            image: image.name.clone(),
            runtime: Some(Runtime {
                name: self.runtime.clone(),
                options: None,
            }),
            spec: Some(spec),
            snapshotter: "overlayfs".into(),
            snapshot_key: snapshot.to_owned(),
            ..Default::default()
        };
        let request = api::CreateContainerRequest {
            container: Some(container),
        };
        client
            .containers()
            .create(ask(request))
            .await
            .with_context(|| format!("registering container {}", self.id))?;
        Ok(())
    }

    fn create_task(&self, container: &Container<'_>, rootfs: Vec<Mount>) -> api::CreateTaskRequest {
        let io = &container.io;
        api::CreateTaskRequest {
            container_id: self.id.clone(),
            rootfs,
            stdin: io.stdin.clone(),
            stdout: io.stdout.clone(),
            stderr: io.stderr.clone(),
            terminal: self.terminal,
            checkpoint: self.checkpoint.clone(),
            options: (self.options != Options::default()).then(|| self.options.to_any()),
            ..Default::default()
        }
    }
}

/// A container whose task is still to be created.
#[derive(Debug)]
pub struct Prepared<'n> {
    container: Container<'n>,
    request: api::CreateTaskRequest,
}

impl<'n> Prepared<'n> {
    /// Creates the task.
    pub async fn create(self) -> Result<Container<'n>> {
        let (container, created) = self.try_create().await;
        created.with_context(|| format!("creating the task of {}", container.id))?;
        Ok(container)
    }

    /// Asks for the task's creation and gives up after `limit`, as a kubelet does; the error, which there must be.
    pub async fn create_within(self, limit: Duration) -> Result<(Container<'n>, Status)> {
        let mut request = ask(self.request);
        request.set_timeout(limit);
        match self.container.client.tasks().create(request).await {
            Err(given_up) => Ok((self.container, given_up)),
            Ok(_) => bail!("{} was created within {limit:?}", self.container.id),
        }
    }

    /// Asks for the task's creation and goes away once `gone` is over, without waiting for an answer.
    pub async fn create_until(
        self,
        gone: impl Future<Output = Result<()>>,
    ) -> Result<Container<'n>> {
        let mut tasks = self.container.client.tasks();
        tokio::select! {
            _ = tasks.create(ask(self.request)) => bail!("{} was answered too early", self.container.id),
            gone = gone => gone.map(|()| self.container),
        }
    }

    async fn try_create(self) -> (Container<'n>, Answer<u32>) {
        let created = self
            .container
            .client
            .tasks()
            .create(ask(self.request))
            .await;
        let created = created.map(|answer| answer.into_inner().pid);
        (self.container, created)
    }
}
