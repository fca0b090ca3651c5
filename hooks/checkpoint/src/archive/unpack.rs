//! An archive into a folder, trusting nothing that it says.
//!
//! Every name is opened with `openat2` beneath the folder, links never followed; everything is made anew
//! (`O_EXCL`, `mkdirat`, `mknodat`); no device but a whiteout; no more bytes than allowed.

use std::{
    collections::BTreeSet,
    ffi::{OsStr, OsString},
    fs::File,
    io::{self, BufReader, Read},
    os::{
        fd::{AsRawFd, OwnedFd},
        unix::{ffi::OsStrExt, fs::FileExt},
    },
    path::{Component, Path, PathBuf},
};

use rustix::fs::{
    AtFlags, FileType, Gid, Mode, OFlags, Timespec, Timestamps, Uid, chownat, fchmod, fchown,
    ftruncate, futimens, linkat, makedev, mkdirat, mknodat, openat, statat, symlinkat, unlinkat,
    utimensat,
};
use tar::{Archive, Entry, EntryType};

use super::{ArchiveError, MAX_BYTES, MAX_DEPTH, Made, attributes, open_beneath};
use crate::manifest::shorten;

/// Bytes of one read. Runs of zeros of [`BLOCK`] bytes become holes.
pub(super) const BUFFER: usize = 256 << 10;
const BLOCK: usize = 4096;

/// What to do with a name that is there already.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Existing {
    /// Refuse: for an upper layer, which begins empty. Folders may be there.
    Refuse,
    /// Replace it: for the `/dev/shm` that a pod's containers share.
    Replace,
}

/// What was unpacked.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Unpacked {
    /// Files, folders, links and whiteouts.
    pub entries: u64,
    /// Bytes of the files, holes included.
    pub bytes: u64,
    /// With [`Existing::Replace`]: what was not there before, or is another file now.
    pub made: Made,
}

/// Unpacks `archive` into the folder `into`, with owners, modes, times and attributes.
///
/// # Errors
/// The first thing that is wrong; what this call made is removed then. (What it replaced is gone.)
pub fn unpack(
    archive: impl Read,
    into: &File,
    existing: Existing,
) -> Result<Unpacked, ArchiveError> {
    let mut unpacker = Unpacker {
        into,
        existing,
        done: Unpacked::default(),
        made: BTreeSet::new(),
        times: Vec::new(),
        buffer: vec![0; BUFFER],
    };
    let result = unpacker.all(archive);
    if result.is_err() {
        unpacker.done.made.remove(into);
        unpacker.remove_made();
    }
    result.map(|()| unpacker.done)
}

struct Unpacker<'a> {
    into: &'a File,
    existing: Existing,
    done: Unpacked,
    /// Names right below the folder that were not there before.
    made: BTreeSet<OsString>,
    /// Folders, whose times are set when nothing more is made in them.
    times: Vec<(PathBuf, Timestamps)>,
    buffer: Vec<u8>,
}

/// What was there under the name of an entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Found {
    Nothing,
    /// A folder, as the entry is one: it stays.
    Folder,
    /// Something that made room.
    Replaced,
}

/// What an entry's header and records say.
pub(super) struct Item {
    /// Relative; empty for the folder itself.
    pub(super) path: PathBuf,
    pub(super) kind: EntryType,
    pub(super) mode: Mode,
    pub(super) owner: (Uid, Gid),
    times: Timestamps,
    pub(super) size: u64,
    pub(super) device: (u32, u32),
    pub(super) link: Vec<u8>,
    pub(super) records: Vec<(Vec<u8>, Vec<u8>)>,
}

impl Item {
    /// When it was changed last.
    #[cfg(feature = "archives")]
    pub(super) fn modified(&self) -> Timespec {
        self.times.last_modification
    }
}

impl Unpacker<'_> {
    fn all(&mut self, archive: impl Read) -> Result<(), ArchiveError> {
        let mut archive = Archive::new(BufReader::with_capacity(BUFFER, archive));
        let mut last = PathBuf::new();
        let malformed = |path: &Path| {
            let path = path.to_owned();
            |source| ArchiveError::Malformed { path, source }
        };
        for entry in archive.entries().map_err(malformed(&last))? {
            let mut entry = entry.map_err(malformed(&last))?;
            let item = item(&mut entry, &last)?;
            self.done.entries += 1;
            self.done.bytes = self.done.bytes.saturating_add(item.size);
            if self.done.bytes > MAX_BYTES {
                let (claimed, max) = (self.done.bytes, MAX_BYTES);
                return Err(ArchiveError::TooLarge { claimed, max });
            }
            self.one(&item, &mut entry)?;
            last = item.path;
        }
        for (path, times) in self.times.iter().rev() {
            open_beneath(self.into, path, OFlags::RDONLY | OFlags::DIRECTORY)
                .and_then(|dir| futimens(dir, times))
                .map_err(ArchiveError::io("set the times of", path))?;
        }
        Ok(())
    }

    fn one(&mut self, item: &Item, data: &mut impl Read) -> Result<(), ArchiveError> {
        let Some(name) = item.path.file_name() else {
            // The folder itself: it is there, and gets the archive's owner and mode.
            if item.kind != EntryType::Directory {
                return Err(ArchiveError::Kind {
                    name: ".".to_owned(),
                });
            }
            let dir = open_beneath(self.into, &item.path, OFlags::RDONLY | OFlags::DIRECTORY)
                .map_err(ArchiveError::io("open", &item.path))?;
            return self.finish_dir(dir, item);
        };
        let parent = item.path.parent().unwrap_or(Path::new(""));
        let dir = open_beneath(self.into, parent, OFlags::PATH | OFlags::DIRECTORY)
            .map_err(ArchiveError::io("open", parent))?;
        let found = self.make_room(&dir, name, item)?;
        if found == Found::Nothing && parent.as_os_str().is_empty() {
            self.made.insert(name.to_owned());
        }
        let result = self.make(&dir, name, item, data);
        if self.existing == Existing::Replace && found != Found::Folder {
            self.note(&dir, name, item, &result);
        }
        result
    }

    /// Notes what was made among what others use, also where it was made in part only. What somebody else
    /// made first is not ours.
    fn note(&mut self, dir: &OwnedFd, name: &OsStr, item: &Item, made: &Result<(), ArchiveError>) {
        let taken = matches!(made, Err(ArchiveError::Io { source, .. }) if source.kind() == io::ErrorKind::AlreadyExists);
        if let (false, Ok(stat)) = (taken, statat(dir, name, AtFlags::SYMLINK_NOFOLLOW)) {
            self.done.made.note(&item.path, stat.st_ino);
        }
    }

    fn make(
        &mut self,
        dir: &OwnedFd,
        name: &OsStr,
        item: &Item,
        data: &mut impl Read,
    ) -> Result<(), ArchiveError> {
        let path = &item.path;
        match item.kind {
            EntryType::Directory => {
                match mkdirat(dir, name, Mode::RWXU) {
                    Err(rustix::io::Errno::EXIST) => {}
                    other => other.map_err(ArchiveError::io("make", path))?,
                }
                let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
                let made = openat(dir, name, flags, Mode::empty())
                    .map_err(ArchiveError::io("open", path))?;
                self.finish_dir(made, item)
            }
            EntryType::Regular | EntryType::GNUSparse => self.file(dir, name, item, data),
            EntryType::Link => self.hard_link(dir, name, item),
            EntryType::Symlink => {
                symlinkat(OsStr::from_bytes(&item.link), dir, name)
                    .map_err(ArchiveError::io("make", path))?;
                finish_named(dir, name, item, false)
            }
            EntryType::Fifo => node(dir, name, item, FileType::Fifo),
            EntryType::Char if item.device == (0, 0) => {
                node(dir, name, item, FileType::CharacterDevice)
            }
            EntryType::Char | EntryType::Block => Err(ArchiveError::Device { name: show(path) }),
            _ => Err(ArchiveError::Kind { name: show(path) }),
        }
    }

    /// Says what was there before; what may not stay is removed or refused.
    fn make_room(&self, dir: &OwnedFd, name: &OsStr, item: &Item) -> Result<Found, ArchiveError> {
        let found = match statat(dir, name, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(stat) => FileType::from_raw_mode(stat.st_mode),
            Err(rustix::io::Errno::NOENT) => return Ok(Found::Nothing),
            Err(e) => return Err(ArchiveError::io("look at", &item.path)(e)),
        };
        let both_folders = found == FileType::Directory && item.kind == EntryType::Directory;
        if both_folders {
            return Ok(Found::Folder);
        }
        if self.existing == Existing::Refuse || found == FileType::Directory {
            return Err(ArchiveError::Exists {
                name: show(&item.path),
            });
        }
        unlinkat(dir, name, AtFlags::empty()).map_err(ArchiveError::io("replace", &item.path))?;
        Ok(Found::Replaced)
    }

    fn file(
        &mut self,
        dir: &OwnedFd,
        name: &OsStr,
        item: &Item,
        data: &mut impl Read,
    ) -> Result<(), ArchiveError> {
        let path = &item.path;
        let flags =
            OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file = openat(dir, name, flags, Mode::RUSR | Mode::WUSR)
            .map_err(ArchiveError::io("make", path))?;
        let file = File::from(file);
        let mut at = 0;
        loop {
            let n = match data.read(&mut self.buffer) {
                Ok(0) => break,
                Ok(n) => n,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                Err(source) => {
                    let path = path.clone();
                    return Err(ArchiveError::Malformed { path, source });
                }
            };
            write_but_zeros(&file, &self.buffer[..n], at)
                .map_err(ArchiveError::io("write", path))?;
            at += n as u64;
        }
        if at != item.size {
            let source = io::Error::from(io::ErrorKind::UnexpectedEof);
            return Err(ArchiveError::Malformed {
                path: path.clone(),
                source,
            });
        }
        // A hole at the end.
        ftruncate(&file, at).map_err(ArchiveError::io("write", path))?;
        finish(&file, item)?;
        futimens(&file, &item.times).map_err(ArchiveError::io("set the times of", path))
    }

    fn hard_link(&self, dir: &OwnedFd, name: &OsStr, item: &Item) -> Result<(), ArchiveError> {
        let target = plain_path(&item.link)?;
        let Some(target_name) = target.file_name() else {
            return Err(ArchiveError::Name {
                name: show(&target),
            });
        };
        let parent = target.parent().unwrap_or(Path::new(""));
        let from = open_beneath(self.into, parent, OFlags::PATH | OFlags::DIRECTORY)
            .map_err(ArchiveError::io("open", parent))?;
        let stat = statat(&from, target_name, AtFlags::SYMLINK_NOFOLLOW)
            .map_err(ArchiveError::io("look at", &target))?;
        if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile {
            return Err(ArchiveError::Kind {
                name: show(&target),
            });
        }
        linkat(&from, target_name, dir, name, AtFlags::empty())
            .map_err(ArchiveError::io("link", &item.path))
    }

    fn finish_dir(&mut self, dir: OwnedFd, item: &Item) -> Result<(), ArchiveError> {
        finish(&File::from(dir), item)?;
        self.times.push((item.path.clone(), item.times.clone()));
        Ok(())
    }

    /// Removes what this call made. Errors leave it: the caller is failing already.
    fn remove_made(&self) {
        for name in &self.made {
            if unlinkat(self.into, name, AtFlags::empty()).is_err() {
                // `remove_dir_all` follows no links below the name that it is given.
                let dir = PathBuf::from(format!("/proc/self/fd/{}", self.into.as_raw_fd()));
                let _ = std::fs::remove_dir_all(dir.join(name));
            }
        }
    }
}

pub(super) fn item<R: Read>(entry: &mut Entry<'_, R>, last: &Path) -> Result<Item, ArchiveError> {
    let malformed = |source| ArchiveError::Malformed {
        path: last.to_owned(),
        source,
    };
    let path = plain_path(&entry.path_bytes())?;
    let mut records = Vec::new();
    if let Some(extensions) = entry.pax_extensions().map_err(malformed)? {
        for record in extensions {
            let record = record.map_err(malformed)?;
            records.push((record.key_bytes().to_vec(), record.value_bytes().to_vec()));
        }
    }
    let record = |key: &str| {
        let found = records.iter().find(|(found, _)| found == key.as_bytes());
        found.map(|(_, value)| value.as_slice())
    };
    let header = entry.header();
    let link = match record(attributes::LINK_KEY) {
        Some(hex) => attributes::from_hex(hex)
            .ok_or_else(|| malformed(io::Error::from(io::ErrorKind::InvalidData)))?,
        None => entry
            .link_name_bytes()
            .map(|link| link.into_owned())
            .unwrap_or_default(),
    };
    let id = |id: io::Result<u64>| -> Result<u32, ArchiveError> {
        // The highest means "leave it as it is" to chown.
        let id = u32::try_from(id.map_err(malformed)?)
            .ok()
            .filter(|id| *id != u32::MAX);
        id.ok_or_else(|| malformed(io::Error::from(io::ErrorKind::InvalidData)))
    };
    let mtime = record("mtime")
        .and_then(parse_time)
        .unwrap_or((header.mtime().map_err(malformed)?.cast_signed(), 0));
    let mtime = Timespec {
        tv_sec: mtime.0,
        tv_nsec: mtime.1,
    };
    Ok(Item {
        kind: header.entry_type(),
        mode: Mode::from_bits_truncate(header.mode().map_err(malformed)?),
        owner: (
            Uid::from_raw(id(header.uid())?),
            Gid::from_raw(id(header.gid())?),
        ),
        times: Timestamps {
            last_access: mtime,
            last_modification: mtime,
        },
        size: entry.size(),
        device: (
            header.device_major().ok().flatten().unwrap_or(0),
            header.device_minor().ok().flatten().unwrap_or(0),
        ),
        link,
        path,
        records,
    })
}

/// A relative path of plain names, `./` before it allowed; anything else is refused.
pub(super) fn plain_path(bytes: &[u8]) -> Result<PathBuf, ArchiveError> {
    let given = attributes::path_of(bytes);
    let mut plain = PathBuf::new();
    let mut depth = 0;
    for component in given.components() {
        match component {
            Component::CurDir => {}
            Component::Normal(name) if !name.as_bytes().contains(&0) => {
                plain.push(name);
                depth += 1;
            }
            _ => return Err(ArchiveError::Name { name: show(given) }),
        }
    }
    if bytes.is_empty() {
        return Err(ArchiveError::Name { name: show(given) });
    }
    if depth > MAX_DEPTH + 1 {
        return Err(ArchiveError::TooDeep(PathBuf::from(show(given))));
    }
    Ok(plain)
}

/// `1700000000.123456789`, as PAX has it.
fn parse_time(text: &[u8]) -> Option<(i64, i64)> {
    let text = std::str::from_utf8(text).ok()?;
    let (seconds, nanos) = text.split_once('.').unwrap_or((text, "0"));
    let nanos = format!("{:0<9}", nanos.get(..9).unwrap_or(nanos));
    let nanos = nanos
        .parse::<i64>()
        .ok()
        .filter(|n| (0..1_000_000_000).contains(n));
    Some((seconds.parse().ok()?, nanos?))
}

/// Writes all but whole blocks of zeros, in as few writes as there are runs between those.
fn write_but_zeros(file: &File, bytes: &[u8], at: u64) -> io::Result<()> {
    let is_hole = |block: &[u8]| block.len() == BLOCK && block.iter().all(|byte| *byte == 0);
    let mut run = 0;
    let mut offset = 0;
    for block in bytes.chunks(BLOCK) {
        if is_hole(block) {
            file.write_all_at(&bytes[run..offset], at + run as u64)?;
            run = offset + block.len();
        }
        offset += block.len();
    }
    file.write_all_at(&bytes[run..], at + run as u64)
}

/// Owner first: changing it clears set-user-id bits and file capabilities.
fn finish(file: &File, item: &Item) -> Result<(), ArchiveError> {
    let path = &item.path;
    fchown(file, Some(item.owner.0), Some(item.owner.1))
        .map_err(ArchiveError::io("set the owner of", path))?;
    fchmod(file, item.mode).map_err(ArchiveError::io("set the mode of", path))?;
    for (key, value) in &item.records {
        attributes::write(file, path, key, value)?;
    }
    Ok(())
}

fn node(dir: &OwnedFd, name: &OsStr, item: &Item, kind: FileType) -> Result<(), ArchiveError> {
    mknodat(dir, name, kind, Mode::RUSR | Mode::WUSR, makedev(0, 0))
        .map_err(ArchiveError::io("make", &item.path))?;
    finish_named(dir, name, item, true)
}

/// As [`finish`], for what should not be opened: opening a FIFO or a device does something.
fn finish_named(
    dir: &OwnedFd,
    name: &OsStr,
    item: &Item,
    with_mode: bool,
) -> Result<(), ArchiveError> {
    let path = &item.path;
    let (uid, gid) = item.owner;
    chownat(dir, name, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW)
        .map_err(ArchiveError::io("set the owner of", path))?;
    if with_mode {
        rustix::fs::chmodat(dir, name, item.mode, AtFlags::empty())
            .map_err(ArchiveError::io("set the mode of", path))?;
    }
    utimensat(dir, name, &item.times, AtFlags::SYMLINK_NOFOLLOW)
        .map_err(ArchiveError::io("set the times of", path))
}

pub(super) fn show(path: &Path) -> String {
    shorten(&path.to_string_lossy())
}
