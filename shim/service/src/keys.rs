//! The keys of encrypted images: from files, and from programs that print them.

use std::{path::Path, process::Command, time::Duration};

use rekindle_checkpoint::Key;
use rekindle_core::{config::ImageKey, name::Namespace};

use crate::{context::Shared, error::sentence, programs, threads::blocking};

/// What a program may take to print a key: a secret store in the same cluster answers in a fraction of it.
const DEADLINE: Duration = Duration::from_secs(10);

/// What a new image of `namespace` is encrypted with, if it is.
pub(crate) async fn for_new_image(
    shared: &Shared,
    namespace: &Namespace,
) -> Result<Option<Key>, String> {
    for_image(shared, namespace, None).await
}

/// What opens an image of `namespace` that says it is encrypted with the key `id`, or should be and is not.
pub(crate) async fn for_image(
    shared: &Shared,
    namespace: &Namespace,
    id: Option<&str>,
) -> Result<Option<Key>, String> {
    match shared.node.key_of(id, namespace) {
        Some(key) => read(shared, key).await.map(Some),
        None => Ok(None),
    }
}

async fn read(shared: &Shared, key: &ImageKey) -> Result<Key, String> {
    let id = key.id.clone();
    if let Some(path) = key.file.clone() {
        let read = blocking(move || Key::read(&id, &path)).await;
        return read.map_err(|e| sentence(&e))?.map_err(|e| sentence(&e));
    }
    let words = key.command.as_deref().unwrap_or_default();
    let [program, args @ ..] = words else {
        return Err(format!("the key {id:?} has no program to ask"));
    };
    #[allow(
        clippy::disallowed_methods,
        reason = "the node's own way to a key, from its configuration"
    )]
    let mut command = Command::new(program);
    command.args(args);
    match programs::capture(&shared.exits, command, DEADLINE).await {
        Ok((0, text)) => Key::parse(&id, text.as_bytes()).map_err(|e| sentence(&e)),
        Ok((status, _)) => Err(format!(
            "{program}, asked for the key {id:?}, ended with {status}"
        )),
        Err(e) => Err(format!("asking {program} for the key {id:?}: {e}")),
    }
}

/// Refuses a folder that is on a disk, where what is secret would stay.
pub(crate) fn require_memory(dir: &Path) -> Result<(), String> {
    let found =
        rustix::fs::statfs(dir).map_err(|e| format!("looking at {}: {e}", dir.display()))?;
    let kinds = [libc::TMPFS_MAGIC, RAMFS_MAGIC];
    if kinds.contains(&found.f_type) {
        return Ok(());
    }
    Err(format!(
        "the image is encrypted, and {} is not in memory: set containerd's `state` to a folder on a tmpfs, such as /run/containerd",
        dir.display()
    ))
}

/// `linux/magic.h`.
const RAMFS_MAGIC: libc::__fsword_t = 0x8584_58f6;
