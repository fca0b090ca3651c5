//! One S3 store. The SDK signs and finds credentials; retries are ours, because the SDK's do not cover bodies and its
//! quota drains on 503s.

use std::{error::Error, future::Future, time::Duration};

use aws_sdk_s3::{
    config::http::HttpResponse,
    error::{ProvideErrorMetadata, SdkError},
};

use crate::StoreError;

mod bucket;
mod client;
mod tuning;

pub use bucket::{Bucket, Condition, Limits, Object, Small};
#[cfg(feature = "registry")]
pub(crate) use client::authorities;
pub use client::client;
pub use tuning::{Patience, Tuning};

/// Why a store did not do what it was asked. Each sentence stands alone.
#[derive(Debug, thiserror::Error)]
pub enum S3Error {
    /// It cannot be reached as the configuration says.
    #[error("the store cannot be reached as the configuration says: {0}")]
    Access(String),
    /// The store knows us and says no, or does not know us.
    #[error("{doing}: the store refuses these credentials ({answer})")]
    Denied {
        /// What was being done, to what.
        doing: String,
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
    /// The store cannot do such a thing.
    #[error("{doing}: the store cannot do that ({answer})")]
    Unsupported {
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
    /// An object is no longer what it was.
    #[error("{doing}: the object has changed since it was listed ({found})")]
    Changed {
        /// What was being done, to what.
        doing: String,
        /// What was found.
        found: String,
    },
    /// A file that was to be put into the store.
    #[error(transparent)]
    File(#[from] StoreError),
}

/// How one attempt ended, when it did not succeed.
#[derive(Debug)]
pub enum Failure {
    /// No retry helps.
    Final(S3Error),
    /// Another attempt may succeed; how this one ended.
    Again(String),
}

/// Sends until there is an answer, or patience ends.
///
/// # Errors
/// What the store says, or [`S3Error::Unavailable`].
pub async fn persist<T, E, F>(
    tuning: Tuning,
    doing: &impl Fn() -> String,
    send: impl Fn() -> F,
) -> Result<T, S3Error>
where
    E: Error + ProvideErrorMetadata + Send + Sync + 'static,
    F: Future<Output = Result<T, SdkError<E, HttpResponse>>>,
{
    let mut patience = Patience::new(tuning);
    loop {
        let last = match tokio::time::timeout(tuning.stall, send()).await {
            Ok(Ok(answer)) => return Ok(answer),
            Ok(Err(error)) => match classify(&error, doing) {
                Failure::Final(error) => return Err(error),
                Failure::Again(reason) => reason,
            },
            Err(_) => stalled(tuning.stall),
        };
        if !patience.wait().await {
            return Err(patience.ended(doing(), last));
        }
    }
}

/// How a request that brought nothing ended.
pub fn stalled(after: Duration) -> String {
    format!("no answer for {} ms", after.as_millis())
}

/// Whether another attempt helps.
pub fn classify<E>(error: &SdkError<E, HttpResponse>, doing: &impl Fn() -> String) -> Failure
where
    E: Error + ProvideErrorMetadata + Send + Sync + 'static,
{
    let doing = doing();
    let SdkError::ServiceError(service) = error else {
        let answer = sentence(error);
        return match hopeless(error) {
            true => Failure::Final(S3Error::Answer { doing, answer }),
            false => Failure::Again(answer),
        };
    };
    let status = service.raw().status().as_u16();
    let code = service.err().code().unwrap_or_default();
    let message = service.err().message().unwrap_or_default();
    let answer = [&format!("HTTP {status}"), code, message]
        .into_iter()
        .filter(|word| !word.is_empty())
        .collect::<Vec<_>>()
        .join(" ");
    match (status, code) {
        (501, _) => Failure::Final(S3Error::Unsupported { doing, answer }),
        (408 | 429 | 500..=599, _) | (400, "RequestTimeout") => Failure::Again(answer),
        (401 | 403, _) => Failure::Final(S3Error::Denied { doing, answer }),
        (404, _) => Failure::Final(S3Error::Missing { doing, answer }),
        // 416: the range that the listing promised is not there any more. 409: two have written at once.
        (412 | 416, _) | (409, "ConditionalRequestConflict") => Failure::Final(S3Error::Changed {
            doing,
            found: answer,
        }),
        _ => Failure::Final(S3Error::Answer { doing, answer }),
    }
}

/// No credentials, or a certificate that nobody here trusts: the same at every attempt.
pub(crate) fn hopeless(error: &(dyn Error + 'static)) -> bool {
    use rustls::Error::InvalidCertificate;
    if matches!(error.downcast_ref(), Some(InvalidCertificate(_)))
        || error.is::<aws_credential_types::provider::error::CredentialsError>()
    {
        return true;
    }
    // An I/O error hides what it was made of from `source`.
    let made_of = error
        .downcast_ref::<std::io::Error>()
        .and_then(std::io::Error::get_ref);
    made_of.is_some_and(|made_of| hopeless(made_of)) || error.source().is_some_and(hopeless)
}

/// An error with its causes, each said once. The SDK's own form adds a dump of its types.
pub fn sentence(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        let said = cause.to_string();
        if !text.contains(&said) {
            text = format!("{text}: {said}");
        }
        next = cause.source();
    }
    text
}
