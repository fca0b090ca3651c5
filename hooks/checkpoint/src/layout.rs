//! Images in an OCI image layout: a folder in which they travel from node to node, the same below a prefix of a bucket, or
//! a repository of a registry.
//!
//! ```text
//!  oci-layout               {"imageLayoutVersion": "1.0.0"}
//!  index.json               tags, each with the digest of a manifest
//!  blobs/sha256/<digest>    an OCI manifest whose config is an image's manifest.json, and whose layers are its other
//!                           files, called by `org.opencontainers.image.title` as they are in the image's folder
//! ```
//! An artifact of OCI's image specification 1.1, with types of our own. A blob that is there is not written again, and
//! packs that generations share are one blob. Encrypted images travel as they are: no key is needed to push or pull.
//!
//! Whoever reads a layout treats it as hostile. Which files an image has is said by its own manifest; the layout only
//! says which blobs they are. Nothing is read through a symlink, no more of a file than its descriptor says, and each
//! blob is compared with its digest before anything looks at it.

use std::{
    fs::File,
    io::{self, Read},
    os::fd::AsFd,
    path::{Path, PathBuf},
};

use rekindle_store::StoreError;
use rustix::fs::{Mode, OFlags, ResolveFlags, openat2};
use serde::{Deserialize, Serialize};

#[cfg(feature = "s3")]
use rekindle_store::{registry::RegistryError, s3::S3Error};

use crate::{
    image::ImageError,
    manifest::{self, INDEX_FILE, MANIFEST_DIGEST_FILE, ManifestError},
};

#[cfg(feature = "s3")]
mod away;
#[cfg(feature = "s3")]
mod begin;
mod blobs;
#[cfg(feature = "s3")]
mod bucket;
mod pull;
mod push;
#[cfg(feature = "s3")]
mod registry;
#[cfg(feature = "s3")]
mod remove;

#[cfg(feature = "s3")]
pub use away::Told;
pub use blobs::{BlobDigest, BlobFault};
#[cfg(feature = "s3")]
pub use bucket::tag_tells;
pub use pull::{Found, Proof, Pulled};
pub use push::Pushed;
#[cfg(feature = "s3")]
pub use registry::check_registry_reference;
#[cfg(feature = "s3")]
pub use remove::{Collected, Rules, expired};

/// What an image is to those who do not know it.
pub const ARTIFACT: &str = "application/vnd.rekindle.checkpoint.v2";
/// The image's own `manifest.json`.
const CONFIG: &str = "application/vnd.rekindle.checkpoint.manifest.v2+json";
const SEAL: &str = "application/vnd.rekindle.checkpoint.seal.v2";
const CHUNKS: &str = "application/vnd.rekindle.checkpoint.chunks.v2";
const CRIU: &str = "application/vnd.rekindle.checkpoint.criu.v2";
const PACK: &str = "application/vnd.rekindle.checkpoint.pack.v2";
/// OCI's own.
const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const INDEX: &str = "application/vnd.oci.image.index.v1+json";
const REF_NAME: &str = "org.opencontainers.image.ref.name";
const TITLE: &str = "org.opencontainers.image.title";

const LAYOUT_FILE: &str = "oci-layout";
const INDEX_JSON: &str = "index.json";
const BLOBS: &str = "blobs/sha256";
/// Most bytes of `index.json`: a tag costs about 400.
const MAX_INDEX_JSON: u64 = 16 << 20;
/// Most bytes of an OCI manifest: a file costs about 300, and an image has at most twice [`manifest::MAX_FILES`].
const MAX_OCI_MANIFEST: u64 = 48 << 20;
/// Longest tag.
const MAX_TAG: usize = 255;

/// Why an image could not be put into a layout, or taken out of it.
#[derive(Debug, thiserror::Error)]
pub enum LayoutError {
    /// There is something else at that place.
    #[error("{} is no OCI layout: {reason}", path.display())]
    NotALayout {
        /// The folder.
        path: PathBuf,
        /// What was found.
        reason: String,
    },
    /// One of its JSON files is none.
    #[error("{} cannot be understood: {reason}", path.display())]
    Json {
        /// Which.
        path: PathBuf,
        /// What the parser said.
        reason: String,
    },
    /// One of its JSON files is too large to be read.
    #[error("{} has more than the {max} bytes that are read of it", path.display())]
    TooLarge {
        /// Which.
        path: PathBuf,
        /// Bytes that are read.
        max: u64,
    },
    /// Not a tag.
    #[error(
        "{0:?} is no tag: 1 to 255 of a-z, A-Z, 0-9, '.', '_', '-', '+', '@' and '/', beginning with a letter or digit"
    )]
    Tag(String),
    /// Not a tag of a registry.
    #[error(
        "{0:?} is no tag of a registry: 1 to 128 of a-z, A-Z, 0-9, '.', '_' and '-', beginning with a letter, digit or '_'; to pull, also sha256:DIGEST, or NAMESPACE/NAME for the newest of that name"
    )]
    RegistryTag(String),
    /// There is no such tag, or none was named and there are several images, or none.
    #[error("{} has no image {wanted}: {there}", path.display())]
    NoTag {
        /// The layout.
        path: PathBuf,
        /// Which was wanted.
        wanted: String,
        /// What there is.
        there: String,
    },
    /// What the tag names is no checkpoint image, or one of another version.
    #[error("{tag} is no checkpoint image that this build reads: its {what} is {found:?}")]
    Foreign {
        /// The tag.
        tag: String,
        /// "artifact type".
        what: &'static str,
        /// What was found.
        found: String,
    },
    /// A descriptor's digest is none that we read.
    #[error("{0:?} is no digest that is read: sha256: and 64 lower-case hex digits")]
    Digest(String),
    /// A blob is not what its descriptor says.
    #[error("{file}: blob {digest} {fault}")]
    Blob {
        /// For which file.
        file: String,
        /// Which blob.
        digest: BlobDigest,
        /// What is wrong with it.
        fault: BlobFault,
    },
    /// The files of the layout are not those of the image.
    #[error("{tag} is refused: the file {file:?} {what}")]
    Listing {
        /// The tag.
        tag: String,
        /// The file.
        file: String,
        /// "is listed twice".
        what: &'static str,
    },
    /// The image's own manifest is refused.
    #[error("{tag} is refused")]
    Manifest {
        /// The tag.
        tag: String,
        /// Why.
        source: ManifestError,
    },
    /// What is kept under an image's name is another one.
    #[error("{tag} is refused: its manifest says that it is {claimed}")]
    Misplaced {
        /// The tag.
        tag: String,
        /// What the manifest says.
        claimed: String,
    },
    /// An encrypted image was to get another name.
    #[error(
        "{image} is encrypted with the key {key:?}, which this node does not have for {wanted}: its name is part of what the key proves, pull it under its own"
    )]
    Renamed {
        /// What it says that it is.
        image: String,
        /// What it was to be.
        wanted: String,
        /// The key's name.
        key: String,
    },
    /// Others remove blobs from the bucket.
    #[cfg(feature = "s3")]
    #[error("blobs are being removed from {} just now (`rekindle image gc`): try it again; after one that was killed, {note} there keeps images out for {minutes} minutes", path.display())]
    Busy {
        /// The layout.
        path: PathBuf,
        /// The object that says so.
        note: &'static str,
        /// How long one is believed.
        minutes: u64,
    },
    /// What is in a bucket is not removed.
    #[cfg(feature = "s3")]
    #[error("nothing is removed from {}: {reason}", path.display())]
    Kept {
        /// The layout.
        path: PathBuf,
        /// Why.
        reason: String,
    },
    /// Its own verification failed, or the store.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// The file system refused.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The object store refused, or is not there.
    #[cfg(feature = "s3")]
    #[error(transparent)]
    Remote(#[from] S3Error),
    /// The registry refused, or is not there.
    #[cfg(feature = "s3")]
    #[error(transparent)]
    Registry(#[from] RegistryError),
}

impl LayoutError {
    /// Whether a store has no such thing.
    #[cfg(feature = "s3")]
    pub fn is_missing(&self) -> bool {
        matches!(
            self,
            Self::Remote(S3Error::Missing { .. }) | Self::Registry(RegistryError::Missing { .. })
        )
    }

    fn io<'a>(doing: &'static str, path: &'a Path) -> impl FnOnce(io::Error) -> Self + 'a {
        move |source| Self::Store(StoreError::io(doing, path)(source))
    }
}

/// A layout.
#[derive(Debug)]
pub struct Layout {
    /// What it is called in errors.
    path: PathBuf,
    place: Place,
}

/// Where a layout is.
#[derive(Debug)]
enum Place {
    Folder(File),
    #[cfg(feature = "s3")]
    Away(Box<dyn away::Away>),
}

/// OCI's content descriptor.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Descriptor {
    media_type: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    artifact_type: Option<String>,
    digest: String,
    size: u64,
    #[serde(default, skip_serializing_if = "Annotations::is_empty")]
    annotations: Annotations,
}

type Annotations = std::collections::BTreeMap<String, String>;

impl Descriptor {
    fn tag(&self) -> Option<&str> {
        self.annotations.get(REF_NAME).map(String::as_str)
    }

    fn title(&self) -> &str {
        self.annotations.get(TITLE).map_or("", String::as_str)
    }
}

/// OCI's image manifest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct OciManifest {
    schema_version: u32,
    media_type: String,
    #[serde(default)]
    artifact_type: String,
    config: Descriptor,
    layers: Vec<Descriptor>,
    #[serde(default)]
    annotations: Annotations,
}

/// OCI's image index, as much as is needed to find a tag.
#[derive(Debug, Deserialize)]
struct OciIndex {
    #[serde(default)]
    manifests: Vec<Descriptor>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct LayoutVersion {
    image_layout_version: String,
}

impl Layout {
    /// How many requests may be on their way at once; one of a folder.
    pub fn requests(&self) -> usize {
        #[cfg(feature = "s3")]
        if let Some(away) = self.away() {
            return away.requests();
        }
        1
    }

    /// Opens one.
    ///
    /// # Errors
    /// [`LayoutError::NotALayout`], or what the file system says.
    pub fn open(path: &Path) -> Result<Self, LayoutError> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let dir = rustix::fs::open(path, flags, Mode::empty())
            .map_err(|e| LayoutError::io("open the folder", path)(e.into()))?;
        let layout = Self {
            path: path.to_owned(),
            place: Place::Folder(dir.into()),
        };
        let refuse = |reason: String| LayoutError::NotALayout {
            path: path.to_owned(),
            reason,
        };
        let file = layout.file(LAYOUT_FILE).map_err(|e| match e.kind() {
            io::ErrorKind::NotFound => refuse(format!("it has no {LAYOUT_FILE}")),
            _ => LayoutError::io("open", &path.join(LAYOUT_FILE))(e),
        })?;
        // OCI's is 30 bytes.
        let bytes = layout.bounded(LAYOUT_FILE, file, 4096)?;
        let version: LayoutVersion = layout.json(LAYOUT_FILE, &bytes)?;
        if !version.image_layout_version.starts_with("1.") {
            let version = manifest::shorten(&version.image_layout_version);
            return Err(refuse(format!(
                "its version is {version:?}, and 1.x is read"
            )));
        }
        Ok(layout)
    }

    /// Its tags, as `index.json` lists them.
    fn tags(&self) -> Result<Vec<Descriptor>, LayoutError> {
        #[cfg(feature = "s3")]
        if let Some(away) = self.away() {
            return away.index(self);
        }
        let file = self.file(INDEX_JSON);
        let file = file.map_err(LayoutError::io("open", &self.path.join(INDEX_JSON)))?;
        let bytes = self.bounded(INDEX_JSON, file, MAX_INDEX_JSON)?;
        Ok(self.json::<OciIndex>(INDEX_JSON, &bytes)?.manifests)
    }

    /// Opens a regular file of a folder for reading; not through any symlink, and not outside.
    fn file(&self, name: &str) -> io::Result<File> {
        let dir = match &self.place {
            Place::Folder(dir) => dir,
            #[cfg(feature = "s3")]
            Place::Away(_) => return Err(io::ErrorKind::Unsupported.into()),
        };
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let resolve =
            ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
        let file = File::from(openat2(dir.as_fd(), name, flags, Mode::empty(), resolve)?);
        if !file.metadata()?.is_file() {
            let reason = "it is not a regular file";
            return Err(io::Error::new(io::ErrorKind::InvalidInput, reason));
        }
        Ok(file)
    }

    /// All of a small file.
    fn bounded(&self, name: &str, file: File, max: u64) -> Result<Vec<u8>, LayoutError> {
        let path = self.path.join(name);
        let mut bytes = Vec::new();
        let read = file.take(max + 1).read_to_end(&mut bytes);
        read.map_err(LayoutError::io("read", &path))?;
        if bytes.len() as u64 > max {
            return Err(LayoutError::TooLarge { path, max });
        }
        Ok(bytes)
    }

    fn json<T: for<'a> Deserialize<'a>>(&self, name: &str, bytes: &[u8]) -> Result<T, LayoutError> {
        serde_json::from_slice(bytes).map_err(|e| LayoutError::Json {
            path: self.path.join(name),
            reason: manifest::shorten(&e.to_string()),
        })
    }

    /// The OCI manifest of a tag that is one of ours.
    fn manifest(&self, tag: &str, of: &Descriptor) -> Result<OciManifest, LayoutError> {
        let foreign = |what, found: &str| LayoutError::Foreign {
            tag: manifest::shorten(tag),
            what,
            found: manifest::shorten(found),
        };
        if of.media_type != MANIFEST {
            return Err(foreign("media type", &of.media_type));
        }
        let bytes = self.manifest_blob(tag, of, MAX_OCI_MANIFEST)?;
        let digest: BlobDigest = of.digest.parse()?;
        let found: OciManifest = self.json(&digest.path(), &bytes)?;
        if found.artifact_type != ARTIFACT {
            return Err(foreign("artifact type", &found.artifact_type));
        }
        if found.config.media_type != CONFIG {
            return Err(foreign("config's media type", &found.config.media_type));
        }
        Ok(found)
    }
}

/// The media type of a file of an image.
fn media_type(file: &str) -> &'static str {
    match file {
        MANIFEST_DIGEST_FILE => SEAL,
        INDEX_FILE => CHUNKS,
        _ if file.contains('/') => CRIU,
        _ => PACK,
    }
}

/// As many tags as a person reads.
fn some_of(tags: &[impl AsRef<str>]) -> String {
    let first: Vec<&str> = tags.iter().take(10).map(AsRef::as_ref).collect();
    match first.is_empty() {
        true => "it has no tags".to_owned(),
        false => format!("it has {}", manifest::shorten(&first.join(", "))),
    }
}

/// Checks a tag against the grammar of `org.opencontainers.image.ref.name`, less the colon, which ends a folder's name
/// where both are written as one.
///
/// # Errors
/// [`LayoutError::Tag`].
pub fn check_tag(tag: &str) -> Result<(), LayoutError> {
    let separator = |b: u8| matches!(b, b'.' | b'_' | b'-' | b'+' | b'@' | b'/');
    let plain = |b: u8| b.is_ascii_alphanumeric() || separator(b);
    let begins = tag.starts_with(|c: char| c.is_ascii_alphanumeric());
    if begins && tag.len() <= MAX_TAG && tag.bytes().all(plain) {
        return Ok(());
    }
    Err(LayoutError::Tag(manifest::shorten(tag)))
}

#[cfg(test)]
mod tests;
