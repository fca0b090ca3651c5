//! What a container uses, in the messages from which containerd computes CPU and memory of a pod.
//!
//! ```text
//!   a pid  ── begin ──▶  its cgroup  ── metrics ──▶  cgroups.v1.Metrics | cgroups.v2.Metrics
//!                             └─────────────────────▶  TaskOOM, until the end
//! ```
//!
//! The cgroup is looked up once, while its init is known to live: afterwards the pid may be another's.
//! It outlives the init until the container is deleted, and so do the metrics.

mod cgroup;
mod text;
mod v1;
mod v2;

use std::sync::{Arc, Mutex, OnceLock, PoisonError};

pub(crate) use cgroup::{Cgroup, Folder};
use containerd_shim_protos::{events::task::TaskOOM, protobuf::well_known_types::any::Any};

use crate::{any, error::Error, events::Events, oom};

/// Measures one container.
#[derive(Debug, Default)]
pub(crate) struct Usage {
    cgroup: OnceLock<Arc<Cgroup>>,
    oom: Mutex<Option<oom::Watch>>,
}

impl Usage {
    /// Begins with the container's init. A container that cannot be measured runs all the same.
    pub(crate) fn begin(&self, id: &str, pid: i32, events: &Events) {
        let cgroup = match Cgroup::of(pid) {
            Ok(cgroup) => self.cgroup.get_or_init(|| Arc::new(cgroup)),
            Err(error) => {
                tracing::warn!(%id, %error, "no metrics and no OOM events");
                return;
            }
        };
        let mut event = TaskOOM::new();
        id.clone_into(&mut event.container_id);
        let events = events.clone();
        match oom::watch(cgroup, move || events.send(event.clone())) {
            Ok(watch) => *self.oom.lock().unwrap_or_else(PoisonError::into_inner) = watch,
            Err(error) => tracing::warn!(%id, %error, "no OOM events"),
        }
    }

    /// Tells of an OOM kill that nobody was told of yet. Called before the container's end is told, so
    /// that whoever hears of the end can know its reason.
    pub(crate) async fn end(&self) {
        let watch = self
            .oom
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        if let Some(watch) = watch {
            watch.finish().await;
        }
    }

    /// What container `id` uses now.
    pub(crate) async fn metrics(&self, id: &str) -> Result<Any, Error> {
        let gone = || Error::NoCgroup(id.to_owned());
        let cgroup = Arc::clone(self.cgroup.get().ok_or_else(gone)?);
        // The kernel adds up per CPU on a read of memory.stat: milliseconds on a large machine.
        let collected = tokio::task::spawn_blocking(move || collect(&cgroup)).await;
        collected.ok().flatten().ok_or_else(gone)
    }
}

/// Bytes of memory that the container of `pid` has in no file of a disk, its tmpfs included, and what of it is swapped out.
/// `None` where that cannot be told. Blocks.
pub(crate) fn memory_of(pid: i32) -> Option<u64> {
    match Cgroup::of(pid).ok()? {
        Cgroup::V1(all) => {
            let stat = all.get("memory")?.table("memory.stat")?;
            // Those of the cgroups below it too.
            let keys = ["total_rss", "total_shmem", "total_swap"];
            Some(keys.map(|key| stat.get(key)).iter().sum())
        }
        Cgroup::V2(folder) => {
            let stat = folder.table("memory.stat")?;
            let swapped = folder.number("memory.swap.current", 0).unwrap_or(0);
            Some(stat.get("anon") + stat.get("shmem") + swapped)
        }
    }
}

/// `None` when the cgroup is gone.
fn collect(cgroup: &Cgroup) -> Option<Any> {
    if !cgroup.exists() {
        return None;
    }
    match cgroup {
        Cgroup::V1(all) => Some(any::pack("io.containerd.cgroups.v1", &v1::metrics(all))),
        Cgroup::V2(folder) => Some(any::pack("io.containerd.cgroups.v2", &v2::metrics(folder))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_types_are_named_as_containerd_registers_them() {
        let name = |cgroup| collect(&cgroup).map(|any| any.type_url);
        let here = Folder::new("/");
        let v1 = Cgroup::V1([("memory".to_owned(), here.clone())].into());
        assert_eq!(
            name(v1).as_deref(),
            Some("io.containerd.cgroups.v1.Metrics")
        );
        let v2 = Cgroup::V2(here);
        assert_eq!(
            name(v2).as_deref(),
            Some("io.containerd.cgroups.v2.Metrics")
        );
        assert_eq!(name(Cgroup::V2(Folder::new("/proc/none"))), None);
    }

    #[tokio::test]
    async fn a_container_without_a_cgroup_is_not_found() {
        let error = Usage::default().metrics("web").await.unwrap_err();
        assert!(matches!(&error, Error::NoCgroup(id) if id == "web"));
    }
}
