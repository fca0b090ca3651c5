//! A folder into an archive.

use std::{
    collections::HashMap,
    ffi::OsStr,
    fs::File,
    io::{self, Write},
    os::unix::ffi::OsStrExt,
    path::{Path, PathBuf},
};

use rustix::fs::{
    AtFlags, Dir, FileType, Mode, OFlags, Stat, major, minor, openat, readlinkat, statat,
};
use tar::{Builder, EntryType, Header};

use super::{ArchiveError, MAX_BYTES, MAX_DEPTH, attributes};
use crate::{
    chunks::{CHUNK, StreamWriter},
    deleted::DeletedFile,
};

/// Longest link target that fits into a tar header.
pub(super) const HEADER_LINK: usize = 100;

/// What was packed.
#[derive(Debug)]
pub struct Packed {
    /// Files, folders, links and whiteouts in it.
    pub entries: u64,
    /// Sockets and device nodes that were left out.
    pub left_out: u64,
}

/// Where an archive goes.
pub trait Sink: Write {
    /// A file begins here, which may be in the next archive too, elsewhere.
    ///
    /// # Errors
    /// As for a write.
    fn mark(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Sink for StreamWriter<'_> {
    fn mark(&mut self) -> io::Result<()> {
        Ok(self.cut()?)
    }
}

/// Packs everything below `dir` into an archive in `out`. To be called while nobody writes there.
///
/// # Errors
/// When something cannot be read, or the archive cannot be written; `out` is then not whole.
pub fn pack<W: Sink>(dir: &File, out: W) -> Result<(W, Packed), ArchiveError> {
    pack_with_deleted(dir, out, Path::new("/"), std::iter::empty())
}

/// As [`pack`], with the [deleted files](crate::deleted) of `folder`, which is where `dir` is in the
/// container. One that is still in `dir` under another name becomes a link to that.
///
/// # Errors
/// As [`pack`].
pub fn pack_with_deleted<'a, W: Sink>(
    dir: &File,
    out: W,
    folder: &Path,
    deleted: impl Iterator<Item = &'a DeletedFile>,
) -> Result<(W, Packed), ArchiveError> {
    let deleted: Vec<&DeletedFile> = deleted.collect();
    let mut packer = Packer {
        tar: Builder::new(out),
        links: HashMap::new(),
        wanted: HashMap::new(),
        entries: 0,
        left_out: 0,
        bytes: 0,
    };
    for file in &deleted {
        let stat =
            rustix::fs::fstat(&file.file).map_err(ArchiveError::io("look at", &file.link))?;
        packer.wanted.insert(Identity::of(&stat), None);
    }
    packer.folder(dir, Path::new(""), 0)?;
    for file in deleted {
        packer.deleted(file, folder)?;
    }
    let out = packer
        .tar
        .into_inner()
        .map_err(ArchiveError::io("write", folder))?;
    let packed = Packed {
        entries: packer.entries,
        left_out: packer.left_out,
    };
    Ok((out, packed))
}

/// What tells that two descriptors show one file. Not the device: an overlay's differs from its upper
/// layer's, for the same inode number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Identity {
    inode: u64,
    size: i64,
    changed: (i64, u64),
}

impl Identity {
    fn of(stat: &Stat) -> Self {
        Self {
            inode: stat.st_ino,
            size: stat.st_size,
            changed: (stat.st_mtime, stat.st_mtime_nsec),
        }
    }
}

struct Packer<W: Sink> {
    tar: Builder<W>,
    /// Deleted files, with the name that they were packed under if they were.
    wanted: HashMap<Identity, Option<PathBuf>>,
    /// Device and inode of files with several names, with the first of them.
    links: HashMap<(u64, u64), PathBuf>,
    entries: u64,
    left_out: u64,
    bytes: u64,
}

impl<W: Sink> Packer<W> {
    /// A folder's own entry, and then all in it.
    fn folder(&mut self, dir: &File, path: &Path, depth: usize) -> Result<(), ArchiveError> {
        if depth > MAX_DEPTH {
            return Err(ArchiveError::TooDeep(path.to_owned()));
        }
        let stat = rustix::fs::fstat(dir).map_err(ArchiveError::io("look at", path))?;
        let attributes = attributes::read(dir, path)?;
        let name = if path.as_os_str().is_empty() {
            Path::new(".")
        } else {
            path
        };
        self.entry(EntryType::Directory, &stat, name, attributes)?;
        let mut names = Vec::new();
        for entry in Dir::read_from(dir).map_err(ArchiveError::io("list", path))? {
            let entry = entry.map_err(ArchiveError::io("list", path))?;
            let name = entry.file_name().to_bytes();
            if name != b"." && name != b".." {
                names.push(name.to_vec());
            }
        }
        // So that the same folder always gives the same archive.
        names.sort_unstable();
        for name in names {
            let name = OsStr::from_bytes(&name);
            self.child(dir, name, &path.join(name), depth)?;
        }
        Ok(())
    }

    fn child(
        &mut self,
        dir: &File,
        name: &OsStr,
        path: &Path,
        depth: usize,
    ) -> Result<(), ArchiveError> {
        let stat = statat(dir, name, AtFlags::SYMLINK_NOFOLLOW)
            .map_err(ArchiveError::io("look at", path))?;
        let open = |flags| {
            openat(
                dir,
                name,
                flags | OFlags::NOFOLLOW | OFlags::CLOEXEC,
                Mode::empty(),
            )
            .map(File::from)
            .map_err(ArchiveError::io("open", path))
        };
        match FileType::from_raw_mode(stat.st_mode) {
            FileType::Directory => {
                let below = open(OFlags::RDONLY | OFlags::DIRECTORY)?;
                self.folder(&below, path, depth + 1)
            }
            FileType::RegularFile => {
                if self.is_linked(&stat, path)? {
                    return Ok(());
                }
                self.file(open(OFlags::RDONLY | OFlags::NONBLOCK)?, &stat, path)
            }
            FileType::Symlink => {
                let target = readlinkat(dir, name, Vec::new())
                    .map_err(ArchiveError::io("read the link", path))?;
                self.symlink(&stat, path, target.to_bytes())
            }
            FileType::Fifo => self.entry(EntryType::Fifo, &stat, path, Vec::new()),
            // Overlay's whiteout: the lower layers' file of that name is deleted.
            FileType::CharacterDevice if (major(stat.st_rdev), minor(stat.st_rdev)) == (0, 0) => {
                self.entry(EntryType::Char, &stat, path, Vec::new())
            }
            _ => {
                self.left_out += 1;
                Ok(())
            }
        }
    }

    /// Writes a hard link where this file was packed under another name before.
    fn is_linked(&mut self, stat: &Stat, path: &Path) -> Result<bool, ArchiveError> {
        if stat.st_nlink < 2 {
            return Ok(false);
        }
        let key = (stat.st_dev, stat.st_ino);
        let Some(first) = self.links.get(&key).cloned() else {
            self.links.insert(key, path.to_owned());
            return Ok(false);
        };
        let mut header = header(EntryType::Link, stat);
        self.entries += 1;
        self.tar
            .append_link(&mut header, path, first)
            .map_err(ArchiveError::io("pack", path))?;
        Ok(true)
    }

    /// A deleted file under the name that a restore looks for.
    fn deleted(&mut self, found: &DeletedFile, folder: &Path) -> Result<(), ArchiveError> {
        let path = found.link.strip_prefix(folder).unwrap_or(&found.link);
        let stat = rustix::fs::fstat(&found.file).map_err(ArchiveError::io("look at", path))?;
        if let Some(Some(first)) = self.wanted.get(&Identity::of(&stat)).cloned() {
            self.entries += 1;
            return self
                .tar
                .append_link(&mut header(EntryType::Link, &stat), path, first)
                .map_err(ArchiveError::io("pack", path));
        }
        let file = found
            .file
            .try_clone()
            .map_err(ArchiveError::io("open", path))?;
        self.file(file, &stat, path)
    }

    fn file(&mut self, mut file: File, stat: &Stat, path: &Path) -> Result<(), ArchiveError> {
        self.bytes = self.bytes.saturating_add(stat.st_size.cast_unsigned());
        if self.bytes > MAX_BYTES {
            let (claimed, max) = (self.bytes, MAX_BYTES);
            return Err(ArchiveError::TooLarge { claimed, max });
        }
        if let Some(packed) = self.wanted.get_mut(&Identity::of(stat)) {
            *packed = Some(path.to_owned());
        }
        let attributes = attributes::read(&file, path)?;
        // What is smaller has little to share, and would make its chunks smaller still.
        if stat.st_size >= CHUNK as i64 {
            let out = self.tar.get_mut();
            out.mark().map_err(ArchiveError::io("pack", path))?;
        }
        self.extensions(stat, path, attributes)?;
        self.entries += 1;
        // Finds holes by itself.
        self.tar
            .append_file(path, &mut file)
            .map_err(ArchiveError::io("pack", path))
    }

    fn symlink(&mut self, stat: &Stat, path: &Path, target: &[u8]) -> Result<(), ArchiveError> {
        let mut header = header(EntryType::Symlink, stat);
        let mut extensions = Vec::new();
        // Literally: the crate's own setter would tidy the target up.
        if target.len() <= HEADER_LINK {
            header
                .set_link_name_literal(target)
                .map_err(ArchiveError::io("pack", path))?;
        } else {
            let key = attributes::LINK_KEY.to_owned();
            extensions.push((key, attributes::to_hex(target)));
        }
        self.extensions(stat, path, extensions)?;
        self.entries += 1;
        self.tar
            .append_data(&mut header, path, io::empty())
            .map_err(ArchiveError::io("pack", path))
    }

    fn entry(
        &mut self,
        kind: EntryType,
        stat: &Stat,
        path: &Path,
        attributes: Vec<(String, Vec<u8>)>,
    ) -> Result<(), ArchiveError> {
        self.extensions(stat, path, attributes)?;
        self.entries += 1;
        self.tar
            .append_data(&mut header(kind, stat), path, io::empty())
            .map_err(ArchiveError::io("pack", path))
    }

    /// What the header cannot say: attributes, and the time to the nanosecond.
    fn extensions(
        &mut self,
        stat: &Stat,
        path: &Path,
        attributes: Vec<(String, Vec<u8>)>,
    ) -> Result<(), ArchiveError> {
        let time = format!("{}.{:09}", stat.st_mtime, stat.st_mtime_nsec);
        let records = std::iter::once(("mtime", time.as_bytes()));
        let attributes = attributes
            .iter()
            .map(|(key, value)| (key.as_str(), value.as_slice()));
        self.tar
            .append_pax_extensions(records.chain(attributes))
            .map_err(ArchiveError::io("pack", path))
    }
}

fn header(kind: EntryType, stat: &Stat) -> Header {
    let mut header = Header::new_gnu();
    header.set_entry_type(kind);
    header.set_mode(stat.st_mode & 0o7777);
    header.set_uid(stat.st_uid.into());
    header.set_gid(stat.st_gid.into());
    header.set_mtime(u64::try_from(stat.st_mtime).unwrap_or(0));
    header.set_size(0);
    header
}
