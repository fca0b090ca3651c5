//! The members of a tar archive that others have made, one after the other.
//!
//! Not by the `tar` crate: it reads long names and PAX records into memory whole, whatever they claim to be, and splits
//! records at newlines, which the attributes of Go's archives may contain. Here all of that is bounded, and what is
//! skipped in a file is not read.

use std::{
    fs::File,
    io::{self, Read},
    os::unix::fs::FileExt,
    path::PathBuf,
};

use tar::{EntryType, Header};

use super::{ArchiveError, MAX_BYTES, unpack::plain_path};
use crate::manifest::shorten;

const BLOCK: usize = 512;
/// Most bytes of the PAX records of one member: an attribute has at most 64 KiB, and most have none.
const MAX_RECORDS: u64 = 1 << 20;
/// Longest name of a member, or target of a link: `PATH_MAX`.
const MAX_NAME: u64 = 4096;
/// Most members of an archive, with headers that only say something of the next one.
const MAX_MEMBERS: u64 = 4 << 20;
/// Most bytes of all their names, which whoever reads an archive holds.
const MAX_NAMES: u64 = 256 << 20;
/// How the attributes of files are called in PAX records.
const ATTRIBUTE: &[u8] = b"SCHILY.xattr.";

/// Where an archive comes from.
pub(crate) trait Source: Read {
    /// Passes over what is not wanted.
    fn skip(&mut self, bytes: u64) -> io::Result<()>;
}

/// A part of a file. What is skipped of it is not read.
#[derive(Debug)]
pub(crate) struct Section<'a> {
    file: &'a File,
    at: u64,
    end: u64,
}

impl<'a> Section<'a> {
    pub(crate) fn new(file: &'a File, at: u64, bytes: u64) -> Self {
        let end = at.saturating_add(bytes);
        Self { file, at, end }
    }
}

impl Read for Section<'_> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let most = (self.end - self.at).min(into.len() as u64) as usize;
        let n = self.file.read_at(&mut into[..most], self.at)?;
        self.at += n as u64;
        Ok(n)
    }
}

impl Source for Section<'_> {
    fn skip(&mut self, bytes: u64) -> io::Result<()> {
        if bytes > self.end - self.at {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.at += bytes;
        Ok(())
    }
}

/// What can only be read, because it is unpacked or hashed on the way.
#[derive(Debug)]
pub(crate) struct Stream<R>(pub(crate) R);

impl<R: Read> Read for Stream<R> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        self.0.read(into)
    }
}

impl<R: Read> Source for Stream<R> {
    fn skip(&mut self, bytes: u64) -> io::Result<()> {
        let passed = io::copy(&mut (&mut self.0).take(bytes), &mut io::sink())?;
        match passed == bytes {
            true => Ok(()),
            false => Err(io::ErrorKind::UnexpectedEof.into()),
        }
    }
}

/// What a member's header and records say.
#[derive(Debug)]
pub(crate) struct Member {
    /// Relative; empty for the folder itself.
    pub(crate) path: PathBuf,
    pub(crate) kind: EntryType,
    pub(crate) mode: u32,
    pub(crate) user: u32,
    pub(crate) group: u32,
    /// Seconds since 1970, as PAX writes them.
    pub(crate) modified: String,
    /// Of its content; 0 of what has none.
    pub(crate) size: u64,
    /// Where its content begins.
    pub(crate) at: u64,
    /// Of a link.
    pub(crate) link: Vec<u8>,
    /// By their names.
    pub(crate) attributes: Vec<(String, Vec<u8>)>,
}

/// Reads an archive. The content of the member that came last is read from this.
#[derive(Debug)]
pub(crate) struct Members<S> {
    source: S,
    at: u64,
    /// Of the last member's content.
    left: u64,
    /// What follows that, up to the next block.
    padding: u64,
    headers: u64,
    names: u64,
    last: PathBuf,
}

/// What is said of a member before its own header.
#[derive(Default)]
struct Before {
    name: Option<Vec<u8>>,
    link: Option<Vec<u8>>,
    records: Vec<(Vec<u8>, Vec<u8>)>,
}

impl Before {
    fn record(&self, key: &str) -> Option<&[u8]> {
        let found = self
            .records
            .iter()
            .find(|(found, _)| found == key.as_bytes());
        found.map(|(_, value)| value.as_slice())
    }

    /// A decimal number; none where it is no record, and an error where it is no number.
    fn number(&self, key: &str) -> Result<Option<u64>, io::Error> {
        let Some(text) = self.record(key) else {
            return Ok(None);
        };
        let number = std::str::from_utf8(text)
            .ok()
            .and_then(|text| text.parse().ok());
        number
            .map(Some)
            .ok_or_else(|| invalid("a record is no number"))
    }
}

impl<S: Source> Members<S> {
    /// Of an archive that begins here.
    pub(crate) fn new(source: S) -> Self {
        Self {
            source,
            at: 0,
            left: 0,
            padding: 0,
            headers: 0,
            names: 0,
            last: PathBuf::new(),
        }
    }

    /// The next one; none behind the last.
    ///
    /// # Errors
    /// When the archive is malformed, cut short, or claims more than is ever read.
    pub(crate) fn next(&mut self) -> Result<Option<Member>, ArchiveError> {
        let rest = self.left + self.padding;
        self.source.skip(rest).map_err(|e| self.malformed(e))?;
        self.at += rest;
        (self.left, self.padding) = (0, 0);
        let mut before = Before::default();
        loop {
            let block = self.small(BLOCK as u64).map_err(|e| self.malformed(e))?;
            self.headers += 1;
            if self.headers > MAX_MEMBERS {
                return Err(ArchiveError::TooMany);
            }
            // Two of them end an archive, and Go's reader asks for one.
            if block.iter().all(|byte| *byte == 0) {
                return Ok(None);
            }
            let mut header = Header::new_old();
            header.as_mut_bytes().copy_from_slice(&block);
            match self.header(&header, &mut before) {
                Ok(false) => {}
                Ok(true) => return self.member(&header, &before).map(Some),
                Err(e) => return Err(self.malformed(e)),
            }
        }
    }

    /// Takes in what a header says of the next one; true when it is a member's own.
    fn header(&mut self, header: &Header, before: &mut Before) -> io::Result<bool> {
        if header.cksum().ok() != Some(checksum(header.as_bytes())) {
            return Err(invalid("a header does not have its checksum"));
        }
        let kind = header.entry_type();
        let most = match kind {
            EntryType::XHeader | EntryType::XGlobalHeader => MAX_RECORDS,
            EntryType::GNULongName | EntryType::GNULongLink => MAX_NAME,
            _ => return Ok(true),
        };
        let size = header.entry_size()?;
        if size > most {
            return Err(invalid("a header claims more than any real one has"));
        }
        let bytes = self.small(size)?;
        let padding = padding(size);
        self.source.skip(padding)?;
        self.at += padding;
        let text = || {
            bytes
                .split(|byte| *byte == 0)
                .next()
                .unwrap_or_default()
                .to_vec()
        };
        match kind {
            EntryType::XHeader => before.records = records(&bytes)?,
            EntryType::GNULongName => before.name = Some(text()),
            EntryType::GNULongLink => before.link = Some(text()),
            // Of all members that follow: nobody writes there what we would need.
            _ => {}
        }
        Ok(false)
    }

    fn member(&mut self, header: &Header, before: &Before) -> Result<Member, ArchiveError> {
        let name = match (before.record("path"), &before.name) {
            (Some(name), _) => name.to_vec(),
            (None, Some(name)) => name.clone(),
            (None, None) => header.path_bytes().into_owned(),
        };
        let path = plain_path(&name)?;
        self.names += name.len() as u64;
        if name.len() as u64 > MAX_NAME || self.names > MAX_NAMES {
            return Err(ArchiveError::TooMany);
        }
        self.last.clone_from(&path);
        let member = self.described(header, before, path);
        let member = member.map_err(|e| self.malformed(e))?;
        self.left = member.size;
        self.padding = padding(member.size);
        if self.at.saturating_add(self.left) > MAX_BYTES {
            let claimed = self.at.saturating_add(self.left);
            return Err(ArchiveError::TooLarge {
                claimed,
                max: MAX_BYTES,
            });
        }
        Ok(member)
    }

    fn described(&self, header: &Header, before: &Before, path: PathBuf) -> io::Result<Member> {
        let kind = header.entry_type();
        let size = match kind {
            EntryType::Regular | EntryType::Continuous | EntryType::GNUSparse => before
                .number("size")?
                .map_or_else(|| header.entry_size(), Ok)?,
            _ => 0,
        };
        let id = |record: Option<u64>, header: io::Result<u64>| {
            // The highest means "leave it as it is" to chown.
            let id = u32::try_from(record.map_or(header, Ok)?).ok();
            id.filter(|id| *id != u32::MAX)
                .ok_or_else(|| invalid("its owner is none that Linux has"))
        };
        let modified = match before.record("mtime") {
            Some(text) if text.len() <= 64 => String::from_utf8_lossy(text).into_owned(),
            _ => header.mtime()?.to_string(),
        };
        let link = match (before.record("linkpath"), &before.link) {
            (Some(link), _) => link.to_vec(),
            (None, Some(link)) => link.clone(),
            (None, None) => header
                .link_name_bytes()
                .map(|link| link.into_owned())
                .unwrap_or_default(),
        };
        let attributes = before.records.iter().filter_map(|(key, value)| {
            let name = std::str::from_utf8(key.strip_prefix(ATTRIBUTE)?).ok()?;
            Some((name.to_owned(), value.clone()))
        });
        Ok(Member {
            kind,
            mode: header.mode()? & 0o7777,
            user: id(before.number("uid")?, header.uid())?,
            group: id(before.number("gid")?, header.gid())?,
            modified,
            size,
            at: self.at,
            link,
            attributes: attributes.collect(),
            path,
        })
    }

    /// The next bytes, as many as are known to be few.
    fn small(&mut self, bytes: u64) -> io::Result<Vec<u8>> {
        let mut read = Vec::new();
        (&mut self.source).take(bytes).read_to_end(&mut read)?;
        self.at += read.len() as u64;
        match read.len() as u64 == bytes {
            true => Ok(read),
            false => Err(io::ErrorKind::UnexpectedEof.into()),
        }
    }

    /// What the crate says of a field has bytes of the archive in it.
    pub(crate) fn malformed(&self, source: io::Error) -> ArchiveError {
        ArchiveError::Malformed {
            path: self.last.clone(),
            source: io::Error::new(source.kind(), shorten(&source.to_string())),
        }
    }
}

impl<S: Read> Read for Members<S> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let most = self.left.min(into.len() as u64) as usize;
        let n = self.source.read(&mut into[..most])?;
        if n == 0 && most > 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.left -= n as u64;
        self.at += n as u64;
        Ok(n)
    }
}

fn padding(size: u64) -> u64 {
    size.wrapping_neg() % BLOCK as u64
}

/// The sum of a header's bytes, with spaces where the sum itself is.
fn checksum(header: &[u8; BLOCK]) -> u32 {
    let bytes = header.iter().enumerate();
    bytes
        .map(|(i, byte)| match i {
            148..156 => u32::from(b' '),
            _ => u32::from(*byte),
        })
        .sum()
}

/// PAX records: a length in digits, a space, a key, `=`, a value, a newline; the length is that of all of it.
fn records(mut bytes: &[u8]) -> io::Result<Vec<(Vec<u8>, Vec<u8>)>> {
    let malformed = || invalid("its PAX records are malformed");
    let mut all = Vec::new();
    while !bytes.is_empty() {
        let digits = bytes.iter().position(|byte| *byte == b' ');
        let digits = digits
            .filter(|digits| *digits <= 10)
            .ok_or_else(malformed)?;
        let length = std::str::from_utf8(&bytes[..digits]).ok();
        let length: usize = length
            .and_then(|text| text.parse().ok())
            .ok_or_else(malformed)?;
        let record = bytes.get(digits + 1..length).ok_or_else(malformed)?;
        let record = record.strip_suffix(b"\n").ok_or_else(malformed)?;
        let equals = record
            .iter()
            .position(|byte| *byte == b'=')
            .ok_or_else(malformed)?;
        all.push((record[..equals].to_vec(), record[equals + 1..].to_vec()));
        bytes = &bytes[length..];
    }
    Ok(all)
}

fn invalid(what: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}
