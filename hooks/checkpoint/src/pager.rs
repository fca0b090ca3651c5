//! Supervision of `criu lazy-pages`, so that its death can never become a page of zeros.
//!
//! ```text
//!  criu restore ──pid, userfaultfd──▶ relay (this process) ──pid, userfaultfd──▶ criu lazy-pages
//!                                       └ keeps a duplicate of each descriptor
//!
//!  Pager ──ended(success)──▶ Loaded        all pages are in; the duplicates are closed
//!        ──ended(failure)──▶ Orphans       the duplicates are held; faulting tasks stay blocked
//!                              └─kill_then_release(kill)──▶ closed, once the tasks are dead
//! ```
//! When the last holder of a userfaultfd is gone, the kernel unregisters its memory and every page that
//! is not there yet reads as zeros. The restored task closes its own descriptor, so without the relay the
//! daemon's is the last, and its crash would corrupt the container in silence. With a duplicate here a
//! task that needs a missing page waits for ever, which ends when it is killed.
//!
//! [`Pager`] and [`Orphans`] therefore *leak* their descriptors when they are dropped without having been
//! ended: a leak blocks the tasks, a close would hand them zeros.
//!
//! One thing is out of reach: a process that a task forks while pages are missing gets a userfaultfd that
//! only the daemon has. Kill the container at once when the daemon dies.

use std::{
    ffi::OsString,
    fmt,
    fs::File,
    io,
    mem::ManuallyDrop,
    os::{
        fd::OwnedFd,
        unix::net::{UnixListener, UnixStream},
    },
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
};

use rustix::net::Shutdown;

use crate::VerifiedImage;

mod relay;

/// The name of the socket that CRIU's restore connects to and that its daemon binds, each in its own work
/// folder (`criu/uffd.c`).
const SOCKET: &str = "lazy-pages.socket";
/// The daemon's work folder, inside the restore's.
const DAEMON_DIR: &str = "pager";
/// The daemon's log, in its work folder.
pub const LOG_FILE: &str = "lazy-pages.log";

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
    /// Its folder or socket could not be made.
    #[error("cannot set up the pager: cannot {doing} {}", path.display())]
    Setup {
        /// "make", "bind".
        doing: &'static str,
        /// What.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// The descriptors of the restored processes did not reach the daemon.
    #[error("the relay between CRIU's restore and its pager failed: {what}")]
    Relay {
        /// What was being done.
        what: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
}

/// How the daemon ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DaemonExit {
    /// With this code; 0 says that all pages are in.
    Code(i32),
    /// By this signal.
    Signal(i32),
}

impl fmt::Display for DaemonExit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Code(code) => write!(f, "exited with {code}"),
            Self::Signal(signal) => write!(f, "was ended by signal {signal}"),
        }
    }
}

/// Duplicates of the userfaultfds of a restored container. Not closed by being dropped.
#[derive(Debug, Default)]
struct Held(Mutex<ManuallyDrop<Vec<OwnedFd>>>);

impl Held {
    fn add(&self, fd: OwnedFd) {
        self.lock().push(fd);
    }

    fn count(&self) -> usize {
        self.lock().len()
    }

    /// Closes them: the kernel gives zeros from here on, so either nothing is missing or nobody is left.
    fn close(&self) {
        self.lock().clear();
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, ManuallyDrop<Vec<OwnedFd>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What the thread of the relay and the pager share.
#[derive(Debug, Default)]
struct Shared {
    held: Held,
    /// CRIU's connection, to wake a thread that waits for its next word.
    criu: Mutex<Option<UnixStream>>,
    cancelled: AtomicBool,
    finished: AtomicBool,
}

/// The pager of one restore: from before CRIU's restore until all pages are in.
#[derive(Debug)]
pub struct Pager {
    shared: Arc<Shared>,
    listener: Arc<UnixListener>,
    relay: Option<JoinHandle<Result<(), PagerError>>>,
    daemon: Argv,
    // Keeps the image from being removed while its pages are needed.
    _image: Arc<VerifiedImage>,
}

/// What became of a pager whose daemon has ended.
#[must_use]
#[derive(Debug)]
pub enum Ended {
    /// All pages are in: the container needs neither pager nor image any more.
    Loaded,
    /// The daemon died with pages missing: kill the tasks, now.
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
    /// gets), and starts the relay's thread. Run [`Pager::daemon`] next; it may start at the same time as
    /// the restore.
    ///
    /// # Errors
    /// When the folder or the socket cannot be made.
    pub fn start(
        criu: &Path,
        image: Arc<VerifiedImage>,
        work_dir: &Path,
    ) -> Result<Self, PagerError> {
        let (listener, daemon_dir) = set_up(work_dir)?;
        let daemon = daemon(criu, &image.criu_dir(), &daemon_dir);
        let listener = Arc::new(listener);
        let shared = Arc::new(Shared::default());
        let relay = {
            let (listener, shared) = (listener.clone(), shared.clone());
            thread::Builder::new()
                .name("pager-relay".to_owned())
                .spawn(move || relay::run(&listener, &daemon_dir, &shared))
                .map_err(|source| PagerError::Relay {
                    what: "no thread for it",
                    source,
                })?
        };
        Ok(Self {
            shared,
            listener,
            relay: Some(relay),
            daemon,
            _image: image,
        })
    }

    /// The daemon to run, with no other descriptor than its stdio.
    pub fn daemon(&self) -> &Argv {
        &self.daemon
    }

    /// How many processes have handed over their memory so far.
    pub fn processes(&self) -> usize {
        self.shared.held.count()
    }

    /// To be called when the daemon has ended, which it does by itself once all pages are in.
    pub fn ended(mut self, exit: DaemonExit) -> Ended {
        let relayed = self.stop();
        let finished = self.shared.finished.load(Ordering::Acquire);
        match (exit, relayed) {
            (DaemonExit::Code(0), Ok(())) if finished => {
                self.shared.held.close();
                Ended::Loaded
            }
            (exit, relayed) => {
                let because = match relayed {
                    Err(e) => format!("; {e}"),
                    Ok(()) if !finished => "; CRIU had not finished its restore".to_owned(),
                    Ok(()) => String::new(),
                };
                Ended::Died(Orphans {
                    shared: self.shared.clone(),
                    reason: format!(
                        "the pager {exit} before all memory was loaded{because} (see {LOG_FILE} in the restore's work folder)"
                    ),
                })
            }
        }
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
        self.shared.cancelled.store(true, Ordering::Release);
        // Wakes the thread wherever it waits for CRIU. Fails where it is past that, which is fine.
        let _ = rustix::net::shutdown(&*self.listener, Shutdown::Both);
        let criu = self
            .shared
            .criu
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        if let Some(criu) = criu {
            let _ = rustix::net::shutdown(&criu, Shutdown::Both);
        }
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

fn set_up(work_dir: &Path) -> Result<(UnixListener, PathBuf), PagerError> {
    let setup = |doing, path: &Path| {
        let path = path.to_owned();
        move |source| PagerError::Setup {
            doing,
            path,
            source,
        }
    };
    let daemon_dir = work_dir.join(DAEMON_DIR);
    std::fs::create_dir_all(&daemon_dir).map_err(setup("make", &daemon_dir))?;
    let socket = work_dir.join(SOCKET);
    match std::fs::remove_file(&socket) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => {
            return Err(setup("remove", &socket)(e));
        }
        _ => {}
    }
    let dir = File::open(work_dir).map_err(setup("open", work_dir))?;
    let listener = UnixListener::bind(relay::short_path(&dir)).map_err(setup("bind", &socket))?;
    Ok((listener, daemon_dir))
}

fn daemon(criu: &Path, images: &Path, work_dir: &Path) -> Argv {
    let mut args: Vec<OsString> = vec!["lazy-pages".into()];
    for (option, value) in [
        ("--images-dir", images.as_os_str()),
        ("--work-dir", work_dir.as_os_str()),
        ("--log-file", LOG_FILE.as_ref()),
    ] {
        args.extend([option.into(), value.to_owned()]);
    }
    // Warnings and errors. At its higher levels it writes a line for every fault.
    args.push("-v1".into());
    Argv {
        program: criu.to_owned(),
        args,
    }
}

#[cfg(test)]
mod tests;
