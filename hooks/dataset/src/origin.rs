//! The outside world that bytes come from: an S3 store, or a folder of the node.

use std::sync::Arc;

use rekindle_core::{
    config::{NodeConfig, Source},
    uri::DatasetUri,
};

use rekindle_store::s3::Tuning;

use crate::{DatasetError, folder::Folder, listing::Listing, s3::Bucket};

/// How one attempt ended, when it did not succeed.
#[derive(Debug)]
pub(crate) enum Failure {
    /// No retry helps.
    Final(DatasetError),
    /// Another attempt may succeed; how this one ended.
    Again(String),
}

impl<E: Into<DatasetError>> From<E> for Failure {
    fn from(error: E) -> Self {
        Self::Final(error.into())
    }
}

#[derive(Debug)]
pub(crate) enum Origin {
    S3(Bucket),
    Folder(Arc<Folder>),
}

impl Origin {
    /// What `source` says about `uri`; nothing is asked of the store yet.
    pub(crate) async fn open(
        config: &NodeConfig,
        source: &Source,
        uri: &DatasetUri,
        tuning: Tuning,
    ) -> Result<Self, DatasetError> {
        match uri {
            DatasetUri::S3 { bucket, .. } => {
                Bucket::open(source, bucket, config.datasets.concurrency, tuning)
                    .await
                    .map(Self::S3)
            }
            DatasetUri::File { path } => Folder::open(source, uri, path)
                .map(Arc::new)
                .map(Self::Folder),
        }
    }

    pub(crate) async fn list(&self, uri: &DatasetUri) -> Result<Listing, DatasetError> {
        match self {
            Self::S3(bucket) => bucket.list(uri).await,
            Self::Folder(folder) => folder.list(uri),
        }
    }
}
