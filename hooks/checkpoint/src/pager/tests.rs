use std::{
    ffi::OsStr,
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
use crate::image::tests::staged;

const FINISHED: u32 = 0x5253_5446;
const LOADED: u32 = 0x414c_4c44;

/// A pager whose CRIU and process are this test.
struct Stage {
    root: tempfile::TempDir,
    pager: Pager,
    process: UnixStream,
}

impl Stage {
    fn new() -> Self {
        let root = tempfile::tempdir().unwrap();
        let image = staged(&root.path().join("store"));
        // Longer than a socket's address can be, as a container's folder is.
        let work = root.path().join("w".repeat(100));
        std::fs::create_dir(&work).unwrap();
        let (pager, launch) = Pager::start(Path::new("/opt/rekindle"), image, &work).unwrap();
        let Argv { program, args } = launch.argv;
        assert_eq!(program, Path::new("/opt/rekindle"));
        let store = root.path().join("store");
        let laid_out = store.join("laid-out");
        let words: [&OsStr; 6] = [
            "pager".as_ref(),
            "--criu".as_ref(),
            laid_out.as_ref(),
            "--store".as_ref(),
            store.as_ref(),
            "team-a/warm@1".as_ref(),
        ];
        assert_eq!(args, words);
        Self {
            root,
            pager,
            process: launch.stdin.into(),
        }
    }

    /// CRIU connects by a relative name, from its work folder.
    fn criu(&self) -> UnixStream {
        let dir = File::open(self.root.path().join("w".repeat(100))).unwrap();
        UnixStream::connect(short_path(&dir)).unwrap()
    }

    /// The pager's process ends, having said this.
    fn ended(self, exit: PagerExit, said: &str) -> Ended {
        drop(self.process);
        std::fs::write(&self.pager.log, said).unwrap();
        self.pager.ended(exit)
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

/// As the pager receives: a number, and a descriptor unless it is negative.
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
fn restore(stage: &mut Stage, finish: bool) -> Vec<io::PipeReader> {
    let mut criu = stage.criu();
    restored(stage, &mut criu, finish)
}

/// The same, while CRIU lives on.
fn restored(stage: &mut Stage, criu: &mut UnixStream, finish: bool) -> Vec<io::PipeReader> {
    let mut readers = Vec::new();
    for pid in [1, -9, 4_194_304] {
        if pid < 0 {
            send(criu, pid, None::<OwnedFd>);
            assert_eq!(receive(&mut stage.process).0, pid);
            continue;
        }
        let (reader, writer) = userfaultfd();
        send(criu, pid, Some(writer));
        let (found, fd) = receive(&mut stage.process);
        assert_eq!(found, pid);
        // It is the same pipe; the process's copy is closed here, as when it dies.
        File::from(fd.unwrap()).write_all(b"x").unwrap();
        readers.push(reader);
    }
    if finish {
        criu.write_all(&FINISHED.to_ne_bytes()).unwrap();
        assert_eq!(receive(&mut stage.process).0, FINISHED.cast_signed());
    }
    readers
}

#[test]
fn a_load_that_ends_well_closes_the_descriptors() {
    let mut stage = Stage::new();
    let readers = restore(&mut stage, true);
    assert!(readers.iter().all(|reader| !all_closed(reader)));
    let ended = stage.ended(PagerExit::Code(0), "asked=1\n");
    assert!(matches!(ended, Ended::Loaded { said: Some(said) } if said == "asked=1"));
    assert!(readers.iter().all(all_closed));
}

/// The promise: when the pager is killed in mid-load, no descriptor is closed before the tasks are dead,
/// and neither is that of a process that was forked since the restore.
#[test]
fn a_dead_pager_closes_nothing_until_the_tasks_are_dead() {
    for exit in [PagerExit::Signal(9), PagerExit::Code(1)] {
        let mut stage = Stage::new();
        let mut readers = restore(&mut stage, true);
        let (reader, writer) = userfaultfd();
        send(&mut stage.process, 0, Some(writer));
        readers.push(reader);
        let Ended::Died(orphans) = stage.ended(exit, "cannot read pages\n") else {
            panic!("{exit:?} taken for success");
        };
        let reason = format!("the pager {exit} before all memory was in: cannot read pages");
        assert_eq!(orphans.reason(), reason);
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

/// The promise: killed whenever it may be, it costs the container, or nothing when all is in; and never zeros.
#[test]
fn a_pager_killed_in_any_phase_closes_nothing_that_is_needed() {
    for phase in Phase::all() {
        let mut stage = Stage::new();
        // Of the one phase in which it lives still.
        let mut criu;
        let readers = match phase {
            Phase::Waiting => Vec::new(),
            Phase::Restoring => {
                criu = stage.criu();
                restored(&mut stage, &mut criu, false)
            }
            Phase::Loading => restore(&mut stage, true),
            Phase::Loaded => {
                let readers = restore(&mut stage, true);
                stage.process.write_all(&LOADED.to_ne_bytes()).unwrap();
                // What it does from here on keeps nobody waiting.
                let begun = Instant::now();
                while !readers.iter().all(all_closed) {
                    assert!(begun.elapsed() < Duration::from_secs(5));
                    thread::yield_now();
                }
                readers
            }
        };
        let ended = stage.ended(PagerExit::Signal(9), "");
        match (phase, ended) {
            (Phase::Waiting | Phase::Restoring | Phase::Loading, Ended::Died(orphans)) => {
                let told = orphans.reason().contains("CRIU had not finished");
                assert_eq!(told, phase < Phase::Loading, "{}", orphans.reason());
                assert!(!readers.iter().any(all_closed), "{phase:?}");
                orphans.kill_then_release(|| Ok::<(), ()>(())).unwrap();
            }
            (Phase::Loaded, Ended::Loaded { .. }) => {}
            (phase, ended) => panic!("{phase:?}: {ended:?}"),
        }
        assert!(readers.iter().all(all_closed), "{phase:?}");
    }
}

/// A broken relay must not keep CRIU or the pager waiting for it.
#[test]
fn who_breaks_the_relay_is_hung_up_on() {
    let mut stage = Stage::new();
    let mut criu = stage.criu();
    // A process without its descriptor, as when there are none left to receive it.
    criu.write_all(&7_i32.to_ne_bytes()).unwrap();
    criu.write_all(&[0]).unwrap();
    let mut rest = Vec::new();
    criu.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
    stage
        .process
        .set_read_timeout(Some(Duration::from_secs(5)))
        .unwrap();
    criu.read_to_end(&mut rest).unwrap();
    stage.process.read_to_end(&mut rest).unwrap();
}

#[test]
fn dropped_in_any_state_nothing_is_closed() {
    let mut stage = Stage::new();
    let readers = restore(&mut stage, true);
    drop(stage);
    assert!(!readers.iter().any(all_closed));
    let mut stage = Stage::new();
    let readers = restore(&mut stage, true);
    drop(stage.ended(PagerExit::Signal(9), ""));
    assert!(!readers.iter().any(all_closed));
}

#[test]
fn success_before_criu_has_finished_is_no_success() {
    let mut stage = Stage::new();
    let readers = restore(&mut stage, false);
    let ended = stage.ended(PagerExit::Code(0), "");
    assert!(matches!(&ended, Ended::Died(orphans) if orphans.reason().contains("not finished")));
    assert!(!readers.iter().any(all_closed));
}

#[test]
fn a_restore_that_never_came_or_hangs_is_given_up_at_once() {
    let begun = Instant::now();
    let stage = Stage::new();
    stage.pager.abandon(|| Ok::<(), ()>(())).unwrap();
    // CRIU has connected, and says nothing.
    let stage = Stage::new();
    let _criu = stage.criu();
    stage.pager.abandon(|| Ok::<(), ()>(())).unwrap();
    // CRIU has sent one process and says nothing more.
    let mut stage = Stage::new();
    let mut criu = stage.criu();
    let (reader, writer) = userfaultfd();
    send(&mut criu, 1, Some(writer));
    drop(receive(&mut stage.process));
    stage.pager.abandon(|| Ok::<(), ()>(())).unwrap();
    assert!(all_closed(&reader) && begun.elapsed() < Duration::from_secs(5));
}
