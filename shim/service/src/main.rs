//! `containerd-shim-rekindle-v1`: one small process per pod that wraps runc.
//!
//! containerd starts this binary in four ways: `start` (bind a socket, leave the server behind, say
//! where it listens), without an action (be that server), `delete` (clean up after a server that
//! died), and `-info`. Rooms: `docs/DESIGN.md`.

mod any;
mod bootstrap;
mod bundle;
mod cgroups;
mod cleanup;
mod container;
mod container_image;
mod context;
mod criu;
mod data;
mod error;
mod events;
mod exits;
mod host;
mod info;
mod io;
mod keys;
mod lifecycle;
mod logging;
mod names;
mod node;
mod oom;
mod options;
mod phases;
mod programs;
mod rootfs;
mod runc;
mod server;
mod stats;
mod sys;
mod task;
mod threads;

use std::{io::Write, process::ExitCode};

use containerd_shim::Flags;

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // containerd shows what a shim writes to stderr when it cannot be started.
            let _ = writeln!(std::io::stderr(), "containerd-shim-rekindle-v1: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<(), Box<dyn std::error::Error>> {
    let args: Vec<_> = std::env::args_os().skip(1).collect();
    let flags = containerd_shim::parse(&args)?;
    if flags.version {
        return print(
            format!(
                "containerd-shim-rekindle-v1 {}\n",
                env!("CARGO_PKG_VERSION")
            )
            .as_bytes(),
        );
    }
    if flags.info {
        return print(&info::run()?);
    }
    named(&flags)?;
    match flags.action.as_str() {
        "start" => print(&bootstrap::run(&flags)?),
        "delete" => print(&cleanup::run(&flags)?),
        "" => Ok(server::run(&flags)?),
        other => Err(format!(
            "action {other:?} is not known; containerd calls start, delete or none"
        )
        .into()),
    }
}

fn named(flags: &Flags) -> Result<(), Box<dyn std::error::Error>> {
    for (flag, value) in [("-namespace", &flags.namespace), ("-id", &flags.id)] {
        if value.is_empty() {
            return Err(format!(
                "{flag} is missing; this program is started by containerd, not by hand"
            )
            .into());
        }
        names::check(flag, value)?;
    }
    Ok(())
}

fn print(bytes: &[u8]) -> Result<(), Box<dyn std::error::Error>> {
    let mut stdout = std::io::stdout();
    stdout.write_all(bytes)?;
    Ok(stdout.flush()?)
}
