//! An image that is being made: who asked for it, who makes it, and how it becomes one.

use std::{
    fs::{self, File},
    io::{self, Read as _, Seek as _, SeekFrom, Write as _},
    os::unix::fs::FileTypeExt as _,
    path::{Path, PathBuf},
    time::{SystemTime, UNIX_EPOCH},
};

use rekindle_core::name::{ImageName, Namespace};
use rekindle_store::{Lock, publish_dir, space, write_file};
use serde::{Deserialize, Serialize};

use super::{
    Damage, ImageError, ImageStore, Place, SealedImage,
    folder::{Folder, Private, lock_path, new_dir, new_id, remove_unless_leased, share},
    places::sentence,
    reference,
};
use crate::{
    chunks::{ChunkError, ChunkWriter, Compression, Digest, Key, PackId},
    manifest::{
        CRIU_DIR, Encryption, FORMAT, Facts, FileEntry, INDEX_FILE, MANIFEST_DIGEST_FILE,
        MANIFEST_FILE, Manifest, Source, criu_path, declared_format, is_image_path, parse_json,
        read_bounded,
    },
};

const REQUEST_FILE: &str = "request.json";
/// More than all steps of a checkpoint take.
const MAX_STEPS: u64 = 1 << 12;

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct RequestFile {
    format: u32,
    namespace: Namespace,
    name: ImageName,
    source: Source,
}

/// An image that this process asked for and another one makes. Dropped, whatever is left of it is removed,
/// unless somebody is still making it.
#[derive(Debug)]
pub struct Request {
    store: ImageStore,
    id: String,
    namespace: Namespace,
    name: ImageName,
    lease: Option<Lock>,
    /// The lock's file, where whoever makes the image writes a line for each step that begins: it lies beside the folder,
    /// and is no part of the image. Open from the beginning, it is read to its end also when it is removed.
    steps: File,
}

impl Request {
    pub(super) fn begin(
        store: &ImageStore,
        namespace: &Namespace,
        name: &ImageName,
        source: Source,
    ) -> Result<Self, ImageError> {
        let id = new_id();
        let path = lock_path(&store.partial_dir(), &id);
        let request = Self {
            lease: share(&path)?,
            steps: File::open(&path).map_err(ImageError::io("read", &path))?,
            store: store.clone(),
            id,
            namespace: namespace.clone(),
            name: name.clone(),
        };
        let dir = request.dir();
        new_dir(&dir)?;
        let text = RequestFile {
            format: FORMAT,
            namespace: namespace.clone(),
            name: name.clone(),
            source,
        };
        let path = dir.join(REQUEST_FILE);
        let text = serde_json::to_vec(&text).map_err(|e| ImageError::request(&path, e))?;
        write_file(&path, &text, false)?;
        Ok(request)
    }

    /// The partial folder: what to hand to containerd as `image_path`.
    pub fn dir(&self) -> PathBuf {
        self.store.partial_dir().join(&self.id)
    }

    /// The steps that whoever makes it has begun since this was last asked, by their names.
    ///
    /// # Errors
    /// What the file system says.
    pub fn steps(&mut self) -> Result<Vec<String>, ImageError> {
        let path = lock_path(&self.store.partial_dir(), &self.id);
        let failed = || ImageError::io("read", &path);
        let begun = self.steps.stream_position().map_err(failed())?;
        let mut text = String::new();
        let mut new = (&mut self.steps).take(MAX_STEPS);
        new.read_to_string(&mut text).map_err(failed())?;
        // A line that is not written whole is read again.
        let whole = text.rfind('\n').map_or(0, |at| at + 1);
        let next = SeekFrom::Start(begun + whole as u64);
        self.steps.seek(next).map_err(failed())?;
        Ok(text[..whole].lines().map(str::to_owned).collect())
    }

    /// Bytes of memory and files that lie in the folder by now. None when it is no partial folder any more.
    pub fn stored(&self) -> Option<u64> {
        let entries = fs::read_dir(self.dir()).ok()?.flatten();
        let packs =
            entries.filter(|entry| entry.file_name().as_encoded_bytes().starts_with(b"pack-"));
        Some(
            packs
                .filter_map(|entry| Some(entry.metadata().ok()?.len()))
                .sum(),
        )
    }

    /// The image, once the checkpoint call has returned with success.
    ///
    /// # Errors
    /// [`ImageError::Unknown`] when the call made none: the container's shim is not ours.
    pub fn finish(self) -> Result<SealedImage, ImageError> {
        self.store.made_by(&self.namespace, &self.name, &self.id)
    }
}

impl Drop for Request {
    fn drop(&mut self) {
        drop(self.lease.take());
        // Still shared by the maker: it removes the folder itself. Errors leave it to the next sweep.
        let _ = remove_unless_leased(&self.store.partial_dir(), &self.id);
    }
}

/// Where who makes an image says how far that is. Dropped, what is left of the request is removed, unless somebody still
/// asks or makes: who asked may have been killed when the image was in its place already.
#[derive(Debug)]
pub struct Steps {
    file: Option<File>,
    partials: PathBuf,
    id: String,
}

impl Drop for Steps {
    fn drop(&mut self) {
        drop(self.file.take());
        // Errors leave it to the next sweep.
        let _ = remove_unless_leased(&self.partials, &self.id);
    }
}

impl Steps {
    /// Says that a step begins. Nobody reading it, or no room for it, does not stop the step.
    pub fn begins(&self, step: &str) {
        if let Some(mut file) = self.file.as_ref() {
            let _ = file.write_all(format!("{step}\n").as_bytes());
        }
    }
}

/// An image that is asked for, and that this process may make. Dropped, it is not made.
#[derive(Debug)]
pub struct Order {
    store: ImageStore,
    folder: Folder,
    request: RequestFile,
    /// Bytes that are expected of it, where that is known.
    expected: Option<u64>,
}

impl Order {
    pub(super) fn open(store: &ImageStore, id: &str) -> Result<Self, ImageError> {
        let path = store.partial_dir().join(id).join(REQUEST_FILE);
        let refuse = |e: &dyn std::fmt::Display| ImageError::request(&path, e);
        let Some(folder) = Folder::hold(&store.partial_dir(), id)? else {
            return Err(refuse(&"it is being removed"));
        };
        let mut file = File::open(&path).map_err(ImageError::io("read", &path))?;
        let bytes = read_bounded(&path, &mut file).map_err(|e| refuse(&e))?;
        let format = declared_format(&path, &bytes).map_err(|e| refuse(&e))?;
        if format != u64::from(FORMAT) {
            return Err(refuse(&format_args!(
                "it has format {format}, not {FORMAT}"
            )));
        }
        let request: RequestFile = parse_json(&path, &bytes).map_err(|e| refuse(&e))?;
        Ok(Self {
            store: store.clone(),
            folder,
            request,
            expected: None,
        })
    }

    /// Says how many bytes are expected of it, so that it may be made in memory where they fit; else it is made on the
    /// disk.
    #[must_use]
    pub fn expecting(self, bytes: u64) -> Self {
        Self {
            expected: Some(bytes),
            ..self
        }
    }

    /// The namespace that the image will be in. Whoever makes it compares it with the container's own.
    pub fn namespace(&self) -> &Namespace {
        &self.request.namespace
    }

    /// Where to say how far it is.
    pub fn steps(&self) -> Steps {
        let (partials, id) = (self.store.partial_dir(), self.folder.id.clone());
        let path = lock_path(&partials, &id);
        Steps {
            file: File::options().append(true).open(path).ok(),
            partials,
            id,
        }
    }

    /// Begins to make it. `key` encrypts it, and then what CRIU writes goes to `private`, a folder that is made
    /// for it in memory, and no byte of the container's goes to the disk in clear. What the newest generation of
    /// this image has in the same place is not stored again.
    ///
    /// # Errors
    /// What the file system says.
    pub fn begin(
        self,
        key: Option<Key>,
        compression: Compression,
        private: &Path,
    ) -> Result<Partial, ImageError> {
        let made_in = self.in_memory();
        let Self {
            store,
            folder,
            request,
            ..
        } = self;
        let (place, folder, most, asked) = match made_in {
            // The request stays: it may be asked for once more, on the disk.
            Some((memory, most)) => (Place::Memory, memory, most, Some(folder.left_to_others())),
            None => (Place::Disk, folder, u64::MAX, None),
        };
        let private = match key {
            Some(_) => Some(Private::new(private)?),
            None => {
                new_dir(&folder.dir.join(CRIU_DIR))?;
                None
            }
        };
        let image = (&request.namespace, &request.name);
        let base = store.base(place, image, key.as_ref());
        let unsound = base.as_ref().map(|(_, generation)| {
            store.unsound_path(&request.namespace, &request.name, *generation)
        });
        let base = base.map(|(base, _)| base);
        let chunks = ChunkWriter::new(&folder.dir, key.as_ref(), compression, base)?;
        Ok(Partial {
            chunks: chunks.up_to(most),
            unsound,
            store,
            private,
            place,
            folder,
            _asked: asked,
            request,
            key,
            compression,
        })
    }

    /// A folder in memory, and how many bytes may go into it, where what is expected fits. Trouble with memory is none of
    /// the image's.
    fn in_memory(&self) -> Option<(Folder, u64)> {
        let expected = self.expected?;
        // For what is not told before, such as CRIU's own files.
        let needed = expected.saturating_add(expected / 8);
        // What is written while it is copied is stored again, up to as much once more.
        let found = self.store.room_in_memory(&self.folder.id, needed, expected);
        found.unwrap_or_else(|error| {
            tracing::warn!("the image is made on the disk: {}", sentence(&error));
            None
        })
    }
}

/// An image that this process makes. Dropped without [`Partial::seal`], it is removed.
#[derive(Debug)]
pub struct Partial {
    store: ImageStore,
    place: Place,
    /// Where its bytes go.
    folder: Folder,
    /// Where it was asked for, when that is another place.
    _asked: Option<Folder>,
    request: RequestFile,
    key: Option<Key>,
    compression: Compression,
    chunks: ChunkWriter,
    /// What says of the generation that it is built on that it is damaged.
    unsound: Option<PathBuf>,
    /// Where CRIU writes what must not lie on the disk in clear.
    private: Option<Private>,
}

impl Partial {
    /// Where CRIU writes its images; empty at first.
    pub fn criu_dir(&self) -> PathBuf {
        match &self.private {
            Some(private) => private.path().to_owned(),
            None => self.folder.dir.join(CRIU_DIR),
        }
    }

    /// Where it is made.
    pub fn place(&self) -> Place {
        self.place
    }

    /// What who asked knows of the container's origin.
    pub fn source(&self) -> &Source {
        &self.request.source
    }

    /// Where the bytes of pages and archives go: as streams named after their files.
    pub fn chunks(&self) -> &ChunkWriter {
        &self.chunks
    }

    /// Refuses when `bytes` more do not fit on the file system that it is made on. Not asked where an earlier generation
    /// has most of them.
    ///
    /// # Errors
    /// [`StoreError::NoSpace`](rekindle_store::StoreError::NoSpace).
    pub fn require_space(&self, bytes: u64) -> Result<(), ImageError> {
        if self.chunks.has_base() {
            return Ok(());
        }
        Ok(space::require(&self.folder.dir, bytes)?)
    }

    /// Makes an image of the streams that were stored and the files that CRIU wrote: writes the index, and
    /// compares what it shares with earlier generations with its digests, so that no damage is inherited;
    /// writes the manifest last, syncs, and publishes by rename under the next generation.
    ///
    /// # Errors
    /// When the folder holds what an image cannot, or the file system refuses; nothing is published then,
    /// and the folder is removed.
    pub fn seal(mut self, facts: Facts) -> Result<SealedImage, ImageError> {
        let dir = self.folder.dir.clone();
        if self.place == Place::Disk {
            let path = dir.join(REQUEST_FILE);
            fs::remove_file(&path).map_err(ImageError::io("remove", &path))?;
        }
        self.refuse_foreign()?;
        let mut files = Vec::new();
        for path in self.criu_files()? {
            files.extend(self.keep(&path)?);
        }
        let finished = self.chunks.finish(self.key.as_ref());
        if let (Err(ChunkError::Damaged { .. }), Some(unsound)) = (&finished, &self.unsound) {
            // Or no image of this name could be made until somebody removes the one that is damaged.
            let _ = write_file(unsound, b"", false);
        }
        let (index, packs, stored) = finished?;
        write_file(&dir.join(INDEX_FILE), &index, false)?;
        files.push(FileEntry {
            path: INDEX_FILE.to_owned(),
            size: index.len() as u64,
            blake3: Digest::of(&index),
        });
        files.sort_by(|a, b| a.path.cmp(&b.path));
        let created = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default();
        let manifest = Manifest {
            format: FORMAT,
            namespace: self.request.namespace,
            name: self.request.name,
            request: self.folder.id.clone(),
            created: created.as_secs(),
            facts,
            compression: self.compression,
            encryption: self.key.as_ref().map(|key| Encryption {
                key: key.id().to_owned(),
                check: key.check(),
            }),
            stored,
            packs,
            files,
        };
        let path = dir.join(MANIFEST_FILE);
        let text =
            serde_json::to_vec_pretty(&manifest).map_err(|e| ImageError::request(&path, e))?;
        // What we would not read must not be written either.
        Manifest::parse(&path, &text).map_err(|source| ImageError::Manifest {
            image: reference(&manifest.namespace, &manifest.name, None),
            source,
        })?;
        let digest = format!("{}\n", Digest::of_manifest(&text, self.key.as_ref()));
        write_file(&dir.join(MANIFEST_DIGEST_FILE), digest.as_bytes(), false)?;
        write_file(&path, &text, false)?;
        let sealed =
            self.store
                .publish(self.place, &manifest.namespace, &manifest.name, |dest| {
                    publish_dir(&dir, dest)
                })?;
        self.folder.kept = true;
        Ok(sealed)
    }

    /// Nothing but the packs may lie beside what CRIU wrote.
    fn refuse_foreign(&self) -> Result<(), ImageError> {
        let dir = &self.folder.dir;
        for entry in fs::read_dir(dir).map_err(ImageError::io("list", dir))? {
            let entry = entry.map_err(ImageError::io("list", dir))?;
            let name = entry.file_name().to_string_lossy().into_owned();
            let kind = entry.file_type().map_err(ImageError::io("look at", dir))?;
            let ours = match name.strip_prefix("pack-") {
                Some(id) => kind.is_file() && id.parse::<PackId>().is_ok(),
                None => name == CRIU_DIR && kind.is_dir(),
            };
            if !ours {
                return Err(self.unsealable(name, Damage::Extra));
            }
        }
        Ok(())
    }

    fn unsealable(&self, file: String, damage: Damage) -> ImageError {
        ImageError::Unsealable {
            image: reference(&self.request.namespace, &self.request.name, None),
            file,
            damage,
        }
    }

    /// What CRIU wrote. It makes plain files only; its sockets are of a daemon that shared the folder.
    fn criu_files(&self) -> Result<Vec<PathBuf>, ImageError> {
        let dir = self.criu_dir();
        let mut all = Vec::new();
        for entry in fs::read_dir(&dir).map_err(ImageError::io("list", &dir))? {
            let path = entry.map_err(ImageError::io("list", &dir))?.path();
            let found = fs::symlink_metadata(&path).map_err(ImageError::io("look at", &path))?;
            let name = criu_path(&path);
            let damage = if found.file_type().is_socket() {
                fs::remove_file(&path).map_err(ImageError::io("remove", &path))?;
                continue;
            } else if !found.is_file() {
                Damage::NotAFile
            } else if !is_image_path(&name) {
                Damage::Extra
            } else {
                all.push(path);
                continue;
            };
            return Err(self.unsealable(name, damage));
        }
        Ok(all)
    }

    /// Keeps a file of CRIU's as it is, or stores it as a stream where nothing may lie in clear.
    fn keep(&self, path: &Path) -> Result<Option<FileEntry>, ImageError> {
        let read = || ImageError::io("read", path);
        let mut file = File::open(path).map_err(read())?;
        if self.private.is_some() {
            let mut stream = self.chunks.stream(&criu_path(path));
            io::copy(&mut file, &mut stream).map_err(read())?;
            stream.finish()?;
            return Ok(None);
        }
        let mut hasher = blake3::Hasher::new();
        let size = io::copy(&mut file, &mut hasher).map_err(read())?;
        Ok(Some(FileEntry {
            path: criu_path(path),
            size,
            blake3: Digest(*hasher.finalize().as_bytes()),
        }))
    }
}
