//! The Debian roots under the nodes and images: made once with debootstrap, then read only.

use crate::{node::machine, progress::Progress};
use anyhow::{Context, Result, bail, ensure};
use nix::fcntl::{Flock, FlockArg};
use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// A Debian release whose containerd, runc and CRIU a node runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Suite {
    /// containerd 2.1, runc 1.3, CRIU 4.2: the main target.
    Forky,
    /// containerd 1.7, runc 1.1, CRIU 4.1: the oldest that is supported.
    Trixie,
}

impl Suite {
    /// The release named by `NODE_SUITE`, forky if it names none.
    pub fn from_env() -> Result<Suite> {
        match std::env::var("NODE_SUITE").as_deref() {
            Err(_) | Ok("" | "forky") => Ok(Suite::Forky),
            Ok("trixie") => Ok(Suite::Trixie),
            Ok(other) => {
                bail!("NODE_SUITE is {other:?}, which no node can be made of: use forky or trixie")
            }
        }
    }

    /// Debian's name of it.
    pub fn name(self) -> &'static str {
        match self {
            Suite::Forky => "forky",
            Suite::Trixie => "trixie",
        }
    }

    /// The least versions, as the programs print them. The release moves on; less than this was never tested.
    fn minimums(self) -> [(&'static str, [u32; 2]); 3] {
        match self {
            Suite::Forky => [("containerd", [2, 1]), ("runc", [1, 3]), ("criu", [4, 2])],
            Suite::Trixie => [("containerd", [1, 7]), ("runc", [1, 1]), ("criu", [4, 1])],
        }
    }
}

const NODE_PACKAGES: &str = "containerd,runc,criu,iptables,iproute2,ca-certificates,procps,\
                             containernetworking-plugins,busybox-static,crun,systemd,dbus";
const TORCH_PACKAGES: &str =
    "python3-torch,python3-transformers,python3-tokenizers,python3-safetensors";

/// What nobody needs at run time: a third of the PyTorch root, and every byte of it would go into the image.
const TORCH_TRIM: [&str; 8] = [
    "var/cache/apt",
    "var/lib/apt/lists",
    "usr/share/doc",
    "usr/share/locale",
    "usr/share/man",
    "usr/include",
    "usr/lib/libtorch-test",
    "boot",
];

/// Where roots and images are kept between runs: `REKINDLE_CACHE`, else `/var/cache/rekindle-test`.
pub fn cache() -> PathBuf {
    std::env::var_os("REKINDLE_CACHE")
        .map_or_else(|| "/var/cache/rekindle-test".into(), PathBuf::from)
}

/// The root of a node, made on first use (about a minute).
pub fn node(suite: Suite) -> Result<PathBuf> {
    if machine::is_here() {
        return Ok("/".into());
    }
    let recipe = Recipe {
        name: format!("node-{}", suite.name()),
        suite,
        packages: NODE_PACKAGES,
        trim: &[],
    };
    let root = recipe.ready()?;
    for (program, minimum) in suite.minimums() {
        let found = version(&root, program)?;
        let mut parts = found
            .split(|c: char| !c.is_ascii_digit())
            .filter_map(|n| n.parse::<u32>().ok());
        let real = [parts.next().unwrap_or(0), parts.next().unwrap_or(0)];
        ensure!(
            real >= minimum,
            "the node root {} has {program} {found}, and {}.{} is the least that was tested: remove the folder, it is made \
             again from what {} has now",
            root.display(),
            minimum[0],
            minimum[1],
            suite.name()
        );
    }
    Ok(root)
}

/// A root with PyTorch and Transformers for the processor, trimmed for an image (two minutes).
pub fn torch() -> Result<PathBuf> {
    Recipe {
        name: "torch".into(),
        suite: Suite::Forky,
        packages: TORCH_PACKAGES,
        trim: &TORCH_TRIM,
    }
    .ready()
}

/// The version `program` of a root reports about itself: the first word of its output that starts with a digit.
pub fn version(root: &Path, program: &str) -> Result<String> {
    let out = Command::new("chroot")
        .arg(root)
        .args([program, "--version"])
        .output()
        .with_context(|| format!("asking {program} in {} for its version", root.display()))?;
    let text = String::from_utf8_lossy(&out.stdout);
    text.split_whitespace()
        .find(|word| word.starts_with(|c: char| c.is_ascii_digit()))
        .map(str::to_owned)
        .with_context(|| {
            format!(
                "{program} in {} did not tell its version: {text:?}",
                root.display()
            )
        })
}

/// What a root is made of. The finished root carries it, so that a changed recipe makes a new one.
struct Recipe {
    name: String,
    suite: Suite,
    packages: &'static str,
    trim: &'static [&'static str],
}

impl Recipe {
    fn ready(&self) -> Result<PathBuf> {
        let roots = cache().join("roots");
        let root = roots.join(&self.name);
        if self.is_made(&root) {
            return Ok(root);
        }
        fs::create_dir_all(&roots).with_context(|| {
            format!(
                "making the cache folder {}: run as root, or set REKINDLE_CACHE",
                roots.display()
            )
        })?;
        let lock = File::create(roots.join(format!("{}.lock", self.name)))?;
        let _lock = Flock::lock(lock, FlockArg::LockExclusive).map_err(|(_, e)| e)?;
        if !self.is_made(&root) {
            self.make(&root)?;
        }
        Ok(root)
    }

    fn stamp(&self) -> String {
        format!("{} {} {:?}\n", self.suite.name(), self.packages, self.trim)
    }

    fn is_made(&self, root: &Path) -> bool {
        fs::read_to_string(root.join(".recipe")).is_ok_and(|text| text == self.stamp())
    }

    #[allow(
        clippy::disallowed_methods,
        reason = "the commit of a root; it needs no crash safety, an unfinished one is made again"
    )]
    fn make(&self, root: &Path) -> Result<()> {
        ensure!(
            nix::unistd::geteuid().is_root(),
            "the root {} is missing and only root can make it: start the same with `sudo -E env PATH=\"$PATH\" …`",
            root.display()
        );
        let partial = root.with_extension("partial");
        for old in [&partial, root] {
            match fs::remove_dir_all(old) {
                Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
                    return Err(e)
                        .with_context(|| format!("removing the old root {}", old.display()));
                }
                _ => {}
            }
        }
        self.debootstrap(&partial)?;
        for path in self.trim {
            let path = partial.join(path);
            if path.is_dir() {
                fs::remove_dir_all(&path)?;
                fs::create_dir(&path)?;
            }
        }
        fs::write(partial.join(".recipe"), self.stamp())?;
        fs::rename(&partial, root)
            .with_context(|| format!("moving the finished root to {}", root.display()))
    }

    fn debootstrap(&self, target: &Path) -> Result<()> {
        let mirror = std::env::var("REKINDLE_MIRROR")
            .unwrap_or_else(|_| "http://deb.debian.org/debian".into());
        let progress = Progress::start(&format!("making the root {} (once)", self.name));
        // An older debootstrap has no script for the releases after it; they all use the one of sid.
        let mut child = Command::new("debootstrap")
            .args([
                "--variant=minbase",
                &format!("--include={}", self.packages),
                self.suite.name(),
            ])
            .arg(target)
            .args([mirror.as_str(), "/usr/share/debootstrap/scripts/sid"])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .context("starting debootstrap: run `make deps`, which installs it")?;
        let mut said = Vec::new();
        if let Some(out) = child.stdout.take() {
            for line in BufReader::new(out).lines().map_while(Result::ok) {
                progress.step(line.trim_start_matches("I: "));
                said.push(line);
            }
        }
        let status = child.wait()?;
        let tail = said[said.len().saturating_sub(5)..].join("\n");
        ensure!(
            status.success(),
            "debootstrap could not make {} from {mirror} ({status}):\n{tail}",
            target.display()
        );
        progress.done();
        Ok(())
    }
}
