//! Layers of container images, as OCI has them, into archives of ours and back.
//!
//! ```text
//!  OCI                            ours
//!  .wh.NAME                       NAME, a character device 0/0
//!  DIR/.wh..wh..opq               DIR with trusted.overlay.opaque
//!  SCHILY.xattr.NAME, as it is    REKINDLE.xattr.NAME, in hexadecimal
//! ```
//! Both ways as a stream: nothing is unpacked, and nothing of an encrypted image's lies on the disk in clear.

use std::{
    collections::{BTreeSet, HashMap, HashSet},
    ffi::OsStr,
    io::{self, BufReader, Read, Write},
    os::unix::ffi::OsStrExt,
    path::{Path, PathBuf},
};

use tar::{Archive, Builder, EntryType, Header};

use super::{
    ArchiveError, MAX_BYTES, Sink, attributes,
    members::{Member, Members, Source},
    pack::HEADER_LINK,
    unpack::{BUFFER, Item, item, plain_path, show},
};
use crate::chunks::CHUNK;

const WHITEOUT: &[u8] = b".wh.";
/// What else begins so is of other storage drivers.
const META: &[u8] = b".wh..wh.";
const OPAQUE: &[u8] = b".wh..wh..opq";
/// How overlay marks a folder that hides the one below it.
const OPAQUE_ATTRIBUTE: &str = "trusted.overlay.opaque";
/// How its value is spelt, in our hexadecimal too.
const YES: &[u8] = b"y";

/// What was in a layer.
#[derive(Debug, Default)]
pub(crate) struct Layer {
    /// All that it has, less what it deletes.
    pub(crate) names: HashSet<PathBuf>,
    /// Devices, which a container gets from its spec.
    pub(crate) left_out: u64,
}

/// Writes an OCI layer as an archive of ours.
///
/// # Errors
/// What is wrong with the layer, or why it cannot be written.
pub(crate) fn from_layer<S: Source, W: Sink>(layer: S, out: W) -> Result<(W, Layer), ArchiveError> {
    let mut members = Members::new(layer);
    let mut into = Into {
        tar: Builder::new(out),
        layer: Layer::default(),
        folders: HashMap::from([(PathBuf::new(), folder(Path::new("")))]),
        deleted: BTreeSet::new(),
    };
    while let Some(member) = members.next()? {
        into.member(member, &mut members)?;
    }
    for path in std::mem::take(&mut into.deleted) {
        into.parents(&path)?;
        into.entry(EntryType::Char, &path, &whiteout(&path), &[])?;
    }
    let out = into
        .tar
        .into_inner()
        .map_err(ArchiveError::io("write", Path::new("")))?;
    Ok((out, into.layer))
}

struct Into<W: Sink> {
    tar: Builder<W>,
    layer: Layer,
    /// Those that are in the archive already, and how: an archive of ours has a folder before what is in it.
    folders: HashMap<PathBuf, Member>,
    /// What the layer deletes, unless it has something of that name itself.
    deleted: BTreeSet<PathBuf>,
}

impl<W: Sink> Into<W> {
    fn member(&mut self, member: Member, content: &mut impl Read) -> Result<(), ArchiveError> {
        let path = member.path.clone();
        let name = path.file_name().unwrap_or_default().as_bytes();
        let parent = path.parent().unwrap_or(Path::new(""));
        if name == OPAQUE {
            self.parents(&path)?;
            // Said once more, with that. Its parents are there, and so is it.
            let known = self
                .folders
                .remove(parent)
                .unwrap_or_else(|| folder(parent));
            self.entry(
                EntryType::Directory,
                parent,
                &known,
                &[(OPAQUE_ATTRIBUTE, YES)],
            )?;
            self.folders.insert(parent.to_owned(), known);
            return Ok(());
        }
        if name.starts_with(META) {
            return Ok(());
        }
        if let Some(deleted) = name.strip_prefix(WHITEOUT) {
            let path = parent.join(plain_path(deleted)?);
            if path == parent {
                return Err(ArchiveError::Name {
                    name: show(&member.path),
                });
            }
            if !self.layer.names.contains(&path) {
                self.deleted.insert(path);
            }
            return Ok(());
        }
        self.present(member, content)
    }

    /// What the layer has.
    fn present(&mut self, member: Member, content: &mut impl Read) -> Result<(), ArchiveError> {
        let path = &member.path.clone();
        let is_folder = member.kind == EntryType::Directory;
        if path.as_os_str().is_empty() && !is_folder {
            return Err(ArchiveError::Kind {
                name: ".".to_owned(),
            });
        }
        self.parents(path)?;
        let hides = self.deleted.remove(path);
        if !self.layer.names.insert(path.clone()) && !is_folder {
            return Err(ArchiveError::Exists { name: show(path) });
        }
        match member.kind {
            EntryType::Directory => {
                let opaque: &[_] = if hides {
                    &[(OPAQUE_ATTRIBUTE, YES)]
                } else {
                    &[]
                };
                self.entry(EntryType::Directory, path, &member, opaque)?;
                self.folders.insert(path.clone(), member);
                Ok(())
            }
            EntryType::Regular | EntryType::Continuous => self.file(&member, content),
            EntryType::Link => self.link(&member),
            EntryType::Symlink => self.symlink(&member),
            EntryType::Fifo => self.entry(EntryType::Fifo, path, &member, &[]),
            EntryType::Char | EntryType::Block => {
                self.layer.names.remove(path);
                self.layer.left_out += 1;
                Ok(())
            }
            _ => Err(ArchiveError::Kind { name: show(path) }),
        }
    }

    /// Has the folders that `path` is in, where the layer did not say how they are.
    fn parents(&mut self, path: &Path) -> Result<(), ArchiveError> {
        let missing = path.ancestors().skip(1);
        let missing: Vec<_> = missing
            .take_while(|folder| !self.folders.contains_key(*folder))
            .collect();
        for path in missing.into_iter().rev() {
            if self.layer.names.contains(path) {
                return Err(ArchiveError::Exists { name: show(path) });
            }
            let unknown = folder(path);
            self.entry(EntryType::Directory, path, &unknown, &[])?;
            self.layer.names.insert(path.to_owned());
            self.folders.insert(path.to_owned(), unknown);
        }
        Ok(())
    }

    fn file(&mut self, member: &Member, content: &mut impl Read) -> Result<(), ArchiveError> {
        let path = &member.path;
        if member.size >= CHUNK as u64 {
            self.tar
                .get_mut()
                .mark()
                .map_err(ArchiveError::io("pack", path))?;
        }
        self.extensions(member, &[])?;
        let mut header = header(EntryType::Regular, member);
        header.set_size(member.size);
        self.tar
            .append_data(&mut header, path, content)
            .map_err(ArchiveError::io("pack", path))
    }

    fn link(&mut self, member: &Member) -> Result<(), ArchiveError> {
        let (path, target) = (&member.path, plain_path(&member.link)?);
        // What is in a lower layer only cannot be linked to in this one.
        if !self.layer.names.contains(&target) || self.folders.contains_key(&target) {
            return Err(ArchiveError::Name {
                name: show(&target),
            });
        }
        self.tar
            .append_link(&mut header(EntryType::Link, member), path, target)
            .map_err(ArchiveError::io("pack", path))
    }

    fn symlink(&mut self, member: &Member) -> Result<(), ArchiveError> {
        let path = &member.path;
        let mut header = header(EntryType::Symlink, member);
        if member.link.len() <= HEADER_LINK {
            let set = header.set_link_name_literal(&member.link);
            set.map_err(ArchiveError::io("pack", path))?;
            self.extensions(member, &[])?;
        } else {
            self.extensions(
                member,
                &[(attributes::LINK_KEY, &attributes::to_hex(&member.link))],
            )?;
        }
        self.tar
            .append_data(&mut header, path, io::empty())
            .map_err(ArchiveError::io("pack", path))
    }

    fn entry(
        &mut self,
        kind: EntryType,
        path: &Path,
        member: &Member,
        more: &[(&str, &[u8])],
    ) -> Result<(), ArchiveError> {
        let path = match path.as_os_str().is_empty() {
            true => Path::new("."),
            false => path,
        };
        let more: Vec<_> = more
            .iter()
            .map(|(name, value)| (attributes::key(name), attributes::to_hex(value)))
            .collect();
        let more: Vec<_> = more
            .iter()
            .map(|(key, value)| (key.as_str(), value.as_slice()))
            .collect();
        self.extensions(member, &more)?;
        self.tar
            .append_data(&mut header(kind, member), path, io::empty())
            .map_err(ArchiveError::io("pack", path))
    }

    fn extensions(&mut self, member: &Member, more: &[(&str, &[u8])]) -> Result<(), ArchiveError> {
        let kept = member
            .attributes
            .iter()
            .filter(|(name, _)| attributes::travels(name));
        let kept: Vec<_> = kept
            .map(|(name, value)| (attributes::key(name), attributes::to_hex(value)))
            .collect();
        let kept = kept
            .iter()
            .map(|(key, value)| (key.as_str(), value.as_slice()));
        let time = [("mtime", member.modified.as_bytes())];
        self.tar
            .append_pax_extensions(time.into_iter().chain(kept).chain(more.iter().copied()))
            .map_err(ArchiveError::io("pack", &member.path))
    }
}

/// A folder of which nothing is known, as containerd makes it.
fn folder(path: &Path) -> Member {
    Member {
        path: path.to_owned(),
        kind: EntryType::Directory,
        mode: 0o755,
        user: 0,
        group: 0,
        modified: "0".to_owned(),
        size: 0,
        at: 0,
        link: Vec::new(),
        attributes: Vec::new(),
    }
}

fn whiteout(path: &Path) -> Member {
    Member {
        kind: EntryType::Char,
        mode: 0,
        ..folder(path)
    }
}

fn header(kind: EntryType, member: &Member) -> Header {
    let mut header = Header::new_gnu();
    header.set_entry_type(kind);
    header.set_mode(member.mode);
    header.set_uid(member.user.into());
    header.set_gid(member.group.into());
    let seconds = member
        .modified
        .split('.')
        .next()
        .and_then(|text| text.parse().ok());
    header.set_mtime(seconds.unwrap_or(0));
    header.set_size(0);
    header
}

/// Writes an archive of ours as an OCI layer.
///
/// # Errors
/// As [`list`](super::list), or why it cannot be written.
pub(crate) fn to_layer<W: Write>(archive: impl Read, out: W) -> Result<W, ArchiveError> {
    let mut archive = Archive::new(BufReader::with_capacity(BUFFER, archive));
    let mut tar = Builder::new(out);
    let malformed = |path: &Path| {
        let path = path.to_owned();
        |source| ArchiveError::Malformed { path, source }
    };
    let (mut last, mut bytes) = (PathBuf::new(), 0_u64);
    for entry in archive.entries().map_err(malformed(&last))? {
        let mut entry = entry.map_err(malformed(&last))?;
        let item = item(&mut entry, &last)?;
        bytes = bytes.saturating_add(item.size);
        if bytes > MAX_BYTES {
            let (claimed, max) = (bytes, MAX_BYTES);
            return Err(ArchiveError::TooLarge { claimed, max });
        }
        // The root itself is the new container's own.
        if !item.path.as_os_str().is_empty() {
            append(&mut tar, &item, &mut entry)?;
        }
        last = item.path;
    }
    tar.into_inner().map_err(ArchiveError::io("write", &last))
}

fn append<W: Write>(
    tar: &mut Builder<W>,
    item: &Item,
    content: &mut impl Read,
) -> Result<(), ArchiveError> {
    let path = &item.path;
    let pack = || ArchiveError::io("pack", path);
    let mut header = Header::new_gnu();
    header.set_entry_type(item.kind);
    header.set_mode(item.mode.bits());
    header.set_uid(item.owner.0.as_raw().into());
    header.set_gid(item.owner.1.as_raw().into());
    header.set_mtime(u64::try_from(item.modified().tv_sec).unwrap_or(0));
    header.set_size(0);
    let name = path.file_name().unwrap_or_default().as_bytes();
    let parent = path.parent().unwrap_or(Path::new(""));
    if name.starts_with(WHITEOUT) {
        return Err(ArchiveError::Kind { name: show(path) });
    }
    if item.kind == EntryType::Char && item.device == (0, 0) {
        let hidden = [WHITEOUT, name].concat();
        header.set_entry_type(EntryType::Regular);
        let path = parent.join(OsStr::from_bytes(&hidden));
        return tar
            .append_data(&mut header, path, io::empty())
            .map_err(pack());
    }
    let attributes = attributes::decoded(&item.records).ok_or_else(|| ArchiveError::Malformed {
        path: path.clone(),
        source: io::ErrorKind::InvalidData.into(),
    })?;
    let opaque = attributes.iter().any(|(name, _)| name == OPAQUE_ATTRIBUTE);
    let mut records = vec![("mtime".to_owned(), time(item).into_bytes())];
    let kept = attributes
        .into_iter()
        .filter(|(name, _)| attributes::travels(name));
    records.extend(kept.map(|(name, value)| (format!("SCHILY.xattr.{name}"), value)));
    match item.kind {
        EntryType::Symlink if item.link.len() <= HEADER_LINK => {
            header.set_link_name_literal(&item.link).map_err(pack())?;
        }
        EntryType::Symlink => records.push(("linkpath".to_owned(), item.link.clone())),
        _ => {}
    }
    let records = records
        .iter()
        .map(|(key, value)| (key.as_str(), value.as_slice()));
    tar.append_pax_extensions(records).map_err(pack())?;
    match item.kind {
        EntryType::Directory | EntryType::Symlink | EntryType::Fifo => {
            tar.append_data(&mut header, path, io::empty())
                .map_err(pack())?;
        }
        EntryType::Link => {
            let target = Path::new(OsStr::from_bytes(&item.link));
            tar.append_link(&mut header, path, target).map_err(pack())?;
        }
        EntryType::Regular | EntryType::GNUSparse => {
            header.set_entry_type(EntryType::Regular);
            header.set_size(item.size);
            tar.append_data(&mut header, path, content)
                .map_err(pack())?;
        }
        _ => return Err(ArchiveError::Kind { name: show(path) }),
    }
    if opaque && item.kind == EntryType::Directory {
        let mut header = self::header(EntryType::Regular, &whiteout(path));
        let path = path.join(OsStr::from_bytes(OPAQUE));
        tar.append_data(&mut header, path, io::empty())
            .map_err(pack())?;
    }
    Ok(())
}

/// As PAX writes it.
fn time(item: &Item) -> String {
    let modified = item.modified();
    format!("{}.{:09}", modified.tv_sec, modified.tv_nsec)
}
