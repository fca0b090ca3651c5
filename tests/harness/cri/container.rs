//! A container of a pod.

use super::{Answer, Line, Pod, ask, log};
use crate::{Count, poll};
use anyhow::{Context, Result, bail};
use k8s_cri::v1 as api;
use std::fmt;
use tonic::Status;

/// A container that was created.
pub struct CriContainer<'p, 'n> {
    pod: &'p Pod<'n>,
    id: String,
    log: String,
    termination: String,
}

impl fmt::Debug for CriContainer<'_, '_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CriContainer")
            .field("id", &self.id)
            .finish_non_exhaustive()
    }
}

/// What a command in a container said, and how it ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Output {
    /// Its exit code.
    pub code: i32,
    /// Its stdout.
    pub out: String,
    /// Its stderr.
    pub err: String,
}

impl<'p, 'n> CriContainer<'p, 'n> {
    pub(super) fn new(
        pod: &'p Pod<'n>,
        id: String,
        log: String,
        termination: String,
    ) -> CriContainer<'p, 'n> {
        CriContainer {
            pod,
            id,
            log,
            termination,
        }
    }

    /// Its id.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// The pod it is of.
    pub fn pod(&self) -> &'p Pod<'n> {
        self.pod
    }

    /// What it uses.
    pub async fn stats(&self) -> Answer<api::ContainerStats> {
        let request = api::ContainerStatsRequest {
            container_id: self.id.clone(),
        };
        let answer = self.pod.cri.service().container_stats(ask(request)).await?;
        answer
            .into_inner()
            .stats
            .ok_or_else(|| Status::internal("no stats in the answer"))
    }

    /// Starts it.
    pub async fn start(&self) -> Answer<()> {
        let request = api::StartContainerRequest {
            container_id: self.id.clone(),
        };
        self.pod
            .cri
            .service()
            .start_container(ask(request))
            .await
            .map(drop)
    }

    /// Asks it to end, and ends it after `grace` seconds.
    pub async fn stop(&self, grace: i64) -> Answer<()> {
        let request = api::StopContainerRequest {
            container_id: self.id.clone(),
            timeout: grace,
        };
        self.pod
            .cri
            .service()
            .stop_container(ask(request))
            .await
            .map(drop)
    }

    /// Removes it, which ends it.
    pub async fn remove(&self) -> Answer<()> {
        let request = api::RemoveContainerRequest {
            container_id: self.id.clone(),
        };
        self.pod
            .cri
            .service()
            .remove_container(ask(request))
            .await
            .map(drop)
    }

    /// What the runtime says about it.
    pub async fn status(&self) -> Answer<api::ContainerStatus> {
        let request = api::ContainerStatusRequest {
            container_id: self.id.clone(),
            verbose: false,
        };
        let answer = self
            .pod
            .cri
            .service()
            .container_status(ask(request))
            .await?;
        answer
            .into_inner()
            .status
            .ok_or_else(|| Status::internal("no status in the answer"))
    }

    /// Its state.
    pub async fn state(&self) -> Answer<api::ContainerState> {
        Ok(self.status().await?.state())
    }

    /// Waits for its end; its status then.
    pub async fn ended(&self) -> Result<api::ContainerStatus> {
        let what = format!("the end of container {}", self.id);
        poll::until(&what, async || {
            let status = self.status().await?;
            Ok((status.state() == api::ContainerState::ContainerExited).then_some(status))
        })
        .await
    }

    /// Its first process, as the host counts.
    pub async fn pid(&self) -> Result<u32> {
        let processes = self.pod.node().processes_of(&self.id)?;
        let first = |pid: &u32| {
            let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
            let inside = status
                .lines()
                .find_map(|line| line.strip_prefix("NSpid:").map(str::to_owned));
            inside.is_some_and(|pids| pids.split_whitespace().last() == Some("1"))
        };
        let mut pids = processes.into_iter().map(|(pid, _)| pid);
        pids.find(first)
            .with_context(|| format!("container {} has no first process", self.id))
    }

    /// Runs a command in it to its end.
    pub async fn exec(&self, args: &[&str]) -> Answer<Output> {
        let request = api::ExecSyncRequest {
            container_id: self.id.clone(),
            cmd: args.iter().map(|&arg| arg.to_owned()).collect(),
            timeout: 60,
        };
        let answer = self
            .pod
            .cri
            .service()
            .exec_sync(ask(request))
            .await?
            .into_inner();
        Ok(Output {
            code: answer.exit_code,
            out: String::from_utf8_lossy(&answer.stdout).into_owned(),
            err: String::from_utf8_lossy(&answer.stderr).into_owned(),
        })
    }

    /// The stdout of a shell line in it, which must succeed; without the newline at its end.
    pub async fn shell(&self, line: &str) -> Result<String> {
        let output = self.exec(&["sh", "-c", line]).await?;
        match output {
            Output { code: 0, out, .. } => Ok(out.trim_end().to_owned()),
            other => bail!("{line:?} in container {}: {other:?}", self.id),
        }
    }

    /// Dumps it the way `kubelet`'s checkpoint API does, into an archive on the node.
    pub async fn checkpoint(&self, archive: &str) -> Answer<()> {
        let request = api::CheckpointContainerRequest {
            container_id: self.id.clone(),
            location: archive.to_owned(),
            timeout: 0,
        };
        self.pod
            .cri
            .service()
            .checkpoint_container(ask(request))
            .await
            .map(drop)
    }

    /// The lines of its log so far.
    pub fn log(&self) -> Result<Vec<Line>> {
        let path = self.pod.node().path(&self.log);
        let text = std::fs::read_to_string(&path)
            .with_context(|| format!("reading {}", path.display()))?;
        Ok(log::parse(&text))
    }

    /// What it has written to one stream, a line each.
    pub fn said(&self, stream: &str) -> Result<String> {
        let lines = self.log()?.into_iter().filter(|line| line.stream == stream);
        Ok(lines.map(|line| line.text + "\n").collect())
    }

    /// Waits until its stdout satisfies `enough`.
    pub async fn says(&self, what: &str, enough: impl Fn(&str) -> bool) -> Result<String> {
        let said = poll::until(what, async || {
            Ok(Some(self.said("stdout")?).filter(|text| enough(text)))
        });
        said.await
            .with_context(|| format!("the log is {:?}", self.log()))
    }

    /// Waits until the counter in it has come to `n`.
    pub async fn counts_to(&self, n: u64) -> Result<Count> {
        let enough = |text: &str| Count::last(text).is_some_and(|count| count.n >= n);
        let text = self.says("the counter", enough).await?;
        Count::last(&text).context("the output is not a counter's")
    }

    /// What it wrote into its termination log.
    pub fn last_words(&self) -> Result<String> {
        Ok(std::fs::read_to_string(
            self.pod.node().path(&self.termination),
        )?)
    }
}
