use std::{
    fs,
    sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering},
    time::Instant,
};

use super::super::tests::{Written, chunks_of, noise};
use super::*;
use crate::chunks::{CHUNK, Chunks};

/// What a store does with a request.
type Rule = dyn Fn(usize) -> Answer + Send + Sync;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Answer {
    Truth,
    /// One wrong byte.
    Flip,
    /// As many bytes of something else.
    Other,
    /// Fewer bytes.
    Short,
    /// More bytes.
    Long,
    Refuse,
    /// Nothing until the gate is open.
    Wait,
}

/// A store of packs.
struct Store {
    packs: Vec<Vec<u8>>,
    rule: Box<Rule>,
    requests: AtomicUsize,
    bytes: AtomicU64,
    asked: Mutex<Vec<Range<u64>>>,
    gate: AtomicBool,
}

impl fmt::Debug for Store {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Store")
    }
}

#[derive(Debug, thiserror::Error)]
#[error("the store is closed today")]
struct Closed;

impl Remote for Arc<Store> {
    fn name(&self) -> String {
        "s3://test/".to_owned()
    }

    fn read(
        &self,
        pack: usize,
        range: Range<u64>,
        take: &mut dyn FnMut(&[u8]),
    ) -> Result<(), RemoteError> {
        let nth = self.requests.fetch_add(1, Ordering::SeqCst);
        self.asked.lock().unwrap().push(range.clone());
        let mut bytes = self.packs[pack][range.start as usize..range.end as usize].to_vec();
        match (self.rule)(nth) {
            Answer::Truth => {}
            Answer::Flip => bytes[0] ^= 1,
            Answer::Other => bytes = noise(99, bytes.len()),
            Answer::Short => bytes.truncate(bytes.len() - 1),
            Answer::Long => bytes.extend([1; 100]),
            Answer::Refuse => return Err(Arc::new(Closed)),
            Answer::Wait => {
                while !self.gate.load(Ordering::SeqCst) {
                    pause();
                }
            }
        }
        self.bytes.fetch_add(bytes.len() as u64, Ordering::SeqCst);
        // As they come from a connection.
        bytes.chunks(10_000).for_each(take);
        Ok(())
    }
}

#[allow(clippy::disallowed_methods, reason = "a thread of a test")]
fn pause() {
    thread::sleep(Duration::from_millis(1));
}

const NAME: &str = "criu/pages-1.img";

/// The chunks of these streams, all of which have yet to come from a store that does so with each request, and are
/// streamed.
pub(crate) fn from_a_store(
    dir: &Path,
    streams: &[(&str, &[u8])],
    rule: impl Fn(usize) -> Answer + Send + Sync + 'static,
) -> Arc<Chunks> {
    let written = chunks_of(dir, streams);
    let store = Arc::new(Store::of(dir, &written, rule));
    let chunks = written.open_owned(dir);
    let chunks = chunks.from_remote(&written.packs, Box::new(store), 2);
    let chunks = Arc::new(chunks.unwrap());
    chunks.stream_in(|_| true);
    chunks
}

impl Store {
    /// One that has the packs of `dir`, in which holes are left of them.
    fn of(
        dir: &Path,
        written: &Written,
        rule: impl Fn(usize) -> Answer + Send + Sync + 'static,
    ) -> Self {
        let mut packs = Vec::new();
        for pack in &written.packs {
            let path = dir.join(pack.id.file());
            packs.push(fs::read(&path).unwrap());
            File::create(&path).unwrap().set_len(pack.size).unwrap();
        }
        Self::with(packs, rule)
    }

    fn with(packs: Vec<Vec<u8>>, rule: impl Fn(usize) -> Answer + Send + Sync + 'static) -> Self {
        Self {
            packs,
            rule: Box::new(rule),
            requests: AtomicUsize::new(0),
            bytes: AtomicU64::new(0),
            asked: Mutex::default(),
            gate: AtomicBool::new(false),
        }
    }
}

/// An image of one stream, in a store and as holes in a folder.
struct Image {
    dir: tempfile::TempDir,
    written: Written,
    plain: Vec<u8>,
    store: Arc<Store>,
}

impl Image {
    fn new(bytes: usize, rule: impl Fn(usize) -> Answer + Send + Sync + 'static) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let plain = noise(1, bytes);
        let written = chunks_of(dir.path(), &[(NAME, &plain)]);
        let store = Arc::new(Store::of(dir.path(), &written, rule));
        Self {
            dir,
            written,
            plain,
            store,
        }
    }

    fn open(&self) -> Arc<Chunks> {
        let chunks = self.written.open_owned(self.dir.path());
        let remote = Box::new(Arc::clone(&self.store));
        Arc::new(chunks.from_remote(&self.written.packs, remote, 2).unwrap())
    }

    fn read(&self, chunks: &Chunks, at: usize, bytes: usize) -> Result<(), ChunkError> {
        let mut into = vec![0; bytes];
        chunks.read_at(NAME, at as u64, &mut into)?;
        assert!(into == self.plain[at..at + bytes], "other bytes at {at}");
        Ok(())
    }

    fn fetched(&self) -> u64 {
        self.store.bytes.load(Ordering::SeqCst)
    }

    fn size(&self) -> u64 {
        self.written.packs.iter().map(|pack| pack.size).sum()
    }
}

const MIB: usize = 1 << 20;

#[test]
fn all_of_it_comes_once_and_in_its_order() {
    let image = Image::new(11 * MIB + 12_345, |_| Answer::Truth);
    let chunks = image.open();
    chunks.stream_in(|_| true);
    chunks.verify(&AtomicU64::new(0)).unwrap();
    image.read(&chunks, 0, image.plain.len()).unwrap();
    chunks.sync().unwrap();
    for (pack, there) in image.written.packs.iter().zip(&image.store.packs) {
        let here = fs::read(image.dir.path().join(pack.id.file())).unwrap();
        assert!(here == *there);
    }
    // A reader that is ahead of the stream has a segment come for itself, which the stream then leaves out or has begun.
    assert!(image.fetched() < image.size() + 2 * MIB as u64);
    let first = image.store.asked.lock().unwrap()[0].start;
    assert!(first < SEGMENT * 2 * RUN as u64, "begun at {first}");
}

#[test]
fn what_is_known_to_be_asked_for_soon_comes_first() {
    let image = Image::new(24 * MIB, |_| Answer::Truth);
    let chunks = image.open();
    let parts = [20 * MIB, 3 * MIB, 9 * MIB].map(|at| {
        let at = at as u64;
        (NAME.to_owned(), at..at + CHUNK as u64)
    });
    let none = [
        ("criu/pages-9.img".to_owned(), 0..1),
        (NAME.to_owned(), u64::MAX - 1..u64::MAX),
    ];
    chunks.stream_first(&none);
    chunks.stream_first(&parts);
    chunks.stream_in(|_| true);
    chunks.verify(&AtomicU64::new(0)).unwrap();
    image.read(&chunks, 0, image.plain.len()).unwrap();
    let asked = image.store.asked.lock().unwrap();
    let place = |at: &u64| asked.iter().position(|range| range.contains(at)).unwrap();
    for (_, range) in parts {
        // Beside what who compares is waiting for.
        assert!(place(&range.start) < 8, "{:?}", &asked[..8]);
    }
    drop(asked);
    assert!(image.fetched() < image.size() + 2 * MIB as u64);
}

#[test]
fn what_lies_between_two_segments_comes_with_them() {
    let all = bridged(vec![(0, 1), (0, 2), (0, 5), (0, 9), (1, 10), (1, 13)]);
    let places = |pack, places: Range<usize>| places.map(move |place| (pack, place));
    let wanted = places(0, 1..6)
        .chain(places(0, 9..10))
        .chain(places(1, 10..14));
    assert!(all.eq(wanted));
}

#[test]
fn what_somebody_waits_for_comes_before_the_rest() {
    // Whatever is streamed hangs.
    let image = Image::new(64 * MIB, |nth| match nth < 2 {
        true => Answer::Wait,
        false => Answer::Truth,
    });
    let chunks = image.open();
    chunks.stream_in(|_| true);
    while image.store.requests.load(Ordering::SeqCst) < 2 {
        pause();
    }
    let last = image.plain.len() - CHUNK;
    image.read(&chunks, last, CHUNK).unwrap();
    // And what is in one of those that hang.
    assert!(!chunks.ready(NAME, 0, 4096).unwrap());
    let begun = Instant::now();
    while !chunks.ready(NAME, 0, 4096).unwrap() {
        assert!(begun.elapsed() < Duration::from_secs(20), "it never comes");
        pause();
    }
    image.store.gate.store(true, Ordering::SeqCst);
}

#[test]
fn nothing_is_fetched_by_who_does_not_stream_but_what_is_touched() {
    let image = Image::new(8 * MIB, |_| Answer::Truth);
    let (other, this) = (image.open(), image.open());
    assert!(!this.ready(NAME, 3 << 20, 4096).unwrap());
    while !this.ready(NAME, 3 << 20, 4096).unwrap() {
        pause();
    }
    let touched = image.fetched();
    assert!(touched <= 3 * SEGMENT, "{touched} bytes for one page");
    // Another process streams it: this one waits for that, and finds it.
    thread::scope(|scope| {
        let reading = scope.spawn(|| image.read(&this, 0, image.plain.len()));
        pause();
        other.stream_in(|_| true);
        reading.join().unwrap().unwrap();
    });
    assert!(image.fetched() <= image.size() + touched);
}

#[test]
fn who_goes_on_fetches_the_rest() {
    let image = Image::new(8 * MIB, |nth| match nth < 12 {
        true => Answer::Truth,
        false => Answer::Refuse,
    });
    let chunks = image.open();
    for at in (0..8 * MIB).step_by(MIB).take(5) {
        assert!(chunks.ready(NAME, at as u64, 1).is_ok());
        while !chunks.ready(NAME, at as u64, 1).unwrap() {
            pause();
        }
    }
    let before = image.fetched();
    assert!(before > 0);
    drop(chunks);
    let again = Image {
        store: Arc::new(Store::with(image.store.packs.clone(), |_| Answer::Truth)),
        ..image
    };
    let chunks = again.open();
    chunks.stream_in(|_| true);
    again.read(&chunks, 0, again.plain.len()).unwrap();
    assert_eq!(again.fetched() + before, again.size());
}

#[test]
fn a_store_that_lies_is_asked_again_and_then_named() {
    for lie in [Answer::Flip, Answer::Other] {
        let image = Image::new(3 * MIB, move |nth| match nth {
            0 => lie,
            _ => Answer::Truth,
        });
        let chunks = image.open();
        chunks.stream_in(|_| true);
        image.read(&chunks, 0, image.plain.len()).unwrap();
        chunks.verify(&AtomicU64::new(0)).unwrap();

        let image = Image::new(3 * MIB, move |_| lie);
        let chunks = image.open();
        chunks.stream_in(|_| true);
        let refused = image.read(&chunks, 0, image.plain.len()).unwrap_err();
        assert!(matches!(&refused, ChunkError::Lied { store, .. } if store == "s3://test/"));
        let requests = image.store.requests.load(Ordering::SeqCst);
        assert!(requests < 50, "{requests} requests for nothing");
    }
}

#[test]
fn more_than_was_asked_for_is_not_taken_and_less_is_an_error() {
    let image = Image::new(3 * MIB, |_| Answer::Long);
    let chunks = image.open();
    chunks.stream_in(|_| true);
    image.read(&chunks, 0, image.plain.len()).unwrap();
    for (pack, there) in image.written.packs.iter().zip(&image.store.packs) {
        let path = image.dir.path().join(pack.id.file());
        assert_eq!(fs::metadata(path).unwrap().len(), there.len() as u64);
    }
    let image = Image::new(3 * MIB, |_| Answer::Short);
    let chunks = image.open();
    chunks.stream_in(|_| true);
    let refused = image.read(&chunks, 0, image.plain.len()).unwrap_err();
    assert!(matches!(refused, ChunkError::Away(_)), "{refused}");
}

#[test]
fn everybody_who_waits_is_told_of_a_failure() {
    let image = Image::new(3 * MIB, |_| Answer::Refuse);
    let chunks = image.open();
    thread::scope(|scope| {
        let waiting = [0, MIB, 2 * MIB].map(|at| {
            let (image, chunks) = (&image, &chunks);
            scope.spawn(move || image.read(chunks, at, CHUNK))
        });
        chunks.stream_in(|_| true);
        for waiting in waiting {
            let refused = waiting.join().unwrap().unwrap_err();
            let why = Error::source(&refused).unwrap().to_string();
            assert_eq!(why, "the store is closed today");
        }
    });
    assert!(chunks.ready(NAME, 0, 1).is_err());
}

#[test]
fn who_gives_up_waits_no_longer() {
    let image = Image::new(3 * MIB, |_| Answer::Truth);
    let chunks = image.open();
    thread::scope(|scope| {
        // Nobody streams.
        let waiting = scope.spawn(|| image.read(&chunks, 0, CHUNK));
        chunks.give_up();
        assert!(waiting.join().unwrap().is_err());
    });
}

/// A file system may say that all of a file is there, and another process may have died in the middle of a write.
#[test]
fn what_is_there_and_wrong_is_fetched() {
    let image = Image::new(3 * MIB, |_| Answer::Truth);
    for pack in &image.written.packs {
        let path = image.dir.path().join(pack.id.file());
        let file = File::options().write(true).open(path).unwrap();
        file.write_all_at(&vec![0; pack.size as usize], 0).unwrap();
    }
    let chunks = image.open();
    chunks.stream_in(|_| true);
    image.read(&chunks, 0, image.plain.len()).unwrap();
    chunks.verify(&AtomicU64::new(0)).unwrap();
}
