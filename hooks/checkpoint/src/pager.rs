//! The memory of a lazily restored container: who brings it in, and why that can never become a page of
//! zeros.
//!
//! ```text
//!  criu restore ──pid, userfaultfd──▶ relay (in the shim) ──pid, userfaultfd──▶ pager ([`serve`])
//!                                       └ keeps a duplicate of each descriptor
//!
//!  Waiting ──CRIU connects──▶ Restoring ──finished──▶ Loading ──all is in──▶ Loaded: the duplicates are closed
//!
//!  Pager ──ended, when Loaded──▶ Loaded    however it ended
//!        ──ended, before─────▶ Orphans   the duplicates are held; faulting tasks stay blocked
//!                              └─kill_then_release(kill)──▶ closed, once the tasks are dead
//! ```
//! When the last holder of a userfaultfd is gone, the kernel unregisters its memory and every page that
//! is not there yet reads as zeros. The restored task closes its own descriptor, so without the relay the
//! pager's is the last, and its crash would corrupt the container in silence. With a duplicate here a
//! task that needs a missing page waits for ever, which ends when it is killed. The pager is a process of
//! its own for the same reason: it outlives a shim that is killed.
//!
//! [`Pager`] and [`Orphans`] therefore *leak* their descriptors when they are dropped without having
//! been ended: a leak blocks the tasks, a close would hand them zeros.

use std::{
    ffi::OsString,
    fmt,
    fs::File,
    io::{self, Read},
    mem::ManuallyDrop,
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::net::{UnixListener, UnixStream},
    },
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
};

use rustix::net::Shutdown;

use crate::StagedImage;

mod first;
pub(crate) mod protocol;
mod relay;
mod serve;

pub(crate) use first::first_parts;
pub use serve::{ServeError, Served, serve};

/// What a pager's process exits with when CRIU ended its restore before it was finished: the trouble is
/// CRIU's.
pub const ABANDONED: u8 = 3;

/// The name of the socket that CRIU's restore connects to, in its work folder (`criu/uffd.c`).
const SOCKET: &str = "lazy-pages.socket";
/// What the pager has to say, in the restore's work folder.
const LOG_FILE: &str = "pager.log";
/// As much of it as goes into a sentence, bytes.
const SAID: u64 = 1024;

/// A program with its arguments, for the caller to run: the shim reaps its children in its own way.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Argv {
    /// The program.
    pub program: PathBuf,
    /// Its arguments.
    pub args: Vec<OsString>,
}

/// Succeeds where lazy restore works: a kernel whose userfaultfd tells of forks and of moved, unmapped and
/// discarded memory, and a CRIU that knows it. The answer changes with the kernel and with CRIU only.
pub fn lazy_check(criu: &Path) -> Argv {
    Argv {
        program: criu.to_owned(),
        args: ["check", "--feature", "uffd-noncoop"]
            .map(OsString::from)
            .to_vec(),
    }
}

/// Why a pager could not be set up, or what went wrong between CRIU and it.
#[derive(Debug, thiserror::Error)]
pub enum PagerError {
    /// Its socket or log could not be made.
    #[error("cannot set up the pager: cannot {doing} {}", path.display())]
    Setup {
        /// "open", "bind".
        doing: &'static str,
        /// What.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// The descriptors of the restored processes did not reach the pager.
    #[error("the relay between CRIU's restore and its pager failed: {what}")]
    Relay {
        /// What was being done.
        what: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
}

/// How the pager's process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PagerExit {
    /// With this code; 0 says that all pages are in.
    Code(i32),
    /// By this signal.
    Signal(i32),
}

impl fmt::Display for PagerExit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Code(code) => write!(f, "exited with {code}"),
            Self::Signal(signal) => write!(f, "was ended by signal {signal}"),
        }
    }
}

/// How far a restore has come. Its pager may die in any of these.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Phase {
    /// Nobody has connected yet.
    #[default]
    Waiting,
    /// CRIU hands over the processes that it makes.
    Restoring,
    /// The processes run, and pages of theirs are missing.
    Loading,
    /// The pager has said that none is. What it does then is for the next restore.
    Loaded,
}

impl Phase {
    /// All of them, in their order. One that is new does not compile until it has its place here.
    pub fn all() -> impl Iterator<Item = Self> {
        let next = |phase: &Self| match phase {
            Self::Waiting => Some(Self::Restoring),
            Self::Restoring => Some(Self::Loading),
            Self::Loading => Some(Self::Loaded),
            Self::Loaded => None,
        };
        std::iter::successors(Some(Self::Waiting), next)
    }
}

/// Duplicates of the userfaultfds of a restored container. Not closed by being dropped.
#[derive(Debug, Default)]
struct Held(Mutex<ManuallyDrop<Vec<OwnedFd>>>);

impl Held {
    fn add(&self, fd: OwnedFd) {
        lock(&self.0).push(fd);
    }

    /// Closes them: the kernel gives zeros from here on, so either nothing is missing or nobody is left.
    fn close(&self) {
        lock(&self.0).clear();
    }
}

/// What the relay's thread and [`Pager`] share.
#[derive(Debug, Default)]
struct Shared {
    held: Held,
    /// The connections, to wake a thread that waits for the next word of one.
    connections: Mutex<Vec<UnixStream>>,
    cancelled: AtomicBool,
    phase: Mutex<Phase>,
}

impl Shared {
    fn enter(&self, phase: Phase) {
        *lock(&self.phase) = phase;
    }

    fn phase(&self) -> Phase {
        *lock(&self.phase)
    }

    /// Makes a wait for words from `stream` end with [`Shared::cancel`]. Says whether it should begin.
    fn watch(&self, stream: &UnixStream) -> io::Result<bool> {
        let copy = stream.try_clone()?;
        lock(&self.connections).push(copy);
        // Cancelled before the copy was there: nobody will wake the thread.
        Ok(!self.cancelled.load(Ordering::Acquire))
    }

    /// Ends the connections for both sides.
    fn hang_up(&self) {
        for stream in lock(&self.connections).drain(..) {
            let _ = rustix::net::shutdown(&stream, Shutdown::Both);
        }
    }

    fn cancel(&self, listener: &UnixListener) {
        self.cancelled.store(true, Ordering::Release);
        // Fails where the thread is past that, which is fine. What was sent before can still be read.
        let _ = rustix::net::shutdown(listener, Shutdown::Both);
        for stream in lock(&self.connections).drain(..) {
            let _ = rustix::net::shutdown(&stream, Shutdown::Read);
        }
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The pager of one restore: from before CRIU's restore until all pages are in.
#[derive(Debug)]
pub struct Pager {
    shared: Arc<Shared>,
    listener: Arc<UnixListener>,
    relay: Option<JoinHandle<Result<(), PagerError>>>,
    log: PathBuf,
    // Keeps the image from being removed while its pages are needed.
    _image: Arc<StagedImage>,
}

/// The process to start for a [`Pager`].
#[derive(Debug)]
pub struct Launch {
    /// What to run.
    pub argv: Argv,
    /// Its standard input: the connection to the relay. The caller's copy must be closed once it runs.
    pub stdin: OwnedFd,
    /// Its standard error.
    pub stderr: File,
}

/// What became of a pager whose process has ended.
#[must_use]
#[derive(Debug)]
pub enum Ended {
    /// All pages are in: the container needs neither pager nor image any more.
    Loaded {
        /// What it has to tell of its work, in a line.
        said: Option<String>,
    },
    /// It died with pages missing: kill the tasks, now.
    Died(Orphans),
}

/// The userfaultfds of a container whose pager is dead. Its tasks are blocked or will be.
#[must_use = "the container's tasks are blocked: kill them and release the descriptors"]
#[derive(Debug)]
pub struct Orphans {
    shared: Arc<Shared>,
    reason: String,
}

impl Pager {
    /// Binds the socket that `criu restore` will connect to in `work_dir` (what `runc restore --work-path`
    /// gets), and starts the relay's thread. The process to run is `program`, the CLI; it may start at the
    /// same time as the restore.
    ///
    /// # Errors
    /// When the socket or the log cannot be made.
    pub fn start(
        program: &Path,
        image: Arc<StagedImage>,
        work_dir: &Path,
    ) -> Result<(Self, Launch), PagerError> {
        let listener = Arc::new(bind(work_dir)?);
        let log = work_dir.join(LOG_FILE);
        let stderr = File::create(&log).map_err(setup("open", &log))?;
        let (ours, theirs) = UnixStream::pair().map_err(relay_failed("no connection for it"))?;
        let mut args: Vec<OsString> = vec![
            "pager".into(),
            "--criu".into(),
            image.criu_dir().into(),
            "--store".into(),
            image.store().root().into(),
        ];
        if let Some(memory) = image.store().memory() {
            args.extend(["--memory".into(), memory.root.clone().into()]);
        }
        args.push(image.reference().into());
        let launch = Launch {
            argv: Argv {
                program: program.to_owned(),
                args,
            },
            stdin: theirs.into(),
            stderr,
        };
        let shared = Arc::new(Shared::default());
        let relay = {
            let (listener, shared) = (listener.clone(), shared.clone());
            thread::Builder::new()
                .name("pager-relay".to_owned())
                .spawn(move || relay::run(&listener, ours, &shared))
                .map_err(relay_failed("no thread for it"))?
        };
        let pager = Self {
            shared,
            listener,
            relay: Some(relay),
            log,
            _image: image,
        };
        Ok((pager, launch))
    }

    /// Why the restore cannot succeed any more, since the pager's process has ended like this; none when it
    /// did its work, or when it is CRIU that failed.
    pub fn trouble(&self, exit: PagerExit) -> Option<String> {
        let no_trouble = [0, i32::from(ABANDONED)].map(PagerExit::Code);
        if no_trouble.contains(&exit) || self.shared.phase() == Phase::Loaded {
            return None;
        }
        Some(self.reason(exit, None))
    }

    /// To be called when the pager's process has ended, which it does by itself once all pages are in.
    pub fn ended(mut self, exit: PagerExit) -> Ended {
        let relayed = self.stop();
        match (self.shared.phase(), exit) {
            // However it ended after that; or whatever became of the relay, so that its word did not come.
            (Phase::Loaded, _) | (Phase::Loading, PagerExit::Code(0)) => {
                self.shared.held.close();
                Ended::Loaded { said: self.said() }
            }
            (phase, exit) => {
                let otherwise = match relayed {
                    Err(e) => Some(e.to_string()),
                    Ok(()) if phase < Phase::Loading => {
                        Some("CRIU had not finished its restore".to_owned())
                    }
                    Ok(()) => None,
                };
                Ended::Died(Orphans {
                    shared: self.shared.clone(),
                    reason: self.reason(exit, otherwise),
                })
            }
        }
    }

    fn reason(&self, exit: PagerExit, otherwise: Option<String>) -> String {
        let because = self.said().or(otherwise);
        let because = because.map_or_else(String::new, |because| format!(": {because}"));
        format!("the pager {exit} before all memory was in{because}")
    }

    /// What the pager said before it ended.
    fn said(&self) -> Option<String> {
        let mut text = Vec::new();
        let log = File::open(&self.log).ok()?;
        log.take(SAID).read_to_end(&mut text).ok()?;
        let text = String::from_utf8_lossy(&text).trim().to_owned();
        Some(text).filter(|text| !text.is_empty())
    }

    /// Gives up on a restore that failed. `kill` must make sure that no task of the container is left.
    ///
    /// # Errors
    /// What `kill` says; the descriptors are then held for ever.
    pub fn abandon<E>(mut self, kill: impl FnOnce() -> Result<(), E>) -> Result<(), E> {
        let _ = self.stop();
        kill()?;
        self.shared.held.close();
        Ok(())
    }
}

impl Drop for Pager {
    fn drop(&mut self) {
        let _ = self.stop();
    }
}

impl Pager {
    /// Ends the relay's thread and waits for it.
    fn stop(&mut self) -> Result<(), PagerError> {
        self.shared.cancel(&self.listener);
        match self.relay.take().map(JoinHandle::join) {
            Some(Ok(result)) => result,
            _ => Ok(()),
        }
    }
}

impl Orphans {
    /// Why the pager is dead, as a sentence.
    pub fn reason(&self) -> &str {
        &self.reason
    }

    /// Runs `kill`, which must not return `Ok` before every task of the container is dead, and only then
    /// closes the descriptors.
    ///
    /// # Errors
    /// What `kill` says, with the orphans to try again.
    pub fn kill_then_release<E>(
        self,
        kill: impl FnOnce() -> Result<(), E>,
    ) -> Result<(), (Self, E)> {
        match kill() {
            Ok(()) => {
                self.shared.held.close();
                Ok(())
            }
            Err(e) => Err((self, e)),
        }
    }
}

fn setup<'a>(doing: &'static str, path: &'a Path) -> impl Fn(io::Error) -> PagerError + 'a {
    move |source| PagerError::Setup {
        doing,
        path: path.to_owned(),
        source,
    }
}

fn relay_failed(what: &'static str) -> impl Fn(io::Error) -> PagerError {
    move |source| PagerError::Relay { what, source }
}

/// Binds the socket by a path that fits into the 108 bytes of a socket's address; that of a container's
/// folder with its id of 64 digits does not.
fn bind(work_dir: &Path) -> Result<UnixListener, PagerError> {
    let socket = work_dir.join(SOCKET);
    match std::fs::remove_file(&socket) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => {
            return Err(setup("remove", &socket)(e));
        }
        _ => {}
    }
    let dir = File::open(work_dir).map_err(setup("open", work_dir))?;
    UnixListener::bind(short_path(&dir)).map_err(setup("bind", &socket))
}

fn short_path(dir: &File) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}", dir.as_raw_fd())).join(SOCKET)
}

#[cfg(test)]
mod tests;
