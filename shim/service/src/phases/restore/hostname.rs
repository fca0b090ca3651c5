//! The host name of a restored container.
//!
//! CRIU gives a container the host name of its image: in a UTS namespace of its own, or in the sandbox's
//! where the container joins that, which renames the whole pod. So the name that is right is noted
//! before the restore and set after it. Two containers of a pod may be restored at once: what the first has
//! noted holds for all, for what the sandbox is called meanwhile may be an image's.

use std::{
    collections::HashMap,
    ffi::OsString,
    path::PathBuf,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use nix::{
    sched::CloneFlags,
    unistd::{gethostname, sethostname},
};

use crate::{bundle::Spec, error::Error, threads::in_namespace};

const UTS: CloneFlags = CloneFlags::CLONE_NEWUTS;

/// What the sandboxes are called in which something is being restored.
#[derive(Debug, Clone, Default)]
pub(crate) struct HostNames(Arc<Noted>);

#[derive(Debug, Default)]
struct Noted {
    /// Held from the look at what is noted until it is: nobody begins a restore in between.
    turn: tokio::sync::Mutex<()>,
    /// By the path of the sandbox's namespace: the restores that need it, and the name.
    names: Mutex<HashMap<PathBuf, (usize, OsString)>>,
}

/// A restore that needs a name to be remembered.
#[derive(Debug)]
struct Needed(Arc<Noted>, PathBuf);

impl Drop for Needed {
    fn drop(&mut self) {
        let mut names = self.0.names();
        if let Some((count, _)) = names.get_mut(&self.1) {
            *count -= 1;
            if *count == 0 {
                names.remove(&self.1);
            }
        }
    }
}

impl Noted {
    fn names(&self) -> MutexGuard<'_, HashMap<PathBuf, (usize, OsString)>> {
        self.names.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl HostNames {
    /// The name of a sandbox, which `read` tells where nothing is being restored in it.
    async fn of<E>(
        &self,
        sandbox: PathBuf,
        read: impl Future<Output = Result<OsString, E>>,
    ) -> Result<(OsString, Needed), E> {
        let _turn = self.0.turn.lock().await;
        let noted = self.0.names().get(&sandbox).map(|(_, name)| name.clone());
        let name = match noted {
            Some(name) => name,
            None => read.await?,
        };
        let mut names = self.0.names();
        names
            .entry(sandbox.clone())
            .or_insert_with(|| (0, name.clone()))
            .0 += 1;
        Ok((name, Needed(Arc::clone(&self.0), sandbox)))
    }
}

/// The name that a container has to have; none where it shares the host's.
#[derive(Debug)]
pub(super) struct Name(Option<OsString>, Option<Needed>);

impl Name {
    /// The sandbox's under CRI, else the spec's.
    pub(super) async fn of(spec: &Spec, names: &HostNames) -> Result<Self, Error> {
        if let Some(sandbox) = spec.namespace_path("uts") {
            let namespace = sandbox.clone();
            let read = async move {
                let name = in_namespace("hostname", (namespace, UTS), gethostname);
                name.await?
                    .map_err(Error::io("reading the sandbox's host name"))
            };
            let (name, needed) = names.of(sandbox, read).await?;
            return Ok(Self(Some(name), Some(needed)));
        }
        let own = spec.has_namespace("uts");
        let name = spec.text("/hostname").filter(|_| own).map(Into::into);
        Ok(Self(name, None))
    }

    /// Gives it to the UTS namespace of `pid`.
    pub(super) async fn give(&self, pid: i32) -> Result<(), Error> {
        self.give_to(PathBuf::from(format!("/proc/{pid}/ns/uts")))
            .await
    }

    /// Gives it back to the sandbox, whose containers go on without the one that could not be restored.
    pub(super) async fn give_back(&self) -> Result<(), Error> {
        match &self.1 {
            Some(Needed(_, sandbox)) => self.give_to(sandbox.clone()).await,
            None => Ok(()),
        }
    }

    async fn give_to(&self, namespace: PathBuf) -> Result<(), Error> {
        let Some(name) = self.0.clone() else {
            return Ok(());
        };
        let given = in_namespace("hostname", (namespace, UTS), move || sethostname(name)).await?;
        given.map_err(Error::io("giving the restored container its host name"))
    }
}

#[cfg(test)]
mod tests {
    use std::io;

    use super::*;

    /// The promise: a pod keeps its name, however many of its containers are restored at once.
    #[tokio::test]
    async fn what_the_first_has_noted_holds_until_the_last_is_done() {
        let names = HostNames::default();
        let sandbox = || PathBuf::from("/proc/7/ns/uts");
        let read = async |name: &str| Ok::<_, io::Error>(OsString::from(name));
        let (first, one) = names.of(sandbox(), read("pod")).await.unwrap();
        // By now CRIU has given the sandbox the image's name.
        let (second, two) = names.of(sandbox(), read("image")).await.unwrap();
        assert_eq!((first, second), ("pod".into(), "pod".into()));
        drop(one);
        let (third, three) = names.of(sandbox(), read("image")).await.unwrap();
        assert_eq!(third, "pod");
        drop((two, three));
        let (later, _) = names.of(sandbox(), read("renamed")).await.unwrap();
        assert_eq!(later, "renamed");
        // Another pod's is its own, and one that cannot be read is noted nowhere.
        let refused = names.of("/proc/8/ns/uts".into(), async { Err::<OsString, _>(()) });
        assert!(refused.await.is_err());
        let (other, _) = names
            .of("/proc/8/ns/uts".into(), read("other"))
            .await
            .unwrap();
        assert_eq!(other, "other");
    }
}
