//! A further process in a container.

use super::{Answer, Container, Ended, State, ask};
use crate::fifo::Stdio;
use crate::spec;
use anyhow::{Context, Result};
use containerd_client::services::v1 as api;
use containerd_client::types::v1::Process;
use prost_types::Any;

/// A process that is being described.
#[derive(Debug)]
pub struct ExecBuilder<'c, 'n> {
    container: &'c Container<'n>,
    exec_id: String,
    args: Vec<String>,
    env: Vec<String>,
    cwd: String,
    user: (u32, u32),
    open_files: Option<u64>,
    terminal: bool,
    stdin: bool,
    detached: bool,
    log_uri: Option<String>,
}

impl<'c, 'n> ExecBuilder<'c, 'n> {
    pub(super) fn new(container: &'c Container<'n>, exec_id: &str, args: &[&str]) -> Self {
        ExecBuilder {
            container,
            exec_id: exec_id.to_owned(),
            args: args.iter().map(|&arg| arg.to_owned()).collect(),
            env: Vec::new(),
            cwd: "/".into(),
            user: (0, 0),
            open_files: None,
            terminal: false,
            stdin: false,
            detached: false,
            log_uri: None,
        }
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

    /// How many files it may have open.
    pub fn open_files(mut self, limit: u64) -> Self {
        self.open_files = Some(limit);
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

    /// Adds it to the container, not started; containerd's answer apart, for tests of refusals.
    pub async fn try_add(self) -> Result<(Exec<'c, 'n>, Answer<()>)> {
        let name = format!("{}-{}", self.container.id, self.exec_id);
        let io = match &self.log_uri {
            _ if self.detached => Stdio::none(),
            Some(uri) => Stdio::to(uri, self.terminal),
            None => Stdio::open(self.container.node, &name, self.stdin, self.terminal)?,
        };
        let mut process = spec::process(&self.args, &self.env, &self.cwd, self.user, self.terminal);
        if let Some(limit) = self.open_files {
            process["rlimits"] =
                serde_json::json!([{"type": "RLIMIT_NOFILE", "hard": limit, "soft": limit}]);
        }
        let request = api::ExecProcessRequest {
            container_id: self.container.id.clone(),
            stdin: io.stdin.clone(),
            stdout: io.stdout.clone(),
            stderr: io.stderr.clone(),
            terminal: self.terminal,
            spec: Some(Any {
                type_url: "types.containerd.io/opencontainers/runtime-spec/1/Process".into(),
                value: serde_json::to_vec(&process)?,
            }),
            exec_id: self.exec_id.clone(),
        };
        let answer = self
            .container
            .client
            .tasks()
            .exec(ask(request))
            .await
            .map(drop);
        Ok((
            Exec {
                container: self.container,
                exec_id: self.exec_id,
                io,
            },
            answer,
        ))
    }

    /// Adds it to the container, not started.
    pub async fn add(self) -> Result<Exec<'c, 'n>> {
        let what = format!("adding process {} to {}", self.exec_id, self.container.id);
        let (exec, answer) = self.try_add().await?;
        answer.context(what)?;
        Ok(exec)
    }

    /// Adds and starts it.
    pub async fn run(self) -> Result<Exec<'c, 'n>> {
        let exec = self.add().await?;
        exec.start().await.with_context(|| {
            format!("starting process {} of {}", exec.exec_id, exec.container.id)
        })?;
        Ok(exec)
    }
}

/// A process added to a container.
#[derive(Debug)]
pub struct Exec<'c, 'n> {
    container: &'c Container<'n>,
    exec_id: String,
    io: Stdio,
}

impl<'c, 'n> Exec<'c, 'n> {
    /// Whatever has this id in the container, whether there is one or not.
    pub(super) fn of(container: &'c Container<'n>, exec_id: &str) -> Self {
        Exec {
            container,
            exec_id: exec_id.to_owned(),
            io: Stdio::none(),
        }
    }

    /// Its stdio.
    pub fn io(&self) -> &Stdio {
        &self.io
    }

    /// Starts it; the pid.
    pub async fn start(&self) -> Answer<u32> {
        self.container.start_exec(&self.exec_id).await
    }

    /// Its process record.
    pub async fn process(&self) -> Answer<Process> {
        self.container.process_of(&self.exec_id).await
    }

    /// Running, stopped, …
    pub async fn state(&self) -> Answer<State> {
        Ok(self.process().await?.status())
    }

    /// Waits for its end.
    pub async fn wait(&self) -> Answer<Ended> {
        self.container.wait_for(&self.exec_id).await
    }

    /// Sends it a signal.
    pub async fn kill(&self, signal: u32) -> Answer<()> {
        self.container.kill_exec(&self.exec_id, signal).await
    }

    /// Ends its stdin from containerd's side.
    pub async fn close_stdin(&self) -> Answer<()> {
        self.container.close(&self.exec_id).await
    }

    /// Sets the size of its terminal.
    pub async fn resize(&self, width: u32, height: u32) -> Answer<()> {
        self.container.resize_of(&self.exec_id, width, height).await
    }

    /// Deletes it, which must have ended; how it ended.
    pub async fn delete(&self) -> Answer<Ended> {
        self.container.delete_exec(&self.exec_id).await
    }
}
