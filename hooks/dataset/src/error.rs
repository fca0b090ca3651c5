//! Why there is no dataset.

use std::path::PathBuf;

use rekindle_core::config::Verification;
use rekindle_store::StoreError;

/// Why a dataset could not be had. Each sentence stands alone: it reaches a pod's events.
#[derive(Debug, thiserror::Error)]
pub enum DatasetError {
    /// The node's configuration has no source for this URI and namespace.
    #[error(
        "{uri} is not allowed for namespace {namespace}: add it to a [[datasets.source]] in the node's configuration"
    )]
    NotAllowed {
        /// The dataset.
        uri: String,
        /// Who asked.
        namespace: String,
    },
    /// The source's configuration cannot be used.
    #[error("the source {allow:?} cannot be used: {reason}")]
    Source {
        /// Which source: its `allow`.
        allow: String,
        /// What is wrong, naming the file.
        reason: String,
    },
    /// The store lists something that must not become a path.
    #[error("listing {uri}: the key {key:?} cannot become a file: {reason}")]
    Key {
        /// The dataset.
        uri: String,
        /// The key, cut to 200 characters.
        key: String,
        /// What is wrong with it.
        reason: &'static str,
    },
    /// The store lists more than is sensible, or nothing.
    #[error("listing {uri}: {reason}")]
    Listing {
        /// The dataset.
        uri: String,
        /// What was found.
        reason: String,
    },
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
    /// An answer that no retry changes.
    #[error("{doing}: {answer}")]
    Answer {
        /// What was being done, to what.
        doing: String,
        /// What came back.
        answer: String,
    },
    /// Tried until patience ran out; what is there is kept, and the next try continues.
    #[error("{doing}: gave up after {attempts} attempts without a byte; the last: {last}")]
    Unavailable {
        /// What was being done, to what.
        doing: String,
        /// How often.
        attempts: u32,
        /// How the last attempt ended.
        last: String,
    },
    /// An object is no longer what the listing said.
    #[error("{doing}: the object has changed since it was listed ({found})")]
    Changed {
        /// What was being done, to what.
        doing: String,
        /// What was found.
        found: String,
    },
    /// The bytes are not those that the store has a checksum of.
    #[error(
        "{uri}: {path} arrived with {kind} {found}, but the store says {expected}, twice: the object is damaged in the store or on the way"
    )]
    Corrupt {
        /// The dataset.
        uri: String,
        /// The file.
        path: String,
        /// The checksum's name.
        kind: &'static str,
        /// What the store says.
        expected: String,
        /// What was computed.
        found: String,
    },
    /// The store gives less to verify with than the node requires.
    #[error("{uri}: {path} can be verified by {found} only, and the node's configuration requires {minimum}", found = name(*.found), minimum = name(*.minimum))]
    TooWeak {
        /// The dataset.
        uri: String,
        /// The first such file.
        path: String,
        /// What is possible.
        found: Verification,
        /// What is required.
        minimum: Verification,
    },
    /// Somebody uses it.
    #[error(
        "{uri} version {version} is in use by a container on this node: remove it when the container is gone"
    )]
    InUse {
        /// The dataset.
        uri: String,
        /// The version.
        version: String,
    },
    /// What is published is not what its manifest says.
    #[error(
        "{}: {reason}: remove the folder {} when no container uses it, and fetch it again",
        path.display(),
        path.parent().unwrap_or(path).display()
    )]
    Manifest {
        /// The manifest, in the dataset's folder.
        path: PathBuf,
        /// What is wrong.
        reason: String,
    },
    /// The node's disk.
    #[error(transparent)]
    Store(#[from] StoreError),
}

#[cfg(feature = "s3")]
impl From<rekindle_store::s3::S3Error> for DatasetError {
    fn from(error: rekindle_store::s3::S3Error) -> Self {
        use rekindle_store::s3::S3Error;
        match error {
            S3Error::Denied { doing, answer } => Self::Denied { doing, answer },
            S3Error::Missing { doing, answer } => Self::Missing { doing, answer },
            S3Error::Answer { doing, answer } | S3Error::Unsupported { doing, answer } => {
                Self::Answer { doing, answer }
            }
            S3Error::Unavailable {
                doing,
                attempts,
                last,
            } => Self::Unavailable {
                doing,
                attempts,
                last,
            },
            S3Error::Changed { doing, found } => Self::Changed { doing, found },
            // Of a store's client, and of files that are put into one: nobody here asks for either.
            S3Error::Access(answer) => Self::Answer {
                doing: "asking the store".to_owned(),
                answer,
            },
            S3Error::File(error) => Self::Store(error),
        }
    }
}

/// The name that configuration, manifests and events use.
pub(crate) fn name(verification: Verification) -> &'static str {
    match verification {
        Verification::TransportOnly => "transport-only",
        Verification::EtagMd5 => "etag-md5",
        Verification::StoreChecksum => "store-checksum",
    }
}

impl DatasetError {
    /// Whether the same call may succeed later without anybody changing anything.
    pub fn is_retryable(&self) -> bool {
        match self {
            Self::Unavailable { .. } | Self::Changed { .. } => true,
            Self::Store(error) => error.is_full(),
            _ => false,
        }
    }

    /// Whether the node refuses by its own rules, before or without asking a store.
    pub fn is_refusal(&self) -> bool {
        matches!(
            self,
            Self::NotAllowed { .. } | Self::TooWeak { .. } | Self::InUse { .. }
        )
    }
}
