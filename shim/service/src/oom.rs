//! OOM kills in a container, told while it runs and at the latest before its end.
//!
//! ```text
//!   watch ──▶ waiting ──(the kernel says so)──▶ report ──▶ waiting …
//!                ├──(finish)──▶ a last look ──▶ over
//!                └──(forgotten)──▶ over
//! ```
//!
//! A task of the runtime per container, and one descriptor. Version 2 says that `memory.events` has
//! changed, and the counter in it says whether a kill was among the changes. Version 1 rings an eventfd
//! before it kills; its counter in `memory.oom_control` follows, and leaves out cgroups below.
//!
//! systemd removes a scope as soon as its last process is gone, before anybody can look. But its parent has counted
//! the kill too, so the parent's counter is kept beside the cgroup's own: what it has more, when that is gone, was here.

use std::{
    fs, io,
    os::fd::{AsRawFd, OwnedFd},
};

use rustix::{
    event::{EventfdFlags, eventfd},
    fs::inotify::{self, CreateFlags, WatchFlags},
};
use tokio::{
    io::{Interest, unix::AsyncFd},
    sync::oneshot,
    task::JoinHandle,
};

use crate::{
    stats::{Cgroup, Folder},
    sys,
};

/// Watches until it is finished or dropped.
#[derive(Debug)]
pub(crate) struct Watch {
    finish: oneshot::Sender<()>,
    task: JoinHandle<()>,
}

/// Calls `report` for OOM kills in `cgroup`. `None` where memory is not accounted.
pub(crate) fn watch(
    cgroup: &Cgroup,
    report: impl FnMut() + Send + 'static,
) -> io::Result<Option<Watch>> {
    let source = match cgroup {
        Cgroup::V1(controllers) => match controllers.get("memory") {
            Some(memory) => Source::v1(memory),
            None => return Ok(None),
        },
        Cgroup::V2(folder) => Source::v2(folder),
    };
    match source {
        Ok(source) => Ok(Some(Watch::start(source, report))),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

impl Watch {
    fn start(mut source: Source, mut report: impl FnMut() + Send + 'static) -> Self {
        let (finish, mut finished) = oneshot::channel();
        let task = tokio::spawn(async move {
            // A small container can be out of memory before anybody watches it.
            let mut told = source.has_killed(false);
            loop {
                if told {
                    report();
                }
                tokio::select! {
                    asked = &mut finished => {
                        let told = source.told_already();
                        if asked.is_ok() && source.has_killed(told) {
                            report();
                        }
                        return;
                    }
                    changed = source.changed() => if let Err(error) = changed {
                        tracing::warn!(%error, "no more OOM events");
                        return;
                    }
                }
                told = source.has_killed(true);
            }
        });
        Self { finish, task }
    }

    /// Reports what is not reported yet, and ends.
    pub(crate) async fn finish(self) {
        let _ = self.finish.send(());
        if let Err(error) = self.task.await {
            tracing::warn!(%error, "the watch for OOM kills ended unexpectedly");
        }
    }
}

/// What the kernel tells.
#[derive(Debug)]
struct Source {
    fd: AsyncFd<OwnedFd>,
    folder: Folder,
    kind: Kind,
}

#[derive(Debug)]
enum Kind {
    V1,
    /// With the kills that were seen.
    V2(Kills),
}

/// Kills in a cgroup of version 2.
#[derive(Debug)]
struct Kills {
    /// `None` when it is gone.
    own: Option<u64>,
    /// In its parent and all below that. The topmost cgroup does not count.
    parent: Option<u64>,
}

impl Kills {
    fn read(folder: &Folder) -> Self {
        let kills = |folder: &Folder| Some(folder.table("memory.events")?.get("oom_kill"));
        let mut own = kills(folder);
        loop {
            let parent = folder.parent().as_ref().and_then(kills);
            // One between the two would be in the parent's alone.
            let again = kills(folder);
            if again == own {
                return Self { own, parent };
            }
            own = again;
        }
    }

    fn exceed(&self, seen: &Self) -> bool {
        match self.own {
            Some(own) => own > seen.own.unwrap_or(0),
            None => self.parent > seen.parent,
        }
    }
}

impl Source {
    fn v1(folder: &Folder) -> io::Result<Self> {
        let bell = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let control = fs::File::open(folder.file("memory.oom_control"))?;
        let line = format!("{} {}", bell.as_raw_fd(), control.as_raw_fd());
        let register = folder.file("cgroup.event_control");
        io::Write::write_all(
            &mut fs::File::options().write(true).open(register)?,
            line.as_bytes(),
        )?;
        Self::new(bell, folder, Kind::V1)
    }

    fn v2(folder: &Folder) -> io::Result<Self> {
        let changes = inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK)?;
        inotify::add_watch(&changes, folder.file("memory.events"), WatchFlags::MODIFY)?;
        if let Some(parent) = folder.parent() {
            // Another's kill must not be taken for one here later.
            let _ = inotify::add_watch(&changes, parent.file("memory.events"), WatchFlags::MODIFY);
        }
        // Kills from before the watch are not seen yet.
        let seen = Kills {
            own: None,
            ..Kills::read(folder)
        };
        Self::new(changes, folder, Kind::V2(seen))
    }

    fn new(fd: OwnedFd, folder: &Folder, kind: Kind) -> io::Result<Self> {
        Ok(Self {
            fd: sys::async_fd(fd)?,
            folder: folder.clone(),
            kind,
        })
    }

    /// Waits until the kernel tells something.
    async fn changed(&self) -> io::Result<()> {
        self.fd.async_io(Interest::READABLE, take).await
    }

    /// Whether the kernel has told something that the runtime does not know of yet.
    fn told_already(&self) -> bool {
        take(self.fd.get_ref()).is_ok()
    }

    /// Whether what the kernel `told` is that it has killed.
    fn has_killed(&mut self, told: bool) -> bool {
        match &mut self.kind {
            // The bell also rings when the cgroup is removed, after its files.
            Kind::V1 => told && self.folder.file("memory.oom_control").exists(),
            Kind::V2(seen) => {
                let now = Kills::read(&self.folder);
                let more = now.exceed(seen);
                *seen = now;
                more
            }
        }
    }
}

/// Takes what a descriptor has. What it says is no more than that something changed.
fn take(fd: &OwnedFd) -> io::Result<()> {
    // An eventfd has 8 bytes; of an inotify's changes, 16 each, the kernel folds equal ones into one.
    let mut buffer = [0; 128];
    rustix::io::read(fd, &mut buffer)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::{collections::HashMap, path::Path, time::Duration};

    use tokio::{sync::mpsc, time::timeout};

    use super::*;

    /// Long enough for a busy machine, short enough for a person.
    const SOON: Duration = Duration::from_secs(10);

    fn started(cgroup: &Cgroup) -> (Watch, mpsc::UnboundedReceiver<()>) {
        let (sender, reports) = mpsc::unbounded_channel();
        let watch = watch(cgroup, move || sender.send(()).unwrap()).unwrap();
        (watch.unwrap(), reports)
    }

    fn write(folder: &Path, kills: u64) {
        let text = format!("low 0\noom 9\noom_kill {kills}\n");
        fs::write(folder.join("memory.events"), text).unwrap();
    }

    #[tokio::test]
    async fn version_2_tells_kills_and_no_other_change() {
        let folder = tempfile::tempdir().unwrap();
        let at = folder.path();
        write(at, 0);
        let (watch, mut reports) = started(&Cgroup::V2(Folder::new(at)));
        write(at, 2);
        assert_eq!(timeout(SOON, reports.recv()).await, Ok(Some(())));
        // Something else happened: the counter is as it was.
        write(at, 2);
        tokio::time::sleep(Duration::from_millis(20)).await;
        assert!(reports.try_recv().is_err());
        write(at, 3);
        watch.finish().await;
        assert_eq!(reports.recv().await, Some(()));
        assert_eq!(reports.recv().await, None);
    }

    #[tokio::test]
    async fn a_kill_from_before_the_watch_is_told() {
        let folder = tempfile::tempdir().unwrap();
        write(folder.path(), 1);
        let (_watch, mut reports) = started(&Cgroup::V2(Folder::new(folder.path())));
        assert_eq!(timeout(SOON, reports.recv()).await, Ok(Some(())));
    }

    #[tokio::test]
    async fn a_cgroup_that_is_gone_has_nothing_more_to_tell() {
        let folder = tempfile::tempdir().unwrap();
        write(folder.path(), 0);
        let (watch, mut reports) = started(&Cgroup::V2(Folder::new(folder.path())));
        fs::remove_file(folder.path().join("memory.events")).unwrap();
        watch.finish().await;
        assert_eq!(reports.recv().await, None);
    }

    #[tokio::test]
    async fn a_kill_is_told_by_the_parent_when_the_cgroup_is_gone() {
        for (kills_in_parent, reports_expected) in [(1, 1), (0, 0)] {
            let parent = tempfile::tempdir().unwrap();
            let folder = parent.path().join("scope");
            fs::create_dir(&folder).unwrap();
            // Another's kills of earlier.
            write(parent.path(), 4);
            write(&folder, 0);
            let mut source = Source::v2(&Folder::new(&folder)).unwrap();
            assert!(!source.has_killed(false));
            write(parent.path(), 5);
            assert!(!source.has_killed(true), "it was another's");
            write(parent.path(), 5 + kills_in_parent);
            fs::remove_dir_all(&folder).unwrap();
            let (sender, mut reports) = mpsc::unbounded_channel();
            let watch = Watch::start(source, move || sender.send(()).unwrap());
            watch.finish().await;
            let mut count = 0;
            while reports.recv().await.is_some() {
                count += 1;
            }
            assert_eq!(count, reports_expected);
        }
    }

    #[tokio::test]
    async fn version_1_tells_when_its_bell_rings_and_the_cgroup_is_there() {
        let folder = tempfile::tempdir().unwrap();
        for file in ["memory.oom_control", "cgroup.event_control"] {
            fs::write(folder.path().join(file), "").unwrap();
        }
        let mut source = Source::v1(&Folder::new(folder.path())).unwrap();
        let ring = source.fd.get_ref().try_clone().unwrap();
        let ring = move || rustix::io::write(&ring, &1u64.to_ne_bytes()).unwrap();
        let registered = fs::read_to_string(folder.path().join("cgroup.event_control")).unwrap();
        let number = registered.split(' ').next().unwrap().parse();
        assert_eq!(number, Ok(source.fd.as_raw_fd()));

        assert!(!source.told_already());
        ring();
        timeout(SOON, source.changed()).await.unwrap().unwrap();
        assert!(source.has_killed(true) && !source.told_already());

        let (sender, mut reports) = mpsc::unbounded_channel();
        let watch = Watch::start(source, move || sender.send(()).unwrap());
        ring();
        assert_eq!(timeout(SOON, reports.recv()).await, Ok(Some(())));
        ring();
        watch.finish().await;
        assert_eq!(reports.recv().await, Some(()));
        assert_eq!(reports.recv().await, None);

        let mut source = Source::v1(&Folder::new(folder.path())).unwrap();
        fs::remove_file(folder.path().join("memory.oom_control")).unwrap();
        assert!(!source.has_killed(true));
    }

    #[tokio::test]
    async fn without_the_memory_controller_nothing_is_watched() {
        let folder = tempfile::tempdir().unwrap();
        let nothing = Cgroup::V2(Folder::new(folder.path()));
        assert!(watch(&nothing, || ()).unwrap().is_none());
        assert!(watch(&Cgroup::V1(HashMap::new()), || ()).unwrap().is_none());
    }
}
