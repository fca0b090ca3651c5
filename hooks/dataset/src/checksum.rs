//! What a store says about an object's bytes, and whether the bytes on disk agree.
//!
//! Parts are fetched as ranges, and a range carries no checksum: the object's own is compared when its
//! last part is there. CRC-64/NVME combines from the parts; any other takes one more pass over the file,
//! most of which the page cache still has.

use std::{
    fs::File,
    io::{self, Read},
    path::Path,
};

use base64_simd::STANDARD;
use crc_fast::CrcAlgorithm;
use md5::Md5;
use rekindle_core::config::Verification;
use rekindle_store::crc::Crc64;
use sha1::Sha1;
use sha2::{Digest, Sha256};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Crc64,
    Crc32,
    Crc32c,
    Sha256,
    Sha1,
    Md5,
}

impl Kind {
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Crc64 => "CRC64NVME",
            Self::Crc32 => "CRC32",
            Self::Crc32c => "CRC32C",
            Self::Sha256 => "SHA256",
            Self::Sha1 => "SHA1",
            Self::Md5 => "MD5",
        }
    }

    /// Bytes of the checksum itself.
    fn width(self) -> usize {
        match self {
            Self::Crc32 | Self::Crc32c => 4,
            Self::Crc64 => 8,
            Self::Md5 => 16,
            Self::Sha1 => 20,
            Self::Sha256 => 32,
        }
    }
}

/// What the bytes of one object must have.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Expected {
    /// The store gave nothing that can be computed from the bytes.
    Nothing,
    /// The checksum of all bytes.
    Whole { kind: Kind, value: Vec<u8> },
    /// The checksum of the checksums of the upload's parts, each of `part` bytes but the last.
    Composite {
        kind: Kind,
        value: Vec<u8>,
        part: u64,
    },
}

/// A checksum as a store writes it: base64, with `-N` behind it when it is one over N parts.
pub(crate) fn decode(kind: Kind, text: &str) -> Option<(Vec<u8>, Option<u64>)> {
    let (text, parts) = match text.split_once('-') {
        None => (text, None),
        Some((text, parts)) => (text, Some(parts.parse().ok()?)),
    };
    let value = STANDARD.decode_to_vec(text).ok()?;
    (value.len() == kind.width()).then_some((value, parts))
}

impl Expected {
    /// The MD5 that an ETag is: 32 hex digits in quotes. One with `-N` behind it is not.
    pub(crate) fn from_etag(etag: &str) -> Self {
        let hex = etag.trim_matches('"');
        if hex.len() != 32 || !hex.bytes().all(|b| b.is_ascii_hexdigit()) {
            return Self::Nothing;
        }
        let byte = |at| u8::from_str_radix(&hex[at..at + 2], 16);
        let value: Result<_, _> = (0..32).step_by(2).map(byte).collect();
        value.map_or(Self::Nothing, |value| Self::Whole {
            kind: Kind::Md5,
            value,
        })
    }

    pub(crate) fn verification(&self) -> Verification {
        match self {
            Self::Nothing => Verification::TransportOnly,
            Self::Whole {
                kind: Kind::Md5, ..
            } => Verification::EtagMd5,
            Self::Whole { .. } | Self::Composite { .. } => Verification::StoreChecksum,
        }
    }

    /// Compares a complete file, whose CRC-64 came out of its parts. `Ok(Err(mismatch))` when it differs.
    pub(crate) fn check(&self, path: &Path, crc: Crc64) -> io::Result<Result<Checked, Mismatch>> {
        let (kind, expected, found) = match self {
            Self::Nothing => return Ok(Ok(Checked(Verification::TransportOnly))),
            Self::Whole {
                kind: Kind::Crc64,
                value,
            } => (Kind::Crc64, value, crc.0.to_be_bytes().to_vec()),
            Self::Whole { kind, value } => (*kind, value, compute(*kind, &mut File::open(path)?)?),
            Self::Composite { kind, value, part } => {
                let mut file = File::open(path)?;
                let mut left = file.metadata()?.len();
                let mut inner = Vec::new();
                while left > 0 {
                    inner.extend(compute(*kind, &mut (&mut file).take(*part))?);
                    left = left.saturating_sub(*part);
                }
                (*kind, value, compute(*kind, &mut inner.as_slice())?)
            }
        };
        if *expected == found {
            return Ok(Ok(Checked(self.verification())));
        }
        Ok(Err(Mismatch {
            kind: kind.name(),
            expected: hex(expected),
            found: hex(&found),
        }))
    }
}

/// Proof that a file's bytes were compared as far as its store allows; only [`Expected::check`] gives it,
/// and without it nothing gets into a manifest.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Checked(Verification);

impl Checked {
    pub(crate) fn verification(self) -> Verification {
        self.0
    }
}

#[derive(Debug)]
pub(crate) struct Mismatch {
    pub(crate) kind: &'static str,
    pub(crate) expected: String,
    pub(crate) found: String,
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn compute(kind: Kind, from: &mut impl Read) -> io::Result<Vec<u8>> {
    match kind {
        Kind::Crc64 => crc(CrcAlgorithm::Crc64Nvme, from, 8),
        Kind::Crc32 => crc(CrcAlgorithm::Crc32IsoHdlc, from, 4),
        Kind::Crc32c => crc(CrcAlgorithm::Crc32Iscsi, from, 4),
        Kind::Sha256 => hash::<Sha256>(from),
        Kind::Sha1 => hash::<Sha1>(from),
        Kind::Md5 => hash::<Md5>(from),
    }
}

fn crc(algorithm: CrcAlgorithm, from: &mut impl Read, width: usize) -> io::Result<Vec<u8>> {
    let mut digest = crc_fast::Digest::new(algorithm);
    pieces(from, |bytes| digest.update(bytes))?;
    Ok(digest.finalize().to_be_bytes()[8 - width..].to_vec())
}

fn hash<D: Digest>(from: &mut impl Read) -> io::Result<Vec<u8>> {
    let mut digest = D::new();
    pieces(from, |bytes| digest.update(bytes))?;
    Ok(digest.finalize().to_vec())
}

fn pieces(from: &mut impl Read, mut each: impl FnMut(&[u8])) -> io::Result<()> {
    // Fits the second-level cache, where the checksum finds it again.
    let mut buffer = vec![0; 256 << 10];
    loop {
        match from.read(&mut buffer) {
            Ok(0) => return Ok(()),
            Ok(n) => each(&buffer[..n]),
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// "123456789", as each algorithm's own publication gives it.
    const VECTORS: [(Kind, &str); 6] = [
        (Kind::Crc64, "ae8b14860a799888"),
        (Kind::Crc32, "cbf43926"),
        (Kind::Crc32c, "e3069283"),
        (Kind::Md5, "25f9e794323b453885f5181f1b624d0b"),
        (Kind::Sha1, "f7c3bc1d808e04732adf679965ccc34ca7ae3441"),
        (
            Kind::Sha256,
            "15e2b0d3c33891ebb0f1ef609ec419420c20e320ce94c65fbc8c3312448eb225",
        ),
    ];

    #[test]
    fn every_checksum_is_the_published_one() {
        for (kind, expected) in VECTORS {
            let found = compute(kind, &mut &b"123456789"[..]).unwrap();
            assert_eq!(hex(&found), expected, "{}", kind.name());
            let text = STANDARD.encode_to_string(&found);
            assert_eq!(decode(kind, &text).unwrap(), (found.clone(), None));
            assert_eq!(decode(kind, &format!("{text}-7")).unwrap().1, Some(7));
            assert!(decode(kind, &text[..text.len() - 4]).is_none());
        }
    }

    #[test]
    fn a_composite_is_the_checksum_of_the_parts_checksums() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("a");
        std::fs::write(&path, b"aaaabbbbcc").unwrap();
        for kind in [Kind::Crc32, Kind::Crc32c, Kind::Sha1, Kind::Sha256] {
            let inner: Vec<u8> = [&b"aaaa"[..], b"bbbb", b"cc"]
                .into_iter()
                .flat_map(|mut part| compute(kind, &mut part).unwrap())
                .collect();
            let value = compute(kind, &mut inner.as_slice()).unwrap();
            let expected = Expected::Composite {
                kind,
                value,
                part: 4,
            };
            assert!(expected.check(&path, Crc64::EMPTY).unwrap().is_ok());
            let Expected::Composite { kind, value, .. } = expected else {
                unreachable!()
            };
            let wrong = Expected::Composite {
                kind,
                value,
                part: 5,
            };
            assert!(wrong.check(&path, Crc64::EMPTY).unwrap().is_err());
        }
    }

    #[test]
    fn only_an_md5_is_taken_for_one() {
        for not in [
            "",
            "\"\"",
            "\"0123\"",
            "\"0123456789abcdef0123456789abcdef-2\"",
            "\"zz23456789abcdef0123456789abcdef\"",
            "ü123456789abcdef0123456789abcde",
        ] {
            assert_eq!(Expected::from_etag(not), Expected::Nothing, "{not}");
        }
        let md5 = Expected::from_etag("\"0123456789abcdef0123456789abcdef\"");
        assert_eq!(md5.verification(), Verification::EtagMd5);
    }
}
