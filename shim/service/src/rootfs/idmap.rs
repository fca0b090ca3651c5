//! Mounts that show files as other users' than those they have on the disk. containerd asks for them by the
//! options `uidmap=` and `gidmap=`, for a pod with users of its own (`core/mount/mount_idmapped_linux.go`).

use std::{
    fs,
    os::fd::OwnedFd,
    path::{Path, PathBuf},
};

use rustix::{
    fs::CWD,
    mount::{MoveMountFlags, OpenTreeFlags, move_mount, open_tree},
};

use super::unmount_all;
use crate::{error::Error, sys};

/// Who is shown for whom, in lines of `uid_map` (`user_namespaces(7)`).
#[derive(Debug, PartialEq, Eq)]
pub(super) struct IdMaps {
    uids: String,
    gids: String,
}

impl IdMaps {
    /// Takes the maps out of a mount's options, which the kernel does not know them by.
    pub(super) fn take(options: &mut Vec<String>) -> Result<Option<Self>, Error> {
        let mut maps = [None, None];
        for (map, key) in maps.iter_mut().zip(["uidmap=", "gidmap="]) {
            for option in options.extract_if(.., |option| option.starts_with(key)) {
                *map = Some(lines(&option[key.len()..]).ok_or_else(|| {
                    Error::Argument {
                        key: format!("rootfs option {option}"),
                        reason:
                            "allowed are ids as CONTAINER:HOST:SIZE, with commas between several"
                                .to_owned(),
                    }
                })?);
            }
        }
        match maps {
            [None, None] => Ok(None),
            [Some(uids), Some(gids)] => Ok(Some(Self { uids, gids })),
            _ => Err(Error::Argument {
                key: "rootfs options uidmap= and gidmap=".to_owned(),
                reason: "one is there without the other".to_owned(),
            }),
        }
    }

    /// A user namespace with these maps: so the kernel wants to be told.
    pub(super) fn namespace(&self) -> Result<OwnedFd, Error> {
        sys::user_namespace(&self.uids, &self.gids).map_err(Error::io(
            "making a user namespace for the container's root",
        ))
    }
}

fn lines(maps: &str) -> Option<String> {
    let mut lines = String::new();
    for map in maps.split(',') {
        let numbers: Vec<u32> = map
            .split(':')
            .map(|number| number.parse().ok())
            .collect::<Option<_>>()?;
        let [inside, outside, size @ (1..)] = numbers[..] else {
            return None;
        };
        lines += &format!("{inside} {outside} {size}\n");
    }
    Some(lines)
}

/// Mounts what lies at `source` a second time at `target`, with the users of a namespace.
pub(super) fn attach(
    source: &Path,
    target: &Path,
    users: &OwnedFd,
    read_only: bool,
) -> Result<(), Error> {
    let failed = || Error::file("mapping the users of", source);
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    let tree = open_tree(CWD, source, flags).map_err(|e| failed()(e.into()))?;
    sys::map_users(&tree, users, read_only).map_err(failed())?;
    let empty = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
    move_mount(&tree, "", CWD, target, empty).map_err(|e| failed()(e.into()))
}

/// An overlay's lower layers, with mapped users: an overlay itself cannot have them. To be dropped when the
/// overlay is mounted, which keeps what it needs.
#[derive(Debug)]
pub(super) struct LowerLayers<'a>(&'a Path);

impl<'a> LowerLayers<'a> {
    /// Mounts the folder that all of them are in at `through`, and lets `options` lead there.
    pub(super) fn attach(
        options: &mut [String],
        through: &'a Path,
        users: &OwnedFd,
    ) -> Result<Self, Error> {
        let common = lead(options, through)?;
        fs::create_dir_all(through).map_err(Error::file("creating", through))?;
        let this = Self(through);
        attach(&common, through, users, true)?;
        Ok(this)
    }
}

impl Drop for LowerLayers<'_> {
    fn drop(&mut self) {
        unmount_all(self.0);
        let _ = fs::remove_dir(self.0);
    }
}

/// Lets the lower layers in an overlay's options lie below `through`; the folder they have in common.
fn lead(options: &mut [String], through: &Path) -> Result<PathBuf, Error> {
    const KEY: &str = "lowerdir=";
    let refused = |reason: &str| Error::Argument {
        key: "rootfs of an overlay with mapped users".to_owned(),
        reason: reason.to_owned(),
    };
    let option = options.iter_mut().find(|option| option.starts_with(KEY));
    let option = option.ok_or_else(|| refused("it has no lowerdir="))?;
    let layers: Vec<PathBuf> = option[KEY.len()..].split(':').map(PathBuf::from).collect();
    let mut common = layers.first().cloned().unwrap_or_default();
    for layer in &layers {
        let folder = layer.parent().unwrap_or(Path::new(""));
        while !folder.starts_with(&common) && common.pop() {}
    }
    if common.parent().is_none() || common.as_os_str().is_empty() {
        return Err(refused("its lower layers have no folder in common"));
    }
    let led: Vec<String> = layers
        .iter()
        .filter_map(|layer| layer.strip_prefix(&common).ok())
        .map(|layer| through.join(layer).display().to_string())
        .collect();
    *option = format!("{KEY}{}", led.join(":"));
    Ok(common)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options(all: &[&str]) -> Vec<String> {
        all.iter().map(|&option| option.to_owned()).collect()
    }

    #[test]
    fn maps_are_taken_out_together_or_refused() {
        let mut given = options(&["ro", "uidmap=0:200000:65536,70000:1:1", "gidmap=0:3:4"]);
        let maps = IdMaps::take(&mut given).unwrap().unwrap();
        assert_eq!(maps.uids, "0 200000 65536\n70000 1 1\n");
        assert_eq!(maps.gids, "0 3 4\n");
        assert_eq!(given, ["ro"]);
        assert_eq!(IdMaps::take(&mut given).unwrap(), None);
        for bad in [
            "uidmap=0:1:2",
            "uidmap=0:1:0",
            "uidmap=0:1",
            "gidmap=a:b:c",
            "gidmap=",
        ] {
            let refused = IdMaps::take(&mut options(&[bad])).unwrap_err().to_string();
            assert!(refused.contains("map="), "{refused}");
        }
    }

    #[test]
    fn lower_layers_lead_through_the_folder_they_have_in_common() {
        for (lower, common, led) in [
            ("/s/1/fs", "/s/1", "/b/lower/fs"),
            ("/s/12/fs:/s/1/fs", "/s", "/b/lower/12/fs:/b/lower/1/fs"),
            ("/s/1/fs:/s/1/fs/x", "/s/1", "/b/lower/fs:/b/lower/fs/x"),
        ] {
            let mut given = options(&["index=off", &format!("lowerdir={lower}")]);
            let found = lead(&mut given, Path::new("/b/lower")).unwrap();
            assert_eq!(found, Path::new(common));
            assert_eq!(given[1], format!("lowerdir={led}"));
        }
        for bad in [
            "lowerdir=/a/x:/b/y",
            "lowerdir=",
            "upperdir=/a",
            "lowerdir=/a",
        ] {
            assert!(
                lead(&mut options(&[bad]), Path::new("/b")).is_err(),
                "{bad}"
            );
        }
    }
}
