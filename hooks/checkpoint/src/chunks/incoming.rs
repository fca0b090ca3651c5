//! Packs that are not all on the node: which parts are, who fetches the rest, and in which order.
//!
//! ```text
//!            ┌── another process wrote it ───────────────┐
//!            │                                           ▼
//!         missing ──▶ streamed (its turn has come) ──▶ here
//!            └──────▶ urgent (somebody waits) ───────────▲ │
//!                       ▲                                  │ not what was sealed
//!                       └──────────────────────────────────┘
//! ```
//! A pack has its full size from the beginning, and what did not come yet is a hole in it. So what is there is said by
//! the file itself, to this process and to any other that fetches the same image, and nothing has to be kept in step.
//! Nothing is believed by that: whoever reads a chunk compares it, and where it is not what was sealed, it is fetched
//! again.
//!
//! Threads of two kinds: some stream, in the order that they are told, as much as they can ([`Incoming::stream`], in one
//! process of the node); others fetch what somebody waits for, however much is streamed.

use std::{
    collections::VecDeque,
    error::Error,
    fmt,
    fs::File,
    io,
    ops::Range,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    thread,
    time::Duration,
};

use rustix::fs::{Mode, OFlags, SeekFrom, seek};

use super::ChunkError;

/// What is fetched at least: a chunk that somebody waits for, and as much around it as costs no time beside the way to
/// the store and back.
const SEGMENT: u64 = 256 << 10;
/// What one request streams at most: 16 segments. At 20 ms until the first byte and 80 MB/s, which a connection to S3
/// has, two thirds of the time bytes come.
const RUN: usize = 16;
/// How many of scattered segments are fetched in the order in which they lie, and not in that in which they are wanted: so
/// that there are fewer requests, each of which costs as much as some segments.
const WINDOW: usize = 256;
/// As many segments between two that are wanted are fetched with them: they cost less than a request.
const BRIDGE: usize = 2;
/// Threads that fetch what somebody waits for: as many faults are on their way at once.
const URGENT: usize = 4;
/// How long a reader waits for another process before it looks again.
const LOOK: Duration = Duration::from_millis(2);

/// Why a store does not give what it has.
pub type RemoteError = Arc<dyn Error + Send + Sync>;

/// Where the packs of an image lie as well.
pub trait Remote: fmt::Debug + Send + Sync {
    /// What it is called in sentences.
    fn name(&self) -> String;

    /// Hands the bytes of a part of a pack, by the pack's place in the manifest, to `take`, in their order. Blocks.
    ///
    /// # Errors
    /// When it cannot be had, after all patience.
    fn read(
        &self,
        pack: usize,
        range: Range<u64>,
        take: &mut dyn FnMut(&[u8]),
    ) -> Result<(), RemoteError>;
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Segment {
    Missing,
    /// In a run that is on its way.
    Streamed,
    /// Somebody waits for it, and it is fetched for itself.
    Urgent,
    Here,
}

/// A segment: its pack, and its place in that.
type Place = (usize, usize);

#[derive(Debug)]
struct Pack {
    path: PathBuf,
    file: File,
    size: u64,
}

#[derive(Debug, Default)]
struct State {
    /// By pack.
    segments: Vec<Vec<Segment>>,
    urgent: VecDeque<Place>,
    /// What is streamed next.
    order: VecDeque<Place>,
    /// Whether it is this process that streams.
    streams: bool,
    ended: Option<RemoteError>,
}

/// The packs of one image, and the threads that fetch them.
#[derive(Debug)]
pub(super) struct Incoming {
    packs: Vec<Pack>,
    remote: Box<dyn Remote>,
    state: Mutex<State>,
    changed: Condvar,
}

/// Nobody wants the rest any more.
#[derive(Debug, thiserror::Error)]
#[error("nobody fetches it any more")]
struct Stopped;

impl Incoming {
    /// Begins to fetch what is asked for; `packs` are files with their sizes, in the order of the manifest. `streams` is
    /// how many threads stream when they are told to.
    pub(super) fn open<'a>(
        packs: impl Iterator<Item = (&'a Path, u64)>,
        remote: Box<dyn Remote>,
        streams: usize,
    ) -> Result<Arc<Self>, ChunkError> {
        let open = |(path, size): (&Path, u64)| {
            let flags = OFlags::RDWR | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
            let file = rustix::fs::open(path, flags, Mode::empty());
            let file = file.map_err(|e| ChunkError::io("write", path)(e.into()))?;
            Ok::<_, ChunkError>(Pack {
                path: path.to_owned(),
                file: file.into(),
                size,
            })
        };
        let packs: Vec<Pack> = packs.map(open).collect::<Result<_, _>>()?;
        let segments = packs.iter().map(|pack| {
            let count = pack.size.div_ceil(SEGMENT) as usize;
            vec![Segment::Missing; count]
        });
        let incoming = Arc::new(Self {
            state: Mutex::new(State {
                segments: segments.collect(),
                ..State::default()
            }),
            packs,
            remote,
            changed: Condvar::new(),
        });
        let begin = |run: fn(&Self)| {
            let incoming = Arc::clone(&incoming);
            let thread = thread::Builder::new().name("fetch".to_owned());
            let begun = thread.spawn(move || run(&incoming)).map(drop);
            begun.map_err(ChunkError::io("begin to fetch", Path::new("packs")))
        };
        for _ in 0..URGENT {
            begin(Self::serve)?;
        }
        for _ in 0..streams {
            begin(Self::run)?;
        }
        Ok(incoming)
    }

    /// Streams these parts of packs, behind those that it was told before.
    pub(super) fn stream(&self, parts: impl Iterator<Item = (usize, Range<u64>)>) {
        self.stream_segments(segments(parts));
    }

    /// The same of parts that are small and lie anywhere, in about their order.
    pub(super) fn stream_scattered(&self, parts: impl Iterator<Item = (usize, Range<u64>)>) {
        let all: Vec<Place> = segments(parts).collect();
        let windows = all.chunks(WINDOW).map(|window| {
            let mut window = window.to_vec();
            window.sort_unstable();
            window
        });
        self.stream_segments(windows.flat_map(bridged));
    }

    fn stream_segments(&self, all: impl Iterator<Item = Place>) {
        let mut told: Vec<Vec<bool>> = (self.packs.iter())
            .map(|pack| vec![false; pack.size.div_ceil(SEGMENT) as usize])
            .collect();
        let mut state = self.lock();
        state.streams = true;
        for (pack, place) in all {
            if !std::mem::replace(&mut told[pack][place], true) {
                state.order.push_back((pack, place));
            }
        }
        self.changed.notify_all();
    }

    /// Whether this part of a pack is here. What is not is fetched before everything else.
    pub(super) fn ready(&self, pack: usize, range: &Range<u64>) -> Result<bool, ChunkError> {
        let mut state = self.alive()?;
        let mut ready = true;
        for place in places(range) {
            if self.is_here(&mut state, (pack, place)) {
                continue;
            }
            ready = false;
            if state.segments[pack][place] != Segment::Urgent {
                self.urge(&mut state, (pack, place));
            }
        }
        Ok(ready)
    }

    /// Waits until this part of a pack is here. Where this process streams, what is missing comes next, if it is wanted
    /// `now`, or in its turn; where another one does, it is waited for.
    pub(super) fn wait(
        &self,
        pack: usize,
        range: &Range<u64>,
        now: bool,
    ) -> Result<(), ChunkError> {
        let mut state = self.alive()?;
        loop {
            let mut ready = true;
            for place in places(range) {
                if self.is_here(&mut state, (pack, place)) {
                    continue;
                }
                ready = false;
                // What has no turn comes when all others have had theirs.
                let next = state.streams && (now || state.order.is_empty());
                if next && state.segments[pack][place] == Segment::Missing {
                    self.urge(&mut state, (pack, place));
                }
            }
            if ready {
                return Ok(());
            }
            let waited = self.changed.wait_timeout(state, LOOK);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
            if let Some(error) = &state.ended {
                return Err(ChunkError::Away(Arc::clone(error)));
            }
        }
    }

    /// What is here of this part is not what was sealed: fetches it again, and waits for that.
    pub(super) fn again(&self, pack: usize, range: &Range<u64>) -> Result<(), ChunkError> {
        let mut state = self.alive()?;
        for place in places(range) {
            if state.segments[pack][place] == Segment::Here {
                self.urge(&mut state, (pack, place));
            }
        }
        drop(state);
        self.wait(pack, range, true)
    }

    /// That the store gives something else.
    pub(super) fn lied(&self, pack: usize, offset: u64) -> ChunkError {
        let file = self.packs[pack].path.file_name().unwrap_or_default();
        ChunkError::Lied {
            store: self.remote.name(),
            pack: file.to_string_lossy().into_owned(),
            offset,
        }
    }

    /// Ends the threads, and everybody's wait.
    pub(super) fn stop(&self) {
        self.end(Arc::new(Stopped));
    }

    /// Puts what has come on the disk.
    pub(super) fn sync(&self) -> Result<(), ChunkError> {
        for pack in &self.packs {
            let synced = pack.file.sync_all();
            synced.map_err(ChunkError::io("sync", &pack.path))?;
        }
        Ok(())
    }

    fn end(&self, why: RemoteError) {
        self.lock().ended.get_or_insert(why);
        self.changed.notify_all();
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn alive(&self) -> Result<MutexGuard<'_, State>, ChunkError> {
        let state = self.lock();
        match &state.ended {
            Some(error) => Err(ChunkError::Away(Arc::clone(error))),
            None => Ok(state),
        }
    }

    fn urge(&self, state: &mut State, place: Place) {
        state.segments[place.0][place.1] = Segment::Urgent;
        state.urgent.push_back(place);
        self.changed.notify_all();
    }

    /// Whether a segment is here; another process may have written it.
    fn is_here(&self, state: &mut State, (pack, place): Place) -> bool {
        let segment = &mut state.segments[pack][place];
        if *segment == Segment::Missing && self.packs[pack].has(self.range((pack, place), 1)) {
            *segment = Segment::Here;
        }
        *segment == Segment::Here
    }

    fn range(&self, (pack, place): Place, segments: usize) -> Range<u64> {
        let begin = place as u64 * SEGMENT;
        begin..(begin + segments as u64 * SEGMENT).min(self.packs[pack].size)
    }

    /// A thread that fetches what somebody waits for.
    fn serve(&self) {
        self.work(|state| state.urgent.pop_front().map(|place| (place, 1)));
    }

    /// A thread that streams.
    fn run(&self) {
        self.work(|state| {
            loop {
                let first = state.order.pop_front()?;
                if self.is_here(state, first)
                    || state.segments[first.0][first.1] != Segment::Missing
                {
                    continue;
                }
                let mut run = 1;
                while run < RUN && state.order.front() == Some(&(first.0, first.1 + run)) {
                    let next = (first.0, first.1 + run);
                    let missing = !self.is_here(state, next)
                        && state.segments[next.0][next.1] == Segment::Missing;
                    if !missing {
                        break;
                    }
                    state.order.pop_front();
                    run += 1;
                }
                state.segments[first.0][first.1..first.1 + run].fill(Segment::Streamed);
                return Some((first, run));
            }
        });
    }

    /// Fetches what `next` says, until the end.
    fn work(&self, next: impl Fn(&mut State) -> Option<(Place, usize)>) {
        loop {
            let mut state = self.lock();
            let (first, run) = loop {
                if state.ended.is_some() {
                    return;
                }
                if let Some(found) = next(&mut state) {
                    break found;
                }
                let waited = self.changed.wait(state);
                state = waited.unwrap_or_else(PoisonError::into_inner);
            };
            drop(state);
            match self.fetch(first.0, self.range(first, run)) {
                Ok(()) => {
                    let mut state = self.lock();
                    state.segments[first.0][first.1..first.1 + run].fill(Segment::Here);
                    self.changed.notify_all();
                }
                Err(error) => return self.end(error),
            }
        }
    }

    fn fetch(&self, pack: usize, range: Range<u64>) -> Result<(), RemoteError> {
        let Pack { path, file, .. } = &self.packs[pack];
        let (mut at, mut written) = (range.start, Ok(()));
        let end = range.end;
        self.remote.read(pack, range, &mut |bytes| {
            // More than was asked for is nobody's.
            let bytes = &bytes[..bytes.len().min((end - at) as usize)];
            if written.is_ok() {
                written = file.write_all_at(bytes, at);
            }
            at += bytes.len() as u64;
        })?;
        let error: ChunkError = match written {
            Err(e) => ChunkError::io("write", path)(e),
            Ok(()) if at == end => return Ok(()),
            Ok(()) => ChunkError::io("fetch", path)(io::ErrorKind::UnexpectedEof.into()),
        };
        Err(Arc::new(error))
    }
}

impl Pack {
    /// Whether none of this range is a hole. Where a file system knows no holes all of it is there, and is found to be
    /// wrong when it is read.
    fn has(&self, range: Range<u64>) -> bool {
        match seek(&self.file, SeekFrom::Hole(range.start)) {
            Ok(hole) => hole >= range.end,
            Err(_) => false,
        }
    }
}

/// The segments that parts of packs lie in.
fn segments(parts: impl Iterator<Item = (usize, Range<u64>)>) -> impl Iterator<Item = Place> {
    parts.flat_map(|(pack, range)| places(&range).map(move |place| (pack, place)))
}

/// Segments in the order in which they lie, with those that lie between two of them.
fn bridged(sorted: Vec<Place>) -> impl Iterator<Item = Place> {
    let mut last: Option<Place> = None;
    sorted.into_iter().flat_map(move |(pack, place)| {
        let first = match last.replace((pack, place)) {
            Some((same, before)) if same == pack && place - before <= BRIDGE + 1 => before + 1,
            _ => place,
        };
        (first..=place).map(move |place| (pack, place))
    })
}

/// The places of the segments that a part of a pack lies in.
fn places(range: &Range<u64>) -> Range<usize> {
    (range.start / SEGMENT) as usize..range.end.div_ceil(SEGMENT) as usize
}

#[cfg(test)]
pub(super) mod tests;
