//! A container and its task, through containerd's own API: every call is one request, and its error is the gRPC status.

mod builder;
mod exec;

pub use builder::{Builder, Prepared};
pub use exec::{Exec, ExecBuilder};

use crate::fifo::Stdio;
use crate::node::{NAMESPACE, Node};
use crate::options::CheckpointOptions;
use crate::poll;
use containerd_client::Client;
use containerd_client::services::v1::{
    self as api,
    snapshots::{MountsRequest, RemoveSnapshotRequest},
};
use containerd_client::tonic::{Code, Request, Status};
use containerd_client::types::v1::Process;
use containerd_client::types::{Descriptor, Metric, v1};
use prost_types::Any;
use std::fmt;

pub use v1::Status as State;

/// What containerd answers.
pub type Answer<T> = Result<T, Status>;

/// A request in the tests' containerd namespace.
fn ask<T>(message: T) -> Request<T> {
    containerd_client::with_namespace!(message, NAMESPACE)
}

/// How a process ended: the exit status and the pid it had.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ended {
    /// The exit status; 128 + the signal that ended it.
    pub status: u32,
    /// The pid, where the answer carries it.
    pub pid: u32,
}

/// A container with its task created. [`Container::remove`] takes it away; left alone it goes with the node.
pub struct Container<'n> {
    node: &'n Node,
    client: Client,
    id: String,
    snapshot: String,
    io: Stdio,
}

impl fmt::Debug for Container<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Container")
            .field("id", &self.id)
            .finish_non_exhaustive()
    }
}

impl<'n> Container<'n> {
    /// Its id.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// The stdio of its first process.
    pub fn io(&self) -> &Stdio {
        &self.io
    }

    /// Starts what was created; the pid.
    pub async fn start(&self) -> Answer<u32> {
        self.start_exec("").await
    }

    /// The state of its first process.
    pub async fn process(&self) -> Answer<Process> {
        self.process_of("").await
    }

    async fn process_of(&self, exec_id: &str) -> Answer<Process> {
        let request = api::GetRequest {
            container_id: self.id.clone(),
            exec_id: exec_id.into(),
        };
        let answer = self.client.tasks().get(ask(request)).await?.into_inner();
        answer
            .process
            .ok_or_else(|| Status::internal("containerd answered Get without a process"))
    }

    /// Running, paused, stopped, …
    pub async fn state(&self) -> Answer<State> {
        Ok(self.process().await?.status())
    }

    /// Polls until it is in `state`.
    pub async fn reaches(&self, state: State) -> anyhow::Result<()> {
        let what = format!("state {} of container {}", state.as_str_name(), self.id);
        poll::until(&what, async || {
            Ok((self.state().await? == state).then_some(()))
        })
        .await
    }

    /// The pids in its cgroup.
    pub async fn pids(&self) -> Answer<Vec<u32>> {
        Ok(self
            .processes()
            .await?
            .iter()
            .map(|process| process.pid)
            .collect())
    }

    /// [`Container::pids`] with the details the runtime gives.
    pub async fn processes(&self) -> Answer<Vec<v1::ProcessInfo>> {
        let request = api::ListPidsRequest {
            container_id: self.id.clone(),
        };
        Ok(self
            .client
            .tasks()
            .list_pids(ask(request))
            .await?
            .into_inner()
            .processes)
    }

    /// A further process in it, to be described and added.
    pub fn exec<'c>(&'c self, exec_id: &str, args: &[&str]) -> ExecBuilder<'c, 'n> {
        ExecBuilder::new(self, exec_id, args)
    }

    /// The further process of this id, whether there is one or not.
    pub fn existing_exec(&self, exec_id: &str) -> Exec<'_, 'n> {
        Exec::of(self, exec_id)
    }

    /// Sends a signal to its first process.
    pub async fn kill(&self, signal: u32) -> Answer<()> {
        self.signal("", signal, false).await
    }

    /// Sends a signal to all its processes.
    pub async fn kill_all(&self, signal: u32) -> Answer<()> {
        self.signal("", signal, true).await
    }

    /// Sends a signal to the process with this exec id.
    pub async fn kill_exec(&self, exec_id: &str, signal: u32) -> Answer<()> {
        self.signal(exec_id, signal, false).await
    }

    async fn signal(&self, exec_id: &str, signal: u32, all: bool) -> Answer<()> {
        let request = api::KillRequest {
            container_id: self.id.clone(),
            exec_id: exec_id.into(),
            signal,
            all,
        };
        self.client.tasks().kill(ask(request)).await.map(drop)
    }

    /// Freezes it.
    pub async fn pause(&self) -> Answer<()> {
        self.client
            .tasks()
            .pause(ask(api::PauseTaskRequest {
                container_id: self.id.clone(),
            }))
            .await
            .map(drop)
    }

    /// Thaws it.
    pub async fn resume(&self) -> Answer<()> {
        self.client
            .tasks()
            .resume(ask(api::ResumeTaskRequest {
                container_id: self.id.clone(),
            }))
            .await
            .map(drop)
    }

    /// Waits for the end of its first process.
    pub async fn wait(&self) -> Answer<Ended> {
        self.wait_for("").await
    }

    async fn wait_for(&self, exec_id: &str) -> Answer<Ended> {
        let request = api::WaitRequest {
            container_id: self.id.clone(),
            exec_id: exec_id.into(),
        };
        let wait = async {
            self.client
                .tasks()
                .wait(ask(request))
                .await
                .map(|answer| answer.into_inner().exit_status)
        };
        match tokio::time::timeout(*poll::DEADLINE, wait).await {
            Ok(answer) => answer.map(|status| Ended { status, pid: 0 }),
            Err(_) => Err(Status::deadline_exceeded(format!(
                "{} did not end in {:?}",
                self.id,
                *poll::DEADLINE
            ))),
        }
    }

    /// Ends stdin from containerd's side. The test's own [`crate::fifo::Writer`] must be dropped as well.
    pub async fn close_stdin(&self) -> Answer<()> {
        self.close("").await
    }

    async fn close(&self, exec_id: &str) -> Answer<()> {
        let request = api::CloseIoRequest {
            container_id: self.id.clone(),
            exec_id: exec_id.into(),
            stdin: true,
        };
        self.client.tasks().close_io(ask(request)).await.map(drop)
    }

    /// Sets the size of its terminal.
    pub async fn resize(&self, width: u32, height: u32) -> Answer<()> {
        self.resize_of("", width, height).await
    }

    async fn resize_of(&self, exec_id: &str, width: u32, height: u32) -> Answer<()> {
        let request = api::ResizePtyRequest {
            container_id: self.id.clone(),
            exec_id: exec_id.into(),
            width,
            height,
        };
        self.client.tasks().resize_pty(ask(request)).await.map(drop)
    }

    /// Changes its resources: an OCI `LinuxResources` as JSON.
    pub async fn update(&self, resources: &serde_json::Value) -> Answer<()> {
        let resources = Any {
            type_url: "types.containerd.io/opencontainers/runtime-spec/1/LinuxResources".into(),
            value: resources.to_string().into_bytes(),
        };
        let request = api::UpdateTaskRequest {
            container_id: self.id.clone(),
            resources: Some(resources),
            annotations: Default::default(),
        };
        self.client.tasks().update(ask(request)).await.map(drop)
    }

    /// Its metrics.
    pub async fn metrics(&self) -> Answer<Metric> {
        let request = api::MetricsRequest {
            filters: vec![format!("id=={}", self.id)],
        };
        let mut metrics = self
            .client
            .tasks()
            .metrics(ask(request))
            .await?
            .into_inner()
            .metrics;
        metrics
            .pop()
            .ok_or_else(|| Status::not_found(format!("containerd has no metrics of {}", self.id)))
    }

    /// Dumps it. Without an `image_path` the answer names what was put into containerd's content store.
    pub async fn checkpoint(&self, options: &CheckpointOptions) -> Answer<Vec<Descriptor>> {
        let mut request = ask(api::CheckpointTaskRequest {
            container_id: self.id.clone(),
            parent_checkpoint: String::new(),
            options: Some(options.to_any()),
        });
        if options.image_path.is_empty() {
            // Nothing refers to the new content yet: without a lease the garbage collector may take it at once.
            let lease = api::CreateRequest {
                id: format!("{}-checkpoint", self.id),
                ..Default::default()
            };
            let lease = self
                .client
                .leases()
                .create(ask(lease))
                .await?
                .into_inner()
                .lease;
            let id = lease.unwrap_or_default().id;
            let id = id
                .parse()
                .map_err(|_| Status::internal(format!("the lease is called {id:?}")))?;
            request.metadata_mut().insert("containerd-lease", id);
        }
        Ok(self
            .client
            .tasks()
            .checkpoint(request)
            .await?
            .into_inner()
            .descriptors)
    }

    /// Deletes the task, which must have ended; how it ended.
    pub async fn delete(&self) -> Answer<Ended> {
        let request = api::DeleteTaskRequest {
            container_id: self.id.clone(),
        };
        let answer = self.client.tasks().delete(ask(request)).await?.into_inner();
        Ok(Ended {
            status: answer.exit_status,
            pid: answer.pid,
        })
    }

    /// Kills and deletes the task, if there is one, and removes the container and its snapshot.
    pub async fn remove(self) -> anyhow::Result<()> {
        match self.state().await {
            Err(e) if e.code() == Code::NotFound => {}
            Err(e) => return Err(e.into()),
            Ok(state) => {
                if state != State::Stopped {
                    // It may end in between, which is what we want.
                    let _ = self.kill(9).await;
                    if state == State::Paused {
                        let _ = self.resume().await;
                    }
                    self.reaches(State::Stopped).await?;
                }
                self.delete().await?;
            }
        }
        self.client
            .containers()
            .delete(ask(api::DeleteContainerRequest {
                id: self.id.clone(),
            }))
            .await?;
        let request = RemoveSnapshotRequest {
            snapshotter: "overlayfs".into(),
            key: self.snapshot.clone(),
        };
        self.client.snapshots().remove(ask(request)).await?;
        Ok(())
    }

    /// Asks for the creation of one more task of this container, which has one.
    pub async fn create_again(&self) -> Answer<u32> {
        let request = api::CreateTaskRequest {
            container_id: self.id.clone(),
            ..Default::default()
        };
        Ok(self
            .client
            .tasks()
            .create(ask(request))
            .await?
            .into_inner()
            .pid)
    }

    /// The next task of this container, which has none any more, over the layer that the last one has written.
    pub async fn next_task(mut self) -> anyhow::Result<(Container<'n>, Answer<u32>)> {
        let mounts = MountsRequest {
            snapshotter: "overlayfs".into(),
            key: self.snapshot.clone(),
        };
        let mounts = self.client.snapshots().mounts(ask(mounts)).await?;
        self.io = Stdio::open(self.node, &format!("{}-next", self.id), false, false)?;
        let request = api::CreateTaskRequest {
            container_id: self.id.clone(),
            rootfs: mounts.into_inner().mounts,
            stdout: self.io.stdout.clone(),
            stderr: self.io.stderr.clone(),
            ..Default::default()
        };
        let created = self.client.tasks().create(ask(request)).await;
        Ok((self, created.map(|answer| answer.into_inner().pid)))
    }

    /// Asks for one more process of an exec id that is taken.
    pub async fn exec_again(&self, exec_id: &str) -> Answer<()> {
        let process = crate::spec::process(&["true".into()], &[], "/", (0, 0), false);
        self.add_exec(exec_id, &process.to_string()).await
    }

    /// Adds a process without stdio, described by whatever text.
    pub async fn add_exec(&self, exec_id: &str, process: &str) -> Answer<()> {
        let spec = Any {
            type_url: "types.containerd.io/opencontainers/runtime-spec/1/Process".into(),
            value: process.as_bytes().to_vec(),
        };
        let request = api::ExecProcessRequest {
            container_id: self.id.clone(),
            exec_id: exec_id.to_owned(),
            spec: Some(spec),
            ..Default::default()
        };
        self.client.tasks().exec(ask(request)).await.map(drop)
    }

    /// Starts an added process; the pid.
    pub async fn start_exec(&self, exec_id: &str) -> Answer<u32> {
        let request = api::StartRequest {
            container_id: self.id.clone(),
            exec_id: exec_id.to_owned(),
        };
        let answer = self.client.tasks().start(ask(request)).await?;
        Ok(answer.into_inner().pid)
    }

    /// Deletes an added process, which must have ended; how it ended.
    pub async fn delete_exec(&self, exec_id: &str) -> Answer<Ended> {
        let request = api::DeleteProcessRequest {
            container_id: self.id.clone(),
            exec_id: exec_id.to_owned(),
        };
        let answer = self.client.tasks().delete_process(ask(request)).await?;
        let answer = answer.into_inner();
        Ok(Ended {
            status: answer.exit_status,
            pid: answer.pid,
        })
    }

    /// The same container over a new connection, after containerd was away.
    pub async fn reconnected(self) -> anyhow::Result<Container<'n>> {
        let client = self.node.containerd().await?;
        Ok(Container { client, ..self })
    }

    /// The node it runs on.
    pub fn node(&self) -> &'n Node {
        self.node
    }
}
