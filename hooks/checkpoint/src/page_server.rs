//! The window in which a container's tasks are stopped and their memory is ours to read.
//!
//! A lazy dump (`--lazy-pages`) writes every image but the lazy pages, says that it is ready, and then
//! serves pages on a socket until it is told to close; all that time the tasks stay stopped. We never ask
//! it for a page: [`pages`](crate::pages) reads them from the tasks, in parallel.
//!
//! The socket is one end of a pair that the dumping process inherits (`ps-socket` in CRIU's configuration
//! file), not a TCP port: any process of the node could have read the container's memory from a port.
//! When our end is gone, for whatever reason, CRIU ends the window and lets the tasks go.

use std::{
    io::{self, Read, Write},
    os::{fd::OwnedFd, unix::net::UnixStream},
    time::Duration,
};

/// The descriptor number that [`PageServerLink::config_line`] names. It must be this number in runc, and
/// not close-on-exec there, so that CRIU inherits it. High, because Go numbers the descriptors that its
/// children get from 3 up and overwrites what is there.
pub const CHILD_FD: i32 = 200;

/// `PS_IOV_CLOSE` of `criu/page-xfer.c`: the end of a session.
const CLOSE: u32 = 0x1023;
/// Bytes of a request: command and padding (u32), pages, address, process (u64).
const REQUEST: usize = 32;

/// Why a window could not be ended as agreed. The tasks run on all the same.
#[derive(Debug, thiserror::Error)]
pub enum PageServerError {
    /// No pair of sockets.
    #[error("cannot make the pair of sockets for CRIU's page server")]
    Pair(#[source] io::Error),
    /// CRIU is gone or does not answer.
    #[error("CRIU did not answer when it was told to end the dump: its dump.log says why")]
    Close(#[source] io::Error),
    /// CRIU answered that something failed.
    #[error("CRIU ended the dump with status {0}: its dump.log says why")]
    Status(i32),
}

/// Our end of a lazy dump's page server.
#[derive(Debug)]
pub struct PageServerLink {
    ours: UnixStream,
    theirs: Option<UnixStream>,
}

/// The means to end a window whose [`PageServerLink`] somebody else has.
#[derive(Debug)]
pub struct Abort(UnixStream);

impl Abort {
    /// Ends it: CRIU fails and lets the tasks run.
    pub fn end(self) {
        // Fails when CRIU is gone, and so is the window.
        let _ = self.0.shutdown(std::net::Shutdown::Both);
    }
}

impl PageServerLink {
    /// A new pair; both ends are close-on-exec until the child's is moved to [`CHILD_FD`] after the fork.
    ///
    /// # Errors
    /// When the kernel has no descriptors left.
    pub fn new() -> Result<Self, PageServerError> {
        let (ours, theirs) = UnixStream::pair().map_err(PageServerError::Pair)?;
        Ok(Self {
            ours,
            theirs: Some(theirs),
        })
    }

    /// The line of CRIU's configuration file that makes it use [`CHILD_FD`].
    pub fn config_line() -> String {
        format!("ps-socket {CHILD_FD}")
    }

    /// The end that the child gets as [`CHILD_FD`]. To be closed here when the child is started: while we hold
    /// it too, we would not see the child die.
    pub fn take_child_end(&mut self) -> Option<OwnedFd> {
        self.theirs.take().map(OwnedFd::from)
    }

    /// Ends the window from elsewhere, as a failure, while whoever has the link may be stuck.
    ///
    /// # Errors
    /// When the kernel has no descriptors left.
    pub fn abort(&self) -> Result<Abort, PageServerError> {
        let ours = self.ours.try_clone().map_err(PageServerError::Pair)?;
        Ok(Abort(ours))
    }

    /// Ends the window: CRIU finishes its dump and lets the tasks run. Not calling it (dropping) ends the
    /// window too; it is not this call that seals an image.
    ///
    /// # Errors
    /// When CRIU is gone or says that it failed. `deadline` bounds the wait for its answer.
    pub fn close(mut self, deadline: Duration) -> Result<(), PageServerError> {
        self.theirs = None;
        let mut request = [0; REQUEST];
        request[..4].copy_from_slice(&CLOSE.to_ne_bytes());
        let mut answer = [0; 4];
        self.ours
            .set_read_timeout(Some(deadline))
            .and_then(|()| self.ours.set_write_timeout(Some(deadline)))
            .and_then(|()| self.ours.write_all(&request))
            .and_then(|()| self.ours.read_exact(&mut answer))
            .map_err(PageServerError::Close)?;
        match i32::from_ne_bytes(answer) {
            0 => Ok(()),
            status => Err(PageServerError::Status(status)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn close_sends_one_request_and_waits_for_its_answer() {
        let mut link = PageServerLink::new().unwrap();
        let mut criu = UnixStream::from(link.take_child_end().unwrap());
        let peer = std::thread::spawn(move || {
            let mut request = [0; REQUEST];
            criu.read_exact(&mut request).unwrap();
            criu.write_all(&0_i32.to_ne_bytes()).unwrap();
            request
        });
        link.close(Duration::from_secs(5)).unwrap();
        let request = peer.join().unwrap();
        assert_eq!(request[..4], CLOSE.to_ne_bytes());
        assert!(request[4..].iter().all(|b| *b == 0));
    }

    #[test]
    fn a_window_is_ended_while_the_link_is_elsewhere() {
        let mut link = PageServerLink::new().unwrap();
        let mut criu = UnixStream::from(link.take_child_end().unwrap());
        link.abort().unwrap().end();
        assert_eq!(criu.read(&mut [0]).unwrap(), 0);
        assert!(link.close(Duration::from_secs(5)).is_err());
    }

    #[test]
    fn a_criu_that_is_gone_or_silent_is_an_error() {
        let mut link = PageServerLink::new().unwrap();
        drop(link.take_child_end());
        assert!(link.close(Duration::from_secs(5)).is_err());
        let mut silent = PageServerLink::new().unwrap();
        let _held = silent.take_child_end();
        assert!(silent.close(Duration::from_millis(20)).is_err());
    }
}
