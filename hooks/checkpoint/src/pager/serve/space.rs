//! The memory of one restored process, until all of it is in.

use std::{
    collections::VecDeque,
    io,
    path::Path,
    sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock},
};

use super::{
    ServeError,
    ahead::Ahead,
    missing::{Missing, Piece},
    userfaultfd::{Event, Refusal, Userfaultfd},
};
use crate::{
    chunks::{CHUNK, Chunks},
    criu_image::pages_file,
    manifest::criu_path,
    touches::Touch,
};

/// Around a page that a thread waits for, the aligned block of this size comes in with it: what a program
/// touches next mostly lies there, and each fault costs two switches of context, as much as 16 pages. It is a chunk
/// of the image, which is read and compared whole, whatever of it is wanted.
pub(in crate::pager) const FAULT_BLOCK: u64 = CHUNK as u64;

/// The memory of one restored process.
#[derive(Debug)]
pub(super) struct Space {
    /// Its number in the container; 0 for one that was forked after the restore.
    pid: i32,
    userfaultfd: Userfaultfd,
    pages: Arc<Pages>,
    /// What the kernel tells is read with this held alone, and pages are put with it shared. So a page
    /// never goes to where the process has meanwhile put something else: between the reading of "this
    /// range is gone" and the entry of that into `missing`, nobody copies.
    gate: RwLock<()>,
    missing: Mutex<Missing>,
    moved: Mutex<Moved>,
    /// Pages that threads wait for and that could not be put yet.
    waiting: Mutex<Vec<u64>>,
    /// Where to load next: behind what was loaded or asked for last.
    cursor: Mutex<u64>,
}

/// Where moves began whose end is not told yet. The kernel tells of a move, waits until that is read, and
/// then tells that the range where it began is unmapped. By then another thread may have moved something
/// there, which is not unmapped at all.
#[derive(Debug, Default)]
struct Moved(VecDeque<(u64, u64)>);

impl Moved {
    /// More are not remembered: after `MREMAP_DONTUNMAP` no end is told.
    const MOST: usize = 256;

    fn begins(&mut self, start: u64, end: u64) {
        if self.0.len() == Self::MOST {
            self.0.pop_front();
        }
        self.0.push_back((start, end));
    }

    /// Whether that this range is unmapped is the end of a move.
    fn ends(&mut self, start: u64, end: u64) -> bool {
        let of = self.0.iter().position(|moved| *moved == (start, end));
        of.and_then(|index| self.0.remove(index)).is_some()
    }
}

/// The name of the stream that a pages file is in the image.
pub(in crate::pager) fn pages_stream(pages_id: u32) -> String {
    criu_path(Path::new(&pages_file(pages_id)))
}

/// A pages file of the image, which is a stream of it.
#[derive(Debug)]
struct Pages {
    chunks: Arc<Chunks>,
    name: String,
}

impl Space {
    /// That of a process whose images are in `criu_dir`, but for its pages, which are in `chunks`.
    ///
    /// # Errors
    /// When its images cannot be read or are malformed.
    pub(super) fn open(
        criu_dir: &Path,
        chunks: &Arc<Chunks>,
        pid: i32,
        userfaultfd: Userfaultfd,
    ) -> Result<Self, ServeError> {
        let (missing, pages_id) = Missing::read(criu_dir, pid)?;
        let pages = Arc::new(Pages {
            chunks: Arc::clone(chunks),
            name: pages_stream(pages_id),
        });
        Ok(Self::new(pid, userfaultfd, pages, missing))
    }

    fn new(pid: i32, userfaultfd: Userfaultfd, pages: Arc<Pages>, missing: Missing) -> Self {
        Self {
            pid,
            userfaultfd,
            pages,
            gate: RwLock::default(),
            missing: Mutex::new(missing),
            moved: Mutex::default(),
            waiting: Mutex::default(),
            cursor: Mutex::new(0),
        }
    }

    pub(super) fn pid(&self) -> i32 {
        self.pid
    }

    pub(super) fn userfaultfd(&self) -> &Userfaultfd {
        &self.userfaultfd
    }

    /// Whether all is in, and no thread is about to put more.
    pub(super) fn is_complete(&self) -> bool {
        let _alone = self.gate.write().unwrap_or_else(PoisonError::into_inner);
        lock(&self.missing).is_empty() && lock(&self.waiting).is_empty()
    }

    /// What is missing of this block.
    pub(super) fn missing_of(&self, touch: Touch) -> Vec<Piece> {
        let block = touch.vaddr();
        let end = block.saturating_add(FAULT_BLOCK);
        lock(&self.missing).overlapping(block, end).collect()
    }

    /// Hears all that the kernel has to tell, and answers the faults, of which `ahead` is told. `forked` gets the spaces
    /// of children. Says whether threads still wait: call it again soon then.
    ///
    /// # Errors
    /// When a page cannot be had, or the kernel refuses it for no reason that is known.
    pub(super) fn serve(
        &self,
        buffer: &mut [u8],
        ahead: &Ahead,
        mut forked: impl FnMut(Self) -> Result<(), ServeError>,
    ) -> Result<bool, ServeError> {
        let _alone = self.gate.write().unwrap_or_else(PoisonError::into_inner);
        let page_size = rustix::param::page_size() as u64;
        let mut waiting = std::mem::take(&mut *lock(&self.waiting));
        loop {
            let event = self.userfaultfd.read();
            match event.map_err(|source| self.kernel("read from", source))? {
                Some(Event::Fault(address)) => waiting.push(address & !(page_size - 1)),
                Some(Event::Discarded { start, end }) => {
                    lock(&self.missing).remove(start, end);
                }
                Some(Event::Unmapped { start, end }) => {
                    if !lock(&self.moved).ends(start, end) {
                        lock(&self.missing).remove(start, end);
                    }
                }
                Some(Event::Moved { from, to, bytes }) => {
                    lock(&self.missing).shift(from, to, bytes);
                    lock(&self.moved).begins(from, from.saturating_add(bytes));
                }
                Some(Event::Fork(userfaultfd)) => {
                    let missing = lock(&self.missing).of_child();
                    let pages = Arc::clone(&self.pages);
                    forked(Self::new(0, userfaultfd, pages, missing))?;
                }
                None => break,
            }
        }
        // In the order in which they came, each once: two threads may wait for one page.
        let mut still = Vec::new();
        for vaddr in waiting {
            if !still.contains(&vaddr) && !self.answer(vaddr, page_size, buffer, ahead)? {
                still.push(vaddr);
            }
        }
        let any = !still.is_empty();
        *lock(&self.waiting) = still;
        Ok(any)
    }

    /// Answers a fault; says whether it could be answered now. The gate must be held alone.
    fn answer(
        &self,
        vaddr: u64,
        page_size: u64,
        buffer: &mut [u8],
        ahead: &Ahead,
    ) -> Result<bool, ServeError> {
        let block = vaddr & !(FAULT_BLOCK - 1);
        let piece = lock(&self.missing).take_around(vaddr, block, block + FAULT_BLOCK);
        let Some(piece) = piece else {
            // Never in the image, or given up since: zeros. Or in already, or unmapped, and then the thread
            // looks again.
            return match self.userfaultfd.zero(vaddr, page_size) {
                None | Some(Refusal::Exited) => Ok(true),
                Some(Refusal::Present | Refusal::NotMapped) => {
                    self.userfaultfd.wake(vaddr, page_size);
                    Ok(true)
                }
                Some(Refusal::Busy) => Ok(false),
                Some(Refusal::Failed(errno)) => Err(self.refused(vaddr, errno)),
            };
        };
        if !self.pages.ready(piece)? {
            lock(&self.missing).insert(piece);
            return Ok(false);
        }
        ahead.asked(Touch::at(self.pid, vaddr));
        *lock(&self.cursor) = piece.end();
        let bytes = &mut buffer[..piece.bytes as usize];
        self.pages.read(piece.at, bytes)?;
        let left = self.put(piece, bytes, page_size)?;
        Ok(left.is_none_or(|left| vaddr < left.vaddr))
    }

    /// Brings in the next part, at most as much as the buffer holds. Says none when nothing is left, and
    /// otherwise whether it could be done now.
    ///
    /// # Errors
    /// As for [`Self::serve`].
    pub(super) fn load(&self, buffer: &mut [u8]) -> Result<Option<bool>, ServeError> {
        let wanted = {
            let mut cursor = lock(&self.cursor);
            let next = lock(&self.missing).next(*cursor, buffer.len() as u64, FAULT_BLOCK);
            let Some(next) = next else { return Ok(None) };
            *cursor = next.end();
            next
        };
        self.bring(wanted, buffer).map(Some)
    }

    /// Brings in what is still missing of this piece, which the buffer must hold; says whether that could be done now.
    ///
    /// # Errors
    /// As for [`Self::serve`].
    pub(super) fn bring(&self, wanted: Piece, buffer: &mut [u8]) -> Result<bool, ServeError> {
        let page_size = rustix::param::page_size() as u64;
        // It stays missing while it is read, and nobody waits for the disk: a fault there is answered by
        // the other thread.
        let bytes = &mut buffer[..wanted.bytes as usize];
        self.pages.read(wanted.at, bytes)?;
        let _shared = self.gate.read().unwrap_or_else(PoisonError::into_inner);
        let parts = lock(&self.missing).remove(wanted.vaddr, wanted.end());
        let mut done = true;
        for part in parts {
            let begin = (part.vaddr - wanted.vaddr) as usize;
            // Not so when other memory was moved there meanwhile, or this thread is behind by now.
            let same = part.at == wanted.at + begin as u64;
            if done && same {
                let bytes = &bytes[begin..][..part.bytes as usize];
                done = self.put(part, bytes, page_size)?.is_none();
            } else {
                lock(&self.missing).insert(part);
            }
        }
        Ok(done)
    }

    /// Puts a piece that was taken. What could not be put for now is missing again, and is returned.
    fn put(&self, piece: Piece, bytes: &[u8], page_size: u64) -> Result<Option<Piece>, ServeError> {
        let page = page_size as usize;
        let mut rest = bytes;
        let mut most = bytes.len();
        let mut asked_again = false;
        while !rest.is_empty() {
            let put = (bytes.len() - rest.len()) as u64;
            let vaddr = piece.vaddr + put;
            let attempt = &rest[..most.min(rest.len())];
            let (mut done, refusal) = self.userfaultfd.copy(vaddr, attempt);
            match refusal {
                None => (most, asked_again) = (bytes.len(), false),
                Some(Refusal::Busy) => {
                    let left = Piece {
                        vaddr,
                        bytes: piece.bytes - put,
                        at: piece.at + put,
                        ..piece
                    };
                    lock(&self.missing).insert(left);
                    return Ok(Some(left));
                }
                Some(Refusal::Exited) => {
                    *lock(&self.missing) = Missing::default();
                    return Ok(None);
                }
                // The process has put a boundary into it since (`mprotect`): smaller parts, down to a page
                // that is in no mapping of ours, and so nobody can wait for it.
                Some(Refusal::NotMapped) if attempt.len() > page => {
                    most = (attempt.len() / 2).next_multiple_of(page);
                }
                // Since Linux 6.9 what is being moved looks unmapped to who was already waiting for the mapping,
                // and busy to who asks from then on.
                Some(Refusal::NotMapped) if !asked_again => asked_again = true,
                Some(Refusal::NotMapped | Refusal::Present) => {
                    self.userfaultfd.wake(vaddr, page_size);
                    done = page;
                    asked_again = false;
                }
                Some(Refusal::Failed(errno)) => return Err(self.refused(vaddr, errno)),
            }
            rest = &rest[done..];
        }
        Ok(None)
    }

    fn kernel(&self, doing: &'static str, source: io::Error) -> ServeError {
        ServeError::Kernel {
            doing,
            pid: self.pid,
            source,
        }
    }

    fn refused(&self, vaddr: u64, errno: nix::errno::Errno) -> ServeError {
        ServeError::Refused {
            vaddr,
            pid: self.pid,
            source: errno.into(),
        }
    }
}

impl Pages {
    /// Whether a piece can be read without waiting for a store; what cannot is on its way.
    fn ready(&self, piece: Piece) -> Result<bool, ServeError> {
        Ok(self.chunks.ready(&self.name, piece.at, piece.bytes)?)
    }

    fn read(&self, at: u64, into: &mut [u8]) -> Result<(), ServeError> {
        self.chunks.read_at(&self.name, at, into)?;
        Ok(())
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
