//! The way from bytes on a disk to an image that a process may be made of.
//!
//! ```text
//!  SealedImage ─verify─▶ VerifiedImage ─staged─▶ StagedImage
//!    manifest: its digest, or nobody without the key could have made it
//!    files:    exactly those, regular, of their sizes
//!    index:    its digest; nothing in it that we never write
//!    criu/:    each file compared on its way into a folder of the restore's own
//!    chunks:   compared one by one, when somebody reads them
//! ```

use std::{
    collections::BTreeMap,
    fs,
    io::{self, Read, Write},
    os::unix::fs::FileExt,
    path::Path,
    sync::{Arc, atomic::AtomicU64},
};

use rekindle_store::Lock;

use super::{
    Damage, ImageError, ImageStore, SealedImage,
    copies::missed,
    laid_out::{BUFFER, LaidOut},
    store::open_regular,
};
use crate::{
    chunks::{Chunks, Common, Digest, Index, Key, MAX_INDEX, StreamReader},
    contents::Contents,
    criu_image::{Run, Task, check_folder, credentials},
    manifest::{
        CRIU_DIR, Encryption, FileEntry, INDEX_FILE, MANIFEST_DIGEST_FILE, MANIFEST_FILE, Manifest,
        ORIGIN_FILE, SHM_FILE, UPPER_FILE,
    },
};

/// Most bytes of pages that are laid out where the restore asked for it, which is in memory as a rule. Shared memory
/// and changed pages of files may be far more, and go to the store's disk.
const IN_MEMORY: u64 = 64 << 20;

/// An image that is what was sealed, leased as long as this lives: CRIU's files in a folder of their own, and the
/// chunks, each of which is compared when it is read.
#[derive(Debug)]
pub struct VerifiedImage {
    image: StagedImage,
    chunks: Arc<Chunks>,
}

/// What a restore still needs of an image when its archives are unpacked, leased as long as this lives. The folder of
/// CRIU's files is removed with it.
#[derive(Debug)]
pub struct StagedImage {
    store: ImageStore,
    manifest: Manifest,
    reference: String,
    laid_out: LaidOut,
    _lease: Lock,
}

impl StagedImage {
    /// What it says of itself.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// `<namespace>/<name>@<generation>`.
    pub fn reference(&self) -> &str {
        &self.reference
    }

    /// The store that it is in.
    pub fn store(&self) -> &ImageStore {
        &self.store
    }

    /// CRIU's images: what `runc restore --image-path` and the [pager](crate::pager) take. Of the pages, those
    /// that a lazy restore does not leave to the pager; the rest are holes, unless they were
    /// [loaded eagerly](VerifiedImage::load_eagerly).
    pub fn criu_dir(&self) -> &Path {
        self.laid_out.path()
    }
}

impl std::ops::Deref for VerifiedImage {
    type Target = StagedImage;
    fn deref(&self) -> &StagedImage {
        &self.image
    }
}

impl VerifiedImage {
    /// Lets go of the chunks, of whose index there are 60 bytes for each in memory.
    pub fn staged(self) -> StagedImage {
        self.image
    }

    /// What CRIU would give its tasks, of which it says more than the manifest; for [`fit`](crate::fit::fit).
    ///
    /// # Errors
    /// [`ImageError::Criu`].
    pub fn tasks(&self) -> Result<Vec<Task>, ImageError> {
        credentials(self.criu_dir()).map_err(|source| ImageError::Criu {
            image: self.reference.clone(),
            source,
        })
    }

    /// The archive of the container's writable layer, if it had one.
    pub fn upper(&self) -> Option<StreamReader> {
        self.chunks.stream(UPPER_FILE)
    }

    /// The archive of the container's `/dev/shm`, if it had one.
    pub fn shm(&self) -> Option<StreamReader> {
        self.chunks.stream(SHM_FILE)
    }

    /// Bytes of memory that a lazy restore leaves to its pager, those that are zeros not counted.
    ///
    /// # Errors
    /// [`ImageError::Criu`].
    pub fn lazy_bytes(&self) -> Result<u64, ImageError> {
        let plan = self
            .laid_out
            .plan(&self.reference, &self.chunks, Run::lazy)?;
        Ok(plan.bytes())
    }

    /// Puts all pages where CRIU looks for them, for a restore without a pager: beside its other files, and where they
    /// are large on the store's disk, unless the image is encrypted.
    ///
    /// # Errors
    /// What the file system says, or which pack is damaged.
    pub fn load_eagerly(&mut self) -> Result<(), ImageError> {
        let plan = self
            .laid_out
            .plan(&self.reference, &self.chunks, |_| true)?;
        if plan.bytes() > IN_MEMORY && self.manifest.encryption.is_none() {
            self.image.laid_out = self.laid_out.copied_to(&self.store)?;
        }
        self.laid_out.write(plan, &self.reference, &self.chunks)
    }

    /// Reads all chunks and compares them; adds the bytes that are done to `done`, up to
    /// [`Manifest::total_bytes`] less the other files.
    ///
    /// # Errors
    /// [`ImageError::Chunks`] names the pack that is damaged.
    pub fn verify_chunks(&self, done: &AtomicU64) -> Result<(), ImageError> {
        self.chunks
            .verify(done)
            .map_err(ImageError::chunks(&self.reference))
    }
}

impl SealedImage {
    /// The name of the key that it is encrypted with, if it is. Not verified: only good for finding the key.
    pub fn key(&self) -> Option<&str> {
        let encryption = self.manifest.encryption.as_ref()?;
        Some(&encryption.key)
    }

    /// Checks that the image is whole: exactly the files that its manifest lists, all regular, of the sizes
    /// and digests that it says, and CRIU's files such that CRIU may read them. Those are put into `into`, a
    /// folder that is made for them, and that has to be in memory where the image is encrypted; or, where it is not
    /// and they are large, into one of the store's. The chunks are compared when they are read, and by
    /// [`VerifiedImage::verify_chunks`].
    ///
    /// # Errors
    /// [`ImageError::Damaged`] names the first file that is not what it was; [`ImageError::Criu`].
    pub fn verify(self, into: &Path, key: Option<&Key>) -> Result<VerifiedImage, ImageError> {
        self.or_on_disk(|image| {
            let chunks = Arc::new(image.chunks_whole(key)?);
            image.verify_with(into, key, chunks)
        })
    }

    /// With chunks that are its own.
    pub(super) fn verify_with(
        self,
        into: &Path,
        key: Option<&Key>,
        chunks: Arc<Chunks>,
    ) -> Result<VerifiedImage, ImageError> {
        let mut laid_out = self.criu_files(into, key, &chunks)?;
        let reference = self.reference();
        let plan = laid_out.plan(&reference, &chunks, |run| !run.lazy())?;
        if plan.bytes() > IN_MEMORY && key.is_none() {
            laid_out = laid_out.copied_to(&self.store)?;
        }
        laid_out.write(plan, &reference, &chunks)?;
        check_folder(laid_out.path()).map_err(|source| ImageError::Criu {
            image: reference.clone(),
            source,
        })?;
        Ok(VerifiedImage {
            image: StagedImage {
                reference,
                store: self.store,
                manifest: self.manifest,
                laid_out,
                _lease: self.lease,
            },
            chunks,
        })
    }

    /// What is in it, for people. CRIU's files are compared with their digests, on their way into `into`, a folder that
    /// is made for them and removed again; as with [`SealedImage::verify`] it has to be in memory where the image is
    /// encrypted. The memory is not read. `chunks` are its own, and `common` says which of them another image has too.
    ///
    /// # Errors
    /// As [`SealedImage::verify`].
    pub fn contents(
        &self,
        into: &Path,
        key: Option<&Key>,
        chunks: &Arc<Chunks>,
        common: Option<&Common>,
    ) -> Result<Contents, ImageError> {
        let laid_out = self.criu_files(into, key, chunks)?;
        Contents::read(
            &self.reference(),
            laid_out.path(),
            Arc::clone(chunks),
            common,
        )
    }

    /// CRIU's files without the pages, for whoever writes them elsewhere; compared, but for what only a restore has to
    /// know. `into` is as with [`SealedImage::verify`].
    #[cfg(feature = "archives")]
    pub(crate) fn small_files(
        &self,
        into: &Path,
        key: Option<&Key>,
        chunks: &Arc<Chunks>,
    ) -> Result<LaidOut, ImageError> {
        self.criu_files(into, key, chunks)
    }

    /// Lays CRIU's files out in a folder that is made for them, without pages.
    fn criu_files(
        &self,
        into: &Path,
        key: Option<&Key>,
        chunks: &Arc<Chunks>,
    ) -> Result<LaidOut, ImageError> {
        let laid_out = LaidOut::at(into)?;
        for entry in &self.manifest.files {
            if entry.path != INDEX_FILE {
                self.lay_out(entry, &laid_out)?;
            }
        }
        for (name, _) in chunks.streams() {
            let file = name
                .strip_prefix(CRIU_DIR)
                .and_then(|name| name.strip_prefix('/'));
            let Some(file) = file.filter(|file| !file.starts_with("pages-")) else {
                continue;
            };
            // Of whoever has no key, nothing is believed that could be written for ever.
            if key.is_none() {
                return Err(self.damaged(name, Damage::Extra));
            }
            let (mut out, path) = laid_out.create(file)?;
            if let Some(mut stream) = chunks.stream(name) {
                io::copy(&mut stream, &mut out).map_err(ImageError::io("lay out", &path))?;
            }
        }
        Ok(laid_out)
    }

    /// Its chunks, which prove themselves, after a look at all that they depend on.
    ///
    /// # Errors
    /// As [`SealedImage::verify`]; [`ImageError::Incoming`] when they are not all here.
    pub fn chunks(&self, key: Option<&Key>) -> Result<Chunks, ImageError> {
        let here = self.chunks_whole(key);
        match (here, self.on_disk()) {
            (Err(error), Some(other)) if error.is_of_the_copy() => {
                missed(&self.reference(), &error);
                other.chunks_whole(key)
            }
            (here, _) => here,
        }
    }

    fn chunks_whole(&self, key: Option<&Key>) -> Result<Chunks, ImageError> {
        self.require_whole()?;
        self.chunks_here(key)
    }

    /// Those of its chunks that are here, which the others fail to be when they are read.
    pub(super) fn chunks_here(&self, key: Option<&Key>) -> Result<Chunks, ImageError> {
        self.check_manifest(key)?;
        self.check_sizes()?;
        let packs = &self.manifest.packs;
        let chunks = Chunks::open(&self.dir, packs, self.index()?, key)
            .map_err(ImageError::chunks(&self.reference()))?;
        Ok(match &self.spare {
            Some(dir) => chunks.or_from(dir),
            None => chunks,
        })
    }

    /// What can be compared without a key: that exactly the files are there that the manifest lists, of their sizes,
    /// and the index; and where it is not encrypted, the manifest.
    pub(crate) fn check_listed(&self) -> Result<(), ImageError> {
        self.require_whole()?;
        if self.manifest.encryption.is_none() {
            self.check_manifest(None)?;
        }
        self.check_sizes()?;
        self.index().map(drop)
    }

    /// Whether the manifest is what was sealed, with this key.
    pub(super) fn check_manifest(&self, key: Option<&Key>) -> Result<(), ImageError> {
        match (&self.manifest.encryption, key) {
            (None, None) => {}
            (None, Some(_)) => return Err(ImageError::Unlocked(self.reference())),
            (Some(encryption), None) => {
                return Err(self.locked(encryption, "which this node does not have"));
            }
            (Some(encryption), Some(key)) if key.check() != encryption.check => {
                return Err(self.locked(encryption, "and the key of that name here is another one"));
            }
            (Some(_), Some(_)) => {}
        }
        let digest = self.read(MANIFEST_DIGEST_FILE)?;
        if digest != format!("{}\n", Digest::of_manifest(&self.manifest_bytes, key)).as_bytes() {
            return Err(self.damaged(MANIFEST_FILE, Damage::Checksum));
        }
        Ok(())
    }

    fn locked(&self, encryption: &Encryption, found: &'static str) -> ImageError {
        ImageError::Locked {
            image: self.reference(),
            key: encryption.key.clone(),
            found,
        }
    }

    /// The index, compared with its digest. The manifest must have been checked.
    pub(super) fn index(&self) -> Result<Index, ImageError> {
        let Some(entry) = self.manifest.file(INDEX_FILE) else {
            return Err(self.damaged(INDEX_FILE, Damage::Absent));
        };
        let path = self.dir.join(INDEX_FILE);
        let file = open_regular(&path).map_err(ImageError::io("read", &path))?;
        let mut bytes = Vec::new();
        file.take(entry.size.min(MAX_INDEX) + 1)
            .read_to_end(&mut bytes)
            .map_err(ImageError::io("read", &path))?;
        if Digest::of(&bytes) != entry.blake3 {
            return Err(self.damaged(INDEX_FILE, Damage::Checksum));
        }
        let sizes: Vec<u64> = self.manifest.packs.iter().map(|pack| pack.size).collect();
        Index::parse(&bytes, &sizes, self.manifest.encryption.is_some())
            .map_err(ImageError::chunks(&self.reference()))
    }

    /// Copies a file of CRIU's, comparing it on its way: what CRIU reads later is what was compared.
    fn lay_out(&self, entry: &FileEntry, into: &LaidOut) -> Result<(), ImageError> {
        let from = self.dir.join(&entry.path);
        let name = from.file_name().unwrap_or_default().to_string_lossy();
        let mut file = open_regular(&from).map_err(ImageError::io("read", &from))?;
        let (mut out, to) = into.create(&name)?;
        let mut hasher = blake3::Hasher::new();
        let mut buffer = vec![0; BUFFER];
        let mut size = 0;
        loop {
            let n = match file.read(&mut buffer) {
                Ok(0) => break,
                Ok(n) => n,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                Err(e) => return Err(ImageError::io("read", &from)(e)),
            };
            size += n as u64;
            if size > entry.size {
                break;
            }
            hasher.update(&buffer[..n]);
            out.write_all(&buffer[..n])
                .map_err(ImageError::io("write", &to))?;
        }
        if size != entry.size || *hasher.finalize().as_bytes() != entry.blake3.0 {
            return Err(self.damaged(&entry.path, Damage::Checksum));
        }
        Ok(())
    }

    fn damaged(&self, file: &str, damage: Damage) -> ImageError {
        ImageError::Damaged {
            image: self.reference(),
            file: file.to_owned(),
            damage,
        }
    }

    /// The manifest's digest is 65 bytes: a larger file is not read.
    fn read(&self, name: &str) -> Result<Vec<u8>, ImageError> {
        let path = self.dir.join(name);
        let file = match open_regular(&path) {
            Ok(file) => file,
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                return Err(self.damaged(name, Damage::Absent));
            }
            Err(_) => return Err(self.damaged(name, Damage::NotAFile)),
        };
        let mut bytes = [0; 66];
        let n = file
            .read_at(&mut bytes, 0)
            .map_err(ImageError::io("read", &path))?;
        Ok(bytes[..n].to_vec())
    }

    /// Before a byte is read: is every file there, and nothing else, and of the right size?
    fn check_sizes(&self) -> Result<(), ImageError> {
        let mut there = BTreeMap::new();
        self.walk(&self.dir, "", &mut there)?;
        for name in [MANIFEST_FILE, MANIFEST_DIGEST_FILE, ORIGIN_FILE] {
            there.remove(name);
        }
        let files = self
            .manifest
            .files
            .iter()
            .map(|file| (file.path.clone(), file.size));
        let packs = self
            .manifest
            .packs
            .iter()
            .map(|pack| (pack.id.file(), pack.size));
        for (name, expected) in files.chain(packs) {
            let damage = match there.remove(&name) {
                None => Damage::Absent,
                Some(None) => Damage::NotAFile,
                Some(Some(found)) if found != expected => Damage::Size { expected, found },
                Some(_) => continue,
            };
            return Err(self.damaged(&name, damage));
        }
        match there.first_key_value() {
            Some((name, _)) => Err(self.damaged(name, Damage::Extra)),
            None => Ok(()),
        }
    }

    /// Every entry with its size, or none where it is no regular file.
    fn walk(
        &self,
        dir: &Path,
        prefix: &str,
        there: &mut BTreeMap<String, Option<u64>>,
    ) -> Result<(), ImageError> {
        for entry in fs::read_dir(dir).map_err(ImageError::io("list", dir))? {
            let entry = entry.map_err(ImageError::io("list", dir))?;
            let path = entry.path();
            let found = fs::symlink_metadata(&path).map_err(ImageError::io("look at", &path))?;
            let name = format!("{prefix}{}", entry.file_name().to_string_lossy());
            if found.is_dir() && name == CRIU_DIR {
                self.walk(&path, &format!("{CRIU_DIR}/"), there)?;
            } else {
                there.insert(name, found.is_file().then_some(found.len()));
            }
        }
        Ok(())
    }
}
