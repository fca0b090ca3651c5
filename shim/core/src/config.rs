//! What a node says: `/etc/rekindle/config.toml`, raw → resolved once.
//!
//! Every key is optional. `docs/CONFIGURATION.md` is the user's side of this file.

use std::{path::PathBuf, time::Duration};

use serde::{Deserialize, Serialize};

use crate::{
    name::{ImageName, Namespace},
    paths,
    uri::{DatasetUri, ImagePlace},
};

mod access;
mod kubernetes;
mod memory;
mod retention;
mod tier;

pub use access::S3Access;
pub use kubernetes::Kubernetes;
pub use memory::Memory;
pub use retention::Retention;
pub use tier::Tier;

/// How weakly a dataset's file may be verified and still be published. Ordered from weak to strong.
#[derive(
    Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default, Serialize, Deserialize,
)]
#[serde(rename_all = "kebab-case")]
pub enum Verification {
    /// Only the transport's own integrity (TLS, length): the store gave nothing to compare with.
    #[default]
    TransportOnly,
    /// The MD5 that a single-part, unencrypted S3 object's ETag is.
    EtagMd5,
    /// A checksum that the store computed when the object was written.
    StoreChecksum,
}

/// How a restored container gets its memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Paging {
    /// Lazily when kernel and CRIU can, else eagerly.
    #[default]
    Auto,
    /// Lazily, or the restore fails.
    Lazy,
    /// All pages before the first instruction.
    Eager,
}

/// One allowed source of datasets. The first whose `allow` is a prefix of the URI and which names the
/// pod's namespace serves it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "RawSource", rename_all = "kebab-case")]
pub struct Source {
    /// A URI prefix that ends with a slash: `s3://models/`, `file:///srv/data/`.
    pub allow: String,
    /// The namespaces that may use it; `"*"` means all. Empty means none.
    pub namespaces: Vec<String>,
    /// How its store is reached.
    #[serde(flatten)]
    pub access: S3Access,
    /// Files that can only be verified more weakly than this are refused.
    pub minimum_verification: Verification,
}

access::reached! {
    RawSource {
        allow: String,
        #[serde(default)]
        namespaces: Vec<String>,
        #[serde(default)]
        minimum_verification: Verification,
    }
}

impl From<RawSource> for Source {
    fn from(raw: RawSource) -> Self {
        let (access, raw) = raw.split();
        Self {
            allow: raw.allow,
            namespaces: raw.namespaces,
            access,
            minimum_verification: raw.minimum_verification,
        }
    }
}

impl Source {
    /// Whether this source may serve `uri` to pods of `namespace`.
    pub fn serves(&self, uri: &DatasetUri, namespace: &Namespace) -> bool {
        // The allowed prefix ends with a slash, so `s3://models/` never matches `s3://models-private/`.
        // `s3://bucket` is written back with its slash.
        uri.to_string().starts_with(&self.allow) && names(&self.namespaces, namespace)
    }
}

/// Whether a list of namespaces has this one; `"*"` means all.
fn names(all: &[String], namespace: &Namespace) -> bool {
    all.iter()
        .any(|name| name == "*" || name == namespace.as_str())
}

/// One image that other namespaces may start from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Export {
    /// Whose image it is.
    pub namespace: Namespace,
    /// Which.
    pub name: ImageName,
    /// The namespaces that may start from it; `"*"` means all.
    pub to: Vec<String>,
}

/// How the chunks of new images are compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Compression {
    /// Not at all.
    #[default]
    None,
    /// LZ4, each chunk by itself, and only those that become smaller by an eighth.
    Lz4,
}

/// A key for the images of some namespaces.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ImageKey {
    /// Its name, which images remember.
    pub id: String,
    /// The namespaces whose images it is for; `"*"` means all.
    pub namespaces: Vec<String>,
    /// A file with 32 bytes or their 64 hex digits, which only root may read.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub file: Option<PathBuf>,
    /// A program with its arguments that prints 64 hex digits.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub command: Option<Vec<String>>,
}

impl ImageKey {
    fn is_for(&self, namespace: &Namespace) -> bool {
        names(&self.namespaces, namespace)
    }

    /// What is wrong with it: key, value and what is allowed.
    fn fault(&self) -> Option<(&'static str, String, &'static str)> {
        let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-');
        if self.id.is_empty() || self.id.len() > 64 || !self.id.bytes().all(plain) {
            let reason = "a key's id has 1 to 64 letters, digits, '.', '_' or '-'";
            return Some(("images.key.id", format!("{:?}", self.id), reason));
        }
        let programs = self.command.as_deref();
        let of = |path: Option<&std::path::Path>| path.is_some_and(std::path::Path::is_absolute);
        let file = of(self.file.as_deref());
        let program = of(programs
            .and_then(|words| words.first())
            .map(std::path::Path::new));
        if (self.file.is_some(), programs.is_some()) == (file, program) && file != program {
            return None;
        }
        let reason = "a key has either a file or a command, by its absolute path";
        Some(("images.key", format!("{:?}", self.id), reason))
    }
}

/// Datasets on this node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Datasets {
    /// Where they lie.
    pub root: PathBuf,
    /// Allowed sources; none by default, so that nothing is fetched that nobody allowed.
    pub sources: Vec<Source>,
    /// Parallel ranged GETs of one download.
    pub concurrency: usize,
    /// Bytes of one ranged GET.
    pub part_size: u64,
}

/// Images on this node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Images {
    /// Where they lie.
    pub root: PathBuf,
    /// Where some lie in memory; none where none do.
    pub memory: Option<Memory>,
    /// What leaves its namespace.
    pub exports: Vec<Export>,
    /// How new images are compressed.
    pub compression: Compression,
    /// Whether most of the memory is stored before the tasks are stopped for a checkpoint.
    pub precopy: bool,
    /// Keys, of which the first that is for a namespace encrypts its new images.
    pub keys: Vec<ImageKey>,
    /// Which may go when room is needed.
    pub retention: Retention,
    /// Where images have copies.
    pub tiers: Vec<Tier>,
}

/// How containers are restored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Restore {
    /// Lazily or eagerly.
    pub paging: Paging,
}

/// The node's agent.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Agent {
    /// It rests so long between two rounds.
    pub every: Duration,
    /// The group, by name or number, that may use its API beside root.
    pub group: Option<String>,
}

/// How long the shim waits for what. All lie inside the kubelet's own limits (`docs/DESIGN.md`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Deadlines {
    /// Sandbox create waits this long for data, then fails with the progress; the kubelet retries it
    /// and the download goes on. RunPodSandbox has 240 s.
    pub sandbox_data: Duration,
    /// What container create and start may spend together on data, image and restore. StartContainer has
    /// 120 s.
    pub container: Duration,
    /// What the dump of a checkpoint may take, and before it the memory that is still coming in. The
    /// kubelet's own limit is 120 s.
    pub checkpoint: Duration,
}

/// What is left for a cold start when a wait is given up. `runc create` takes a tenth of a second, and
/// seconds on a node that starts many pods at once, which is when data and images are late.
const COLD_START: Duration = Duration::from_secs(15);

impl Deadlines {
    /// What a wait that the container can do without has to leave of [`Deadlines::container`]: a third of
    /// it where that is short.
    pub fn cold_start(&self) -> Duration {
        COLD_START.min(self.container / 3)
    }
}

/// How containers with `warm-start: auto` are treated.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct WarmStart {
    /// How long after its start a container is waited for to be warm; after that no image is made of it.
    pub within: Duration,
    /// A restored container that fails sooner than this counts against its image.
    pub early: Duration,
    /// At so many in a row the image is put into quarantine.
    pub failures: u32,
    /// Percent of the disk that have to be free for an image to be made.
    pub min_free: u8,
}

/// The node's configuration, resolved.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct NodeConfig {
    /// Datasets.
    pub datasets: Datasets,
    /// Images.
    pub images: Images,
    /// Restore.
    pub restore: Restore,
    /// `warm-start: auto`.
    pub warm_start: WarmStart,
    /// Deadlines.
    pub deadlines: Deadlines,
    /// The node's agent.
    pub agent: Agent,
    /// The cluster that the node is of.
    pub kubernetes: Kubernetes,
}

/// Why a configuration was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ConfigError {
    /// Not TOML, an unknown key, or a value of another type.
    #[error("{file}: {reason}")]
    Syntax {
        /// The file.
        file: String,
        /// What the parser said, with line and column.
        reason: String,
    },
    /// A value that cannot be.
    #[error("{file}: {key} = {value}: {reason}")]
    Value {
        /// The file.
        file: String,
        /// The key, dotted.
        key: String,
        /// What was found.
        value: String,
        /// What is allowed.
        reason: &'static str,
    },
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct Raw {
    datasets: RawDatasets,
    images: RawImages,
    restore: RawRestore,
    #[serde(rename = "warm-start")]
    warm_start: RawWarmStart,
    deadlines: RawDeadlines,
    agent: RawAgent,
    kubernetes: Kubernetes,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default, rename_all = "kebab-case")]
struct RawDatasets {
    root: Option<PathBuf>,
    source: Vec<Source>,
    concurrency: Option<usize>,
    part_size_mib: Option<u64>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct RawImages {
    root: Option<PathBuf>,
    export: Vec<Export>,
    compression: Compression,
    precopy: Option<bool>,
    key: Vec<ImageKey>,
    memory: memory::RawMemory,
    retention: retention::RawRetention,
    tier: Vec<Tier>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct RawRestore {
    paging: Paging,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default, rename_all = "kebab-case")]
struct RawWarmStart {
    #[serde(deserialize_with = "crate::duration::deserialize")]
    within: Option<Duration>,
    #[serde(deserialize_with = "crate::duration::deserialize")]
    early: Option<Duration>,
    failures: Option<u32>,
    min_free: Option<u8>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default, rename_all = "kebab-case")]
struct RawDeadlines {
    #[serde(deserialize_with = "crate::duration::deserialize")]
    sandbox_data: Option<Duration>,
    #[serde(deserialize_with = "crate::duration::deserialize")]
    container: Option<Duration>,
    #[serde(deserialize_with = "crate::duration::deserialize")]
    checkpoint: Option<Duration>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
struct RawAgent {
    #[serde(deserialize_with = "crate::duration::deserialize")]
    every: Option<Duration>,
    group: Option<String>,
}

impl Default for NodeConfig {
    fn default() -> Self {
        Raw::default().resolve()
    }
}

impl NodeConfig {
    /// Reads a configuration; `file` is only named in errors.
    ///
    /// # Errors
    /// The first thing that is wrong, with its place.
    pub fn parse(file: &str, text: &str) -> Result<Self, ConfigError> {
        let raw: Raw = toml::from_str(text).map_err(|e| ConfigError::Syntax {
            file: file.to_owned(),
            reason: e.to_string().trim_end().to_owned(),
        })?;
        let refuse = |key: &str, value: String, reason| ConfigError::Value {
            file: file.to_owned(),
            key: key.to_owned(),
            value,
            reason,
        };
        for source in &raw.datasets.source {
            let known = source.allow.starts_with("s3://") || source.allow.starts_with("file:///");
            if !known || !source.allow.ends_with('/') || source.allow.parse::<DatasetUri>().is_err()
            {
                let reason = "an allowed source is a URI that ends with a slash: s3://bucket/, s3://bucket/prefix/ or file:///folder/";
                return Err(refuse(
                    "datasets.source.allow",
                    format!("{:?}", source.allow),
                    reason,
                ));
            }
            if let Some((value, reason)) = source.access.fault() {
                return Err(refuse("datasets.source.endpoint", value, reason));
            }
        }
        for tier in &raw.images.tier {
            if let Some((key, value, reason)) = tier.fault() {
                return Err(refuse(key, value, reason));
            }
        }
        for (key, root) in [
            ("datasets.root", &raw.datasets.root),
            ("images.root", &raw.images.root),
            ("kubernetes.kubeconfig", &raw.kubernetes.kubeconfig),
            ("images.memory.root", &raw.images.memory.root),
        ] {
            if let Some(path) = root.as_ref().filter(|path| !path.is_absolute()) {
                return Err(refuse(
                    key,
                    format!("{path:?}"),
                    "an absolute path is needed",
                ));
            }
        }
        if raw.agent.every.is_some_and(|every| every.is_zero()) {
            let reason = "some time has to be between two rounds";
            return Err(refuse("agent.every", "0s".to_owned(), reason));
        }
        if let Some((name, value, reason)) = raw.images.retention.fault() {
            return Err(refuse(name, value, reason));
        }
        for (place, key) in raw.images.key.iter().enumerate() {
            if let Some((name, value, reason)) = key.fault() {
                return Err(refuse(name, value, reason));
            }
            if raw.images.key[..place]
                .iter()
                .any(|other| other.id == key.id)
            {
                let reason = "each key has an id of its own";
                return Err(refuse("images.key.id", format!("{:?}", key.id), reason));
            }
        }
        if let Some(n) = raw.datasets.concurrency.filter(|n| !(1..=1024).contains(n)) {
            return Err(refuse(
                "datasets.concurrency",
                n.to_string(),
                "1 to 1024 parallel requests",
            ));
        }
        if raw.warm_start.failures == Some(0) {
            return Err(refuse("warm-start.failures", "0".to_owned(), "1 or more"));
        }
        if let Some(percent) = raw.warm_start.min_free.filter(|percent| *percent > 99) {
            return Err(refuse(
                "warm-start.min-free",
                percent.to_string(),
                "0 to 99 percent",
            ));
        }
        // 5 MiB is S3's smallest part; above 1 GiB a retry costs more than it saves.
        if let Some(n) = raw
            .datasets
            .part_size_mib
            .filter(|n| !(1..=1024).contains(n))
        {
            return Err(refuse(
                "datasets.part-size-mib",
                n.to_string(),
                "1 to 1024 MiB",
            ));
        }
        Ok(raw.resolve())
    }

    /// The source that may serve `uri` to pods of `namespace`, if any does.
    pub fn source_for(&self, uri: &DatasetUri, namespace: &Namespace) -> Option<&Source> {
        self.datasets
            .sources
            .iter()
            .find(|source| source.serves(uri, namespace))
    }

    /// The key that encrypts new images of `namespace`; none where they are not encrypted.
    pub fn key_for(&self, namespace: &Namespace) -> Option<&ImageKey> {
        self.images.keys.iter().find(|key| key.is_for(namespace))
    }

    /// The key `id`, if it is one of those of `namespace`.
    fn key_named(&self, id: &str, namespace: &Namespace) -> Option<&ImageKey> {
        let mut all = self.images.keys.iter();
        all.find(|key| key.id == id && key.is_for(namespace))
    }

    /// The key for an image of `namespace` that says it is encrypted with the key `id`: none where this node does not
    /// have that. Of an image that says nothing, the key that it should be encrypted with.
    pub fn key_of(&self, id: Option<&str>, namespace: &Namespace) -> Option<&ImageKey> {
        match id {
            Some(id) => self.key_named(id, namespace),
            None => self.key_for(namespace),
        }
    }

    /// Where images of `namespace` have copies, if there is such a place.
    pub fn tier_for(&self, namespace: &Namespace) -> Option<&Tier> {
        let mut all = self.images.tiers.iter();
        all.find(|tier| names(&tier.namespaces, namespace))
    }

    /// The tier that `place` lies in; for images of `namespace`, where that is known.
    pub fn tier_at(&self, place: &ImagePlace, namespace: Option<&Namespace>) -> Option<&Tier> {
        let mut all = self.images.tiers.iter();
        all.find(|tier| {
            tier.has(place) && namespace.is_none_or(|namespace| names(&tier.namespaces, namespace))
        })
    }

    /// Whether pods of `user` may start from the image `name` of `owner`.
    pub fn may_restore(&self, owner: &Namespace, name: &ImageName, user: &Namespace) -> bool {
        owner == user
            || self.images.exports.iter().any(|export| {
                export.namespace == *owner
                    && export.name == *name
                    && export.to.iter().any(|to| to == "*" || to == user.as_str())
            })
    }
}

impl Raw {
    fn resolve(self) -> NodeConfig {
        NodeConfig {
            datasets: Datasets {
                root: self
                    .datasets
                    .root
                    .unwrap_or_else(|| paths::DATASETS_DIR.into()),
                sources: self.datasets.source,
                // 16 parts of 8 MiB in flight: what saturates a 10 Gb/s link at S3's 85-90 MB/s a request.
                concurrency: self.datasets.concurrency.unwrap_or(16),
                part_size: self.datasets.part_size_mib.unwrap_or(8) << 20,
            },
            images: Images {
                root: self.images.root.unwrap_or_else(|| paths::IMAGES_DIR.into()),
                memory: self.images.memory.resolve(),
                exports: self.images.export,
                compression: self.images.compression,
                precopy: self.images.precopy.unwrap_or(true),
                keys: self.images.key,
                retention: self.images.retention.resolve(),
                tiers: self.images.tier,
            },
            restore: Restore {
                paging: self.restore.paging,
            },
            warm_start: WarmStart {
                within: self.warm_start.within.unwrap_or(Duration::from_secs(600)),
                early: self.warm_start.early.unwrap_or(Duration::from_secs(60)),
                failures: self.warm_start.failures.unwrap_or(3),
                // Below it the kubelet evicts pods (`evictionHard`, `nodefs.available<10%`).
                min_free: self.warm_start.min_free.unwrap_or(10),
            },
            agent: Agent {
                // A round that finds nothing to do reads one manifest of each image.
                every: self.agent.every.unwrap_or(Duration::from_secs(60)),
                group: self.agent.group,
            },
            kubernetes: self.kubernetes,
            deadlines: Deadlines {
                sandbox_data: self
                    .deadlines
                    .sandbox_data
                    .unwrap_or(Duration::from_secs(200)),
                container: self.deadlines.container.unwrap_or(Duration::from_secs(90)),
                checkpoint: self
                    .deadlines
                    .checkpoint
                    .unwrap_or(Duration::from_secs(110)),
            },
        }
    }
}

#[cfg(test)]
mod tests;
