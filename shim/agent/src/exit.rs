//! The one place where errors become exit codes.

use std::{error::Error, process::ExitCode};

use rekindle_checkpoint::{ImageError, foreign::ForeignError, layout::LayoutError};

/// Shown below `--help`; `docs/CONFIGURATION.md` has the same table.
pub(crate) const TABLE: &str = "\
Exit codes:
  0  done
  1  failed; the reason is on stderr
  2  wrong usage
  3  refused: what was asked for is not allowed or not possible in this state
  4  no such container, image or dataset on this node
 75  prefetch: not this time; the same command may succeed later";

/// An error whose kind matters to the caller's script. Everything else exits with 1.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Failure {
    /// Not allowed, or not possible in the state things are in.
    #[error("{0}")]
    Refused(String),
    /// Nothing of that name.
    #[error("{0}")]
    NotFound(String),
}

impl Failure {
    fn code(&self) -> u8 {
        match self {
            Self::Refused(_) => 3,
            Self::NotFound(_) => 4,
        }
    }
}

/// The code of one error of a chain, where its kind matters.
fn of(error: &(dyn Error + 'static)) -> Option<u8> {
    if let Some(failure) = error.downcast_ref::<Failure>() {
        return Some(failure.code());
    }
    if let Some(ForeignError::Encrypted(_)) = error.downcast_ref() {
        return Some(3);
    }
    let image = match error.downcast_ref::<LayoutError>() {
        Some(LayoutError::NoTag { .. }) => return Some(4),
        Some(LayoutError::Image(image)) => Some(image),
        _ => error.downcast_ref::<ImageError>(),
    };
    match image? {
        ImageError::Unknown(_) => Some(4),
        ImageError::InUse(_) => Some(3),
        // A damaged one too, as `image verify` has it.
        _ => None,
    }
}

/// Prints the error, if there is one, and says how to exit.
pub(crate) fn code(result: anyhow::Result<ExitCode>) -> ExitCode {
    result.unwrap_or_else(|error| {
        crate::output::error(&error);
        error
            .chain()
            .find_map(of)
            .map_or(ExitCode::FAILURE, ExitCode::from)
    })
}
