//! The states of a container and what is allowed in each. Pure.
//!
//! ```text
//!                 create                 start                    kill/exit
//!   (none) ───────────────▶ Created ───────────────▶ Running ───────────────▶ Stopped
//!      │  create+image          ▲ start = restore    │   ▲
//!      └───────────▶ CreatedFromImage ──────────────▶│   │ resume
//!                                             pause  ▼   │
//!                                                   Paused
//! ```
//!
//! - `CreatedFromImage` has no process yet: its pid is 0, and exec, pause and checkpoint are refused.
//! - `Paused` is not exited: whoever waits, waits on.
//! - `Stopped` keeps its exit status until `Delete`.

use containerd_shim_protos::api::Status;

use crate::exits::Exit;

/// Where a container is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum State {
    /// Its init waits to be started.
    Created,
    /// Nothing runs; start restores it.
    CreatedFromImage,
    /// It runs.
    Running,
    /// A pause is under way.
    Pausing,
    /// Its cgroup is frozen.
    Paused,
    /// Its init has ended.
    Stopped(Exit),
}

/// What a caller wants.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Request {
    Start,
    Pause,
    Resume,
    Checkpoint,
    Update,
    Delete,
    Exec,
    Kill,
}

/// Why not.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("cannot {action} a container that is {state}{hint}")]
pub(crate) struct Denied {
    action: &'static str,
    state: &'static str,
    hint: &'static str,
}

impl State {
    /// How the task API calls it.
    pub(crate) fn status(self) -> Status {
        match self {
            Self::Created | Self::CreatedFromImage => Status::CREATED,
            Self::Running => Status::RUNNING,
            Self::Pausing => Status::PAUSING,
            Self::Paused => Status::PAUSED,
            Self::Stopped(_) => Status::STOPPED,
        }
    }

    fn words(self) -> &'static str {
        match self {
            Self::Created => "created and not started",
            Self::CreatedFromImage => "created from an image and not started",
            Self::Running => "running",
            Self::Pausing => "being paused",
            Self::Paused => "paused",
            Self::Stopped(_) => "stopped",
        }
    }
}

/// Whether `request` may be acted upon in `state`.
///
/// The same answers as the Go shim's `process/init_state.go` gives, in other words.
pub(crate) fn admit(state: State, request: Request) -> Result<(), Denied> {
    use Request as R;
    use State as S;
    let allowed = match state {
        S::Created => matches!(
            request,
            R::Start | R::Update | R::Delete | R::Exec | R::Kill
        ),
        S::CreatedFromImage => matches!(request, R::Start | R::Delete | R::Kill),
        S::Running => matches!(
            request,
            R::Pause | R::Checkpoint | R::Update | R::Exec | R::Kill
        ),
        S::Pausing => matches!(request, R::Kill),
        S::Paused => matches!(request, R::Resume | R::Checkpoint | R::Update | R::Kill),
        S::Stopped(_) => matches!(request, R::Delete | R::Kill),
    };
    if allowed {
        return Ok(());
    }
    let action = match request {
        R::Start => "start",
        R::Pause => "pause",
        R::Resume => "resume",
        R::Checkpoint => "checkpoint",
        R::Update => "update",
        R::Delete => "delete",
        R::Exec => "exec in",
        R::Kill => "kill",
    };
    let hint = match (state, request) {
        (S::Paused, R::Exec) => "; resume it first",
        (S::Running | S::Paused, R::Delete) => "; kill it first",
        (S::Created | S::CreatedFromImage, R::Pause | R::Checkpoint | R::Exec) => {
            "; start it first"
        }
        _ => "",
    };
    Err(Denied {
        action,
        state: state.words(),
        hint,
    })
}

#[cfg(test)]
mod tests {
    use std::time::SystemTime;

    use proptest::prelude::*;

    use super::*;

    const REQUESTS: [Request; 8] = [
        Request::Start,
        Request::Pause,
        Request::Resume,
        Request::Checkpoint,
        Request::Update,
        Request::Delete,
        Request::Exec,
        Request::Kill,
    ];

    fn after(state: State, request: Request) -> State {
        match request {
            Request::Start | Request::Resume => State::Running,
            Request::Pause => State::Paused,
            Request::Kill => State::Stopped(Exit {
                status: 137,
                at: SystemTime::UNIX_EPOCH,
            }),
            _ => state,
        }
    }

    proptest! {
        /// Whatever is called in whatever order: nothing is deleted that may still run, nothing
        /// starts twice, and every state can be left by a kill.
        #[test]
        fn no_order_of_calls_breaks_the_rules(from_image: bool, calls in prop::collection::vec(0..8usize, 0..40)) {
            let mut state = if from_image { State::CreatedFromImage } else { State::Created };
            let mut started = false;
            for call in calls.into_iter().map(|i| REQUESTS[i]) {
                prop_assert!(admit(state, Request::Kill).is_ok());
                match admit(state, call) {
                    Ok(()) if call == Request::Delete => {
                        prop_assert!(!matches!(state, State::Running | State::Paused | State::Pausing));
                        return Ok(());
                    }
                    Ok(()) => {
                        prop_assert!(call != Request::Start || !started);
                        started |= call == Request::Start;
                        state = after(state, call);
                    }
                    Err(denied) => prop_assert!(denied.to_string().contains(state.words())),
                }
            }
        }
    }

    #[test]
    fn refusals_are_sentences() {
        let denied = admit(State::CreatedFromImage, Request::Exec).unwrap_err();
        assert_eq!(
            denied.to_string(),
            "cannot exec in a container that is created from an image and not started; start it first"
        );
    }
}
