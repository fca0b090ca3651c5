//! Checkpoint: the only place that knows its order.
//!
//! Failure contract: sealed, or running as before. The dump always leaves the tasks running, or frozen
//! when the call found them so; `exit` ends them only once the image is complete.

mod hold;
mod precopy;
mod window;

use std::{
    fs,
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

use rekindle_checkpoint::{
    Facts, ImageStore, Order, Partial,
    chunks::Full,
    fit::container_facts,
    gpu,
    image::{Place, bytes_below},
    manifest::DumpFlags,
    pages::Tasks,
    plain,
    precopy::Precopy,
};

use rekindle_core::step::CheckpointStep as Step;

use super::{PhaseError, done, step};
use crate::{
    bundle::{SHM, Spec},
    context::Fixed,
    criu::{self, CheckpointRequest, CriuError, Purpose},
    error::{Error, sentence},
    keys,
    lifecycle::State,
    runc::RuncError,
    stats,
    threads::blocking,
};

/// Takes a checkpoint of a container whose init is `pid` and in which `execs` run.
pub(crate) async fn run(
    fixed: &Arc<Fixed>,
    pid: i32,
    state: State,
    execs: &[(String, i32)],
    request: &CheckpointRequest,
) -> Result<(), Error> {
    refuse(fixed, pid, execs)?;
    hold::refuse_stopped(fixed, pid)?;
    let id = fixed.id.as_str();
    let until = Instant::now() + fixed.shared.node.deadlines.checkpoint;
    let spec = Spec::read(&fixed.bundle)?;
    let facts = step(id, Step::Facts, facts(fixed, &spec, request)).await?;
    let work = request
        .work
        .clone()
        .unwrap_or_else(|| fixed.bundle.join("criu-work"));
    fs::create_dir_all(&work).map_err(Error::file("creating", &work))?;

    let call = Call {
        fixed,
        request,
        pid,
        held: state == State::Running,
        spec,
        facts,
        work: &work,
        until,
    };
    let mut memory = Full::default();
    let mut made = call.make(Some(&mut memory)).await;
    if let (Err(error), true) = (&made, memory.is()) {
        // They have written more than there was, or somebody else has filled the tmpfs.
        let error = sentence(error);
        tracing::info!(id, error, "made once more, on the disk");
        made = call.make(None).await;
    }
    if let Err(error) = made {
        return Err(failed(fixed, &work, error).await);
    }
    if request.work.is_none() {
        let _ = fs::remove_dir_all(&work);
    }
    Ok(())
}

/// A call that was not refused.
struct Call<'a> {
    fixed: &'a Arc<Fixed>,
    request: &'a CheckpointRequest,
    /// The container's init.
    pid: i32,
    /// Whether the tasks are stopped for it. Those of a container that its user has paused are left as they are.
    held: bool,
    spec: Spec,
    facts: Facts,
    work: &'a Path,
    until: Instant,
}

impl Call<'_> {
    /// Makes what is asked for, or leaves the tasks as they were. With `memory`, an image of ours may be made there, and
    /// that tells whether it was too much.
    async fn make(&self, memory: Option<&mut Full>) -> Result<(), Error> {
        let Self { fixed, request, .. } = self;
        let order = step(&fixed.id, Step::Where, destination(fixed, request)).await?;
        let steps = Steps {
            id: &fixed.id,
            told: order.as_ref().map(Order::steps),
        };
        let destination = match order {
            Some(order) => Some(self.begin(order, memory, &steps).await?),
            None => None,
        };
        if !self.held {
            hold::require_dumpable(fixed, self.pid)?;
        } else if let Err(error) = steps.run(Step::Hold, hold::hold(fixed, self.pid)).await {
            // It may be frozen, or half of it.
            thaw(fixed).await;
            return Err(error);
        }
        // With exit they stay frozen until their end: what they did after the dump would be in nobody's image.
        let release = self.held && !request.exit;
        let made = match destination {
            Some((partial, precopy)) => {
                let job = window::Job {
                    init: self.pid,
                    spec: &self.spec,
                    partial,
                    precopy,
                    work: self.work,
                    until: self.until,
                };
                sealed(fixed, job, self.facts.clone(), release, &steps).await
            }
            None => plainly(fixed, request, &self.facts, self.work, release).await,
        };
        if made.is_err() && self.held {
            thaw(fixed).await;
        }
        made?;
        if request.exit {
            steps.run(Step::Kill, kill(fixed)).await?;
        }
        Ok(())
    }

    /// All of an image that is made before the tasks are stopped.
    async fn begin(
        &self,
        order: Order,
        memory: Option<&mut Full>,
        steps: &Steps<'_>,
    ) -> Result<(Partial, Option<Precopy>), Error> {
        let Self {
            fixed, pid, spec, ..
        } = self;
        refuse_image(fixed, spec)?;
        let expected = match memory {
            Some(_) => expected(fixed, *pid, spec).await,
            None => None,
        };
        let partial = steps
            .run(Step::Begin, begin(fixed, order, expected))
            .await?;
        if let (Some(memory), Place::Memory) = (memory, partial.place()) {
            *memory = partial.chunks().full();
        }
        if !self.held || !fixed.shared.node.images.precopy {
            return Ok((partial, None));
        }
        let precopy = precopy::run(fixed, *pid, partial, self.until);
        steps.run(Step::Precopy, precopy).await
    }
}

/// The steps of a checkpoint, of which whoever asked for the image hears, too.
struct Steps<'a> {
    id: &'a str,
    /// None for plain files: who asked for those reads nothing.
    told: Option<rekindle_checkpoint::Steps>,
}

impl Steps<'_> {
    async fn run<T>(
        &self,
        name: Step,
        work: impl Future<Output = Result<T, Error>>,
    ) -> Result<T, Error> {
        if let Some(told) = &self.told {
            told.begins(name.name());
        }
        step(self.id, name, work).await
    }
}

fn refuse(fixed: &Fixed, init: i32, execs: &[(String, i32)]) -> Result<(), Error> {
    let mut gpus = fixed.gpu_devices.clone();
    if gpus.is_empty() {
        gpus = gpu::of_process(init);
    }
    if !gpus.is_empty() {
        return Err(PhaseError::Gpu {
            id: fixed.id.clone(),
            devices: gpus.join(", "),
        }
        .into());
    }
    if let Some((exec, pid)) = execs.first() {
        return Err(PhaseError::ExecRunning {
            id: fixed.id.clone(),
            exec: exec.clone(),
            pid: *pid,
        }
        .into());
    }
    Ok(())
}

/// An image that could never be restored is not made. Plain files are the caller's own business.
fn refuse_image(fixed: &Fixed, spec: &Spec) -> Result<(), Error> {
    let reason = if fixed.shares_pids {
        "it shares a PID namespace (shareProcessNamespace or hostPID), so no other container could be restored from it"
    } else if spec.has_namespace("user") {
        "it has a user namespace (hostUsers: false), which CRIU cannot restore into"
    } else if let Some(reason) = spec.shm_of_the_node() {
        reason
    } else {
        return Ok(());
    };
    Err(PhaseError::CannotCheckpoint {
        id: fixed.id.clone(),
        reason: reason.to_owned(),
    }
    .into())
}

/// The image of our store that is asked for; none for any other path, which gets CRIU's plain files.
async fn destination(fixed: &Fixed, request: &CheckpointRequest) -> Result<Option<Order>, Error> {
    let cannot = |reason: String| PhaseError::CannotCheckpoint {
        id: fixed.id.clone(),
        reason,
    };
    let (node, path) = (Arc::clone(&fixed.shared.node), request.image.clone());
    let found = blocking(move || match ImageStore::of(&node.images) {
        Ok(store) => store.partial_at(&path),
        // A node whose store cannot be made still makes plain checkpoints.
        Err(_) if !path.starts_with(&node.images.root) => Ok(None),
        Err(error) => Err(error),
    })
    .await?;
    let Some(order) = found.map_err(|e| cannot(sentence(&e)))? else {
        if request.image.join("request.json").exists() {
            let reason = format!(
                "{} is a request for an image outside this node's store ({}); the CLI and the shim read different configurations",
                request.image.display(),
                fixed.shared.node.images.root.display()
            );
            return Err(cannot(reason).into());
        }
        return Ok(None);
    };
    let own = &fixed.plan.identity.namespace;
    if order.namespace() != own {
        let reason = format!(
            "the image is asked for in namespace {}, and the container is of {own}",
            order.namespace()
        );
        return Err(cannot(reason).into());
    }
    Ok(Some(order))
}

/// Makes what the image is written into, in memory where it is expected to fit; all that takes time of it, before the
/// tasks are stopped.
async fn begin(fixed: &Fixed, order: Order, expected: Option<u64>) -> Result<Partial, Error> {
    let cannot = |reason: String| PhaseError::CannotCheckpoint {
        id: fixed.id.clone(),
        reason,
    };
    let key = keys::for_new_image(&fixed.shared, order.namespace())
        .await
        .map_err(cannot)?;
    let private = fixed.bundle.join(PRIVATE);
    if key.is_some() {
        keys::require_memory(&fixed.bundle).map_err(cannot)?;
    }
    let compression = fixed.shared.node.images.compression;
    let order = match expected {
        Some(bytes) => order.expecting(bytes),
        None => order,
    };
    let begun = blocking(move || order.begin(key, compression, &private)).await?;
    Ok(begun.map_err(|e| cannot(sentence(&e)))?)
}

/// What an image of the container takes, as far as that is told before it is made: its memory, its writable layer, and the
/// `/dev/shm` of its pod. Only asked where there is memory for images.
async fn expected(fixed: &Fixed, init: i32, spec: &Spec) -> Option<u64> {
    fixed.shared.node.images.memory.as_ref()?;
    let folders = [fixed.rootfs.upper_layer(), spec.bind_source(SHM)];
    let told = blocking(move || {
        // What its cgroup does not tell its processes do, each of what they share.
        let rss = || {
            let tasks = Tasks::below(init).ok()?;
            Some(tasks.all().iter().map(|task| task.rss).sum())
        };
        let mut bytes: u64 = stats::memory_of(init).or_else(rss)?;
        for folder in folders.into_iter().flatten() {
            bytes += bytes_below(&folder).ok()?;
        }
        Some(bytes)
    });
    told.await.ok().flatten()
}

async fn facts(fixed: &Fixed, spec: &Spec, request: &CheckpointRequest) -> Result<Facts, Error> {
    let cannot = |reason: String| PhaseError::CannotCheckpoint {
        id: fixed.id.clone(),
        reason,
    };
    let host = fixed
        .shared
        .host
        .get(&fixed.runc.exits, &fixed.runc.binary)
        .await
        .map_err(cannot)?;
    Ok(Facts {
        host,
        dump: DumpFlags {
            link_remap: true,
            ..request.flags.clone()
        },
        container: container_facts(&spec.parsed()?),
        ..Facts::default()
    })
}

/// A dump into our store, sealed and published.
async fn sealed(
    fixed: &Arc<Fixed>,
    job: window::Job<'_>,
    mut facts: Facts,
    release: bool,
    steps: &Steps<'_>,
) -> Result<(), Error> {
    facts.dump.lazy = true;
    facts.source = job.partial.source().clone();
    facts.source.container.clone_from(&fixed.id);
    facts.source.pod.clone_from(&fixed.plan.identity.pod);
    let dump = window::dump(fixed, job, &facts.dump);
    let (partial, taken) = steps.run(Step::Dump, dump).await?;
    if release {
        // They go on before the image is sealed.
        let resume = async { Ok(fixed.runc.resume().await?) };
        steps.run(Step::Release, resume).await?;
    }
    // What was written is watched no more. They go on meanwhile.
    let precopy = taken.precopy;
    blocking(move || drop(precopy)).await?;
    facts.processes = processes(&taken.tasks);
    let id = fixed.id.clone();
    let sealing = async {
        let sealed = blocking(move || partial.seal(facts)).await?;
        sealed.map_err(|e| {
            PhaseError::CannotCheckpoint {
                id: fixed.id.clone(),
                reason: sentence(&e),
            }
            .into()
        })
    };
    let image = steps.run(Step::Seal, sealing).await?;
    tracing::info!(
        id,
        image = image.reference(),
        place = %image.place(),
        stopped_ms = taken.stopped.as_millis(),
        precopied = taken.precopied,
        "image sealed"
    );
    Ok(())
}

fn processes(tasks: &Tasks) -> Vec<rekindle_checkpoint::manifest::Process> {
    let all = tasks.all().into_iter();
    all.map(|task| rekindle_checkpoint::manifest::Process {
        pid: task.container_pid.cast_unsigned(),
        comm: task.comm,
        rss: task.rss,
    })
    .collect()
}

/// A plain dump, in CRIU's own files, which stock runc restores.
async fn plainly(
    fixed: &Fixed,
    request: &CheckpointRequest,
    facts: &Facts,
    work: &Path,
    release: bool,
) -> Result<(), Error> {
    fs::create_dir_all(&request.image).map_err(Error::file("creating", &request.image))?;
    fixed.criu.write(Purpose::Dump(""))?;
    let (mut command, log) = fixed.runc.command("checkpoint");
    // Always: with exit the tasks are ended afterwards, when nothing can fail any more.
    command.arg("--leave-running");
    command
        .arg("--image-path")
        .arg(&request.image)
        .arg("--work-path")
        .arg(work);
    if let Some(parent) = &request.parent {
        command.arg("--parent-path").arg(parent);
    }
    command.args(criu::arguments(&request.flags)).arg(&fixed.id);
    let dump = async {
        let running = fixed.runc.spawn("checkpoint", command, log)?;
        Ok(fixed
            .runc
            .wait(running, fixed.shared.node.deadlines.checkpoint)
            .await?)
    };
    step(&fixed.id, Step::Dump, dump).await?;
    if release {
        step(&fixed.id, Step::Release, async {
            Ok(fixed.runc.resume().await?)
        })
        .await?;
    }
    let cannot = |e| PhaseError::CannotCheckpoint {
        id: fixed.id.clone(),
        reason: sentence(&e),
    };
    Ok(plain::write(&request.image, facts).map_err(cannot)?)
}

/// Lets a container go on whose checkpoint failed.
async fn thaw(fixed: &Fixed) {
    if let Err(error) = fixed.runc.resume().await {
        tracing::error!(id = fixed.id, %error, "thawing after a failed checkpoint");
    }
}

/// Ends a container whose image is complete and whose tasks are frozen.
async fn kill(fixed: &Fixed) -> Result<(), Error> {
    let killed = fixed
        .runc
        .kill(libc::SIGKILL.cast_unsigned(), fixed.shares_pids)
        .await;
    killed.or_else(|error| if error.is_gone() { Ok(()) } else { Err(error) })?;
    // On cgroup v1 a frozen task dies only when it is thawed.
    if let Err(error) = fixed.runc.resume().await {
        tracing::debug!(%error, "thawing a killed container");
    }
    Ok(())
}

/// Finds the reason in CRIU's log, and keeps the log where containerd's users look for it.
async fn failed(fixed: &Fixed, work: &Path, error: Error) -> Error {
    let (log, kept) = (work.join("dump.log"), fixed.bundle.join("criu-dump.log"));
    let (from, to) = (log.clone(), kept.clone());
    let found = blocking(move || {
        let reason = criu::reason(&from);
        fs::copy(&from, &to).map(|_| reason)
    });
    let Ok(Ok(reason)) = found.await else {
        return error;
    };
    match (&error, reason) {
        (Error::Runc(RuncError::Failed { .. }), Some(reason)) => CriuError {
            action: "checkpoint",
            id: fixed.id.clone(),
            reason,
            log: kept,
        }
        .into(),
        _ => error,
    }
}

/// In the bundle: what CRIU writes of an image that is encrypted.
const PRIVATE: &str = "criu-private";

/// How long CRIU may take to end a dump whose window was closed.
const CLOSING: Duration = Duration::from_secs(30);
