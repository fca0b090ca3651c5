//! From a URI to a folder that can be mounted.
//!
//! ```text
//!   allowed? ──▶ LIST + HEAD ──▶ published? ──yes──▶ ready (hit)
//!                    ▲               │ no
//!                    │           lock the key ──▶ published meanwhile? ──yes──▶ ready (hit)
//!                    │               │ no
//!                    │           space, parts, checksums ──▶ manifest ──▶ publish ──▶ ready
//!                    └── an object changed (3 rounds) ──┘
//! ```
//! Killed anywhere: the lock is released by the kernel, the partial folder stays, and whoever takes the
//! lock next continues from the parts that prove themselves.

use std::{
    fs,
    path::{Path, PathBuf},
    sync::{Arc, atomic::Ordering::Relaxed},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use rekindle_core::{
    config::{NodeConfig, Source},
    name::Namespace,
    uri::DatasetUri,
};
use rekindle_store::{
    Lock, StoreError, make_read_only, publish_dir, remove_tree, space, write_file,
};
use tokio::{
    task::JoinSet,
    time::{Instant, MissedTickBehavior},
};

use crate::{
    Cache, DatasetError, DatasetInfo, DatasetKey, Manifest, Progress, Tuning, Verification,
    Version, engine::Job, listing::Listing, manifest, origin::Origin,
};

/// Between two reports. The shim is promised one every 500 ms while bytes move.
const TICK: Duration = Duration::from_millis(250);

/// Weight of the last tick in the reported rate: it settles within about two seconds.
const NEWEST: f64 = 0.2;

/// What happens while a dataset is acquired.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event {
    /// The store is asked what there is.
    Listing,
    /// Bytes move, here or in the process that we wait for.
    Progress(Progress),
}

/// A dataset that can be mounted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ready {
    /// The folder to bind, read-only: files 0444, folders 0555, for any user.
    pub path: PathBuf,
    /// Number of files.
    pub files: u64,
    /// Bytes of all files.
    pub bytes: u64,
    /// The weakest verification of any file.
    pub verified: Verification,
    /// The hash of the listing.
    pub version: Version,
    /// Nothing was downloaded by this call.
    pub hit: bool,
}

/// Makes sure that `uri`, as its store lists it now, is on this node, and says where. `namespace` must be
/// allowed to have it, by the node's configuration and by the store, whoever fetched it first.
///
/// Dropping the future abandons the download in a state from which the next call continues.
///
/// # Errors
/// See [`DatasetError`]; in every case nothing is published, and no published dataset has changed.
pub async fn acquire(
    config: &NodeConfig,
    uri: &DatasetUri,
    namespace: &Namespace,
    tuning: Tuning,
    on_event: &(dyn Fn(Event) + Send + Sync),
) -> Result<Ready, DatasetError> {
    let source = config
        .source_for(uri, namespace)
        .ok_or_else(|| DatasetError::NotAllowed {
            uri: uri.to_string(),
            namespace: namespace.to_string(),
        })?;
    let endpoint = source.access.endpoint.clone();
    let acquisition = Acquisition {
        config,
        source,
        uri,
        tuning,
        cache: Cache::open(&config.datasets),
        key: DatasetKey::new(uri, endpoint.as_deref()),
        origin: Arc::new(Origin::open(config, source, uri, tuning).await?),
        on_event,
    };
    let mut round = 1;
    loop {
        match acquisition.round().await {
            Err(DatasetError::Changed { .. }) if round < tuning.rounds => round += 1,
            ended => return ended,
        }
    }
}

struct Acquisition<'a> {
    config: &'a NodeConfig,
    source: &'a Source,
    uri: &'a DatasetUri,
    tuning: Tuning,
    cache: Cache,
    key: DatasetKey,
    origin: Arc<Origin>,
    on_event: &'a (dyn Fn(Event) + Send + Sync),
}

impl Acquisition<'_> {
    /// One listing, and what it names. [`DatasetError::Changed`] when that was no longer there.
    async fn round(&self) -> Result<Ready, DatasetError> {
        (self.on_event)(Event::Listing);
        let listing = Arc::new(self.origin.list(self.uri).await?);
        self.refuse_weak(&listing)?;
        if let Some(info) = self.cache.get(&self.key, &listing.version)? {
            return self.ready(info, true);
        }
        let folder = self.cache.key_folder(&self.key)?;
        let lock = Arc::new(self.wait_for_lock(&folder).await?);
        if let Some(info) = self.cache.get(&self.key, &listing.version)? {
            return self.ready(info, true);
        }
        let partial = folder.join(format!("{}.partial", listing.version));
        clear_others(&folder, &partial)?;
        let job = self.prepare(&listing, &partial, lock)?;
        let job = Arc::new(job);
        self.download(&job, &folder.join("progress.json")).await?;
        let published = self.publish(&job, &listing, partial).await?;
        self.ready(published, false)
    }

    /// Before a byte is fetched: what the store gives to verify with is known from the listing.
    fn refuse_weak(&self, listing: &Listing) -> Result<(), DatasetError> {
        let minimum = self.source.minimum_verification;
        let weak = listing
            .objects
            .iter()
            .find(|object| object.expected.verification() < minimum);
        weak.map_or(Ok(()), |object| {
            Err(DatasetError::TooWeak {
                uri: self.uri.to_string(),
                path: object.path.clone(),
                found: object.expected.verification(),
                minimum,
            })
        })
    }

    fn ready(&self, info: DatasetInfo, hit: bool) -> Result<Ready, DatasetError> {
        // What is published may have been fetched for a source that requires less.
        if info.verified < self.source.minimum_verification {
            return Err(DatasetError::TooWeak {
                uri: info.uri,
                path: "a file of the published copy".to_owned(),
                found: info.verified,
                minimum: self.source.minimum_verification,
            });
        }
        Ok(Ready {
            path: info.path,
            files: info.files,
            bytes: info.bytes,
            verified: info.verified,
            version: info.version,
            hit,
        })
    }

    /// Waits for whoever downloads this key, and reports how far they are.
    async fn wait_for_lock(&self, folder: &Path) -> Result<Lock, DatasetError> {
        let path = folder.join("lock");
        loop {
            if let Some(lock) = Lock::try_acquire(&path)? {
                return Ok(lock);
            }
            let theirs = fs::read(folder.join("progress.json"))
                .ok()
                .and_then(|text| serde_json::from_slice(&text).ok())
                .unwrap_or_default();
            (self.on_event)(Event::Progress(theirs));
            tokio::time::sleep(TICK).await;
        }
    }

    fn prepare(
        &self,
        listing: &Arc<Listing>,
        partial: &Path,
        lock: Arc<Lock>,
    ) -> Result<Job, DatasetError> {
        fs::create_dir_all(partial).map_err(StoreError::io("make", partial))?;
        // What an earlier attempt has reserved counts as free for this one.
        let reserved = allocated(partial);
        space::require(partial, listing.bytes.saturating_sub(reserved))?;
        Job::new(
            self.uri.to_string(),
            Arc::clone(&self.origin),
            Arc::clone(listing),
            (self.config.datasets.part_size, self.tuning),
            partial,
            lock,
        )
    }

    async fn download(&self, job: &Arc<Job>, progress: &Path) -> Result<(), DatasetError> {
        let mut workers = JoinSet::new();
        for _ in 0..self.config.datasets.concurrency {
            workers.spawn(Arc::clone(job).work());
        }
        let mut report = Report::new(job);
        let mut tick = tokio::time::interval(TICK);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                ended = workers.join_next() => match ended {
                    None => break,
                    Some(Ok(result)) => result?,
                    Some(Err(e)) => match e.try_into_panic() {
                        Ok(panic) => std::panic::resume_unwind(panic),
                        Err(_) => break,
                    },
                },
                _ = tick.tick() => self.report(&mut report, progress),
            }
        }
        self.report(&mut report, progress);
        Ok(())
    }

    fn report(&self, report: &mut Report<'_>, file: &Path) {
        let now = report.now();
        if let Ok(text) = serde_json::to_vec(&now) {
            // For those who wait; a download does not fail over it.
            let _ = write_file(file, &text, false);
        }
        (self.on_event)(Event::Progress(now));
    }

    async fn publish(
        &self,
        job: &Arc<Job>,
        listing: &Listing,
        partial: PathBuf,
    ) -> Result<DatasetInfo, DatasetError> {
        let files = job.records().ok_or_else(|| DatasetError::Unavailable {
            doing: format!("fetching {}", self.uri),
            attempts: 1,
            last: "the download was stopped".to_owned(),
        })?;
        let published = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .map_or(0, |since| since.as_secs());
        let manifest = Manifest::new(
            self.uri.to_string(),
            self.source.access.endpoint.clone(),
            listing.version.clone(),
            published,
            files,
        );
        let dest = self.cache.folder(&self.key, &listing.version);
        let commit = move || -> Result<(), DatasetError> {
            let journal = partial.join("journal");
            fs::remove_file(&journal).map_err(StoreError::io("remove", &journal))?;
            let path = partial.join(manifest::FILE);
            let text = serde_json::to_vec(&manifest).map_err(|e| DatasetError::Manifest {
                path: path.clone(),
                reason: e.to_string(),
            })?;
            write_file(&path, &text, false)?;
            make_read_only(&partial.join("files"))?;
            Ok(publish_dir(&partial, &dest)?)
        };
        // A panic there is ours; a runtime that ends has nobody left to answer.
        tokio::task::spawn_blocking(commit)
            .await
            .unwrap_or_else(|e| std::panic::resume_unwind(e.into_panic()))?;
        let info = self.cache.get(&self.key, &listing.version)?;
        info.ok_or_else(|| DatasetError::Manifest {
            path: self
                .cache
                .folder(&self.key, &listing.version)
                .join(manifest::FILE),
            reason: "it was removed while it was published".to_owned(),
        })
    }
}

/// Counts into rates.
struct Report<'a> {
    job: &'a Job,
    last: (Instant, u64),
    rate: f64,
}

impl<'a> Report<'a> {
    fn new(job: &'a Job) -> Self {
        Self {
            job,
            last: (Instant::now(), 0),
            rate: 0.0,
        }
    }

    fn now(&mut self) -> Progress {
        let done = self.job.counters.bytes.load(Relaxed);
        let seconds = self.last.0.elapsed().as_secs_f64();
        if seconds > 0.05 {
            let newest = done.saturating_sub(self.last.1) as f64 / seconds;
            self.rate = match self.rate {
                rate if rate > 0.0 => rate * (1.0 - NEWEST) + newest * NEWEST,
                _ => newest,
            };
            self.last = (Instant::now(), done);
        }
        Progress {
            done,
            total: self.job.listing.bytes,
            files_done: self.job.counters.files.load(Relaxed),
            files_total: self.job.listing.objects.len() as u64,
            bytes_per_second: self.rate as u64,
        }
    }
}

/// Partial folders of listings that are no more: at most one is kept.
fn clear_others(folder: &Path, keep: &Path) -> Result<(), DatasetError> {
    let entries = fs::read_dir(folder).map_err(StoreError::io("list", folder))?;
    for entry in entries.flatten() {
        let path = entry.path();
        if path != keep && path.extension().is_some_and(|ext| ext == "partial") {
            remove_tree(&path)?;
        }
    }
    Ok(())
}

/// Bytes of disk below a folder.
fn allocated(folder: &Path) -> u64 {
    use std::os::unix::fs::MetadataExt;
    let Ok(entries) = fs::read_dir(folder) else {
        return 0;
    };
    let sizes = entries.flatten().map(|entry| match entry.metadata() {
        Ok(meta) if meta.is_dir() => allocated(&entry.path()),
        Ok(meta) => meta.blocks() * 512,
        Err(_) => 0,
    });
    sizes.sum()
}
