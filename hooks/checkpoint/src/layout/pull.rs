//! An image out of a layout. Failure contract: the store is as it was. The image appears by rename, when all of it is
//! there and has been verified; killed before, a pull leaves a partial folder, which is swept.

use std::{
    collections::BTreeMap,
    fs::{self, File},
    path::Path,
    sync::atomic::AtomicU64,
};

use rekindle_core::name::{ImageName, Namespace};
use rekindle_store::space;

use super::{BLOBS, Descriptor, Layout, LayoutError, blobs::Blob, media_type, some_of};
use crate::{
    chunks::Key,
    image::{Arriving, ImageStore, SealedImage, open_regular},
    manifest::{self, CRIU_DIR, MANIFEST_DIGEST_FILE, Manifest, shorten},
    parallel::at_once,
};

/// The digest of a manifest: 64 hex digits and a newline.
const SEAL_BYTES: u64 = 65;

/// How much of a pulled image was compared with what was sealed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Proof {
    /// All of it.
    Whole,
    /// It is encrypted, and there is no key: that every blob has its digest, which files there are, their sizes, and
    /// the index. Not who made it, nor its chunks.
    WithoutKey,
}

/// An image that was pulled.
#[derive(Debug)]
pub struct Pulled {
    /// The image.
    pub image: SealedImage,
    /// What was proved of it.
    pub proof: Proof,
    /// Bytes of packs that the store had already.
    pub linked: u64,
}

/// An image in a layout, whose manifest was read and whose files are listed, each once.
#[derive(Debug)]
pub struct Found<'a> {
    pub(super) layout: &'a Layout,
    pub(super) manifest: Manifest,
    pub(super) manifest_bytes: Vec<u8>,
    /// The blobs of its files, by their names.
    pub(super) files: BTreeMap<String, Descriptor>,
}

impl Layout {
    /// Finds the image of a tag; without one, the only one that there is. In a bucket `NAMESPACE/NAME` is the newest
    /// image of that name.
    ///
    /// # Errors
    /// [`LayoutError::NoTag`], or why it is refused.
    pub fn find(&self, tag: Option<&str>) -> Result<Found<'_>, LayoutError> {
        let (tag, of) = self.chosen(tag)?;
        let oci = self.manifest(&tag, &of)?;
        let bytes = self.small_blob("manifest.json", &oci.config, manifest::MAX_BYTES)?;
        let path = self.path.join(BLOBS).join("manifest.json");
        let parsed = Manifest::parse(&path, &bytes);
        let manifest = parsed.map_err(|source| LayoutError::Manifest {
            tag: shorten(&tag),
            source,
        })?;
        let files = listed(&tag, &manifest, oci.layers)?;
        Ok(Found {
            layout: self,
            manifest,
            manifest_bytes: bytes,
            files,
        })
    }

    /// Finds the newest image of a name in a bucket, which has to say itself that it is called so.
    ///
    /// # Errors
    /// As [`Layout::find`]; [`LayoutError::Misplaced`].
    pub fn find_image(
        &self,
        namespace: &Namespace,
        name: &ImageName,
    ) -> Result<Found<'_>, LayoutError> {
        let tag = format!("{namespace}/{name}");
        let found = self.find(Some(&tag))?;
        let manifest = &found.manifest;
        if (&manifest.namespace, &manifest.name) != (namespace, name) {
            return Err(LayoutError::Misplaced {
                tag,
                claimed: format!("{}/{}", manifest.namespace, manifest.name),
            });
        }
        Ok(found)
    }

    fn chosen(&self, wanted: Option<&str>) -> Result<(String, Descriptor), LayoutError> {
        #[cfg(feature = "s3")]
        if let Some(away) = self.away()
            && let Some(found) = self.choose(away, wanted)?
        {
            return Ok(found);
        }
        let tags = self.tags()?;
        let fits = |of: &&Descriptor| match wanted {
            Some(wanted) => of.tag() == Some(wanted),
            // Whoever copies layouts may leave out what the manifest says too, as oras 1.3 does.
            None => match of.artifact_type.as_deref() {
                Some(artifact) => artifact == super::ARTIFACT,
                None => of.media_type == super::MANIFEST,
            },
        };
        let found: Vec<&Descriptor> = tags.iter().filter(fits).collect();
        let [of] = found[..] else {
            let names = tags.iter().filter_map(Descriptor::tag);
            let names: Vec<String> = names.map(str::to_owned).collect();
            #[cfg(feature = "s3")]
            let names = match self.away() {
                Some(away) if names.is_empty() => away.tags()?,
                _ => names,
            };
            return Err(LayoutError::NoTag {
                path: self.path.clone(),
                wanted: wanted.map_or_else(
                    || "that could be meant without a tag".to_owned(),
                    |tag| format!("with the tag {:?}", shorten(tag)),
                ),
                there: some_of(&names),
            });
        };
        Ok((of.tag().unwrap_or("the only image").to_owned(), of.clone()))
    }
}

/// The layers by the names of files: exactly those that the image's own manifest has, of the sizes that it says.
fn listed(
    tag: &str,
    manifest: &Manifest,
    layers: Vec<Descriptor>,
) -> Result<BTreeMap<String, Descriptor>, LayoutError> {
    let refuse = |file: &str, what| LayoutError::Listing {
        tag: shorten(tag),
        file: shorten(file),
        what,
    };
    let mut wanted: BTreeMap<String, u64> = BTreeMap::new();
    let files = manifest
        .files
        .iter()
        .map(|file| (file.path.clone(), file.size));
    let packs = manifest
        .packs
        .iter()
        .map(|pack| (pack.id.file(), pack.size));
    let seal = [(MANIFEST_DIGEST_FILE.to_owned(), SEAL_BYTES)];
    for (file, size) in seal.into_iter().chain(files).chain(packs) {
        if wanted.insert(file.clone(), size).is_some() {
            return Err(refuse(&file, "is twice in the image's manifest"));
        }
    }
    let mut found = BTreeMap::new();
    for layer in layers {
        let title = layer.title().to_owned();
        let Some(size) = wanted.get(&title) else {
            return Err(refuse(&title, "is not in the image's manifest"));
        };
        if layer.size != *size {
            return Err(refuse(
                &title,
                "has another size than in the image's manifest",
            ));
        }
        if layer.media_type != media_type(&title) {
            return Err(refuse(&title, "has a media type that is not its own"));
        }
        if found.insert(title.clone(), layer).is_some() {
            return Err(refuse(&title, "is listed twice"));
        }
    }
    match wanted.keys().find(|file| !found.contains_key(*file)) {
        Some(file) => Err(refuse(file, "is not listed")),
        None => Ok(found),
    }
}

impl Found<'_> {
    /// What the image says of itself. Not proved.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// Bytes of all its files.
    pub fn bytes(&self) -> u64 {
        self.manifest.total_bytes()
    }

    /// Has all of its files come but the packs, whose blobs it gives.
    pub(super) fn head(
        &mut self,
        arriving: &Arriving,
        key: Option<&Key>,
        done: &AtomicU64,
    ) -> Result<BTreeMap<String, Descriptor>, LayoutError> {
        if self.files.keys().any(|file| file.contains('/')) {
            let criu = arriving.dir().join(CRIU_DIR);
            fs::create_dir(&criu).map_err(LayoutError::io("make", &criu))?;
        }
        // Whatever a key tells of an image is told before anything else of it comes.
        if let Some(seal) = self.files.remove(MANIFEST_DIGEST_FILE) {
            let bytes = self
                .layout
                .small_blob(MANIFEST_DIGEST_FILE, &seal, SEAL_BYTES)?;
            arriving.put_seal(&bytes)?;
        }
        if self.manifest.encryption.is_none() || key.is_some() {
            arriving.check_manifest(&self.manifest, &self.manifest_bytes, key)?;
        }
        let (packs, small) = std::mem::take(&mut self.files)
            .into_iter()
            .partition(|(file, _)| media_type(file) == super::PACK);
        // Many, and so small that each is little but the way to the store and back.
        let small: Vec<(String, Descriptor)> = BTreeMap::into_iter(small).collect();
        let layout = self.layout;
        at_once(layout.requests(), small.len(), |nth| {
            let (file, of) = &small[nth];
            let to = arriving.dir().join(file);
            let mut out = File::create_new(&to).map_err(LayoutError::io("make", &to))?;
            layout.blob(file, of)?.copy(&mut out, &to, done)
        })?;
        Ok(packs)
    }

    /// Takes it into the store as the next generation of `namespace/name`, verified. `key` is that of the namespace
    /// which it is encrypted with, or should be; `into` is where CRIU's files are laid out for the verification, as
    /// with [`SealedImage::verify`]. `done` grows to [`Found::bytes`], and `checked` to as much again of the packs.
    ///
    /// # Errors
    /// The first thing that is wrong with it; nothing is left then.
    pub fn pull(
        mut self,
        store: &ImageStore,
        (namespace, name): (&Namespace, &ImageName),
        key: Option<&Key>,
        into: &Path,
        (done, checked): (&AtomicU64, &AtomicU64),
    ) -> Result<Pulled, LayoutError> {
        store.sweep()?;
        let arriving = store.arriving(namespace, name)?;
        space::require(arriving.dir(), self.bytes())?;
        let packs = self.head(&arriving, key, done)?;
        let mut linked = 0;
        for (file, of) in &packs {
            let to = arriving.dir().join(file);
            let blob = self.layout.blob(file, of)?;
            let size = blob.size;
            if link_from(store, (namespace, name), file, &blob, &to, done)? {
                linked += size;
                continue;
            }
            let mut out = File::create_new(&to).map_err(LayoutError::io("make", &to))?;
            blob.copy(&mut out, &to, done)?;
        }
        let image = (&self.manifest.namespace, &self.manifest.name);
        let mut manifest = self.manifest.clone();
        let mut bytes = self.manifest_bytes;
        if image != (namespace, name) {
            if let (Some(encryption), None) = (&manifest.encryption, key) {
                return Err(LayoutError::Renamed {
                    image: format!("{}/{}", image.0, image.1),
                    wanted: format!("{namespace}/{name}"),
                    key: encryption.key.clone(),
                });
            }
            (manifest.namespace, manifest.name) = (namespace.clone(), name.clone());
            bytes = arriving.renamed(&manifest, key)?;
        }
        let proof = match (&manifest.encryption, key) {
            (Some(_), None) => Proof::WithoutKey,
            _ => Proof::Whole,
        };
        let whole = proof == Proof::Whole;
        let image = arriving.publish(manifest, bytes, whole.then_some((key, into, checked)))?;
        #[cfg(feature = "s3")]
        self.layout.bring_note(&image);
        Ok(Pulled {
            image,
            proof,
            linked,
        })
    }
}

/// Links a pack that a generation of the same name has, when it is that blob.
fn link_from(
    store: &ImageStore,
    (namespace, name): (&Namespace, &ImageName),
    file: &str,
    blob: &Blob<'_>,
    to: &Path,
    done: &AtomicU64,
) -> Result<bool, LayoutError> {
    for dir in store.folders(namespace, name)? {
        let from = dir.join(file);
        // It may be removed at any moment; then the blob is copied.
        let Ok(opened) = open_regular(&from) else {
            continue;
        };
        let same_size = opened
            .metadata()
            .is_ok_and(|found| found.len() == blob.size);
        if same_size && blob.is(opened, &from, done)? {
            return Ok(fs::hard_link(&from, to).is_ok());
        }
    }
    Ok(false)
}
