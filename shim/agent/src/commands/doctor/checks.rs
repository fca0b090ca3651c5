//! The checks, in the order in which a node is put together.

use std::{
    env, fs, io,
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    process::Output,
    time::Duration,
};

use rekindle_checkpoint::image::require_memory;
use rekindle_core::{
    config::{ImageKey, Memory, NodeConfig, Paging},
    paths,
};
use rustix::fs::statvfs;
use tokio::{process::Command, time::timeout};

use super::{Check, DoctorArgs, apiserver, cri, tiers};
use crate::{containerd::Containerd, keys, output};

/// No program that is asked for its version needs longer, and `criu check` takes milliseconds.
pub(super) const PATIENCE: Duration = Duration::from_secs(10);
/// Below this a store is as good as full: one PyTorch process makes an image of about half of it.
const LITTLE_SPACE: u64 = 1 << 30;

pub(super) async fn all(args: &DoctorArgs, config: &NodeConfig) -> Vec<Check> {
    let mut checks = vec![
        root(),
        containerd(args).await,
        cri::check(&args.containerd_config),
        shim(),
    ];
    checks.push(versioned("runc", (1, 1), "1.1", "install runc 1.1 or newer").await);
    let criu = versioned("criu", (4, 1), "4.1", "install CRIU 4.1 or newer").await;
    let kernel = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let criu = on_kernel(criu, kernel.trim());
    let usable = criu.state != super::State::Failed;
    checks.push(criu);
    if usable {
        checks.push(criu_check().await);
        checks.push(lazy_pages(config.restore.paging).await);
    }
    checks.push(store("datasets.root", &config.datasets.root));
    checks.push(store("images.root", &config.images.root));
    checks.extend(config.images.memory.as_ref().map(memory));
    checks.push(sources(config));
    checks.extend(config.images.keys.iter().map(image_key));
    for tier in &config.images.tiers {
        checks.push(tiers::check(config, tier).await);
    }
    checks.push(agent(Path::new(paths::AGENT_SOCKET), config));
    checks.push(apiserver::check(&config.kubernetes).await);
    checks.extend(gpu(Path::new("/dev")));
    checks
}

fn root() -> Check {
    match rustix::process::geteuid() {
        id if id.is_root() => Check::passed("root", "running as root"),
        id => Check::failed(
            "root",
            format!("running as uid {}", id.as_raw()),
            "run it with sudo",
        ),
    }
}

async fn containerd(args: &DoctorArgs) -> Check {
    const NAME: &str = "containerd";
    let asked = async { Containerd::connect(&args.address).await?.version().await };
    match timeout(PATIENCE, asked).await {
        Ok(Ok(version)) => match numbers(&version) {
            Some(found) if found < (1, 7) => Check::failed(
                NAME,
                format!("version {version}"),
                "install containerd 1.7 or newer",
            ),
            _ => Check::passed(
                NAME,
                format!("version {version} at {}", args.address.display()),
            ),
        },
        Ok(Err(error)) => Check::failed(
            NAME,
            format!("{error:#}"),
            "start containerd, or name its socket with --address",
        ),
        Err(_) => Check::failed(
            NAME,
            format!("no answer within {}s", PATIENCE.as_secs()),
            "look at containerd's log",
        ),
    }
}

fn shim() -> Check {
    const SHIM: &str = "containerd-shim-rekindle-v1";
    let beside = env::current_exe()
        .ok()
        .and_then(|exe| Some(exe.parent()?.join(SHIM)));
    let usual = Path::new(paths::CLI_BINARY)
        .parent()
        .map(|folder| folder.join(SHIM));
    match [beside, usual]
        .into_iter()
        .flatten()
        .find(|path| path.exists())
    {
        Some(path) => Check::passed("shim", path.display().to_string()),
        None => Check::failed(
            "shim",
            format!("no {SHIM} beside this program nor in /opt/rekindle/bin"),
            "install both programs into /opt/rekindle/bin",
        ),
    }
}

async fn output_of(program: &str, args: &[&str]) -> Result<Output, String> {
    let mut command = Command::new(program);
    command.args(args).kill_on_drop(true);
    match timeout(PATIENCE, command.output()).await {
        Ok(Ok(output)) => Ok(output),
        Ok(Err(e)) if e.kind() == io::ErrorKind::NotFound => Err(format!("no {program} on PATH")),
        Ok(Err(e)) => Err(format!("running {program}: {e}")),
        Err(_) => Err(format!(
            "{program} {} did not end within {}s",
            args.join(" "),
            PATIENCE.as_secs()
        )),
    }
}

async fn versioned(program: &'static str, least: (u32, u32), shown: &str, advice: &str) -> Check {
    let output = match output_of(program, &["--version"]).await {
        Ok(output) => output,
        Err(reason) => return Check::failed(program, reason, advice),
    };
    let text = String::from_utf8_lossy(&output.stdout);
    let line = text.lines().next().unwrap_or("").trim().to_owned();
    match numbers(&line) {
        Some(found) if found >= least => Check::passed(program, line),
        Some(_) => Check::failed(
            program,
            format!("{line}, {shown} or newer is needed"),
            advice,
        ),
        None => Check::failed(
            program,
            format!("its version cannot be read from {line:?}"),
            advice,
        ),
    }
}

/// The first `major.minor` in a text: `runc version 1.3.6` → (1, 3).
fn numbers(text: &str) -> Option<(u32, u32)> {
    text.split(|c: char| c.is_whitespace() || c == 'v')
        .find_map(|word| {
            let mut parts = word.split(['.', '-', '+', '~']);
            Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
        })
}

/// Kernels since about 6.16 refuse an option that CRIU before 4.2 sets on every TCP socket (`SO_PASSCRED`).
fn on_kernel(criu: Check, kernel: &str) -> Check {
    let refuses = numbers(kernel).is_some_and(|kernel| kernel >= (6, 16));
    let asks = numbers(&criu.found).is_some_and(|criu| criu < (4, 2));
    if criu.state == super::State::Passed && refuses && asks {
        return Check::noted(
            criu.name,
            format!("{}, under Linux {kernel}", criu.found),
            "install CRIU 4.2 or newer: this one cannot dump a TCP socket under Linux 6.16 or newer",
        );
    }
    criu
}

async fn criu_check() -> Check {
    const NAME: &str = "criu check";
    const ADVICE: &str = "run `criu check` as root and follow what it says";
    match output_of("criu", &["check"]).await {
        Ok(output) if output.status.success() => {
            Check::passed(NAME, "this kernel has what CRIU needs")
        }
        Ok(output) => Check::failed(NAME, last_line(&output), ADVICE),
        Err(reason) => Check::failed(NAME, reason, ADVICE),
    }
}

async fn lazy_pages(paging: Paging) -> Check {
    const NAME: &str = "lazy restore";
    let can = matches!(
        output_of("criu", &["check", "--feature", "uffd-noncoop"]).await,
        Ok(output) if output.status.success()
    );
    let without = "this kernel has no non-cooperative userfaultfd";
    match (can, paging) {
        (true, _) => Check::passed(NAME, "the kernel can (userfaultfd)"),
        (false, Paging::Lazy) => Check::failed(
            NAME,
            without,
            "set restore.paging to auto or eager, or use another kernel",
        ),
        (false, _) => Check::noted(NAME, without, "containers are restored eagerly"),
    }
}

fn last_line(output: &Output) -> String {
    let text = String::from_utf8_lossy(&output.stderr);
    let line = text
        .lines()
        .rfind(|line| !line.trim().is_empty())
        .unwrap_or("no reason given");
    line.chars().take(200).collect()
}

fn store(name: &'static str, root: &Path) -> Check {
    // A root that is not there yet is made when it is first needed; its nearest parent must allow it.
    let folder = root
        .ancestors()
        .find(|path| path.is_dir())
        .unwrap_or(Path::new("/"));
    if let Err(e) = probe(folder) {
        return Check::failed(
            name,
            format!("writing to {}: {e}", folder.display()),
            "run as root, or set another root in the configuration",
        );
    }
    let free = match statvfs(folder) {
        Ok(stat) => stat.f_bavail.saturating_mul(stat.f_frsize),
        Err(e) => {
            return Check::failed(
                name,
                format!("asking for the space of {}: {e}", folder.display()),
                "look at the file system",
            );
        }
    };
    let found = format!("{}, {} free", root.display(), output::bytes(free));
    if free < LITTLE_SPACE {
        Check::noted(
            name,
            found,
            "free some space, or set another root in the configuration",
        )
    } else {
        Check::passed(name, found)
    }
}

/// Images in memory: elsewhere they would be a second copy on a disk.
fn memory(memory: &Memory) -> Check {
    const NAME: &str = "images.memory";
    if let Err(error) = require_memory(&memory.root) {
        return Check::failed(
            NAME,
            format!("{error}; images are made on the disk"),
            "set images.memory.root to a folder on a tmpfs, such as /run/rekindle/images",
        );
    }
    let check = store(NAME, &memory.root);
    let there = memory.root.ancestors().find(|path| path.is_dir());
    let total = there.and_then(|folder| statvfs(folder).ok());
    let total = total.map_or(0, |stat| stat.f_blocks.saturating_mul(stat.f_frsize));
    // A ramfs says nothing of its size.
    if check.state != super::State::Failed && total > 0 && memory.quota > total {
        return Check::noted(
            NAME,
            format!(
                "images may take {}, and the tmpfs of {} has {}",
                output::bytes(memory.quota),
                memory.root.display(),
                output::bytes(total)
            ),
            "mount a larger tmpfs there (size=), or set a smaller images.memory.quota",
        );
    }
    check
}

/// Whether a file can be made in `folder`: permission bits do not tell of read-only mounts.
fn probe(folder: &Path) -> io::Result<()> {
    let file: PathBuf = folder.join(format!(".rekindle-doctor-{}", std::process::id()));
    fs::OpenOptions::new()
        .write(true)
        .create_new(true)
        .open(&file)?;
    fs::remove_file(&file)
}

fn sources(config: &NodeConfig) -> Check {
    match config.datasets.sources.len() {
        0 => Check::noted(
            "dataset sources",
            "none is allowed: every pod that asks for a dataset is refused",
            format!("add [[datasets.source]] to {}", paths::CONFIG_FILE),
        ),
        n => Check::passed("dataset sources", format!("{n} allowed")),
    }
}

/// A key that cannot be read is told by the first checkpoint otherwise, or by the restore that needs it.
fn image_key(key: &ImageKey) -> Check {
    const NAME: &str = "image key";
    let (id, of) = (&key.id, key.namespaces.join(", "));
    match keys::read(key) {
        Ok(_) if of.is_empty() => Check::noted(
            NAME,
            format!("{id} is for no namespace"),
            "name some: namespaces = [\"team-a\"]",
        ),
        Ok(_) => Check::passed(NAME, format!("{id} encrypts and opens images of {of}")),
        Err(error) => Check::failed(
            NAME,
            format!("{id}: {error:#}"),
            "until it can be read, images of its namespaces can be neither made nor opened",
        ),
    }
}

/// Nothing waits for the agent, so nobody else says that it is missing.
fn agent(socket: &Path, config: &NodeConfig) -> Check {
    const NAME: &str = "agent";
    const ADVICE: &str =
        "systemctl enable --now rekindle-agent, or `rekindle agent --once` by a timer";
    let Err(error) = UnixStream::connect(socket) else {
        return Check::passed(NAME, format!("answers at {}", socket.display()));
    };
    let missed = if config.images.memory.is_some() {
        "images that were made in memory do not reach the disk, and are lost when the node goes down"
    } else if !config.images.tiers.is_empty() {
        "images that are made here do not reach their tier"
    } else {
        "[images.retention] is not applied, and what killed programs leave stays"
    };
    Check::noted(
        NAME,
        format!("none at {} ({error}): {missed}", socket.display()),
        ADVICE,
    )
}

fn gpu(dev: &Path) -> Option<Check> {
    dev.join("nvidiactl").exists().then(|| {
        Check::noted(
            "NVIDIA devices",
            "found",
            "this build has no GPU support: containers with GPU devices run, and are refused for a checkpoint",
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::commands::doctor::State;

    #[test]
    fn versions_are_read_as_the_programs_print_them() {
        for (text, version) in [
            ("runc version 1.3.6", (1, 3)),
            ("runc version 1.1.15+ds1", (1, 1)),
            ("Version: 4.2", (4, 2)),
            ("v2.1.9", (2, 1)),
            ("1.7.24~ds1", (1, 7)),
        ] {
            assert_eq!(numbers(text), Some(version), "{text}");
        }
        assert_eq!(numbers("no number"), None);
    }

    #[test]
    fn a_criu_that_cannot_dump_tcp_sockets_on_this_kernel_is_told_of() {
        let state = |criu: &str, kernel: &str| on_kernel(Check::passed("criu", criu), kernel).state;
        assert_eq!(state("Version: 4.1.1", "6.18.5-amd64"), State::Noted);
        assert_eq!(state("Version: 4.1.1", "6.16-rc1"), State::Noted);
        assert_eq!(
            state("Version: 4.1.1", "6.12.48+deb13-amd64"),
            State::Passed
        );
        assert_eq!(state("Version: 4.2", "6.18.5-amd64"), State::Passed);
        let failed = Check::failed("criu", "Version: 4.0, 4.1 or newer is needed", "");
        assert_eq!(on_kernel(failed, "6.18.5").state, State::Failed);
    }

    #[test]
    fn a_key_is_tried() {
        let key = |command: &[&str], namespaces: &[&str]| ImageKey {
            id: "a".to_owned(),
            namespaces: namespaces.iter().map(|&name| name.to_owned()).collect(),
            file: None,
            command: Some(command.iter().map(|&word| word.to_owned()).collect()),
        };
        let digits = "ab".repeat(32);
        for (command, namespaces, state, words) in [
            (
                &["/bin/echo", &digits][..],
                &["team-a"][..],
                State::Passed,
                "team-a",
            ),
            (&["/bin/echo", &digits], &[], State::Noted, "no namespace"),
            (
                &["/bin/echo", "short"],
                &["team-a"],
                State::Failed,
                "no key",
            ),
            (
                &["/bin/false"],
                &["team-a"],
                State::Failed,
                "exit status: 1",
            ),
            (
                &["/no/such/program"],
                &["team-a"],
                State::Failed,
                "starting /no/such/program",
            ),
        ] {
            let check = image_key(&key(command, namespaces));
            assert!(
                check.state == state && check.found.contains(words),
                "{check:?}"
            );
            assert!(!check.found.contains(&digits), "{check:?}");
        }
    }

    #[test]
    fn a_root_that_is_not_there_yet_is_judged_by_its_parent() {
        let folder = tempfile::tempdir().unwrap();
        let check = store("images.root", &folder.path().join("a/b"));
        assert_ne!(check.state, State::Failed, "{check:?}");
        assert_eq!(
            fs::read_dir(folder.path()).unwrap().count(),
            0,
            "nothing is left behind"
        );
    }

    #[test]
    fn memory_for_images_has_to_be_memory_and_enough() {
        let of = |root: &Path, quota: u64| Memory {
            quota,
            ..Memory::to_read(root)
        };
        let shm = tempfile::tempdir_in("/dev/shm").unwrap();
        let check = memory(&of(&shm.path().join("images"), 1 << 20));
        assert_ne!(check.state, State::Failed, "{check:?}");
        let check = memory(&of(shm.path(), 1 << 60));
        assert!(
            check.state == State::Noted && check.found.contains("images may take"),
            "{check:?}"
        );
        // Of a program's folder nobody can say that it is in memory.
        let check = memory(&of(Path::new("/proc"), 1));
        assert!(
            check.state == State::Failed && check.found.contains("is not in memory"),
            "{check:?}"
        );
    }

    #[test]
    fn an_agent_that_is_missing_is_told_of_with_what_that_costs() {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("agent.sock");
        let of = |text: &str| agent(&socket, &NodeConfig::parse("test", text).unwrap());
        let memory = of("[images.memory]\nquota = \"1GiB\"\n");
        assert!(memory.state == State::Noted && memory.found.contains("do not reach the disk"));
        let tier = of("[[images.tier]]\nurl = \"s3://bucket/\"\nnamespaces = [\"a\"]\n");
        assert!(tier.found.contains("do not reach their tier"), "{tier:?}");
        assert!(of("").found.contains("[images.retention]"));
        let _listening = std::os::unix::net::UnixListener::bind(&socket).unwrap();
        assert_eq!(of("").state, State::Passed);
    }

    #[test]
    fn a_gpu_is_told_of() {
        let folder = tempfile::tempdir().unwrap();
        assert!(gpu(folder.path()).is_none());
        fs::write(folder.path().join("nvidiactl"), "").unwrap();
        assert_eq!(gpu(folder.path()).unwrap().state, State::Noted);
    }
}
