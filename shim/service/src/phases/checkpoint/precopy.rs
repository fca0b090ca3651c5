//! Pre-copy: most of the memory is stored before the tasks are stopped for the dump.
//!
//! ```text
//!  tasks  ──run──┤hold, mark├──run──┤hold, mark├──run──┤ hold, dump …
//!  we                         copy               copy what was written
//! ```
//! Each mark takes a hundredth of a second. There are more of them as long as they make what is left to the dump
//! much smaller. Only for our own images; what cannot be watched is read by the dump.

use std::{
    collections::HashMap,
    io,
    os::{fd::OwnedFd, unix::net::UnixStream},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use rekindle_checkpoint::{
    Partial,
    chunks::ChunkError,
    pages::Tasks,
    precopy::{Precopy, userfaultfd},
};

use super::{PhaseError, done};
use crate::{
    context::Fixed,
    data,
    error::{Error, sentence},
    threads::blocking,
};

/// Bytes of memory from which on it pays: less is read in a tenth of a second.
const LEAST: u64 = 256 << 20;
/// Bytes that are left to the dump without another round.
const FEW: u64 = 64 << 20;
/// More would help only a program that writes about as fast as we read.
const ROUNDS: u32 = 3;
/// How long the program may take that has the tasks open their userfaultfds.
const PATIENCE: Duration = Duration::from_secs(5);

/// Stores what the container's running tasks have in memory. The dump is left at least half of the time `until`
/// then. None where nothing was stored.
pub(super) async fn run(
    fixed: &Fixed,
    init: i32,
    mut partial: Partial,
    until: Instant,
) -> Result<(Partial, Option<Precopy>), Error> {
    let now = Instant::now();
    let half = now + until.saturating_duration_since(now) / 2;
    // What is wrong with them is for the dump to say.
    let tasks = blocking(move || Tasks::below(init)).await?;
    let tasks = tasks.unwrap_or_default();
    let memory: u64 = tasks.all().iter().map(|task| task.rss).sum();
    if memory < LEAST {
        return Ok((partial, None));
    }
    partial
        .require_space(memory)
        .map_err(|e| cannot(fixed, &e))?;
    let lent = borrow(fixed, &tasks).await;
    let Some(mut precopy) = Precopy::new(&tasks, lent) else {
        return Ok((partial, None));
    };
    let mut left = u64::MAX;
    for _ in 0..ROUNDS {
        precopy = mark(fixed, precopy).await?;
        let began = Instant::now();
        let copied = blocking(move || {
            let bytes = precopy.copy(partial.chunks(), half)?;
            partial.chunks().flush()?;
            let written = precopy.written();
            Ok::<_, ChunkError>((partial, precopy, bytes, written))
        });
        let copied = copied.await?.map_err(|e| cannot(fixed, &e));
        let (bytes, written);
        (partial, precopy, bytes, written) = copied?;
        done(&fixed.id, "pre-copy: pages", began);
        tracing::debug!(id = fixed.id, bytes, written, "pre-copied");
        if written < FEW || written > left / 2 || Instant::now() >= half {
            break;
        }
        left = written;
    }
    Ok((partial, Some(precopy)))
}

/// Has the kernel watch what they write from here on. They stand still for it.
async fn mark(fixed: &Fixed, mut precopy: Precopy) -> Result<Precopy, Error> {
    let began = Instant::now();
    let held = fixed.runc.pause().await;
    let marked = match held {
        Ok(()) => {
            let marking = blocking(move || {
                precopy.mark();
                precopy
            });
            marking.await
        }
        Err(error) => Err(error.into()),
    };
    // Whatever became of that, they go on.
    let released = fixed.runc.resume().await;
    let precopy = marked?;
    released?;
    done(&fixed.id, "pre-copy: mark", began);
    Ok(precopy)
}

/// The userfaultfds of tasks, as far as they can be had.
///
/// The program that gets them is not ended for being late: a task that it has stopped would be left with registers
/// that are not its own.
async fn borrow(fixed: &Fixed, tasks: &Tasks) -> HashMap<i32, OwnedFd> {
    let began = Instant::now();
    let borrowed = async {
        let (mut ours, theirs) = UnixStream::pair()?;
        #[allow(clippy::disallowed_methods, reason = "the launch of the tracer")]
        let mut command = Command::new(data::program());
        command
            .arg("userfaultfd")
            .args(tasks.all().iter().map(|task| task.pid.to_string()));
        command
            .current_dir("/")
            .stdin(OwnedFd::from(theirs))
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        let tracer = fixed.runc.exits.spawn(&mut command)?;
        // Its copy of their end.
        drop(command);
        ours.set_read_timeout(Some(PATIENCE))?;
        let lent = tokio::task::spawn_blocking(move || userfaultfd::borrow(&mut ours));
        let lent = lent.await.map_err(io::Error::other)??;
        tracer.exit.await;
        Ok::<_, io::Error>(lent)
    };
    let borrowed = borrowed.await;
    done(&fixed.id, "pre-copy: userfaultfds", began);
    borrowed.unwrap_or_else(|error| {
        tracing::debug!(id = fixed.id, %error, "no userfaultfds of its tasks");
        HashMap::new()
    })
}

fn cannot(fixed: &Fixed, error: &dyn std::error::Error) -> Error {
    PhaseError::CannotCheckpoint {
        id: fixed.id.clone(),
        reason: sentence(error),
    }
    .into()
}
