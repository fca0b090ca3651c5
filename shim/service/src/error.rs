//! The one place that maps what went wrong to ttrpc codes.
//!
//! Codes are those of the Go shim (`task/service.go`), for containerd's clients act on them; the
//! sentences are ours.

use std::{io, path::PathBuf};

use containerd_shim_protos::ttrpc::{self, Code};
use rekindle_core::plan::PlanError;

use crate::{
    criu::CriuError, data::DataError, lifecycle::Denied, phases::PhaseError, runc::RuncError,
};

/// What a call of the task API can end with.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Error {
    #[error("container {0}: not created here")]
    NoContainer(String),
    #[error("process {exec:?} of container {id}: there is none")]
    NoProcess { id: String, exec: String },
    #[error("{0} exists already")]
    Exists(String),
    #[error(transparent)]
    Denied(#[from] Denied),
    #[error("container {0}: its init has ended, so nothing can be started in it")]
    InitEnded(String),
    #[error("cannot {action} exec {exec}: {reason}")]
    Exec {
        action: &'static str,
        exec: String,
        reason: &'static str,
    },
    #[error("exec {0}: it has no process yet; start it first")]
    NotStarted(String),
    #[error("process {0}: already finished")]
    Finished(String),
    #[error(transparent)]
    Plan(#[from] PlanError),
    #[error(transparent)]
    Config(#[from] rekindle_core::config::ConfigError),
    #[error("{key}: {reason}")]
    Argument { key: String, reason: String },
    #[error(transparent)]
    Runc(#[from] RuncError),
    #[error(transparent)]
    Criu(#[from] CriuError),
    #[error(transparent)]
    Data(#[from] DataError),
    #[error(transparent)]
    Phase(#[from] PhaseError),
    #[error("{doing} {path}: {source}", path = path.display())]
    File {
        doing: &'static str,
        path: PathBuf,
        source: io::Error,
    },
    #[error("{doing}: {source}")]
    Io {
        doing: &'static str,
        source: io::Error,
    },
    #[error("logging program {path} of {id}: {reason}", path = program.display())]
    Logger {
        program: PathBuf,
        id: String,
        reason: String,
    },
    #[error("{0}")]
    Shim(#[from] containerd_shim::Error),
    #[error("container {0}: its cgroup does not exist, so there is nothing to measure")]
    NoCgroup(String),
    #[error("container {0}: its driver ended unexpectedly; the shim's log has the reason")]
    DriverGone(String),
}

impl Error {
    /// For `map_err` on a file operation.
    pub(crate) fn file(
        doing: &'static str,
        path: impl Into<PathBuf>,
    ) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::File {
            doing,
            path: path.into(),
            source,
        }
    }

    /// For `map_err` on other system calls.
    pub(crate) fn io<E: Into<io::Error>>(doing: &'static str) -> impl FnOnce(E) -> Self {
        move |source| Self::Io {
            doing,
            source: source.into(),
        }
    }

    fn code(&self) -> Code {
        match self {
            Self::NoContainer(_)
            | Self::NoProcess { .. }
            | Self::Finished(_)
            | Self::NoCgroup(_) => Code::NOT_FOUND,
            Self::Exists(_) => Code::ALREADY_EXISTS,
            Self::InitEnded(_) | Self::NotStarted(_) | Self::Phase(_) | Self::Data(_) => {
                Code::FAILED_PRECONDITION
            }
            Self::Plan(_) | Self::Argument { .. } => Code::INVALID_ARGUMENT,
            // Go wraps neither its state refusals nor runc's errors in a class, kills apart.
            _ => Code::UNKNOWN,
        }
    }
}

impl From<Error> for ttrpc::Error {
    fn from(error: Error) -> Self {
        Self::RpcStatus(ttrpc::get_status(error.code(), error.to_string()))
    }
}

/// An error with all its causes, as one sentence: a caller of the task API gets no chain.
pub(crate) fn sentence(error: &dyn std::error::Error) -> String {
    let mut words = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        words = format!("{words}: {error}");
        cause = error.source();
    }
    words
}
