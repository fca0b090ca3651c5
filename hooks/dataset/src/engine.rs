//! One download: a queue of parts, and workers that take from it until it is empty.
//!
//! ```text
//!   part ──claimed by the journal? read back──▶ settled ──last of its file?──▶ compared with the store's
//!     └────────fetched, resumed, retried───────────▲                           checksum ──▶ file done
//!                                                  └──── differs, once: all its parts again ────┘
//! ```
//! Memory is bounded by the workers: each holds at most [`sink::BATCH`] bytes that are not written yet.

use std::{
    collections::{HashMap, VecDeque},
    fs::{self, File, OpenOptions},
    io,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
};

use rekindle_store::{
    Lock, StoreError,
    crc::Crc64,
    s3::{Patience, sentence, stalled},
};
use rustix::{
    fs::{FallocateFlags, fallocate},
    io::Errno,
};

use crate::{
    DatasetError, FileRecord, Tuning,
    checksum::Mismatch,
    folder::{Folder, read_back},
    journal::{Journal, PartId},
    listing::{Listing, Object},
    origin::{Failure, Origin},
    s3::Bucket,
};

mod sink;

use sink::{Sink, blocking};

/// How often the bytes of one file may arrive wrong.
const MAX_WRONG: u32 = 2;

#[derive(Debug, Default)]
pub(crate) struct Counters {
    pub(crate) bytes: AtomicU64,
    pub(crate) files: AtomicU64,
}

#[derive(Debug)]
pub(crate) struct Job {
    pub(crate) uri: String,
    pub(crate) origin: Arc<Origin>,
    pub(crate) listing: Arc<Listing>,
    pub(crate) tuning: Tuning,
    pub(crate) counters: Counters,
    part_size: u64,
    /// Where the files are written.
    folder: PathBuf,
    journal: Journal,
    files: Vec<Mutex<FileState>>,
    queue: Mutex<VecDeque<Part>>,
    /// Held until the last write of the last worker has ended, also when the download is abandoned.
    lock: Arc<Lock>,
}

#[derive(Debug, Default)]
struct FileState {
    open: Option<Arc<File>>,
    parts: Vec<Option<Crc64>>,
    settled: usize,
    wrong: u32,
    record: Option<FileRecord>,
}

#[derive(Debug, Clone, Copy)]
struct Part {
    file: usize,
    index: usize,
    start: u64,
    end: u64,
    claimed: Option<Crc64>,
}

impl Part {
    fn id(&self) -> PartId {
        // Both fit: there are at most a million files, and a part has at least 1 MiB.
        let narrow = |n| u32::try_from(n).unwrap_or(u32::MAX);
        (narrow(self.file), narrow(self.index))
    }

    fn len(&self) -> u64 {
        self.end - self.start
    }
}

impl Job {
    pub(crate) fn new(
        uri: String,
        origin: Arc<Origin>,
        listing: Arc<Listing>,
        (part_size, tuning): (u64, Tuning),
        partial: &Path,
        lock: Arc<Lock>,
    ) -> Result<Self, DatasetError> {
        let folder = partial.join("files");
        fs::create_dir_all(&folder).map_err(StoreError::io("make", &folder))?;
        let (journal, claims) = Journal::open(&partial.join("journal"), part_size)?;
        let sizes = listing.objects.iter().map(|object| object.size);
        let files = sizes
            .map(|size| {
                let parts = vec![None; parts_of(size, part_size)];
                Mutex::new(FileState {
                    parts,
                    ..FileState::default()
                })
            })
            .collect();
        let mut job = Self {
            uri,
            origin,
            tuning,
            counters: Counters::default(),
            part_size,
            folder,
            journal,
            files,
            queue: Mutex::default(),
            listing,
            lock,
        };
        job.queue = Mutex::new(job.all_parts(&claims));
        Ok(job)
    }

    /// What the journal claims comes first, so that progress begins where it ended.
    fn all_parts(&self, claims: &HashMap<PartId, Crc64>) -> VecDeque<Part> {
        let (mut claimed, mut rest) = (VecDeque::new(), VecDeque::new());
        for file in 0..self.files.len() {
            for mut part in self.parts_of_file(file) {
                part.claimed = claims.get(&part.id()).copied();
                if part.claimed.is_some() {
                    claimed.push_back(part);
                } else {
                    rest.push_back(part);
                }
            }
        }
        claimed.append(&mut rest);
        claimed
    }

    fn parts_of_file(&self, file: usize) -> impl Iterator<Item = Part> + use<> {
        let (size, part_size) = (self.listing.objects[file].size, self.part_size);
        (0..parts_of(size, part_size)).map(move |index| {
            let start = index as u64 * part_size;
            Part {
                file,
                index,
                start,
                end: size.min(start + part_size),
                claimed: None,
            }
        })
    }

    fn object(&self, part: &Part) -> &Object {
        &self.listing.objects[part.file]
    }

    /// Takes parts until there are none. Any number of workers may run.
    pub(crate) async fn work(self: Arc<Self>) -> Result<(), DatasetError> {
        loop {
            let Some(part) = lock(&self.queue).pop_front() else {
                return Ok(());
            };
            let file = self.open(part.file)?;
            let crc = match self.recheck(&part, &file).await? {
                Some(crc) => crc,
                None => {
                    let crc = match &*self.origin {
                        Origin::S3(bucket) => self.fetch(bucket, &part, &file).await?,
                        Origin::Folder(folder) => self.copy(folder, &part, &file).await?,
                    };
                    self.journal
                        .note(part.id(), crc)
                        .map_err(StoreError::io("write the journal of", &self.folder))?;
                    crc
                }
            };
            drop(file);
            if let Some(whole) = self.settle(&part, crc) {
                self.finish(part.file, whole).await?;
            }
        }
    }

    /// The files, when all workers are done; `None` when one is missing.
    pub(crate) fn records(&self) -> Option<Vec<FileRecord>> {
        self.files
            .iter()
            .map(|file| lock(file).record.clone())
            .collect()
    }

    fn path(&self, file: usize) -> PathBuf {
        self.folder.join(&self.listing.objects[file].path)
    }

    /// Opens a file at its full size; its blocks are reserved, so that a full disk shows here.
    fn open(&self, file: usize) -> Result<Arc<File>, StoreError> {
        let mut state = lock(&self.files[file]);
        if let Some(open) = &state.open {
            return Ok(Arc::clone(open));
        }
        let (path, size) = (self.path(file), self.listing.objects[file].size);
        let make = || -> io::Result<File> {
            if let Some(parent) = path.parent() {
                fs::create_dir_all(parent)?;
            }
            let open = OpenOptions::new()
                .read(true)
                .write(true)
                .create(true)
                .truncate(false)
                .open(&path)?;
            open.set_len(size)?;
            if size > 0 {
                match fallocate(&open, FallocateFlags::empty(), 0, size) {
                    Ok(()) | Err(Errno::OPNOTSUPP | Errno::NOSYS) => {}
                    Err(e) => return Err(e.into()),
                }
            }
            Ok(open)
        };
        let open = Arc::new(make().map_err(StoreError::io("make room for", &path))?);
        state.open = Some(Arc::clone(&open));
        Ok(open)
    }

    /// Whether the bytes that the journal claims are really there.
    async fn recheck(&self, part: &Part, file: &Arc<File>) -> Result<Option<Crc64>, DatasetError> {
        let Some(claimed) = part.claimed else {
            return Ok(None);
        };
        let (file, start, end) = (Arc::clone(file), part.start, part.end);
        let found = blocking(move || read_back(&file, start, end))
            .await
            .map_err(StoreError::io("read back", &self.path(part.file)))?;
        if found != claimed {
            return Ok(None);
        }
        self.counters.bytes.fetch_add(part.len(), Relaxed);
        Ok(Some(found))
    }

    async fn fetch(
        &self,
        bucket: &Bucket,
        part: &Part,
        file: &Arc<File>,
    ) -> Result<Crc64, DatasetError> {
        let mut sink = Sink::new(self, part, Arc::clone(file));
        let mut patience = Patience::new(self.tuning);
        while sink.at < part.end {
            let before = sink.at;
            let last = match self.attempt(bucket, part, &mut sink).await {
                Ok(()) => continue,
                Err(Failure::Final(error)) => return Err(error),
                Err(Failure::Again(reason)) => reason,
            };
            if sink.at > before {
                patience.renew();
            }
            if !patience.wait().await {
                return Err(DatasetError::Unavailable {
                    doing: format!("fetching {} of {}", self.object(part).path, self.uri),
                    attempts: patience.failed(),
                    last,
                });
            }
        }
        Ok(sink.crc())
    }

    /// One request for what is left of a part. Whatever arrives is written, however it ends.
    async fn attempt(
        &self,
        bucket: &Bucket,
        part: &Part,
        sink: &mut Sink<'_>,
    ) -> Result<(), Failure> {
        let stall = self.tuning.stall;
        let get = bucket.get(self.object(part), sink.at, part.end);
        let mut body = tokio::time::timeout(stall, get)
            .await
            .map_err(|_| Failure::Again(stalled(stall)))??;
        let ended = loop {
            match tokio::time::timeout(stall, body.next()).await {
                Ok(Some(Ok(bytes))) => {
                    if bytes.len() as u64 > part.end - sink.received() {
                        break Some("the body is longer than what was asked for".to_owned());
                    }
                    sink.push(bytes).await?;
                }
                Ok(Some(Err(e))) => break Some(format!("the body broke off: {}", sentence(&e))),
                Ok(None) if sink.received() < part.end => {
                    break Some("the body is shorter than announced".to_owned());
                }
                Ok(None) => break None,
                Err(_) => break Some(stalled(stall)),
            }
        };
        sink.flush().await?;
        ended.map_or(Ok(()), |reason| Err(Failure::Again(reason)))
    }

    async fn copy(
        &self,
        folder: &Arc<Folder>,
        part: &Part,
        file: &Arc<File>,
    ) -> Result<Crc64, DatasetError> {
        let (folder, file) = (Arc::clone(folder), Arc::clone(file));
        let (object, start, end) = (self.object(part).clone(), part.start, part.end);
        let copied = blocking(move || Ok(folder.copy(&object, start, end, &file))).await;
        let crc = copied.map_err(StoreError::io("copy to", &self.path(part.file)))??;
        self.counters.bytes.fetch_add(part.len(), Relaxed);
        Ok(crc)
    }

    /// Notes a part; the checksum of the whole file when it was the last one.
    fn settle(&self, part: &Part, crc: Crc64) -> Option<Crc64> {
        let mut state = lock(&self.files[part.file]);
        state.parts[part.index] = Some(crc);
        state.settled += 1;
        // Only now: combining costs some 20 µs a part.
        if state.settled < state.parts.len() {
            return None;
        }
        let mut whole = Crc64::EMPTY;
        for (part, crc) in self.parts_of_file(part.file).zip(&state.parts) {
            whole = whole.then((*crc)?, part.len());
        }
        Some(whole)
    }

    /// Compares a complete file with what the store says; sends it round once more when it differs.
    async fn finish(&self, file: usize, crc: Crc64) -> Result<(), DatasetError> {
        let object = self.listing.objects[file].clone();
        let (path, open) = (self.path(file), lock(&self.files[file]).open.take());
        let reading = path.clone();
        let expected = object.expected.clone();
        let checked = blocking(move || {
            let checked = expected.check(&reading, crc)?;
            // Now, beside the downloads, instead of all at once before publishing.
            if let (Ok(_), Some(open)) = (&checked, open) {
                open.sync_data()?;
            }
            Ok(checked)
        })
        .await
        .map_err(StoreError::io("read back", &path))?;
        let mut state = lock(&self.files[file]);
        match checked {
            Ok(checked) => {
                state.record = Some(FileRecord {
                    path: object.path,
                    size: object.size,
                    etag: object.etag,
                    crc64nvme: crc,
                    verified: checked.verification(),
                });
                self.counters.files.fetch_add(1, Relaxed);
                Ok(())
            }
            Err(mismatch) => {
                state.wrong += 1;
                state.parts.fill(None);
                state.settled = 0;
                let wrong = state.wrong;
                drop(state);
                self.again(file, wrong, mismatch)
            }
        }
    }

    fn again(&self, file: usize, wrong: u32, mismatch: Mismatch) -> Result<(), DatasetError> {
        let object = &self.listing.objects[file];
        for part in self.parts_of_file(file) {
            // So that whoever continues this download does not believe these bytes either.
            self.journal
                .note(part.id(), Crc64::EMPTY)
                .map_err(StoreError::io("write the journal of", &self.folder))?;
        }
        self.counters.bytes.fetch_sub(object.size, Relaxed);
        if wrong >= MAX_WRONG {
            return Err(DatasetError::Corrupt {
                uri: self.uri.clone(),
                path: object.path.clone(),
                kind: mismatch.kind,
                expected: mismatch.expected,
                found: mismatch.found,
            });
        }
        lock(&self.queue).extend(self.parts_of_file(file));
        Ok(())
    }
}

fn parts_of(size: u64, part_size: u64) -> usize {
    // An empty file has one empty part: somebody must create it.
    usize::try_from(size.div_ceil(part_size))
        .unwrap_or(usize::MAX)
        .max(1)
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Nothing that is done under these locks can panic half-way.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
