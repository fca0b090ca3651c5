//! The bytes of an image: its pages, its archives, cut into chunks that are addressed by what they hold.
//!
//! ```text
//!  pages of a process      0x7000_0000        0x7001_0000        0x7002_0000
//!                          │ 16 pages         │ (nothing)        │ 3 pages
//!  stream pages-1.img      [ chunk 0 ][ zeros ][ chunk 1 ] …      what CRIU would find in that file
//!  chunks.index            chunk 0: digest, pack 0, offset …      one row for each different chunk
//!  pack-<id>               ▓▓▓▓▓▓▓▓▓▓▓▓                           their bytes, one behind the other
//! ```
//! A [`Stream`] is what a file of the image holds, as a list of chunks and runs of zeros. A chunk is at most
//! [`CHUNK`] bytes, has the BLAKE3 of its plain bytes as its digest, and lies in a pack: as it is, or
//! compressed, and then encrypted where the image is. Equal chunks are stored once, in one image and from
//! one generation of an image to the next: what the newest generation has is not written again, its packs
//! are hard-linked into the new folder. So every image is complete in its own folder, is removed by
//! removing that, and the file system counts who still needs a pack.
//!
//! Nothing is handed out that was not compared with its digest ([`Chunks`]). `docs/IMAGE_FORMAT.md` has the
//! bytes.

use std::{
    fmt, io,
    path::{Path, PathBuf},
    str::FromStr,
};

pub use rekindle_core::config::Compression;
use serde::{Deserialize, Serialize};

mod cipher;
mod codec;
mod compare;
mod incoming;
mod index;
mod reader;
mod writer;

pub use cipher::{Cipher, Key, KeyError};
pub use compare::{Common, Composition};
pub use incoming::{Remote, RemoteError};
pub use index::{Index, MAX_INDEX};
pub use reader::{Chunks, StreamReader};
pub use writer::{Base, ChunkWriter, Full, Room, Stored, StreamWriter};

/// Most bytes of a chunk, and what they are aligned to in the address space of a process.
///
/// Measured (`make bench ARGS="format"`): smaller ones cost more time for each byte, and larger ones make a
/// thread that waits for one page wait longer, and a change of one page store more.
pub const CHUNK: usize = 64 << 10;
/// What the length of a run of zeros is a multiple of: both pages and blocks of a tar archive are.
const ZEROS: u64 = 512;

/// The BLAKE3 of a chunk's plain bytes; in an encrypted image keyed, so that it tells nothing without the key.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Digest(pub [u8; 32]);

impl Digest {
    /// Of a file that is not encrypted.
    pub fn of(bytes: &[u8]) -> Self {
        Self(*blake3::hash(bytes).as_bytes())
    }

    /// Of a manifest; under a key, only its holder can make it.
    pub fn of_manifest(bytes: &[u8], key: Option<&Key>) -> Self {
        match key {
            Some(key) => key.manifest_digest(bytes),
            None => Self::of(bytes),
        }
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

impl FromStr for Digest {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        let hash =
            blake3::Hash::from_hex(text).map_err(|_| "a digest has 64 hex digits".to_owned())?;
        Ok(Self(*hash.as_bytes()))
    }
}

impl TryFrom<String> for Digest {
    type Error = String;
    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl From<Digest> for String {
    fn from(digest: Digest) -> Self {
        digest.to_string()
    }
}

/// The name of a pack: 32 hex digits, drawn by chance when it is made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct PackId([u8; 16]);

impl PackId {
    /// Its file in an image's folder.
    pub fn file(self) -> String {
        format!("pack-{self}")
    }
}

impl fmt::Display for PackId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:032x}", u128::from_be_bytes(self.0))
    }
}

impl FromStr for PackId {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        let lower = |b: u8| b.is_ascii_digit() || (b'a'..=b'f').contains(&b);
        match u128::from_str_radix(text, 16) {
            Ok(id) if text.len() == 32 && text.bytes().all(lower) => Ok(Self(id.to_be_bytes())),
            _ => Err("a pack's name has 32 lower-case hex digits".to_owned()),
        }
    }
}

impl TryFrom<String> for PackId {
    type Error = String;
    fn try_from(text: String) -> Result<Self, String> {
        text.parse()
    }
}

impl From<PackId> for String {
    fn from(id: PackId) -> Self {
        id.to_string()
    }
}

/// One part of a stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part {
    /// A chunk, by its row in the index.
    Chunk(u32),
    /// So many times [`ZEROS`] zeros, at least one.
    Zeros(u32),
}

/// What a file of the image holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stream {
    /// The file: `criu/pages-1.img`, `upper.tar`.
    pub name: String,
    /// Its bytes in their order.
    pub parts: Vec<Part>,
}

/// Why chunks could not be written, or may not be read.
#[derive(Debug, thiserror::Error)]
pub enum ChunkError {
    /// The file system refused.
    #[error("cannot {doing} {}", path.display())]
    Io {
        /// "write", "read".
        doing: &'static str,
        /// What.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// A chunk is not what was sealed.
    #[error("{} is damaged: what lies at byte {offset} is not what was sealed", path.display())]
    Damaged {
        /// The pack.
        path: PathBuf,
        /// Where the chunk begins in it.
        offset: u64,
    },
    /// What is not on the node yet does not come.
    #[error("what is not on this node of the image does not come")]
    Away(#[source] RemoteError),
    /// A store gives other bytes than what was sealed, however often it is asked.
    #[error(
        "{store} gives something else for {pack}: what lies at byte {offset} is not what was sealed"
    )]
    Lied {
        /// Which store.
        store: String,
        /// The pack.
        pack: String,
        /// Where the chunk begins in it.
        offset: u64,
    },
    /// The index is none of ours.
    #[error("the index of chunks is malformed: {0}")]
    Index(&'static str),
    /// The system has no randomness, or a key cannot be used.
    #[error(transparent)]
    Key(#[from] KeyError),
}

impl ChunkError {
    fn io<'a>(doing: &'static str, path: &'a Path) -> impl FnOnce(io::Error) -> Self + 'a {
        move |source| Self::Io {
            doing,
            path: path.to_owned(),
            source,
        }
    }

    /// Whether the disk is full.
    pub fn is_full(&self) -> bool {
        matches!(self, Self::Io { source, .. } if rekindle_store::is_full(source))
    }
}

impl From<ChunkError> for io::Error {
    fn from(error: ChunkError) -> Self {
        match &error {
            ChunkError::Io { source, .. } => Self::new(source.kind(), error),
            _ => Self::new(io::ErrorKind::InvalidData, error),
        }
    }
}

#[cfg(test)]
pub(crate) use incoming::tests::{Answer, from_a_store};

#[cfg(test)]
pub(crate) mod tests;
