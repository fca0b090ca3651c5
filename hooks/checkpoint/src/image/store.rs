//! Finding, listing, publishing and removing images.

use std::{
    fs::{self, File},
    io,
    path::{Path, PathBuf},
};

use rekindle_core::{
    config::Memory,
    name::{ImageName, Namespace},
};
use rekindle_store::{Lock, StoreError, write_file};

use super::{
    ImageError, Order, Place, Places, Request,
    copies::missed,
    folder::{Scratch, new_dir, partial_id, remove_unless_leased, share},
    inventory::ids,
    reference,
};
use crate::{
    chunks::{Base, Key},
    manifest::{MANIFEST_FILE, Manifest, ManifestError, ORIGIN_FILE, Source, read_bounded},
};

/// No namespace begins with a dot, so this is never one.
pub(super) const PARTIAL: &str = ".partial";
const LAST: &str = ".last";

/// A folder of an image, its manifest, and the bytes of that.
pub(super) type InFolder = (PathBuf, Manifest, Vec<u8>);

/// The images of this node.
#[derive(Debug, Clone)]
pub struct ImageStore {
    root: PathBuf,
    /// What it may have in memory, where it uses that.
    pub(super) memory: Option<Memory>,
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
    /// Where it lies.
    pub places: Places,
    /// Why no container of its [kind](crate::warm) starts from it any more.
    pub quarantined: Option<String>,
}

/// An image with its manifest, leased as long as this lives. Its bytes are not verified, so nothing but
/// the manifest can be had from it.
#[derive(Debug)]
pub struct SealedImage {
    pub(super) store: ImageStore,
    /// Where it was found.
    pub(super) place: Place,
    /// The folder of the copy on the disk, where it was found in memory and has one.
    pub(super) spare: Option<PathBuf>,
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
    /// Opens the store without memory, and makes its folder (0700) where there is none.
    ///
    /// # Errors
    /// What the file system says.
    pub fn open(root: &Path) -> Result<Self, ImageError> {
        let store = Self {
            root: root.to_owned(),
            memory: None,
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

    /// Finds an image, the newest generation unless one is named, and leases it: its copy in memory, where it has one.
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
            let mut dirs = self.dirs((namespace, name), *generation);
            dirs.any(|(_, dir)| fs::symlink_metadata(dir.join(MANIFEST_FILE)).is_ok())
        };
        let found = match generation {
            Some(generation) => Some(generation).filter(there),
            None => (self.generations(namespace, name)?.into_iter()).rfind(there),
        };
        let found = found.ok_or_else(unknown)?;
        let image = (namespace, name);
        let lock = self.lock_path(namespace, name, found);
        let lease = share(&lock)?.ok_or_else(unknown)?;
        let mut failed = None;
        for place in Place::ALL {
            let (dir, manifest, manifest_bytes) = match self.in_place(place, image, found) {
                None => continue,
                Some(Ok(read)) => read,
                Some(Err(error)) => {
                    failed = Some(error);
                    continue;
                }
            };
            if let Some(error) = failed {
                missed(&reference(namespace, name, Some(found)), &error);
                self.drop_from_memory(image, found);
            }
            let spare = match place {
                Place::Memory => self.dir_in(Place::Disk, image, found),
                Place::Disk => None,
            };
            return Ok(SealedImage {
                store: self.clone(),
                place,
                spare: spare.filter(|dir| dir.join(MANIFEST_FILE).exists()),
                dir,
                manifest,
                manifest_bytes,
                generation: found,
                lease,
            });
        }
        if let Some(error) = failed {
            return Err(error);
        }
        if self.dirs(image, found).next().is_none() {
            // It was removed while we waited, and its lock with it: this one is ours, and of nothing.
            ignore_absent(fs::remove_file(&lock), "remove", &lock)?;
        }
        Err(unknown())
    }

    /// The folder and the manifest of one copy of an image; none where there is no such copy.
    pub(super) fn in_place(
        &self,
        place: Place,
        (namespace, name): (&Namespace, &ImageName),
        generation: u64,
    ) -> Option<Result<InFolder, ImageError>> {
        let dir = self.dir_in(place, (namespace, name), generation)?;
        // One on the disk that has lost its manifest is none: it is being removed, or was when that was killed. What leaves
        // memory leaves by rename: there it is a copy that has failed.
        let there = match place {
            Place::Disk => fs::symlink_metadata(dir.join(MANIFEST_FILE)).is_ok(),
            Place::Memory => dir.is_dir(),
        };
        if !there {
            return None;
        }
        let image = || reference(namespace, name, Some(generation));
        let read = read_manifest(&dir).map_err(|source| ImageError::Manifest {
            image: image(),
            source,
        });
        Some(read.and_then(|(manifest, bytes)| {
            if (&manifest.namespace, &manifest.name) != (namespace, name) {
                return Err(ImageError::Misplaced {
                    image: image(),
                    claimed: reference(&manifest.namespace, &manifest.name, None),
                });
            }
            Ok((dir, manifest, bytes))
        }))
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
                    all.push(Listed {
                        manifest: self.manifest(&namespace, &name, generation),
                        places: self.places((&namespace, &name), generation),
                        // Looking must not create a lock file, nor hold one.
                        in_use: lock.exists() && Lock::try_acquire(&lock)?.is_none(),
                        incoming: self
                            .dirs((&namespace, &name), generation)
                            .any(|(_, dir)| dir.join(ORIGIN_FILE).exists()),
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

    /// Removes partial folders whose makers are gone, and says how many there were.
    ///
    /// # Errors
    /// What the file system says.
    pub fn sweep(&self) -> Result<usize, ImageError> {
        let mut swept = 0;
        for dir in self.partial_dirs() {
            for id in ids(&dir)? {
                swept += usize::from(remove_unless_leased(&dir, &id)?);
            }
        }
        Ok(swept)
    }

    /// Where it is.
    pub fn root(&self) -> &Path {
        &self.root
    }

    /// The newest generation in a place, whose chunks need not be stored there again, and its number; none where there is
    /// none that this key opens. One that is damaged, or was found to be, is nothing to build on.
    pub(super) fn base(
        &self,
        place: Place,
        image: (&Namespace, &ImageName),
        key: Option<&Key>,
    ) -> Option<(Base, u64)> {
        let newest = self.generations_in(place, image.0, image.1).ok()?;
        let generation = newest.last().copied()?;
        if self.unsound_path(image.0, image.1, generation).exists() {
            return None;
        }
        let lease = share(&self.lock_path(image.0, image.1, generation)).ok()??;
        let (dir, manifest, manifest_bytes) = self.in_place(place, image, generation)?.ok()?;
        let image = SealedImage {
            store: self.clone(),
            place,
            spare: None,
            dir,
            manifest,
            manifest_bytes,
            generation,
            lease,
        };
        image.require_whole().ok()?;
        image.check_manifest(key).ok()?;
        let index = image.index().ok()?;
        let base = Base {
            dir: image.dir,
            packs: image.manifest.packs,
            index,
        };
        Some((base, generation))
    }

    /// A folder for what is needed while this process lives, and whoever makes an image removes after it.
    ///
    /// # Errors
    /// What the file system says.
    pub fn scratch(&self) -> Result<Scratch, ImageError> {
        Scratch::new(&self.partial_dir())
    }

    /// Where images are asked for; on the disk.
    pub(super) fn partial_dir(&self) -> PathBuf {
        self.root.join(PARTIAL)
    }

    /// Publishes in a place, under the next generation.
    pub(super) fn publish(
        &self,
        place: Place,
        namespace: &Namespace,
        name: &ImageName,
        publish: impl Fn(&Path) -> Result<(), StoreError>,
    ) -> Result<SealedImage, ImageError> {
        loop {
            let next = self.next_number(namespace, name)?;
            let Some(dest) = self.dir_in(place, (namespace, name), next) else {
                return Err(ImageError::Unknown(reference(namespace, name, None)));
            };
            new_dir(dest.parent().unwrap_or(&dest))?;
            match publish(&dest) {
                // Somebody has put it there by hand.
                Err(StoreError::Exists(_)) => continue,
                other => other?,
            }
            return self.resolve(namespace, name, Some(next));
        }
    }

    /// A number that no image of that name has or had, in any place: it is noted before one has it. So it never means
    /// another one, though that was removed, or was in memory when the node went down.
    fn next_number(&self, namespace: &Namespace, name: &ImageName) -> Result<u64, ImageError> {
        let last = self.home(namespace, name)?.join(LAST);
        let _alone = Lock::acquire(&last.with_extension("lock"))?;
        let highest = self.generations(namespace, name)?.last().copied();
        let ever = fs::read_to_string(&last)
            .ok()
            .and_then(|text| text.trim().parse().ok());
        let next = highest.max(ever).unwrap_or(0) + 1;
        write_file(&last, next.to_string().as_bytes(), true)?;
        Ok(next)
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
        let mut read = self
            .dirs((namespace, name), generation)
            .map(|(_, dir)| read_manifest(&dir));
        let first = read.next();
        let first =
            first.unwrap_or_else(|| read_manifest(&self.image_dir(namespace, name, generation)));
        // Where the copy in memory is refused, there may be another one.
        let found = first.or_else(|refused| read.next().unwrap_or(Err(refused)));
        found.map(|(manifest, _)| manifest)
    }

    /// The names in a namespace, sorted.
    pub(crate) fn names(&self, namespace: &Namespace) -> Result<Vec<ImageName>, ImageError> {
        names(&self.root.join(namespace.as_str()))
    }

    /// The folder of a generation on the disk, whether it is there or not.
    pub(super) fn image_dir(
        &self,
        namespace: &Namespace,
        name: &ImageName,
        generation: u64,
    ) -> PathBuf {
        self.home_of(namespace, name).join(generation.to_string())
    }

    /// There when somebody has found it damaged who would have built on it.
    pub(super) fn unsound_path(
        &self,
        namespace: &Namespace,
        name: &ImageName,
        generation: u64,
    ) -> PathBuf {
        self.home_of(namespace, name)
            .join(format!(".{generation}.unsound"))
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
pub(super) fn entries(dir: &Path) -> Result<Vec<String>, ImageError> {
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

pub(super) fn ignore_absent(
    result: io::Result<()>,
    doing: &'static str,
    path: &Path,
) -> Result<(), ImageError> {
    match result {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err(ImageError::io(doing, path)(e)),
        _ => Ok(()),
    }
}
