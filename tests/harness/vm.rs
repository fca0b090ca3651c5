//! A node as a virtual machine: Debian's kernel, unified cgroup v2, and a story that runs in it.
//!
//! ```text
//! test process ──▶ QEMU (emulation)  vda: the root, read only   vdb: payload, an unnamed file
//!      ▲              └─▶ kernel ─▶ init.sh ─▶ boot.sh ─▶ containerd, story.sh
//!      └── serial console: PASS name | FAIL name reason | anything else
//! ```
//!
//! The host's kernel decides which cgroup version a [`crate::Node`] sees, and the machines that build this have version 1.
//! Clusters have version 2. Emulated, so that no host's missing KVM matters: about ten times slower than the host.

mod disk;
mod kernel;

use crate::{Image, root::Suite};
use anyhow::{Context, Result, anyhow, bail};
use disk::Disk;
use std::collections::HashMap;
use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::{Arc, Condvar, Mutex, PoisonError, mpsc};
use std::time::{Duration, Instant};
use tar::{Builder, Header};

/// The story takes two minutes on two slow cores that have nothing else to do. Who needs ten hangs.
const DEADLINE: Duration = Duration::from_secs(600);

const SHIM: &str = "containerd-shim-rekindle-v1";

/// An old processor: fewer instructions to emulate. QEMU 7.2 leaves the flags wrong after a CMPXCHG16B, which the kernel's allocator
/// executes all the time where there is one: sooner or later a process or the kernel dies of it.
const CPU: &str = "Nehalem,-cx16,+rdrand";

/// A machine that tells its story. It dies with this process at the latest, also when that is killed.
#[derive(Debug)]
pub struct Machine {
    console: Arc<Console>,
    booted: Instant,
}

/// What the machine has said so far.
#[derive(Debug, Default)]
struct Console {
    heard: Mutex<Heard>,
    more: Condvar,
}

#[derive(Debug, Default)]
struct Heard {
    lines: Vec<String>,
    /// By check; the error is its reason, and what was said since the check before.
    verdicts: HashMap<String, Result<(), String>>,
    /// How many lines there were at the last verdict.
    told: usize,
    over: bool,
}

impl Machine {
    /// Boots a node of `suite` that carries the programs under test and `image` (as `/run/payload/image.tar`), and runs
    /// `story` in it. Answers as soon as QEMU runs.
    pub fn boot(suite: Suite, image: &Image, story: &str) -> Result<Machine> {
        let disk = Disk::ready(suite)?;
        let payload = payload(image, story)?;
        let console = Arc::new(Console::default());
        let (started, start) = mpsc::channel();
        let listener = Arc::clone(&console);
        // The kernel ends QEMU when the thread that started it ends: it has to be this one, not a test's.
        std::thread::spawn(move || {
            let qemu = emulate(&disk, &payload);
            let (mut child, out) = match qemu {
                Ok(running) => running,
                Err(e) => return drop(started.send(Err(e))),
            };
            let _ = started.send(Ok(()));
            listener.listen(out);
            let _ = child.kill();
            let _ = child.wait();
            drop(payload);
        });
        start.recv().context("the machine's thread died")??;
        Ok(Machine {
            console,
            booted: Instant::now(),
        })
    }

    /// Waits for what the story says of `check`.
    pub fn verdict(&self, check: &str) -> Result<()> {
        let left = DEADLINE.saturating_sub(self.booted.elapsed());
        let heard = self
            .console
            .heard
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        let (heard, _) = self
            .console
            .more
            .wait_timeout_while(heard, left, |heard| {
                !heard.over && !heard.verdicts.contains_key(check)
            })
            .unwrap_or_else(PoisonError::into_inner);
        match heard.verdicts.get(check) {
            Some(Ok(())) => Ok(()),
            Some(Err(reason)) => Err(anyhow!("{reason}")),
            None if heard.over => bail!(
                "the machine ended and said nothing of {check}\n{}",
                heard.tail()
            ),
            None => bail!(
                "{} s after its start the machine has said nothing of {check}\n{}",
                DEADLINE.as_secs(),
                heard.tail()
            ),
        }
    }
}

impl Console {
    /// Notes every line until there are no more.
    fn listen(&self, out: ChildStdout) {
        let note = |change: &dyn Fn(&mut Heard)| {
            change(&mut self.heard.lock().unwrap_or_else(PoisonError::into_inner));
            self.more.notify_all();
        };
        for line in BufReader::new(out).split(b'\n').map_while(Result::ok) {
            let line = String::from_utf8_lossy(&line).trim_end().to_owned();
            note(&|heard| heard.note(&line));
        }
        note(&|heard| heard.over = true);
    }
}

impl Heard {
    fn note(&mut self, line: &str) {
        let mut words = line.splitn(3, ' ');
        let verdict = match (words.next(), words.next(), words.next()) {
            (Some("PASS"), Some(check), _) => Some((check, Ok(()))),
            (Some("FAIL"), Some(check), reason) => {
                let said = self.lines[self.told..].join("\n");
                let reason = reason.unwrap_or("it gave no reason");
                Some((check, Err(format!("{reason}\n{said}"))))
            }
            _ => None,
        };
        self.lines.push(line.to_owned());
        if let Some((check, verdict)) = verdict {
            self.told = self.lines.len();
            self.verdicts.insert(check.to_owned(), verdict);
        }
    }

    fn tail(&self) -> String {
        let from = self.lines.len().saturating_sub(40);
        format!("its console ends with\n{}", self.lines[from..].join("\n"))
    }
}

fn emulate(disk: &Disk, payload: &File) -> Result<(Child, ChildStdout)> {
    let drive =
        |path: &Path, how: &str| format!("file={},if=virtio,format=raw,{how}", path.display());
    // Without a name, the file is still there for those who know whose it is.
    let payload = PathBuf::from(format!(
        "/proc/{}/fd/{}",
        std::process::id(),
        payload.as_raw_fd()
    ));
    let mut child = Command::new("setpriv")
        .args(["--pdeathsig", "KILL", "qemu-system-x86_64"])
        .args(["-machine", "q35", "-accel", "tcg,thread=multi", "-cpu", CPU])
        .args(["-smp", "2", "-m", "1536"])
        .args(["-nodefaults", "-display", "none", "-no-reboot"])
        .args(["-serial", "stdio"])
        .args(["-drive", &drive(&disk.disk, "snapshot=on,cache=unsafe")])
        .args(["-drive", &drive(&payload, "readonly=on")])
        .arg("-kernel")
        .arg(&disk.kernel)
        .arg("-initrd")
        .arg(&disk.initramfs)
        .args(["-append", "console=ttyS0 quiet panic=-1"])
        .env("TMPDIR", temporary())
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        // Its own complaints belong to the console's.
        .stderr(std::io::stderr())
        .spawn()
        .context(
            "starting qemu-system-x86_64 with setpriv: run `make deps`, which installs them",
        )?;
    let out = child.stdout.take().context("QEMU has no stdout")?;
    Ok((child, out))
}

/// What changes from run to run, as an archive in a file without a name.
fn payload(image: &Image, story: &str) -> Result<File> {
    let folder = temporary();
    let file = tempfile::tempfile_in(&folder)
        .with_context(|| format!("making a file in {}", folder.display()))?;
    let mut archive = Builder::new(file);
    // busybox reads no sparse entries.
    archive.sparse(false);
    for (name, text) in [
        ("boot.sh", include_str!("vm/boot.sh")),
        ("containerd.toml", include_str!("vm/containerd.toml")),
        ("story.sh", story),
    ] {
        let mut header = Header::new_gnu();
        header.set_mode(0o644);
        header.set_size(text.len() as u64);
        archive.append_data(&mut header, name, text.as_bytes())?;
    }
    archive.append_path_with_name(&image.archive, "image.tar")?;
    let programs = crate::node::programs()?;
    for name in [SHIM, "rekindle"] {
        let program = programs.join(name);
        archive
            .append_path_with_name(&program, format!("opt/bin/{name}"))
            .with_context(|| format!("packing {}: run `make build`", program.display()))?;
    }
    let mut link = Header::new_gnu();
    link.set_entry_type(tar::EntryType::Symlink);
    link.set_size(0);
    link.set_mode(0o777);
    archive.append_link(
        &mut link,
        "opt/shadow/containerd-shim-runc-v2",
        format!("../bin/{SHIM}"),
    )?;
    let mut file = archive.into_inner()?;
    file.flush()?;
    Ok(file)
}

fn temporary() -> PathBuf {
    std::env::var_os("REKINDLE_TMP").map_or_else(|| "/var/tmp".into(), PathBuf::from)
}

/// Removes a folder with all that is in it; one that is not there is fine.
fn remove(folder: &Path) -> Result<()> {
    match fs::remove_dir_all(folder) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
            Err(e).with_context(|| format!("removing {}", folder.display()))
        }
        _ => Ok(()),
    }
}
