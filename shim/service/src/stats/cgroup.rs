//! Where a process is accounted: the folders of its cgroup, as this process sees them.

use std::{
    collections::HashMap,
    fs, io,
    path::{Component, Path, PathBuf},
};

use super::text::{self, Table};

/// A process's cgroup.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Cgroup {
    /// Version 1: one folder per controller. Two controllers may share a mount (`cpu,cpuacct`).
    V1(HashMap<String, Folder>),
    /// Version 2: one folder for all.
    V2(Folder),
}

/// Why a process's cgroup cannot be told.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CgroupError {
    #[error("reading {path}: {source}", path = path.display())]
    Read { path: PathBuf, source: io::Error },
    #[error("process {0}: has ended before its cgroup was looked up")]
    Ended(i32),
    #[error(
        "process {0}: none of the hierarchies in /proc/{0}/cgroup is mounted here, says /proc/self/mountinfo; \
         mount them under /sys/fs/cgroup in the cgroup namespace of containerd"
    )]
    NotMounted(i32),
}

/// The controllers whose presence in version 1 decides. On a version 2 node others may well be mounted
/// beside it (`net_cls`, for a VPN), and on a hybrid one version 2 is there and has none.
const DECISIVE: [&str; 5] = ["cpu", "cpuacct", "memory", "pids", "blkio"];

impl Cgroup {
    /// The cgroup that a living process is in.
    pub(crate) fn of(pid: i32) -> Result<Self, CgroupError> {
        let cgroups = read(format!("/proc/{pid}/cgroup"))?;
        let mounts = read("/proc/self/mountinfo".to_owned())?;
        // One that waits to be reaped is shown in the root of each version 1 hierarchy: the whole machine.
        if text::has_ended(&read(format!("/proc/{pid}/stat"))?) {
            return Err(CgroupError::Ended(pid));
        }
        Self::find(&cgroups, &mounts).ok_or(CgroupError::NotMounted(pid))
    }

    /// From the texts of `/proc/PID/cgroup` and `/proc/self/mountinfo`.
    fn find(cgroups: &str, mountinfo: &str) -> Option<Self> {
        let mounts: Vec<Mount> = mountinfo.lines().filter_map(Mount::parse).collect();
        let mut unified = None;
        let mut controllers = HashMap::new();
        for line in cgroups.lines() {
            // A path may have colons in it, a list of controllers not.
            let mut parts = line.splitn(3, ':').skip(1);
            let (Some(names), Some(path)) = (parts.next(), parts.next()) else {
                continue;
            };
            if names.is_empty() {
                unified = folder(&mounts, None, Path::new(path));
                continue;
            }
            for name in names.split(',') {
                if let Some(folder) = folder(&mounts, Some(name), Path::new(path)) {
                    controllers.insert(name.to_owned(), folder);
                }
            }
        }
        if DECISIVE.iter().any(|name| controllers.contains_key(*name)) {
            return Some(Self::V1(controllers));
        }
        unified.map(Self::V2)
    }

    /// Whether it is still there.
    pub(super) fn exists(&self) -> bool {
        match self {
            Self::V1(controllers) => controllers.values().any(Folder::exists),
            Self::V2(folder) => folder.exists(),
        }
    }
}

fn read(path: String) -> Result<String, CgroupError> {
    fs::read_to_string(&path).map_err(|source| CgroupError::Read {
        path: path.into(),
        source,
    })
}

/// A mounted hierarchy.
#[derive(Debug)]
struct Mount<'a> {
    /// Which part of the hierarchy the mount shows, told from the root of our cgroup namespace.
    root: PathBuf,
    at: PathBuf,
    /// `None` is version 2.
    controllers: Option<&'a str>,
}

impl<'a> Mount<'a> {
    /// A line: `31 23 0:28 / /sys/fs/cgroup/cpu rw,nosuid shared:9 - cgroup cgroup rw,cpu,cpuacct`.
    fn parse(line: &'a str) -> Option<Self> {
        let (mount, filesystem) = line.split_once(" - ")?;
        let mut mount = mount.split(' ').skip(3);
        let (root, at) = (mount.next()?, mount.next()?);
        let mut filesystem = filesystem.split(' ');
        let controllers = match filesystem.next()? {
            "cgroup" => Some(filesystem.nth(1)?),
            "cgroup2" => None,
            _ => return None,
        };
        Some(Self {
            root: text::unescaped(root).into(),
            at: text::unescaped(at).into(),
            controllers,
        })
    }

    fn has(&self, controller: Option<&str>) -> bool {
        match (self.controllers, controller) {
            (Some(all), Some(one)) => all.split(',').any(|it| it == one),
            (None, None) => true,
            _ => false,
        }
    }
}

/// The folder of cgroup `path` under the mount that shows the largest part of the hierarchy.
fn folder(mounts: &[Mount], controller: Option<&str>, path: &Path) -> Option<Folder> {
    let beneath = |mount: &Mount| {
        let rest = path.strip_prefix(&mount.root).ok()?;
        // `/..`: outside our cgroup namespace, which no mount made within it shows.
        let climbs = rest.components().any(|part| part == Component::ParentDir);
        (!climbs).then(|| (mount.root.as_os_str().len(), mount.at.join(rest)))
    };
    let folders = mounts
        .iter()
        .filter(|mount| mount.has(controller))
        .filter_map(beneath);
    folders
        .min_by_key(|(root, _)| *root)
        .map(|(_, folder)| Folder(folder))
}

/// A folder of the cgroup filesystem. What is not in it was not enabled, and is left out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Folder(PathBuf);

impl Folder {
    #[cfg(test)]
    pub(crate) fn new(path: impl Into<PathBuf>) -> Self {
        Self(path.into())
    }

    pub(crate) fn file(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    /// The cgroup above it.
    pub(crate) fn parent(&self) -> Option<Self> {
        Some(Self(self.0.parent()?.to_owned()))
    }

    fn exists(&self) -> bool {
        self.0.is_dir()
    }

    pub(super) fn text(&self, name: &str) -> Option<String> {
        fs::read_to_string(self.file(name)).ok()
    }

    /// The lines `key number` of a file.
    pub(crate) fn table(&self, name: &str) -> Option<Table> {
        self.text(name).map(|text| Table::parse(&text))
    }

    /// The number in a file, `unlimited` where it says `max`.
    pub(super) fn number(&self, name: &str, unlimited: u64) -> Option<u64> {
        text::number(&self.text(name)?, unlimited)
    }

    /// The sizes of huge pages, `2MB`, that have a file `hugetlb.SIZE.FILE`.
    pub(super) fn huge_page_sizes(&self, file: &str) -> Vec<String> {
        let entries = fs::read_dir(&self.0).into_iter().flatten().flatten();
        let mut sizes: Vec<String> = entries
            .filter_map(|entry| text::huge_page_size(entry.file_name().to_str()?, file))
            .collect();
        sizes.sort_unstable();
        sizes
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const V1_TOGETHER: &str = "\
22 1 8:1 / / rw - ext4 /dev/sda1 rw
31 23 0:28 / /sys/fs/cgroup ro shared:9 - tmpfs tmpfs ro,mode=755
32 31 0:29 / /sys/fs/cgroup/unified rw shared:10 - cgroup2 cgroup2 rw
33 31 0:30 / /sys/fs/cgroup/systemd rw shared:11 - cgroup cgroup rw,xattr,name=systemd
34 31 0:31 / /sys/fs/cgroup/cpu,cpuacct rw shared:12 - cgroup cgroup rw,cpu,cpuacct
35 31 0:32 / /sys/fs/cgroup/memory rw shared:13 - cgroup cgroup rw,memory
";
    const V2: &str =
        "30 23 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n";

    fn v1(cgroups: &str, mounts: &str) -> HashMap<String, Folder> {
        match Cgroup::find(cgroups, mounts) {
            Some(Cgroup::V1(controllers)) => controllers,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn controllers_may_share_a_mount_and_a_hybrid_node_is_version_1() {
        let of = v1(
            "5:memory:/kubepods/pod1/a\n4:cpu,cpuacct:/kubepods/pod1/a\n1:name=systemd:/a\n0::/a\n",
            V1_TOGETHER,
        );
        let cpu = Folder::new("/sys/fs/cgroup/cpu,cpuacct/kubepods/pod1/a");
        assert_eq!(of["cpu"], cpu);
        assert_eq!(of["cpuacct"], cpu);
        assert_eq!(
            of["memory"],
            Folder::new("/sys/fs/cgroup/memory/kubepods/pod1/a")
        );
        assert!(!of.contains_key("pids"));
    }

    #[test]
    fn version_1_mounts_apart_are_told_apart() {
        let mounts = "\
32 31 0:29 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu
33 31 0:30 / /sys/fs/cgroup/cpuacct rw - cgroup cgroup rw,cpuacct
";
        let of = v1("2:cpuacct:/b\n1:cpu:/a\n0::/\n", mounts);
        assert_eq!(of["cpu"], Folder::new("/sys/fs/cgroup/cpu/a"));
        assert_eq!(of["cpuacct"], Folder::new("/sys/fs/cgroup/cpuacct/b"));
    }

    #[test]
    fn version_2_stays_version_2_beside_a_controller_that_has_no_metrics() {
        let mounts = format!("{V2}41 23 0:40 / /opt/net_cls rw - cgroup cgroup rw,net_cls\n");
        let path = "/kubepods.slice/cri-containerd-a:b.scope";
        let found = Cgroup::find(&format!("1:net_cls:/\n0::{path}\n"), &mounts);
        let folder = Folder::new(format!("/sys/fs/cgroup{path}"));
        assert_eq!(found, Some(Cgroup::V2(folder)));
    }

    #[test]
    fn a_mount_of_a_part_shows_only_that_part() {
        // As in a container with the host's cgroup namespace; the second mount hides what is above it.
        let mounts = "\
40 30 0:26 /docker/n1 /sys/fs/cgroup rw - cgroup2 cgroup rw
41 30 0:26 /docker/n1/x /mnt/with\\040space rw - cgroup2 cgroup rw
";
        let find = |path: &str| Cgroup::find(&format!("0::{path}\n"), mounts);
        let at = |path: &str| Some(Cgroup::V2(Folder::new(path)));
        assert_eq!(find("/docker/n1/a"), at("/sys/fs/cgroup/a"));
        assert_eq!(find("/docker/n1/x/b"), at("/sys/fs/cgroup/x/b"));
        assert_eq!(find("/docker/n12/a"), None);
        let hidden = &mounts[mounts.find("41").unwrap()..];
        assert_eq!(
            Cgroup::find("0::/docker/n1/x/b\n", hidden),
            at("/mnt/with space/b")
        );
    }

    #[test]
    fn what_is_outside_our_namespace_is_not_mistaken_for_something_in_it() {
        assert_eq!(Cgroup::find("0::/../other\n", V2), None);
        let above = V2.replace(" / /sys", " /../.. /sys");
        assert_eq!(Cgroup::find("0::/a\n", &above), None);
        assert_eq!(Cgroup::find("0::/a\n", "garbage\n"), None);
    }

    #[test]
    fn our_own_cgroup_is_found_on_this_machine() {
        let pid = std::process::id().cast_signed();
        if let Ok(own) = Cgroup::of(pid) {
            assert!(own.exists(), "{own:?}");
        }
        assert!(matches!(
            Cgroup::of(i32::MAX),
            Err(CgroupError::Read { .. })
        ));
    }
}
