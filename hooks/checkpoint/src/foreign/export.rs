//! An image as an archive that containerd's CRI restores, in the form of the kubelet's. Failure contract: the file is
//! there, whole, or there is none.

use std::{
    fs::{self, File},
    io::{self, Read, Write},
    os::unix::fs::{FileExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use rekindle_store::{commit_file, space};
use serde_json::{Value, json};
use tar::{EntryType, Header};

use super::{
    CHECKPOINT, CONFIG_DUMP, ForeignError, ROOTFS_DIFF, SHM, SHM_TAR, SPEC_DUMP, STATUS_DUMP,
};
use crate::{
    archive::layer::to_layer,
    chunks::{Chunks, Key},
    image::{ImageError, SealedImage},
    manifest::{CRIU_DIR, Facts, Manifest, SHM_FILE, UPPER_FILE},
    plain::{self, PLAIN_FILE},
};

/// A member of a tar archive is padded to this.
const BLOCK: u64 = 512;

/// What became of an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Exported {
    /// Bytes of the archive.
    pub bytes: u64,
    /// Whether the pod's `/dev/shm` is in it, which `rekindle image import` takes, and containerd passes over.
    pub shm: bool,
}

/// Writes `image` to `into`, in clear; `plain` says that this is meant where it is encrypted. CRIU's files are laid out
/// in `room`, a folder that is made for them, as with [`SealedImage::verify`]. `done` grows to the bytes of its streams.
///
/// # Errors
/// When there is such a file, the image is damaged, or the file system refuses.
pub fn export(
    image: &SealedImage,
    key: Option<&Key>,
    plain: bool,
    (room, into): (&Path, &Path),
    done: &AtomicU64,
) -> Result<Exported, ForeignError> {
    if image.manifest().encryption.is_some() && !plain {
        return Err(ForeignError::Encrypted(image.reference()));
    }
    if fs::symlink_metadata(into).is_ok() {
        return Err(ForeignError::io("make", into)(
            io::ErrorKind::AlreadyExists.into(),
        ));
    }
    let chunks = Arc::new(image.chunks(key)?);
    let streams: u64 = chunks.streams().map(|(_, bytes)| bytes).sum();
    let temporary = Temporary::new(into)?;
    space::require(folder_of(into), streams)?;
    let laid_out = image.small_files(room, key, &chunks)?;
    plain::write(laid_out.path(), &image.manifest().facts)?;
    let mut out = Out::new(&temporary.path)?;
    let shm = chunks.bytes_of(SHM_FILE).is_some();
    out.described(image.manifest(), shm)?;
    out.folder(CHECKPOINT)?;
    out.criu(laid_out.path())?;
    out.pages(image, &chunks, done)?;
    for (stream, name) in [(UPPER_FILE, ROOTFS_DIFF), (SHM_FILE, SHM_TAR)] {
        if let Some(archive) = chunks.stream(stream) {
            out.layer(name, Counted(archive, done))?;
        }
    }
    let bytes = out.end()?;
    commit_file(&temporary.path, into)?;
    Ok(Exported { bytes, shm })
}

/// What is being written, removed when this is dropped and it was not renamed.
struct Temporary {
    path: PathBuf,
}

impl Temporary {
    fn new(into: &Path) -> Result<Self, ForeignError> {
        let name = into.file_name().unwrap_or_default().to_string_lossy();
        let name = format!(".{name}.rekindle-{}", std::process::id());
        let path = folder_of(into).join(name);
        Ok(Self { path })
    }
}

impl Drop for Temporary {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path);
    }
}

fn folder_of(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

struct Counted<'a, R>(R, &'a AtomicU64);

impl<R: Read> Read for Counted<'_, R> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let n = self.0.read(into)?;
        self.1.fetch_add(n as u64, Ordering::Relaxed);
        Ok(n)
    }
}

/// The archive that is being written.
struct Out<'a> {
    file: io::BufWriter<File>,
    path: &'a Path,
    at: u64,
}

impl Write for Out<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let n = self.file.write(bytes)?;
        self.at += n as u64;
        Ok(n)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

impl<'a> Out<'a> {
    fn new(path: &'a Path) -> Result<Self, ForeignError> {
        let file = File::options()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(path);
        let file = file.map_err(ForeignError::io("make", path))?;
        Ok(Self {
            file: io::BufWriter::with_capacity(256 << 10, file),
            path,
            at: 0,
        })
    }

    fn put(&mut self, bytes: &[u8]) -> Result<(), ForeignError> {
        let path = self.path;
        self.write_all(bytes)
            .map_err(ForeignError::io("write", path))
    }

    fn folder(&mut self, name: &str) -> Result<(), ForeignError> {
        let mut header = header(name, 0, self.path)?;
        header.set_entry_type(EntryType::Directory);
        header.set_mode(0o700);
        header.set_cksum();
        self.put(header.as_bytes())
    }

    /// A file of `size` bytes.
    fn file(&mut self, name: &str, size: u64, from: &mut impl Read) -> Result<(), ForeignError> {
        let path = self.path;
        let header = header(name, size, path)?;
        self.put(header.as_bytes())?;
        let copied = io::copy(&mut from.take(size), self);
        let copied = copied.map_err(ForeignError::io("write", path))?;
        if copied != size {
            return Err(ForeignError::io("write", path)(
                io::ErrorKind::UnexpectedEof.into(),
            ));
        }
        self.pad()
    }

    fn pad(&mut self) -> Result<(), ForeignError> {
        let padding = self.at.wrapping_neg() % BLOCK;
        self.put(&[0; BLOCK as usize][..padding as usize])
    }

    /// What containerd reads before it unpacks the rest.
    fn described(&mut self, manifest: &Manifest, shm: bool) -> Result<(), ForeignError> {
        for (name, value) in [
            (CONFIG_DUMP, config(manifest)),
            (SPEC_DUMP, spec(&manifest.facts, shm)),
            (STATUS_DUMP, status(manifest)),
        ] {
            let text = value.to_string();
            self.file(name, text.len() as u64, &mut text.as_bytes())?;
        }
        Ok(())
    }

    /// CRIU's files, and what tells a shim of ours how they were dumped. Of the pages nothing is in that folder.
    fn criu(&mut self, dir: &Path) -> Result<(), ForeignError> {
        let mut names = Vec::new();
        for entry in fs::read_dir(dir).map_err(ForeignError::io("list", dir))? {
            let entry = entry.map_err(ForeignError::io("list", dir))?;
            names.push(entry.file_name().to_string_lossy().into_owned());
        }
        names.sort_unstable();
        debug_assert!(names.iter().any(|name| name == PLAIN_FILE));
        for name in names {
            let path = dir.join(&name);
            let read = || ForeignError::io("read", &path);
            let mut file = File::open(&path).map_err(read())?;
            let size = file.metadata().map_err(read())?.len();
            self.file(&format!("{CHECKPOINT}{name}"), size, &mut file)?;
        }
        Ok(())
    }

    fn pages(
        &mut self,
        image: &SealedImage,
        chunks: &Arc<Chunks>,
        done: &AtomicU64,
    ) -> Result<(), ForeignError> {
        let pages: Vec<(String, u64)> = chunks
            .streams()
            .filter_map(|(stream, size)| {
                let name = stream.strip_prefix(CRIU_DIR)?.strip_prefix('/')?;
                name.starts_with("pages-").then(|| (name.to_owned(), size))
            })
            .collect();
        for (name, size) in pages {
            let stream = chunks.stream(&format!("{CRIU_DIR}/{name}"));
            let stream = stream.ok_or_else(|| ImageError::Unknown(image.reference()))?;
            self.file(
                &format!("{CHECKPOINT}{name}"),
                size,
                &mut Counted(stream, done),
            )?;
        }
        Ok(())
    }

    /// An archive of ours as a layer, of which nobody knows how large it becomes.
    fn layer(&mut self, name: &str, archive: impl Read) -> Result<(), ForeignError> {
        let path = self.path;
        let at = self.at;
        self.put(&[0; BLOCK as usize])?;
        let written = to_layer(archive, &mut *self);
        written.map_err(|source| ForeignError::Archive {
            what: "a layer",
            path: path.to_owned(),
            source,
        })?;
        let header = header(name, self.at - at - BLOCK, path)?;
        self.pad()?;
        self.flush().map_err(ForeignError::io("write", path))?;
        let file = self.file.get_ref();
        file.write_all_at(header.as_bytes(), at)
            .map_err(ForeignError::io("write", path))
    }

    /// Two blocks of zeros end an archive.
    fn end(mut self) -> Result<u64, ForeignError> {
        self.put(&[0; 2 * BLOCK as usize])?;
        let path = self.path;
        self.flush().map_err(ForeignError::io("write", path))?;
        Ok(self.at)
    }
}

fn header(name: &str, size: u64, path: &Path) -> Result<Header, ForeignError> {
    let mut header = Header::new_gnu();
    // A file of CRIU's has a name of at most some dozen bytes; one that does not fit is told of.
    header
        .set_path(name)
        .map_err(ForeignError::io("name a file of", path))?;
    header.set_entry_type(EntryType::Regular);
    header.set_mode(0o600);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(0);
    header.set_size(size);
    header.set_cksum();
    Ok(header)
}

/// The image that containerd pulls before it restores: by its digest, where that is known.
fn image_of(facts: &Facts) -> (String, String) {
    let source = &facts.source;
    let name = source.image_ref.clone().unwrap_or_default();
    let by_digest = source.image_digest.as_ref().map(|digest| {
        let plain = name
            .split_once('@')
            .map_or(name.as_str(), |(plain, _)| plain);
        // A tag comes behind the last slash, a port before it.
        let tag = plain
            .rfind(':')
            .filter(|colon| plain.rfind('/') < Some(*colon));
        format!("{}@{digest}", &plain[..tag.unwrap_or(plain.len())])
    });
    (by_digest.unwrap_or_else(|| name.clone()), name)
}

fn container_of(manifest: &Manifest) -> &str {
    &manifest.facts.source.container
}

fn config(manifest: &Manifest) -> Value {
    let (by_digest, name) = image_of(&manifest.facts);
    let when = rfc3339(manifest.created);
    json!({
        "id": container_of(manifest),
        "name": manifest.name,
        "rootfsImage": name,
        "rootfsImageRef": by_digest,
        "rootfsImageName": name,
        "runtime": "io.containerd.runc.v2",
        "createdTime": when,
        "checkpointedTime": when,
        "restoredTime": "0001-01-01T00:00:00Z",
        "restored": false,
    })
}

/// What is known of the container's spec. A restore takes that of the new container.
fn spec(facts: &Facts, shm: bool) -> Value {
    let security = &facts.container.security;
    let capabilities = &security.capabilities;
    let mounts = facts.container.mounts.iter().map(|destination| {
        let mut mount = json!({"destination": destination});
        if destination == SHM && shm {
            mount["type"] = "bind".into();
        }
        mount
    });
    let mut annotations = json!({});
    if let Some((namespace, pod)) = facts
        .source
        .pod
        .as_deref()
        .and_then(|pod| pod.split_once('/'))
    {
        annotations = json!({
            "io.kubernetes.cri.container-type": "container",
            "io.kubernetes.cri.sandbox-namespace": namespace,
            "io.kubernetes.cri.sandbox-name": pod,
        });
    }
    json!({
        "ociVersion": "1.1.0",
        "process": {
            "terminal": facts.container.terminal,
            "user": {
                "uid": security.uid,
                "gid": security.gid,
                "additionalGids": security.additional_gids,
            },
            "cwd": "/",
            "capabilities": {
                "bounding": capabilities.bounding,
                "effective": capabilities.effective,
                "inheritable": capabilities.inheritable,
                "permitted": capabilities.permitted,
                "ambient": capabilities.ambient,
            },
            "noNewPrivileges": security.no_new_privileges,
        },
        "root": {"path": "rootfs"},
        "hostname": facts.container.hostname,
        "mounts": mounts.collect::<Vec<_>>(),
        "annotations": annotations,
    })
}

/// `ContainerStatus` of CRI, as Go writes it.
fn status(manifest: &Manifest) -> Value {
    let (by_digest, name) = image_of(&manifest.facts);
    json!({
        "id": container_of(manifest),
        "metadata": {"name": manifest.name},
        "state": 1,
        "created_at": manifest.created.saturating_mul(1_000_000_000),
        "started_at": manifest.created.saturating_mul(1_000_000_000),
        "image": {"image": name, "user_specified_image": name},
        "image_ref": by_digest,
        "labels": {},
        "annotations": {},
    })
}

/// Seconds since 1970, as Go reads a time.
fn rfc3339(seconds: u64) -> String {
    let (days, rest) = (seconds / 86_400, seconds % 86_400);
    // Days since the first of March of year 0, so that a leap day is the last of its year; by Howard Hinnant.
    let days = days + 719_468;
    let era = days / 146_097;
    let of_era = days % 146_097;
    let year = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year + year / 4 - year / 100);
    let shifted = (5 * of_year + 2) / 153;
    let day = of_year - (153 * shifted + 2) / 5 + 1;
    let month = if shifted < 10 {
        shifted + 3
    } else {
        shifted - 9
    };
    let year = year + era * 400 + u64::from(month <= 2);
    let (hour, minute, second) = (rest / 3600, rest / 60 % 60, rest % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}Z")
}
