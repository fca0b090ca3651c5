use std::{
    io::{IoSlice, IoSliceMut, Read, Write},
    mem::MaybeUninit,
    os::{fd::AsFd, unix::net::UnixStream},
    time::{Duration, Instant},
};

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, recvmsg, sendmsg,
};

use super::*;
use crate::image::tests::verified;

const FINISHED: u32 = 0x5253_5446;

/// A pager whose CRIU and daemon are this test.
struct Stage {
    root: tempfile::TempDir,
    pager: Pager,
}

impl Stage {
    fn new() -> Self {
        let root = tempfile::tempdir().unwrap();
        let image = verified(&root.path().join("store"));
        // Longer than a socket's address can be, as a container's folder is.
        let work = root.path().join("w".repeat(100));
        std::fs::create_dir(&work).unwrap();
        let pager = Pager::start(Path::new("/usr/sbin/criu"), image, &work).unwrap();
        Self { root, pager }
    }

    fn work(&self) -> PathBuf {
        self.root.path().join("w".repeat(100))
    }

    /// CRIU connects by a relative name, from its work folder.
    fn criu(&self) -> UnixStream {
        let dir = File::open(self.work()).unwrap();
        UnixStream::connect(relay::short_path(&dir)).unwrap()
    }

    fn daemon(&self) -> UnixListener {
        let dir = File::open(self.work().join(DAEMON_DIR)).unwrap();
        UnixListener::bind(relay::short_path(&dir)).unwrap()
    }
}

/// As CRIU sends one process: its number, then its descriptor with one byte.
fn send(to: &mut UnixStream, pid: i32, fd: Option<impl AsFd>) {
    to.write_all(&pid.to_ne_bytes()).unwrap();
    if let Some(fd) = fd {
        let fds = [fd.as_fd()];
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        control.push(SendAncillaryMessage::ScmRights(&fds));
        sendmsg(to, &[IoSlice::new(&[0])], &mut control, SendFlags::empty()).unwrap();
    }
}

/// As the daemon receives: a number, and a descriptor unless it is negative.
fn receive(from: &mut UnixStream) -> (i32, Option<OwnedFd>) {
    let mut word = [0; 4];
    from.read_exact(&mut word).unwrap();
    let pid = i32::from_ne_bytes(word);
    if pid < 0 || pid == FINISHED.cast_signed() {
        return (pid, None);
    }
    let mut byte = [0];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    recvmsg(
        from,
        &mut [IoSliceMut::new(&mut byte)],
        &mut control,
        RecvFlags::empty(),
    )
    .unwrap();
    let mut fd = None;
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(fds) = message {
            fd = fds.into_iter().next();
        }
    }
    (pid, Some(fd.unwrap()))
}

/// A pipe: its write end stands for a userfaultfd, and its read end tells when the last copy is closed.
fn userfaultfd() -> (io::PipeReader, io::PipeWriter) {
    io::pipe().unwrap()
}

/// Whether every copy of the write end is closed.
fn all_closed(reader: &io::PipeReader) -> bool {
    let mut fds = [rustix::event::PollFd::new(
        reader,
        rustix::event::PollFlags::IN,
    )];
    let zero = rustix::event::Timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    rustix::event::poll(&mut fds, Some(&zero)).unwrap();
    fds[0].revents().contains(rustix::event::PollFlags::HUP)
}

/// Restores two processes and a zombie; says the read ends of their descriptors.
fn restore(stage: &Stage, finish: bool) -> Vec<io::PipeReader> {
    let listener = stage.daemon();
    let mut criu = stage.criu();
    let mut daemon = listener.accept().unwrap().0;
    let mut readers = Vec::new();
    for pid in [1, -9, 4_194_304] {
        if pid < 0 {
            send(&mut criu, pid, None::<OwnedFd>);
            assert_eq!(receive(&mut daemon).0, pid);
            continue;
        }
        let (reader, writer) = userfaultfd();
        send(&mut criu, pid, Some(writer));
        let (found, fd) = receive(&mut daemon);
        assert_eq!(found, pid);
        // It is the same pipe; the daemon's copy is closed here, as when it dies.
        File::from(fd.unwrap()).write_all(b"x").unwrap();
        readers.push(reader);
    }
    if finish {
        criu.write_all(&FINISHED.to_ne_bytes()).unwrap();
        assert_eq!(receive(&mut daemon).0, FINISHED.cast_signed());
    }
    readers
}

#[test]
fn a_load_that_ends_well_closes_the_descriptors() {
    let stage = Stage::new();
    let readers = restore(&stage, true);
    assert!(readers.iter().all(|reader| !all_closed(reader)));
    assert!(matches!(
        stage.pager.ended(DaemonExit::Code(0)),
        Ended::Loaded
    ));
    assert!(readers.iter().all(all_closed));
}

/// The promise: when the pager is killed in mid-load, no descriptor is closed before the tasks are dead.
#[test]
fn a_dead_daemon_closes_nothing_until_the_tasks_are_dead() {
    for exit in [DaemonExit::Signal(9), DaemonExit::Code(1)] {
        let stage = Stage::new();
        let readers = restore(&stage, true);
        let Ended::Died(orphans) = stage.pager.ended(exit) else {
            panic!("{exit:?} taken for success");
        };
        assert!(
            orphans.reason().contains(&exit.to_string()),
            "{}",
            orphans.reason()
        );
        assert!(!readers.iter().any(all_closed));
        let (orphans, ()) = orphans.kill_then_release(|| Err(())).unwrap_err();
        assert!(!readers.iter().any(all_closed));
        let killed = orphans.kill_then_release(|| {
            // While the tasks are being killed.
            assert!(!readers.iter().any(all_closed));
            Ok::<(), ()>(())
        });
        assert!(killed.is_ok() && readers.iter().all(all_closed));
    }
}

#[test]
fn dropped_in_any_state_nothing_is_closed() {
    let stage = Stage::new();
    let readers = restore(&stage, true);
    drop(stage.pager);
    assert!(!readers.iter().any(all_closed));
    let stage = Stage::new();
    let readers = restore(&stage, true);
    drop(stage.pager.ended(DaemonExit::Signal(9)));
    assert!(!readers.iter().any(all_closed));
}

#[test]
fn success_before_criu_has_finished_is_no_success() {
    let stage = Stage::new();
    let readers = restore(&stage, false);
    let ended = stage.pager.ended(DaemonExit::Code(0));
    assert!(matches!(&ended, Ended::Died(orphans) if orphans.reason().contains("not finished")));
    assert!(!readers.iter().any(all_closed));
}

#[test]
fn a_restore_that_never_came_or_hangs_is_given_up_at_once() {
    let begun = Instant::now();
    let stage = Stage::new();
    stage.pager.abandon(|| Ok::<(), ()>(())).unwrap();
    // CRIU has connected, and no daemon ever comes.
    let stage = Stage::new();
    let _criu = stage.criu();
    stage.pager.abandon(|| Ok::<(), ()>(())).unwrap();
    // CRIU has sent one process and says nothing more.
    let stage = Stage::new();
    let listener = stage.daemon();
    let mut criu = stage.criu();
    let mut daemon = listener.accept().unwrap().0;
    let (reader, writer) = userfaultfd();
    send(&mut criu, 1, Some(writer));
    drop(receive(&mut daemon));
    assert_eq!(stage.pager.processes(), 1);
    stage.pager.abandon(|| Ok::<(), ()>(())).unwrap();
    assert!(all_closed(&reader) && begun.elapsed() < Duration::from_secs(5));
}

#[test]
fn the_daemon_gets_the_image_and_a_folder_of_its_own() {
    let stage = Stage::new();
    let Argv { program, args } = stage.pager.daemon().clone();
    let args: Vec<_> = args.iter().map(|arg| arg.to_string_lossy()).collect();
    assert_eq!(
        (program.as_path(), args[0].as_ref()),
        (Path::new("/usr/sbin/criu"), "lazy-pages")
    );
    let value = |option| &args[args.iter().position(|arg| arg == option).unwrap() + 1];
    assert!(value("--images-dir").ends_with("/team-a/warm/1/criu"));
    assert!(value("--work-dir").ends_with("/pager"));
    stage.pager.abandon(|| Ok::<(), ()>(())).unwrap();
}
