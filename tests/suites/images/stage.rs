//! The nodes, and the steps that the tests are told in.

use anyhow::{Context, Result, anyhow, bail, ensure};
use containerd_client::tonic::Status;
use rekindle_harness::container::Builder;
use rekindle_harness::fifo::Reader;
use rekindle_harness::kube::{Apiserver, Who};
use rekindle_harness::s3::{S3Server, tier};
use rekindle_harness::{Container, Count, Image, Node, NodeConfig, Runtime, Suite, images, schema};
use serde_json::Value;
use std::path::PathBuf;
use std::process::Output;
use tokio::sync::{Mutex, MutexGuard, OnceCell};

/// The nodes of this program.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Nodes {
    Eager,
    Lazy,
    /// One test at a time, for those that look for a program by its command line; it restores lazily.
    Alone,
    /// One at a time too, with room in memory for images of less than 128 MiB.
    Memory,
}

pub(crate) struct Stage {
    pub(crate) node: Node,
    busybox: Image,
    alone: Option<Mutex<()>>,
    _s3: S3Server,
    /// What the node's kubelet would be told by, in its network and in ours.
    pub(crate) apiserver: Apiserver,
}

pub(crate) const RESTORE_FROM: &str = "rekindle.dev/restore-from";
/// Of the images of namespace `sealed`.
pub(crate) const KEY: &str = "000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1f";
/// What has the images of namespace `afar`.
pub(crate) const BUCKET: &str = "images";
/// Where images lie in memory, on the node that has some there.
pub(crate) const MEMORY: &str = "/run/rekindle/images";
/// Nobody listens there.
const NOWHERE: &str = "[[images.tier]]\nurl = \"s3://images/nowhere/\"\nnamespaces = [\"nowhere\"]\nendpoint = \"http://127.0.0.1:1\"\nanonymous = true\n";
/// A kubelet's, as kubeadm puts it there.
pub(crate) const KUBECONFIG: &str = "/etc/kubernetes/kubelet.conf";
pub(crate) const POLICY: &str = "rekindle.dev/restore-policy";

/// The node of a kind, made by the first test that asks. It is never dropped: its keeper ends it after this program.
pub(crate) async fn stage(nodes: Nodes) -> Result<&'static Stage> {
    static EAGER: OnceCell<Result<Stage, String>> = OnceCell::const_new();
    static LAZY: OnceCell<Result<Stage, String>> = OnceCell::const_new();
    static ALONE: OnceCell<Result<Stage, String>> = OnceCell::const_new();
    static FAST: OnceCell<Result<Stage, String>> = OnceCell::const_new();
    let (cell, word, compression) = match nodes {
        Nodes::Eager => (&EAGER, "eager", "none"),
        Nodes::Lazy => (&LAZY, "lazy", "lz4"),
        Nodes::Alone => (&ALONE, "lazy", "none"),
        Nodes::Memory => (&FAST, "lazy", "none"),
    };
    let make = async || -> Result<Stage> {
        let busybox = images::busybox()?;
        let mut config = NodeConfig::new(Runtime::Rekindle)?;
        let mut tiers = tier(BUCKET, "afar") + NOWHERE;
        if matches!(nodes, Nodes::Alone) {
            tiers += &tier(BUCKET, "default");
        }
        if matches!(nodes, Nodes::Memory) {
            // No agent's round is to ask a store that does not answer.
            tiers = "[images.memory]\nquota = \"128MiB\"\nidle = \"100h\"\n".to_owned();
        }
        config.rekindle_toml = Some(format!(
            "[restore]\npaging = \"{word}\"\n\n[images]\ncompression = \"{compression}\"\n\n[images.retention]\nquota = \"100TiB\"\n\n[warm-start]\nearly = \"20s\"\nfailures = 2\nmin-free = 0\n\n[[images.export]]\nnamespace = \"platform\"\nname = \"shared\"\nto = [\"default\"]\n\n[[images.key]]\nid = \"sealed-1\"\nnamespaces = [\"sealed\"]\ncommand = [\"/bin/echo\", \"{KEY}\"]\n\n{tiers}"
        ));
        let alone = matches!(nodes, Nodes::Alone | Nodes::Memory);
        if alone {
            // Its log tells which step of an operation begins.
            config.log_level = "debug";
        }
        let node = Node::start(config).await?;
        if matches!(nodes, Nodes::Memory) {
            // Small, so that a test can fill it.
            let line = format!("mkdir -p {MEMORY} && mount -t tmpfs -o size=160m tmpfs {MEMORY}");
            node.run(["sh", "-c", &line]).await?;
        }
        node.import(&images::pause()?).await?;
        node.import(&busybox).await?;
        let alone = alone.then(Mutex::default);
        let _s3 = S3Server::empty(&node, BUCKET).await?;
        let address = "127.0.0.1:6443".parse()?;
        let apiserver = Apiserver::stand_in(vec![node.silent_server(address).await?])?;
        let kubeconfig = apiserver.kubeconfig_at(address, Who::Node("node"))?;
        std::fs::create_dir_all(node.path("/etc/kubernetes"))?;
        std::fs::write(node.path(KUBECONFIG), kubeconfig)?;
        Ok(Stage {
            _s3,
            apiserver,
            node,
            busybox,
            alone,
        })
    };
    let made = cell
        .get_or_init(async || make().await.map_err(|e| format!("{e:#}")))
        .await;
    made.as_ref().map_err(|e| anyhow!("{e}"))
}

impl Stage {
    /// Keeps the other tests of the node waiting, where it serves one at a time.
    pub(crate) async fn turn(&self) -> Option<MutexGuard<'_, ()>> {
        match &self.alone {
            Some(alone) => Some(alone.lock().await),
            None => None,
        }
    }

    /// Whether CRIU can dump TCP sockets here. That of trixie cannot where the kernel has no `SO_PASSCRED` for them,
    /// since Linux 6.16; then the checkpoint of a container with one must be refused, which this asserts.
    pub(crate) async fn dumps_tcp_of(&self, container: &str) -> Result<bool> {
        let release = std::fs::read_to_string("/proc/sys/kernel/osrelease")?;
        let mut numbers = release.split('.').map(|text| text.parse::<u32>().ok());
        let kernel = (numbers.next().flatten(), numbers.next().flatten());
        if self.node.suite() != Suite::Trixie || kernel < (Some(6), Some(16)) {
            return Ok(true);
        }
        let refused = self
            .rekindle(&["checkpoint", container, "--name", "with-tcp"])
            .await?;
        let said = String::from_utf8_lossy(&refused.stderr);
        ensure!(
            !refused.status.success() && said.contains("sockets: Can't get 1:16 opt"),
            "CRIU 4.1 was expected to refuse: {said}"
        );
        Ok(false)
    }

    /// A container of the busybox image.
    pub(crate) fn container(&self, id: &str) -> Builder<'_> {
        self.node.container(id).image(&self.busybox)
    }

    /// One that starts from an image.
    pub(crate) fn warm(&self, id: &str, image: &str) -> Builder<'_> {
        self.container(id)
            .args(&["/counter"])
            .annotation(RESTORE_FROM, image)
    }

    /// A running counter that has written a file, removed one of the container image's, and used /dev/shm.
    pub(crate) async fn lived_in(&self, id: &str) -> Result<(Container<'_>, Count)> {
        let line =
            "echo kept > /root/note; rm /etc/group; echo shared > /dev/shm/note; exec /counter";
        let task = self.container(id).shell(line).run().await?;
        let count = counts_to(task.io().out()?, 5).await?;
        Ok((task, count))
    }

    /// `rekindle …` on the node.
    pub(crate) async fn rekindle(&self, args: &[&str]) -> Result<Output> {
        let command: Vec<&str> = std::iter::once(&"rekindle").chain(args).copied().collect();
        let output = tokio::process::Command::from(self.node.command(&command))
            .kill_on_drop(true)
            .output();
        // A checkpoint gives up after 110 s.
        match tokio::time::timeout(std::time::Duration::from_secs(120), output).await {
            Ok(output) => {
                let output = output?;
                schema::check(args, &output.stdout);
                Ok(output)
            }
            Err(_) => bail!("{command:?} did not end"),
        }
    }

    /// `rekindle checkpoint CONTAINER --name NAME …`, which must work; what it tells about the image.
    pub(crate) async fn checkpoint(
        &self,
        container: &str,
        name: &str,
        more: &[&str],
    ) -> Result<Value> {
        let args = [&["checkpoint", container, "--name", name, "--json"], more].concat();
        let output = self.rekindle(&args).await?;
        if !output.status.success() {
            let said = String::from_utf8_lossy(&output.stderr);
            let named = said.split_once("(CRIU's log: ");
            let log = match named.and_then(|(_, rest)| rest.split_once(')')) {
                Some((path, _)) => self.node.run(["tail", "-n", "25", path]).await?,
                None => "(it names no log)".to_owned(),
            };
            bail!(
                "rekindle {args:?} ended with {}: {}\nCRIU's log ends with\n{log}",
                output.status,
                said.trim()
            );
        }
        Ok(serde_json::from_slice(&output.stdout)?)
    }

    /// The names of the images on the node.
    pub(crate) async fn images(&self) -> Result<Vec<String>> {
        let output = self.rekindle(&["image", "ls", "--json"]).await?;
        let rows: Value = serde_json::from_slice(&output.stdout)?;
        let rows = rows.as_array().context("no array")?;
        Ok(rows
            .iter()
            .map(|row| row["name"].as_str().unwrap_or("?").to_owned())
            .collect())
    }

    /// Where the host sees the first generation of an image.
    pub(crate) fn image(&self, namespace: &str, name: &str) -> PathBuf {
        self.node
            .path(format!("/var/lib/rekindle/images/{namespace}/{name}/1"))
    }

    /// Asserts that a container is refused when its task is created, in one sentence with all of `words`, and that
    /// nothing of it is left.
    pub(crate) async fn refuses(
        &self,
        id: &str,
        builder: Builder<'_>,
        words: &[&str],
    ) -> Result<String> {
        let (task, created) = builder.try_create().await?;
        let refusal = match created {
            Err(refusal) => refusal,
            Ok(_) => bail!("{id} was created from an image that is to be refused"),
        };
        let text = one_sentence(&refusal, words)?;
        self.node.is_rid_of(id).await?;
        ensure!(
            self.node.layer_of(id).await?.is_empty(),
            "the refused container's layer is not empty"
        );
        task.remove().await?;
        Ok(text)
    }
}

/// The words of a refusal, of which all of `words` must be in the one line.
pub(crate) fn one_sentence(refusal: &Status, words: &[&str]) -> Result<String> {
    let text = refusal.message();
    ensure!(
        !text.trim().contains('\n'),
        "the refusal is more than a line: {text:?}"
    );
    for word in words {
        ensure!(
            text.contains(word),
            "{word:?} is not in the refusal: {text}"
        );
    }
    Ok(text.to_owned())
}

/// Waits until a counter has come to `n`.
pub(crate) async fn counts_to(out: &Reader, n: u64) -> Result<Count> {
    let enough = |text: &str| Count::last(text).is_some_and(|count| count.n >= n);
    let text = out.until("the counter", enough).await?;
    Count::last(&text).context("the output is not a counter's")
}

/// Asserts that `restored` is the counter that was dumped after `from`, gone on; how far it is.
pub(crate) async fn continues(restored: &Container<'_>, from: &Count, until: u64) -> Result<Count> {
    let out = restored.io().out()?;
    let count = counts_to(out, until + 3).await?;
    from.continues_in(&out.so_far(), until)?;
    Ok(count)
}

/// The stdout of a shell line in a running container, which must succeed.
pub(crate) async fn shell(task: &Container<'_>, exec_id: &str, line: &str) -> Result<String> {
    let exec = task.exec(exec_id, &["sh", "-c", line]).run().await?;
    let text = exec.io().out()?.text().await?;
    let status = exec.wait().await?.status;
    ensure!(
        status == 0,
        "{line:?} ended with {status}: {text}{}",
        exec.io().err()?.so_far()
    );
    exec.delete().await?;
    Ok(text.trim_end().to_owned())
}
