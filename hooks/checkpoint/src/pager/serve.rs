//! The pager itself: the program that puts the memory of lazily restored processes where they look for it.
//!
//! ```text
//!  relay ──pid, userfaultfd──▶ Space (one for each process)      missing ─▶ being put ─▶ in
//!        ──finished──────────▶ loaders begin                        │  ▲        │
//!        ◀─child's userfaultfd── fork                               │  └─busy───┘
//!        ◀─loaded─────────────── the end                            └─ unmapped, given up: zeros
//! ```
//! One thread hears what the kernel has to tell and answers faults, always before anything else; a few
//! more bring in the rest: first what an earlier restore was asked for, in that order, and then by address.
//! It ends when CRIU has finished its restore and no page is missing any more. Any trouble ends it too:
//! whoever started it holds duplicates of the descriptors and ends the container, so that nobody reads
//! zeros in place of a page.

use std::{
    io,
    os::{
        fd::{AsFd, OwnedFd},
        unix::net::UnixStream,
    },
    path::Path,
    sync::{
        Arc, Mutex, PoisonError, RwLock,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::Duration,
};

use rustix::event::{EventfdFlags, epoll, eventfd};

use super::protocol::{self, Word};
use crate::{
    chunks::{ChunkError, Chunks},
    criu_image::CriuImageError,
    parallel::threads,
    touches::Touch,
};

mod ahead;
mod missing;
mod space;
mod userfaultfd;

use ahead::Ahead;
pub(super) use missing::Missing;
use space::Space;
pub(super) use space::{FAULT_BLOCK, pages_stream};
use userfaultfd::Userfaultfd;

/// What one of them puts at a time. Who faults waits for at most one of these in each loader: 128 KiB take
/// 60 to 250 µs, depending on how fast the host gives fresh pages.
const STEP: usize = 128 << 10;
/// How long a page rests that could not be put because the address space was changing.
const BUSY: Duration = Duration::from_micros(200);
/// The loaders have ended; the control connection; and from there on the processes.
const LOADED: u64 = 0;
const CONTROL: u64 = 1;
const FIRST_SPACE: u64 = 2;

/// Why the memory of a container cannot come in.
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The images of a process are not what a lazy restore needs.
    #[error(transparent)]
    Image(#[from] CriuImageError),
    /// A page could not be read, or is not what was sealed.
    #[error(transparent)]
    Chunk(#[from] ChunkError),
    /// The kernel does not take a page.
    #[error(
        "cannot put the page at {vaddr:#x} into process {pid} of the container{}",
        hint(source)
    )]
    Refused {
        /// The address in the process.
        vaddr: u64,
        /// Its number in the container; 0 for one forked since.
        pid: i32,
        /// What the kernel said.
        source: io::Error,
    },
    /// The kernel does not say what the processes do.
    #[error("cannot {doing} the userfaultfd of process {pid} of the container")]
    Kernel {
        /// "read from", "watch".
        doing: &'static str,
        /// Its number in the container; 0 for one forked since.
        pid: i32,
        /// What the kernel said.
        source: io::Error,
    },
    /// The relay is not understood, or the kernel gives no descriptor or thread.
    #[error("the pager cannot {doing}")]
    Setup {
        /// What it was about to do.
        doing: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
    /// Nobody is there any more to say that the restore has finished.
    #[error("the restore ended before it was finished")]
    Abandoned,
}

/// What the person is told who has to act on it.
fn hint(source: &io::Error) -> &'static str {
    if source.kind() == io::ErrorKind::OutOfMemory {
        ": its memory limit, or the node, does not hold the image"
    } else {
        ""
    }
}

impl ServeError {
    fn setup(doing: &'static str) -> impl Fn(io::Error) -> Self {
        move |source| Self::Setup { doing, source }
    }
}

/// What was brought in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Served {
    /// Processes, with those that were forked meanwhile.
    pub processes: usize,
    /// Blocks of 64 KiB that a process waited for.
    pub asked: usize,
    /// Blocks that were brought in because an earlier restore was asked for them, before anybody asked for them now.
    pub ahead: usize,
    /// Both in the order in which they came in: what to bring in ahead in the next restore.
    pub touches: Vec<Touch>,
}

/// Serves one restore: `relay` says which processes there are, `criu_dir` has their images, `chunks` their pages,
/// and `noted` what an earlier restore of the image was asked for, which is brought in first.
/// Returns when all memory is in; then, and only then, may the last copies of the descriptors be closed.
///
/// # Errors
/// Anything that keeps a page from coming in: the container must be ended then.
pub fn serve(
    relay: UnixStream,
    criu_dir: &Path,
    chunks: &Arc<Chunks>,
    noted: Vec<Touch>,
) -> Result<Served, ServeError> {
    let session = Session {
        criu_dir,
        chunks,
        ahead: Ahead::new(noted),
        spaces: RwLock::default(),
        epoll: epoll::create(epoll::CreateFlags::CLOEXEC)
            .map_err(|e| ServeError::setup("watch descriptors")(e.into()))?,
        loaded: eventfd(0, EventfdFlags::CLOEXEC)
            .map_err(|e| ServeError::setup("watch its threads")(e.into()))?,
        stop: AtomicBool::new(false),
        failure: Mutex::new(None),
    };
    session.watch(&session.loaded, LOADED)?;
    session.watch(&relay, CONTROL)?;
    // They bring in what nobody has asked for yet.
    let loaders = threads();
    let served = thread::scope(|scope| {
        let served = session.listen(relay, loaders as u64, || {
            for _ in 0..loaders {
                thread::Builder::new()
                    .name("loader".to_owned())
                    .spawn_scoped(scope, || session.load())
                    .map_err(ServeError::setup("start a thread"))?;
            }
            Ok(())
        });
        session.stop.store(true, Ordering::Relaxed);
        if served.is_err() {
            // A loader may wait for what does not come.
            chunks.give_up();
        }
        served
    });
    served?;
    let processes = session.spaces().len();
    let wanted = session.ahead.into_wanted();
    Ok(Served {
        processes,
        asked: wanted.asked,
        ahead: wanted.ahead,
        touches: wanted.touches,
    })
}

struct Session<'a> {
    criu_dir: &'a Path,
    chunks: &'a Arc<Chunks>,
    ahead: Ahead,
    /// In the order in which they came; none is ever taken out, so that an index stays what it was.
    spaces: RwLock<Vec<Arc<Space>>>,
    epoll: OwnedFd,
    loaded: OwnedFd,
    stop: AtomicBool,
    failure: Mutex<Option<ServeError>>,
}

impl Session<'_> {
    /// The thread that hears and answers, until all is in, which `load` has so many `loaders` begin.
    fn listen(
        &self,
        mut relay: UnixStream,
        mut loaders: u64,
        load: impl Fn() -> Result<(), ServeError>,
    ) -> Result<(), ServeError> {
        let mut buffer = vec![0; FAULT_BLOCK as usize];
        let mut events = Vec::with_capacity(64);
        let mut finished = false;
        // Those in which a thread waits for a page that could not be put yet.
        let mut busy: Vec<u64> = Vec::new();
        loop {
            let wait = (!busy.is_empty()).then(|| rustix::event::Timespec {
                tv_sec: 0,
                tv_nsec: i64::from(BUSY.subsec_nanos()),
            });
            events.clear();
            match epoll::wait(
                &self.epoll,
                rustix::buffer::spare_capacity(&mut events),
                wait.as_ref(),
            ) {
                Ok(_) | Err(rustix::io::Errno::INTR) => {}
                Err(e) => return Err(ServeError::setup("wait for events")(e.into())),
            }
            let mut ready = std::mem::take(&mut busy);
            for event in &events {
                match event.data.u64() {
                    LOADED => {
                        let failure = self
                            .failure
                            .lock()
                            .unwrap_or_else(PoisonError::into_inner)
                            .take();
                        if let Some(failure) = failure {
                            return Err(failure);
                        }
                        let mut ended = [0; 8];
                        if rustix::io::read(&self.loaded, &mut ended).is_ok() {
                            loaders -= u64::from_ne_bytes(ended);
                        }
                    }
                    CONTROL => match protocol::receive(&mut relay)
                        .map_err(ServeError::setup("understand the relay"))?
                    {
                        Some(Word::Process(pid, fd)) => {
                            let fd = Userfaultfd::new(fd).map_err(|source| ServeError::Kernel {
                                doing: "take over",
                                pid,
                                source,
                            })?;
                            self.add(Space::open(self.criu_dir, self.chunks, pid, fd)?)?;
                        }
                        Some(Word::Finished) => {
                            finished = true;
                            load()?;
                        }
                        Some(Word::Zombie(_) | Word::Child(_) | Word::Loaded) => {}
                        None if !finished => return Err(ServeError::Abandoned),
                        // Who started it is gone. The processes are not: they get their memory all the same.
                        None => self.unwatch(&relay)?,
                    },
                    space => ready.push(space),
                }
            }
            ready.sort_unstable();
            ready.dedup();
            for index in ready {
                let Some(space) = self.space(index - FIRST_SPACE) else {
                    continue;
                };
                let waits = space.serve(&mut buffer, &self.ahead, |child| {
                    let fd = child.userfaultfd().as_fd().try_clone_to_owned();
                    let fd = fd.map_err(ServeError::setup("duplicate a descriptor"))?;
                    // Its holder may be gone; that is no reason to leave the child without its memory.
                    let _ = protocol::send(&mut relay, &Word::Child(fd));
                    self.add(child)
                })?;
                if waits {
                    busy.push(index);
                }
            }
            if loaders > 0 {
                continue;
            }
            // What faults and children left over when the loaders had already found nothing more to do.
            let mut complete = true;
            for (index, space) in (FIRST_SPACE..).zip(self.spaces()) {
                if !space.is_complete() {
                    complete = false;
                    space.load(&mut buffer)?;
                    busy.push(index);
                }
            }
            if complete {
                // From here on no descriptor is needed. Who holds duplicates may be gone, too.
                let _ = protocol::send(&mut relay, &Word::Loaded);
                return Ok(());
            }
        }
    }

    /// A loader: brings in what nobody has asked for yet.
    fn load(&self) {
        let mut buffer = vec![0; STEP];
        let loaded = self
            .load_ahead(&mut buffer)
            .and_then(|()| self.load_rest(&mut buffer));
        if let Err(e) = loaded {
            self.failure
                .lock()
                .unwrap_or_else(PoisonError::into_inner)
                .get_or_insert(e);
        }
        // An eventfd takes far more of these than there are threads.
        let _ = rustix::io::write(&self.loaded, &1_u64.to_ne_bytes());
    }

    fn load_ahead(&self, buffer: &mut [u8]) -> Result<(), ServeError> {
        // Processes come before all that they have forked, so that looking for one does not take long.
        let find = |touch: Touch| {
            let spaces = self.spaces.read().unwrap_or_else(PoisonError::into_inner);
            let space = spaces.iter().find(|space| space.pid() == touch.pid())?;
            let missing = space.missing_of(touch);
            (!missing.is_empty()).then(|| (Arc::clone(space), missing))
        };
        while let Some((space, missing)) = self.ahead.next(find) {
            for piece in missing {
                // What cannot be put now comes with the rest.
                space.bring(piece, buffer)?;
            }
            if self.stop.load(Ordering::Relaxed) {
                break;
            }
        }
        Ok(())
    }

    fn load_rest(&self, buffer: &mut [u8]) -> Result<(), ServeError> {
        // Child spaces are put at the end while their parents' memory is still missing: whoever finds the
        // parent's complete comes to the child after it.
        let mut index = 0;
        while let Some(space) = self.space(index) {
            while let Some(done) = space.load(buffer)? {
                if self.stop.load(Ordering::Relaxed) {
                    return Ok(());
                }
                if !done {
                    #[allow(clippy::disallowed_methods, reason = "a thread of its own")]
                    thread::sleep(BUSY);
                }
            }
            index += 1;
        }
        Ok(())
    }

    fn add(&self, space: Space) -> Result<(), ServeError> {
        let space = Arc::new(space);
        let mut spaces = self.spaces.write().unwrap_or_else(PoisonError::into_inner);
        spaces.push(Arc::clone(&space));
        self.watch(space.userfaultfd(), FIRST_SPACE + spaces.len() as u64 - 1)
    }

    fn spaces(&self) -> Vec<Arc<Space>> {
        self.spaces
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .clone()
    }

    fn space(&self, index: u64) -> Option<Arc<Space>> {
        let spaces = self.spaces.read().unwrap_or_else(PoisonError::into_inner);
        spaces.get(usize::try_from(index).ok()?).cloned()
    }

    fn watch(&self, fd: impl AsFd, name: u64) -> Result<(), ServeError> {
        let name = epoll::EventData::new_u64(name);
        epoll::add(&self.epoll, fd, name, epoll::EventFlags::IN)
            .map_err(|e| ServeError::setup("watch a descriptor")(e.into()))
    }

    fn unwatch(&self, fd: impl AsFd) -> Result<(), ServeError> {
        epoll::delete(&self.epoll, fd)
            .map_err(|e| ServeError::setup("stop watching a descriptor")(e.into()))
    }
}

#[cfg(test)]
mod tests;
