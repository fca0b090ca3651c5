//! Processes that are started in a running container.

use std::{
    fs,
    sync::{Arc, Mutex},
};

use containerd_shim_protos::{
    api::{ExecProcessRequest, ProcessInfo},
    events::task::{TaskExecAdded, TaskExecStarted, TaskExit},
    protobuf::MessageField,
};
use serde_json::{Value, json};
use tokio::sync::watch;

use super::{Container, lock, timestamp};
use crate::{
    any,
    error::Error,
    exits::{Exit, ExitOf},
    io::{ConsoleSocket, ProcessIo, Streams, Theirs},
    lifecycle::{Request, State},
    names,
    runc::{DEADLINE, read_pid},
    sys,
};

/// Where an exec is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ExecState {
    Created,
    /// runc is starting it; nobody else may.
    Starting,
    Running,
    /// It could not be started. What is left of it waits to be deleted, and is shown as created.
    Failed(Exit),
    Stopped(Exit),
}

/// What anyone may look at.
#[derive(Debug, Clone, Copy)]
pub(crate) struct ExecView {
    pub(crate) state: ExecState,
    pub(crate) pid: i32,
}

/// An exec.
#[derive(Debug)]
pub(crate) struct Exec {
    pub(crate) id: String,
    /// The OCI process, as JSON.
    process: Value,
    view: watch::Sender<ExecView>,
    io: Mutex<Option<ProcessIo>>,
    streams: Streams,
}

/// A call to add one.
#[derive(Debug)]
pub(crate) struct ExecRequest {
    id: String,
    /// The OCI process, as JSON.
    process: Value,
    streams: Streams,
}

impl ExecRequest {
    /// Refuses what is no process, before anything is asked of its container.
    pub(crate) fn parse(request: ExecProcessRequest) -> Result<Self, Error> {
        let id = request.exec_id;
        names::check("exec id", &id)?;
        let streams = Streams {
            stdin: request.stdin,
            stdout: request.stdout,
            stderr: request.stderr,
            terminal: request.terminal,
        };
        streams.admit()?;
        let wrong = |reason: String| Error::Argument {
            key: format!("process of exec {id}"),
            reason,
        };
        let spec = request.spec.unwrap_or_default().value;
        let mut process: Value =
            serde_json::from_slice(&spec).map_err(|e| wrong(format!("not JSON: {e}")))?;
        let object = process
            .as_object_mut()
            .ok_or_else(|| wrong("not a JSON object".to_owned()))?;
        object.insert("terminal".to_owned(), json!(streams.terminal));
        Ok(Self {
            id,
            process,
            streams,
        })
    }
}

impl Exec {
    pub(crate) fn view(&self) -> ExecView {
        *self.view.borrow()
    }

    pub(crate) fn streams(&self) -> &Streams {
        &self.streams
    }

    pub(crate) fn is_running(&self) -> bool {
        matches!(self.view().state, ExecState::Starting | ExecState::Running)
    }

    pub(crate) async fn wait(&self) -> Exit {
        let mut view = self.view.subscribe();
        loop {
            if let ExecState::Stopped(exit) | ExecState::Failed(exit) =
                view.borrow_and_update().state
            {
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

    pub(crate) fn resize(&self, width: u16, height: u16) -> Result<(), Error> {
        if matches!(self.view().state, ExecState::Stopped(_)) {
            return Err(self.refuse("resize the terminal of", "it has ended"));
        }
        lock(&self.io)
            .as_ref()
            .map_or(Ok(()), |io| io.resize(width, height))
    }

    pub(crate) fn close_stdin(&self) {
        if let Some(io) = lock(&self.io).as_mut() {
            io.close_stdin();
        }
    }

    fn refuse(&self, action: &'static str, reason: &'static str) -> Error {
        Error::Exec {
            action,
            exec: self.id.clone(),
            reason,
        }
    }

    /// Signals it. Its pid is ours to reap, so it cannot have been given to another process.
    pub(crate) fn kill(&self, signal: u32) -> Result<(), Error> {
        let ExecView { state, pid } = self.view();
        match state {
            ExecState::Stopped(_) => return Err(Error::Finished(self.id.clone())),
            ExecState::Created | ExecState::Starting | ExecState::Failed(_) => {
                return Err(Error::NotStarted(self.id.clone()));
            }
            ExecState::Running => {}
        }
        match sys::kill(pid, signal.cast_signed()) {
            Err(error) if error.raw_os_error() == Some(libc::ESRCH) => {
                Err(Error::Finished(self.id.clone()))
            }
            other => other.map_err(Error::io("signalling an exec")),
        }
    }
}

/// `containerd.runc.v1.ProcessDetails{exec_id}` around an exec's pid, as the Go shim reports it.
pub(super) fn process_info(pid: u32, exec: Option<&String>) -> ProcessInfo {
    let mut info = ProcessInfo::new();
    info.pid = pid;
    if let Some(id) = exec {
        let mut details = containerd_shim_protos::shim::oci::ProcessDetails::new();
        details.exec_id.clone_from(id);
        info.info = MessageField::some(any::pack("containerd.runc.v1", &details));
    }
    info
}

impl Container {
    pub(crate) fn exec(&self, id: &str) -> Result<Arc<Exec>, Error> {
        let found = lock(&self.execs).get(id).cloned();
        found.ok_or_else(|| Error::NoProcess {
            id: self.fixed.id.clone(),
            exec: id.to_owned(),
        })
    }

    /// Adds an exec; it starts by a call of its own.
    pub(crate) fn add_exec(&self, request: ExecRequest) -> Result<(), Error> {
        let exec = Exec {
            id: request.id.clone(),
            process: request.process,
            view: watch::Sender::new(ExecView {
                state: ExecState::Created,
                pid: 0,
            }),
            io: Mutex::default(),
            streams: request.streams,
        };
        {
            let mut execs = lock(&self.execs);
            if execs.contains_key(&request.id) {
                return Err(Error::Exists(format!("exec {}", request.id)));
            }
            self.admit(Request::Exec)?;
            execs.insert(request.id.clone(), Arc::new(exec));
        }
        let mut event = TaskExecAdded::new();
        event.container_id.clone_from(&self.fixed.id);
        event.exec_id = request.id;
        self.events.send(event);
        Ok(())
    }

    /// Starts an added exec. Many may start at once.
    pub(crate) async fn start_exec(self: &Arc<Self>, id: &str) -> Result<i32, Error> {
        let exec = self.exec(id)?;
        let open = Arc::clone(&self.exec_gate).read_owned().await;
        if matches!(self.view().state, State::Stopped(_)) {
            return Err(Error::InitEnded(self.fixed.id.clone()));
        }
        self.admit(Request::Exec)?;
        let mine = exec.view.send_if_modified(|view| {
            let first = view.state == ExecState::Created;
            if first {
                view.state = ExecState::Starting;
            }
            first
        });
        if !mine {
            return Err(exec.refuse(
                "start",
                "it was started already; whether that failed or not, this needs an exec of its own",
            ));
        }
        self.running_execs.send_modify(|count| *count += 1);
        // In a task of its own: a caller that gives up must not leave a half-started process behind.
        let (this, started) = (Arc::clone(self), Arc::clone(&exec));
        let run = tokio::spawn(async move {
            let _open = open;
            // And one more: after a panic the init's end would wait for an exec that is starting for ever.
            let (of, one) = (Arc::clone(&this), Arc::clone(&started));
            let run = tokio::spawn(async move { of.run_exec(&one).await });
            let gone = |_| Err(Error::DriverGone(this.fixed.id.clone()));
            let result = run.await.unwrap_or_else(gone);
            if result.is_err() {
                started.view.send_modify(|view| {
                    view.state = ExecState::Failed(Exit {
                        status: 255,
                        at: std::time::SystemTime::now(),
                    });
                });
                this.running_execs.send_modify(|count| *count -= 1);
            }
            result
        });
        run.await
            .map_err(|_| Error::DriverGone(self.fixed.id.clone()))?
    }

    async fn run_exec(self: &Arc<Self>, exec: &Arc<Exec>) -> Result<i32, Error> {
        let owner = self.fixed.owner(&exec.id);
        let (mut io, theirs) = ProcessIo::prepare(exec.streams.clone(), owner).await?;
        let (pid, exit) = match self.launch_exec(exec, &mut io, theirs).await {
            Ok(launched) => launched,
            Err(error) => {
                io.drain().await;
                return Err(error);
            }
        };
        *lock(&exec.io) = Some(io);
        exec.view.send_modify(|view| {
            *view = ExecView {
                state: ExecState::Running,
                pid,
            }
        });

        let mut event = TaskExecStarted::new();
        event.container_id.clone_from(&self.fixed.id);
        event.exec_id.clone_from(&exec.id);
        event.pid = pid.cast_unsigned();
        self.events.send(event);
        let (this, exec) = (Arc::clone(self), Arc::clone(exec));
        tokio::spawn(async move { this.exec_ended(&exec, pid, exit.await) });
        Ok(pid)
    }

    /// `runc exec`.
    async fn launch_exec(
        &self,
        exec: &Exec,
        io: &mut ProcessIo,
        theirs: Theirs,
    ) -> Result<(i32, ExitOf), Error> {
        let fixed = &self.fixed;
        let file = |suffix: &str| fixed.bundle.join(format!("exec-{}.{suffix}", exec.id));
        let (spec_file, pid_file) = (file("json"), file("pid"));
        let socket = exec
            .streams
            .terminal
            .then(ConsoleSocket::bind)
            .transpose()?;
        let (mut command, log) = fixed.runc.command("exec");
        command
            .arg("--process")
            .arg(&spec_file)
            .arg("--detach")
            .arg("--pid-file")
            .arg(&pid_file);
        if let Some(socket) = &socket {
            command.arg("--console-socket").arg(socket.path());
        }
        command.arg(&fixed.id);
        theirs.give(&mut command);
        fs::write(&spec_file, exec.process.to_string())
            .map_err(Error::file("writing", &spec_file))?;
        let window = fixed.runc.exits.window();
        let ran = async {
            let running = fixed.runc.spawn("exec", command, log)?;
            fixed.runc.wait(running, DEADLINE).await
        };
        let result = ran.await;
        let _ = fs::remove_file(&spec_file);
        result?;
        let pid = read_pid(&pid_file)?;
        let _ = fs::remove_file(&pid_file);
        let exit = window.claim(pid);
        let connected = async {
            let console = match socket {
                Some(socket) => Some(socket.receive().await?),
                None => None,
            };
            io.start(console)
        };
        if let Err(error) = connected.await {
            // It runs already, and nobody would know of it.
            let _ = sys::kill(pid, libc::SIGKILL);
            exit.await;
            return Err(error);
        }
        Ok((pid, exit))
    }

    fn exec_ended(&self, exec: &Exec, pid: i32, exit: Exit) {
        exec.view
            .send_modify(|view| view.state = ExecState::Stopped(exit));
        let mut event = TaskExit::new();
        event.container_id.clone_from(&self.fixed.id);
        event.id.clone_from(&exec.id);
        event.pid = pid.cast_unsigned();
        event.exit_status = exit.status;
        event.exited_at = timestamp(exit.at);
        self.events.send(event);
        self.running_execs.send_modify(|count| *count -= 1);
    }

    /// Forgets an exec that has ended or was never started.
    pub(crate) async fn delete_exec(&self, id: &str) -> Result<(i32, Exit), Error> {
        let exec = self.exec(id)?;
        if exec.is_running() {
            return Err(exec.refuse("delete", "it is running; kill it first"));
        }
        let io = lock(&exec.io).take();
        if let Some(mut io) = io {
            io.drain().await;
        }
        lock(&self.execs).remove(id);
        let exit = match exec.view().state {
            ExecState::Stopped(exit) => exit,
            _ => Exit {
                status: 0,
                at: std::time::SystemTime::now(),
            },
        };
        Ok((exec.view().pid, exit))
    }
}
