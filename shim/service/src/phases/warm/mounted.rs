//! What is mounted into a container, as far as it decides of what kind the container is.
//!
//! All files are opened on threads for what blocks, and nothing is opened that a pod could have put there, but for
//! single files (`subPath`): of those only regular ones are read, and only on the node's own file systems.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io::Read,
    os::unix::fs::MetadataExt,
    path::{Path, PathBuf},
};

use rustix::fs::{Mode, OFlags, open, statfs};
use serde::Deserialize;

use crate::bundle::{Mount, Spec};

/// Where Kubernetes mounts the token of a pod's service account.
const ACCOUNT: &str = "/var/run/secrets/kubernetes.io/serviceaccount";
/// What the sandbox and the kubelet lend to each container; it is the new pod's own and says nothing.
const LENT: [&str; 5] = [
    "/etc/hosts",
    "/etc/hostname",
    "/etc/resolv.conf",
    "/dev/shm",
    "/dev/termination-log",
];
/// Volumes that the kubelet writes for the pod, by their plugin (kubernetes `pkg/volume`).
const WRITTEN: [&str; 3] = ["configmap", "secret", "projected"];
/// Those that are the pod's own: empty when it starts, or about itself.
const OWN: [&str; 2] = ["empty-dir", "downward-api"];
/// File systems of the node itself (`linux/magic.h`): ext4, XFS, Btrfs, tmpfs, overlay.
const LOCAL: [i64; 5] = [0xEF53, 0x5846_5342, 0x9123_683E, 0x0102_1994, 0x794C_7630];
/// Most bytes and files of a volume that are compared. etcd takes no object of more than 1.5 MiB.
const MAX_BYTES: u64 = 4 << 20;
const MAX_FILES: usize = 1000;

/// What is mounted, and how it can be looked at. Made without looking at anything.
#[derive(Debug, Clone)]
pub(crate) struct Mounted {
    mounts: Vec<(String, What, bool)>,
    token: Option<PathBuf>,
    /// The pod's name and uid: files about the pod itself have them.
    own: Vec<String>,
}

/// What is known of one mount.
#[derive(Debug, Clone, PartialEq, Eq)]
enum What {
    /// It is named by this.
    Named(String),
    /// Files that the kubelet has written count by what is in them.
    Written(PathBuf),
    /// A file or a folder of some volume.
    Part(PathBuf),
}

impl Mounted {
    /// `uid` is the pod's; without one there is no kubelet.
    pub(crate) fn of(spec: &Spec, uid: Option<&str>, own: Vec<String>) -> Self {
        let account = spec.mounts().find(|mount| mount.destination == ACCOUNT);
        let token = account.and_then(|mount| match what(&mount, uid) {
            What::Written(volume) => Some(volume.join("token")),
            _ => None,
        });
        let mounts = spec.mounts().map(|mount| {
            let destination = mount.destination.to_owned();
            (destination, what(&mount, uid), mount.read_only)
        });
        Self {
            mounts: mounts.collect(),
            token,
            own,
        }
    }

    /// What is mounted, by destination. Blocks.
    pub(crate) fn look(&self) -> BTreeMap<String, String> {
        let look = |(destination, what, read_only): &(String, What, bool)| {
            let what = match what {
                What::Named(name) => name.clone(),
                What::Written(volume) => self.hash(volume),
                What::Part(path) => part(path),
            };
            let access = if *read_only { "ro" } else { "rw" };
            (destination.clone(), format!("{what} {access}"))
        };
        self.mounts.iter().map(look).collect()
    }

    /// The service account, as its token has it. Who restores an image gets what is in its memory, and that may be what
    /// only another account could read. Blocks.
    pub(crate) fn account(&self) -> Option<String> {
        subject(&read(self.token.as_ref()?, 1 << 16, OFlags::empty())?)
    }

    /// The names and contents of the files of a volume. Of a token only whose it is, for each pod gets one of its own, and
    /// nothing of files about the pod itself.
    fn hash(&self, volume: &Path) -> String {
        let mut hasher = blake3::Hasher::new();
        let mut left = MAX_BYTES;
        for file in files(volume) {
            let name = file.strip_prefix(volume).unwrap_or(&file);
            hasher.update(name.as_os_str().as_encoded_bytes());
            let bytes = read(&file, left, OFlags::empty()).unwrap_or_default();
            left -= bytes.len() as u64;
            let text = str::from_utf8(&bytes).unwrap_or_default().trim();
            let counts = match subject(&bytes) {
                Some(subject) => subject.into_bytes(),
                None if self.own.iter().any(|own| own == text) => Vec::new(),
                None => bytes,
            };
            hasher.update(&(counts.len() as u64).to_le_bytes());
            hasher.update(&counts);
        }
        short(&hasher)
    }
}

fn short(hasher: &blake3::Hasher) -> String {
    hasher.finalize().to_hex()[..16].to_owned()
}

/// What a mount is, by its source.
fn what(mount: &Mount<'_>, uid: Option<&str>) -> What {
    if mount.kind != "bind" {
        return What::Named(mount.kind.to_owned());
    }
    if uid.is_some() && LENT.contains(&mount.destination) {
        return What::Named("lent".to_owned());
    }
    let of_pod = uid.and_then(|uid| Some(mount.source.split_once(&format!("/pods/{uid}/"))?.1));
    let Some(of_pod) = of_pod else {
        return What::Named(mount.source.to_owned());
    };
    if of_pod.starts_with("volume-subpaths/") {
        return What::Part(mount.source.into());
    }
    let volume = of_pod.strip_prefix("volumes/kubernetes.io~");
    let Some((plugin, name)) = volume.and_then(|volume| volume.split_once('/')) else {
        return What::Named(of_pod.to_owned());
    };
    match plugin {
        plugin if WRITTEN.contains(&plugin) => What::Written(mount.source.into()),
        plugin if OWN.contains(&plugin) => What::Named(plugin.to_owned()),
        // A disk, a share: by its name in the cluster.
        plugin => What::Named(format!("{plugin}/{name}")),
    }
}

/// A part of a volume: a small file by what is in it, all else by where it is on the disk.
fn part(path: &Path) -> String {
    let local = statfs(path).is_ok_and(|stat| {
        #[allow(
            clippy::useless_conversion,
            reason = "its width differs between architectures"
        )]
        let kind = i64::from(stat.f_type);
        LOCAL.contains(&kind)
    });
    let Ok(found) = fs::symlink_metadata(path) else {
        return "unknown".to_owned();
    };
    if local
        && found.is_file()
        && found.len() <= MAX_BYTES
        && let Some(bytes) = read(path, MAX_BYTES, OFlags::NOFOLLOW)
    {
        return short(blake3::Hasher::new().update(&bytes));
    }
    let changed = if found.is_file() {
        found.mtime_nsec() ^ found.mtime()
    } else {
        0
    };
    format!(
        "{}:{}:{}:{changed}",
        found.dev(),
        found.ino(),
        if found.is_file() { found.len() } else { 0 }
    )
}

/// At most `limit` bytes of a regular file; none of anything else.
fn read(path: &Path, limit: u64, flags: OFlags) -> Option<Vec<u8>> {
    // Nothing happens to a device or a FIFO that is opened so, and nobody waits for it.
    let flags = flags | OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    let file = File::from(open(path, flags, Mode::empty()).ok()?);
    if !file.metadata().ok()?.is_file() {
        return None;
    }
    let mut bytes = Vec::new();
    file.take(limit).read_to_end(&mut bytes).ok()?;
    Some(bytes)
}

/// Whose a JSON web token is; none where the file is no such token.
fn subject(token: &[u8]) -> Option<String> {
    #[derive(Deserialize)]
    struct Claims {
        sub: String,
    }
    let token = str::from_utf8(token).ok()?.trim();
    let [_, claims, _] = token.split('.').collect::<Vec<_>>()[..] else {
        return None;
    };
    let claims = base64_simd::URL_SAFE_NO_PAD.decode_to_vec(claims).ok()?;
    let claims: Claims = serde_json::from_slice(&claims).ok()?;
    Some(claims.sub)
}

/// The files of a volume, sorted. The kubelet shows each through a symlink into a folder with the time in its name
/// (`pkg/volume/util/atomic_writer.go`), so what begins with two dots is left out and links are followed.
fn files(volume: &Path) -> Vec<PathBuf> {
    let (mut found, mut folders) = (Vec::new(), vec![volume.to_owned()]);
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).into_iter().flatten().flatten() {
            let path = entry.path();
            match () {
                () if entry.file_name().as_encoded_bytes().starts_with(b"..") => {}
                () if found.len() + folders.len() >= MAX_FILES => {}
                () if path.is_dir() => folders.push(path),
                () => found.push(path),
            }
        }
    }
    found.sort();
    found
}

#[cfg(test)]
mod tests;
