//! What the tests of the program share.

use std::{
    fs,
    time::{Duration, Instant},
};

/// Waits for the end of a shim that was asked to end.
pub(crate) fn ends(pid: u32) {
    let since = Instant::now();
    // A zombie has no program: whoever adopts it here may not reap it.
    while fs::read_link(format!("/proc/{pid}/exe")).is_ok() {
        assert!(
            since.elapsed() < Duration::from_secs(40),
            "the shim did not end"
        );
        std::thread::sleep(Duration::from_millis(10));
    }
}
