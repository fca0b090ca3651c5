//! The shim's log: lines into the FIFO `log` of the bundle, which containerd copies into its own.

use std::{
    fs::File,
    io::{self, Write},
    os::unix::fs::OpenOptionsExt,
    sync::Mutex,
};

use tracing::level_filters::LevelFilter;
use tracing_subscriber::fmt::writer::BoxMakeWriter;

/// Sends the log to containerd, or nowhere when there is no FIFO (the shim was started by hand).
pub(crate) fn start(debug: bool) {
    // Read and write: opening never waits for containerd, and its restart does not end the log.
    let fifo = File::options()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK)
        .open("log");
    let writer = match fifo {
        Ok(fifo) => BoxMakeWriter::new(Mutex::new(Lossy(fifo))),
        Err(_) => BoxMakeWriter::new(io::sink),
    };
    let level = if debug {
        LevelFilter::DEBUG
    } else {
        LevelFilter::INFO
    };
    // Fails only when a subscriber is set already.
    let _ = tracing_subscriber::fmt()
        .with_max_level(level)
        .with_ansi(false)
        .with_writer(writer)
        .try_init();
}

/// Drops lines while nobody reads: a log must never hold up a container.
struct Lossy(File);

impl Write for Lossy {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        match self.0.write(line) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(line.len()),
            other => other,
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
