//! Two nodes, and a registry between them that nobody here wrote.

use std::{
    fs,
    io::{BufRead as _, BufReader, Write as _},
    net::SocketAddr,
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    sync::atomic::AtomicU64,
    time::Duration,
};

use rekindle_checkpoint::{
    Facts, ImageError, ImageStore, Key, SealedImage,
    chunks::Compression,
    image::Source,
    layout::{Layout, LayoutError, Pulled, Pushed},
    manifest::{CRIU_DIR, UPPER_FILE},
};
use rekindle_core::name::{ImageName, Namespace};
use rekindle_harness::cli;
use rekindle_store::{
    registry::{Access, Registry},
    s3::{Limits, Tuning},
};
use tempfile::TempDir;
use tokio::runtime::Runtime;

pub(crate) const MIB: usize = 1 << 20;

/// Impatient, but not so that a busy machine fails a sound connection.
const TUNING: Tuning = Tuning {
    attempts: 4,
    first_pause: Duration::from_millis(2),
    longest_pause: Duration::from_millis(20),
    stall: Duration::from_secs(1),
    rounds: 3,
};

pub(crate) struct Nodes {
    registry: Child,
    pub(crate) folder: TempDir,
    pub(crate) address: SocketAddr,
    pub(crate) from: ImageStore,
    pub(crate) to: ImageStore,
    runtime: Runtime,
}

impl Drop for Nodes {
    fn drop(&mut self) {
        let _ = self.registry.kill();
        let _ = self.registry.wait();
    }
}

pub(crate) fn names() -> (Namespace, ImageName) {
    ("team-a".parse().unwrap(), "warm".parse().unwrap())
}

impl Nodes {
    pub(crate) fn new() -> Self {
        Self::with(|_| String::new())
    }

    /// With more in the registry's configuration, below `http:` and then at its end.
    pub(crate) fn with(more: impl Fn(&Path) -> String) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let at = folder.path();
        let config = at.join("registry.yml");
        let text = format!(
            "version: 0.1\nlog:\n  level: info\nstorage:\n  filesystem:\n    rootdirectory: {}\n\
             http:\n  addr: 127.0.0.1:0\n{}",
            at.join("registry").display(),
            more(at)
        );
        fs::write(&config, text).unwrap();
        let mut registry = Command::new("docker-registry")
            .arg("serve")
            .arg(&config)
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .expect("the Debian package docker-registry is installed by `make deps`");
        let log = BufReader::new(registry.stderr.take().unwrap());
        let mut lines = log.lines().map_while(Result::ok);
        let address = lines.find_map(|line| {
            let (_, rest) = line.split_once("listening on ")?;
            rest.split(['"', ',']).next()?.trim().parse().ok()
        });
        // What nobody reads would stop it.
        std::thread::spawn(move || lines.for_each(drop));
        let store = |name: &str| ImageStore::open(&at.join(name)).unwrap();
        Self {
            registry,
            address: address.expect("the registry says where it listens"),
            from: store("from"),
            to: store("to"),
            runtime: Runtime::new().unwrap(),
            folder,
        }
    }

    /// The layout `docker://ADDRESS/team/images`, without credentials.
    pub(crate) fn layout(&self, at: SocketAddr) -> Layout {
        let access = Access {
            anonymous: true,
            ..Access::default()
        };
        self.layout_with(&access, &at.to_string())
    }

    pub(crate) fn layout_with(&self, access: &Access, host: &str) -> Layout {
        let limits = Limits {
            concurrency: 3,
            part_size: MIB as u64,
            tuning: TUNING,
        };
        let repository = format!("docker://{host}/team/images").parse().unwrap();
        let registry = Registry::open(access, &repository, limits).unwrap();
        Layout::in_registry(registry, self.runtime.handle().clone())
    }

    /// With the credentials of this file.
    pub(crate) fn layout_as(&self, at: SocketAddr, credentials: &str) -> Layout {
        let file = self.folder.path().join("config.json");
        fs::write(&file, credentials).unwrap();
        let access = Access {
            credentials_file: Some(file),
            ..Access::default()
        };
        self.layout_with(&access, &at.to_string())
    }

    /// Where the registry keeps a blob.
    pub(crate) fn kept(&self, hex: &str) -> PathBuf {
        let blobs = "registry/docker/registry/v2/blobs/sha256";
        let folder = self.folder.path().join(blobs);
        folder.join(&hex[..2]).join(hex).join("data")
    }

    /// The tags that the registry keeps.
    pub(crate) fn tags(&self) -> Vec<String> {
        let at = "registry/docker/registry/v2/repositories/team/images/_manifests/tags";
        let all = fs::read_dir(self.folder.path().join(at))
            .into_iter()
            .flatten();
        all.map(|tag| tag.unwrap().file_name().into_string().unwrap())
            .collect()
    }

    /// Makes the next generation of `team-a/warm` on the first node, with so many bytes that are in no other.
    pub(crate) fn make(&self, key: Option<&Key>, seed: u32, length: usize) -> SealedImage {
        let streams = [(UPPER_FILE.to_owned(), bytes(seed, length))];
        self.make_of(key, names(), &streams)
    }

    /// As much again in the pages of a process, which a restore leaves to its pager.
    pub(crate) fn make_pages(&self, seed: u32, length: usize) -> SealedImage {
        let streams = [
            (format!("{CRIU_DIR}/pages-1.img"), bytes(seed, length)),
            (UPPER_FILE.to_owned(), bytes(seed + 1, MIB)),
        ];
        self.make_of(None, names(), &streams)
    }

    pub(crate) fn make_of(
        &self,
        key: Option<&Key>,
        (namespace, name): (Namespace, ImageName),
        streams: &[(String, Vec<u8>)],
    ) -> SealedImage {
        let request = self
            .from
            .begin(&namespace, &name, Default::default())
            .unwrap();
        let order = self.from.partial_at(&request.dir()).unwrap().unwrap();
        let private = self.folder.path().join("private");
        let partial = order
            .begin(key.cloned(), Compression::None, &private)
            .unwrap();
        let words = |words: [u32; 2]| words.map(u32::to_le_bytes).concat();
        let criu = partial.criu_dir();
        fs::write(criu.join("inventory.img"), words([0x5831_3116, 0])).unwrap();
        fs::write(criu.join("pstree.img"), words([0x5456_4319, 0x5027_3030])).unwrap();
        for (name, bytes) in streams {
            let mut stream = partial.chunks().stream(name);
            stream.write_all(bytes).unwrap();
            stream.finish().unwrap();
        }
        partial.seal(Facts::default()).unwrap()
    }

    pub(crate) fn push(&self, layout: &Layout, image: &SealedImage) -> Result<Pushed, LayoutError> {
        layout.push(image, &layout.tag_for(image), &AtomicU64::new(0))
    }

    /// Takes an image to the second node.
    pub(crate) fn pull(
        &self,
        layout: &Layout,
        tag: &str,
        key: Option<&Key>,
    ) -> Result<Pulled, LayoutError> {
        let (namespace, name) = names();
        let found = layout.find(Some(tag))?;
        let into = self.folder.path().join("into");
        let counts = (&AtomicU64::new(0), &AtomicU64::new(0));
        let pulled = found.pull(&self.to, (&namespace, &name), key, &into, counts);
        let _ = fs::remove_dir_all(into);
        pulled
    }

    /// Begins to take the newest image to the second node, and has the rest of it come.
    pub(crate) fn begin_and_complete(&self, layout: &Layout) -> Result<(), ImageError> {
        let (namespace, name) = names();
        let found = layout.find_image(&namespace, &name).unwrap();
        assert!(found.comes_in_parts().unwrap());
        let into = self.folder.path().join("into");
        let (at, done) = ((None, into.as_path()), AtomicU64::new(0));
        let image = found
            .begin(&self.to, (&namespace, &name), at, "docker://x/y", &done)
            .unwrap();
        let origin = image.origin()?.unwrap();
        let source = Source {
            remote: layout.packs(image.manifest(), &origin).unwrap(),
            requests: layout.requests(),
        };
        let done = AtomicU64::new(0);
        image.complete(None, source, &done)
    }

    /// Asserts that the second node has nothing, and nothing is left of a try.
    pub(crate) fn assert_nothing_pulled(&self, why: &str) {
        assert_eq!(self.to.list(None).unwrap().len(), 0, "{why}");
        let left = fs::read_dir(self.folder.path().join("to/.partial")).unwrap();
        assert_eq!(left.count(), 0, "{why}");
    }

    /// `rekindle --config … ARGS` on a node, with this more in its configuration.
    pub(crate) fn command(&self, node: &str, config: &str, args: &[&str]) -> Command {
        let path = self.folder.path().join(format!("{node}.toml"));
        let root = self.folder.path().join(node);
        fs::write(&path, format!("[images]\nroot = {root:?}\n{config}")).unwrap();
        let mut command = Command::new(cli().unwrap());
        command
            .arg("--config")
            .arg(path)
            .args(args)
            .env_remove("REKINDLE_LOG")
            .env_remove("DOCKER_CONFIG")
            .env("HOME", self.folder.path());
        command
    }

    pub(crate) fn rekindle(&self, node: &str, config: &str, args: &[&str]) -> Output {
        self.command(node, config, args).output().unwrap()
    }

    /// What that prints, which must succeed.
    pub(crate) fn says(&self, node: &str, config: &str, args: &[&str]) -> String {
        let output = self.rekindle(node, config, args);
        assert!(output.status.success(), "{args:?}: {output:?}");
        String::from_utf8(output.stdout).unwrap()
    }
}

/// No two chunks of which are alike; others for another seed.
pub(crate) fn bytes(seed: u32, length: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9) | 1;
    let next = || {
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        Some(state)
    };
    let words = std::iter::from_fn(next).flat_map(u32::to_le_bytes);
    words.take(length).collect()
}

/// An error with its causes.
pub(crate) fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        text = format!("{text}: {cause}");
        next = cause.source();
    }
    text
}
