//! Finding, listing, publishing and removing images.

use std::{
    fs::{self, File},
    io,
    path::{Path, PathBuf},
};

use rekindle_core::name::{ImageName, Namespace};
use rekindle_store::{Lock, StoreError, remove_tree, write_file};

use super::{
    ImageError, Order, Request,
    folder::{Scratch, new_dir, partial_id, remove_unless_leased, share},
    reference,
};
use crate::{
    chunks::{Base, Key},
    manifest::{MANIFEST_FILE, Manifest, ManifestError, ORIGIN_FILE, Source, read_bounded},
};

/// No namespace begins with a dot, so this is never one.
const PARTIAL: &str = ".partial";
const LAST: &str = ".last";

/// The images of this node.
#[derive(Debug, Clone)]
pub struct ImageStore {
    root: PathBuf,
}

/// One image in a listing.
#[derive(Debug)]
pub struct Listed {
    /// Its namespace.
    pub namespace: Namespace,
    /// Its name.
    pub name: ImageName,
    /// Its generation, from 1.
    pub generation: u64,
    /// Its manifest, unverified, or why that is refused.
    pub manifest: Result<Manifest, ManifestError>,
    /// Whether a container is being restored from it, or still loads from it.
    pub in_use: bool,
    /// Whether some of it is in its tier only, and comes.
    pub incoming: bool,
    /// Why no container of its [kind](crate::warm) starts from it any more.
    pub quarantined: Option<String>,
}

/// An image with its manifest, leased as long as this lives. Its bytes are not verified, so nothing but
/// the manifest can be had from it.
#[derive(Debug)]
pub struct SealedImage {
    pub(super) store: ImageStore,
    pub(super) dir: PathBuf,
    pub(super) manifest: Manifest,
    pub(super) manifest_bytes: Vec<u8>,
    pub(super) generation: u64,
    pub(super) lease: Lock,
}

impl SealedImage {
    /// What it says of itself.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// The store that it is in.
    pub fn store(&self) -> &ImageStore {
        &self.store
    }

    /// Its generation, from 1.
    pub fn generation(&self) -> u64 {
        self.generation
    }

    pub(crate) fn dir(&self) -> &Path {
        &self.dir
    }

    pub(crate) fn manifest_bytes(&self) -> &[u8] {
        &self.manifest_bytes
    }

    /// Notes that a container starts from it, for [`retention`](crate::retention). The time is the one at which its lock
    /// was last changed: it survives this process, and a power cut but for the last seconds before it.
    ///
    /// # Errors
    /// What the file system says.
    pub fn mark_used(&self) -> Result<(), ImageError> {
        let touched = self.lease.touch();
        touched.map_err(ImageError::io("note the use of", &self.dir))
    }

    /// `<namespace>/<name>@<generation>`.
    pub fn reference(&self) -> String {
        reference(
            &self.manifest.namespace,
            &self.manifest.name,
            Some(self.generation),
        )
    }
}

impl ImageStore {
    /// Opens the store, and makes its folder (0700) where there is none.
    ///
    /// # Errors
    /// What the file system says.
    pub fn open(root: &Path) -> Result<Self, ImageError> {
        let store = Self {
            root: root.to_owned(),
        };
        new_dir(&store.partial_dir())?;
        Ok(store)
    }

    /// Asks for an image: makes a partial folder that [`ImageStore::partial_at`] of another process finds.
    ///
    /// # Errors
    /// What the file system says.
    pub fn begin(
        &self,
        namespace: &Namespace,
        name: &ImageName,
        source: Source,
    ) -> Result<Request, ImageError> {
        // Whoever makes an image pays for those who were killed at it.
        self.sweep()?;
        Request::begin(self, namespace, name, source)
    }

    /// The image that is asked for at `path`; none when `path` is not in this store's folder for that.
    ///
    /// # Errors
    /// When it is, and there is no request that can be understood.
    pub fn partial_at(&self, path: &Path) -> Result<Option<Order>, ImageError> {
        match partial_id(&self.partial_dir(), path) {
            Some(id) => Order::open(self, &id).map(Some),
            None => Ok(None),
        }
    }

    /// Finds an image, the newest generation unless one is named, and leases it.
    ///
    /// # Errors
    /// [`ImageError::Unknown`], or why its manifest is refused.
    pub fn resolve(
        &self,
        namespace: &Namespace,
        name: &ImageName,
        generation: Option<u64>,
    ) -> Result<SealedImage, ImageError> {
        let unknown = || ImageError::Unknown(reference(namespace, name, generation));
        // One that has lost its manifest is being removed, or was when that was killed.
        let there = |generation: &u64| {
            let manifest = self.image_dir(namespace, name, *generation);
            fs::symlink_metadata(manifest.join(MANIFEST_FILE)).is_ok()
        };
        let found = match generation {
            Some(generation) => Some(generation).filter(there),
            None => (self.generations(namespace, name)?.into_iter()).rfind(there),
        };
        let found = found.ok_or_else(unknown)?;
        let dir = self.image_dir(namespace, name, found);
        let lock = self.lock_path(namespace, name, found);
        let lease = share(&lock)?.ok_or_else(unknown)?;
        if !dir.is_dir() {
            // It was removed while we waited, and its lock with it: this one is ours, and of nothing.
            ignore_absent(fs::remove_file(&lock), "remove", &lock)?;
            return Err(unknown());
        }
        if !there(&found) {
            return Err(unknown());
        }
        let image = || reference(namespace, name, Some(found));
        let (manifest, manifest_bytes) =
            read_manifest(&dir).map_err(|source| ImageError::Manifest {
                image: image(),
                source,
            })?;
        if (&manifest.namespace, &manifest.name) != (namespace, name) {
            return Err(ImageError::Misplaced {
                image: image(),
                claimed: reference(&manifest.namespace, &manifest.name, None),
            });
        }
        Ok(SealedImage {
            store: self.clone(),
            dir,
            manifest,
            manifest_bytes,
            generation: found,
            lease,
        })
    }

    /// All images, or those of one namespace, by namespace, name and generation.
    ///
    /// # Errors
    /// What the file system says; a manifest that is refused is part of the listing.
    pub fn list(&self, only: Option<&Namespace>) -> Result<Vec<Listed>, ImageError> {
        let mut all = Vec::new();
        for namespace in names::<Namespace>(&self.root)? {
            if only.is_some_and(|only| *only != namespace) {
                continue;
            }
            for name in self.names(&namespace)? {
                let record = self.warm_record(&namespace, &name);
                for generation in self.generations(&namespace, &name)? {
                    let lock = self.lock_path(&namespace, &name, generation);
                    let dir = self.image_dir(&namespace, &name, generation);
                    all.push(Listed {
                        manifest: read_manifest(&dir).map(|(manifest, _)| manifest),
                        // Looking must not create a lock file, nor hold one.
                        in_use: lock.exists() && Lock::try_acquire(&lock)?.is_none(),
                        incoming: dir.join(ORIGIN_FILE).exists(),
                        quarantined: record.quarantined(generation).map(str::to_owned),
                        namespace: namespace.clone(),
                        name: name.clone(),
                        generation,
                    });
                }
            }
        }
        Ok(all)
    }

    /// Removes one generation, or all; says which.
    ///
    /// # Errors
    /// [`ImageError::Unknown`]; [`ImageError::InUse`] unless `force`, and then those before it are gone.
    pub fn remove(
        &self,
        namespace: &Namespace,
        name: &ImageName,
        generation: Option<u64>,
        force: bool,
    ) -> Result<Vec<u64>, ImageError> {
        let mut doomed = self.generations(namespace, name)?;
        doomed.retain(|found| generation.is_none_or(|wanted| wanted == *found));
        if doomed.is_empty() {
            return Err(ImageError::Unknown(reference(namespace, name, generation)));
        }
        for generation in &doomed {
            let lock = self.lock_path(namespace, name, *generation);
            let alone = Lock::try_acquire(&lock)?;
            if alone.is_none() && !force {
                return Err(ImageError::InUse(reference(
                    namespace,
                    name,
                    Some(*generation),
                )));
            }
            self.remove_generation(namespace, name, *generation)?;
        }
        if self.generations(namespace, name)?.is_empty() {
            self.forget_warm(namespace, name)?;
        }
        Ok(doomed)
    }

    /// Removes all but the newest `keep` generations of an image, and those that a container is being restored from.
    ///
    /// # Errors
    /// What the file system says.
    pub fn keep_newest(
        &self,
        namespace: &Namespace,
        name: &ImageName,
        keep: usize,
    ) -> Result<(), ImageError> {
        let found = self.generations(namespace, name)?;
        for generation in found.iter().rev().skip(keep) {
            match self.remove(namespace, name, Some(*generation), false) {
                // Another one removes it too.
                Err(ImageError::InUse(_) | ImageError::Unknown(_)) => {}
                other => drop(other?),
            }
        }
        Ok(())
    }

    /// Removes one, whose lock is held or not asked for.
    pub(super) fn remove_generation(
        &self,
        namespace: &Namespace,
        name: &ImageName,
        generation: u64,
    ) -> Result<(), ImageError> {
        let lock = self.lock_path(namespace, name, generation);
        let dir = self.image_dir(namespace, name, generation);
        // First: what is left of an image whose removal was killed is found by its folder.
        let touches = self.touches_path(namespace, name, generation);
        remove(&touches)?;
        // Without its manifest it is no image: killed half-way, the rest is cleared as left over.
        remove(&dir.join(MANIFEST_FILE))?;
        remove_tree(&dir)?;
        ignore_absent(fs::remove_file(&lock), "remove", &lock)
    }

    /// Removes partial folders whose makers are gone, and says how many there were.
    ///
    /// # Errors
    /// What the file system says.
    pub fn sweep(&self) -> Result<usize, ImageError> {
        let dir = self.partial_dir();
        let mut swept = 0;
        for entry in fs::read_dir(&dir).map_err(ImageError::io("list", &dir))? {
            let name = entry.map_err(ImageError::io("list", &dir))?.file_name();
            let Some(name) = name.to_str() else { continue };
            let id = name.strip_suffix(".lock").unwrap_or(name);
            swept += usize::from(remove_unless_leased(&dir, id)?);
        }
        Ok(swept)
    }

    /// Where it is.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// The newest generation, whose chunks need not be stored again; none where there is none that this key opens.
    /// One that is damaged is nothing to build on.
    pub(super) fn base(
        &self,
        namespace: &Namespace,
        name: &ImageName,
        key: Option<&Key>,
    ) -> Option<Base> {
        let image = self.resolve(namespace, name, None).ok()?;
        image.require_whole().ok()?;
        image.check_manifest(key).ok()?;
        let index = image.index().ok()?;
        Some(Base {
            dir: image.dir,
            packs: image.manifest.packs,
            index,
        })
    }

    /// A folder for what is needed while this process lives, and whoever makes an image removes after it.
    ///
    /// # Errors
    /// What the file system says.
    pub fn scratch(&self) -> Result<Scratch, ImageError> {
        Scratch::new(&self.partial_dir())
    }

    pub(super) fn partial_dir(&self) -> PathBuf {
        self.root.join(PARTIAL)
    }

    /// Publishes under the next generation that is free.
    pub(super) fn publish(
        &self,
        namespace: &Namespace,
        name: &ImageName,
        publish: impl Fn(&Path) -> Result<(), StoreError>,
    ) -> Result<SealedImage, ImageError> {
        let last = self.home(namespace, name)?.join(LAST);
        loop {
            let highest = self.generations(namespace, name)?.last().copied();
            let ever = fs::read_to_string(&last)
                .ok()
                .and_then(|text| text.trim().parse().ok());
            let next = highest.max(ever).unwrap_or(0) + 1;
            match publish(&self.image_dir(namespace, name, next)) {
                // Another one was faster.
                Err(StoreError::Exists(_)) => continue,
                other => other?,
            }
            // So that a removed generation's number never means another image.
            write_file(&last, next.to_string().as_bytes(), true)?;
            return self.resolve(namespace, name, Some(next));
        }
    }

    /// The image that a request made.
    pub(super) fn made_by(
        &self,
        namespace: &Namespace,
        name: &ImageName,
        request: &str,
    ) -> Result<SealedImage, ImageError> {
        for generation in self.generations(namespace, name)?.into_iter().rev() {
            let image = self.resolve(namespace, name, Some(generation))?;
            if image.manifest.request == request {
                return Ok(image);
            }
        }
        Err(ImageError::Unknown(reference(namespace, name, None)))
    }

    /// The folder of a name, whether it is there or not.
    pub(crate) fn home_of(&self, namespace: &Namespace, name: &ImageName) -> PathBuf {
        self.root.join(namespace.as_str()).join(name.as_str())
    }

    /// The folder of a name, made where it is not there yet.
    pub(crate) fn home(
        &self,
        namespace: &Namespace,
        name: &ImageName,
    ) -> Result<PathBuf, ImageError> {
        let home = self.home_of(namespace, name);
        new_dir(&home)?;
        Ok(home)
    }

    /// The manifest of a generation, unverified.
    pub(crate) fn manifest(
        &self,
        namespace: &Namespace,
        name: &ImageName,
        generation: u64,
    ) -> Result<Manifest, ManifestError> {
        let dir = self.image_dir(namespace, name, generation);
        read_manifest(&dir).map(|(manifest, _)| manifest)
    }

    /// The names in a namespace, sorted.
    pub(crate) fn names(&self, namespace: &Namespace) -> Result<Vec<ImageName>, ImageError> {
        names(&self.root.join(namespace.as_str()))
    }

    pub(crate) fn generations(
        &self,
        namespace: &Namespace,
        name: &ImageName,
    ) -> Result<Vec<u64>, ImageError> {
        let home = self.home_of(namespace, name);
        let mut all: Vec<u64> = entries(&home)?
            .iter()
            .filter_map(|text| {
                // `+1` and `01` would be two names of one generation.
                let number = text.parse::<u64>().ok()?;
                (number > 0 && number.to_string() == *text).then_some(number)
            })
            .collect();
        all.sort_unstable();
        Ok(all)
    }

    pub(super) fn image_dir(
        &self,
        namespace: &Namespace,
        name: &ImageName,
        generation: u64,
    ) -> PathBuf {
        self.home_of(namespace, name).join(generation.to_string())
    }

    pub(super) fn touches_path(
        &self,
        namespace: &Namespace,
        name: &ImageName,
        generation: u64,
    ) -> PathBuf {
        self.home_of(namespace, name)
            .join(format!(".{generation}.touches"))
    }

    pub(super) fn lock_path(
        &self,
        namespace: &Namespace,
        name: &ImageName,
        generation: u64,
    ) -> PathBuf {
        self.home_of(namespace, name)
            .join(format!(".{generation}.lock"))
    }
}

fn read_manifest(dir: &Path) -> Result<(Manifest, Vec<u8>), ManifestError> {
    let path = dir.join(MANIFEST_FILE);
    let mut file = open_regular(&path).map_err(|source| ManifestError::Read {
        path: path.clone(),
        source,
    })?;
    let bytes = read_bounded(&path, &mut file)?;
    Ok((Manifest::parse(&path, &bytes)?, bytes))
}

/// Opens a file for reading unless it is a symlink, a FIFO, a device.
pub(crate) fn open_regular(path: &Path) -> io::Result<File> {
    use rustix::fs::{Mode, OFlags};
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let file = File::from(rustix::fs::open(path, flags, Mode::empty())?);
    if !file.metadata()?.is_file() {
        return Err(io::Error::new(
            io::ErrorKind::InvalidInput,
            "it is not a regular file",
        ));
    }
    Ok(file)
}

pub(super) fn names<T: std::str::FromStr + Ord>(dir: &Path) -> Result<Vec<T>, ImageError> {
    let mut all: Vec<T> = entries(dir)?
        .iter()
        .filter_map(|text| text.parse().ok())
        .collect();
    all.sort();
    Ok(all)
}

/// Names of the folders in `dir`; none where there is no `dir`.
fn entries(dir: &Path) -> Result<Vec<String>, ImageError> {
    let list = match fs::read_dir(dir) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        other => other.map_err(ImageError::io("list", dir))?,
    };
    let mut all = Vec::new();
    for entry in list {
        let entry = entry.map_err(ImageError::io("list", dir))?;
        let kind = entry.file_type().map_err(ImageError::io("look at", dir))?;
        if let (true, Ok(name)) = (kind.is_dir(), entry.file_name().into_string()) {
            all.push(name);
        }
    }
    Ok(all)
}

/// Removes what should be a file, whatever it is.
fn remove(path: &Path) -> Result<(), ImageError> {
    match fs::remove_file(path) {
        Err(e) if e.kind() == io::ErrorKind::IsADirectory => Ok(remove_tree(path)?),
        removed => ignore_absent(removed, "remove", path),
    }
}

fn ignore_absent(
    result: io::Result<()>,
    doing: &'static str,
    path: &Path,
) -> Result<(), ImageError> {
    match result {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(ImageError::io(doing, path)(e)),
        _ => Ok(()),
    }
}
