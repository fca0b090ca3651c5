//! Between CRIU's restore and the pager: each descriptor is duplicated on its way.

use std::{
    io,
    os::{
        fd::AsFd,
        unix::net::{UnixListener, UnixStream},
    },
    sync::atomic::Ordering,
};

use super::{
    PagerError, Phase, Shared,
    protocol::{Word, receive, send},
    relay_failed as failed,
};

/// Relays one restore, and then takes what the pager sends: the descriptors of processes that were forked, which are
/// kept, and that all memory is in.
/// Returns when the pager's end is closed, when CRIU has failed, or when cancelled.
pub(super) fn run(
    listener: &UnixListener,
    pager: UnixStream,
    shared: &Shared,
) -> Result<(), PagerError> {
    let relayed = relay(listener, pager, shared);
    if relayed.is_err() {
        // Nobody listens any more, and neither side may wait for it.
        shared.hang_up();
    }
    relayed
}

fn relay(
    listener: &UnixListener,
    mut pager: UnixStream,
    shared: &Shared,
) -> Result<(), PagerError> {
    let mut criu = match listener.accept() {
        Ok((criu, _)) => criu,
        Err(_) if shared.cancelled.load(Ordering::Acquire) => return Ok(()),
        Err(e) => return Err(failed("waiting for CRIU's restore")(e)),
    };
    let watch = |stream| shared.watch(stream).map_err(failed("keeping a connection"));
    if !(watch(&criu)? && watch(&pager)?) {
        return Ok(());
    }
    shared.enter(Phase::Restoring);
    loop {
        let word = receive(&mut criu).map_err(failed("reading from CRIU's restore"))?;
        // At the end CRIU's restore has failed, and has killed what it had restored.
        let Some(word) = word else { return Ok(()) };
        if let Word::Process(_, fd) = &word {
            // Held before the pager has it: from then on its death is ours to survive.
            let copy = fd.as_fd().try_clone_to_owned();
            let copy = copy.map_err(failed("duplicating a userfaultfd"))?;
            shared.held.add(copy);
        }
        send(&mut pager, &word).map_err(failed("writing to the pager"))?;
        if matches!(word, Word::Finished) {
            shared.enter(Phase::Loading);
            break;
        }
    }
    drop(criu);
    loop {
        match receive(&mut pager) {
            Ok(Some(Word::Child(fd))) => shared.held.add(fd),
            Ok(Some(Word::Loaded)) => {
                shared.enter(Phase::Loaded);
                // Who touches memory that never was in the image waits for this: nobody answers any more.
                shared.held.close();
            }
            Ok(Some(_)) => {}
            // Killed with words of ours unread.
            Err(e) if e.kind() == io::ErrorKind::ConnectionReset => return Ok(()),
            Ok(None) => return Ok(()),
            Err(e) => return Err(failed("reading from the pager")(e)),
        }
    }
}
