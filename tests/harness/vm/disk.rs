//! What a machine boots from: an initramfs that finds the disk, and the disk, made of a node's root and the kernel's
//! modules. Both are read only; what a machine writes goes to a file of QEMU's that has no name.

use super::kernel::{Kernel, said};
use crate::{progress::Progress, root, root::Suite};
use anyhow::{Context, Result};
use nix::fcntl::{Flock, FlockArg};
use std::fs::{self, File};
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

const INIT: &str = include_str!("init.sh");

/// What of a root no machine reads: a third of it.
const LEFT_OUT: [&str; 7] = [
    "boot",
    "var/cache/apt",
    "var/lib/apt/lists",
    "usr/share/doc",
    "usr/share/info",
    "usr/share/locale",
    "usr/share/man",
];

/// Room for what the checks write; a sparse file takes none for it.
const SIZE: u64 = 2 << 30;

/// What it takes to see the disk. The kernel loads all others by itself, from there.
const EARLY: [&str; 2] = ["crc32c-intel", "virtio_blk"];

/// The files in the cache.
#[derive(Debug)]
pub(super) struct Disk {
    pub(super) kernel: PathBuf,
    pub(super) initramfs: PathBuf,
    pub(super) disk: PathBuf,
}

impl Disk {
    /// From the cache, else made of the root of `suite`.
    #[allow(
        clippy::disallowed_methods,
        reason = "the commit of a cached folder, made again when it is missing"
    )]
    pub(super) fn ready(suite: Suite) -> Result<Disk> {
        let root = root::node(suite)?;
        let kernel = Kernel::ready()?;
        let machines = root::cache().join("machines");
        fs::create_dir_all(&machines)?;
        let ready = machines.join(suite.name());
        let made_of = key(&root, &kernel)?;
        let lock = File::create(machines.join(format!("{}.lock", suite.name())))?;
        let _lock = Flock::lock(lock, FlockArg::LockExclusive).map_err(|(_, e)| e)?;
        if !fs::read_to_string(ready.join("key")).is_ok_and(|key| key == made_of) {
            let progress = Progress::start(&format!(
                "making a disk for the virtual machine with {} (once)",
                suite.name()
            ));
            let partial = ready.with_extension("partial");
            for old in [&partial, &ready] {
                super::remove(old)?;
            }
            make(&partial, &root, &kernel)?;
            fs::write(partial.join("key"), made_of)?;
            fs::rename(&partial, &ready)?;
            progress.done();
        }
        Ok(Disk {
            kernel: kernel.image(),
            initramfs: ready.join("initramfs"),
            disk: ready.join("disk"),
        })
    }
}

/// Another one means other files. A root that was made again is told by its stamp's age.
fn key(root: &Path, kernel: &Kernel) -> Result<String> {
    let stamp = fs::metadata(root.join(".recipe"))?;
    Ok(format!(
        "{}.{} {} {SIZE} {LEFT_OUT:?} {EARLY:?}\n{INIT}",
        stamp.mtime(),
        stamp.mtime_nsec(),
        kernel.version
    ))
}

fn make(to: &Path, root: &Path, kernel: &Kernel) -> Result<()> {
    let tree = to.join("tree");
    fs::create_dir_all(&tree)?;
    // Links, not copies; what is left out is only unlinked here.
    said(
        Command::new("cp")
            .args(["--archive", "--link"])
            .arg(root.join("."))
            .arg(&tree),
    )?;
    for path in LEFT_OUT {
        let path = tree.join(path);
        super::remove(&path)?;
        fs::create_dir(&path)?;
    }
    let modules = tree.join("usr/lib/modules").join(&kernel.version);
    fs::create_dir_all(modules.join(".."))?;
    said(
        Command::new("cp")
            .args(["--archive"])
            .args([kernel.modules(), modules.clone()]),
    )?;
    let busybox = tree.join("usr/bin/busybox");
    said(
        Command::new(&busybox)
            .args(["depmod", "-b"])
            .args([&tree.join("usr"), Path::new(&kernel.version)]),
    )?;
    symlink("../bin/busybox", tree.join("usr/sbin/modprobe"))
        .context("giving the machine a modprobe")?;
    initramfs(to, &busybox, &modules)?;
    let disk = to.join("disk");
    File::create(&disk)?.set_len(SIZE)?;
    // No journal: nobody reads this disk after a crash.
    said(
        Command::new("mkfs.ext4")
            .args(["-q", "-O", "^has_journal", "-d"])
            .args([&tree, &disk]),
    )?;
    super::remove(&tree)
}

fn initramfs(to: &Path, busybox: &Path, modules: &Path) -> Result<()> {
    let tree = to.join("initramfs.tree");
    for folder in ["bin", "modules", "proc", "sys", "dev", "root"] {
        fs::create_dir_all(tree.join(folder))?;
    }
    fs::copy(busybox, tree.join("bin/busybox"))?;
    symlink("busybox", tree.join("bin/sh"))?;
    fs::write(tree.join("init"), INIT)?;
    fs::set_permissions(tree.join("init"), fs::Permissions::from_mode(0o755))?;
    for (number, module) in load_order(modules)?.iter().enumerate() {
        let name = module.file_name().unwrap_or_default().to_string_lossy();
        fs::copy(
            modules.join(module),
            tree.join(format!("modules/{number:02}-{name}")),
        )?;
    }
    let archive = File::create(to.join("initramfs"))?;
    let names = said(Command::new("find").arg(".").current_dir(&tree))?;
    let mut cpio = Command::new("cpio")
        .args(["--quiet", "--create", "--format=newc", "--owner=0:0"])
        .current_dir(&tree)
        .stdin(Stdio::piped())
        .stdout(archive)
        .spawn()
        .context("starting cpio: run `make deps`, which installs it")?;
    if let Some(mut stdin) = cpio.stdin.take() {
        std::io::Write::write_all(&mut stdin, names.as_bytes())?;
    }
    let status = cpio.wait()?;
    anyhow::ensure!(
        status.success(),
        "cpio could not write {} ({status})",
        to.join("initramfs").display()
    );
    super::remove(&tree)
}

/// The early modules, each after those it needs.
fn load_order(modules: &Path) -> Result<Vec<PathBuf>> {
    let table = modules.join("modules.dep");
    let text =
        fs::read_to_string(&table).with_context(|| format!("reading {}", table.display()))?;
    let mut order: Vec<PathBuf> = Vec::new();
    for name in EARLY {
        // What is not a module is part of the kernel.
        let Some((module, needs)) = text
            .lines()
            .filter_map(|line| line.split_once(':'))
            .find(|(module, _)| module.contains(&format!("/{name}.ko")))
        else {
            continue;
        };
        // modules.dep lists what is needed from the near to the far.
        for one in needs.split_whitespace().rev().chain([module]) {
            if !order.iter().any(|known| known == Path::new(one)) {
                order.push(one.into());
            }
        }
    }
    Ok(order)
}
