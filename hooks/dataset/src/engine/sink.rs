//! From a connection to the disk.

use std::{
    fs::File,
    io,
    os::unix::fs::FileExt,
    sync::{Arc, atomic::Ordering::Relaxed},
};

use bytes::Bytes;
use rekindle_store::{
    StoreError,
    crc::{Crc64, Running},
};

use super::{Job, Part};

/// Bytes that are gathered before they are hashed and written: 16 KiB at a time costs 80 % more cycles a
/// byte, beyond 1 MiB nothing is gained.
pub(super) const BATCH: usize = 1 << 20;

/// Where the bytes of one part go: hashed and written in batches, off the runtime's threads.
#[derive(Debug)]
pub(super) struct Sink<'a> {
    job: &'a Job,
    file: Arc<File>,
    index: usize,
    /// Written up to here.
    pub(super) at: u64,
    running: Running,
    batch: Vec<Bytes>,
    batched: usize,
}

impl<'a> Sink<'a> {
    pub(super) fn new(job: &'a Job, part: &Part, file: Arc<File>) -> Self {
        Self {
            job,
            file,
            index: part.file,
            at: part.start,
            running: Running::default(),
            batch: Vec::new(),
            batched: 0,
        }
    }

    /// The checksum of what is written.
    pub(super) fn crc(&self) -> Crc64 {
        self.running.crc()
    }

    pub(super) fn received(&self) -> u64 {
        self.at + self.batched as u64
    }

    pub(super) async fn push(&mut self, bytes: Bytes) -> Result<(), StoreError> {
        self.batched += bytes.len();
        self.batch.push(bytes);
        if self.batched >= BATCH {
            self.flush().await?;
        }
        Ok(())
    }

    pub(super) async fn flush(&mut self) -> Result<(), StoreError> {
        let (batch, at, file) = (
            std::mem::take(&mut self.batch),
            self.at,
            Arc::clone(&self.file),
        );
        let len = std::mem::take(&mut self.batched) as u64;
        if len == 0 {
            return Ok(());
        }
        let held = Arc::clone(&self.job.lock);
        let mut running = std::mem::take(&mut self.running);
        self.running = blocking(move || {
            let (_held, mut at) = (held, at);
            for bytes in batch {
                running.update(&bytes);
                file.write_all_at(&bytes, at)?;
                at += bytes.len() as u64;
            }
            Ok(running)
        })
        .await
        .map_err(|e| StoreError::io("write", &self.job.path(self.index))(e))?;
        self.at += len;
        self.job.counters.bytes.fetch_add(len, Relaxed);
        Ok(())
    }
}

/// Runs what blocks off the runtime's threads.
pub(super) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> io::Result<T> {
    match tokio::task::spawn_blocking(work).await {
        Ok(done) => done,
        Err(e) => match e.try_into_panic() {
            Ok(panic) => std::panic::resume_unwind(panic),
            Err(_) => Err(io::Error::other("the runtime is shutting down")),
        },
    }
}
