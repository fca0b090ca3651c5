//! What a container's phases work with: what all containers of this shim share, and what of one
//! container never changes.

use std::{
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use rekindle_core::{config::NodeConfig, plan::Plan};

use crate::{
    bundle::RuncOptions,
    criu::CriuConfig,
    data::{Data, DatasetMount},
    error::Error,
    events::Events,
    exits::Exits,
    host::HostFacts,
    rootfs::Rootfs,
    runc::Runc,
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
    pub(crate) criu: CriuConfig,
    /// Whether this create has put something into the writable layer: only that may be removed again.
    pub(crate) staged: Arc<AtomicBool>,
    /// The spec's `cgroupsPath`.
    pub(crate) cgroup: Option<String>,
    /// Device nodes of a GPU: what makes a checkpoint impossible in this build.
    pub(crate) gpu_devices: Vec<String>,
    /// Whether the end of the init leaves other processes behind: without a PID namespace of its own
    /// the kernel does not end them.
    pub(crate) shares_pids: bool,
}

impl Fixed {
    /// Removes what runc has of the container, and what was staged for it.
    pub(crate) async fn take_back(&self) -> Result<(), Error> {
        self.runc.remove(self.cgroup.as_deref()).await?;
        self.rootfs.unmount();
        if self.staged.swap(false, Ordering::Relaxed) {
            self.rootfs.clear_upper().await?;
        }
        Ok(())
    }
}
