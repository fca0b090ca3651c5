//! `delete`: containerd calls it after a shim has gone, cleanly or not. Nothing of the container stays.

use std::{fs, path::Path, path::PathBuf, time::SystemTime};

use containerd_shim::Flags;
use containerd_shim_protos::{api::DeleteResponse, protobuf::Message};

use crate::{
    bundle::{INIT_PID, Remembered, Spec},
    cgroups,
    error::Error,
    exits::Exits,
    exits::timestamp,
    phases::restore,
    rootfs::Rootfs,
    runc::{Runc, read_pid},
};

/// Cleans up, and returns what to print.
pub(crate) fn run(flags: &Flags) -> Result<Vec<u8>, Error> {
    let bundle = if flags.bundle.is_empty() {
        std::env::current_dir().map_err(Error::io("finding the bundle"))?
    } else {
        PathBuf::from(&flags.bundle)
    };
    let options = Remembered::read(&bundle).options;
    let exits = Exits::default();
    let runc = Runc {
        binary: options.binary(),
        root: options.root(&flags.namespace),
        systemd_cgroup: options.systemd_cgroup,
        bundle: bundle.clone(),
        id: flags.id.clone(),
        exits: exits.clone(),
    };
    let cgroup = Spec::read(&bundle)
        .ok()
        .and_then(|spec| spec.text("/linux/cgroupsPath").map(str::to_owned));
    // After an orderly end runc's state is gone and there is nothing to do: no runc, no runtime.
    if runc.has_state() {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(Error::io("starting the runtime"))?;
        runtime.block_on(async {
            let reaper = tokio::spawn(exits.reap());
            if let Err(error) = runc.remove(cgroup.as_deref()).await {
                // The rest is cleaned all the same; containerd shows stderr.
                report(&error);
            }
            reaper.abort();
        });
    } else if let Some(cgroup) = &cgroup {
        cgroups::remove_empty(cgroup);
    }
    // Only now: tasks whose pager is gone would read zeros.
    restore::end_orphaned_pager(&bundle);
    Rootfs::new(&bundle, Vec::new()).unmount();
    remove_dead_socket(&bundle);

    let mut response = DeleteResponse::new();
    response.pid = read_pid(&bundle.join(INIT_PID))
        .unwrap_or_default()
        .cast_unsigned();
    response.exit_status = 128 + libc::SIGKILL.cast_unsigned();
    response.exited_at = timestamp(SystemTime::now());
    response.write_to_bytes().map_err(|e| Error::Io {
        doing: "answering containerd",
        source: std::io::Error::other(e),
    })
}

#[allow(
    clippy::print_stderr,
    reason = "containerd logs what delete writes to stderr"
)]
fn report(error: &dyn std::error::Error) {
    eprintln!("containerd-shim-rekindle-v1 delete: {error}");
}

/// A killed shim leaves its socket; another container of the pod may still be served there.
fn remove_dead_socket(bundle: &Path) {
    let Ok(address) = fs::read_to_string(bundle.join("address")) else {
        return;
    };
    let path = address.trim_start_matches("unix://");
    if std::os::unix::net::UnixStream::connect(path).is_err() {
        let _ = fs::remove_file(path);
    }
}
