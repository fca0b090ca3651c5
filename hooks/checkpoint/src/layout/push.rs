//! An image into a layout. Failure contract: the tags are as they were, and what was written beside them is either a
//! blob, whole, or removed by the next push.

use std::{
    collections::HashMap,
    fs::{self, File},
    io,
    path::Path,
    sync::atomic::{AtomicU64, Ordering},
};

use rekindle_store::{Lock, commit_file, space, write_file};
use serde_json::{Value, json};

#[cfg(feature = "s3")]
use super::away::Away;
use super::{
    ARTIFACT, Annotations, BLOBS, BlobDigest, CONFIG, Descriptor, INDEX, INDEX_JSON, LAYOUT_FILE,
    Layout, LayoutError, MANIFEST, MAX_INDEX_JSON, OciManifest, Place, REF_NAME, TITLE,
    blobs::copy, check_tag, media_type,
};
use crate::{
    image::{SealedImage, open_regular},
    manifest::MANIFEST_DIGEST_FILE,
    parallel::at_once,
};

/// What is being written, in the layout's folder; whoever holds its lock removes what another one left.
const TEMPORARY: &str = ".rekindle-";

/// What was pushed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pushed {
    /// The digest of the OCI manifest.
    pub digest: BlobDigest,
    /// Bytes of all blobs of the image.
    pub bytes: u64,
    /// Bytes of those that were written.
    pub written: u64,
}

impl Pushed {
    /// Counts a blob; its descriptor.
    fn count(&mut self, put: Put) -> Descriptor {
        self.bytes += put.of.size;
        self.written += put.written;
        put.of
    }
}

/// A blob that is there now.
struct Put {
    of: Descriptor,
    /// Bytes that were written for it: none where it was there.
    written: u64,
}

impl Layout {
    /// Opens a layout to put something into it, and makes it where there is nothing, or an empty folder.
    ///
    /// # Errors
    /// [`LayoutError::NotALayout`] when something else is there.
    pub fn create(path: &Path) -> Result<Self, LayoutError> {
        fs::create_dir_all(path).map_err(LayoutError::io("make", path))?;
        let marker = path.join(LAYOUT_FILE);
        if fs::symlink_metadata(&marker).is_err() {
            let mut there = fs::read_dir(path).map_err(LayoutError::io("list", path))?;
            if there.next().is_some() {
                return Err(LayoutError::NotALayout {
                    path: path.to_owned(),
                    reason: format!("it has no {LAYOUT_FILE} and is not empty"),
                });
            }
            let index = json!({"schemaVersion": 2, "mediaType": INDEX, "manifests": []});
            write_file(&path.join(INDEX_JSON), index.to_string().as_bytes(), true)?;
            write_file(&marker, br#"{"imageLayoutVersion": "1.0.0"}"#, true)?;
        }
        let blobs = path.join(BLOBS);
        fs::create_dir_all(&blobs).map_err(LayoutError::io("make", &blobs))?;
        Self::open(path)
    }

    /// The tag of an image that is told no other one.
    pub fn tag_for(&self, image: &SealedImage) -> String {
        #[cfg(feature = "s3")]
        if let Some(away) = self.away() {
            return away.tag_of(image);
        }
        image.reference()
    }

    /// Puts an image into it under a tag, in place of what has that tag. What is written is compared with what the
    /// image's manifest says of its files' sizes and its index; `done` grows to [`Manifest::total_bytes`].
    ///
    /// [`Manifest::total_bytes`]: crate::Manifest::total_bytes
    ///
    /// # Errors
    /// When the image is not whole, or the file system refuses.
    pub fn push(
        &self,
        image: &SealedImage,
        tag: &str,
        done: &AtomicU64,
    ) -> Result<Pushed, LayoutError> {
        self.check_tag(tag)?;
        image.check_listed()?;
        #[cfg(feature = "s3")]
        let _upload = match self.away().and_then(Away::bucket) {
            Some(remote) => Some(remote.announce(self)?),
            None => None,
        };
        // One at a time: a tag is added to what the index has.
        let (_alone, known) = match &self.place {
            Place::Folder(_) => {
                let alone = Lock::acquire(&self.path.join(LAYOUT_FILE))?;
                self.sweep()?;
                (Some(alone), self.known_packs()?)
            }
            #[cfg(feature = "s3")]
            Place::Away(away) => {
                away.prepare()?;
                (None, HashMap::new())
            }
        };
        let mut pushed = Pushed {
            digest: BlobDigest::of(b""),
            bytes: 0,
            written: 0,
        };
        let manifest = image.manifest();
        let config = self.put(CONFIG, image.manifest_bytes())?;
        let config = pushed.count(config);
        let names = manifest.files.iter().map(|file| file.path.clone());
        let small: Vec<String> = [MANIFEST_DIGEST_FILE.to_owned()]
            .into_iter()
            .chain(names)
            .collect();
        let packs = manifest.packs.iter().map(|pack| pack.id.file());
        let put = |name: &str| {
            let path = image.dir().join(name);
            let known = known.get(name).copied();
            let mut put = self.put_file(&path, media_type(name), known, done)?;
            let title = (TITLE.to_owned(), name.to_owned());
            put.of.annotations.extend([title]);
            Ok::<_, LayoutError>(put)
        };
        // Each of them is little but the way to the store and back. Packs go one by one, in parts.
        let mut all = at_once(self.requests(), small.len(), |nth| put(&small[nth]))?;
        for name in packs {
            all.push(put(&name)?);
        }
        let layers = all.into_iter().map(|put| pushed.count(put)).collect();
        let annotation = ("dev.rekindle.image".to_owned(), image.reference());
        let oci = OciManifest {
            schema_version: 2,
            media_type: MANIFEST.to_owned(),
            artifact_type: ARTIFACT.to_owned(),
            config,
            layers,
            annotations: Annotations::from([annotation]),
        };
        let text = serde_json::to_vec(&oci).map_err(|e| self.unwritable(&e))?;
        self.publish(tag, &text, &mut pushed)?;
        #[cfg(feature = "s3")]
        if let Ok(touches) = image.touches()
            && !touches.is_empty()
            && let Err(error) = self.put_note(image, &touches)
        {
            tracing::debug!(tag, %error, "what its restores have noted stays here");
        }
        Ok(pushed)
    }

    fn check_tag(&self, tag: &str) -> Result<(), LayoutError> {
        match &self.place {
            Place::Folder(_) => check_tag(tag),
            #[cfg(feature = "s3")]
            Place::Away(away) => away.check_tag(tag),
        }
    }

    /// Puts the OCI manifest there, and its tag behind it.
    fn publish(&self, tag: &str, text: &[u8], pushed: &mut Pushed) -> Result<(), LayoutError> {
        pushed.digest = BlobDigest::of(text);
        let mut of = descriptor(MANIFEST, pushed.digest, text.len() as u64);
        of.artifact_type = Some(ARTIFACT.to_owned());
        of.annotations.insert(REF_NAME.to_owned(), tag.to_owned());
        #[cfg(feature = "s3")]
        if let Some(away) = self.away() {
            pushed.bytes += of.size;
            if away.publish(self, &of, text)? {
                pushed.written += of.size;
            }
            return Ok(());
        }
        pushed.count(self.put(MANIFEST, text)?);
        self.tag(tag, &of)
    }

    pub(super) fn unwritable(&self, error: &serde_json::Error) -> LayoutError {
        LayoutError::Json {
            path: self.path.clone(),
            reason: error.to_string(),
        }
    }

    /// What is in memory, as a blob.
    fn put(&self, media_type: &str, bytes: &[u8]) -> Result<Put, LayoutError> {
        let digest = BlobDigest::of(bytes);
        let size = bytes.len() as u64;
        let put = |written| Put {
            of: descriptor(media_type, digest, size),
            written,
        };
        #[cfg(feature = "s3")]
        if let Some(away) = self.away() {
            if away.size(digest)? == Some(size) {
                return Ok(put(0));
            }
            away.put(digest, bytes)?;
            return Ok(put(size));
        }
        if self.has(digest, size) {
            return Ok(put(0));
        }
        let temporary = self.temporary();
        fs::write(&temporary, bytes).map_err(LayoutError::io("write", &temporary))?;
        commit_file(&temporary, &self.path.join(digest.path()))?;
        Ok(put(size))
    }

    /// A file, as a blob. Where its digest is known already it is only compared, and nothing is written.
    fn put_file(
        &self,
        path: &Path,
        media_type: &str,
        known: Option<BlobDigest>,
        done: &AtomicU64,
    ) -> Result<Put, LayoutError> {
        let put = |digest, size, written| Put {
            of: descriptor(media_type, digest, size),
            written,
        };
        let open = || open_regular(path).map_err(LayoutError::io("read", path));
        let file = open()?;
        let size = file
            .metadata()
            .map_err(LayoutError::io("look at", path))?
            .len();
        #[cfg(feature = "s3")]
        if let Some(away) = self.away() {
            // Its name is its digest, so it is read twice, the second time from memory where that is large enough.
            let read = AtomicU64::new(0);
            let (digest, read) = copy(file, &mut io::sink(), size, path, path, &read)?;
            if away.size(digest)? == Some(read) {
                done.fetch_add(read, Ordering::Relaxed);
                return Ok(put(digest, read, 0));
            }
            away.put_file(path, (digest, read), done)?;
            return Ok(put(digest, read, read));
        }
        if let Some(known) = known.filter(|known| self.has(*known, size)) {
            let read = AtomicU64::new(0);
            let (digest, _) = copy(file, &mut io::sink(), size, path, path, &read)?;
            if digest == known {
                done.fetch_add(size, Ordering::Relaxed);
                return Ok(put(known, size, 0));
            }
        }
        space::require(&self.path, size)?;
        let temporary = self.temporary();
        let mut into = File::create_new(&temporary).map_err(LayoutError::io("make", &temporary))?;
        let copied = copy(open()?, &mut into, size, path, &temporary, done);
        let digest = match copied {
            Ok((digest, copied)) if copied == size => digest,
            other => {
                // Errors leave it to the next push.
                let _ = fs::remove_file(&temporary);
                let changed = io::Error::other("it changed while it was read");
                return Err(other
                    .err()
                    .unwrap_or_else(|| LayoutError::io("read", path)(changed)));
            }
        };
        if self.has(digest, size) {
            fs::remove_file(&temporary).map_err(LayoutError::io("remove", &temporary))?;
            return Ok(put(digest, size, 0));
        }
        commit_file(&temporary, &self.path.join(digest.path()))?;
        Ok(put(digest, size, size))
    }

    /// Whether there is such a blob. Its bytes are compared by whoever pulls.
    fn has(&self, digest: BlobDigest, size: u64) -> bool {
        let found = self.file(&digest.path()).and_then(|file| file.metadata());
        found.is_ok_and(|found| found.len() == size)
    }

    fn temporary(&self) -> std::path::PathBuf {
        self.path.join(format!("{TEMPORARY}{}", std::process::id()))
    }

    /// Removes what killed pushes left.
    fn sweep(&self) -> Result<(), LayoutError> {
        let path = &self.path;
        for entry in fs::read_dir(path).map_err(LayoutError::io("list", path))? {
            let entry = entry.map_err(LayoutError::io("list", path))?;
            if entry.file_name().to_string_lossy().starts_with(TEMPORARY) {
                let path = entry.path();
                fs::remove_file(&path).map_err(LayoutError::io("remove", &path))?;
            }
        }
        Ok(())
    }

    /// The packs of the images that are there. A pack's name was drawn by chance and its bytes never change, so it need
    /// not be written to find out that it is there; what a hostile layout says of it is compared.
    fn known_packs(&self) -> Result<HashMap<String, BlobDigest>, LayoutError> {
        let mut known = HashMap::new();
        for of in self.tags()? {
            // Another's artifact, or a damaged one, is no reason not to add to the layout.
            let Ok(manifest) = self.manifest(of.tag().unwrap_or_default(), &of) else {
                continue;
            };
            for layer in manifest.layers {
                if let (true, Ok(digest)) =
                    (layer.title().starts_with("pack-"), layer.digest.parse())
                {
                    known.insert(layer.title().to_owned(), digest);
                }
            }
        }
        Ok(known)
    }

    /// Sets a tag of a folder.
    fn tag(&self, tag: &str, of: &Descriptor) -> Result<(), LayoutError> {
        let path = self.path.join(INDEX_JSON);
        let file = self
            .file(INDEX_JSON)
            .map_err(LayoutError::io("open", &path))?;
        let bytes = self.bounded(INDEX_JSON, file, MAX_INDEX_JSON)?;
        let mut index: Value = self.json(INDEX_JSON, &bytes)?;
        let of = serde_json::to_value(of).map_err(|e| self.unwritable(&e))?;
        self.set_in_index(&mut index, tag, &of)?;
        write_file(&path, index.to_string().as_bytes(), true)?;
        Ok(())
    }

    /// Sets a tag in what `index.json` says, and keeps all else that is in it.
    pub(super) fn set_in_index(
        &self,
        index: &mut Value,
        tag: &str,
        of: &Value,
    ) -> Result<(), LayoutError> {
        let manifests = index.get_mut("manifests").and_then(Value::as_array_mut);
        let manifests = manifests.ok_or_else(|| LayoutError::Json {
            path: self.path.join(INDEX_JSON),
            reason: "it has no list of manifests".to_owned(),
        })?;
        manifests.retain(|other| other["annotations"][REF_NAME] != tag);
        manifests.push(of.clone());
        Ok(())
    }
}

pub(super) fn descriptor(media_type: &str, digest: BlobDigest, size: u64) -> Descriptor {
    Descriptor {
        media_type: media_type.to_owned(),
        artifact_type: None,
        digest: digest.to_string(),
        size,
        annotations: Annotations::new(),
    }
}
