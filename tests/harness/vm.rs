//! A node as a virtual machine: Debian's kernel, unified cgroup v2, systemd, and an errand to be run there.
//!
//! ```text
//! test process ──▶ QEMU (emulation)  vda: the root, read only   vdb: what the errand needs, an unnamed file
//!      ▲              └─▶ kernel ─▶ init.sh ─▶ systemd ─▶ errand.service: a story, or this test program once more
//!      │                                         └─▶ containerd.service
//!      └── serial console: PASS name | FAIL name reason | test name ... ok | anything else
//! ```
//!
//! The host's kernel decides which cgroup version a [`crate::Node`] sees, and the machines that build this have version 1.
//! Clusters have version 2. Emulated, so that no host's missing KVM matters: about ten times slower than the host.

mod console;
mod disk;
mod errand;
mod kernel;

use crate::root::Suite;
use anyhow::{Context, Result, anyhow, bail};
use console::{Answer, Console};
use disk::Disk;
pub use errand::Errand;
use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::{Arc, OnceLock, mpsc};
use std::time::{Duration, Instant};

/// The longest errand takes some minutes on two slow cores that have nothing else to do. Who needs twenty hangs.
const DEADLINE: Duration = Duration::from_secs(1200);

/// An old processor: fewer instructions to emulate. QEMU 7.2 leaves the flags wrong after a CMPXCHG16B, which the kernel's allocator
/// executes all the time where there is one: sooner or later a process or the kernel dies of it.
const CPU: &str = "Nehalem,-cx16,+rdrand";

/// systemd begins with the errand and what it wants, and leaves the console to it. So does the kernel, unless it dies.
const CMDLINE: &str = "console=ttyS0 loglevel=3 panic=-1 TERM=dumb systemd.show_status=no systemd.hostname=machine \
                       systemd.unit=errand.service";

/// A machine on an errand. It dies with this process at the latest, also when that is killed.
#[derive(Debug)]
pub struct Machine {
    console: Arc<Console>,
    booted: Instant,
}

impl Machine {
    /// The machine of this program, which the first who asks boots for an errand.
    pub fn of_this_program(errand: impl FnOnce() -> Result<Errand>) -> Result<&'static Machine> {
        static MACHINE: OnceLock<Result<Machine, String>> = OnceLock::new();
        let boot = || Machine::boot(Suite::from_env()?, &errand()?);
        MACHINE
            .get_or_init(|| boot().map_err(|e| format!("{e:#}")))
            .as_ref()
            .map_err(|e| anyhow!("{e}"))
    }

    /// Boots a machine with the root of `suite`. Answers as soon as QEMU runs.
    fn boot(suite: Suite, errand: &Errand) -> Result<Machine> {
        let disk = Disk::ready(suite)?;
        let payload = errand.pack()?;
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

    /// Waits for what is said of `check` there.
    pub fn verdict(&self, check: &str) -> Result<()> {
        let left = DEADLINE.saturating_sub(self.booted.elapsed());
        match self.console.wait(check, left) {
            Answer::Verdict(verdict) => verdict.map_err(|reason| anyhow!("{reason}")),
            Answer::Silence { over: true, tail } => {
                bail!("the machine ended and said nothing of {check}\n{tail}")
            }
            Answer::Silence { over: false, tail } => bail!(
                "{} s after its start the machine has said nothing of {check}\n{tail}",
                DEADLINE.as_secs()
            ),
        }
    }
}

/// What becomes of a test of this program in a machine; `None` where no machine is wanted, and it is to be run.
pub fn instead(test: &str) -> Option<Result<()>> {
    let wanted = std::env::var("REKINDLE_NODE").is_ok_and(|node| node == "machine");
    wanted.then(|| Machine::of_this_program(Errand::this_program)?.verdict(test))
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
        .args(["-machine", "q35", "-accel", "tcg", "-cpu", CPU])
        // One processor: with two, QEMU 7.2 can go on with an instruction that the kernel has replaced on the other one
        // (the int3 with which it changes its own code), and the kernel dies of it.
        .args(["-smp", "1", "-m", "1536"])
        .args(["-nodefaults", "-display", "none", "-no-reboot"])
        .args(["-serial", "stdio"])
        .args(["-drive", &drive(&disk.disk, "snapshot=on,cache=unsafe")])
        .args(["-drive", &drive(&payload, "readonly=on")])
        .arg("-kernel")
        .arg(&disk.kernel)
        .arg("-initrd")
        .arg(&disk.initramfs)
        .args(["-append", CMDLINE])
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

fn temporary() -> PathBuf {
    std::env::var_os("REKINDLE_TMP").map_or_else(|| "/var/tmp".into(), PathBuf::from)
}

/// Removes a folder with all that is in it; one that is not there is fine.
pub(crate) fn remove(folder: &Path) -> Result<()> {
    match fs::remove_dir_all(folder) {
        Err(e) if e.kind() != std::io::ErrorKind::NotFound => {
            Err(e).with_context(|| format!("removing {}", folder.display()))
        }
        _ => Ok(()),
    }
}
