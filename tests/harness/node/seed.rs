//! containerd's state with a large image in it: imported and unpacked once, then given to every node that asks.
//!
//! Blobs are never written again, and neither are the files of an unpacked layer: containers see them below an overlay.
//! So a node sees the cache's own, bound read-only into its mounts; the databases and what is small it gets as copies.
//! (An overlay over all of it would not do: containerd's snapshots could not stack on it.)

use super::{NAMESPACE, Node, NodeConfig, Runtime};
use crate::{Image, progress::Progress, root};
use anyhow::{Context, Result, ensure};
use nix::fcntl::{Flock, FlockArg};
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;

/// What the state was made of; another image of the same name makes it anew.
const KEY: &str = "rekindle-test-key";
/// What is larger is not copied: layers are, configurations and manifests are not.
const LARGE: u64 = 1 << 20;

impl NodeConfig {
    /// The node has `image` from its start, for `ctr` and those who use its namespace.
    #[allow(
        clippy::disallowed_methods,
        reason = "the commit of a cached folder, made again when it is missing"
    )]
    pub async fn with_image(mut self, image: &Image) -> Result<NodeConfig> {
        let short: String = image
            .name
            .chars()
            .map(|c| if c.is_ascii_alphanumeric() { c } else { '-' })
            .collect();
        let all = root::cache().join("containerd");
        let ready = all.join(format!("{}-{short}", self.suite.name()));
        let key = format!("{} {}\n", image.name, image.layer);
        fs::create_dir_all(&all).with_context(|| format!("making {}", all.display()))?;
        let lock = File::create(ready.with_extension("lock"))?;
        let _lock = Flock::lock(lock, FlockArg::LockExclusive).map_err(|(_, e)| e)?;
        if !fs::read_to_string(ready.join(KEY)).is_ok_and(|made_of| made_of == key) {
            let partial = ready.with_extension("partial");
            for old in [&partial, &ready] {
                match fs::remove_dir_all(old) {
                    Err(e) if e.kind() != std::io::ErrorKind::NotFound => return Err(e.into()),
                    _ => {}
                }
            }
            let progress = Progress::start(&format!("unpacking {} (once)", image.name));
            let mut plain = NodeConfig::new(Runtime::Go)?;
            plain.suite = self.suite;
            // Boxed: this future is part of the one that starts the node.
            let node = Box::pin(Node::start(plain)).await?;
            node.import_for(image, &[NAMESPACE]).await?;
            node.stop_containerd().await?;
            // mv, not a rename: cache and node may lie on two file systems.
            let state = node.dir.join("containerd");
            let moved = Command::new("mv").args([&state, &partial]).output()?;
            ensure!(
                moved.status.success(),
                "moving containerd's state into the cache ended with {}: {}",
                moved.status,
                String::from_utf8_lossy(&moved.stderr).trim()
            );
            fs::write(partial.join(KEY), key)?;
            fs::rename(&partial, &ready)?;
            progress.done();
        }
        self.seed = Some(ready);
        Ok(self)
    }
}

/// What a node sees of the cache itself: where it lies, and its place in containerd's folder.
pub(super) type Bind = (PathBuf, PathBuf);

/// Gives a node a state of its own, and says what of it is to be bound over the places held for it.
pub(super) fn plant(from: &Path, to: &Path) -> Result<Vec<Bind>> {
    let mut binds = Vec::new();
    plant_folder(from, to, Path::new(""), &mut binds)
        .with_context(|| format!("giving a node the state {}", from.display()))?;
    Ok(binds)
}

fn plant_folder(from: &Path, to: &Path, at: &Path, binds: &mut Vec<Bind>) -> Result<()> {
    for entry in fs::read_dir(from.join(at))? {
        let entry = entry?;
        let (source, at) = (entry.path(), at.join(entry.file_name()));
        let there = to.join(&at);
        let data = entry.metadata()?;
        if data.is_dir() {
            fs::create_dir_all(&there)?;
            fs::set_permissions(&there, data.permissions())?;
            if at.ends_with("fs") {
                binds.push((source, at));
            } else {
                plant_folder(from, to, &at, binds)?;
            }
        } else if data.len() > LARGE && at.extension().is_none_or(|end| end != "db") {
            File::create(&there)?;
            binds.push((source, at));
        } else if data.is_file() {
            fs::copy(&source, &there)?;
        }
    }
    Ok(())
}
