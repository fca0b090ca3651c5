//! `warm-start`, `warm-when`, `warm-ignore-env`, `after-restore`.

use std::{fmt, str::FromStr, time::Duration};

use super::{AnnotationError, PREFIX, wrong};
use crate::{duration, name::ImageRef};

/// Most variables that one pod may leave out, and the longest path and the most words of a command: what is longer is
/// a mistake.
const MAX_WORDS: usize = 256;
const MAX_TEXT: usize = 4096;
/// The signals that a restored process may be sent: those that programs give a meaning of their own.
const SIGNALS: [(&str, i32); 3] = [("SIGHUP", 1), ("SIGUSR1", 10), ("SIGUSR2", 12)];

/// What `warm-start: auto` asks for: an image of its own kind where there is one, and one to be made where there is
/// none.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WarmRequest {
    /// When the container is worth an image; [`WarmWhen::Ready`] where nothing is said.
    pub when: WarmWhen,
    /// Variables of its environment by which containers of one kind differ.
    pub ignore_env: Vec<String>,
}

/// When a container counts as warm.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum WarmWhen {
    /// Its pod says that it is ready: what the kubelet's probe of it found, as the apiserver has it. Only a pod's container
    /// has one.
    Ready,
    /// Something in its network namespace answers a GET of this path on this port with a status from 200 to 399, as
    /// the kubelet's probes have it.
    Http {
        /// The port.
        port: u16,
        /// With its slash.
        path: String,
    },
    /// Something in its network namespace accepts a connection on this port.
    Tcp(u16),
    /// A file is there, by its absolute path in the container.
    File(String),
    /// So long after the start.
    After(Duration),
}

/// Why a `warm-when` was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum WarmWhenError {
    /// None of the forms.
    #[error("allowed are ready, http://:PORT/PATH, tcp://:PORT, file:///PATH and after:DURATION")]
    Form,
    /// Not of this container.
    #[error("it is asked for inside of the pod: write no host, http://:8000/health")]
    Host,
    /// No duration.
    #[error(transparent)]
    Duration(#[from] duration::DurationError),
}

impl FromStr for WarmWhen {
    type Err = WarmWhenError;

    fn from_str(text: &str) -> Result<Self, WarmWhenError> {
        let plain =
            |path: &str| path.len() <= MAX_TEXT && path.chars().all(|c| c.is_ascii_graphic());
        let port = |text: &str| text.parse().ok().filter(|port| *port != 0_u16);
        if text == "ready" {
            return Ok(Self::Ready);
        }
        if let Some(after) = text.strip_prefix("after:") {
            return Ok(Self::After(duration::parse(after)?));
        }
        if let Some(path) = text.strip_prefix("file://") {
            let absolute = path.starts_with('/') && path.len() > 1 && path.len() <= MAX_TEXT;
            let whole = absolute && !path.contains(char::is_control) && !path.ends_with('/');
            return whole
                .then(|| Self::File(path.to_owned()))
                .ok_or(WarmWhenError::Form);
        }
        let (http, rest) = match text.split_once("://") {
            Some(("http", rest)) => (true, rest),
            Some(("tcp", rest)) => (false, rest),
            _ => return Err(WarmWhenError::Form),
        };
        let rest = rest.strip_prefix(':').ok_or(WarmWhenError::Host)?;
        if !http {
            return port(rest).map(Self::Tcp).ok_or(WarmWhenError::Form);
        }
        let (number, path) = rest.find('/').map_or((rest, "/"), |at| rest.split_at(at));
        match port(number) {
            Some(port) if plain(path) => Ok(Self::Http {
                port,
                path: path.to_owned(),
            }),
            _ => Err(WarmWhenError::Form),
        }
    }
}

impl fmt::Display for WarmWhen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ready => f.write_str("ready"),
            Self::Http { port, path } => write!(f, "http://:{port}{path}"),
            Self::Tcp(port) => write!(f, "tcp://:{port}"),
            Self::File(path) => write!(f, "file://{path}"),
            Self::After(after) => write!(f, "after:{}ms", after.as_millis()),
        }
    }
}

/// What a restored container is told before its start counts as done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum AfterRestore {
    /// A signal to its first process, by its number.
    Signal(i32),
    /// A program with its arguments, run in it as its user and with the environment of the new pod.
    Command(Vec<String>),
}

impl FromStr for AfterRestore {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Self, &'static str> {
        const WRONG: &str = r#"allowed are SIGHUP, SIGUSR1, SIGUSR2 and a command as a JSON list of words, such as ["/bin/reseed", "--all"]"#;
        if let Some((_, number)) = SIGNALS.iter().find(|(name, _)| *name == text) {
            return Ok(Self::Signal(*number));
        }
        let words: Vec<String> = serde_yaml_ng::from_str(text).map_err(|_| WRONG)?;
        let fits = |word: &String| word.len() <= MAX_TEXT && !word.contains('\0');
        let named = words.first().is_some_and(|program| !program.is_empty());
        if !text.starts_with('[') || !named || words.len() > MAX_WORDS || !words.iter().all(fits) {
            return Err(WRONG);
        }
        Ok(Self::Command(words))
    }
}

/// The keys of this file.
pub(super) fn parse<'a>(
    get: impl Fn(&str) -> Option<&'a str>,
    restore_from: Option<&ImageRef>,
) -> Result<(Option<WarmRequest>, Option<AfterRestore>), AnnotationError> {
    let alone = |key: &str, needs| AnnotationError::Alone {
        key: format!("{PREFIX}{key}"),
        needs,
    };
    let warm = match get("warm-start") {
        None => None,
        Some("auto") if restore_from.is_some() => {
            let reason = "rekindle.dev/restore-from names an image already; use one of the two";
            return Err(wrong("warm-start", "auto", reason));
        }
        Some("auto") => {
            let when = get("warm-when").unwrap_or("ready");
            Some(WarmRequest {
                when: when.parse().map_err(|e| wrong("warm-when", when, e))?,
                ignore_env: get("warm-ignore-env")
                    .map(variables)
                    .transpose()?
                    .unwrap_or_default(),
            })
        }
        Some(value) => return Err(wrong("warm-start", value, "allowed is auto")),
    };
    if warm.is_none()
        && let Some(key) = ["warm-when", "warm-ignore-env"]
            .into_iter()
            .find(|key| get(key).is_some())
    {
        return Err(alone(key, "rekindle.dev/warm-start"));
    }
    let after = get("after-restore")
        .map(|value| value.parse().map_err(|e| wrong("after-restore", value, e)))
        .transpose()?;
    if after.is_some() && warm.is_none() && restore_from.is_none() {
        let needs = "rekindle.dev/restore-from or rekindle.dev/warm-start";
        return Err(alone("after-restore", needs));
    }
    Ok((warm, after))
}

/// Names of variables, separated by commas.
fn variables(value: &str) -> Result<Vec<String>, AnnotationError> {
    let names: Vec<String> = value
        .split(',')
        .map(|name| name.trim().to_owned())
        .collect();
    let fits =
        |name: &String| !name.is_empty() && name.chars().all(|c| c.is_ascii_graphic() && c != '=');
    if names.len() > MAX_WORDS || !names.iter().all(fits) {
        let reason = "allowed are names of variables, separated by commas: POD_NAME,POD_IP";
        return Err(wrong("warm-ignore-env", value, reason));
    }
    Ok(names)
}
