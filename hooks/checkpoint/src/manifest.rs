//! `manifest.json`: what an image is, and every file of it with its size and checksum.
//!
//! Whoever reads one treats it as hostile: its size, its counts and its paths are bounded before use, and
//! a format that is not ours is refused by its number.

use std::{
    collections::BTreeSet,
    fs::File,
    io::Read,
    path::{Path, PathBuf},
};

use rekindle_core::name::{ImageName, Namespace};
use serde::{Deserialize, Serialize};

use crate::chunks::{Compression, Digest, PackId, Stored};

/// The format that this build writes and reads.
pub const FORMAT: u32 = 2;
/// Its file name in an image's folder.
pub const MANIFEST_FILE: &str = "manifest.json";
/// Beside it: the manifest's own BLAKE3, 64 hex digits and a newline; keyed where the image is encrypted.
pub const MANIFEST_DIGEST_FILE: &str = "manifest.blake3";
/// Where the chunks are: see [`Index`](crate::chunks::Index).
pub const INDEX_FILE: &str = "chunks.index";
/// Beside it while packs are coming in: where the rest of them is. No part of the image.
pub const ORIGIN_FILE: &str = "origin.json";
/// The folder of CRIU's images inside an image's folder.
pub const CRIU_DIR: &str = "criu";
/// The stream of the container's writable layer.
pub const UPPER_FILE: &str = "upper.tar";
/// The stream of the container's `/dev/shm`.
pub const SHM_FILE: &str = "shm.tar";

/// Most bytes of a manifest. A file costs about 150 bytes in it and a process about 60.
pub const MAX_BYTES: u64 = 16 << 20;
/// Most files of an image: CRIU writes about ten per process.
pub const MAX_FILES: usize = 65_536;
/// Most processes, mounts, CPU flags: far above any container, far below what would hurt.
pub const MAX_ITEMS: usize = 32_768;
/// Longest name of a file, in bytes: `NAME_MAX`.
pub const MAX_FILE_NAME: usize = 255;

/// Where a container came from.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Source {
    /// The container image's name, as it was asked for.
    pub image_ref: Option<String>,
    /// The container image's digest (`sha256:…`): what decides whether the root file system is the same.
    pub image_digest: Option<String>,
    /// The container's id.
    pub container: String,
    /// `<namespace>/<name>` of its pod.
    pub pod: Option<String>,
    /// The hash of its [kind](crate::warm), where a container made it for others of that.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub warm: Option<String>,
}

/// The machine and the programs that made an image, or that shall restore one.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Host {
    /// `x86_64`, `aarch64`: as `uname -m` says.
    pub arch: String,
    /// `vendor_id` of `/proc/cpuinfo` (x86), `CPU implementer` (arm).
    pub cpu_vendor: String,
    /// `model name` of `/proc/cpuinfo` (x86), `CPU part` (arm); for people.
    pub cpu_model: String,
    /// The CPU features that user code can see and depend on: see [`fit::relevant_flags`](crate::fit::relevant_flags).
    pub cpu_flags: BTreeSet<String>,
    /// `uname -r`.
    pub kernel: String,
    /// `4.2.1`.
    pub criu: String,
    /// `1.3.6`.
    pub runc: String,
}

/// The options of a dump that its restore must repeat.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct DumpFlags {
    /// Established TCP connections were allowed.
    pub open_tcp: bool,
    /// Unix sockets with a peer outside the container were allowed.
    pub external_unix_sockets: bool,
    /// The terminal was dumped (`--shell-job`).
    pub terminal: bool,
    /// File locks were dumped.
    pub file_locks: bool,
    /// Deleted files that are still open were linked back for the time of the dump.
    pub link_remap: bool,
    /// Namespaces whose content was not dumped (`network`).
    pub empty_namespaces: Vec<String>,
    /// `soft`, `full`, `strict`, `ignore`; empty means CRIU's default.
    pub cgroups_mode: String,
    /// The pages are marked so that they can be restored lazily.
    pub lazy: bool,
}

/// The five capability sets, names as in OCI (`CAP_CHOWN`).
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Capabilities {
    /// What can ever be gained.
    pub bounding: BTreeSet<String>,
    /// What is checked.
    pub effective: BTreeSet<String>,
    /// What survives an exec of a file that has it too.
    pub inheritable: BTreeSet<String>,
    /// What may be made effective.
    pub permitted: BTreeSet<String>,
    /// What survives any exec.
    pub ambient: BTreeSet<String>,
}

/// What a container's processes may do. CRIU gives it back from the image, whatever the new spec says.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Security {
    /// The user of the container's first process.
    pub uid: u32,
    /// Its group.
    pub gid: u32,
    /// Its further groups.
    pub additional_gids: BTreeSet<u32>,
    /// Its capabilities.
    pub capabilities: Capabilities,
    /// SHA-256 of the seccomp profile as JSON; none means no profile.
    pub seccomp: Option<String>,
    /// Whether an exec can gain privileges.
    pub no_new_privileges: bool,
    /// The AppArmor profile.
    pub apparmor: Option<String>,
    /// The SELinux label.
    pub selinux: Option<String>,
}

/// What a container's spec says that a restore must find again.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Container {
    /// What its processes may do.
    pub security: Security,
    /// Destinations of its mounts.
    pub mounts: BTreeSet<String>,
    /// Whether its stdio is a terminal.
    pub terminal: bool,
    /// Its host name.
    pub hostname: Option<String>,
}

/// One process, for people.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Process {
    /// Its number inside the container.
    pub pid: u32,
    /// Its name, at most 15 bytes.
    pub comm: String,
    /// Resident memory, bytes.
    pub rss: u64,
}

/// What nobody knows of an image, because others have made it and did not write it down.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Unknown {
    /// The CPU, the kernel and the CRIU that it was made with.
    Host,
    /// What was in its writable layer.
    Layer,
    /// What was in the `/dev/shm` that its pod had lent it.
    Shm,
}

/// All that is known about an image but its files: what the shim hands in, and what `fit` compares.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Facts {
    /// Where it came from.
    pub source: Source,
    /// What made it.
    pub host: Host,
    /// How it was dumped.
    pub dump: DumpFlags,
    /// The container's spec.
    pub container: Container,
    /// The container's processes.
    pub processes: Vec<Process>,
    /// What is not known of it, which of a container's image of our own is nothing.
    #[serde(skip_serializing_if = "BTreeSet::is_empty")]
    pub unknown: BTreeSet<Unknown>,
}

/// One file of an image that is what it is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FileEntry {
    /// [`INDEX_FILE`], or one name inside [`CRIU_DIR`].
    pub path: String,
    /// Bytes.
    pub size: u64,
    /// BLAKE3 of all of them.
    pub blake3: Digest,
}

/// One file of an image that holds chunks. Its bytes are proved by their digests in the index.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PackEntry {
    /// Which.
    pub id: PackId,
    /// Bytes.
    pub size: u64,
}

/// What has to be known to decrypt an image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Encryption {
    /// The key's name in the configuration of the node that made the image.
    pub key: String,
    /// 16 hex digits that only the right key gives.
    pub check: String,
}

/// What an image is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// [`FORMAT`].
    pub format: u32,
    /// Its namespace.
    pub namespace: Namespace,
    /// Its name.
    pub name: ImageName,
    /// The request that made it, so that whoever asked finds it.
    pub request: String,
    /// When it was sealed, seconds since 1970.
    pub created: u64,
    /// All but its files.
    pub facts: Facts,
    /// Whether and how its chunks are compressed; each one says so of itself, this is for people.
    pub compression: Compression,
    /// None where the image is not encrypted.
    pub encryption: Option<Encryption>,
    /// What became of the bytes of its streams.
    pub stored: Stored,
    /// Its packs, in the order in which the index counts them.
    pub packs: Vec<PackEntry>,
    /// Every file of it but the packs, the manifest and its digest, sorted by path.
    pub files: Vec<FileEntry>,
}

/// Why a manifest was refused.
#[derive(Debug, thiserror::Error)]
pub enum ManifestError {
    /// It could not be read.
    #[error("cannot read the manifest {}", path.display())]
    Read {
        /// Which.
        path: PathBuf,
        /// What the kernel said.
        source: std::io::Error,
    },
    /// It is no regular file, or too large to be one of ours.
    #[error("the manifest {} has {size} bytes, and at most {MAX_BYTES} are read: it is not ours", path.display())]
    TooLarge {
        /// Which.
        path: PathBuf,
        /// Its bytes, or as many as were seen.
        size: u64,
    },
    /// It is not the JSON that we write.
    #[error("the manifest {} cannot be understood ({reason}): the image is damaged or not ours", path.display())]
    Syntax {
        /// Which.
        path: PathBuf,
        /// What the parser said.
        reason: String,
    },
    /// Another format.
    #[error("the manifest {} has format {found}, and this build reads format {reads}: use the version of rekindle that made it, or make the image again", path.display())]
    Format {
        /// Which.
        path: PathBuf,
        /// The format it names.
        found: u64,
        /// The format that this build reads.
        reads: u32,
    },
    /// Too many of something.
    #[error("the manifest {} lists {count} {what}, and at most {max} are accepted", path.display())]
    Count {
        /// Which.
        path: PathBuf,
        /// Of what.
        what: &'static str,
        /// How many.
        count: usize,
        /// How many are accepted.
        max: usize,
    },
    /// A file that may not be in an image.
    #[error("the manifest {} names the file {file:?}: a file of an image is {INDEX_FILE} or one plain name inside {CRIU_DIR}/, each listed once and in order", path.display())]
    FileName {
        /// Which manifest.
        path: PathBuf,
        /// The file.
        file: String,
    },
}

impl Manifest {
    /// Reads and checks one; `path` is only named in errors.
    ///
    /// # Errors
    /// The first thing that is wrong with it.
    pub fn parse(path: &Path, bytes: &[u8]) -> Result<Self, ManifestError> {
        let format = declared_format(path, bytes)?;
        if format != u64::from(FORMAT) {
            return Err(ManifestError::Format {
                path: path.to_owned(),
                found: format,
                reads: FORMAT,
            });
        }
        let manifest: Self = parse_json(path, bytes)?;
        manifest.facts.check(path)?;
        within(path, "files", manifest.files.len(), MAX_FILES)?;
        within(path, "packs", manifest.packs.len(), MAX_FILES)?;
        let mut last = "";
        for file in &manifest.files {
            let ours = file.path == INDEX_FILE || file.path.contains('/');
            if !ours || !is_image_path(&file.path) || file.path.as_str() <= last {
                return Err(ManifestError::FileName {
                    path: path.to_owned(),
                    file: shorten(&file.path),
                });
            }
            last = &file.path;
        }
        Ok(manifest)
    }

    /// Bytes of all its files. Packs that it shares with other generations count in each.
    pub fn total_bytes(&self) -> u64 {
        let packs = self.packs.iter().map(|pack| pack.size);
        let files = self.files.iter().map(|file| file.size);
        packs.chain(files).fold(0, u64::saturating_add)
    }

    /// Bytes that it added to the store: what its packs from earlier generations have is not among them.
    pub fn written_bytes(&self) -> u64 {
        let files = self.files.iter().map(|file| file.size);
        files.fold(self.stored.written, u64::saturating_add)
    }

    /// The entry of one of its files.
    pub fn file(&self, path: &str) -> Option<&FileEntry> {
        self.files
            .binary_search_by(|file| file.path.as_str().cmp(path))
            .ok()
            .map(|i| &self.files[i])
    }
}

impl Facts {
    /// Checks the counts; `path` is only named in errors.
    pub(crate) fn check(&self, path: &Path) -> Result<(), ManifestError> {
        within(path, "processes", self.processes.len(), MAX_ITEMS)?;
        within(path, "mounts", self.container.mounts.len(), MAX_ITEMS)?;
        within(path, "CPU features", self.host.cpu_flags.len(), MAX_ITEMS)
    }
}

fn within(path: &Path, what: &'static str, count: usize, max: usize) -> Result<(), ManifestError> {
    if count > max {
        return Err(ManifestError::Count {
            path: path.to_owned(),
            what,
            count,
            max,
        });
    }
    Ok(())
}

/// The `format` that a JSON object names. Read first and alone, for another format may look otherwise.
pub(crate) fn declared_format(path: &Path, bytes: &[u8]) -> Result<u64, ManifestError> {
    #[derive(Deserialize)]
    struct Versioned {
        format: u64,
    }
    parse_json::<Versioned>(path, bytes).map(|versioned| versioned.format)
}

pub(crate) fn parse_json<T: for<'a> Deserialize<'a>>(
    path: &Path,
    bytes: &[u8],
) -> Result<T, ManifestError> {
    serde_json::from_slice(bytes).map_err(|e| ManifestError::Syntax {
        path: path.to_owned(),
        reason: shorten(&e.to_string()),
    })
}

/// Reads a whole small file, and no more of it than [`MAX_BYTES`], whatever its size claims to be.
pub(crate) fn read_bounded(path: &Path, file: &mut File) -> Result<Vec<u8>, ManifestError> {
    let read = |source| ManifestError::Read {
        path: path.to_owned(),
        source,
    };
    let size = file.metadata().map_err(read)?.len();
    let mut bytes = Vec::new();
    if size <= MAX_BYTES {
        file.take(MAX_BYTES + 1)
            .read_to_end(&mut bytes)
            .map_err(read)?;
    }
    let size = size.max(bytes.len() as u64);
    if size > MAX_BYTES {
        return Err(ManifestError::TooLarge {
            path: path.to_owned(),
            size,
        });
    }
    Ok(bytes)
}

/// How an image names a file of its CRIU folder.
pub(crate) fn criu_path(path: &Path) -> String {
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    format!("{CRIU_DIR}/{name}")
}

/// Whether this may be the path of an image's file: `name` or `criu/name`, nothing hidden, nothing odd.
pub(crate) fn is_image_path(path: &str) -> bool {
    let name = path
        .strip_prefix(CRIU_DIR)
        .and_then(|rest| rest.strip_prefix('/'))
        .unwrap_or(path);
    !name.is_empty()
        && name.len() <= MAX_FILE_NAME
        && !name.starts_with('.')
        && name
            .bytes()
            .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-'))
        && ![MANIFEST_FILE, MANIFEST_DIGEST_FILE, ORIGIN_FILE, CRIU_DIR].contains(&path)
}

/// Enough of a hostile text for a message, with nothing in it that a terminal would obey.
pub(crate) fn shorten(text: &str) -> String {
    let plain = |c: char| if c.is_control() { '?' } else { c };
    text.chars().take(120).map(plain).collect()
}

#[cfg(test)]
mod tests;
