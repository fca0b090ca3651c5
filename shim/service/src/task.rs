//! ttrpc ↔ our requests. Decides nothing.

use std::{
    collections::HashMap,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
};

use async_trait::async_trait;
use containerd_shim_protos::{
    api::{
        CheckpointTaskRequest, CloseIORequest, ConnectRequest, ConnectResponse, CreateTaskRequest,
        CreateTaskResponse, DeleteRequest, DeleteResponse, Empty, ExecProcessRequest, KillRequest,
        PauseRequest, PidsRequest, PidsResponse, ResizePtyRequest, ResumeRequest, ShutdownRequest,
        StartRequest, StartResponse, StateRequest, StateResponse, StatsRequest, StatsResponse,
        Status, UpdateTaskRequest, WaitRequest, WaitResponse,
    },
    events::task::{TaskCheckpointed, TaskCreate, TaskDelete, TaskIO},
    protobuf::MessageField,
    shim_async::Task,
    ttrpc::{self, r#async::TtrpcContext},
};
use tokio::sync::Notify;

use crate::{
    bundle,
    container::{Container, ExecRequest},
    context::Shared,
    criu::CheckpointRequest,
    error::Error,
    exits::{Exit, timestamp},
    lifecycle::State,
    phases::create,
};

/// How often a shim without a container looks whether it is still wanted.
const FORGOTTEN: std::time::Duration = std::time::Duration::from_secs(5);

/// The task service of one shim.
#[derive(Debug, Clone)]
pub(crate) struct TaskService {
    shared: Shared,
    containers: Arc<Mutex<HashMap<String, Slot>>>,
    pub(crate) shutdown: Arc<Notify>,
    /// Told when a container has gone.
    gone: Arc<Notify>,
    /// A shutdown that came while a create was under way.
    shutdown_asked: Arc<AtomicBool>,
}

/// A name is taken from the beginning of its create.
#[derive(Debug)]
enum Slot {
    /// Its create is under way, and `given_up` when containerd has cleaned up after it meanwhile.
    Creating {
        given_up: bool,
    },
    There(Arc<Container>),
}

impl TaskService {
    pub(crate) fn new(shared: Shared) -> Self {
        Self {
            shared,
            containers: Arc::default(),
            shutdown: Arc::default(),
            gone: Arc::default(),
            shutdown_asked: Arc::default(),
        }
    }

    fn containers(&self) -> MutexGuard<'_, HashMap<String, Slot>> {
        self.containers
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    fn container(&self, id: &str) -> Result<Arc<Container>, Error> {
        match self.containers().get(id) {
            Some(Slot::There(container)) => Ok(Arc::clone(container)),
            _ => Err(Error::NoContainer(id.to_owned())),
        }
    }

    /// Creates a container and reports it, before anything else of it can be reported.
    async fn create_container(
        &self,
        request: CreateTaskRequest,
        mut event: TaskCreate,
    ) -> Result<Arc<Container>, Error> {
        let (id, bundle) = (request.id.clone(), PathBuf::from(&request.bundle));
        {
            let mut containers = self.containers();
            if containers.contains_key(&id) {
                return Err(Error::Exists(format!("container {id}")));
            }
            containers.insert(id.clone(), Slot::Creating { given_up: false });
        }
        // In tasks of their own: a caller that gives up must not stop it half-way, and a panic must not
        // keep the name.
        let (this, name) = (self.clone(), id.clone());
        let creating = tokio::spawn(async move {
            let created = create::run(&this.shared, request).await?;
            event.pid = created.pid().cast_unsigned();
            this.shared.events.send(event);
            Ok(Container::new(created))
        });
        let (reply, answer) = tokio::sync::oneshot::channel();
        let this = self.clone();
        tokio::spawn(async move {
            let created = creating
                .await
                .unwrap_or_else(|_| Err(Error::DriverGone(name.clone())));
            let given_up = this.settle(&name, &created);
            let unheard = match given_up {
                true => Some(created),
                false => reply.send(created).err(),
            };
            if let Some(created) = unheard {
                this.take_back(&name, &bundle, created).await;
            }
        });
        answer.await.unwrap_or(Err(Error::DriverGone(id)))
    }

    /// Notes how a create ended. Says whether containerd has given it up: then the name stays taken until
    /// nothing is left of it.
    fn settle(&self, id: &str, created: &Result<Arc<Container>, Error>) -> bool {
        let mut containers = self.containers();
        let given_up = matches!(containers.get(id), Some(Slot::Creating { given_up: true }));
        match created {
            Ok(container) => {
                containers.insert(id.to_owned(), Slot::There(Arc::clone(container)));
            }
            Err(_) if given_up => {}
            Err(_) => {
                containers.remove(id);
                self.gone.notify_one();
            }
        }
        given_up
    }

    /// Ends what nobody waits for any more. containerd has cleaned up after it already, at a time when
    /// there was more to come: what it could not remove then, its bundle, is removed here.
    async fn take_back(&self, id: &str, bundle: &Path, created: Result<Arc<Container>, Error>) {
        match created {
            Ok(orphan) => {
                tracing::warn!(
                    id,
                    "the caller of its create is gone; the container is ended"
                );
                let signal = libc::SIGKILL.cast_unsigned();
                if orphan.kill(signal, false).await.is_ok() {
                    orphan.wait().await;
                }
                if let Err(error) = orphan.delete().await {
                    tracing::warn!(id, %error, "deleting it");
                }
            }
            Err(error) => tracing::warn!(id, %error, "a create whose caller is gone failed"),
        }
        bundle::remove(bundle).await;
        self.containers().remove(id);
        self.gone.notify_one();
        self.end_if_asked();
    }

    /// Waits until nobody can mean this shim any more: it has no container, and its bundle is gone. A containerd that was
    /// killed between the start of a shim and its first create, or after the last delete, removes the bundle when it
    /// comes back, and leaves the shim.
    pub(crate) async fn forgotten(&self) {
        loop {
            let has_some = !self.containers().is_empty();
            if has_some {
                self.gone.notified().await;
            }
            tokio::time::sleep(FORGOTTEN).await;
            // A folder that is removed stays a process's own, without a name.
            let gone = std::fs::metadata(".").is_ok_and(|folder| folder.nlink() == 0);
            if gone && self.containers().is_empty() {
                return;
            }
        }
    }

    /// Ends the shim once its last container is gone, where containerd has asked for that.
    fn end_if_asked(&self) {
        if self.shutdown_asked.load(Ordering::Relaxed) && self.containers().is_empty() {
            self.shutdown.notify_one();
        }
    }
}

/// 16 bits are what a terminal's size has.
fn clamp(size: u32) -> u16 {
    u16::try_from(size).unwrap_or(u16::MAX)
}

#[async_trait]
impl Task for TaskService {
    async fn create(
        &self,
        _: &TtrpcContext,
        request: CreateTaskRequest,
    ) -> ttrpc::Result<CreateTaskResponse> {
        let mut event = TaskCreate::new();
        event.container_id.clone_from(&request.id);
        event.bundle.clone_from(&request.bundle);
        event.rootfs.clone_from(&request.rootfs);
        event.checkpoint.clone_from(&request.checkpoint);
        let mut io = TaskIO::new();
        io.stdin.clone_from(&request.stdin);
        io.stdout.clone_from(&request.stdout);
        io.stderr.clone_from(&request.stderr);
        io.terminal = request.terminal;
        event.io = MessageField::some(io);

        let container = self.create_container(request, event).await?;
        Ok(CreateTaskResponse {
            pid: container.view().pid.cast_unsigned(),
            ..CreateTaskResponse::default()
        })
    }

    async fn start(&self, _: &TtrpcContext, request: StartRequest) -> ttrpc::Result<StartResponse> {
        let container = self.container(&request.id)?;
        let pid = if request.exec_id.is_empty() {
            container.start().await?
        } else {
            container.start_exec(&request.exec_id).await?
        };
        Ok(StartResponse {
            pid: pid.cast_unsigned(),
            ..StartResponse::default()
        })
    }

    async fn delete(
        &self,
        _: &TtrpcContext,
        request: DeleteRequest,
    ) -> ttrpc::Result<DeleteResponse> {
        if let Some(Slot::Creating { given_up }) = self.containers().get_mut(&request.id) {
            // containerd deletes what it is creating only when it has given that up.
            *given_up = true;
        }
        let container = self.container(&request.id)?;
        let (pid, exit) = if request.exec_id.is_empty() {
            let (view, exit) = container.delete().await?;
            self.containers().remove(&request.id);
            self.gone.notify_one();
            let mut event = TaskDelete::new();
            event.container_id.clone_from(&request.id);
            event.pid = view.pid.cast_unsigned();
            event.exit_status = exit.status;
            event.exited_at = timestamp(exit.at);
            self.shared.events.send(event);
            (view.pid, exit)
        } else {
            container.delete_exec(&request.exec_id).await?
        };
        Ok(DeleteResponse {
            pid: pid.cast_unsigned(),
            exit_status: exit.status,
            exited_at: timestamp(exit.at),
            ..DeleteResponse::default()
        })
    }

    async fn exec(&self, _: &TtrpcContext, request: ExecProcessRequest) -> ttrpc::Result<Empty> {
        let id = request.id.clone();
        let exec = ExecRequest::parse(request)?;
        self.container(&id)?.add_exec(exec)?;
        Ok(Empty::new())
    }

    async fn state(&self, _: &TtrpcContext, request: StateRequest) -> ttrpc::Result<StateResponse> {
        let container = self.container(&request.id)?;
        let mut response = StateResponse::new();
        response.bundle = container.fixed.bundle.display().to_string();
        let (status, pid, streams, exit) = if request.exec_id.is_empty() {
            response.id.clone_from(&request.id);
            let view = container.view();
            let exit = match view.state {
                State::Stopped(exit) => Some(exit),
                _ => None,
            };
            (view.state.status(), view.pid, container.streams(), exit)
        } else {
            let exec = container.exec(&request.exec_id)?;
            response.id.clone_from(&request.exec_id);
            let (mut status, exit) = exec.status();
            // What stands still does so with all its processes.
            if let state @ (State::Pausing | State::Paused) = container.view().state {
                status = state.status();
            }
            (status, exec.view().pid, exec.streams().clone(), exit)
        };
        response.status = status.into();
        response.pid = pid.cast_unsigned();
        response.stdin = streams.stdin;
        response.stdout = streams.stdout;
        response.stderr = streams.stderr;
        response.terminal = streams.terminal;
        if let Some(Exit { status, at }) = exit {
            response.exit_status = status;
            response.exited_at = timestamp(at);
        }
        Ok(response)
    }

    async fn wait(&self, _: &TtrpcContext, request: WaitRequest) -> ttrpc::Result<WaitResponse> {
        let container = self.container(&request.id)?;
        let exit = if request.exec_id.is_empty() {
            container.wait().await
        } else {
            container.exec(&request.exec_id)?.wait().await
        };
        Ok(WaitResponse {
            exit_status: exit.status,
            exited_at: timestamp(exit.at),
            ..WaitResponse::default()
        })
    }

    async fn kill(&self, _: &TtrpcContext, request: KillRequest) -> ttrpc::Result<Empty> {
        let container = self.container(&request.id)?;
        if request.exec_id.is_empty() {
            container.kill(request.signal, request.all).await?;
        } else {
            container.exec(&request.exec_id)?.kill(request.signal)?;
        }
        Ok(Empty::new())
    }

    async fn pids(&self, _: &TtrpcContext, request: PidsRequest) -> ttrpc::Result<PidsResponse> {
        let processes = self.container(&request.id)?.pids().await?;
        Ok(PidsResponse {
            processes,
            ..PidsResponse::default()
        })
    }

    async fn pause(&self, _: &TtrpcContext, request: PauseRequest) -> ttrpc::Result<Empty> {
        self.container(&request.id)?.pause().await?;
        Ok(Empty::new())
    }

    async fn resume(&self, _: &TtrpcContext, request: ResumeRequest) -> ttrpc::Result<Empty> {
        self.container(&request.id)?.resume().await?;
        Ok(Empty::new())
    }

    async fn checkpoint(
        &self,
        _: &TtrpcContext,
        request: CheckpointTaskRequest,
    ) -> ttrpc::Result<Empty> {
        let container = self.container(&request.id)?;
        let checkpoint = CheckpointRequest::parse(&request.path, request.options.as_ref())?;
        container.checkpoint(checkpoint).await?;
        let mut event = TaskCheckpointed::new();
        event.container_id = request.id;
        event.checkpoint = request.path;
        self.shared.events.send(event);
        Ok(Empty::new())
    }

    async fn update(&self, _: &TtrpcContext, request: UpdateTaskRequest) -> ttrpc::Result<Empty> {
        let resources = request
            .resources
            .into_option()
            .map(|any| any.value)
            .unwrap_or_default();
        self.container(&request.id)?.update(resources).await?;
        Ok(Empty::new())
    }

    async fn resize_pty(
        &self,
        _: &TtrpcContext,
        request: ResizePtyRequest,
    ) -> ttrpc::Result<Empty> {
        let container = self.container(&request.id)?;
        let (width, height) = (clamp(request.width), clamp(request.height));
        if request.exec_id.is_empty() {
            container.resize(width, height)?;
        } else {
            container.exec(&request.exec_id)?.resize(width, height)?;
        }
        Ok(Empty::new())
    }

    async fn close_io(&self, _: &TtrpcContext, request: CloseIORequest) -> ttrpc::Result<Empty> {
        let container = self.container(&request.id)?;
        if request.exec_id.is_empty() {
            container.close_stdin();
        } else {
            container.exec(&request.exec_id)?.close_stdin();
        }
        Ok(Empty::new())
    }

    async fn stats(&self, _: &TtrpcContext, request: StatsRequest) -> ttrpc::Result<StatsResponse> {
        let container = self.container(&request.id)?;
        let stats = container.usage.metrics(&request.id).await?;
        Ok(StatsResponse {
            stats: MessageField::some(stats),
            ..StatsResponse::default()
        })
    }

    async fn connect(
        &self,
        _: &TtrpcContext,
        request: ConnectRequest,
    ) -> ttrpc::Result<ConnectResponse> {
        let task_pid = self
            .container(&request.id)
            .map_or(0, |container| container.view().pid.cast_unsigned());
        Ok(ConnectResponse {
            shim_pid: std::process::id(),
            task_pid,
            ..ConnectResponse::default()
        })
    }

    async fn shutdown(&self, _: &TtrpcContext, _: ShutdownRequest) -> ttrpc::Result<Empty> {
        self.shutdown_asked.store(true, Ordering::Relaxed);
        self.end_if_asked();
        Ok(Empty::new())
    }
}

impl crate::container::Exec {
    fn status(&self) -> (Status, Option<Exit>) {
        use crate::container::ExecState as S;
        match self.view().state {
            S::Created | S::Starting | S::Failed(_) => (Status::CREATED, None),
            S::Running => (Status::RUNNING, None),
            S::Stopped(exit) => (Status::STOPPED, Some(exit)),
        }
    }
}
