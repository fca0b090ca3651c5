//! What a container's phases work with: what all containers of this shim share, and what of one
//! container never changes.

use std::{
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use rekindle_checkpoint::archive::{Made, open_dir};
use rekindle_core::{config::NodeConfig, plan::Plan};

use crate::{
    criu::CriuConfig,
    data::{Data, DatasetMount},
    error::Error,
    events::Events,
    exits::Exits,
    host::HostFacts,
    io::Owner,
    options::RuncOptions,
    phases::{restore::HostNames, warm::Warm},
    rootfs::Rootfs,
    runc::Runc,
    threads::blocking,
};

/// What every create of this shim shares.
#[derive(Debug, Clone)]
pub(crate) struct Shared {
    pub(crate) namespace: String,
    /// containerd's own socket, for the CLI to ask it what the shim cannot.
    pub(crate) containerd: String,
    pub(crate) node: Arc<NodeConfig>,
    pub(crate) host: HostFacts,
    pub(crate) exits: Exits,
    pub(crate) events: Events,
    pub(crate) data: Data,
    pub(crate) host_names: HostNames,
}

/// What a create has put where others keep things too: only that may be removed again.
#[derive(Debug, Default)]
pub(crate) struct Staged {
    /// Whether there is something of it in the writable layer, which was empty before.
    pub(crate) upper: bool,
    /// What it made in the `/dev/shm` of the pod, and where that lies.
    pub(crate) shm: Option<(PathBuf, Made)>,
}

/// Everything of a container that does not change.
#[derive(Debug)]
pub(crate) struct Fixed {
    pub(crate) id: String,
    pub(crate) bundle: PathBuf,
    pub(crate) shared: Shared,
    pub(crate) plan: Plan,
    pub(crate) options: RuncOptions,
    pub(crate) runc: Runc,
    pub(crate) rootfs: Rootfs,
    /// Held so that no dataset is removed under it.
    pub(crate) _datasets: Vec<DatasetMount>,
    /// What it goes by with `warm-start: auto`.
    pub(crate) warm: Option<Warm>,
    pub(crate) criu: CriuConfig,
    pub(crate) staged: Mutex<Staged>,
    /// The spec's `cgroupsPath`.
    pub(crate) cgroup: Option<String>,
    /// Device nodes of a GPU: what makes a checkpoint impossible in this build.
    pub(crate) gpu_devices: Vec<String>,
    /// Whether the end of the init leaves other processes behind: without a PID namespace of its own
    /// the kernel does not end them.
    pub(crate) shares_pids: bool,
}

impl Fixed {
    /// Of the streams of its init, or of an exec: a logging program is told the id of that, as by the Go shim.
    pub(crate) fn owner<'a>(&'a self, id: &'a str) -> Owner<'a> {
        Owner {
            namespace: &self.shared.namespace,
            id,
            uid: self.options.io_uid,
            gid: self.options.io_gid,
            exits: &self.shared.exits,
        }
    }

    pub(crate) fn staged(&self) -> MutexGuard<'_, Staged> {
        self.staged.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Removes what runc has of the container, and what was staged for it.
    pub(crate) async fn take_back(&self) -> Result<(), Error> {
        self.runc.remove(self.cgroup.as_deref()).await?;
        self.rootfs.unmount();
        let Staged { upper, shm } = std::mem::take(&mut *self.staged());
        if let Some((folder, made)) = shm {
            // A pod that is gone has none any more.
            blocking(move || open_dir(&folder).map(|folder| made.remove(&folder)).ok()).await?;
        }
        if upper {
            self.rootfs.clear_upper().await?;
        }
        Ok(())
    }
}
