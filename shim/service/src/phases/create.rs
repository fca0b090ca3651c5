//! Create: check everything, get the data, make the root, run `runc create`.
//!
//! Failure contract: nothing stays. No mount, no runc state, no process; the bundle is containerd's.

use std::{
    path::{Path, PathBuf},
    sync::Mutex,
    time::{Duration, Instant},
};

use containerd_shim_protos::api::CreateTaskRequest;
use rekindle_core::{identity::Role, plan::Plan};

use super::{restore::Source, step, warm};
use crate::{
    bundle::{self, CRIU_CONFIG, INIT_PID, Remembered, Spec},
    context::{Fixed, Shared},
    criu::{CriuConfig, Purpose},
    error::Error,
    exits::ExitOf,
    io::{ConsoleSocket, ProcessIo, Streams, Theirs},
    names,
    options::RuncOptions,
    rootfs::Rootfs,
    runc::{Runc, read_pid},
};

/// What a create made.
#[derive(Debug)]
pub(crate) struct Created {
    pub(crate) fixed: Fixed,
    pub(crate) io: ProcessIo,
    pub(crate) how: How,
}

impl Created {
    /// The init's pid; 0 before there is one.
    pub(crate) fn pid(&self) -> i32 {
        match self.how {
            How::Init { pid, .. } => pid,
            How::Image(_) => 0,
        }
    }
}

/// How the container will get its processes.
#[derive(Debug)]
pub(crate) enum How {
    /// Its init exists and waits to be started.
    Init { pid: i32, exit: ExitOf },
    /// A start restores them.
    Image(Source),
}

/// Creates a container.
pub(crate) async fn run(shared: &Shared, request: CreateTaskRequest) -> Result<Created, Error> {
    names::check("id", &request.id)?;
    let mut began = Instant::now();
    let bundle = PathBuf::from(&request.bundle);
    let id = request.id.clone();
    let streams = Streams {
        stdin: request.stdin.clone(),
        stdout: request.stdout.clone(),
        stderr: request.stderr.clone(),
        terminal: request.terminal,
    };
    streams.admit()?;
    let options = RuncOptions::parse(request.options.as_ref())?;
    let mut spec = Spec::read(&bundle)?;
    let plan = Plan::resolve(&spec.annotations(), &shared.namespace, &shared.node)?;

    let mounts = step(&id, "data", shared.data.ready(&plan, &shared.node)).await?;
    if plan.identity.role != Role::Container {
        // Only a pod's container has the kubelet's clock on it while it waits for data.
        began = Instant::now();
    }
    for mount in &mounts {
        spec.bind_read_only(&mount.source, &mount.destination);
    }
    let named = spec.set_criu_config(&bundle.join(CRIU_CONFIG));
    // A pod's annotations may reach the bundle; a file on the host that they name is not read.
    let named = named.filter(|_| plan.identity.role == Role::Standalone);
    let criu = CriuConfig::new(&bundle, named.as_deref());
    let runc = Runc {
        binary: options.binary(),
        root: options.root(&shared.namespace),
        systemd_cgroup: options.systemd_cgroup,
        bundle: bundle.clone(),
        id: id.clone(),
        exits: shared.exits.clone(),
    };
    let mut fixed = Fixed {
        staged: Mutex::default(),
        cgroup: spec.text("/linux/cgroupsPath").map(str::to_owned),
        gpu_devices: spec.gpu_devices(),
        shares_pids: !spec.has_namespace("pid") || spec.namespace_path("pid").is_some(),
        _datasets: mounts,
        warm: None,
        rootfs: Rootfs::new(&bundle, request.rootfs.clone()),
        shared: shared.clone(),
        id,
        bundle,
        plan,
        options,
        runc,
        criu,
    };
    fixed.warm = warm::choose(&fixed, &spec, &request).await;
    if let Some(restore) = fixed.warm.as_ref().and_then(warm::Warm::restore) {
        fixed.plan.restore = Some(restore);
    }
    let prepare = ProcessIo::prepare(streams, fixed.owner(&fixed.id));
    let (mut io, theirs) = step(&fixed.id, "streams", prepare).await?;
    match build(&fixed, &spec, &request, began, &mut io, theirs).await {
        Ok(how) => Ok(Created { fixed, io, how }),
        Err(error) => {
            match fixed.take_back().await {
                Ok(()) => bundle::forget(&fixed.bundle),
                // `delete` will need what is remembered.
                Err(error) => tracing::warn!(%error, "undoing a failed create"),
            }
            io.drain().await;
            Err(error)
        }
    }
}

async fn build(
    fixed: &Fixed,
    spec: &Spec,
    request: &CreateTaskRequest,
    began: Instant,
    io: &mut ProcessIo,
    theirs: Theirs,
) -> Result<How, Error> {
    // Create and start share one budget: the kubelet gives both together 120 s.
    let budget = fixed.shared.node.deadlines.container;
    let left = || budget.saturating_sub(began.elapsed());
    let id = fixed.id.clone();
    record(fixed, spec)?;
    let source = step(&id, "image", Source::open(fixed, spec, request, left())).await?;
    step(&id, "rootfs", fixed.rootfs.mount()).await?;
    if let Some(mut source) = source {
        source.give(theirs, left());
        return Ok(How::Image(source));
    }
    let (pid, exit) = launch(fixed, io, theirs, left()).await?;
    Ok(How::Init { pid, exit })
}

/// Writes into the bundle what runc, CRIU and `delete` will read there.
fn record(fixed: &Fixed, spec: &Spec) -> Result<(), Error> {
    // The pause container is passed through: nobody checkpoints it, and its bundle stays as it came.
    if fixed.plan.identity.role != Role::Sandbox {
        fixed.criu.write(Purpose::Dump(""))?;
        spec.write()?;
    }
    Remembered {
        options: fixed.options.clone(),
    }
    .write(&fixed.bundle)
}

/// `runc create`: the init exists and waits to be started.
pub(super) async fn launch(
    fixed: &Fixed,
    io: &mut ProcessIo,
    theirs: Theirs,
    left: Duration,
) -> Result<(i32, ExitOf), Error> {
    let pid_file = fixed.bundle.join(INIT_PID);
    let socket = io
        .streams()
        .terminal
        .then(ConsoleSocket::bind)
        .transpose()?;
    let (mut command, log) = fixed.runc.command("create");
    command
        .arg("--bundle")
        .arg(&fixed.bundle)
        .arg("--pid-file")
        .arg(&pid_file);
    if fixed.options.no_new_keyring {
        command.arg("--no-new-keyring");
    }
    add_common(
        &mut command,
        &fixed.options,
        socket.as_ref().map(ConsoleSocket::path),
    );
    command.arg(&fixed.id);
    theirs.give(&mut command);
    let window = fixed.runc.exits.window();
    let created = async {
        let running = fixed.runc.spawn("create", command, log)?;
        Ok(fixed.runc.wait(running, left).await?)
    };
    step(&fixed.id, "runc create", created).await?;
    let pid = read_pid(&pid_file)?;
    let exit = window.claim(pid);
    let console = match socket {
        Some(socket) => Some(socket.receive().await?),
        None => None,
    };
    io.start(console)?;
    Ok((pid, exit))
}

/// The options that create and restore share.
pub(super) fn add_common(
    command: &mut std::process::Command,
    options: &RuncOptions,
    console: Option<&Path>,
) {
    if options.no_pivot_root {
        command.arg("--no-pivot");
    }
    if let Some(socket) = console {
        command.arg("--console-socket").arg(socket);
    }
}
