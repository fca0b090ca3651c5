//! A container's bundle: understood and changed in one place.

use std::{
    collections::BTreeMap,
    fs, io,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

use rekindle_checkpoint::gpu;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::{error::Error, options::RuncOptions, rootfs, threads::blocking};

/// Largest config.json that is read. Kubernetes' largest pods stay below 1 MiB.
const MAX_CONFIG: u64 = 32 << 20;
/// What the `delete` command needs to know after the shim was killed.
const REMEMBERED: &str = "rekindle-shim.json";
/// CRIU's configuration for this container.
pub(crate) const CRIU_CONFIG: &str = "criu.conf";
/// The pid of the container's init, written by runc.
pub(crate) const INIT_PID: &str = "init.pid";
/// Under Kubernetes lent by the sandbox.
pub(crate) const SHM: &str = "/dev/shm";
/// Names runc's CRIU configuration file (runc `docs/checkpoint-restore.md`).
const CRIU_CONFIG_KEY: &str = "org.criu.config";

/// What outlives the shim: written at create, read by the `delete` command.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct Remembered {
    pub(crate) options: RuncOptions,
}

impl Remembered {
    pub(crate) fn write(&self, bundle: &Path) -> Result<(), Error> {
        let path = bundle.join(REMEMBERED);
        let text = serde_json::to_vec(self).unwrap_or_default();
        fs::write(&path, text).map_err(Error::file("writing", path))
    }

    /// Absent when the container was never created, or made by another shim: then all defaults.
    pub(crate) fn read(bundle: &Path) -> Self {
        fs::read(bundle.join(REMEMBERED))
            .ok()
            .and_then(|text| serde_json::from_slice(&text).ok())
            .unwrap_or_default()
    }
}

/// Removes what a create has put into a bundle, once nothing else is left of it.
pub(crate) fn forget(bundle: &Path) {
    for name in [REMEMBERED, CRIU_CONFIG, INIT_PID] {
        let _ = fs::remove_file(bundle.join(name));
    }
}

/// Removes the bundle of a container that is gone, as containerd would.
pub(crate) async fn remove(bundle: &Path) {
    rootfs::unmount_all(bundle);
    // What is still mounted below it, the container's layer for one, must not be emptied.
    if rootfs::mount_points(bundle).is_ok_and(|points| points.is_empty()) {
        let folder = bundle.to_owned();
        match blocking(move || fs::remove_dir_all(folder)).await {
            Ok(Err(error)) if error.kind() != io::ErrorKind::NotFound => {
                tracing::warn!(bundle = %bundle.display(), %error, "removing a bundle");
            }
            _ => {}
        }
    }
}

/// Only the annotations: all that the `start` command needs.
#[derive(Deserialize, Default)]
#[serde(default)]
pub(crate) struct Annotations {
    pub(crate) annotations: BTreeMap<String, String>,
}

impl Annotations {
    pub(crate) fn read(bundle: &Path) -> Result<Self, Error> {
        let path = bundle.join("config.json");
        let text = read_config(&path)?;
        serde_json::from_slice(&text).map_err(|e| Error::Argument {
            key: path.display().to_string(),
            reason: e.to_string(),
        })
    }
}

fn read_config(path: &Path) -> Result<Vec<u8>, Error> {
    let file = fs::metadata(path).map_err(Error::file("reading", path))?;
    let size = file.len();
    let wrong = if !file.is_file() {
        Some("not a file".to_owned())
    } else if size > MAX_CONFIG {
        Some(format!(
            "{size} bytes are more than a bundle's config.json has ({MAX_CONFIG} at most)"
        ))
    } else {
        None
    };
    if let Some(reason) = wrong {
        return Err(Error::Argument {
            key: path.display().to_string(),
            reason,
        });
    }
    fs::read(path).map_err(Error::file("reading", path))
}

/// One mount of a container.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Mount<'a> {
    pub(crate) kind: &'a str,
    pub(crate) source: &'a str,
    pub(crate) destination: &'a str,
    pub(crate) read_only: bool,
}

/// A bundle's config.json, kept as JSON: what this build's types do not know must survive a change.
#[derive(Debug, Clone)]
pub(crate) struct Spec {
    path: PathBuf,
    json: Value,
}

impl Spec {
    pub(crate) fn read(bundle: &Path) -> Result<Self, Error> {
        let path = bundle.join("config.json");
        let json = serde_json::from_slice(&read_config(&path)?).map_err(|e| Error::Argument {
            key: path.display().to_string(),
            reason: e.to_string(),
        })?;
        Ok(Self { path, json })
    }

    pub(crate) fn write(&self) -> Result<(), Error> {
        let text = serde_json::to_vec(&self.json).unwrap_or_default();
        fs::write(&self.path, text).map_err(Error::file("writing", &self.path))
    }

    /// In the OCI crate's types.
    pub(crate) fn parsed(&self) -> Result<oci_spec::runtime::Spec, Error> {
        serde_json::from_value(self.json.clone()).map_err(|e| Error::Argument {
            key: self.path.display().to_string(),
            reason: e.to_string(),
        })
    }

    /// The process that it starts, as JSON.
    pub(crate) fn process(&self) -> Value {
        self.json.get("process").cloned().unwrap_or_default()
    }

    /// A string somewhere in it, by JSON pointer.
    pub(crate) fn text(&self, pointer: &str) -> Option<&str> {
        self.json
            .pointer(pointer)
            .and_then(Value::as_str)
            .filter(|text| !text.is_empty())
    }

    pub(crate) fn annotations(&self) -> BTreeMap<String, String> {
        let Some(map) = self.json.get("annotations").and_then(Value::as_object) else {
            return BTreeMap::new();
        };
        map.iter()
            .filter_map(|(key, value)| Some((key.clone(), value.as_str()?.to_owned())))
            .collect()
    }

    /// The path of a namespace the container joins; `None`: it has one of its own, or none.
    pub(crate) fn namespace_path(&self, kind: &str) -> Option<PathBuf> {
        let namespaces = self.json.pointer("/linux/namespaces")?.as_array()?;
        let namespace = namespaces
            .iter()
            .find(|ns| ns.get("type").and_then(Value::as_str) == Some(kind))?;
        namespace
            .get("path")
            .and_then(Value::as_str)
            .filter(|path| !path.is_empty())
            .map(PathBuf::from)
    }

    /// Whether the container has, makes or joins a namespace of this kind; if not it is the host's.
    pub(crate) fn has_namespace(&self, kind: &str) -> bool {
        let namespaces = self
            .json
            .pointer("/linux/namespaces")
            .and_then(Value::as_array);
        namespaces.is_some_and(|all| {
            all.iter()
                .any(|ns| ns.get("type").and_then(Value::as_str) == Some(kind))
        })
    }

    /// Device nodes of GPUs that the container gets; a checkpoint of it would lose what is in them.
    pub(crate) fn gpu_devices(&self) -> Vec<String> {
        gpu::of_spec(&self.json)
    }

    /// Its mounts, in order.
    pub(crate) fn mounts(&self) -> impl Iterator<Item = Mount<'_>> {
        let mounts = self.json.get("mounts").and_then(Value::as_array);
        mounts.into_iter().flatten().filter_map(|mount| {
            let text = |key: &str| mount.get(key).and_then(Value::as_str);
            Some(Mount {
                kind: text("type").unwrap_or_default(),
                source: text("source").unwrap_or_default(),
                destination: text("destination")?,
                read_only: mount
                    .get("options")
                    .and_then(Value::as_array)
                    .is_some_and(|options| options.iter().any(|option| option == "ro")),
            })
        })
    }

    /// The source of the writable bind at `destination`, if there is one.
    pub(crate) fn bind_source(&self, destination: &str) -> Option<PathBuf> {
        let mount = self
            .mounts()
            .find(|mount| mount.destination == destination)?;
        let lends = mount.kind == "bind" && !mount.read_only && !mount.source.is_empty();
        lends.then(|| mount.source.into())
    }

    /// Why an image must neither take the container's `/dev/shm` nor replace it, where that is the node's
    /// own. CRI lends it to a pod with `hostIPC` in place of the sandbox's. A tmpfs of the container's own
    /// is nobody else's, also without an IPC namespace.
    pub(crate) fn shm_of_the_node(&self) -> Option<&'static str> {
        let source = self.bind_source(SHM)?;
        if !same_file(&source, Path::new(SHM)) {
            return None;
        }
        let shares_ipc = match self.namespace_path("ipc") {
            Some(path) => same_file(&path, Path::new("/proc/self/ns/ipc")),
            None => !self.has_namespace("ipc"),
        };
        Some(if shares_ipc {
            "it shares the node's IPC namespace (hostIPC) and with it the node's /dev/shm, which an image would take along and a restore replace"
        } else {
            "its /dev/shm is the node's (a hostPath volume), which an image would take along and a restore replace"
        })
    }

    /// Adds a read-only bind of `source` at `destination`; one that is there already is replaced.
    pub(crate) fn bind_read_only(&mut self, source: &Path, destination: &str) {
        let mount = json!({
            "destination": destination,
            "type": "bind",
            "source": source,
            "options": ["rbind", "ro", "nosuid", "nodev", "rprivate"],
        });
        let Some(spec) = self.json.as_object_mut() else {
            return;
        };
        let mounts = spec.entry("mounts").or_insert_with(|| json!([]));
        if let Some(mounts) = mounts.as_array_mut() {
            mounts.retain(|m| m.get("destination").and_then(Value::as_str) != Some(destination));
            mounts.push(mount);
        }
    }

    /// Points runc at this bundle's CRIU configuration. Returns what the bundle pointed at before.
    pub(crate) fn set_criu_config(&mut self, file: &Path) -> Option<PathBuf> {
        let spec = self.json.as_object_mut()?;
        let annotations = spec
            .entry("annotations")
            .or_insert_with(|| json!({}))
            .as_object_mut()?;
        let before = annotations.insert(CRIU_CONFIG_KEY.to_owned(), json!(file));
        before.and_then(|value| value.as_str().map(PathBuf::from))
    }
}

/// Whether two paths lead to one file, folder or namespace.
fn same_file(one: &Path, other: &Path) -> bool {
    let identity = |path: &Path| fs::metadata(path).map(|file| (file.dev(), file.ino())).ok();
    identity(one).is_some_and(|id| identity(other) == Some(id))
}

#[cfg(test)]
mod tests;
