//! What is in an archive, and in what two of them differ, without unpacking any.

use std::{
    cmp::Ordering,
    io::{self, BufReader, Read},
    path::{Path, PathBuf},
};

use serde::Serialize;
use tar::{Archive, EntryType};

use super::{
    ArchiveError, MAX_BYTES,
    unpack::{BUFFER, Item, item},
};

/// What an entry of an archive is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// A folder.
    Folder,
    /// A regular file.
    File,
    /// Another name of a file that comes before it.
    Link,
    /// A symlink.
    Symlink,
    /// A FIFO.
    Fifo,
    /// A whiteout: the container has deleted what its image has there.
    Deleted,
}

/// An entry of an archive.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Listed {
    /// Its path, relative; empty for the folder that was packed.
    pub path: PathBuf,
    /// What it is.
    pub kind: Kind,
    /// Bytes of its content, holes included.
    pub bytes: u64,
    /// Of all that it is but its times: content, owner, mode, target, attributes.
    digest: blake3::Hash,
}

/// How an entry of one archive differs from that of the same path in another.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Change {
    /// Only the second one has it.
    Added,
    /// Both have it, and it is not the same.
    Changed,
    /// Only the first one has it.
    Removed,
}

/// A path in which two archives differ.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Difference {
    /// The path.
    pub path: PathBuf,
    /// How.
    pub change: Change,
    /// What it is, in the second one where both have it.
    pub kind: Kind,
    /// Bytes of its content in the first one and in the second one.
    pub bytes: [u64; 2],
}

/// All entries of an archive, sorted by path. Reads all of it.
///
/// # Errors
/// As [`unpack`](super::unpack), but for what only unpacking finds.
pub fn list(archive: impl Read) -> Result<Vec<Listed>, ArchiveError> {
    let mut archive = Archive::new(BufReader::with_capacity(BUFFER, archive));
    let mut last = PathBuf::new();
    let malformed = |path: &Path| {
        let path = path.to_owned();
        |source| ArchiveError::Malformed { path, source }
    };
    let (mut all, mut bytes) = (Vec::new(), 0_u64);
    for entry in archive.entries().map_err(malformed(&last))? {
        let mut entry = entry.map_err(malformed(&last))?;
        let item = item(&mut entry, &last)?;
        bytes = bytes.saturating_add(item.size);
        if bytes > MAX_BYTES {
            let (claimed, max) = (bytes, MAX_BYTES);
            return Err(ArchiveError::TooLarge { claimed, max });
        }
        all.push(Listed {
            kind: kind(&item)?,
            bytes: item.size,
            digest: digest(&item, &mut entry).map_err(malformed(&item.path))?,
            path: item.path.clone(),
        });
        last = item.path;
    }
    all.sort_by(|a, b| a.path.cmp(&b.path));
    Ok(all)
}

/// In what the second list differs from the first, by path.
pub fn differences(first: &[Listed], second: &[Listed]) -> Vec<Difference> {
    let mut found = Vec::new();
    let (mut first, mut second) = (first.iter().peekable(), second.iter().peekable());
    let difference = |listed: &Listed, change, bytes| Difference {
        path: listed.path.clone(),
        change,
        kind: listed.kind,
        bytes,
    };
    loop {
        let order = match (first.peek(), second.peek()) {
            (None, None) => return found,
            (Some(_), None) => Ordering::Less,
            (None, Some(_)) => Ordering::Greater,
            (Some(a), Some(b)) => a.path.cmp(&b.path),
        };
        let a = first.next_if(|_| order != Ordering::Greater);
        let b = second.next_if(|_| order != Ordering::Less);
        match (a, b) {
            (Some(a), Some(b)) if (a.kind, a.digest) != (b.kind, b.digest) => {
                found.push(difference(b, Change::Changed, [a.bytes, b.bytes]));
            }
            (Some(a), None) => found.push(difference(a, Change::Removed, [a.bytes, 0])),
            (None, Some(b)) => found.push(difference(b, Change::Added, [0, b.bytes])),
            _ => {}
        }
    }
}

fn kind(item: &Item) -> Result<Kind, ArchiveError> {
    let name = || item.path.display().to_string();
    match item.kind {
        EntryType::Directory => Ok(Kind::Folder),
        EntryType::Regular | EntryType::GNUSparse => Ok(Kind::File),
        EntryType::Link => Ok(Kind::Link),
        EntryType::Symlink => Ok(Kind::Symlink),
        EntryType::Fifo => Ok(Kind::Fifo),
        EntryType::Char if item.device == (0, 0) => Ok(Kind::Deleted),
        EntryType::Char | EntryType::Block => Err(ArchiveError::Device { name: name() }),
        _ => Err(ArchiveError::Kind { name: name() }),
    }
}

/// The times are left out: a file that was written anew with what it had is the same.
fn digest(item: &Item, content: &mut impl Read) -> io::Result<blake3::Hash> {
    let mut hasher = blake3::Hasher::new();
    let mut text = |bytes: &[u8]| {
        hasher.update(&(bytes.len() as u64).to_le_bytes());
        hasher.update(bytes);
    };
    text(&item.mode.bits().to_le_bytes());
    text(&item.owner.0.as_raw().to_le_bytes());
    text(&item.owner.1.as_raw().to_le_bytes());
    text(&item.link);
    let records = item.records.iter();
    for (key, value) in records.filter(|(key, _)| key != b"mtime") {
        text(key);
        text(value);
    }
    io::copy(content, &mut hasher)?;
    Ok(hasher.finalize())
}
