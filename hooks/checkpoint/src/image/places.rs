//! Where images lie: on the disk, and some of them in memory in front of it.
//!
//! ```text
//!  <root>/<namespace>/<name>/<generation>/          on the disk
//!  <memory root>/<namespace>/<name>/<generation>/   in memory: the same files
//!  <root>/<namespace>/<name>/.…                     locks, notes, numbers: of both, and always on the disk
//! ```
//! They are two copies of one image: it has one number, one lease and one time of its last use, and who asks for it gets
//! the one in memory where there are both. An image in memory that fails is a miss: the copy on the disk takes its place.

use std::{
    fmt, io,
    path::{Path, PathBuf},
};

use rekindle_core::{
    config::{Images, Memory},
    name::{ImageName, Namespace},
};
use rustix::fs::statfs;

use super::{
    ImageError, ImageStore,
    folder::new_dir,
    store::{PARTIAL, entries},
};
use crate::manifest::MANIFEST_FILE;

/// `linux/magic.h`.
const TMPFS: u64 = 0x0102_1994;
/// `linux/magic.h`.
const RAMFS: u64 = 0x8584_58f6;

/// Where a copy of an image lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// Gone after a restart of the node.
    Memory,
    /// There after it.
    Disk,
}

impl Place {
    /// Both, the faster one first.
    pub(super) const ALL: [Self; 2] = [Self::Memory, Self::Disk];
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Memory => "memory",
            Self::Disk => "disk",
        })
    }
}

/// Where an image has copies.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Places {
    /// There is one in memory.
    pub memory: bool,
    /// There is one on the disk.
    pub disk: bool,
}

impl Places {
    /// Whether there is any.
    pub fn any(self) -> bool {
        self.memory || self.disk
    }
}

/// `memory`, `disk` or `memory+disk`.
impl fmt::Display for Places {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match (self.memory, self.disk) {
            (true, true) => "memory+disk",
            (true, false) => "memory",
            (false, true) => "disk",
            (false, false) => "nowhere",
        })
    }
}

/// Whether what is written to `path` stays in memory. It need not be there yet.
///
/// # Errors
/// [`ImageError::NotInMemory`], or what the file system says.
pub fn require_memory(path: &Path) -> Result<(), ImageError> {
    let mut there = path.ancestors();
    let found = there.find_map(|path| match statfs(path) {
        Err(rustix::io::Errno::NOENT) => None,
        found => Some(found.map_err(io::Error::from)),
    });
    let found = found.unwrap_or_else(|| Err(io::ErrorKind::NotFound.into()));
    let found = found.map_err(ImageError::io("look at", path))?;
    // Its type differs from one architecture to the next.
    match found.f_type as u64 & 0xffff_ffff {
        TMPFS | RAMFS => Ok(()),
        _ => Err(ImageError::NotInMemory(path.to_owned())),
    }
}

impl ImageStore {
    /// The images of a node as it is configured. Memory that cannot be used is told, and done without.
    ///
    /// # Errors
    /// As [`ImageStore::open`].
    pub fn of(images: &Images) -> Result<Self, ImageError> {
        let mut store = Self::open(&images.root)?;
        if let Some(memory) = &images.memory
            && let Err(error) = store.use_memory(memory.clone())
        {
            tracing::warn!("no images in memory: {}", sentence(&error));
        }
        Ok(store)
    }

    /// Uses images in memory too, and makes a folder (0700) for them.
    ///
    /// # Errors
    /// [`ImageError::NotInMemory`], or what the file system says; then it uses none.
    pub fn use_memory(&mut self, memory: Memory) -> Result<(), ImageError> {
        require_memory(&memory.root)?;
        new_dir(&memory.root.join(PARTIAL))?;
        self.memory = Some(memory);
        Ok(())
    }

    /// What it may have in memory; none where that is nothing.
    pub fn memory(&self) -> Option<&Memory> {
        self.memory.as_ref()
    }

    /// The folder of a place; none where that is not used.
    pub(super) fn root_of(&self, place: Place) -> Option<&Path> {
        match place {
            Place::Memory => self.memory.as_ref().map(|memory| memory.root.as_path()),
            Place::Disk => Some(self.root()),
        }
    }

    /// The folder of images that are being made in a place; none where that is not used.
    pub(super) fn partial_in(&self, place: Place) -> Option<PathBuf> {
        Some(self.root_of(place)?.join(PARTIAL))
    }

    /// The folders of images that are being made, one for each place that is used.
    pub(super) fn partial_dirs(&self) -> impl Iterator<Item = PathBuf> {
        Place::ALL.into_iter().filter_map(|at| self.partial_in(at))
    }

    /// The folder of a generation in a place, whether it is there or not; none where the place is not used.
    pub(super) fn dir_in(
        &self,
        place: Place,
        (namespace, name): (&Namespace, &ImageName),
        generation: u64,
    ) -> Option<PathBuf> {
        let home = self.root_of(place)?.join(namespace.as_str());
        Some(home.join(name.as_str()).join(generation.to_string()))
    }

    /// Its folders that are there, the faster one first.
    pub(super) fn dirs(
        &self,
        image: (&Namespace, &ImageName),
        generation: u64,
    ) -> impl Iterator<Item = (Place, PathBuf)> {
        Place::ALL.into_iter().filter_map(move |place| {
            let dir = self.dir_in(place, image, generation)?;
            dir.is_dir().then_some((place, dir))
        })
    }

    /// Where it lies, whole as far as a look tells.
    pub(super) fn places(&self, image: (&Namespace, &ImageName), generation: u64) -> Places {
        let mut places = Places::default();
        for (place, dir) in self.dirs(image, generation) {
            let here = dir.join(MANIFEST_FILE).exists();
            match place {
                Place::Memory => places.memory = here,
                Place::Disk => places.disk = here,
            }
        }
        places
    }

    /// The generations of a name, wherever they lie, in their order.
    pub(crate) fn generations(
        &self,
        namespace: &Namespace,
        name: &ImageName,
    ) -> Result<Vec<u64>, ImageError> {
        let mut all = Vec::new();
        for place in Place::ALL {
            all.extend(self.generations_in(place, namespace, name)?);
        }
        all.sort_unstable();
        all.dedup();
        Ok(all)
    }

    /// Those in one place, in their order.
    pub(super) fn generations_in(
        &self,
        place: Place,
        namespace: &Namespace,
        name: &ImageName,
    ) -> Result<Vec<u64>, ImageError> {
        let Some(root) = self.root_of(place) else {
            return Ok(Vec::new());
        };
        let home = root.join(namespace.as_str()).join(name.as_str());
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
}

/// An error with its causes.
pub(super) fn sentence(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        text = format!("{text}: {cause}");
        next = cause.source();
    }
    text
}
