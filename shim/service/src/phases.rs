//! The long operations: flat lists of steps, each timed here and undone in one arm of its own list.

pub(crate) mod checkpoint;
pub(crate) mod create;
pub(crate) mod restore;
pub(crate) mod warm;

use std::{fmt::Debug, future::Future, time::Instant};

use crate::error::Error;

/// What a phase refuses by itself.
#[derive(Debug, thiserror::Error)]
pub(crate) enum PhaseError {
    #[error(
        "cannot checkpoint container {id}: it has GPU devices ({devices}) and this shim was built without GPU support; its GPU state would be lost"
    )]
    Gpu { id: String, devices: String },
    #[error(
        "cannot checkpoint container {id}: exec {exec} (pid {pid}) runs in it and is not a child of its init; wait until it ends"
    )]
    ExecRunning { id: String, exec: String, pid: i32 },
    #[error("cannot restore container {id}: {reason}")]
    CannotRestore { id: String, reason: String },
    /// It is not what was sealed.
    #[error("cannot restore container {id}: {reason}")]
    BadImage { id: String, reason: String },
    /// The reason is no fault of the image.
    #[error("cannot restore container {id}: {reason}")]
    CannotRestoreHere { id: String, reason: String },
    /// There was no time left for it.
    #[error("cannot restore container {id}: {reason}")]
    TooLate { id: String, reason: String },
    #[error("cannot checkpoint container {id}: {reason}")]
    CannotCheckpoint { id: String, reason: String },
}

/// Runs one step: its time goes to the log, its name to its error's reader.
async fn step<T>(
    id: &str,
    name: impl Debug,
    work: impl Future<Output = Result<T, Error>>,
) -> Result<T, Error> {
    let began = Instant::now();
    tracing::debug!(id, step = ?name, "begins");
    let result = work.await;
    match &result {
        Ok(_) => done(id, name, began),
        // Not logged as an error: it is returned, and whoever answers the call reports it.
        Err(_) => {
            let ms = began.elapsed().as_millis();
            tracing::debug!(id, step = ?name, ms, "failed");
        }
    }
    result
}

/// Tells how long a step took, or a part of one.
fn done(id: &str, name: impl Debug, began: Instant) {
    let ms = began.elapsed().as_millis();
    tracing::debug!(id, step = ?name, ms, "done");
}
