//! Restore: what a start does for a container that was created from an image.
//!
//! Failure contract: the whole process tree runs, or nothing of it does and the start fails with one
//! reason. No process reads a page that was not in the image.

mod hostname;
mod image;
mod loading;
mod loopback;
mod told;

use std::{
    path::{Path, PathBuf},
    process::Command,
    sync::Arc,
    time::{Duration, Instant},
};

use containerd_shim_protos::api::CreateTaskRequest;
use rekindle_checkpoint::{StagedImage, manifest::DumpFlags, plain};
use rekindle_core::annotations::Policy;

pub(crate) use hostname::HostNames;
pub(crate) use loading::{Loading, end_orphaned as end_orphaned_pager};

use super::{
    PhaseError,
    create::{add_common, launch},
    step, warm,
};
use crate::{
    bundle::{INIT_PID, Spec},
    context::Fixed,
    criu::{self, CriuError, Purpose},
    error::{Error, sentence},
    exits::ExitOf,
    io::{ConsoleSocket, ProcessIo, Theirs},
    runc::{DEADLINE, RuncError, read_pid},
};

/// What a start restores.
#[derive(Debug)]
pub(crate) struct Source {
    images: Images,
    /// The process's ends of its streams, until it exists.
    theirs: Theirs,
    /// What create left of the budget that it shares with start.
    left: Duration,
}

#[derive(Debug)]
enum Images {
    /// CRIU's files, from containerd's checkpoint of a create call or the option `CriuImagePath`.
    Plain {
        folder: PathBuf,
        parent: Option<String>,
        flags: DumpFlags,
    },
    /// An image of our store.
    Ours {
        image: Arc<StagedImage>,
        lazily: bool,
    },
}

impl Images {
    fn folder(&self) -> PathBuf {
        match self {
            Self::Plain { folder, .. } => folder.clone(),
            Self::Ours { image, .. } => image.criu_dir().to_owned(),
        }
    }

    fn flags(&self) -> &DumpFlags {
        match self {
            Self::Plain { flags, .. } => flags,
            Self::Ours { image, .. } => &image.manifest().facts.dump,
        }
    }
}

/// A restored process tree.
#[derive(Debug)]
pub(crate) struct Restored {
    pub(crate) pid: i32,
    pub(crate) exit: ExitOf,
    pub(crate) loading: Option<Loading>,
}

impl Source {
    /// Finds out what the container is restored from, if it is, and stages what has to lie there before
    /// its root is mounted.
    pub(crate) async fn open(
        fixed: &Fixed,
        spec: &Spec,
        request: &CreateTaskRequest,
        left: Duration,
    ) -> Result<Option<Self>, Error> {
        if let Some(plan) = &fixed.plan.restore {
            let left = match plan.policy {
                Policy::Required => left,
                Policy::Opportunistic => {
                    left.saturating_sub(fixed.shared.node.deadlines.cold_start())
                }
            };
            let opened = async {
                refuse(&fixed.id, spec, request)?;
                image::open(fixed, plan, spec, Instant::now() + left).await
            };
            let opened = opened.await;
            return match opened {
                Ok((image, lazily)) => Ok(Some(Self::new(Images::Ours { image, lazily }))),
                Err(error) if plan.policy == Policy::Opportunistic => {
                    tracing::warn!(id = fixed.id, %error, "starting cold: the restore policy is Opportunistic");
                    warm::failed(fixed, &error).await;
                    fixed.take_back().await?;
                    Ok(None)
                }
                Err(error) => Err(error),
            };
        }
        let folders = [&request.checkpoint, &fixed.options.criu_image_path];
        let Some(folder) = folders
            .into_iter()
            .find(|path| !path.is_empty())
            .map(PathBuf::from)
        else {
            return Ok(None);
        };
        let cannot = |e| PhaseError::CannotRestore {
            id: fixed.id.clone(),
            reason: sentence(&e),
        };
        let flags = plain::read(&folder)
            .map_err(cannot)?
            .map(|facts| facts.dump)
            .unwrap_or_default();
        let parent = Some(request.parent_checkpoint.clone()).filter(|parent| !parent.is_empty());
        Ok(Some(Self::new(Images::Plain {
            folder,
            parent,
            flags,
        })))
    }

    fn new(images: Images) -> Self {
        Self {
            images,
            theirs: Theirs::default(),
            left: Duration::ZERO,
        }
    }

    /// Completes it with the process's ends of its streams, and the time that the start may take.
    pub(crate) fn give(&mut self, theirs: Theirs, left: Duration) {
        self.theirs = theirs;
        self.left = left;
    }
}

/// The budget that create and start share is used up.
fn late(fixed: &Fixed, what: &str) -> Error {
    let budget = fixed.shared.node.deadlines.container.as_secs();
    let reason = format!(
        "{what} within the {budget} s that create and start have together (deadlines.container)"
    );
    PhaseError::TooLate {
        id: fixed.id.clone(),
        reason,
    }
    .into()
}

/// What can be known to be impossible before anything is touched.
fn refuse(id: &str, spec: &Spec, request: &CreateTaskRequest) -> Result<(), Error> {
    let reason = if !request.checkpoint.is_empty() {
        "annotation rekindle.dev/restore-from and a checkpoint of containerd's are both given; use one"
    } else if !spec.has_namespace("pid") || spec.namespace_path("pid").is_some() {
        "it shares a PID namespace (shareProcessNamespace or hostPID), in which the image's pids may be taken"
    } else if spec.has_namespace("user") {
        "it has a user namespace (hostUsers: false), which CRIU cannot restore into"
    } else if let Some(reason) = spec.shm_of_the_node() {
        reason
    } else {
        return Ok(());
    };
    Err(PhaseError::CannotRestoreHere {
        id: id.to_owned(),
        reason: reason.to_owned(),
    }
    .into())
}

/// Starts cold after a failed restore, where the policy allows it: from a clean root, with new streams.
pub(crate) async fn cold(fixed: &Fixed, io: &mut ProcessIo) -> Result<(i32, ExitOf), Error> {
    let started = async {
        fixed.take_back().await?;
        step(&fixed.id, "rootfs", fixed.rootfs.mount()).await?;
        let theirs = io.renew(fixed.owner(&fixed.id)).await?;
        let launched = launch(fixed, io, theirs, DEADLINE).await?;
        fixed.runc.start().await?;
        Ok(launched)
    };
    let started = started.await;
    if started.is_err()
        && let Err(error) = fixed.take_back().await
    {
        tracing::warn!(%error, "undoing a failed cold start");
    }
    started
}

/// Restores. `running` is told the pid of the runc that does it while there is one, for a kill meanwhile.
pub(crate) async fn run(
    fixed: &Fixed,
    io: &mut ProcessIo,
    source: Source,
    running: impl Fn(Option<i32>),
) -> Result<Restored, Error> {
    let work = match fixed.options.criu_work_path.as_str() {
        "" => fixed.bundle.join("work"),
        path => path.into(),
    };
    let mut loading = None;
    match start(fixed, io, source, &work, &mut loading, running).await {
        Ok((pid, exit)) => Ok(Restored { pid, exit, loading }),
        Err(error) => Err(undo(fixed, &work, loading, error).await),
    }
}

/// Restores; what there is of it at an error is the caller's to take back.
async fn start(
    fixed: &Fixed,
    io: &mut ProcessIo,
    source: Source,
    work: &Path,
    loading: &mut Option<Loading>,
    running: impl Fn(Option<i32>),
) -> Result<(i32, ExitOf), Error> {
    let id = fixed.id.as_str();
    let Source {
        images,
        theirs,
        left,
    } = source;
    if left.is_zero() {
        return Err(late(fixed, "nothing was restored"));
    }
    let began = Instant::now();
    let spec = Spec::read(&fixed.bundle)?;
    fixed.criu.write(Purpose::Restore(images.flags()))?;
    let pid_file = fixed.bundle.join(INIT_PID);
    std::fs::create_dir_all(work).map_err(Error::file("creating", work))?;
    let socket = io
        .streams()
        .terminal
        .then(ConsoleSocket::bind)
        .transpose()?;

    let (mut command, log) = fixed.runc.command("restore");
    command.args(["--detach", "--no-subreaper"]);
    command
        .arg("--bundle")
        .arg(&fixed.bundle)
        .arg("--pid-file")
        .arg(&pid_file);
    command
        .arg("--image-path")
        .arg(images.folder())
        .arg("--work-path")
        .arg(work);
    if let Images::Plain {
        parent: Some(parent),
        ..
    } = &images
    {
        command.arg("--parent-path").arg(parent);
    }
    command.args(criu::arguments(images.flags()));
    add_labels(&mut command, &spec);
    add_common(
        &mut command,
        &fixed.options,
        socket.as_ref().map(ConsoleSocket::path),
    );
    if let Images::Ours {
        image,
        lazily: true,
    } = images
    {
        command.arg("--lazy-pages");
        *loading = Some(loading::start(fixed, image, work)?);
    }
    command.arg(id);
    theirs.give(&mut command);

    let name = hostname::Name::of(&spec, &fixed.shared.host_names).await?;
    let window = fixed.runc.exits.window();
    let restored = step(id, "runc restore", async {
        let restore = fixed.runc.spawn("restore", command, log)?;
        running(Some(restore.pid()));
        let trouble = async {
            match loading {
                Some(loading) => loading.trouble().await,
                None => std::future::pending().await,
            }
        };
        let restored = fixed.runc.wait_unless(restore, left, trouble).await;
        running(None);
        restored?;
        let pid = read_pid(&pid_file)?;
        let exit = window.claim(pid);
        name.give(pid).await?;
        loopback::bring_up(&spec, pid).await?;
        let console = match socket {
            Some(socket) => Some(socket.receive().await?),
            None => None,
        };
        io.start(console)?;
        Ok((pid, exit))
    })
    .await;
    let restored = match restored {
        Ok((pid, exit)) => {
            let told = told::tell(
                fixed,
                &spec,
                pid,
                left.saturating_sub(began.elapsed()),
                &running,
            )
            .await;
            told.map(|()| (pid, exit))
        }
        error => error,
    };
    if restored.is_err()
        && let Err(error) = name.give_back().await
    {
        tracing::warn!(id, %error, "the pod may have the image's host name");
    }
    restored
}

/// The labels of the new spec: an image carries those of the old one.
fn add_labels(command: &mut Command, spec: &Spec) {
    if let Some(profile) = spec.text("/process/apparmorProfile") {
        command
            .arg("--lsm-profile")
            .arg(format!("apparmor:{profile}"));
    } else if let Some(label) = spec.text("/process/selinuxLabel") {
        command.arg("--lsm-profile").arg(format!("selinux:{label}"));
    }
    if let Some(label) = spec.text("/linux/mountLabel") {
        command.arg("--lsm-mount-context").arg(label);
    }
}

/// Takes back a restore that failed, and finds its reason in CRIU's log.
async fn undo(fixed: &Fixed, work: &Path, loading: Option<Loading>, error: Error) -> Error {
    match fixed.runc.remove(fixed.cgroup.as_deref()).await {
        // The tasks are gone: nobody can read a page any more.
        Ok(()) => {
            if let Some(loading) = loading {
                loading.abandon().await;
            }
            if let Err(left) = fixed.take_back().await {
                tracing::warn!(%left, "undoing a failed restore");
            }
        }
        // Dropping the pager keeps its descriptors: what may still run must block, not read zeros.
        Err(left) => tracing::error!(%left, "undoing a failed restore"),
    }
    let log = work.join("restore.log");
    match (&error, criu::reason(&log)) {
        (Error::Runc(RuncError::Failed { .. }), Some(reason)) => CriuError {
            action: "restore",
            id: fixed.id.clone(),
            reason,
            log,
        }
        .into(),
        _ => error,
    }
}
