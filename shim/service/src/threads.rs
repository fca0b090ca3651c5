//! Work that the runtime's one thread must not do itself.

use std::{fs::File, io, path::PathBuf};

use nix::{
    errno::Errno,
    sched::{CloneFlags, setns},
};

use crate::error::Error;

/// Runs `work` on a thread that ends with it, for what changes the thread itself.
pub(crate) async fn in_thread<T: Send + 'static>(
    name: &'static str,
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, Error> {
    let (sender, receiver) = tokio::sync::oneshot::channel();
    std::thread::Builder::new()
        .name(name.to_owned())
        .stack_size(256 << 10)
        .spawn(move || {
            let _ = sender.send(work());
        })
        .map_err(Error::io("starting a thread"))?;
    receiver.await.map_err(|_| Error::Io {
        doing: name,
        source: io::Error::other("its thread panicked"),
    })
}

/// Runs `work` in a namespace, which is a thread's property.
pub(crate) async fn in_namespace<T: Send + 'static>(
    name: &'static str,
    (namespace, kind): (PathBuf, CloneFlags),
    work: impl FnOnce() -> nix::Result<T> + Send + 'static,
) -> Result<nix::Result<T>, Error> {
    in_thread(name, move || {
        let opened = File::open(namespace);
        let file = opened.map_err(|e| e.raw_os_error().map_or(Errno::ENOENT, Errno::from_raw))?;
        setns(file, kind)?;
        work()
    })
    .await
}

/// Runs what blocks for long on the runtime's blocking threads.
pub(crate) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, Error> {
    let done = tokio::task::spawn_blocking(work).await;
    done.map_err(|e| Error::Io {
        doing: "working on a thread",
        source: io::Error::other(e),
    })
}
