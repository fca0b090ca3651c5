//! The way from bytes on a disk to an image that a process may be made of.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    io,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    sync::atomic::{AtomicU64, Ordering},
};

use rekindle_store::{
    Lock,
    crc::{Crc64, Running},
};
use rustix::fs::{Advice, fadvise};

use super::{Damage, ImageError, SealedImage, store::open_regular};
use crate::{
    criu_image::{Task, check_folder, credentials},
    manifest::{
        CRIU_DIR, FileEntry, MANIFEST_CRC_FILE, MANIFEST_FILE, Manifest, SHM_FILE, UPPER_FILE,
    },
    parallel::in_parallel,
};

/// Bytes that one thread takes at a time: large enough to be sequential, small enough to share one file.
const PART: u64 = 16 << 20;
/// An image whose every byte is what was sealed, leased as long as this lives.
#[derive(Debug)]
pub struct VerifiedImage {
    dir: PathBuf,
    manifest: Manifest,
    reference: String,
    _lease: Lock,
}

impl VerifiedImage {
    /// What it says of itself.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// `<namespace>/<name>@<generation>`.
    pub fn reference(&self) -> &str {
        &self.reference
    }

    /// CRIU's images: what `runc restore --image-path` and the [pager](crate::pager) take.
    pub fn criu_dir(&self) -> PathBuf {
        self.dir.join(CRIU_DIR)
    }

    /// What CRIU would give its tasks, of which it says more than the manifest; for [`fit`](crate::fit::fit).
    ///
    /// # Errors
    /// [`ImageError::Criu`].
    pub fn tasks(&self) -> Result<Vec<Task>, ImageError> {
        credentials(&self.criu_dir()).map_err(|source| ImageError::Criu {
            image: self.reference.clone(),
            source,
        })
    }

    /// The container's writable layer, if it had one.
    ///
    /// # Errors
    /// What the file system says.
    pub fn upper(&self) -> io::Result<Option<File>> {
        self.part(UPPER_FILE)
    }

    /// The container's `/dev/shm`, if it had one.
    ///
    /// # Errors
    /// What the file system says.
    pub fn shm(&self) -> io::Result<Option<File>> {
        self.part(SHM_FILE)
    }

    fn part(&self, name: &str) -> io::Result<Option<File>> {
        match self.manifest.file(name) {
            Some(_) => open_regular(&self.dir.join(name)).map(Some),
            None => Ok(None),
        }
    }
}

impl SealedImage {
    /// Checks that the image is whole: exactly the files that its manifest lists, all regular, of the sizes
    /// and checksums that it says, and CRIU's files such that CRIU may read them.
    ///
    /// # Errors
    /// [`ImageError::Damaged`] names the first file that is not what it was; [`ImageError::Criu`].
    pub fn verify(self) -> Result<VerifiedImage, ImageError> {
        self.verify_counting(&AtomicU64::new(0))
    }

    /// As [`SealedImage::verify`], adding the bytes that are done to `done`, for a progress bar.
    ///
    /// # Errors
    /// As [`SealedImage::verify`].
    pub fn verify_counting(self, done: &AtomicU64) -> Result<VerifiedImage, ImageError> {
        let crc = self.read(MANIFEST_CRC_FILE)?;
        if crc != format!("{}\n", Crc64::of(&self.manifest_bytes)).as_bytes() {
            return Err(self.damaged(MANIFEST_FILE, Damage::Checksum));
        }
        self.check_sizes()?;
        self.check_bytes(done)?;
        check_folder(&self.dir.join(CRIU_DIR)).map_err(|source| ImageError::Criu {
            image: self.reference(),
            source,
        })?;
        Ok(VerifiedImage {
            reference: self.reference(),
            dir: self.dir,
            manifest: self.manifest,
            _lease: self.lease,
        })
    }

    fn damaged(&self, file: &str, damage: Damage) -> ImageError {
        ImageError::Damaged {
            image: self.reference(),
            file: file.to_owned(),
            damage,
        }
    }

    /// The manifest's checksum is 17 bytes: a larger file is not read.
    fn read(&self, name: &str) -> Result<Vec<u8>, ImageError> {
        let path = self.dir.join(name);
        let file = match open_regular(&path) {
            Ok(file) => file,
            Err(e) if e.kind() == io::ErrorKind::NotFound => {
                return Err(self.damaged(name, Damage::Absent));
            }
            Err(_) => return Err(self.damaged(name, Damage::NotAFile)),
        };
        let mut bytes = [0; 18];
        let n = file
            .read_at(&mut bytes, 0)
            .map_err(ImageError::io("read", &path))?;
        Ok(bytes[..n].to_vec())
    }

    /// Before a byte is read: is every file there, and nothing else, and of the right size?
    fn check_sizes(&self) -> Result<(), ImageError> {
        let mut there = BTreeMap::new();
        self.walk(&self.dir, "", &mut there)?;
        for name in [MANIFEST_FILE, MANIFEST_CRC_FILE] {
            there.remove(name);
        }
        for entry in &self.manifest.files {
            let damage = match there.remove(&entry.path) {
                None => Damage::Absent,
                Some(None) => Damage::NotAFile,
                Some(Some(found)) if found != entry.size => Damage::Size {
                    expected: entry.size,
                    found,
                },
                Some(_) => continue,
            };
            return Err(self.damaged(&entry.path, damage));
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

    fn check_bytes(&self, done: &AtomicU64) -> Result<(), ImageError> {
        let parts: Vec<(usize, u64)> = self
            .manifest
            .files
            .iter()
            .enumerate()
            .flat_map(|(file, entry)| {
                let count = entry.size.div_ceil(PART).max(1);
                (0..count).map(move |part| (file, part * PART))
            })
            .collect();
        let sums = in_parallel(parts.len(), |index, buffer| {
            let (file, offset) = parts[index];
            self.part_crc(&self.manifest.files[file], offset, buffer, done)
        })?;
        let mut whole = vec![Crc64::EMPTY; self.manifest.files.len()];
        for ((file, _), (crc, bytes)) in parts.iter().zip(&sums) {
            whole[*file] = whole[*file].then(*crc, *bytes);
        }
        match self
            .manifest
            .files
            .iter()
            .zip(whole)
            .find(|(entry, crc)| entry.crc64 != *crc)
        {
            Some((entry, _)) => Err(self.damaged(&entry.path, Damage::Checksum)),
            None => Ok(()),
        }
    }

    fn part_crc(
        &self,
        entry: &FileEntry,
        offset: u64,
        buffer: &mut [u8],
        done: &AtomicU64,
    ) -> Result<(Crc64, u64), ImageError> {
        let path = self.dir.join(&entry.path);
        let file = open_regular(&path).map_err(ImageError::io("read", &path))?;
        let length = PART.min(entry.size - offset);
        // Two parts ahead; advice, so that a refusal costs nothing.
        let _ = fadvise(
            &file,
            offset,
            std::num::NonZeroU64::new(2 * PART),
            Advice::WillNeed,
        );
        let mut running = Running::default();
        let mut at = 0;
        while at < length {
            let want = buffer
                .len()
                .min(usize::try_from(length - at).unwrap_or(usize::MAX));
            let n = match file.read_at(&mut buffer[..want], offset + at) {
                Ok(0) => {
                    let (expected, found) = (entry.size, offset + at);
                    return Err(self.damaged(&entry.path, Damage::Size { expected, found }));
                }
                Ok(n) => n,
                Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                Err(e) => return Err(ImageError::io("read", &path)(e)),
            };
            running.update(&buffer[..n]);
            at += n as u64;
            done.fetch_add(n as u64, Ordering::Relaxed);
        }
        Ok((running.crc(), length))
    }
}
