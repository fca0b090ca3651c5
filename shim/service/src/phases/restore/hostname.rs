//! The host name of a restored container.
//!
//! CRIU gives a container the host name of its image: in a UTS namespace of its own, or in the sandbox's
//! where the container joins that, which renames the whole pod. So the name that is right is noted
//! before the restore and set after it.

use std::{
    ffi::OsString,
    fs::File,
    path::{Path, PathBuf},
};

use nix::{
    errno::Errno,
    sched::{CloneFlags, setns},
    unistd::{gethostname, sethostname},
};

use crate::{bundle::Spec, error::Error, threads::in_thread};

/// The name that a container has to have; none where it shares the host's.
#[derive(Debug)]
pub(super) struct Name(Option<OsString>);

impl Name {
    /// The sandbox's under CRI, else the spec's.
    pub(super) async fn of(spec: &Spec) -> Result<Self, Error> {
        if let Some(sandbox) = spec.namespace_path("uts") {
            let name = in_thread("hostname", move || {
                enter(&sandbox).and_then(|()| gethostname())
            })
            .await?;
            return name
                .map(|name| Self(Some(name)))
                .map_err(Error::io("reading the sandbox's host name"));
        }
        let own = spec.has_namespace("uts");
        Ok(Self(spec.text("/hostname").filter(|_| own).map(Into::into)))
    }

    /// Gives it to the UTS namespace of `pid`.
    pub(super) async fn give(self, pid: i32) -> Result<(), Error> {
        let Some(name) = self.0 else { return Ok(()) };
        let namespace = PathBuf::from(format!("/proc/{pid}/ns/uts"));
        let given = in_thread("hostname", move || {
            enter(&namespace).and_then(|()| sethostname(name))
        })
        .await?;
        given.map_err(Error::io("giving the restored container its host name"))
    }
}

/// A namespace is a thread's property: to be called on a thread that ends with it.
fn enter(namespace: &Path) -> nix::Result<()> {
    let file = File::open(namespace)
        .map_err(|e| e.raw_os_error().map_or(Errno::ENOENT, Errno::from_raw))?;
    setns(file, CloneFlags::CLONE_NEWUTS)
}
