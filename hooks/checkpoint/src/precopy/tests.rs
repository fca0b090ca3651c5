//! On a real process, which does to its memory what it is told.
#![allow(
    unsafe_code,
    reason = "a forked process and memory that is moved and given up on purpose"
)]

use std::{
    fs,
    io::{PipeReader, PipeWriter, Read, Write},
    sync::{Mutex, MutexGuard, PoisonError},
    thread,
    time::Duration,
};

use nix::{
    libc,
    sys::{
        signal::{Signal, kill},
        wait::waitpid,
    },
};
use proptest::prelude::*;

use super::*;
use crate::chunks::{Compression, Index, Stream};

/// Blocks of the process's memory.
const BLOCKS: usize = 64;
/// Pages of a block.
const PAGES: usize = CHUNK / 4096;

/// One process at a time: a fork copies the descriptors of all tests, and a userfaultfd watches until the last copy of
/// it is closed.
static TURN: Mutex<()> = Mutex::new(());

/// A forked process with memory of its own: page n begins with the word n + 1.
struct Process {
    task: Task,
    begin: u64,
    to: PipeWriter,
    from: PipeReader,
    _turn: MutexGuard<'static, ()>,
}

/// What it is told to do, with the number of a page.
#[derive(Debug, Clone, Copy)]
#[repr(u8)]
enum Do {
    Write,
    Discard,
    /// The block of the page is unmapped, and fresh memory with other words put there.
    Renew,
    /// The block behind that of the page is moved to it.
    Move,
    Fork,
    /// It sets up a ring of the kernel's asynchronous I/O.
    ReadAhead,
    /// Nothing but an answer.
    Wait,
}

impl Process {
    fn new() -> Self {
        let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
        let bytes = BLOCKS * CHUNK;
        // SAFETY: fresh memory, whose address is kept and which lives as long as the process.
        let begin = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                bytes + CHUNK,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        assert_ne!(begin, libc::MAP_FAILED);
        let begin = (begin as usize).next_multiple_of(CHUNK);
        for page in 0..BLOCKS * PAGES {
            write_word(begin + page * 4096, page as u64 + 1);
        }
        let (mut theirs, to) = io::pipe().unwrap();
        let (from, mut back) = io::pipe().unwrap();
        // SAFETY: the child makes system calls and writes its own memory, and nothing else.
        let pid = unsafe { libc::fork() };
        if pid == 0 {
            obey(begin, &mut theirs, &mut back);
        }
        assert!(pid > 0);
        let task = Task {
            pid,
            parent: 0,
            container_pid: 7,
            comm: "test".to_owned(),
            rss: bytes as u64,
        };
        Self {
            task,
            begin: begin as u64,
            to,
            from,
            _turn: turn,
        }
    }

    fn tell(&mut self, what: Do, page: usize) {
        let mut word = [0; 5];
        word[0] = what as u8;
        word[1..].copy_from_slice(&(page as u32).to_ne_bytes());
        self.to.write_all(&word).unwrap();
        self.from.read_exact(&mut [0]).unwrap();
    }

    fn word(&self, page: usize) -> u64 {
        let memory = proc_file(self.task.pid, "mem").unwrap();
        let mut word = [0; 8];
        let at = self.begin + page as u64 * 4096;
        std::os::unix::fs::FileExt::read_exact_at(&memory, &mut word, at).unwrap();
        u64::from_ne_bytes(word)
    }

    /// None on a kernel that does not remember what is written.
    fn watched(&self) -> Option<Precopy> {
        self.wait_until_unwatched();
        let lent = userfaultfd::open_in(self.task.pid);
        let tracker = lent.ok().and_then(Tracker::new);
        if tracker.is_none() {
            println!("skipped: this kernel does not remember what is written");
        }
        Some(Precopy(vec![Memory {
            task: self.task.clone(),
            begun: start_time(self.task.pid).unwrap(),
            tracker: tracker?,
            cells: HashMap::new(),
        }]))
    }

    /// A program that another test starts has copies of this one's descriptors until it runs.
    fn wait_until_unwatched(&self) {
        let watched = || {
            let smaps = fs::read_to_string(format!("/proc/{}/smaps", self.task.pid)).unwrap();
            let mut flags = smaps.lines().filter(|line| line.starts_with("VmFlags:"));
            flags.any(|line| line.split_whitespace().any(|flag| flag == "uw"))
        };
        let until = later();
        while watched() {
            assert!(Instant::now() < until, "it is still watched");
            #[allow(clippy::disallowed_methods, reason = "a thread of the test's own")]
            thread::sleep(Duration::from_millis(1));
        }
    }

    fn part(&self, of: &Precopied, block: usize) -> Option<Part> {
        let start = self.begin + (block * CHUNK) as u64;
        of.part(7, std::iter::once(start..start + CHUNK as u64))
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let pid = Pid::from_raw(self.task.pid);
        kill(pid, Signal::SIGKILL).unwrap();
        waitpid(pid, None).unwrap();
    }
}

fn write_word(at: usize, word: u64) {
    // SAFETY: the memory is mapped by who calls this.
    unsafe { std::ptr::with_exposed_provenance_mut::<u64>(at).write_volatile(word) };
}

/// What the forked process does until it is killed.
fn obey(begin: usize, from: &mut PipeReader, back: &mut PipeWriter) -> ! {
    let mut told = [0; 5];
    let mut word = 1_u64 << 32;
    let both = libc::PROT_READ | libc::PROT_WRITE;
    while from.read_exact(&mut told).is_ok() {
        let page = u32::from_ne_bytes([told[1], told[2], told[3], told[4]]) as usize;
        let at = begin + page * 4096;
        let block = begin + page / PAGES * CHUNK;
        let pointer = |at: usize| std::ptr::with_exposed_provenance_mut::<libc::c_void>(at);
        word += 1;
        // SAFETY: memory of this process, by address, that nothing else of it uses.
        unsafe {
            match told[0] {
                n if n == Do::Write as u8 => write_word(at, word),
                n if n == Do::Discard as u8 => {
                    libc::madvise(pointer(at), 4096, libc::MADV_DONTNEED);
                }
                n if n == Do::Renew as u8 => {
                    libc::munmap(pointer(block), CHUNK);
                    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED;
                    libc::mmap(pointer(block), CHUNK, both, flags, -1, 0);
                    (0..PAGES).for_each(|page| write_word(block + page * 4096, word));
                }
                n if n == Do::Move as u8 => {
                    let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
                    libc::mremap(pointer(block + CHUNK), CHUNK, CHUNK, flags, pointer(block));
                }
                n if n == Do::Fork as u8 => {
                    let child = libc::fork();
                    if child == 0 {
                        libc::_exit(0);
                    }
                    libc::waitpid(child, std::ptr::null_mut(), 0);
                }
                n if n == Do::ReadAhead as u8 => {
                    let mut ring: libc::c_ulong = 0;
                    libc::syscall(libc::SYS_io_setup, 8, &raw mut ring);
                }
                _ => {}
            }
        }
        let _ = back.write_all(&[1]);
    }
    // SAFETY: ends this process.
    unsafe { libc::_exit(0) }
}

fn writer(dir: &tempfile::TempDir) -> ChunkWriter {
    ChunkWriter::new(dir.path(), None, Compression::None, None).unwrap()
}

fn later() -> Instant {
    Instant::now() + Duration::from_secs(60)
}

/// Stores these blocks as an image does, and gives the first word of each page.
fn words(dir: &tempfile::TempDir, writer: ChunkWriter, parts: Vec<Part>) -> Vec<u64> {
    let name = "criu/pages-1.img".to_owned();
    writer.add(Stream {
        name: name.clone(),
        parts,
    });
    let (index, packs, _) = writer.finish(None).unwrap();
    let sizes: Vec<u64> = packs.iter().map(|pack| pack.size).collect();
    let index = Index::parse(&index, &sizes, false).unwrap();
    let chunks = crate::chunks::Chunks::open(dir.path(), &packs, index, None).unwrap();
    let mut all = vec![0; chunks.bytes_of(&name).unwrap() as usize];
    chunks.read_at(&name, 0, &mut all).unwrap();
    let words = all.chunks(4096).map(|page| page[..8].try_into().unwrap());
    words.map(u64::from_ne_bytes).collect()
}

/// The promise: what is taken from the copy is what is in memory when the tasks are stopped for good.
#[test]
fn whatever_is_written_after_the_mark_is_not_taken_from_the_copy() {
    let mut process = Process::new();
    if let Some(mut precopy) = process.watched() {
        let dir = tempfile::tempdir().unwrap();
        let writer = writer(&dir);
        precopy.mark();
        let bytes = precopy.copy(&writer, later()).unwrap();
        assert!(bytes >= (BLOCKS * CHUNK) as u64, "{bytes}");
        process.tell(Do::Write, 5);
        process.tell(Do::Discard, 3 * PAGES + 1);
        process.tell(Do::Renew, 6 * PAGES);
        process.tell(Do::Fork, 0);
        assert!(precopy.written() >= 2 * CHUNK as u64);
        let settled = precopy.settle();
        let changed = [0, 3, 6];
        let mut parts = Vec::new();
        for block in 0..BLOCKS {
            let part = process.part(&settled, block);
            assert_eq!(part.is_none(), changed.contains(&block), "block {block}");
            parts.extend(part);
        }
        let right: Vec<u64> = (0..BLOCKS * PAGES)
            .filter(|page| !changed.contains(&(page / PAGES)))
            .map(|page| process.word(page))
            .collect();
        assert_eq!(words(&dir, writer, parts), right);
    }
}

/// A second mark: what was written in between is copied again, and what was not is kept.
#[test]
fn what_was_written_is_copied_again() {
    let mut process = Process::new();
    if let Some(mut precopy) = process.watched() {
        let dir = tempfile::tempdir().unwrap();
        let writer = writer(&dir);
        precopy.mark();
        precopy.copy(&writer, later()).unwrap();
        process.tell(Do::Write, 5);
        process.tell(Do::Write, 40 * PAGES);
        precopy.mark();
        process.tell(Do::Write, 40 * PAGES + 3);
        let bytes = precopy.copy(&writer, later()).unwrap();
        assert!(
            (2 * CHUNK as u64..40 * CHUNK as u64).contains(&bytes),
            "{bytes}"
        );
        // Written again since the second mark, before or after it was read: nobody knows which.
        process.tell(Do::Write, 41 * PAGES);
        let settled = precopy.settle();
        let mut parts = Vec::new();
        for block in 0..BLOCKS {
            let part = process.part(&settled, block);
            assert_eq!(part.is_none(), [40, 41].contains(&block), "block {block}");
            parts.extend(part);
        }
        let right: Vec<u64> = (0..BLOCKS * PAGES)
            .filter(|page| ![40, 41].contains(&(page / PAGES)))
            .map(|page| process.word(page))
            .collect();
        assert_eq!(words(&dir, writer, parts), right);
    }
}

/// Memory that is moved onto other memory which was copied, before and after a mark, and watched again.
#[test]
fn what_was_moved_is_not_taken_for_what_was_there() {
    for turn in 0..4 {
        let mut process = Process::new();
        if let Some(mut precopy) = process.watched() {
            let dir = tempfile::tempdir().unwrap();
            let writer = writer(&dir);
            precopy.mark();
            precopy.copy(&writer, later()).unwrap();
            if turn & 1 != 0 {
                process.tell(Do::Move, 10 * PAGES);
            }
            precopy.mark();
            if turn & 2 != 0 {
                precopy.copy(&writer, later()).unwrap();
            }
            process.tell(Do::Write, 10 * PAGES + 2);
            let settled = precopy.settle();
            assert_eq!(process.part(&settled, 10), None, "turn {turn}");
            // What a second checkpoint of the same process would find.
            drop(precopy);
            let mut precopy = process.watched().unwrap();
            precopy.mark();
            precopy.copy(&writer, later()).unwrap();
            process.tell(Do::Write, 10 * PAGES + 5);
            let settled = precopy.settle();
            assert_eq!(process.part(&settled, 10), None, "turn {turn}");
            assert!(process.part(&settled, 20).is_some(), "turn {turn}");
        }
    }
}

#[test]
fn what_does_not_fit_into_the_time_is_left_to_the_dump() {
    let process = Process::new();
    if let Some(mut precopy) = process.watched() {
        let dir = tempfile::tempdir().unwrap();
        precopy.mark();
        assert_eq!(precopy.copy(&writer(&dir), Instant::now()).unwrap(), 0);
        assert_eq!(process.part(&precopy.settle(), 1), None);
    }
}

/// A process that has ended, and its number given to another.
#[test]
fn a_process_that_is_gone_has_no_copy() {
    let process = Process::new();
    let Some(mut precopy) = process.watched() else {
        return;
    };
    let dir = tempfile::tempdir().unwrap();
    let writer = writer(&dir);
    precopy.mark();
    assert!(precopy.copy(&writer, later()).unwrap() > 0);
    // As if it had begun at another time.
    precopy.0[0].begun += 1;
    assert_eq!(precopy.settle().bytes(), 0);
    drop(process);
    precopy.mark();
    assert_eq!(precopy.copy(&writer, later()).unwrap(), 0);
}

/// What a disk writes for a read that is under way is seen by nobody.
#[test]
fn a_process_that_reads_asynchronously_is_left_to_the_dump() {
    let mut process = Process::new();
    let Some(mut precopy) = process.watched() else {
        return;
    };
    let dir = tempfile::tempdir().unwrap();
    let writer = writer(&dir);
    precopy.mark();
    precopy.copy(&writer, later()).unwrap();
    assert!(precopy.settle().bytes() > 0);
    precopy.mark();
    precopy.copy(&writer, later()).unwrap();
    process.tell(Do::ReadAhead, 0);
    precopy.mark();
    assert_eq!(precopy.copy(&writer, later()).unwrap(), 0);
    assert_eq!(precopy.settle().bytes(), 0);
}

/// The promise: a process that was made to open a descriptor goes on as if nothing had been.
#[cfg(target_arch = "x86_64")]
#[test]
fn a_process_does_not_notice_that_it_lent_its_memory() {
    let mut process = Process::new();
    let pid = process.task.pid;
    let fds = || fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count();
    let (before, mut lent) = (fds(), 0);
    let state = |key: &str| {
        let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
        let line = status.lines().find(|line| line.starts_with(key)).unwrap();
        line.to_owned()
    };
    let blocked = state("SigBlk");
    for turn in 0..100 {
        // It waits in a read of its pipe, which has to be taken up again.
        lent += usize::from(userfaultfd::open_in(pid).is_ok());
        process.tell(Do::Wait, turn);
        assert!(process.word(1) == 2);
    }
    assert!(lent == 100 || lent == 0, "{lent}");
    assert_eq!(
        (fds(), state("SigBlk"), state("TracerPid")),
        (before, blocked, "TracerPid:\t0".to_owned())
    );
}

/// The same in all states in which a program may be: computing, sleeping, waiting with a timeout, hearing signals.
#[cfg(target_arch = "x86_64")]
#[test]
fn a_busy_program_computes_what_it_would_have() {
    let program = r#"
import hashlib, select, signal, time, os
ticks = 0
def tick(*_):
    global ticks
    ticks += 1
signal.signal(signal.SIGALRM, tick)
signal.setitimer(signal.ITIMER_REAL, 0.0007, 0.0007)
print("ready", flush=True)
digest, began = b"", time.monotonic()
for n in range(60000):
    digest = hashlib.sha256(digest + str(n).encode()).digest()
    if n % 3000 == 0:
        time.sleep(0.01)
        select.select([], [], [], 0.01)
        p = select.poll(); p.poll(10)
        e = select.epoll(); e.poll(0.01); e.close()
signal.setitimer(signal.ITIMER_REAL, 0, 0)
print(digest.hex(), ticks > 20, flush=True)
"#;
    let run = |disturb: bool| {
        let mut child = std::process::Command::new("python3")
            .args(["-c", program])
            .stdout(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        let pid = child.id().cast_signed();
        let mut out = child.stdout.take().unwrap();
        out.read_exact(&mut [0; 6]).unwrap();
        let (sender, receiver) = std::sync::mpsc::channel();
        let reader = thread::spawn(move || {
            let mut text = String::new();
            out.read_to_string(&mut text).unwrap();
            sender.send(()).unwrap();
            text
        });
        let mut lent = 0;
        while receiver.recv_timeout(Duration::from_millis(1)).is_err() {
            if disturb && userfaultfd::open_in(pid).is_ok() {
                lent += 1;
            }
        }
        assert!(child.wait().unwrap().success());
        (reader.join().unwrap(), lent)
    };
    let (alone, _) = run(false);
    let (disturbed, lent) = run(true);
    assert!(alone.ends_with("True\n"), "{alone}");
    assert_eq!(alone, disturbed, "after {lent} times");
    println!("disturbed {lent} times");
}

proptest! {
    #[test]
    fn pages_are_split_by_blocks_and_found_again(runs in proptest::collection::vec((1_u64..40, 1_u64..40), 0..20)) {
        let mut at = 16 * 4096;
        let mut ranges = Vec::new();
        for (gap, pages) in runs {
            at += gap * 4096;
            ranges.push(at..at + pages * 4096);
            at += pages * 4096;
        }
        let blocks = split(&ranges);
        prop_assert!(blocks.is_sorted_by(|a, b| a.number < b.number));
        let mut joined: Vec<Range<u64>> = Vec::new();
        for range in blocks.iter().flat_map(|block| block.ranges()) {
            match joined.last_mut() {
                Some(last) if last.end == range.start => last.end = range.end,
                _ => joined.push(range),
            }
        }
        prop_assert_eq!(&joined, &ranges);
        // A stretch of a dump's plan gets a part only where all of its pages are the block's.
        for block in &blocks {
            let cell = Cell { pages: block.pages, part: Part::Chunk(1) };
            let all = Precopied([(7, [(block.number, cell)].into())].into());
            prop_assert_eq!(all.part(7, block.ranges()), Some(Part::Chunk(1)));
            prop_assert_eq!(all.part(8, block.ranges()), None);
            if block.pages.count_ones() > 1 {
                prop_assert_eq!(all.part(7, block.ranges().map(|range| range.start + 4096..range.end)), None);
            }
        }
    }
}
