//! One repository of an OCI registry: its manifests, blobs and tags, as OCI's distribution specification 1.1 has them.
//!
//! Nothing that comes from a registry is believed. Of a blob no more is taken than its asker says that it has; what the
//! bytes are has to be proved by whoever wants them, and of a manifest that is done here. What goes to a registry is
//! called by its SHA-256, which the registry compares before it takes it.
//!
//! Credentials go to the registry itself and to the token server that it names, never where it redirects to, and never
//! in clear unless the configuration says `http://`. They are in no error and no log.

use std::{fmt, path::PathBuf, time::Duration};

use bytes::Bytes;
use hyper::{
    HeaderMap, Method, Request, StatusCode, Uri,
    header::{AUTHORIZATION, HeaderName, HeaderValue, LOCATION, RETRY_AFTER, USER_AGENT},
};
use rekindle_core::uri::Repository;

use crate::{
    StoreError,
    s3::{Limits, Patience},
};

mod auth;
mod blobs;
mod credentials;
mod http;
mod manifests;
mod upload;

pub use manifests::{Manifest, is_tag};

use auth::{Auth, Scope};
use http::{Answer, Http};

/// How many redirects a blob may take: registries lead to their store in one.
const REDIRECTS: usize = 5;
/// A registry that asks to be left alone for longer than so many of the longest pauses is not waited for so long.
const LONGEST_WAIT: u32 = 4;
const AGENT: &str = concat!("rekindle/", env!("CARGO_PKG_VERSION"));

/// Why a registry did not do what it was asked. Each sentence stands alone.
#[derive(Debug, thiserror::Error)]
pub enum RegistryError {
    /// It cannot be reached as the configuration says.
    #[error("the registry cannot be reached as the configuration says: {0}")]
    Access(String),
    /// The credentials for it cannot be had.
    #[error("credentials for {host} from {from}: {reason}")]
    Credentials {
        /// The registry.
        host: String,
        /// A file, or a program.
        from: String,
        /// What is wrong.
        reason: String,
    },
    /// It knows us and says no, or does not know us.
    #[error("{doing}: the registry refuses {whom} ({answer})")]
    Denied {
        /// What was being done, to what.
        doing: String,
        /// "the credentials of /root/.docker/config.json".
        whom: String,
        /// Status, code and message.
        answer: String,
    },
    /// Nothing there.
    #[error("{doing}: not found ({answer})")]
    Missing {
        /// What was being done, to what.
        doing: String,
        /// Status, code and message.
        answer: String,
    },
    /// It gives whole blobs only.
    #[error("{doing}: the registry, or the store behind it, gives no parts of blobs")]
    NoParts {
        /// What was being done, to what.
        doing: String,
    },
    /// An upload is not where it should be.
    #[error("{doing}: the registry has another part of it than was sent ({answer})")]
    Offset {
        /// What was being done, to what.
        doing: String,
        /// Status, code and message.
        answer: String,
    },
    /// An answer that no retry changes.
    #[error("{doing}: {answer}")]
    Answer {
        /// What was being done, to what.
        doing: String,
        /// What came back.
        answer: String,
    },
    /// Tried until patience ran out.
    #[error("{doing}: gave up after {attempts} attempts without a byte; the last: {last}")]
    Unavailable {
        /// What was being done, to what.
        doing: String,
        /// How often.
        attempts: u32,
        /// How the last attempt ended.
        last: String,
    },
    /// A file that was to be put there.
    #[error(transparent)]
    File(#[from] StoreError),
}

/// How a registry is reached, and as whom.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Access {
    /// `https://host:port`, or `http://host:port`, unencrypted. None means the registry's own name over `https`, and over
    /// `http` where that is this very host.
    pub endpoint: Option<String>,
    /// PEM file of extra certificate authorities.
    pub ca_file: Option<PathBuf>,
    /// Docker's `config.json`. None means that of the environment.
    pub credentials_file: Option<PathBuf>,
    /// Send no credentials at all.
    pub anonymous: bool,
}

/// A repository of a registry.
#[derive(Debug)]
pub struct Registry {
    repository: Repository,
    /// Scheme and host.
    base: Uri,
    http: Http,
    auth: Auth,
    limits: Limits,
}

/// How one attempt ended, when it did not succeed.
#[derive(Debug)]
enum Failure {
    /// No retry helps.
    Final(RegistryError),
    /// Another attempt may succeed; how this one ended, and how long the registry wants to be left alone.
    Again(String, Option<Duration>),
}

impl Failure {
    fn answer(doing: &str, answer: impl fmt::Display) -> Self {
        Self::Final(RegistryError::Answer {
            doing: doing.to_owned(),
            answer: answer.to_string(),
        })
    }

    fn again(reason: impl Into<String>) -> Self {
        Self::Again(reason.into(), None)
    }
}

/// A request.
#[derive(Debug, Clone)]
struct Ask<'a> {
    doing: &'a str,
    method: Method,
    to: Uri,
    scope: Scope,
    headers: Vec<(HeaderName, HeaderValue)>,
    body: Bytes,
    /// What it may take until there is an answer.
    stall: Duration,
}

/// Attempts at one thing.
struct Attempts<'a> {
    patience: Patience,
    longest: Duration,
    doing: &'a str,
}

impl Attempts<'_> {
    /// Waits before the next attempt.
    async fn after(&mut self, failure: Failure) -> Result<(), RegistryError> {
        let (last, rest) = match failure {
            Failure::Final(error) => return Err(error),
            Failure::Again(last, rest) => (last, rest),
        };
        if !self.patience.wait().await {
            return Err(RegistryError::Unavailable {
                doing: self.doing.to_owned(),
                attempts: self.patience.failed(),
                last,
            });
        }
        if let Some(rest) = rest {
            tokio::time::sleep(rest.min(self.longest)).await;
        }
        Ok(())
    }
}

impl Registry {
    /// A repository. Nothing is asked of it yet, but a program for its credentials may be. Blocks.
    ///
    /// # Errors
    /// [`RegistryError::Access`], [`RegistryError::Credentials`].
    pub fn open(
        access: &Access,
        repository: &Repository,
        limits: Limits,
    ) -> Result<Self, RegistryError> {
        let base = http::base(access.endpoint.as_deref(), &repository.host)?;
        let http = Http::new(access.ca_file.as_deref(), limits.concurrency)?;
        let auth = Auth::new(access, repository, &base)?;
        Ok(Self {
            repository: repository.clone(),
            base,
            http,
            auth,
            limits,
        })
    }

    /// `docker://host/repository`.
    pub fn uri(&self) -> String {
        self.repository.to_string()
    }

    /// How many requests for parts of blobs are on their way at once.
    pub fn concurrency(&self) -> usize {
        self.limits.concurrency
    }

    /// `/v2/<repository>/…` of this registry.
    fn at(&self, path: &str) -> Result<Uri, RegistryError> {
        let path = format!("/v2/{}/{path}", self.repository.name);
        http::at(&self.base, &path)
            .ok_or_else(|| RegistryError::Access(format!("{path:?} is no path")))
    }

    fn attempts<'a>(&self, doing: &'a str) -> Attempts<'a> {
        Attempts {
            patience: Patience::new(self.limits.tuning),
            longest: self.limits.tuning.longest_pause * LONGEST_WAIT,
            doing,
        }
    }

    fn get<'a>(&self, doing: &'a str, to: Uri) -> Ask<'a> {
        Ask {
            doing,
            method: Method::GET,
            to,
            scope: Scope::Pull,
            headers: Vec::new(),
            body: Bytes::new(),
            stall: self.limits.tuning.stall,
        }
    }

    /// Sends a request once, with the authorization that the registry asks for, and says what succeeded and where.
    async fn ask(&self, ask: &Ask<'_>) -> Result<(Answer, Uri), Failure> {
        let mut to = ask.to.clone();
        let (mut challenged, mut redirects) = (false, 0);
        loop {
            let mut request = Request::new(ask.body.clone().into());
            *request.method_mut() = ask.method.clone();
            *request.uri_mut() = to.clone();
            let headers = request.headers_mut();
            headers.insert(USER_AGENT, HeaderValue::from_static(AGENT));
            headers.extend(ask.headers.iter().cloned());
            let ours = http::same_origin(&to, &self.base);
            let granted = match ours {
                true => self.auth.granted(&self.http, ask).await?,
                false => None,
            };
            if let Some(granted) = &granted {
                headers.insert(AUTHORIZATION, granted.clone());
            }
            let answer = self.http.send(request, ask).await?;
            let status = answer.status();
            if status == StatusCode::UNAUTHORIZED && ours && !challenged {
                challenged = true;
                let used = granted.as_ref();
                self.auth.challenged(&self.http, ask, answer, used).await?;
                continue;
            }
            let follows = matches!(ask.method, Method::GET | Method::HEAD);
            if status.is_redirection() && follows && redirects < REDIRECTS {
                redirects += 1;
                to = location(ask.doing, &answer, &to)?;
                continue;
            }
            if status.is_success() {
                return Ok((answer, to));
            }
            return Err(http::refused(answer, ask, &self.auth.whom()).await);
        }
    }
}

/// Where an answer leads; never from an encrypted connection to one in clear.
fn location(doing: &str, answer: &Answer, from: &Uri) -> Result<Uri, Failure> {
    let to = answer.headers().get(LOCATION);
    let to = to.and_then(|to| to.to_str().ok());
    let Some(to) = to.and_then(|to| http::resolve(from, to)) else {
        return Err(Failure::answer(doing, "the answer leads nowhere"));
    };
    if http::is_https(from) && !http::is_https(&to) {
        let reason = "the registry leads from an encrypted connection to one in clear";
        return Err(Failure::answer(doing, reason));
    }
    Ok(to)
}

/// How long a registry wants to be left alone. A date in place of seconds says no more than our own pauses do.
fn rest(headers: &HeaderMap) -> Option<Duration> {
    let seconds = headers.get(RETRY_AFTER)?.to_str().ok()?.parse().ok()?;
    Some(Duration::from_secs(seconds))
}

/// What a registry says of a digest, which has to be the one that was asked for; most that lie behind it say nothing.
fn same_digest(doing: &str, headers: &HeaderMap, digest: &str) -> Result<(), Failure> {
    match headers.get("docker-content-digest") {
        Some(said) if said.as_bytes() != digest.as_bytes() => {
            let said: String = String::from_utf8_lossy(said.as_bytes())
                .chars()
                .take(80)
                .collect();
            let reason = format!("asked for {digest}, and Docker-Content-Digest says {said:?}");
            Err(Failure::answer(doing, reason))
        }
        _ => Ok(()),
    }
}
