//! Two nodes and a bucket between them.

use std::{
    fs,
    io::{BufRead, BufReader, Write as _},
    net::SocketAddr,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
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
use rekindle_core::{
    config::S3Access,
    name::{ImageName, Namespace},
};
use rekindle_store::s3::{Bucket, Limits, Tuning};
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
    server: Child,
    pub(crate) folder: TempDir,
    pub(crate) address: SocketAddr,
    pub(crate) from: ImageStore,
    pub(crate) to: ImageStore,
    runtime: Runtime,
}

impl Drop for Nodes {
    fn drop(&mut self) {
        let _ = self.server.kill();
        let _ = self.server.wait();
    }
}

pub(crate) fn names() -> (Namespace, ImageName) {
    ("team-a".parse().unwrap(), "warm".parse().unwrap())
}

impl Nodes {
    pub(crate) fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir_all(folder.path().join("s3/images")).unwrap();
        let mut server = Command::new(env!("CARGO_BIN_EXE_rekindle-s3server"))
            .arg("--http")
            .arg("--root")
            .arg(folder.path().join("s3"))
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        let stdout = server.stdout.take().unwrap();
        BufReader::new(stdout).read_line(&mut line).unwrap();
        let ready: serde_json::Value = serde_json::from_str(&line).unwrap();
        let keys = "[default]\naws_access_key_id=rekindle\naws_secret_access_key=rekindle-secret\n";
        fs::write(folder.path().join("credentials"), keys).unwrap();
        let store = |name: &str| ImageStore::open(&folder.path().join(name)).unwrap();
        Self {
            server,
            address: ready["address"].as_str().unwrap().parse().unwrap(),
            from: store("from"),
            to: store("to"),
            runtime: Runtime::new().unwrap(),
            folder,
        }
    }

    /// The layout `s3://images/all/` at an address.
    pub(crate) fn layout(&self, at: SocketAddr) -> Layout {
        let access = S3Access {
            endpoint: Some(format!("http://{at}")),
            region: Some("us-east-1".to_owned()),
            credentials_file: Some(self.folder.path().join("credentials")),
            ..S3Access::default()
        };
        let limits = Limits {
            concurrency: 3,
            part_size: MIB as u64,
            tuning: TUNING,
        };
        let bucket = Bucket::open(&access, "images", "all/", limits);
        let bucket = self.runtime.block_on(bucket).unwrap();
        Layout::in_bucket(bucket, self.runtime.handle().clone())
    }

    /// The same as a folder: what the server keeps.
    pub(crate) fn there(&self) -> PathBuf {
        self.folder.path().join("s3/images/all")
    }

    /// Makes the next generation of `team-a/warm` on the first node, with so many bytes that are in no other.
    pub(crate) fn make(&self, seed: u32, length: usize) -> SealedImage {
        make(&self.from, self.folder.path(), None, (seed, length))
    }

    /// The same, encrypted.
    pub(crate) fn make_with(&self, key: &Key, seed: u32, length: usize) -> SealedImage {
        let key = Some(key.clone());
        make(&self.from, self.folder.path(), key, (seed, length))
    }

    /// As much again in the pages of a process, which a restore leaves to its pager.
    pub(crate) fn make_pages(&self, key: Option<&Key>, seed: u32, length: usize) -> SealedImage {
        let streams = [
            (format!("{CRIU_DIR}/pages-1.img"), bytes(seed, length)),
            (UPPER_FILE.to_owned(), bytes(seed + 1, MIB)),
        ];
        make_of(&self.from, self.folder.path(), key.cloned(), &streams)
    }

    /// Begins to take the newest image to the second node.
    pub(crate) fn begin(
        &self,
        layout: &Layout,
        key: Option<&Key>,
    ) -> Result<SealedImage, LayoutError> {
        let (namespace, name) = names();
        let found = layout.find_image(&namespace, &name)?;
        let into = self.folder.path().join("into");
        let (at, done) = ((key, into.as_path()), AtomicU64::new(0));
        let begun = found.begin(&self.to, (&namespace, &name), at, "s3://images/all/", &done);
        let _ = fs::remove_dir_all(into);
        begun
    }

    /// Has the rest of it come.
    pub(crate) fn complete(
        &self,
        layout: &Layout,
        key: Option<&Key>,
        image: &SealedImage,
    ) -> Result<(), ImageError> {
        let origin = image.origin()?.unwrap();
        let source = Source {
            remote: layout.packs(image.manifest(), &origin).unwrap(),
            requests: layout.requests(),
        };
        image.complete(key, source, &AtomicU64::new(0))
    }

    pub(crate) fn push(&self, layout: &Layout, image: &SealedImage) -> Result<Pushed, LayoutError> {
        layout.push(image, &layout.tag_for(image), &AtomicU64::new(0))
    }

    /// Takes an image to the second node.
    pub(crate) fn pull(&self, layout: &Layout, tag: &str) -> Result<Pulled, LayoutError> {
        self.pull_with(layout, tag, None)
    }

    /// The same, by a node that has this key.
    pub(crate) fn pull_with(
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

    /// Asserts that the second node has nothing, and nothing is left of a try.
    pub(crate) fn assert_nothing_pulled(&self, why: &str) {
        assert_eq!(self.to.list(None).unwrap().len(), 0, "{why}");
        let left = fs::read_dir(self.folder.path().join("to/.partial")).unwrap();
        assert_eq!(left.count(), 0, "{why}");
    }

    /// The objects whose keys begin so.
    pub(crate) fn keys(&self, start: &str) -> Vec<String> {
        fn walk(folder: &Path, into: &mut Vec<PathBuf>) {
            for entry in fs::read_dir(folder).into_iter().flatten() {
                let path = entry.unwrap().path();
                match path.is_dir() {
                    true => walk(&path, into),
                    false => into.push(path),
                }
            }
        }
        let mut found = Vec::new();
        walk(&self.there(), &mut found);
        let keys = found.iter().map(|path| {
            let key = path.strip_prefix(self.there()).unwrap();
            key.to_str().unwrap().to_owned()
        });
        keys.filter(|key| key.starts_with(start)).collect()
    }
}

fn make(
    store: &ImageStore,
    folder: &Path,
    key: Option<Key>,
    (seed, length): (u32, usize),
) -> SealedImage {
    let streams = [(UPPER_FILE.to_owned(), bytes(seed, length))];
    make_of(store, folder, key, &streams)
}

fn make_of(
    store: &ImageStore,
    folder: &Path,
    key: Option<Key>,
    streams: &[(String, Vec<u8>)],
) -> SealedImage {
    let (namespace, name) = names();
    let request = store.begin(&namespace, &name, Default::default()).unwrap();
    let order = store.partial_at(&request.dir()).unwrap().unwrap();
    let partial = order
        .begin(key, Compression::None, &folder.join("private"))
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
