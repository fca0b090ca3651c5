//! Debian's kernel for virtual machines, fetched with an apt that knows nothing of the host's packages.

use crate::{progress::Progress, root};
use anyhow::{Context, Result, bail, ensure};
use nix::fcntl::{Flock, FlockArg};
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;

/// A stable release's, whatever the node's root is made of: it boots within seconds and does not move on.
const SUITE: &str = "trixie";
const PACKAGE: &str = "linux-image-cloud-amd64";

/// An unpacked kernel package in the cache.
#[derive(Debug)]
pub(super) struct Kernel {
    /// As `uname -r` tells it.
    pub(super) version: String,
    /// The package's files.
    pub(super) root: PathBuf,
}

impl Kernel {
    /// From the cache, else fetched into it: 45 MB.
    pub(super) fn ready() -> Result<Kernel> {
        let kernels = root::cache().join("kernels");
        fs::create_dir_all(&kernels).with_context(|| {
            format!(
                "making the cache folder {}: run as root, or set REKINDLE_CACHE",
                kernels.display()
            )
        })?;
        let ready = kernels.join(SUITE);
        let lock = File::create(kernels.join(format!("{SUITE}.lock")))?;
        let _lock = Flock::lock(lock, FlockArg::LockExclusive).map_err(|(_, e)| e)?;
        if !ready.is_dir() {
            fetch(&ready)?;
        }
        let modules = ready.join("usr/lib/modules");
        let version = fs::read_dir(&modules)
            .and_then(|mut entries| entries.next().transpose())
            .with_context(|| format!("reading the kernel's folder {}", modules.display()))?
            .with_context(|| format!("{} holds no kernel's modules", modules.display()))?;
        Ok(Kernel {
            version: version.file_name().to_string_lossy().into_owned(),
            root: ready,
        })
    }

    pub(super) fn image(&self) -> PathBuf {
        self.root.join(format!("boot/vmlinuz-{}", self.version))
    }

    pub(super) fn modules(&self) -> PathBuf {
        self.root.join("usr/lib/modules").join(&self.version)
    }
}

#[allow(
    clippy::disallowed_methods,
    reason = "the commit of a cached package; it needs no crash safety, an unfinished one is fetched again"
)]
fn fetch(ready: &Path) -> Result<()> {
    let progress = Progress::start("fetching a kernel for the virtual machine (once)");
    let work = ready.with_extension("partial");
    super::remove(&work)?;
    let unpacked = work.join("unpacked");
    for folder in ["lists/partial", "archives/partial", "unpacked"] {
        fs::create_dir_all(work.join(folder))?;
    }
    let mirror =
        std::env::var("REKINDLE_MIRROR").unwrap_or_else(|_| "http://deb.debian.org/debian".into());
    // Its keyring comes with debootstrap, on Ubuntu too.
    fs::write(
        work.join("sources.list"),
        format!(
            "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] {mirror} {SUITE} main\n"
        ),
    )?;
    let apt = |program: &str, arguments: &[&str]| -> Result<String> {
        let mut command = Command::new(program);
        for (key, value) in [
            ("Dir::Etc::SourceList", work.join("sources.list")),
            ("Dir::Etc::SourceParts", "/dev/null".into()),
            ("Dir::State::Lists", work.join("lists")),
            ("Dir::State::Status", "/dev/null".into()),
            ("Dir::Cache", work.clone()),
            ("APT::Architecture", "amd64".into()),
            // Its own user may not write into our folder.
            ("APT::Sandbox::User", "root".into()),
            ("Acquire::Languages", "none".into()),
            ("Acquire::Retries", "3".into()),
        ] {
            command.arg("-o").arg(format!("{key}={}", value.display()));
        }
        said(command.args(arguments).current_dir(&work))
    };
    progress.step("the list of packages");
    apt("apt-get", &["-q", "update"])?;
    let depends = apt("apt-cache", &["depends", PACKAGE])?;
    let package = depends
        .lines()
        .find_map(|line| line.trim().strip_prefix("Depends: "))
        .with_context(|| format!("{PACKAGE} of {SUITE} depends on no kernel:\n{depends}"))?;
    progress.step(package);
    apt("apt-get", &["-q", "download", package])?;
    let archive = fs::read_dir(&work)?
        .flatten()
        .map(|entry| entry.path())
        .find(|path| path.extension().is_some_and(|end| end == "deb"))
        .with_context(|| format!("apt fetched no file for {package}"))?;
    said(
        Command::new("dpkg-deb")
            .arg("-x")
            .args([&archive, &unpacked]),
    )?;
    fs::rename(&unpacked, ready)?;
    super::remove(&work)?;
    progress.done();
    Ok(())
}

/// What a program that must succeed wrote to stdout.
pub(super) fn said(command: &mut Command) -> Result<String> {
    let name = command.get_program().to_string_lossy().into_owned();
    let out = match command.output() {
        Ok(out) => out,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
            bail!("{name} is missing: run `make deps`, which installs it")
        }
        Err(e) => return Err(e).with_context(|| format!("starting {name}")),
    };
    ensure!(
        out.status.success(),
        "{command:?} ended with {}: {}",
        out.status,
        String::from_utf8_lossy(&out.stderr).trim()
    );
    Ok(String::from_utf8_lossy(&out.stdout).into_owned())
}
