//! `start`: bind the pod's socket, leave the server behind, say where it listens.
//!
//! This runs for every container, so it does nothing else: no runtime, one small read of config.json.
//! Three handshakes exist. containerd 2.3 sends `BootstrapParams` on stdin and reads `BootstrapResult`;
//! 2.0 to 2.2 and 1.7 read JSON. The latter two cannot be told apart from here and 1.7 refuses version
//! 3, so both are offered version 2, which every containerd speaks; the server answers to both.

use std::{
    fs,
    io::{self, IsTerminal, Read},
    os::{
        fd::AsRawFd,
        unix::{
            fs::DirBuilderExt,
            net::{UnixListener, UnixStream},
            process::CommandExt,
        },
    },
    path::Path,
    process::{Command, Stdio},
};

use containerd_shim::{
    Flags,
    bootstrap::{BootstrapParams, BootstrapResult},
};
use containerd_shim_protos::protobuf::{Message, well_known_types::any::Any};
use rustix::{
    process::getpid,
    thread::{CoreSchedulingScope, create_core_scheduling_cookie},
};

use crate::{bundle::Annotations, error::Error, node, options::RuncOptions};

/// Where the listening socket is in the server.
pub(crate) const LISTENER_FD: i32 = 3;
/// What groups containers into one shim, in this order (containerd `manager_linux.go`).
const GROUP_LABELS: [&str; 2] = [
    "io.containerd.runc.v2.group",
    "io.kubernetes.cri.sandbox-id",
];
/// Most that is read from stdin, as containerd's own shim.
const MAX_INPUT: u64 = 10 << 20;

/// What containerd handed over.
struct Handshake {
    options: Option<Any>,
    /// containerd 2.3's protocol.
    bootstrap: bool,
    ttrpc_address: String,
    grpc_address: String,
    socket_dir: String,
}

/// Does it, and returns what to print.
pub(crate) fn run(flags: &Flags) -> Result<Vec<u8>, Error> {
    let handshake = Handshake::read(flags)?;
    let bundle = std::env::current_dir().map_err(Error::io("finding the bundle"))?;
    let address = address(
        flags,
        &bundle,
        &handshake.grpc_address,
        &handshake.socket_dir,
    )?;
    let options = RuncOptions::parse(handshake.options.as_ref())?;
    let listener = bind(&address)?;
    if let Some(listener) = &listener
        // The server would find a wrong configuration too, and could tell nobody but the log.
        && let Err(error) =
            node::config().and_then(|_| launch(flags, &handshake, listener, &options))
    {
        // The next start of this pod must not take it for a healthy shim's.
        let _ = fs::remove_file(&address);
        return Err(error);
    }
    let address = format!("unix://{address}");
    // containerd 1.7 finds a shim again by this file after its own restart.
    fs::write("address", &address).map_err(Error::file("writing", "address"))?;
    if handshake.bootstrap {
        let result = BootstrapResult {
            version: 3,
            address,
            protocol: "ttrpc".to_owned(),
            ..Default::default()
        };
        return result.write_to_bytes().map_err(|e| Error::Io {
            doing: "answering containerd",
            source: io::Error::other(e),
        });
    }
    let answer = serde_json::json!({ "version": 2, "address": address, "protocol": "ttrpc" });
    Ok(answer.to_string().into_bytes())
}

impl Handshake {
    fn read(flags: &Flags) -> Result<Self, Error> {
        let mut input = Vec::new();
        if !io::stdin().is_terminal() {
            io::stdin()
                .lock()
                .take(MAX_INPUT)
                .read_to_end(&mut input)
                .map_err(Error::io("reading stdin"))?;
        }
        let env = |name: &str| std::env::var(name).unwrap_or_default();
        // An `Any` of the older handshake parses as these parameters too, with its type in the id's place.
        let params = BootstrapParams::parse_from_bytes(&input)
            .ok()
            .filter(|params| params.instance_id == flags.id);
        Ok(match params {
            Some(params) => Self {
                options: params.extensions.iter().find_map(|e| {
                    let any = e.value.as_ref()?;
                    RuncOptions::parse(Some(any)).is_ok().then(|| any.clone())
                }),
                bootstrap: true,
                ttrpc_address: params.containerd_ttrpc_address.clone(),
                grpc_address: params.containerd_grpc_address.clone(),
                socket_dir: params.socket_dir.clone().unwrap_or_default(),
            },
            None => Self {
                options: Any::parse_from_bytes(&input)
                    .ok()
                    .filter(|any| !any.type_url.is_empty()),
                bootstrap: false,
                ttrpc_address: env("TTRPC_ADDRESS"),
                grpc_address: if flags.address.is_empty() {
                    env("GRPC_ADDRESS")
                } else {
                    flags.address.clone()
                },
                socket_dir: String::new(),
            },
        })
    }
}

/// The socket's path: one for each pod, containerd and namespace.
pub(crate) fn address(
    flags: &Flags,
    bundle: &Path,
    grpc_address: &str,
    socket_dir: &str,
) -> Result<String, Error> {
    let annotations = Annotations::read(bundle)?.annotations;
    let group = GROUP_LABELS
        .iter()
        .find_map(|label| annotations.get(*label))
        .unwrap_or(&flags.id);
    let address = containerd_shim::socket_address(grpc_address, &flags.namespace, group);
    let path = address.trim_start_matches("unix://");
    Ok(match (socket_dir, Path::new(path).file_name()) {
        ("", _) | (_, None) => path.to_owned(),
        (folder, Some(name)) => Path::new(folder).join(name).display().to_string(),
    })
}

/// Binds the socket; `None` when the pod's shim listens there already.
fn bind(path: &str) -> Result<Option<UnixListener>, Error> {
    if let Some(folder) = Path::new(path).parent() {
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o711)
            .create(folder)
            .map_err(Error::file("creating", folder))?;
    }
    match UnixListener::bind(path) {
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => {}
        bound => return bound.map(Some).map_err(Error::file("binding", path)),
    }
    if UnixStream::connect(path).is_ok() {
        return Ok(None);
    }
    // Left behind by a shim that was killed.
    fs::remove_file(path).map_err(Error::file("removing the dead socket", path))?;
    UnixListener::bind(path)
        .map(Some)
        .map_err(Error::file("binding", path))
}

/// Starts the server, in its cgroup and with its OOM score, or not at all.
fn launch(
    flags: &Flags,
    handshake: &Handshake,
    listener: &UnixListener,
    options: &RuncOptions,
) -> Result<(), Error> {
    let pid = spawn_server(flags, handshake, listener)?;
    let placed = containerd_shim::cgroup::set_cgroup_and_oom_score(pid, &options.shim_cgroup);
    placed.map_err(|error| {
        let _ = crate::sys::kill(pid.cast_signed(), libc::SIGKILL);
        error.into()
    })
}

fn spawn_server(
    flags: &Flags,
    handshake: &Handshake,
    listener: &UnixListener,
) -> Result<u32, Error> {
    let exe = std::env::current_exe().map_err(Error::io("finding the shim's own binary"))?;
    #[allow(clippy::disallowed_methods, reason = "the launch of the server")]
    let mut command = Command::new(exe);
    command.args([
        "-namespace",
        &flags.namespace,
        "-id",
        &flags.id,
        "-address",
        &handshake.grpc_address,
    ]);
    if flags.debug {
        command.arg("-debug");
    }
    command
        .env_remove("NOTIFY_SOCKET")
        .env("TTRPC_ADDRESS", &handshake.ttrpc_address)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .process_group(0);
    crate::sys::pass_fd(&mut command, listener.as_raw_fd(), LISTENER_FD);
    if std::env::var_os("SCHED_CORE").is_some_and(|wish| !wish.is_empty()) {
        // What is forked from here on, the containers too, shares no core with others.
        create_core_scheduling_cookie(getpid(), CoreSchedulingScope::ProcessGroup).map_err(
            Error::io("core scheduling, which containerd's `sched_core` asks for"),
        )?;
    }
    #[allow(clippy::disallowed_methods, reason = "the launch of the server")]
    let child = command
        .spawn()
        .map_err(Error::io("starting the shim's server"))?;
    Ok(child.id())
}
