//! `file://`: a folder of the node, confined to what the source allows. For tests and for disks that
//! somebody else fills.
//!
//! Every lookup is made beneath a descriptor of the allowed root, without following a symlink, so that
//! nothing that happens in the folder meanwhile leads out of it.

use std::{
    fs::{File, Metadata},
    io,
    os::{fd::OwnedFd, unix::fs::FileExt, unix::fs::MetadataExt},
    path::Path,
};

use rekindle_core::{config::Source, uri::DatasetUri};
use rekindle_store::{StoreError, crc::Crc64, crc::Running};
use rustix::{
    fs::{CWD, Dir, FileType, Mode, OFlags, ResolveFlags, copy_file_range, openat, openat2},
    io::Errno,
};

use crate::{
    DatasetError,
    checksum::Expected,
    listing::{Keys, Listing, Object},
};

#[derive(Debug)]
pub(crate) struct Folder {
    /// What the source allows.
    root: OwnedFd,
    /// What the URI names, below the root; ends with a slash when it is a folder.
    inner: String,
    uri: String,
}

impl Folder {
    pub(crate) fn open(
        source: &Source,
        uri: &DatasetUri,
        path: &str,
    ) -> Result<Self, DatasetError> {
        let allowed = source.allow.strip_prefix("file://").unwrap_or_default();
        let inner = path.strip_prefix(allowed).unwrap_or_default();
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let root = openat(CWD, allowed, flags, Mode::empty())
            .map_err(|e| StoreError::io("open the allowed folder", Path::new(allowed))(e.into()))?;
        Ok(Self {
            root,
            inner: inner.to_owned(),
            uri: uri.to_string(),
        })
    }

    fn beneath(&self, path: &str, flags: OFlags) -> io::Result<OwnedFd> {
        let path = if path.is_empty() { "." } else { path };
        let confined = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS;
        // Not blocking: a FIFO in the folder must not hold us.
        let flags = flags | OFlags::CLOEXEC | OFlags::NONBLOCK;
        Ok(openat2(&self.root, path, flags, Mode::empty(), confined)?)
    }

    fn refuse(&self, path: &str, error: &io::Error) -> DatasetError {
        let doing = format!("opening {path:?} of {}", self.uri);
        let answer = error.to_string();
        match error.kind() {
            io::ErrorKind::NotFound => DatasetError::Missing { doing, answer },
            io::ErrorKind::PermissionDenied => DatasetError::Denied { doing, answer },
            _ => DatasetError::Answer { doing, answer },
        }
    }

    pub(crate) fn list(&self, uri: &DatasetUri) -> Result<Listing, DatasetError> {
        let mut objects = Vec::new();
        if uri.is_prefix() {
            let prefix = self.inner.as_str();
            let mut keys = Keys::below(uri, prefix);
            self.walk(prefix, &mut keys, &mut objects)?;
            keys.finish()?;
        } else {
            let name = self.inner.rsplit('/').next().unwrap_or_default();
            objects.push(self.object(name.to_owned(), self.inner.clone())?);
        }
        Listing::new(uri, objects)
    }

    /// `folder` is empty or ends with a slash.
    fn walk(
        &self,
        folder: &str,
        keys: &mut Keys<'_>,
        objects: &mut Vec<Object>,
    ) -> Result<(), DatasetError> {
        let refuse = |error: &io::Error| self.refuse(folder, error);
        let fd = self
            .beneath(folder, OFlags::RDONLY | OFlags::DIRECTORY)
            .map_err(|e| refuse(&e))?;
        for entry in Dir::read_from(&fd).map_err(|e| refuse(&e.into()))? {
            let entry = entry.map_err(|e| refuse(&e.into()))?;
            let Ok(name) = entry.file_name().to_str() else {
                return Err(DatasetError::Key {
                    uri: self.uri.clone(),
                    key: entry.file_name().to_string_lossy().into_owned(),
                    reason: "its name is not UTF-8",
                });
            };
            if matches!(name, "." | "..") {
                continue;
            }
            let key = format!("{folder}{name}");
            if entry.file_type() == FileType::Directory {
                self.walk(&format!("{key}/"), keys, objects)?;
            } else if let Some(path) = keys.admit(&key, 0)? {
                objects.push(self.object(path, key)?);
            }
        }
        Ok(())
    }

    fn object(&self, path: String, key: String) -> Result<Object, DatasetError> {
        let meta = self.regular(&key)?.1;
        Ok(Object {
            path,
            size: meta.len(),
            etag: identity(&meta),
            state: String::new(),
            expected: Expected::Nothing,
            key,
        })
    }

    fn regular(&self, key: &str) -> Result<(File, Metadata), DatasetError> {
        let refuse = |reason| DatasetError::Key {
            uri: self.uri.clone(),
            key: key.chars().take(200).collect(),
            reason,
        };
        let file = match self.beneath(key, OFlags::RDONLY) {
            Ok(fd) => File::from(fd),
            Err(e) if e.raw_os_error() == Some(Errno::LOOP.raw_os_error()) => {
                return Err(refuse("it is a symlink"));
            }
            Err(e) => return Err(self.refuse(key, &e)),
        };
        let meta = file.metadata().map_err(|e| self.refuse(key, &e))?;
        if !meta.is_file() {
            return Err(refuse("it is not a regular file"));
        }
        Ok((file, meta))
    }

    /// Copies `start..end` of a file, in the kernel where it can (and without copying where the file
    /// system shares blocks), and reads the copy back for its checksum.
    pub(crate) fn copy(
        &self,
        object: &Object,
        start: u64,
        end: u64,
        to: &File,
    ) -> Result<Crc64, DatasetError> {
        let changed = |found: String| DatasetError::Changed {
            doing: format!("copying {:?} of {}", object.key, self.uri),
            found,
        };
        let (from, meta) = self.regular(&object.key)?;
        let (mut source, mut dest) = (start, start);
        while source < end {
            let want = usize::try_from(end - source).unwrap_or(usize::MAX);
            match copy_file_range(&from, Some(&mut source), to, Some(&mut dest), want) {
                Ok(0) => return Err(changed("it is shorter".to_owned())),
                Ok(_) => {}
                // Another file system on an old kernel, or one that cannot.
                Err(Errno::XDEV | Errno::OPNOTSUPP | Errno::INVAL) => {
                    copy_through_memory(&from, to, source, end)
                        .map_err(StoreError::io("copy", Path::new(&object.path)))?;
                    break;
                }
                Err(e) => {
                    return Err(StoreError::io("copy", Path::new(&object.path))(e.into()).into());
                }
            }
        }
        let after = from.metadata().map_err(|e| self.refuse(&object.key, &e))?;
        for meta in [&meta, &after] {
            if identity(meta) != object.etag {
                return Err(changed(identity(meta)));
            }
        }
        read_back(to, start, end)
            .map_err(|e| StoreError::io("read back", Path::new(&object.path))(e).into())
    }
}

fn copy_through_memory(from: &File, to: &File, start: u64, end: u64) -> io::Result<()> {
    let mut buffer = vec![0; 1 << 20];
    let mut at = start;
    while at < end {
        let want = usize::try_from(end - at).map_or(buffer.len(), |left| left.min(buffer.len()));
        from.read_exact_at(&mut buffer[..want], at)?;
        to.write_all_at(&buffer[..want], at)?;
        at += want as u64;
    }
    Ok(())
}

/// What stands for an ETag: a file that is written or replaced has another.
fn identity(meta: &Metadata) -> String {
    format!(
        "{}-{}-{}.{:09}",
        meta.ino(),
        meta.len(),
        meta.mtime(),
        meta.mtime_nsec()
    )
}

/// The checksum of `start..end` of a file, as it lies on disk.
pub(crate) fn read_back(file: &File, start: u64, end: u64) -> io::Result<Crc64> {
    let mut running = Running::default();
    let mut buffer = vec![0; 1 << 20];
    let mut at = start;
    while at < end {
        let want = usize::try_from(end - at).map_or(buffer.len(), |left| left.min(buffer.len()));
        let n = file.read_at(&mut buffer[..want], at)?;
        if n == 0 {
            break;
        }
        running.update(&buffer[..n]);
        at += n as u64;
    }
    Ok(running.crc())
}
