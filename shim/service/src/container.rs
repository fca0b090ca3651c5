//! One container: its state, its processes, and the driver that serialises what changes it.
//!
//! Calls that change a container queue to its driver task, one at a time; `State`, `Wait`, `Kill` and
//! execs do not, so a restore of seconds delays none of them. Ends are taken in by a task of their own.

mod driver;
mod exec;
mod imaging;
mod restoring;
mod warming;

use std::{
    collections::HashMap,
    future::Future,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
};

use containerd_shim_protos::{
    api::ProcessInfo,
    events::task::{TaskExit, TaskPaused, TaskResumed, TaskStart},
};
use driver::{Driver, Gone};
pub(crate) use exec::{Exec, ExecRequest, ExecState};
use tokio::sync::{RwLock, watch};

use crate::{
    context::Fixed,
    criu::CheckpointRequest,
    error::Error,
    events::Events,
    exits::{Exit, ExitOf, timestamp},
    io::{ProcessIo, Streams},
    lifecycle::{Request, State, admit},
    phases::{
        self,
        create::{Created, How},
        restore::Source,
    },
    stats::Usage,
};

/// What anyone may look at, at any time.
#[derive(Debug, Clone, Copy)]
pub(crate) struct View {
    pub(crate) state: State,
    /// The init's pid; 0 before there is one.
    pub(crate) pid: i32,
}

/// A container.
#[derive(Debug)]
pub(crate) struct Container {
    pub(crate) fixed: Arc<Fixed>,
    view: watch::Sender<View>,
    streams: Streams,
    /// Absent while a restore uses it, and after the end.
    io: Mutex<Option<ProcessIo>>,
    /// What a start restores, for a container created from an image.
    source: Mutex<Option<Source>>,
    /// A restore under way, for `Kill` to end.
    restoring: Mutex<Option<restoring::Restoring>>,
    /// Whether the memory of a lazily restored container is still coming in.
    loading: watch::Sender<bool>,
    execs: Mutex<HashMap<String, Arc<Exec>>>,
    running_execs: watch::Sender<usize>,
    /// Execs start under its read side; a checkpoint takes the write side, for a process that is not
    /// in the init's tree cannot be dumped.
    exec_gate: Arc<RwLock<()>>,
    term: Mutex<imaging::Term>,
    /// Whether somebody has signalled it: then its end is not its own doing.
    signalled: AtomicBool,
    /// Held while a start is under way, so that its event comes before the exit's.
    start_gate: tokio::sync::Mutex<()>,
    /// Kills hold its read side, so that they are answered before anyone hears of the end: containerd deletes
    /// the task then, and closes the connection on which its own kill may still wait.
    kill_gate: RwLock<()>,
    pub(crate) usage: Usage,
    events: Events,
    driver: Driver,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Container {
    /// A container that was just created; its creation has been reported.
    pub(crate) fn new(created: Created) -> Arc<Self> {
        let Created { fixed, io, how } = created;
        let (view, source, exit) = match how {
            How::Init { pid, exit } => (
                View {
                    state: State::Created,
                    pid,
                },
                None,
                Some(exit),
            ),
            How::Image(source) => (
                View {
                    state: State::CreatedFromImage,
                    pid: 0,
                },
                Some(source),
                None,
            ),
        };
        let this = Arc::new(Self {
            events: fixed.shared.events.clone(),
            fixed: Arc::new(fixed),
            view: watch::Sender::new(view),
            streams: io.streams().clone(),
            io: Mutex::new(Some(io)),
            source: Mutex::new(source),
            restoring: Mutex::new(None),
            loading: watch::Sender::new(false),
            execs: Mutex::default(),
            running_execs: watch::Sender::new(0),
            exec_gate: Arc::default(),
            term: Mutex::default(),
            signalled: AtomicBool::new(false),
            start_gate: tokio::sync::Mutex::new(()),
            kill_gate: RwLock::default(),
            usage: Usage::default(),
            driver: Driver::start(),
        });
        if let Some(exit) = exit {
            this.watch_init(exit);
        }
        this
    }

    /// Queues work to the driver and waits for its answer.
    async fn queue<T, W, F>(self: &Arc<Self>, work: W) -> Result<T, Error>
    where
        T: Send + 'static,
        W: FnOnce(Arc<Self>) -> F + Send + 'static,
        F: Future<Output = Result<T, Error>> + Send + 'static,
    {
        let this = Arc::clone(self);
        let done = self.driver.run(move || work(this)).await;
        done.map_err(|Gone| Error::DriverGone(self.fixed.id.clone()))?
    }

    pub(crate) fn view(&self) -> View {
        *self.view.borrow()
    }

    fn admit(&self, request: Request) -> Result<State, Error> {
        let state = self.view().state;
        admit(state, request)?;
        Ok(state)
    }

    /// Changes the state unless the container has ended meanwhile.
    fn enter(&self, state: State) {
        self.view.send_if_modified(|view| {
            let alive = !matches!(view.state, State::Stopped(_));
            if alive {
                view.state = state;
            }
            alive
        });
    }

    pub(crate) fn streams(&self) -> Streams {
        self.streams.clone()
    }

    /// Starts the init, or restores it.
    pub(crate) async fn start(self: &Arc<Self>) -> Result<i32, Error> {
        self.queue(|this| async move {
            let state = this.admit(Request::Start)?;
            let _gate = this.start_gate.lock().await;
            let restored = match state {
                State::CreatedFromImage => this.restore().await?,
                _ => {
                    this.fixed.runc.start().await?;
                    false
                }
            };
            this.enter(State::Running);
            this.keep_imaging();
            this.keep_warm(restored);
            let pid = this.view().pid;
            let mut event = TaskStart::new();
            event.container_id.clone_from(&this.fixed.id);
            event.pid = pid.cast_unsigned();
            this.events.send(event);
            Ok(pid)
        })
        .await
    }

    /// Takes in the init's end, after the ends of all execs.
    pub(crate) fn watch_init(self: &Arc<Self>, exit: ExitOf) {
        self.usage
            .begin(&self.fixed.id, self.view().pid, &self.events);
        let this = Arc::clone(self);
        tokio::spawn(async move {
            let exit = exit.await;
            let _gate = this.start_gate.lock().await;
            if this.fixed.shares_pids
                && let Err(error) = this
                    .fixed
                    .runc
                    .kill(libc::SIGKILL.cast_unsigned(), true)
                    .await
            {
                tracing::debug!(%error, "nothing was left to kill");
            }
            let mut running = this.running_execs.subscribe();
            let _ = running.wait_for(|count| *count == 0).await;
            let _answered = this.kill_gate.write().await;
            this.ended(exit).await;
        });
    }

    async fn ended(&self, exit: Exit) {
        self.usage.end().await;
        if matches!(self.view().state, State::Paused | State::Pausing) {
            // Before anyone hears of the end: runc refuses to delete what is frozen.
            if let Err(error) = self.fixed.runc.resume().await {
                tracing::debug!(%error, "thawing the cgroup of an ended container");
            }
        }
        self.view
            .send_modify(|view| view.state = State::Stopped(exit));
        let mut event = TaskExit::new();
        event.container_id.clone_from(&self.fixed.id);
        event.id.clone_from(&self.fixed.id);
        event.pid = self.view().pid.cast_unsigned();
        event.exit_status = exit.status;
        event.exited_at = timestamp(exit.at);
        self.events.send(event);
    }

    /// Waits for the init's end. A paused container has not ended.
    pub(crate) async fn wait(&self) -> Exit {
        let mut view = self.view.subscribe();
        loop {
            if let State::Stopped(exit) = view.borrow_and_update().state {
                return exit;
            }
            if view.changed().await.is_err() {
                return Exit {
                    status: 255,
                    at: std::time::SystemTime::now(),
                };
            }
        }
    }

    pub(crate) async fn pause(self: &Arc<Self>) -> Result<(), Error> {
        self.queue(|this| async move {
            this.admit(Request::Pause)?;
            this.enter(State::Pausing);
            if let Err(error) = this.fixed.runc.pause().await {
                // It may be frozen half-way, and nobody would thaw what is not paused.
                if let Err(error) = this.fixed.runc.resume().await {
                    tracing::debug!(%error, "undoing a failed pause");
                }
                this.enter(State::Running);
                return Err(error.into());
            }
            this.enter(State::Paused);
            let mut event = TaskPaused::new();
            event.container_id.clone_from(&this.fixed.id);
            this.events.send(event);
            Ok(())
        })
        .await
    }

    pub(crate) async fn resume(self: &Arc<Self>) -> Result<(), Error> {
        self.queue(|this| async move {
            this.admit(Request::Resume)?;
            this.fixed.runc.resume().await?;
            this.enter(State::Running);
            let mut event = TaskResumed::new();
            event.container_id.clone_from(&this.fixed.id);
            this.events.send(event);
            Ok(())
        })
        .await
    }

    pub(crate) async fn update(self: &Arc<Self>, resources: Vec<u8>) -> Result<(), Error> {
        self.queue(|this| async move {
            this.admit(Request::Update)?;
            Ok(this.fixed.runc.update(&resources).await?)
        })
        .await
    }

    pub(crate) async fn checkpoint(
        self: &Arc<Self>,
        request: CheckpointRequest,
    ) -> Result<(), Error> {
        self.queue(|this| async move {
            this.admit(Request::Checkpoint)?;
            // Before execs are held up, for it may take long.
            this.drained().await?;
            let _no_new_execs = this.exec_gate.write().await;
            let execs: Vec<(String, i32)> = lock(&this.execs)
                .values()
                .filter(|exec| exec.is_running())
                .map(|exec| (exec.id.clone(), exec.view().pid))
                .collect();
            let state = this.admit(Request::Checkpoint)?;
            if request.exit {
                this.signalled.store(true, Ordering::Relaxed);
            }
            phases::checkpoint::run(&this.fixed, this.view().pid, state, &execs, &request).await
        })
        .await
    }

    /// Signals the init. Does not queue: it must reach a container whose driver is busy.
    pub(crate) async fn kill(self: &Arc<Self>, signal: u32, all: bool) -> Result<(), Error> {
        self.signalled.store(true, Ordering::Relaxed);
        if self.hold_back(signal, all) {
            return Ok(());
        }
        let _unanswered = self.kill_gate.read().await;
        let state = self.admit(Request::Kill)?;
        let finished = || Error::Finished(self.fixed.id.clone());
        match state {
            // runc has nothing against ending all there is of what has ended.
            State::Stopped(_) if !all => return Err(finished()),
            State::CreatedFromImage => return self.kill_restore(signal),
            _ => {}
        }
        let killed = self.fixed.runc.kill(signal, all).await;
        killed.map_err(|error| match error.is_gone() {
            true => finished(),
            false => error.into(),
        })?;
        if state == State::Paused && signal == libc::SIGKILL.cast_unsigned() {
            // runc has thawed it for that; other OCI runtimes leave it frozen, and alive.
            if let Err(error) = self.fixed.runc.resume().await {
                tracing::debug!(%error, "thawing a killed container");
            }
        }
        Ok(())
    }

    /// Removes what is left of an ended, or never started, container.
    pub(crate) async fn delete(self: &Arc<Self>) -> Result<(View, Exit), Error> {
        self.queue(|this| async move {
            let state = this.admit(Request::Delete)?;
            let runc = &this.fixed.runc;
            if runc.has_state() {
                let deleted = match state {
                    State::Stopped(_) => runc.delete(false).await,
                    // A created init is alive, and so may be what is left of a restore.
                    _ => runc.remove(this.fixed.cgroup.as_deref()).await,
                };
                deleted.or_else(|error| if error.is_gone() { Ok(()) } else { Err(error) })?;
            }
            let io = lock(&this.io).take();
            if let Some(mut io) = io {
                io.drain().await;
            }
            if state == State::CreatedFromImage {
                // What was staged for a start that never came; after one that failed nothing is left of it.
                this.fixed.take_back().await?;
            }
            this.fixed.rootfs.unmount();
            let exit = match this.view().state {
                State::Stopped(exit) => exit,
                _ => Exit {
                    status: 0,
                    at: std::time::SystemTime::now(),
                },
            };
            Ok((this.view(), exit))
        })
        .await
    }

    /// The pids in the container's cgroup; those of execs carry their id.
    pub(crate) async fn pids(&self) -> Result<Vec<ProcessInfo>, Error> {
        let pids = self.fixed.runc.ps().await?;
        let execs: HashMap<u32, String> = lock(&self.execs)
            .values()
            .map(|exec| (exec.view().pid.cast_unsigned(), exec.id.clone()))
            .collect();
        Ok(pids
            .into_iter()
            .map(|pid| exec::process_info(pid, execs.get(&pid)))
            .collect())
    }

    pub(crate) fn resize(&self, width: u16, height: u16) -> Result<(), Error> {
        lock(&self.io)
            .as_ref()
            .map_or(Ok(()), |io| io.resize(width, height))
    }

    pub(crate) fn close_stdin(&self) {
        if let Some(io) = lock(&self.io).as_mut() {
            io.close_stdin();
        }
    }
}
