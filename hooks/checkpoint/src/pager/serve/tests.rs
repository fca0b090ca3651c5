//! On real userfaultfds: parts of this process's own memory stand for restored processes.
#![allow(
    unsafe_code,
    reason = "memory that is mapped, moved and given up on purpose"
)]

use std::{
    ffi::c_void,
    fs,
    os::fd::{FromRawFd, RawFd},
    sync::{MutexGuard, mpsc},
    thread::JoinHandle,
};

use linux_raw_sys::general::{
    _UFFDIO_API, _UFFDIO_REGISTER, UFFD_API, UFFD_FEATURE_EVENT_FORK, UFFD_FEATURE_EVENT_REMAP,
    UFFD_FEATURE_EVENT_REMOVE, UFFD_FEATURE_EVENT_UNMAP, UFFD_USER_MODE_ONLY, UFFDIO, uffdio_api,
    uffdio_range, uffdio_register,
};

use nix::{
    libc,
    sys::wait::{WaitStatus, waitpid},
    unistd::Pid,
};
use rustix::mm::{self, Advice, MapFlags, MprotectFlags, MremapFlags, ProtFlags};

use super::*;
use crate::{
    chunks::{Answer, from_a_store, tests::chunks},
    criu_image::{
        PE_LAZY, PE_PRESENT,
        tests::{advised, pagemap},
    },
    touches::MAX_TOUCHES,
};

const PAGE: usize = 4096;
const MISSING: u64 = 1;

mod ioctl {
    use super::*;
    nix::ioctl_readwrite!(api, UFFDIO, _UFFDIO_API, uffdio_api);
    nix::ioctl_readwrite!(register, UFFDIO, _UFFDIO_REGISTER, uffdio_register);
}

fn map(at: Option<usize>, pages: usize) -> usize {
    let fixed = at.map_or(MapFlags::empty(), |_| MapFlags::FIXED);
    let both = ProtFlags::READ | ProtFlags::WRITE;
    let flags = MapFlags::PRIVATE | MapFlags::NORESERVE | fixed;
    // SAFETY: fresh memory, or in the place of memory that only this test uses, by address.
    let mapped =
        unsafe { mm::mmap_anonymous(pointer(at.unwrap_or_default()), pages * PAGE, both, flags) };
    mapped.unwrap().expose_provenance()
}

fn pointer(vaddr: usize) -> *mut c_void {
    std::ptr::with_exposed_provenance_mut(vaddr)
}

/// A userfaultfd of this process, which tells of forks where this test has the privilege.
fn userfaultfd() -> OwnedFd {
    let events = UFFD_FEATURE_EVENT_REMAP | UFFD_FEATURE_EVENT_REMOVE | UFFD_FEATURE_EVENT_UNMAP;
    for (flags, features) in [
        (0, events | UFFD_FEATURE_EVENT_FORK),
        (UFFD_USER_MODE_ONLY as i32, events),
    ] {
        // SAFETY: makes a descriptor.
        let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC | flags) };
        if fd < 0 {
            continue;
        }
        // SAFETY: it is this function's.
        let fd = unsafe { OwnedFd::from_raw_fd(fd as RawFd) };
        let mut api = uffdio_api {
            api: u64::from(UFFD_API),
            features: u64::from(features),
            ioctls: 0,
        };
        // SAFETY: the kernel reads and writes `api`.
        if unsafe { ioctl::api(std::os::fd::AsRawFd::as_raw_fd(&fd), &raw mut api) }.is_ok() {
            return fd;
        }
    }
    panic!("this kernel gives no userfaultfd");
}

/// What an image folder has of this page: every word of it.
fn word(page: usize) -> u64 {
    0x1000_0000 + page as u64
}

/// A "process": fresh memory whose pages are all missing, and a folder with its image. Pages whose number
/// ends in 7 are not in the image.
struct Process {
    base: usize,
    pages: usize,
    userfaultfd: Option<OwnedFd>,
    /// What the process must find in each page.
    model: Vec<u64>,
}

impl Process {
    fn new(dir: &Path, pid: i32, pages: usize) -> Self {
        let base = map(None, pages);
        let in_image = |page: &usize| page % 10 != 7;
        let runs: Vec<(u64, u64, u32)> = (0..pages)
            .filter(in_image)
            .collect::<Vec<_>>()
            .chunk_by(|a, b| a + 1 == *b)
            .map(|run| {
                (
                    (base + run[0] * PAGE) as u64,
                    run.len() as u64,
                    PE_LAZY | PE_PRESENT,
                )
            })
            .collect();
        let number = pid.cast_unsigned();
        fs::write(
            dir.join(format!("pagemap-{pid}.img")),
            pagemap(number, &runs),
        )
        .unwrap();
        let all = (base as u64, (base + pages * PAGE) as u64, 0);
        fs::write(dir.join(format!("mm-{pid}.img")), advised(&[all])).unwrap();
        let bytes: Vec<u8> = (0..pages)
            .filter(in_image)
            .flat_map(|page| word(page).to_ne_bytes().repeat(PAGE / 8))
            .collect();
        fs::write(dir.join(format!("pages-{pid}.img")), bytes).unwrap();
        let userfaultfd = userfaultfd();
        let mut register = uffdio_register {
            range: uffdio_range {
                start: base as u64,
                len: (pages * PAGE) as u64,
            },
            mode: MISSING,
            ioctls: 0,
        };
        // SAFETY: the memory is this test's, and only looked at by address.
        unsafe {
            ioctl::register(
                std::os::fd::AsRawFd::as_raw_fd(&userfaultfd),
                &raw mut register,
            )
        }
        .unwrap();
        let model = (0..pages).map(|page| if in_image(&page) { word(page) } else { 0 });
        Self {
            base,
            pages,
            userfaultfd: Some(userfaultfd),
            model: model.collect(),
        }
    }

    /// Gives the only descriptor away: when the pager closes it, what never was in the image is zeros.
    fn give(&mut self, relay: &mut UnixStream, pid: i32) {
        let fd = self.userfaultfd.take().unwrap();
        protocol::send(relay, &Word::Process(pid, fd)).unwrap();
    }

    fn vaddr(&self, page: usize) -> usize {
        self.base + page * PAGE
    }

    /// Its block as a note has it.
    fn touch(&self, page: usize) -> Touch {
        Touch::at(1, self.vaddr(page) as u64)
    }

    fn words(&self, page: usize) -> *mut u64 {
        std::ptr::with_exposed_provenance_mut(self.vaddr(page))
    }

    /// The first page that is not what it should be. Allocates nothing: a forked child runs it.
    fn wrong(&self) -> Option<usize> {
        (0..self.pages).find(|page| !self.is_right(*page))
    }

    fn is_right(&self, page: usize) -> bool {
        // SAFETY: a mapped page of this test's memory.
        (0..PAGE / 8)
            .all(|i| unsafe { self.words(page).add(i).read_volatile() } == self.model[page])
    }

    fn write(&mut self, page: usize, value: u64) {
        for i in 0..PAGE / 8 {
            // SAFETY: a mapped, writable page of this test's memory.
            unsafe { self.words(page).add(i).write_volatile(value) };
        }
        self.model[page] = value;
    }

    /// Makes the pages from this one on such that a forked child finds zeros.
    fn wipe_on_fork(&self, dir: &Path, pid: i32, page: usize) {
        const WIPE_ON_FORK: i32 = 18;
        let count = self.pages - page;
        // SAFETY: this test's memory; its contents stay.
        let advised_so =
            unsafe { libc::madvise(pointer(self.vaddr(page)), count * PAGE, WIPE_ON_FORK) };
        assert_eq!(advised_so, 0);
        let (start, middle) = (self.base as u64, self.vaddr(page) as u64);
        let end = self.vaddr(self.pages) as u64;
        let image = advised(&[(start, middle, 0), (middle, end, 1 << WIPE_ON_FORK)]);
        fs::write(dir.join(format!("mm-{pid}.img")), image).unwrap();
    }

    fn give_up(&mut self, page: usize, count: usize) {
        // SAFETY: this test's memory, only looked at by address.
        unsafe {
            mm::madvise(
                pointer(self.vaddr(page)),
                count * PAGE,
                Advice::LinuxDontNeed,
            )
        }
        .unwrap();
        self.model[page..page + count].fill(0);
    }

    fn map_anew(&mut self, page: usize, count: usize) {
        map(Some(self.vaddr(page)), count);
        self.model[page..page + count].fill(0);
    }

    /// Two boundaries in the middle, which no event tells.
    fn protect(&self, page: usize, count: usize) {
        for protection in [
            MprotectFlags::empty(),
            MprotectFlags::READ | MprotectFlags::WRITE,
        ] {
            // SAFETY: this test's memory, which nobody reads meanwhile.
            unsafe { mm::mprotect(pointer(self.vaddr(page)), count * PAGE, protection) }.unwrap();
        }
    }

    fn move_to(&mut self, from: usize, to: usize, count: usize) {
        // A move takes one mapping, and earlier moves have left boundaries: page by page. And each leaves a
        // hole, which must not be large enough for what another thread of this test maps meanwhile.
        for i in 0..count {
            let flags = MremapFlags::MAYMOVE;
            let (old, new) = (pointer(self.vaddr(from + i)), pointer(self.vaddr(to + i)));
            // SAFETY: both are this test's memory.
            unsafe { mm::mremap_fixed(old, PAGE, PAGE, flags, new) }.unwrap();
            self.model[to + i] = self.model[from + i];
            self.map_anew(from + i, 1);
        }
    }
}

impl Process {
    /// What a forked child's end says after it has looked at all of its memory: 0 when it is right.
    fn forked(&self) -> i32 {
        self.forked_with(|child| child.wrong().is_none())
    }

    /// The same, by another measure; it must not allocate.
    fn forked_with(&self, right: impl Fn(&Self) -> bool) -> i32 {
        // The call itself: the C library's holds its allocator's locks until the pager has heard of the
        // fork, and here the pager is in the same process and allocates. And with a copy of its
        // descriptors the child would keep the kernel waiting for a pager that has ended.
        // SAFETY: the child reads memory and ends; it allocates nothing and takes no lock.
        let child = unsafe {
            libc::syscall(
                libc::SYS_clone,
                libc::SIGCHLD | libc::CLONE_FILES,
                0,
                0,
                0,
                0,
            )
        };
        if child == 0 {
            let wrong = i32::from(!right(self));
            // SAFETY: ends the child at once.
            unsafe { libc::_exit(wrong) }
        }
        match waitpid(Pid::from_raw(child as i32), None).unwrap() {
            WaitStatus::Exited(_, code) => code,
            WaitStatus::Signaled(_, signal, _) => 128 + signal as i32,
            other => panic!("{other:?}"),
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // SAFETY: nobody looks at it any more.
        let _ = unsafe { mm::munmap(pointer(self.base), self.pages * PAGE) };
    }
}

/// One test at a time: a fork copies the memory of all of them, and their descriptors.
static TURN: Mutex<()> = Mutex::new(());

fn turn() -> MutexGuard<'static, ()> {
    TURN.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A pager on a thread of its own.
struct Serving {
    relay: UnixStream,
    thread: JoinHandle<Result<Served, ServeError>>,
}

impl Serving {
    fn new(dir: &Path) -> Self {
        Self::after(dir, Vec::new())
    }

    /// One that has what an earlier restore has noted.
    fn after(dir: &Path, noted: Vec<Touch>) -> Self {
        Self::of(dir, noted, chunks)
    }

    /// One whose pages come from a store.
    fn afar(
        dir: &Path,
        noted: Vec<Touch>,
        rule: impl Fn(usize) -> Answer + Send + Sync + 'static,
    ) -> Self {
        Self::of(dir, noted, |dir, streams| from_a_store(dir, streams, rule))
    }

    fn of(
        dir: &Path,
        noted: Vec<Touch>,
        chunks: impl FnOnce(&Path, &[(&str, &[u8])]) -> Arc<Chunks>,
    ) -> Self {
        let (relay, theirs) = UnixStream::pair().unwrap();
        let dir = dir.to_owned();
        let pages = fs::read_dir(&dir).unwrap().filter_map(|entry| {
            let path = entry.unwrap().path();
            let name = path.file_name()?.to_str()?;
            let bytes = fs::read(&path).unwrap();
            name.starts_with("pages-")
                .then(|| (format!("criu/{name}"), bytes))
        });
        let pages: Vec<_> = pages.collect();
        let streams: Vec<_> = pages
            .iter()
            .map(|(name, bytes)| (name.as_str(), bytes.as_slice()))
            .collect();
        let chunks = chunks(&dir, &streams);
        // Who holds duplicates lets them go when the pager ends; this one does not hold them at all.
        let mut children = relay.try_clone().unwrap();
        thread::spawn(move || while let Ok(Some(_)) = protocol::receive(&mut children) {});
        let thread = thread::spawn(move || serve(theirs, &dir, &chunks, noted));
        Self { relay, thread }
    }

    fn finish(&mut self) {
        protocol::send(&mut self.relay, &Word::Finished).unwrap();
    }

    fn end(self) -> Result<Served, ServeError> {
        self.thread.join().unwrap()
    }
}

/// Numbers from a seed (xorshift).
struct Dice(u64);

impl Dice {
    fn below(&mut self, most: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 % most as u64) as usize
    }
}

/// The promise: whatever a process does to its memory while it comes in, and whatever is brought in ahead, it finds what
/// it would have found if all had been there from the start.
#[test]
fn a_process_finds_what_it_would_have_found() {
    let _turn = turn();
    const PAGES: usize = 4000;
    for seed in 1..=16 {
        let dir = tempfile::tempdir().unwrap();
        let mut process = Process::new(dir.path(), 1, PAGES);
        let mut dice = Dice(0x9e37_79b9_7f4a_7c15_u64.wrapping_mul(seed));
        // Also of memory that is not the process's, and of processes that there are not.
        let noted = (0..dice.below(400)).map(|_| {
            let (pid, page) = (dice.below(3) as i32, dice.below(2 * PAGES));
            Touch::at(pid, process.vaddr(page) as u64)
        });
        let noted = noted.collect();
        let mut serving = match seed % 2 {
            0 => Serving::after(dir.path(), noted),
            // Now and then a byte flips on the way.
            _ => Serving::afar(dir.path(), noted, |nth| match nth % 7 {
                3 => Answer::Flip,
                _ => Answer::Truth,
            }),
        };
        process.give(&mut serving.relay, 1);
        serving.finish();
        for _ in 0..150 {
            let count = 1 + dice.below(40);
            let page = dice.below(PAGES - count);
            match dice.below(16) {
                0..5 => assert!(process.is_right(page), "seed {seed}: page {page}"),
                5..8 => process.write(page, seed + page as u64),
                8..10 => process.give_up(page, count),
                10..12 => process.protect(page, count),
                12 => process.map_anew(page, count),
                13 => assert_eq!(process.forked(), 0, "seed {seed}"),
                _ => {
                    let to = dice.below(PAGES - count);
                    if page.abs_diff(to) >= count {
                        process.move_to(page, to, count);
                    }
                }
            }
        }
        assert_eq!(process.wrong(), None, "seed {seed}");
        serving.end().unwrap();
        // And what was not looked at before the last descriptor was closed is no zero either.
        assert_eq!(process.wrong(), None, "seed {seed}");
    }
}

/// What a store does that a process must not find in its memory.
#[test]
fn a_store_that_fails_or_lies_ends_it_and_nobody_reads_anything_else() {
    let _turn = turn();
    for (answer, words) in [
        (Answer::Flip, "gives something else"),
        (Answer::Other, "gives something else"),
        (Answer::Short, "does not come"),
        (Answer::Refuse, "does not come"),
    ] {
        let dir = tempfile::tempdir().unwrap();
        let mut process = Process::new(dir.path(), 1, 4000);
        let held = process.userfaultfd.as_ref().unwrap().try_clone().unwrap();
        let mut serving = Serving::afar(dir.path(), Vec::new(), move |_| answer);
        process.give(&mut serving.relay, 1);
        serving.finish();
        let said = serving.end().unwrap_err().to_string();
        assert!(said.contains(words), "{answer:?}: {said}");
        // Whoever holds a duplicate keeps the page missing.
        let first = process.vaddr(0) as u64;
        let missing = Userfaultfd::new(held).unwrap();
        assert!(
            missing.zero(first, PAGE as u64).is_none(),
            "{answer:?}: it is there"
        );
    }
}

/// By which libraries of cryptography notice a fork: a child that found its parent's numbers would repeat them.
#[test]
fn a_child_finds_zeros_in_what_is_wiped_on_fork() {
    let _turn = turn();
    let dir = tempfile::tempdir().unwrap();
    let mut process = Process::new(dir.path(), 1, 100);
    process.wipe_on_fork(dir.path(), 1, 50);
    let mut serving = Serving::new(dir.path());
    process.give(&mut serving.relay, 1);
    // Nothing is in but what is asked for.
    let zeros = |child: &Process, page: usize| {
        // SAFETY: a mapped page of this test's memory.
        (0..PAGE / 8).all(|i| unsafe { child.words(page).add(i).read_volatile() } == 0)
    };
    let right = |child: &Process| {
        (0..50).all(|page| child.is_right(page)) && (50..100).all(|page| zeros(child, page))
    };
    assert_eq!(process.forked_with(right), 0);
    serving.finish();
    serving.end().unwrap();
    assert_eq!(process.wrong(), None);
}

/// A regression: a page was lost when the kernel took what was being moved for unmapped, and when it told late
/// that a range was unmapped to which another thread had moved something since.
#[test]
fn two_threads_move_at_once() {
    let _turn = turn();
    const HALF: usize = 3000;
    for seed in 1..=8 {
        let dir = tempfile::tempdir().unwrap();
        let mut process = Process::new(dir.path(), 1, 2 * HALF);
        let mut serving = Serving::new(dir.path());
        process.give(&mut serving.relay, 1);
        serving.finish();
        // Never unmapped: what has got into its holes is others'.
        let process = std::mem::ManuallyDrop::new(process);
        let process = &process;
        let grow_all = |half: usize| {
            let mut dice = Dice(0x9e37_79b9_7f4a_7c15_u64.wrapping_mul(seed + half as u64));
            let mut page = half * HALF;
            while page + 8 < (half + 1) * HALF {
                let count = 1 + dice.below(8);
                let grown = count + 1 + dice.below(4);
                let old = pointer(process.vaddr(page));
                // SAFETY: this thread's part of the test's memory.
                let new =
                    unsafe { mm::mremap(old, count * PAGE, grown * PAGE, MremapFlags::MAYMOVE) };
                let words = new.unwrap().cast::<u64>();
                for i in 0..grown {
                    let expected = if i < count {
                        process.model[page + i]
                    } else {
                        0
                    };
                    // SAFETY: mapped by the call above.
                    let found = unsafe { words.add(i * PAGE / 8).read_volatile() };
                    assert_eq!(found, expected, "seed {seed}: page {page} + {i}");
                }
                page += count;
            }
        };
        thread::scope(|scope| {
            scope.spawn(|| grow_all(0));
            scope.spawn(|| grow_all(1));
        });
        serving.end().unwrap();
    }
}

/// A regression: CRIU's own pager could spin for ever on a small process that was complete, while a large
/// one beside it still came in.
#[test]
fn a_small_process_is_answered_while_a_large_one_comes_in() {
    let _turn = turn();
    let dir = tempfile::tempdir().unwrap();
    let mut small = Process::new(dir.path(), 1, 8);
    let mut large = Process::new(dir.path(), 2, 40_000);
    let mut serving = Serving::new(dir.path());
    small.give(&mut serving.relay, 1);
    large.give(&mut serving.relay, 2);
    // A zombie between them has no memory.
    protocol::send(&mut serving.relay, &Word::Zombie(3)).unwrap();
    serving.finish();
    // Page 7 was never in the image: it has to be asked for, however complete the process is.
    assert!((0..7).all(|page| small.is_right(page)));
    let (told, answered) = mpsc::channel();
    thread::scope(|scope| {
        scope.spawn(|| told.send(small.is_right(7)).unwrap());
        assert!(large.is_right(39_999) && answered.recv().unwrap());
    });
    let served = serving.end().unwrap();
    assert_eq!(served.processes, 2);
    assert_eq!((small.wrong(), large.wrong()), (None, None));
}

#[test]
fn what_is_asked_for_is_noted_in_its_order() {
    let _turn = turn();
    let dir = tempfile::tempdir().unwrap();
    let mut process = Process::new(dir.path(), 1, 1000);
    let mut serving = Serving::new(dir.path());
    process.give(&mut serving.relay, 1);
    // Until it is finished nothing comes in by itself.
    let pages = [900, 20, 500, 901, 21, 100];
    for page in pages {
        assert!(process.is_right(page));
    }
    serving.finish();
    let served = serving.end().unwrap();
    let mut expected: Vec<Touch> = Vec::new();
    for touch in pages.map(|page| process.touch(page)) {
        // A page may be in its neighbour's block.
        if !expected.contains(&touch) {
            expected.push(touch);
        }
    }
    assert_eq!(served.touches, expected);
    assert_eq!((served.asked, served.ahead), (expected.len(), 0));
}

/// All blocks from behind: what came in by its address would not be missing any more when its turn comes.
#[test]
fn what_was_noted_comes_in_first_and_in_its_order() {
    let _turn = turn();
    let dir = tempfile::tempdir().unwrap();
    let mut process = Process::new(dir.path(), 1, 4000);
    let mut expected: Vec<Touch> = (0..4000).rev().map(|page| process.touch(page)).collect();
    expected.dedup();
    let mut noted = expected.clone();
    // Twice, and what there is not: another process, a forked one, other memory.
    let last = expected[0].vaddr();
    let none = [(1, last), (2, last), (0, last), (1, 0), (1, u64::MAX)];
    let none = none.map(|(pid, vaddr)| Touch::at(pid, vaddr));
    noted.splice(10..10, none);
    let mut serving = Serving::after(dir.path(), noted);
    process.give(&mut serving.relay, 1);
    serving.finish();
    let served = serving.end().unwrap();
    let found = (served.asked, served.ahead, &served.touches);
    assert_eq!(found, (0, expected.len(), &expected));
    assert_eq!(process.wrong(), None);
}

#[test]
fn what_was_not_noted_takes_its_place_when_it_is_asked_for() {
    let _turn = turn();
    let dir = tempfile::tempdir().unwrap();
    let mut process = Process::new(dir.path(), 1, 1000);
    let [a, b, c, d] = [500, 20, 900, 100].map(|page| process.touch(page));
    let mut serving = Serving::after(dir.path(), vec![c, a, d]);
    process.give(&mut serving.relay, 1);
    assert!(process.is_right(500) && process.is_right(20));
    serving.finish();
    let served = serving.end().unwrap();
    assert_eq!((served.touches, served.ahead), (vec![a, b, c, d], 2));
    assert_eq!(process.wrong(), None);
}

#[test]
fn what_a_forked_process_asks_for_is_not_noted_and_the_note_has_an_end() {
    let of = |pid, block: usize| Touch::at(pid, block as u64 * FAULT_BLOCK);
    let ahead = Ahead::new(Vec::new());
    ahead.asked(of(0, 1));
    for block in 0..MAX_TOUCHES + 9 {
        ahead.asked(of(1, block));
    }
    let wanted = ahead.into_wanted();
    assert_eq!(wanted.touches.len(), MAX_TOUCHES);
    assert_eq!(wanted.touches[0], of(1, 0));
    assert_eq!(wanted.asked, MAX_TOUCHES + 10);
}

#[test]
fn before_the_restore_is_finished_only_faults_are_answered() {
    let _turn = turn();
    let dir = tempfile::tempdir().unwrap();
    let mut process = Process::new(dir.path(), 1, 1000);
    let mut serving = Serving::new(dir.path());
    process.give(&mut serving.relay, 1);
    assert!(process.is_right(500));
    // Nobody says that it is finished, and nobody will.
    serving.relay.shutdown(std::net::Shutdown::Both).unwrap();
    let ended = serving.thread.join().unwrap();
    assert!(matches!(ended, Err(ServeError::Abandoned)), "{ended:?}");
}

#[test]
fn who_is_left_alone_after_the_restore_gets_its_memory_all_the_same() {
    let _turn = turn();
    let dir = tempfile::tempdir().unwrap();
    let mut process = Process::new(dir.path(), 1, 20_000);
    let mut serving = Serving::new(dir.path());
    process.give(&mut serving.relay, 1);
    serving.finish();
    serving.relay.shutdown(std::net::Shutdown::Both).unwrap();
    assert_eq!(process.wrong(), None);
    serving.thread.join().unwrap().unwrap();
}

#[test]
fn a_page_that_cannot_be_had_ends_it() {
    let _turn = turn();
    let dir = tempfile::tempdir().unwrap();
    let mut process = Process::new(dir.path(), 1, 1000);
    let pages = dir.path().join("pages-1.img");
    let file = fs::File::options().write(true).open(&pages).unwrap();
    file.set_len(500 * PAGE as u64).unwrap();
    let mut serving = Serving::new(dir.path());
    process.give(&mut serving.relay, 1);
    serving.finish();
    let ended = serving.end();
    assert!(
        matches!(&ended, Err(ServeError::Chunk(ChunkError::Io { path, .. })) if path.ends_with("pages-1.img")),
        "{ended:?}"
    );
}

#[test]
fn a_process_without_an_image_ends_it() {
    let _turn = turn();
    let dir = tempfile::tempdir().unwrap();
    let mut process = Process::new(dir.path(), 1, 10);
    let mut serving = Serving::new(dir.path());
    process.give(&mut serving.relay, 2);
    let ended = serving.end();
    assert!(
        matches!(ended, Err(ServeError::Image(CriuImageError::Read { .. }))),
        "{ended:?}"
    );
}
