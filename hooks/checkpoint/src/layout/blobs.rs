//! Blobs: bytes that are called by their SHA-256.

use std::{
    fmt,
    fs::File,
    io::{self, Read, Write},
    marker::PhantomData,
    path::Path,
    str::FromStr,
    sync::atomic::{AtomicU64, Ordering},
};

use sha2::{Digest as _, Sha256};

#[cfg(feature = "s3")]
use super::away::{Away, Kind};
use super::{BLOBS, Descriptor, Layout, LayoutError};
use crate::manifest::shorten;

/// Bytes copied at a time.
const BUFFER: usize = 256 << 10;

/// The digest of a blob. Only SHA-256 is read and written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct BlobDigest([u8; 32]);

impl BlobDigest {
    /// Its file in a layout.
    pub(crate) fn path(self) -> String {
        format!("{BLOBS}/{}", self.hex())
    }

    #[cfg(feature = "s3")]
    pub(super) fn bytes(self) -> [u8; 32] {
        self.0
    }

    pub(super) fn hex(self) -> String {
        self.0.iter().map(|byte| format!("{byte:02x}")).collect()
    }

    /// One that was computed.
    #[cfg(feature = "archives")]
    pub(crate) fn new(sha256: [u8; 32]) -> Self {
        Self(sha256)
    }

    pub(crate) fn of(bytes: &[u8]) -> Self {
        Self(Sha256::digest(bytes).into())
    }
}

impl fmt::Display for BlobDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "sha256:{}", self.hex())
    }
}

impl FromStr for BlobDigest {
    type Err = LayoutError;
    fn from_str(text: &str) -> Result<Self, LayoutError> {
        let refuse = || LayoutError::Digest(shorten(text));
        let hex = text.strip_prefix("sha256:").ok_or_else(refuse)?;
        let lower = |b: u8| b.is_ascii_digit() || (b'a'..=b'f').contains(&b);
        if hex.len() != 64 || !hex.bytes().all(lower) {
            return Err(refuse());
        }
        let mut bytes = [0; 32];
        for (into, digits) in bytes.iter_mut().zip(hex.as_bytes().chunks_exact(2)) {
            let digits = std::str::from_utf8(digits).map_err(|_| refuse())?;
            *into = u8::from_str_radix(digits, 16).map_err(|_| refuse())?;
        }
        Ok(Self(bytes))
    }
}

/// What is wrong with a blob.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BlobFault {
    /// It is not there.
    #[error("is missing")]
    Absent,
    /// It is a symlink, a folder, a device, or lies behind a symlink.
    #[error("is not a regular file of the layout")]
    NotAFile,
    /// It has more or fewer bytes than its descriptor says.
    #[error("does not have the {0} bytes that its descriptor says")]
    Size(u64),
    /// Its bytes are others.
    #[error("does not have that digest")]
    Digest,
    /// Its descriptor claims more than is read of such a file.
    #[error("claims more than the {0} bytes that are read of such a file")]
    TooLarge(u64),
}

impl Layout {
    /// Opens the blob of a descriptor. Of a folder's it is known then that it has the right size; of another's it is
    /// found out when it comes.
    pub(super) fn blob(&self, file: &str, of: &Descriptor) -> Result<Blob<'_>, LayoutError> {
        let digest: BlobDigest = of.digest.parse()?;
        let blob = |from| Blob {
            file: shorten(file),
            from,
            digest,
            size: of.size,
        };
        #[cfg(feature = "s3")]
        if let Some(away) = self.away() {
            return Ok(blob(Origin::Away(away, Kind::Blob)));
        }
        let fault = |fault| LayoutError::Blob {
            file: shorten(file),
            digest,
            fault,
        };
        let opened = self.file(&digest.path()).map_err(|e| match e.kind() {
            io::ErrorKind::NotFound => fault(BlobFault::Absent),
            // A symlink on the way is ELOOP, one that leads outside EXDEV.
            _ => fault(BlobFault::NotAFile),
        })?;
        let found = opened
            .metadata()
            .map_err(LayoutError::io("look at", &self.path))?;
        if found.len() != of.size {
            return Err(fault(BlobFault::Size(of.size)));
        }
        Ok(blob(Origin::File(opened, PhantomData)))
    }

    /// All bytes of a blob that is held in memory.
    pub(super) fn small_blob(
        &self,
        file: &str,
        of: &Descriptor,
        max: u64,
    ) -> Result<Vec<u8>, LayoutError> {
        self.blob(file, of)?.bounded(&self.path, max)
    }

    /// All bytes of an OCI manifest, which a registry keeps beside its blobs.
    pub(super) fn manifest_blob(
        &self,
        tag: &str,
        of: &Descriptor,
        max: u64,
    ) -> Result<Vec<u8>, LayoutError> {
        #[cfg_attr(
            not(feature = "s3"),
            expect(unused_mut, reason = "only away it differs")
        )]
        let mut blob = self.blob(tag, of)?;
        #[cfg(feature = "s3")]
        if let Origin::Away(_, kind) = &mut blob.from {
            *kind = Kind::Manifest;
        }
        blob.bounded(&self.path, max)
    }
}

/// Where the bytes of a blob come from.
enum Origin<'a> {
    File(File, PhantomData<&'a ()>),
    #[cfg(feature = "s3")]
    Away(&'a dyn Away, Kind),
}

/// A blob that was opened, and not yet read.
pub(super) struct Blob<'a> {
    file: String,
    from: Origin<'a>,
    digest: BlobDigest,
    pub(super) size: u64,
}

impl Blob<'_> {
    fn fault(&self, fault: BlobFault) -> LayoutError {
        LayoutError::Blob {
            file: self.file.clone(),
            digest: self.digest,
            fault,
        }
    }

    /// All of it, where it is small enough.
    fn bounded(self, path: &Path, max: u64) -> Result<Vec<u8>, LayoutError> {
        if self.size > max {
            return Err(self.fault(BlobFault::TooLarge(max)));
        }
        let mut bytes = Vec::new();
        self.copy(&mut bytes, path, &AtomicU64::new(0))?;
        Ok(bytes)
    }

    /// Whether these bytes are it.
    pub(super) fn is(
        &self,
        other: File,
        path: &Path,
        done: &AtomicU64,
    ) -> Result<bool, LayoutError> {
        let (digest, size) = copy(other, &mut io::sink(), self.size, path, path, done)?;
        Ok((digest, size) == (self.digest, self.size))
    }

    /// Copies it, and compares it on the way. What is written of a blob that is not what it says has to be removed by
    /// the caller. `path` is where it goes, and only named in errors.
    pub(super) fn copy(
        self,
        into: &mut impl Write,
        path: &Path,
        done: &AtomicU64,
    ) -> Result<(), LayoutError> {
        let from = Path::new(&self.file);
        let (digest, size) = match &self.from {
            Origin::File(opened, _) => copy(opened, into, self.size, from, path, done)?,
            #[cfg(feature = "s3")]
            Origin::Away(away, kind) => {
                let mut coming = away.read(*kind, self.digest, self.size);
                let copied = copy(&mut coming, into, self.size, from, path, done);
                // What the store said is more than that reading failed.
                match coming.failed() {
                    Some(error) if error.is_missing() => return Err(self.fault(BlobFault::Absent)),
                    Some(error) => return Err(error),
                    None => copied?,
                }
            }
        };
        if size != self.size {
            return Err(self.fault(BlobFault::Size(self.size)));
        }
        if digest != self.digest {
            return Err(self.fault(BlobFault::Digest));
        }
        Ok(())
    }
}

/// Copies at most one byte more than `size`; says what came.
pub(super) fn copy(
    from: impl Read,
    into: &mut impl Write,
    size: u64,
    from_path: &Path,
    into_path: &Path,
    done: &AtomicU64,
) -> Result<(BlobDigest, u64), LayoutError> {
    let mut from = from.take(size.saturating_add(1));
    let mut hasher = Sha256::new();
    let mut buffer = vec![0; BUFFER.min((size as usize).saturating_add(1))];
    let mut copied = 0;
    loop {
        let n = match from.read(&mut buffer) {
            Ok(0) => break,
            Ok(n) => n,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
            Err(e) => return Err(LayoutError::io("read", from_path)(e)),
        };
        hasher.update(&buffer[..n]);
        into.write_all(&buffer[..n])
            .map_err(LayoutError::io("write", into_path))?;
        copied += n as u64;
        done.fetch_add(n as u64, Ordering::Relaxed);
    }
    Ok((BlobDigest(hasher.finalize().into()), copied))
}
