//! Copies of an image from one place to the other, and what becomes of one that fails.
//!
//! ```text
//!             settle: verified, synced, appears by rename
//!   memory  ──────────────────────────────────────────────▶  disk
//!           ◀──────────────────────────────────────────────
//!             promote: verified, within the quota
//!   memory  ──demote: leaves by rename, unless leased
//! ```
//! Killed anywhere, each place has a copy that is whole, or none; and one of the two is there that was there before.

use std::{
    fs::{self, File},
    io::{self, Read as _, Seek as _, SeekFrom},
    os::unix::fs::{FileExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
    sync::atomic::AtomicU64,
};

use rekindle_core::name::{ImageName, Namespace};
use rekindle_store::{Lock, StoreError, publish_dir, space, write_file};
use rustix::fs::{SeekFrom as Seek, seek};

use super::{
    Evicted, ImageError, ImageStore, Place, Places, SealedImage,
    folder::{Folder, lock_path, new_dir, new_id, share},
    inventory::own_bytes,
    laid_out::BUFFER,
    places::sentence,
    store::open_regular,
};
use crate::{
    chunks::Key,
    manifest::{CRIU_DIR, MANIFEST_DIGEST_FILE, MANIFEST_FILE},
    retention::Held,
};

/// What became of a copy.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Copied {
    /// It is there, and so many bytes were written for it.
    Written(u64),
    /// It was there already.
    There,
    /// There is no room for it.
    NoRoom,
}

/// How a copy is proved: with the key of the image, if it has one, and a folder for CRIU's files that is made for it, as
/// with [`SealedImage::verify`]. None where there is no key for it, and only its files and their sizes can be compared.
pub type Proof<'a> = Option<(Option<&'a Key>, &'a Path)>;

impl SealedImage {
    /// Where this copy of it lies.
    pub fn place(&self) -> Place {
        self.place
    }

    /// Where it has copies now.
    pub fn places(&self) -> Places {
        let manifest = &self.manifest;
        let image = (&manifest.namespace, &manifest.name);
        self.store.places(image, self.generation)
    }

    /// This copy only: what is wrong with it is not made up for by the other one.
    pub fn alone(self) -> Self {
        Self {
            spare: None,
            ..self
        }
    }

    /// The copy on the disk, where this is the one in memory and there is one that can be read.
    pub fn on_disk(&self) -> Option<Self> {
        let manifest = &self.manifest;
        let image = (&manifest.namespace, &manifest.name);
        self.spare.as_ref()?;
        let lock = self.store.lock_path(image.0, image.1, self.generation);
        let lease = share(&lock).ok().flatten()?;
        let other = self.store.in_place(Place::Disk, image, self.generation);
        let (dir, manifest, manifest_bytes) = other?.ok()?;
        // Else it is no copy of this one.
        (manifest_bytes == self.manifest_bytes).then(|| Self {
            store: self.store.clone(),
            place: Place::Disk,
            spare: None,
            dir,
            manifest,
            manifest_bytes,
            generation: self.generation,
            lease,
        })
    }

    /// Does something with it, and where it is in memory and that fails for what lies there, with its copy on the disk. Of
    /// a copy in memory that has failed nothing stays.
    pub(super) fn or_on_disk<T>(
        self,
        work: impl Fn(Self) -> Result<T, ImageError>,
    ) -> Result<T, ImageError> {
        let Some(other) = self.on_disk() else {
            return work(self);
        };
        match work(self) {
            Err(error) if error.is_of_the_copy() => {
                missed(&other.reference(), &error);
                let (store, image) = (other.store.clone(), other.manifest.clone());
                let generation = other.generation;
                let done = work(other)?;
                store.drop_from_memory((&image.namespace, &image.name), generation);
                Ok(done)
            }
            done => done,
        }
    }

    /// Removes the copy in memory, of which something was not what it should be, where there is one on the disk.
    pub fn leave_memory(&self) {
        if self.spare.is_some() {
            let image = (&self.manifest.namespace, &self.manifest.name);
            self.store.drop_from_memory(image, self.generation);
        }
    }

    /// Puts a copy of an image in memory onto the disk. What its other generations there have is linked.
    ///
    /// # Errors
    /// What the file system says, or what is wrong with the image; then there is nothing of it on the disk.
    pub fn settle(&self, proof: Proof<'_>) -> Result<Copied, ImageError> {
        let image = (&self.manifest.namespace, &self.manifest.name);
        if self.place == Place::Disk || self.store.places(image, self.generation).disk {
            return Ok(Copied::There);
        }
        let partials = self.store.partial_dir();
        self.copy(Place::Disk, proof, || {
            let folder = Folder::hold(&partials, &format!("settle-{}", new_id()))?;
            // Its name is new, so nobody can be removing it.
            let folder = folder.ok_or_else(|| ImageError::request(&partials, "it is locked"))?;
            new_dir(&folder.dir)?;
            Ok(Some(folder))
        })
    }

    /// Puts a copy of an image on the disk into memory, where there is room for it.
    ///
    /// # Errors
    /// What the file system says, or what is wrong with the image; then there is nothing of it in memory.
    pub fn promote(&self, proof: Proof<'_>) -> Result<Copied, ImageError> {
        self.require_whole()?;
        if self.place == Place::Memory {
            return Ok(Copied::There);
        }
        let bytes = self.manifest.total_bytes();
        self.copy(Place::Memory, proof, || {
            let id = format!("promote-{}", new_id());
            let found = self.store.room_in_memory(&id, bytes, 0)?;
            Ok(found.map(|(folder, _)| folder))
        })
    }

    /// Copies it by way of a partial folder. What is linked may be damaged where this one is not: then nothing is.
    fn copy(
        &self,
        to: Place,
        proof: Proof<'_>,
        folder: impl Fn() -> Result<Option<Folder>, ImageError>,
    ) -> Result<Copied, ImageError> {
        for links in [true, false] {
            let Some(folder) = folder()? else { break };
            match self.copy_into(folder, to, proof, links) {
                Err(error) if links && error.is_damage() => {}
                done => return done,
            }
        }
        Ok(Copied::NoRoom)
    }

    fn copy_into(
        &self,
        mut folder: Folder,
        to: Place,
        proof: Proof<'_>,
        links: bool,
    ) -> Result<Copied, ImageError> {
        let image = (&self.manifest.namespace, &self.manifest.name);
        let Some(dest) = self.store.dir_in(to, image, self.generation) else {
            return Ok(Copied::NoRoom);
        };
        let written = self.copy_files(to, &folder.dir, links)?;
        let lease = share(&lock_path(&folder.partials, &folder.id))?;
        let copy = Self {
            store: self.store.clone(),
            place: to,
            spare: None,
            dir: folder.dir.clone(),
            manifest: self.manifest.clone(),
            manifest_bytes: self.manifest_bytes.clone(),
            generation: self.generation,
            lease: lease.ok_or_else(|| ImageError::Unknown(self.reference()))?,
        };
        match proof {
            Some((key, into)) => copy.verify(into, key)?.verify_chunks(&AtomicU64::new(0))?,
            None => copy.check_listed()?,
        }
        let home = dest.parent().unwrap_or(&dest);
        new_dir(home)?;
        match publish_dir(&folder.dir, &dest) {
            Err(StoreError::Exists(_)) => return Ok(Copied::There),
            published => published?,
        }
        folder.kept = true;
        if !self.dir.join(MANIFEST_FILE).exists() {
            // Removed by force meanwhile, and this copy came too late for that.
            self.store
                .remove_generation(image.0, image.1, self.generation)?;
            return Err(ImageError::Unknown(self.reference()));
        }
        Ok(Copied::Written(written))
    }

    /// All that it is made of, in another folder; the manifest last. Bytes that were written.
    fn copy_files(&self, to: Place, into: &Path, links: bool) -> Result<u64, ImageError> {
        let image = (&self.manifest.namespace, &self.manifest.name);
        if self
            .manifest
            .files
            .iter()
            .any(|file| file.path.contains('/'))
        {
            new_dir(&into.join(CRIU_DIR))?;
        }
        let mut written = 0;
        let small = self.manifest.files.iter().map(|file| file.path.clone());
        for name in small.chain([MANIFEST_DIGEST_FILE.to_owned()]) {
            written += copy_file(&self.dir.join(&name), &into.join(&name))?;
        }
        let others = match links {
            true => self.store.generations_in(to, image.0, image.1)?,
            false => Vec::new(),
        };
        for pack in &self.manifest.packs {
            let name = pack.id.file();
            // A pack's name was drawn by chance, and what is in it is compared before this appears.
            let linked = others.iter().rev().any(|generation| {
                let dir = self.store.dir_in(to, image, *generation);
                dir.is_some_and(|dir| fs::hard_link(dir.join(&name), into.join(&name)).is_ok())
            });
            if !linked {
                if to == Place::Disk {
                    space::require(into, pack.size)?;
                }
                written += copy_file(&self.dir.join(&name), &into.join(&name))?;
            }
        }
        write_file(&into.join(MANIFEST_FILE), &self.manifest_bytes, false)?;
        Ok(written)
    }
}

impl ImageStore {
    /// Removes the copy in memory of an image that was found in an [inventory](ImageStore::inventory) and lies on the disk
    /// too, unless a container leases it, or has done so since.
    ///
    /// # Errors
    /// What the file system says.
    pub fn demote(&self, held: &Held) -> Result<Evicted, ImageError> {
        let (namespace, name, generation) = (&held.namespace, &held.name, held.generation);
        let lock = self.lock_path(namespace, name, generation);
        let places = self.places((namespace, name), generation);
        if !places.memory {
            return Ok(Evicted::Gone);
        }
        let Some(alone) = Lock::try_acquire(&lock)? else {
            return Ok(Evicted::Used);
        };
        // Nobody can remove the copy on the disk while this is held.
        let places = self.places((namespace, name), generation);
        if !places.disk || self.last_used(namespace, name, generation)? != held.last_used {
            return Ok(Evicted::Used);
        }
        let Some((folder, dir)) = self.out_of_memory((namespace, name), generation)? else {
            return Ok(Evicted::Gone);
        };
        // Whoever comes now finds it on the disk, and need not wait until its memory is free.
        drop(alone);
        let freed = own_bytes(&dir)?;
        drop(folder);
        Ok(Evicted::Freed(freed))
    }

    /// Removes a copy in memory that has failed. Who reads from it goes on reading, or finds the one on the disk.
    pub(super) fn drop_from_memory(&self, image: (&Namespace, &ImageName), generation: u64) {
        if let Err(error) = self.out_of_memory(image, generation) {
            tracing::warn!("a copy in memory stays: {}", sentence(&error));
        }
    }

    /// Takes a copy out of its place at once, into a folder that is removed when the first is dropped, or swept.
    fn out_of_memory(
        &self,
        image: (&Namespace, &ImageName),
        generation: u64,
    ) -> Result<Option<(Folder, PathBuf)>, ImageError> {
        let (Some(partials), Some(from)) = (
            self.partial_in(Place::Memory),
            self.dir_in(Place::Memory, image, generation),
        ) else {
            return Ok(None);
        };
        let Some(folder) = Folder::hold(&partials, &format!("gone-{}", new_id()))? else {
            return Ok(None);
        };
        match publish_dir(&from, &folder.dir) {
            Ok(()) => {}
            Err(StoreError::Io { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
                return Ok(None);
            }
            Err(error) => return Err(error.into()),
        }
        let dir = folder.dir.clone();
        Ok(Some((folder, dir)))
    }
}

impl ImageError {
    /// Whether it is what lies there that is not what was sealed.
    pub fn is_damage(&self) -> bool {
        match self {
            Self::Damaged { .. }
            | Self::Manifest { .. }
            | Self::Chunks { .. }
            | Self::Criu { .. }
            | Self::Misplaced { .. } => true,
            Self::Unknown(_)
            | Self::InUse(_)
            | Self::Incoming { .. }
            | Self::Locked { .. }
            | Self::Unlocked(_)
            | Self::Touches { .. }
            | Self::Unsealable { .. }
            | Self::Request { .. }
            | Self::NotInMemory(_)
            | Self::Chunk(_)
            | Self::Store(_) => false,
        }
    }

    /// Whether another copy of the image may do: not where it is a key that is missing, or the image itself.
    pub(super) fn is_of_the_copy(&self) -> bool {
        self.is_damage() || matches!(self, Self::Chunk(_) | Self::Store(_))
    }
}

/// Tells of a copy in memory that has failed.
pub(crate) fn missed(image: &str, error: &dyn std::error::Error) {
    tracing::warn!(
        image,
        "its copy in memory has failed, and the one on the disk takes its place: {}",
        sentence(error)
    );
}

/// Copies a file with its holes, which a pack has where what was stored was not needed after all. Bytes that it takes.
fn copy_file(from: &Path, to: &Path) -> Result<u64, ImageError> {
    let read = || ImageError::io("read", from);
    let write = || ImageError::io("write", to);
    let mut file = open_regular(from).map_err(read())?;
    let size = file.metadata().map_err(read())?.len();
    let out = File::options()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(to)
        .map_err(write())?;
    out.set_len(size).map_err(write())?;
    let mut buffer = vec![0; BUFFER];
    let (mut at, mut written) = (0, 0);
    while at < size {
        let data = match seek(&file, Seek::Data(at)) {
            // Nothing but a hole is left.
            Err(rustix::io::Errno::NXIO) => break,
            data => data.map_err(|e| read()(e.into()))?,
        };
        at = seek(&file, Seek::Hole(data)).map_err(|e| read()(e.into()))?;
        file.seek(SeekFrom::Start(data)).map_err(read())?;
        let mut part = (&mut file).take(at - data);
        let mut place = data;
        loop {
            let n = part.read(&mut buffer).map_err(read())?;
            if n == 0 {
                break;
            }
            out.write_all_at(&buffer[..n], place).map_err(write())?;
            place += n as u64;
            written += n as u64;
        }
    }
    Ok(written)
}
