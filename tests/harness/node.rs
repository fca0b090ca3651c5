//! One throwaway node: started, asked, restarted, gone.
//!
//! ```text
//! test process ──pipe──▶ keeper.sh (own mounts, own network)       cleans up when the pipe ends
//!                           └─▶ init.sh (own pids, cgroup, root)   dies with the keeper
//!                                  └─▶ containerd ─▶ shims ─▶ containers
//! ```
//!
//! A test process that runs in a virtual machine ([`crate::vm`]) has that for its node instead.

pub(crate) mod cgroup;
mod config;
mod keeper;
mod leftovers;
pub(crate) mod machine;
mod seed;

use crate::{Image, container, events::Events, poll, root, root::Suite};
use anyhow::{Context, Result, bail, ensure};
use containerd_client::Client;
use keeper::Keeper;
use std::fs;
use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::Duration;
use tokio::net::UnixListener;

/// The containerd namespace of everything that does not come through CRI.
pub const NAMESPACE: &str = "default";
/// CRI's own.
pub const CRI_NAMESPACE: &str = "k8s.io";
/// Where a node's programs look for others.
pub(crate) const PATH: &str = "/opt/rekindle/shadow:/opt/rekindle/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// The shim under test.
pub(crate) const SHIM: &str = "containerd-shim-rekindle-v1";
const S3_SERVER: &str = "rekindle-s3server";

/// Which shim answers to `io.containerd.runc.v2` on a node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Runtime {
    /// The one that containerd ships.
    Go,
    /// The one under test.
    Rekindle,
}

/// What a node is made of.
#[derive(Debug, Clone)]
pub struct NodeConfig {
    /// The shim behind `io.containerd.runc.v2`.
    pub runtime: Runtime,
    /// The release the root is made of.
    pub suite: Suite,
    /// `/etc/rekindle/config.toml`, where a test needs one.
    pub rekindle_toml: Option<String>,
    /// From where on containerd logs; at `debug` the shims do too.
    pub log_level: &'static str,
    /// The state containerd starts with: [`NodeConfig::with_image`].
    seed: Option<PathBuf>,
}

impl NodeConfig {
    /// A node with `runtime`, of the release that `NODE_SUITE` names.
    pub fn new(runtime: Runtime) -> Result<NodeConfig> {
        Ok(NodeConfig {
            runtime,
            suite: Suite::from_env()?,
            rekindle_toml: None,
            log_level: "info",
            seed: None,
        })
    }
}

/// A running node. Dropped, it is gone with all that ran on it.
#[derive(Debug)]
pub struct Node {
    dir: PathBuf,
    pid: u32,
    runtime: Runtime,
    suite: Suite,
    /// A node that is a machine has none: it goes with the machine.
    keeper: Option<Keeper>,
}

impl Node {
    /// Makes a node and waits until its containerd answers.
    pub async fn start(config: NodeConfig) -> Result<Node> {
        ensure!(
            nix::unistd::geteuid().is_root(),
            "a node is made of namespaces and mounts, which needs root: start the same with `sudo -E env PATH=\"$PATH\" …`"
        );
        let node = if machine::is_here() {
            machine::start(&config)?;
            Node {
                dir: "/".into(),
                pid: 1,
                runtime: config.runtime,
                suite: config.suite,
                keeper: None,
            }
        } else {
            Node::in_namespaces(&config)?
        };
        node.answers().await?;
        Ok(node)
    }

    fn in_namespaces(config: &NodeConfig) -> Result<Node> {
        let root = root::node(config.suite)?;
        let (claim, log) = leftovers::sweep_then_claim()?;
        let dir = claim.dir.clone();
        for sub in ["upper", "work", "root", "containerd", "rekindle", "images"] {
            fs::create_dir(dir.join(sub))?;
        }
        config::write(config, &dir.join("upper"))?;
        let binds = match &config.seed {
            Some(from) => seed::plant(from, &dir.join("containerd"))?,
            None => Vec::new(),
        };
        let lines = binds
            .iter()
            .map(|(from, to)| format!("{}\t{}\n", from.display(), to.display()));
        fs::write(dir.join("binds"), lines.collect::<String>())?;
        let opt = dir.join("opt");
        install_programs(&opt.join("bin"))?;
        install_shadow(&opt, config.runtime)?;
        let (keeper, pid) = Keeper::start(claim, log, &root)?;
        Ok(Node {
            dir,
            pid,
            runtime: config.runtime,
            suite: config.suite,
            keeper: Some(keeper),
        })
    }

    /// The shim behind `io.containerd.runc.v2`.
    pub fn runtime(&self) -> Runtime {
        self.runtime
    }

    /// The release it is made of.
    pub fn suite(&self) -> Suite {
        self.suite
    }

    /// Its name: its hostname, and what its folder and its cgroups on the host are called.
    pub fn name(&self) -> String {
        self.dir
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned()
    }

    /// Whether it is a machine with a systemd, and not a part of one.
    pub fn is_a_machine(&self) -> bool {
        self.keeper.is_none()
    }

    /// The pid of the node's first process, as the host counts.
    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Where the host sees the node's `path`.
    pub fn path(&self, path: impl AsRef<Path>) -> PathBuf {
        let path = path.as_ref();
        Path::new("/proc")
            .join(self.pid.to_string())
            .join("root")
            .join(path.strip_prefix("/").unwrap_or(path))
    }

    /// A client of its containerd. One per test: a connection belongs to the tokio runtime that made it.
    pub async fn containerd(&self) -> Result<Client> {
        let socket = self.path("/run/containerd/containerd.sock");
        Client::from_path(&socket)
            .await
            .with_context(|| format!("connecting to containerd at {}", socket.display()))
    }

    /// Subscribes to containerd's events; those published after this returns are seen.
    pub async fn events(&self) -> Result<Events> {
        Events::subscribe(self.containerd().await?).await
    }

    /// Imports and unpacks an image, for `ctr` as for CRI.
    pub async fn import(&self, image: &Image) -> Result<()> {
        self.import_for(image, &[NAMESPACE, CRI_NAMESPACE]).await
    }

    async fn import_for(&self, image: &Image, namespaces: &[&str]) -> Result<()> {
        let file = image
            .archive
            .file_name()
            .context("the image's archive has no name")?;
        let there = self.dir.join("images").join(file);
        if !there.exists() {
            fs::hard_link(&image.archive, &there)
                .or_else(|_| fs::copy(&image.archive, &there).map(drop))?;
        }
        let inside = format!("/images/{}", file.to_string_lossy());
        for namespace in namespaces {
            self.run(["ctr", "--namespace", namespace, "images", "import", &inside])
                .await?;
        }
        fs::remove_file(&there)?;
        Ok(())
    }

    /// A container to be described and created.
    pub fn container<'n>(&'n self, id: &str) -> container::Builder<'n> {
        container::Builder::new(self, id)
    }

    /// Runs a command inside the node and hands back what came of it.
    pub async fn exec<const N: usize>(&self, command: [&str; N]) -> Result<Output> {
        tokio::process::Command::from(self.command(&command))
            .kill_on_drop(true)
            .output()
            .await
            .with_context(|| format!("running {command:?} in the node"))
    }

    /// Runs a command that must succeed; its stdout.
    pub async fn run<const N: usize>(&self, command: [&str; N]) -> Result<String> {
        let out = self.exec(command).await?;
        ensure!(
            out.status.success(),
            "{command:?} in the node ended with {}: {}",
            out.status,
            String::from_utf8_lossy(&out.stderr).trim()
        );
        Ok(String::from_utf8_lossy(&out.stdout).into_owned())
    }

    /// A command that, when spawned, runs inside the node: in its namespaces, its cgroup and with its PATH.
    pub fn command(&self, command: &[&str]) -> Command {
        if self.is_a_machine() {
            return machine::command(command);
        }
        const ENTER: &str = r#"
            init=$1 name=$2; shift 2
            for h in $(awk '$0 ~ / - cgroup2? / {print $5}' /proc/self/mountinfo); do
              [ -e "$h/$name/init" ] && h=$h/$name/init || h=$h/$name
              echo $$ > "$h/cgroup.procs"
            done
            export HOME=/root $(tr '\0' '\n' < "/proc/$init/environ" | grep ^NODE_PATH=); export PATH="$NODE_PATH"
            exec nsenter --target "$init" --mount --uts --ipc --net --pid --cgroup --root --wd -- "$@""#;
        let mut enter = Command::new("bash");
        let name = self.dir.file_name().unwrap_or_default();
        enter
            .args(["-c", ENTER, "bash", &self.pid.to_string()])
            .arg(name)
            .args(command)
            .stdin(Stdio::null());
        enter
    }

    /// The host's pids of all processes of the node, with their command lines.
    pub fn processes(&self) -> Result<Vec<(u32, String)>> {
        self.processes_with(&[])
    }

    /// Those with all of `words` in their command lines; nothing else is asked of any other process, so that this can
    /// be repeated fast enough to see one that lives for milliseconds.
    pub fn processes_with(&self, words: &[&str]) -> Result<Vec<(u32, String)>> {
        let namespace = fs::read_link(format!("/proc/{}/ns/cgroup", self.pid))?;
        let mut found = Vec::new();
        for entry in fs::read_dir("/proc")?.flatten() {
            let Some(pid) = entry
                .file_name()
                .to_str()
                .and_then(|name| name.parse().ok())
            else {
                continue;
            };
            let line = fs::read(entry.path().join("cmdline")).unwrap_or_default();
            let line = String::from_utf8_lossy(&line).replace('\0', " ");
            if !words.iter().all(|word| line.contains(word)) {
                continue;
            }
            let cgroup = fs::read_to_string(entry.path().join("cgroup")).unwrap_or_default();
            let name = self.dir.file_name().unwrap_or_default().to_string_lossy();
            let ours =
                fs::read_link(entry.path().join("ns/cgroup")).is_ok_and(|ns| ns == namespace);
            if ours || cgroup.contains(&*name) || self.is_a_machine() {
                found.push((pid, line.trim().to_owned()));
            }
        }
        Ok(found)
    }

    /// The shim that serves a container, and its command line.
    pub fn shim_of(&self, id: &str) -> Result<(u32, String)> {
        let wanted = format!("-id {id} ");
        self.processes()?
            .into_iter()
            .find(|(_, line)| {
                line.contains("containerd-shim") && format!("{line} ").contains(&wanted)
            })
            .with_context(|| format!("no process of the node is the shim of container {id}"))
    }

    /// A process's pid as the node itself counts.
    pub fn pid_inside(&self, pid: u32) -> Result<u32> {
        let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
        let line = status.lines().find(|line| line.starts_with("NSpid:"));
        let pid = line.and_then(|line| line.split_whitespace().last());
        Ok(pid.context("the kernel tells no NSpid")?.parse()?)
    }

    /// Ends containerd (SIGTERM) and waits until its successor answers.
    pub async fn restart_containerd(&self) -> Result<()> {
        self.stop_containerd().await?;
        self.start_containerd().await
    }

    /// Ends containerd (SIGTERM), and keeps its successor from coming until [`Node::start_containerd`].
    pub async fn stop_containerd(&self) -> Result<()> {
        self.end_containerd("TERM").await
    }

    /// [`Node::stop_containerd`], without a warning (SIGKILL).
    pub async fn kill_containerd(&self) -> Result<()> {
        self.end_containerd("KILL").await
    }

    async fn end_containerd(&self, signal: &str) -> Result<()> {
        if self.is_a_machine() {
            let kill = format!("--signal={signal}");
            self.run(["systemctl", "kill", "--kill-whom=main", &kill, "containerd"])
                .await?;
            return self
                .run(["systemctl", "stop", "containerd"])
                .await
                .map(drop);
        }
        let end = format!("touch /run/containerd.hold; kill -{signal} $(cat /run/containerd.pid)");
        self.run(["sh", "-c", &end]).await?;
        let gone = "! kill -0 $(cat /run/containerd.pid) 2>/dev/null";
        poll::until("containerd's end", async || {
            Ok(self
                .exec(["sh", "-c", gone])
                .await?
                .status
                .success()
                .then_some(()))
        })
        .await
    }

    /// Lets containerd come back and waits until it answers.
    pub async fn start_containerd(&self) -> Result<()> {
        if self.is_a_machine() {
            self.run(["systemctl", "start", "containerd"]).await?;
        } else {
            self.run(["rm", "/run/containerd.hold"]).await?;
        }
        self.answers().await
    }

    /// Listens where containerd, which must be away, takes in the shims' events.
    pub fn in_place_of_containerd(&self) -> Result<UnixListener> {
        let socket = self.path("/run/containerd/containerd.sock.ttrpc");
        fs::remove_file(&socket).with_context(|| format!("removing {}", socket.display()))?;
        UnixListener::bind(&socket).with_context(|| format!("listening at {}", socket.display()))
    }

    async fn answers(&self) -> Result<()> {
        let answer = poll::until("containerd's answer", async || {
            self.containerd().await?.version().version(()).await?;
            Ok(Some(()))
        });
        match answer.await {
            Ok(()) => Ok(()),
            Err(e) => Err(e.context(format!("containerd's log ends with\n{}", self.log_tail(15)))),
        }
    }

    /// Waits until a line of containerd's log, which has the shims' too, has all of `words`. It looks each millisecond.
    pub async fn logs(&self, words: &[&str]) -> Result<()> {
        let deadline = tokio::time::Instant::now() + *poll::DEADLINE;
        let path = self.path("/var/log/containerd.log");
        let mut log = BufReader::new(fs::File::open(&path)?);
        let mut line = String::new();
        while tokio::time::Instant::now() < deadline {
            // What is read of a line that is not written whole stays.
            if log.read_line(&mut line)? == 0 || !line.ends_with('\n') {
                tokio::time::sleep(Duration::from_millis(1)).await;
                continue;
            }
            if words.iter().all(|word| line.contains(word)) {
                return Ok(());
            }
            line.clear();
        }
        bail!(
            "waited in vain for a line with {words:?} in {}",
            path.display()
        )
    }

    /// The last lines of containerd's log, where the shims log too.
    pub fn log_tail(&self, lines: usize) -> String {
        let text = fs::read_to_string(self.path("/var/log/containerd.log")).unwrap_or_default();
        let all: Vec<&str> = text.lines().collect();
        all[all.len().saturating_sub(lines)..].join("\n")
    }
}

/// The folder of the programs under test: `REKINDLE_BIN_DIR`, else where cargo built them.
pub(crate) fn programs() -> Result<PathBuf> {
    match std::env::var_os("REKINDLE_BIN_DIR") {
        Some(folder) => Ok(PathBuf::from(folder)),
        None => built(),
    }
}

/// target/debug/deps/SUITE and target/debug/PROGRAM both lie below target/debug.
fn built() -> Result<PathBuf> {
    let program = std::env::current_exe()?;
    let folder = program.ancestors().find(|dir| dir.join("deps").is_dir());
    Ok(folder
        .context("this program does not lie in a cargo target folder: set REKINDLE_BIN_DIR")?
        .to_path_buf())
}

/// `rekindle`.
pub fn cli() -> Result<PathBuf> {
    Ok(programs()?.join("rekindle"))
}

/// The S3 server, which is no program under test: an optimised build of those has none.
pub fn s3_server() -> Result<PathBuf> {
    let server = programs()?.join(S3_SERVER);
    match (server.is_file(), built()) {
        (false, Ok(built)) => Ok(built.join(S3_SERVER)),
        _ => Ok(server),
    }
}

/// Puts the programs under test into a folder.
fn install_programs(bin: &Path) -> Result<()> {
    let from = programs()?;
    let server = s3_server()?;
    fs::create_dir_all(bin)?;
    for binary in [from.join(SHIM), from.join("rekindle"), server] {
        if let (Some(name), true) = (binary.file_name(), binary.is_file()) {
            let there = bin.join(name);
            fs::hard_link(&binary, &there).or_else(|_| fs::copy(&binary, &there).map(drop))?;
        }
    }
    Ok(())
}

/// Puts the shim under test in front of containerd's on [`PATH`], where it takes its place.
fn install_shadow(opt: &Path, runtime: Runtime) -> Result<()> {
    let shadow = opt.join("shadow");
    fs::create_dir_all(&shadow)?;
    let link = shadow.join("containerd-shim-runc-v2");
    if link.is_symlink() {
        fs::remove_file(&link)?;
    }
    if runtime == Runtime::Rekindle {
        let program = opt.join("bin").join(SHIM);
        ensure!(
            program.exists(),
            "the shim under test is missing: {} does not exist; run `make build`",
            program.display()
        );
        std::os::unix::fs::symlink(format!("../bin/{SHIM}"), link)?;
    }
    Ok(())
}
