//! Some threads for bytes.

use std::{
    num::NonZero,
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    thread,
};

/// Threads that move or checksum bytes: half of the processors, at least two and at most eight. Two reach 2.3 GB/s from
/// one memory to another on two cores, which is more than fresh pages and most disks take; more than half would take
/// the node's other containers theirs.
pub(crate) fn threads() -> usize {
    let processors = thread::available_parallelism().map_or(1, NonZero::get);
    (processors / 2).clamp(2, 8)
}

/// Bytes of a thread's buffer; see `rekindle_store::crc`.
pub(crate) const BUFFER: usize = 1 << 20;

/// Works on the parts `0..count`, each thread with a buffer of its own, and gives the results in their
/// order. The calling thread is one of them.
///
/// # Errors
/// The first error; what has not begun by then is not done.
pub(crate) fn in_parallel<T: Send, E: Send>(
    count: usize,
    work: impl Fn(usize, &mut [u8]) -> Result<T, E> + Sync,
) -> Result<Vec<T>, E> {
    by(
        threads(),
        count,
        || vec![0; BUFFER],
        |index, buffer| work(index, buffer),
    )
}

/// The same by so many threads, which wait more than they work.
///
/// # Errors
/// As [`in_parallel`].
pub(crate) fn at_once<T: Send, E: Send>(
    threads: usize,
    count: usize,
    work: impl Fn(usize) -> Result<T, E> + Sync,
) -> Result<Vec<T>, E> {
    by(threads, count, || (), |index, ()| work(index))
}

/// `own` is what each thread has for itself.
fn by<O, T: Send, E: Send>(
    threads: usize,
    count: usize,
    own: impl Fn() -> O + Sync,
    work: impl Fn(usize, &mut O) -> Result<T, E> + Sync,
) -> Result<Vec<T>, E> {
    let next = AtomicUsize::new(0);
    let stop = AtomicBool::new(false);
    let results = Mutex::new(Vec::with_capacity(count));
    let failure = Mutex::new(None);
    let thread = || {
        let mut own = own();
        while !stop.load(Ordering::Relaxed) {
            let index = next.fetch_add(1, Ordering::Relaxed);
            if index >= count {
                return;
            }
            match work(index, &mut own) {
                Ok(result) => lock(&results).push((index, result)),
                Err(e) => {
                    stop.store(true, Ordering::Relaxed);
                    lock(&failure).get_or_insert(e);
                }
            }
        }
    };
    thread::scope(|scope| {
        for _ in 1..threads.min(count) {
            scope.spawn(thread);
        }
        thread();
    });
    if let Some(e) = lock(&failure).take() {
        return Err(e);
    }
    let mut results = results.into_inner().unwrap_or_else(PoisonError::into_inner);
    results.sort_unstable_by_key(|(index, _)| *index);
    Ok(results.into_iter().map(|(_, result)| result).collect())
}

/// A poisoned lock means that another thread panicked; `scope` passes that panic on.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_come_in_order_and_the_first_error_ends_it() {
        let squares = in_parallel(1000, |n, _| Ok::<_, ()>(n * n)).unwrap();
        assert!(
            squares
                .iter()
                .enumerate()
                .all(|(n, square)| n * n == *square)
        );
        assert_eq!(in_parallel(0, |n, _| Ok::<_, ()>(n)), Ok(Vec::new()));
        let begun = AtomicUsize::new(0);
        let failed = in_parallel(1_000_000, |n, _| {
            begun.fetch_add(1, Ordering::Relaxed);
            if n == 3 { Err(n) } else { Ok(()) }
        });
        assert_eq!(failed, Err(3));
        assert!(begun.into_inner() < 1_000_000);
    }
}
