//! A layout in a repository of an OCI registry: its blobs and manifests as they are in a folder, and tags that name
//! manifests. There is no `index.json`, and nobody needs one.
//!
//! Unless it is told another one, an image's tag is `NAMESPACE.NAME.CREATED-DIGEST`, the same on each node. A registry's
//! tags have neither `/` nor `@`, and at most 128 bytes. So that no two images have one tag, a dot of a name is written
//! `_-` there and an underscore `__`, and names that are too long together are written as their SHA-256. What restores of
//! an image have asked for first is an artifact of its own, tagged as the image with [`NOTE`] behind it.

use std::{
    ops::Range,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use bytes::Bytes;
use futures::stream;
use rekindle_core::name::{ImageName, Namespace};
use rekindle_store::{
    StoreError,
    registry::{Registry, RegistryError, is_tag},
};
use tokio::runtime::Handle;

use super::{
    Annotations, BlobDigest, Descriptor, Layout, LayoutError, MANIFEST, MAX_OCI_MANIFEST,
    OciManifest, Place, REF_NAME,
    away::{Away, Coming, Kind, MAX_TAGS, Told},
    push::descriptor,
};
use crate::{
    chunks::{self, RemoteError},
    image::SealedImage,
    manifest::shorten,
};

/// With what the tags of long names begin: no namespace's does, for behind that stands a dot.
const LONG: &str = "sha256-";
/// What is left for the names: 128, less a dot and a dash, 20 digits of a time and 12 of a digest, and [`NOTE`].
const MAX_NAMES: usize = 128 - 2 - 20 - 12 - NOTE.len();
/// With what the tag of an image's note ends: no image's own does.
const NOTE: &str = ".touches";
const NOTE_TYPE: &str = "application/vnd.rekindle.touches.v1";
/// What stands where an artifact has no configuration.
const EMPTY_TYPE: &str = "application/vnd.oci.empty.v1+json";
const EMPTY: &[u8] = b"{}";

/// A repository, for callers that block.
#[derive(Debug)]
struct Remote {
    registry: Arc<Registry>,
    runtime: Handle,
}

impl Layout {
    /// The layout in a repository of a registry. Nothing is asked of it yet. The calls of a layout block, and must not be
    /// made by a task of `runtime`, which does the registry's work.
    pub fn in_registry(registry: Registry, runtime: Handle) -> Self {
        Self {
            path: PathBuf::from(registry.uri()),
            place: Place::Away(Box::new(Remote {
                registry: Arc::new(registry),
                runtime,
            })),
        }
    }
}

/// Checks what is behind the colon of a repository: a tag, the digest of a manifest, or `NAMESPACE/NAME`, which means
/// the newest image of that name.
///
/// # Errors
/// [`LayoutError::RegistryTag`].
pub fn check_registry_reference(text: &str) -> Result<(), LayoutError> {
    let image = text.split_once('/');
    let image = image.is_some_and(|(namespace, name)| {
        namespace.parse::<Namespace>().is_ok() && name.parse::<ImageName>().is_ok()
    });
    if image || text.parse::<BlobDigest>().is_ok() || is_tag(text) {
        return Ok(());
    }
    Err(LayoutError::RegistryTag(shorten(text)))
}

impl Remote {
    fn wait<T>(&self, doing: impl Future<Output = T>) -> T {
        self.runtime.block_on(doing)
    }
}

/// What the tags of an image begin with, up to the time.
fn beginning(namespace: &Namespace, name: &ImageName) -> String {
    let names = format!("{}.{}", escaped(namespace.as_str()), escaped(name.as_str()));
    if names.len() <= MAX_NAMES {
        return names;
    }
    let image = format!("{namespace}/{name}");
    format!("{LONG}{}", BlobDigest::of(image.as_bytes()).hex())
}

fn escaped(name: &str) -> String {
    name.replace('_', "__").replace('.', "_-")
}

/// What was escaped; none where nobody escapes so.
fn read_back(text: &str) -> Option<String> {
    let mut name = String::new();
    let mut chars = text.chars();
    while let Some(c) = chars.next() {
        name.push(match c {
            '_' => match chars.next()? {
                '_' => '_',
                '-' => '.',
                _ => return None,
            },
            c => c,
        });
    }
    Some(name)
}

/// When the image of a tag was made, and what the tag begins with.
fn created(tag: &str) -> Option<(&str, u64)> {
    let (names, rest) = tag.rsplit_once('.')?;
    let (created, digest) = rest.split_once('-')?;
    let hex = |b: u8| b.is_ascii_digit() || (b'a'..=b'f').contains(&b);
    let fits = digest.len() == 12 && digest.bytes().all(hex);
    let digits = created.bytes().all(|b| b.is_ascii_digit());
    (fits && digits).then_some((names, created.parse().ok()?))
}

/// Whether a tag is that of a note.
fn is_note(tag: &str) -> bool {
    let of = tag.strip_suffix(NOTE);
    of.is_some_and(|of| created(of).is_some())
}

impl Away for Remote {
    fn tag_of(&self, image: &SealedImage) -> String {
        let manifest = image.manifest();
        let digest = BlobDigest::of(image.manifest_bytes()).hex();
        let names = beginning(&manifest.namespace, &manifest.name);
        format!("{names}.{}-{}", manifest.created, &digest[..12])
    }

    fn told(&self, tag: &str) -> Option<Told> {
        let (names, created) = created(tag)?;
        let (namespace, name) = names.split_once('.')?;
        let name = read_back(name)?.parse().ok()?;
        Some(Told {
            namespace: read_back(namespace)?.parse().ok()?,
            image: Some((name, created)),
        })
    }

    fn check_tag(&self, tag: &str) -> Result<(), LayoutError> {
        match is_tag(tag) {
            true => Ok(()),
            false => Err(LayoutError::RegistryTag(shorten(tag))),
        }
    }

    fn prepare(&self) -> Result<(), LayoutError> {
        Ok(())
    }

    fn size(&self, blob: BlobDigest) -> Result<Option<u64>, LayoutError> {
        Ok(self.wait(self.registry.blob_size(&blob.to_string()))?)
    }

    fn read(&self, kind: Kind, blob: BlobDigest, size: u64) -> Coming {
        let (registry, digest) = (Arc::clone(&self.registry), blob.to_string());
        match kind {
            Kind::Blob => Coming::begin(&self.runtime, registry.read(digest, size)),
            Kind::Manifest => Coming::begin(
                &self.runtime,
                stream::once(async move {
                    let found = registry.manifest(&digest, MANIFEST, size).await?;
                    let found = found.map(|found| found.bytes);
                    found.ok_or_else(|| RegistryError::Missing {
                        doing: format!("fetching the manifest {digest} of {}", registry.uri()),
                        answer: "its tag names it".to_owned(),
                    })
                }),
            ),
        }
    }

    fn gives_parts(&self, blob: BlobDigest, size: u64) -> Result<bool, LayoutError> {
        Ok(self.wait(self.registry.gives_parts(&blob.to_string(), size))?)
    }

    fn parts(&self, blobs: Vec<(BlobDigest, u64)>) -> Box<dyn chunks::Remote> {
        let blobs = blobs
            .into_iter()
            .map(|(blob, size)| (blob.to_string(), size));
        Box::new(Parts {
            registry: Arc::clone(&self.registry),
            runtime: self.runtime.clone(),
            blobs: blobs.collect(),
        })
    }

    fn requests(&self) -> usize {
        self.registry.concurrency()
    }

    fn put(&self, blob: BlobDigest, bytes: &[u8]) -> Result<(), LayoutError> {
        let bytes = Bytes::copy_from_slice(bytes);
        Ok(self.wait(self.registry.put_blob(blob.bytes(), bytes))?)
    }

    fn put_file(
        &self,
        path: &Path,
        (digest, size): (BlobDigest, u64),
        done: &AtomicU64,
    ) -> Result<(), LayoutError> {
        let file = crate::image::open_regular(path).map_err(StoreError::io("read", path))?;
        let sent = |bytes| {
            done.fetch_add(bytes, Ordering::Relaxed);
        };
        let what = (size, digest.bytes());
        self.wait(self.registry.put_file((file, path), what, &sent))?;
        Ok(())
    }

    fn publish(&self, layout: &Layout, of: &Descriptor, text: &[u8]) -> Result<bool, LayoutError> {
        let tag = of.tag().unwrap_or_default();
        if self
            .tag(layout, tag)?
            .is_some_and(|found| found.digest == of.digest)
        {
            return Ok(false);
        }
        let text = Bytes::copy_from_slice(text);
        self.wait(self.registry.put_manifest(tag, MANIFEST, text))?;
        Ok(true)
    }

    fn tag(&self, _: &Layout, tag: &str) -> Result<Option<Descriptor>, LayoutError> {
        if !is_tag(tag) && tag.parse::<BlobDigest>().is_err() {
            return Ok(None);
        }
        let found = self.registry.manifest(tag, MANIFEST, MAX_OCI_MANIFEST);
        Ok(self.wait(found)?.map(|found| Descriptor {
            media_type: found.media_type,
            artifact_type: None,
            size: found.bytes.len() as u64,
            digest: found.digest,
            annotations: Annotations::from([(REF_NAME.to_owned(), tag.to_owned())]),
        }))
    }

    fn tags(&self) -> Result<Vec<String>, LayoutError> {
        let mut tags = self.wait(self.registry.tags(MAX_TAGS))?;
        tags.retain(|tag| !is_note(tag));
        Ok(tags)
    }

    fn tags_of(&self, namespace: &Namespace, name: &ImageName) -> Result<Vec<String>, LayoutError> {
        let wanted = beginning(namespace, name);
        let mut tags = self.tags()?;
        tags.retain(|tag| created(tag).is_some_and(|(names, _)| names == wanted));
        Ok(tags)
    }

    fn made(&self, tag: &str) -> Option<u64> {
        created(tag).map(|(_, created)| created)
    }

    fn put_note(&self, layout: &Layout, tag: &str, note: &[u8]) -> Result<(), LayoutError> {
        let put = |media_type: &str, bytes: &[u8]| {
            let digest = BlobDigest::of(bytes);
            self.put(digest, bytes)?;
            Ok::<_, LayoutError>(descriptor(media_type, digest, bytes.len() as u64))
        };
        let artifact = OciManifest {
            schema_version: 2,
            media_type: MANIFEST.to_owned(),
            artifact_type: NOTE_TYPE.to_owned(),
            config: put(EMPTY_TYPE, EMPTY)?,
            layers: vec![put(NOTE_TYPE, note)?],
            annotations: Annotations::new(),
        };
        let text = serde_json::to_vec(&artifact).map_err(|e| layout.unwritable(&e))?;
        let tag = format!("{tag}{NOTE}");
        self.wait(self.registry.put_manifest(&tag, MANIFEST, text.into()))?;
        Ok(())
    }

    fn note(&self, layout: &Layout, tag: &str, max: u64) -> Result<Option<Vec<u8>>, LayoutError> {
        let tag = format!("{tag}{NOTE}");
        let found = self.registry.manifest(&tag, MANIFEST, MAX_OCI_MANIFEST);
        let Some(found) = self.wait(found)? else {
            return Ok(None);
        };
        let artifact: OciManifest = layout.json(&tag, &found.bytes)?;
        let layers = artifact.layers.iter();
        let mut notes = layers.filter(|layer| layer.media_type == NOTE_TYPE);
        let note = notes.next().map(|of| layout.small_blob(&tag, of, max));
        note.transpose()
    }

    fn index(&self, _: &Layout) -> Result<Vec<Descriptor>, LayoutError> {
        Ok(Vec::new())
    }
}

/// Parts of blobs in a registry.
#[derive(Debug)]
struct Parts {
    registry: Arc<Registry>,
    runtime: Handle,
    /// The digest and the size of each.
    blobs: Vec<(String, u64)>,
}

impl chunks::Remote for Parts {
    fn name(&self) -> String {
        self.registry.uri()
    }

    fn read(
        &self,
        pack: usize,
        range: Range<u64>,
        take: &mut dyn FnMut(&[u8]),
    ) -> Result<(), RemoteError> {
        let (digest, size) = &self.blobs[pack];
        let bytes = self
            .runtime
            .block_on(self.registry.part(digest, range, *size));
        take(&bytes.map_err(|error| Arc::new(error) as RemoteError)?);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_two_images_have_one_tag_and_each_is_read_back() {
        let long = "a".repeat(63);
        let mut seen = std::collections::BTreeSet::new();
        for (namespace, name) in [
            ("a", "b.c"),
            ("a.b", "c"),
            ("a", "b_-c"),
            ("a", "b__c"),
            ("a_", "b"),
            ("a", "b"),
            ("sha256-a", "b"),
            (long.as_str(), "b"),
            (long.as_str(), long.as_str()),
        ] {
            let (namespace, name) = (namespace.parse().unwrap(), name.parse().unwrap());
            let names = beginning(&namespace, &name);
            let tag = format!("{names}.{}-0123456789ab", u64::MAX);
            assert!(is_tag(&tag), "{tag}");
            let note = format!("{tag}{NOTE}");
            assert!(is_tag(&note) && is_note(&note) && !is_note(&tag), "{note}");
            assert_eq!(created(&note), None);
            assert_eq!(created(&tag), Some((names.as_str(), u64::MAX)));
            assert!(seen.insert(names.clone()), "{names}");
            if !names.starts_with(LONG) || names.contains('.') {
                let (a, b) = names.split_once('.').unwrap();
                assert_eq!(read_back(a).unwrap(), namespace.as_str());
                assert_eq!(read_back(b).unwrap(), name.as_str());
            }
        }
        for other in [
            "latest",
            "a.b",
            "a.b.x-0123456789ab",
            "a.b.1-0123",
            "a.b.1-0123456789aB",
        ] {
            assert_eq!(created(other), None, "{other}");
        }
        assert_eq!(read_back("a_b"), None);
    }

    #[test]
    fn behind_the_colon_is_a_tag_a_digest_or_an_image() {
        let digest = format!("sha256:{}", "0".repeat(64));
        for good in [
            "latest",
            "team-a/warm",
            digest.as_str(),
            "a.b.1-0123456789ab",
        ] {
            check_registry_reference(good).unwrap();
        }
        for bad in [
            "",
            "a/b/c",
            "/",
            "a/",
            "team-a/warm@3",
            "sha256:0",
            "a:b",
            "..",
        ] {
            assert!(check_registry_reference(bad).is_err(), "{bad}");
        }
    }
}
