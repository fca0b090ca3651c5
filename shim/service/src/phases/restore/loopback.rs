//! The loopback device of a restored container.
//!
//! runc brings it up in a network namespace that it makes for a container, but not for one that CRIU restores; and a
//! server's own connections go over it, and whoever looks from inside whether it is well. A namespace that has a path
//! is somebody else's: of the sandbox, or of who made it and its devices.

use std::path::PathBuf;

use nix::sched::CloneFlags;

use crate::{bundle::Spec, error::Error, sys, threads::in_namespace};

/// Brings it up in the network namespace of `pid`, where that was made for it.
pub(super) async fn bring_up(spec: &Spec, pid: i32) -> Result<(), Error> {
    if !spec.has_namespace("network") || spec.namespace_path("network").is_some() {
        return Ok(());
    }
    let namespace = PathBuf::from(format!("/proc/{pid}/ns/net"));
    let of = (namespace, CloneFlags::CLONE_NEWNET);
    let up = in_namespace("loopback", of, sys::loopback_up);
    up.await?.map_err(Error::io(
        "bringing up the restored container's loopback device",
    ))
}
