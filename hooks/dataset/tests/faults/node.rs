//! A node of its own for each test: a cache, a configuration, credentials.

use std::{fs, net::SocketAddr, path::PathBuf, sync::Mutex, time::Duration};

use rekindle_core::{config::NodeConfig, name::Namespace, uri::DatasetUri};
use rekindle_dataset::{Cache, DatasetError, Event, Ready, Tuning, acquire};
use tempfile::TempDir;

/// One part; the configuration's smallest.
pub(crate) const MIB: usize = 1 << 20;

/// Impatient, but not so that a busy machine fails a sound connection.
pub(crate) const TUNING: Tuning = Tuning {
    attempts: 5,
    first_pause: Duration::from_millis(2),
    longest_pause: Duration::from_millis(20),
    stall: Duration::from_secs(1),
    rounds: 3,
};

pub(crate) struct Node {
    pub(crate) config: NodeConfig,
    pub(crate) folder: TempDir,
    pub(crate) events: Mutex<Vec<Event>>,
}

impl Node {
    pub(crate) fn new(store: SocketAddr) -> Self {
        Self::with(store, "")
    }

    /// `extra` lines in the source of namespace `default`.
    pub(crate) fn with(store: SocketAddr, extra: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path().join("cache");
        Self::at(folder, root, store, extra)
    }

    pub(crate) fn at(folder: TempDir, root: PathBuf, store: SocketAddr, extra: &str) -> Self {
        let text = config_text(&folder, &root, store, extra);
        Self {
            config: NodeConfig::parse("test", &text).unwrap(),
            folder,
            events: Mutex::default(),
        }
    }

    pub(crate) async fn acquire(&self, uri: &str) -> Result<Ready, DatasetError> {
        self.acquire_as("default", uri).await
    }

    pub(crate) async fn acquire_as(
        &self,
        namespace: &str,
        uri: &str,
    ) -> Result<Ready, DatasetError> {
        let namespace: Namespace = namespace.parse().unwrap();
        let uri: DatasetUri = uri.parse().unwrap();
        let note = |event| self.events.lock().unwrap().push(event);
        acquire(&self.config, &uri, &namespace, TUNING, &note).await
    }

    /// Nothing is published, whatever else lies there.
    pub(crate) fn assert_nothing_published(&self, why: &str) {
        let cache = Cache::open(&self.config.datasets);
        assert_eq!(cache.list().unwrap(), [], "{why}");
        for path in walk(&self.config.datasets.root) {
            assert_ne!(
                path.file_name().unwrap(),
                "manifest.json",
                "{why}: {path:?}"
            );
        }
    }
}

/// Two namespaces, each with its own credentials.
pub(crate) fn config_text(
    folder: &TempDir,
    root: &std::path::Path,
    store: SocketAddr,
    extra: &str,
) -> String {
    let mut text = format!(
        "[datasets]\nroot = {root:?}\npart-size-mib = 1\nconcurrency = 4\n\
         [[datasets.source]]\nallow = \"file://{}/allowed/\"\nnamespaces = [\"default\"]\n",
        folder.path().display()
    );
    for namespace in ["default", "other"] {
        let credentials = folder.path().join(format!("{namespace}.credentials"));
        let keys =
            format!("[default]\naws_access_key_id={namespace}\naws_secret_access_key=secret\n");
        fs::write(&credentials, keys).unwrap();
        text.push_str(&format!(
            "[[datasets.source]]\nallow = \"s3://bucket/\"\nnamespaces = [{namespace:?}]\n\
             endpoint = \"http://{store}\"\ncredentials-file = {credentials:?}\nregion = \"us-east-1\"\n"
        ));
        if namespace == "default" {
            text.push_str(extra);
            text.push('\n');
        }
    }
    text
}

pub(crate) fn walk(folder: &std::path::Path) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(folder) else {
        return Vec::new();
    };
    let mut found = Vec::new();
    for entry in entries {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.extend(walk(&path));
        } else {
            found.push(path);
        }
    }
    found
}

/// Bytes that differ everywhere, so that a part in the wrong place shows.
pub(crate) fn pattern(seed: u64, len: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    (0..len)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 24) as u8
        })
        .collect()
}

pub(crate) fn read(ready: &Ready, path: &str) -> Vec<u8> {
    fs::read(ready.path.join(path)).unwrap()
}
