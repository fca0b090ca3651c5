//! A dump whose pages are ours to copy.
//!
//! CRIU stops the tasks, writes everything but their lazy pages, and waits. In that window, and only
//! in it, memory, the upper layer and `/dev/shm` belong together: the links that CRIU makes for deleted
//! files are there too, and are gone when the dump ends. When the window is closed, or our end of it is
//! gone for any reason, CRIU lets the tasks go.

use std::{
    io,
    os::fd::{AsRawFd, OwnedFd},
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

use rekindle_checkpoint::{
    PageServerLink, Partial,
    archive::{open_dir, open_in_root, pack_with_deleted},
    deleted::DeletedFiles,
    manifest::{DumpFlags, SHM_FILE, UPPER_FILE},
    page_server::CHILD_FD,
    pages::{self, Tasks},
    precopy::{Precopied, Precopy},
};
use tokio::net::unix::pipe;

use super::{CLOSING, PhaseError, done};
use crate::{
    bundle::Spec,
    context::Fixed,
    criu::{self, Purpose},
    error::{Error, sentence},
    sys,
    threads::blocking,
};

/// Under Kubernetes lent by the sandbox, and then not in CRIU's images.
const SHM: &str = "/dev/shm";
/// Where runc writes one byte when the window is open. Beside [`CHILD_FD`], for the same reason as high.
const STATUS_FD: i32 = CHILD_FD + 1;

/// What is to be dumped, and where to.
#[derive(Debug)]
pub(super) struct Job<'a> {
    pub(super) init: i32,
    pub(super) spec: &'a Spec,
    pub(super) partial: Partial,
    /// What was stored while the tasks ran.
    pub(super) precopy: Option<Precopy>,
    pub(super) work: &'a Path,
    /// When memory that is not copied is given up.
    pub(super) until: Instant,
}

/// What was taken while the tasks stood still.
#[derive(Debug)]
pub(super) struct Taken {
    pub(super) tasks: Tasks,
    /// Bytes of memory that were stored before.
    pub(super) precopied: u64,
    /// Still watching. To end that takes time, for which nobody has to stand still.
    pub(super) precopy: Option<Precopy>,
    /// From the beginning of the dump to its end. The tasks stood still for longer: since they were held before it,
    /// until they are released after it.
    pub(super) stopped: Duration,
}

/// Does it.
pub(super) async fn dump(
    fixed: &Arc<Fixed>,
    job: Job<'_>,
    flags: &DumpFlags,
) -> Result<(Partial, Taken), Error> {
    let began = Instant::now();
    let Job {
        init,
        spec,
        partial,
        mut precopy,
        work,
        until,
    } = job;
    let rest = until.saturating_duration_since(began);
    let cannot = |reason: String| PhaseError::CannotCheckpoint {
        id: fixed.id.clone(),
        reason,
    };
    fixed
        .criu
        .write(Purpose::Dump(&PageServerLink::config_line()))?;
    let mut link = PageServerLink::new().map_err(|e| cannot(sentence(&e)))?;
    let theirs = link
        .take_child_end()
        .ok_or_else(|| cannot("its page socket is gone".to_owned()))?;
    let (open, opened) =
        nix::unistd::pipe2(nix::fcntl::OFlag::O_CLOEXEC).map_err(Error::io("making a pipe"))?;

    let (mut command, log) = fixed.runc.command("checkpoint");
    command.args([
        "--leave-running",
        "--lazy-pages",
        "--status-fd",
        &STATUS_FD.to_string(),
    ]);
    command
        .arg("--image-path")
        .arg(partial.criu_dir())
        .arg("--work-path")
        .arg(work);
    command.args(criu::arguments(flags)).arg(&fixed.id);
    let away = |fd: &OwnedFd| {
        sys::out_of_the_way(fd, STATUS_FD + 1).map_err(Error::io("moving a descriptor"))
    };
    let (theirs, opened) = (away(&theirs)?, away(&opened)?);
    sys::pass_fd(&mut command, theirs.as_raw_fd(), CHILD_FD);
    sys::pass_fd(&mut command, opened.as_raw_fd(), STATUS_FD);
    let running = fixed.runc.spawn("checkpoint", command, log)?;
    // While we hold their ends too we would not see them die.
    drop((theirs, opened));
    // The copy cannot be taken back, so a dump that it made late still has its time to end.
    let ended = fixed.runc.wait(running, rest + CLOSING);
    tokio::pin!(ended);

    let is_open = window_opens(open);
    tokio::select! {
        opens = is_open => if !opens? {
            // runc went away without opening it: its own error says why.
            ended.await?;
            return Err(cannot("CRIU ended without waiting for its pages to be taken".to_owned()).into());
        },
        early = &mut ended => {
            early?;
            return Err(cannot("CRIU ended without waiting for its pages to be taken".to_owned()).into());
        }
    }
    done(&fixed.id, "dump: until the window opens", began);
    let from = Sources {
        id: fixed.id.clone(),
        init,
        upper: fixed.rootfs.upper_layer(),
        // Only what the sandbox lends: a tmpfs of the container's own is in CRIU's images.
        shm: spec.bind_source(SHM).is_some(),
        mounts: spec
            .mounts()
            .map(|mount| mount.destination.to_owned())
            .collect(),
        tmpfs: spec
            .mounts()
            .filter(|m| m.kind == "tmpfs")
            .map(|m| m.destination.to_owned())
            .collect(),
    };
    let abort = link.abort().map_err(|e| cannot(sentence(&e)))?;
    let copying = blocking(move || {
        let before = precopy.as_mut().map(Precopy::settle).unwrap_or_default();
        let tasks = from.take(&partial, &before)?;
        // Closed here, on the thread that may wait.
        link.close(CLOSING).map_err(|e| sentence(&e))?;
        Ok((partial, tasks, before.bytes(), precopy))
    });
    let copied = match tokio::time::timeout_at(until.into(), copying).await {
        Ok(copied) => copied?,
        // Its thread may be stuck in a disk that does not answer. The tasks do not wait for that.
        Err(_) => Err(format!(
            "its memory was not copied within the {} s of deadlines.checkpoint",
            fixed.shared.node.deadlines.checkpoint.as_secs()
        )),
    };
    if copied.is_err() {
        // This is a copy of the link's end: as long as it is open, CRIU waits and the tasks stand still.
        abort.end();
    }
    // The dump has to be over, well or not, before anything is said of the tasks.
    let closed = Instant::now();
    let ended = ended.await;
    done(&fixed.id, "dump: its end", closed);
    let (partial, tasks, precopied, precopy) = copied
        .map_err(|reason: String| match &ended {
            // When CRIU failed first, the reason is in its log.
            Err(_) => format!("{reason}; the dump was given up and the tasks run on"),
            Ok(()) => reason,
        })
        .map_err(cannot)?;
    ended?;
    Ok((
        partial,
        Taken {
            tasks,
            precopied,
            precopy,
            stopped: began.elapsed(),
        },
    ))
}

/// Whether the window opened; not, when runc ended first.
async fn window_opens(status: OwnedFd) -> Result<bool, Error> {
    let wait = async {
        let status = std::fs::File::from(status);
        nix::fcntl::fcntl(
            &status,
            nix::fcntl::FcntlArg::F_SETFL(nix::fcntl::OFlag::O_NONBLOCK),
        )?;
        let status = pipe::Receiver::from_file(status)?;
        loop {
            status.readable().await?;
            match status.try_read(&mut [0]) {
                Ok(read) => return Ok(read == 1),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {}
                Err(e) => return Err(e),
            }
        }
    };
    wait.await
        .map_err(Error::io::<io::Error>("waiting for the dump"))
}

/// What is copied while the tasks stand still.
struct Sources {
    id: String,
    init: i32,
    upper: Option<PathBuf>,
    shm: bool,
    /// Where the container has mounts, and which of them are tmpfs of its own.
    mounts: Vec<String>,
    tmpfs: Vec<String>,
}

impl Sources {
    fn take(&self, partial: &Partial, before: &Precopied) -> Result<Tasks, String> {
        let words = |e: &dyn std::error::Error| sentence(e);
        let criu = partial.criu_dir();
        let mounts = || self.mounts.iter().map(String::as_str);
        let began = Instant::now();
        let tasks = Tasks::below(self.init).map_err(|e| words(&e))?;
        let deleted = DeletedFiles::find(&criu, &tasks).map_err(|e| words(&e))?;
        let travelling: Vec<&str> = self.tmpfs.iter().map(String::as_str).chain([SHM]).collect();
        deleted
            .require_travelling(mounts(), &travelling)
            .map_err(|e| words(&e))?;
        let memory = pages::lazy_bytes(&criu).map_err(|e| words(&e))?;
        let missing = memory.saturating_sub(before.bytes());
        partial.require_space(missing).map_err(|e| words(&e))?;
        done(&self.id, "dump: what there is", began);
        let began = Instant::now();
        pages::take_pages(&criu, &tasks, before, partial.chunks()).map_err(|e| words(&e))?;
        done(&self.id, "dump: pages", began);
        let began = Instant::now();
        if let Some(upper) = &self.upper {
            let folder = open_dir(upper)
                .map_err(|e| format!("cannot open the upper layer {}: {e}", upper.display()))?;
            let root = Path::new("/");
            let out = partial.chunks().stream(UPPER_FILE);
            let packed = pack_with_deleted(&folder, out, root, deleted.of(root, mounts()));
            let (out, _) = packed.map_err(|e| words(&e))?;
            out.finish().map_err(|e| words(&e))?;
        }
        if self.shm {
            let root = PathBuf::from(format!("/proc/{}/root", self.init));
            let shm = Path::new(SHM);
            match open_in_root(&root, shm) {
                Ok(folder) => {
                    let out = partial.chunks().stream(SHM_FILE);
                    let packed = pack_with_deleted(&folder, out, shm, deleted.of(shm, mounts()));
                    let (out, _) = packed.map_err(|e| words(&e))?;
                    out.finish().map_err(|e| words(&e))?;
                }
                Err(e) if e.kind() == io::ErrorKind::NotFound => {}
                Err(e) => return Err(format!("cannot open the container's {SHM}: {e}")),
            }
        }
        done(&self.id, "dump: layers", began);
        Ok(tasks)
    }
}
