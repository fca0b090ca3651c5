//! A layout below a prefix of a bucket.
//!
//! ```text
//!  oci-layout, index.json, blobs/…   as in a folder, so that what copies the prefix has a layout
//!  tags/<tag>                        the descriptor of that tag: written last, and what is believed
//!  touches/<tag>                     what restores of that image have asked for first: a hint, and no part of it
//!  uploads/, removed/, gc/           who adds to it, what was removed from it, and who removes: see `remove`
//! ```
//! There is nobody who could lock a bucket, and several nodes write to one. So each tag is an object of its own, which
//! one request writes; `index.json`, which several want to change, is for other tools. It is written with a condition
//! where the store knows such, and read only where there are no tags.
//!
//! A generation's number is a node's own, and two nodes have both made a `warm@3`. Unless it is told another one, an
//! image's tag therefore ends with when it was made and with the beginning of its manifest's digest.

use std::{
    ops::Range,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use bytes::Bytes;
use rekindle_core::name::{ImageName, Namespace};
use rekindle_store::{
    StoreError,
    s3::{Bucket, Condition, S3Error, Small},
};
use serde_json::{Value, json};
use tokio::runtime::Handle;

use super::{
    BlobDigest, Descriptor, INDEX, INDEX_JSON, LAYOUT_FILE, Layout, LayoutError, MAX_INDEX_JSON,
    OciIndex, Place,
    away::{Away, Coming, Kind, MAX_TAGS, Told},
    check_tag,
};
use crate::{
    chunks::{self, RemoteError},
    image::SealedImage,
};

pub(super) const TAGS: &str = "tags/";
pub(super) const NOTES: &str = "touches/";
/// Most bytes of a tag: ours has 400.
pub(super) const MAX_TAG_BYTES: u64 = 64 << 10;
/// How often `index.json` is written anew because another one has changed it meanwhile.
pub(super) const ROUNDS: usize = 10;

/// A bucket, for callers that block.
#[derive(Debug)]
pub(super) struct Remote {
    pub(super) bucket: Arc<Bucket>,
    runtime: Handle,
}

impl Layout {
    /// The layout below a bucket's prefix. Nothing is asked of the store yet. The calls of a layout block, and must not
    /// be made by a task of `runtime`, which does the store's work.
    pub fn in_bucket(bucket: Bucket, runtime: Handle) -> Self {
        Self {
            path: PathBuf::from(bucket.uri("")),
            place: Place::Away(Box::new(Remote {
                bucket: Arc::new(bucket),
                runtime,
            })),
        }
    }
}

impl Remote {
    pub(super) fn wait<T>(&self, doing: impl Future<Output = T>) -> T {
        self.runtime.block_on(doing)
    }

    pub(super) fn small(&self, key: &str, max: u64) -> Result<Option<Small>, S3Error> {
        self.wait(self.bucket.small(key, max))
    }

    pub(super) fn write(&self, key: &str, bytes: &[u8]) -> Result<(), S3Error> {
        let bytes = Bytes::copy_from_slice(bytes);
        self.wait(self.bucket.put(key, bytes, &Condition::Always))
            .map(drop)
    }

    /// The tags that begin so.
    fn tags_from(&self, start: &str) -> Result<Vec<String>, LayoutError> {
        let keys = self.wait(self.bucket.list(&format!("{TAGS}{start}"), MAX_TAGS))?;
        let tags = keys.iter().filter_map(|key| key.strip_prefix(TAGS));
        Ok(tags.map(str::to_owned).collect())
    }

    /// Sets a tag: first in `index.json`, for other tools, and then where it is believed.
    fn set_tag(&self, layout: &Layout, of: &Descriptor) -> Result<(), LayoutError> {
        let tag = of.tag().unwrap_or_default();
        let descriptor = serde_json::to_value(of).map_err(|e| layout.unwritable(&e))?;
        for _ in 0..ROUNDS {
            let found = self.small(INDEX_JSON, MAX_INDEX_JSON)?;
            let condition = match &found {
                None => Condition::Absent,
                Some(Small { etag: None, .. }) => Condition::Always,
                Some(Small {
                    etag: Some(etag), ..
                }) => Condition::Is(etag.clone()),
            };
            let mut index = match &found {
                Some(found) => layout.json::<Value>(INDEX_JSON, &found.bytes)?,
                None => json!({"schemaVersion": 2, "mediaType": INDEX, "manifests": []}),
            };
            layout.set_in_index(&mut index, tag, &descriptor)?;
            let text = Bytes::from(index.to_string());
            if self.wait(self.bucket.put(INDEX_JSON, text, &condition))? {
                break;
            }
        }
        self.write(&format!("{TAGS}{tag}"), descriptor.to_string().as_bytes())?;
        Ok(())
    }
}

/// What a tag of a bucket says of its image.
pub fn tag_tells(tag: &str) -> Option<Told> {
    let (namespace, rest) = tag.split_once('/')?;
    let image = || {
        let (name, rest) = rest.split_once('@')?;
        let (created, _) = rest.split_once('-')?;
        Some((name.parse().ok()?, created.parse().ok()?))
    };
    Some(Told {
        namespace: namespace.parse().ok()?,
        image: image(),
    })
}

impl Away for Remote {
    /// `NAMESPACE/NAME@CREATED-DIGEST`.
    fn tag_of(&self, image: &SealedImage) -> String {
        let manifest = image.manifest();
        let digest = BlobDigest::of(image.manifest_bytes()).hex();
        format!(
            "{}/{}@{}-{}",
            manifest.namespace,
            manifest.name,
            manifest.created,
            &digest[..12]
        )
    }

    fn told(&self, tag: &str) -> Option<Told> {
        tag_tells(tag)
    }

    fn check_tag(&self, tag: &str) -> Result<(), LayoutError> {
        check_tag(tag)
    }

    fn bucket(&self) -> Option<&Remote> {
        Some(self)
    }

    /// Makes sure that the prefix is a layout to other tools.
    fn prepare(&self) -> Result<(), LayoutError> {
        if self.wait(self.bucket.size(LAYOUT_FILE))?.is_none() {
            self.write(LAYOUT_FILE, br#"{"imageLayoutVersion": "1.0.0"}"#)?;
        }
        Ok(())
    }

    fn size(&self, blob: BlobDigest) -> Result<Option<u64>, LayoutError> {
        Ok(self.wait(self.bucket.size(&blob.path()))?)
    }

    fn read(&self, _: Kind, blob: BlobDigest, size: u64) -> Coming {
        let parts = Arc::clone(&self.bucket).read(blob.path(), size);
        Coming::begin(&self.runtime, parts)
    }

    fn gives_parts(&self, _: BlobDigest, _: u64) -> Result<bool, LayoutError> {
        Ok(true)
    }

    fn parts(&self, blobs: Vec<(BlobDigest, u64)>) -> Box<dyn chunks::Remote> {
        let blobs = blobs.into_iter().map(|(blob, size)| (blob.path(), size));
        Box::new(Parts {
            bucket: Arc::clone(&self.bucket),
            runtime: self.runtime.clone(),
            blobs: blobs.collect(),
        })
    }

    fn requests(&self) -> usize {
        self.bucket.concurrency()
    }

    fn put(&self, blob: BlobDigest, bytes: &[u8]) -> Result<(), LayoutError> {
        Ok(self.write(&blob.path(), bytes)?)
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
        let key = digest.path();
        let what = (size, digest.bytes());
        self.wait(self.bucket.put_file(&key, (file, path), what, &sent))?;
        Ok(())
    }

    fn publish(&self, layout: &Layout, of: &Descriptor, text: &[u8]) -> Result<bool, LayoutError> {
        let digest = of.digest.parse()?;
        let new = self.size(digest)? != Some(of.size);
        if new {
            self.put(digest, text)?;
        }
        self.set_tag(layout, of)?;
        Ok(new)
    }

    fn tag(&self, layout: &Layout, tag: &str) -> Result<Option<Descriptor>, LayoutError> {
        let key = format!("{TAGS}{tag}");
        match self.small(&key, MAX_TAG_BYTES)? {
            Some(found) => layout.json(&key, &found.bytes).map(Some),
            None => Ok(None),
        }
    }

    fn tags(&self) -> Result<Vec<String>, LayoutError> {
        self.tags_from("")
    }

    fn tags_of(&self, namespace: &Namespace, name: &ImageName) -> Result<Vec<String>, LayoutError> {
        let mut tags = self.tags_from(&format!("{namespace}/{name}@"))?;
        tags.retain(|tag| self.made(tag).is_some());
        Ok(tags)
    }

    fn made(&self, tag: &str) -> Option<u64> {
        Some(self.told(tag)?.image?.1)
    }

    fn put_note(&self, _: &Layout, tag: &str, note: &[u8]) -> Result<(), LayoutError> {
        Ok(self.write(&format!("{NOTES}{tag}"), note)?)
    }

    fn note(&self, _: &Layout, tag: &str, max: u64) -> Result<Option<Vec<u8>>, LayoutError> {
        let found = self.small(&format!("{NOTES}{tag}"), max)?;
        Ok(found.map(|found| found.bytes.into()))
    }

    fn index(&self, layout: &Layout) -> Result<Vec<Descriptor>, LayoutError> {
        Ok(match self.small(INDEX_JSON, MAX_INDEX_JSON)? {
            Some(found) => {
                let index: OciIndex = layout.json(INDEX_JSON, &found.bytes)?;
                index.manifests
            }
            None => Vec::new(),
        })
    }
}

/// Parts of blobs in a bucket.
#[derive(Debug)]
struct Parts {
    bucket: Arc<Bucket>,
    runtime: Handle,
    /// The key and the size of each.
    blobs: Vec<(String, u64)>,
}

impl chunks::Remote for Parts {
    fn name(&self) -> String {
        self.bucket.uri("")
    }

    fn read(
        &self,
        pack: usize,
        range: Range<u64>,
        take: &mut dyn FnMut(&[u8]),
    ) -> Result<(), RemoteError> {
        let (key, size) = &self.blobs[pack];
        let bytes = self.runtime.block_on(self.bucket.part(key, range, *size));
        take(&bytes.map_err(|error| Arc::new(error) as RemoteError)?);
        Ok(())
    }
}
