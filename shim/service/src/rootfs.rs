//! The container's root: containerd hands over mounts, the shim makes them.

mod idmap;

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use containerd_shim_protos::api::Mount;
use idmap::{IdMaps, LowerLayers};

use crate::{
    error::Error,
    threads::{blocking, in_thread},
};

/// The mounts of a create call.
#[derive(Debug, Clone, Default)]
pub(crate) struct Rootfs {
    pub(crate) mounts: Vec<Mount>,
    /// `<bundle>/rootfs`.
    pub(crate) target: PathBuf,
    /// Where the lower layers of an overlay are shown with other users, while it is mounted.
    lower: PathBuf,
}

impl Rootfs {
    pub(crate) fn new(bundle: &Path, mounts: Vec<Mount>) -> Self {
        Self {
            mounts,
            target: bundle.join("rootfs"),
            lower: bundle.join("lower"),
        }
    }

    /// Mounts all, in order; what was mounted is taken back when one fails.
    pub(crate) async fn mount(&self) -> Result<(), Error> {
        if self.mounts.is_empty() {
            return Ok(());
        }
        fs::create_dir_all(&self.target).map_err(Error::file("creating", &self.target))?;
        let this = self.clone();
        // A thread of its own: with many lower layers the mount needs a working folder of its own
        // (one page of options is the kernel's limit), and that is a thread's property.
        let mounted = in_thread("mount", move || {
            this.mounts
                .iter()
                .try_for_each(|mount| this.mount_one(mount))
        })
        .await?;
        mounted.inspect_err(|_| self.unmount())
    }

    fn mount_one(&self, mount: &Mount) -> Result<(), Error> {
        let target = self.target.join(mount.target.trim_start_matches('/'));
        let mut options = mount.options.clone();
        let users = IdMaps::take(&mut options)?
            .map(|maps| maps.namespace())
            .transpose()?;
        let overlay = mount.type_ == "overlay";
        let _lower = match &users {
            Some(users) if overlay => Some(LowerLayers::attach(&mut options, &self.lower, users)?),
            _ => None,
        };
        let kind = Some(mount.type_.as_str()).filter(|s| !s.is_empty());
        let source = Some(mount.source.as_str()).filter(|s| !s.is_empty());
        containerd_shim::mount::mount_rootfs(kind, source, &options, &target)?;
        match &users {
            Some(users) if !overlay => idmap::attach(&target, &target, users, false),
            _ => Ok(()),
        }
    }

    /// Unmounts whatever is mounted there, at any depth.
    pub(crate) fn unmount(&self) {
        unmount_all(&self.target);
        unmount_all(&self.lower);
    }

    /// The writable upper layer, when the root is an overlay that has one.
    pub(crate) fn upper_layer(&self) -> Option<PathBuf> {
        let overlay = self.mounts.iter().find(|mount| mount.type_ == "overlay")?;
        overlay
            .options
            .iter()
            .find_map(|option| option.strip_prefix("upperdir="))
            .map(PathBuf::from)
    }
}

impl Rootfs {
    /// Whether the writable layer has anything in it: the container ran before.
    pub(crate) fn was_written(&self) -> bool {
        let first = self
            .upper_layer()
            .and_then(|upper| fs::read_dir(upper).ok()?.next());
        first.is_some()
    }

    /// Empties the writable layer: what was staged into it must not be seen by a cold start. To be
    /// called while it is not mounted, and only for what this create has staged.
    pub(crate) async fn clear_upper(&self) -> Result<(), Error> {
        let Some(upper) = self.upper_layer() else {
            return Ok(());
        };
        blocking(move || empty(&upper)).await?
    }
}

fn empty(upper: &Path) -> Result<(), Error> {
    let failed = || Error::file("emptying", upper);
    for entry in fs::read_dir(upper).map_err(failed())? {
        let entry = entry.map_err(failed())?;
        let path = entry.path();
        let folder = entry.file_type().map_err(failed())?.is_dir();
        let removed = if folder {
            fs::remove_dir_all(&path)
        } else {
            fs::remove_file(&path)
        };
        removed.map_err(failed())?;
    }
    Ok(())
}

/// Lazily unmounts everything at or below `target`; without mounts it does nothing.
pub(crate) fn unmount_all(target: &Path) {
    for point in mount_points(target).unwrap_or_default().into_iter().rev() {
        let _ = nix::mount::umount2(
            &point,
            nix::mount::MntFlags::MNT_DETACH | nix::mount::MntFlags::UMOUNT_NOFOLLOW,
        );
    }
}

/// Where something is mounted at or below `target`, in the order in which it was.
pub(crate) fn mount_points(target: &Path) -> io::Result<Vec<PathBuf>> {
    // The kernel's table has no symlinks in it; /var/run is one.
    let target = &fs::canonicalize(target).unwrap_or_else(|_| target.to_owned());
    let table = fs::read_to_string("/proc/self/mountinfo")?;
    // Field 5 of mountinfo is the mount point, with blanks as octal escapes (proc(5)).
    let points = table
        .lines()
        .filter_map(|line| line.split(' ').nth(4))
        .map(|point| {
            PathBuf::from(
                point
                    .replace("\\040", " ")
                    .replace("\\011", "\t")
                    .replace("\\134", "\\"),
            )
        })
        .filter(|point| point.starts_with(target));
    Ok(points.collect())
}
