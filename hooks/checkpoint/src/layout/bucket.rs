//! A layout below a prefix of a bucket.
//!
//! ```text
//!  oci-layout, index.json, blobs/…   as in a folder, so that what copies the prefix has a layout
//!  tags/<tag>                        the descriptor of that tag: written last, and what is believed
//!  uploads/, removed/, gc/           who adds to it, what was removed from it, and who removes: see `remove`
//! ```
//! There is nobody who could lock a bucket, and several nodes write to one. So each tag is an object of its own, which
//! one request writes; `index.json`, which several want to change, is for other tools. It is written with a condition
//! where the store knows such, and read only where there are no tags.
//!
//! A generation's number is a node's own, and two nodes have both made a `warm@3`. Unless it is told another one, an
//! image's tag therefore ends with when it was made and with the beginning of its manifest's digest.

use std::{
    io::{self, Read},
    ops::Range,
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use bytes::{Buf as _, Bytes};
use futures::StreamExt as _;
use rekindle_core::name::{ImageName, Namespace};
use rekindle_store::{
    StoreError,
    s3::{Bucket, Condition, S3Error, Small},
};
use serde_json::{Value, json};
use tokio::{runtime::Handle, sync::mpsc, task::JoinHandle};

use super::{
    BlobDigest, Descriptor, INDEX, INDEX_JSON, LAYOUT_FILE, Layout, LayoutError, MAX_INDEX_JSON,
    Place,
};
use crate::{
    chunks::{self, RemoteError},
    image::SealedImage,
    manifest::shorten,
};

pub(super) const TAGS: &str = "tags/";
/// Most bytes of a tag: ours has 400.
pub(super) const MAX_TAG_BYTES: u64 = 64 << 10;
/// Most tags that are looked through.
pub(super) const MAX_TAGS: usize = 100_000;
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
            place: Place::Bucket(Remote {
                bucket: Arc::new(bucket),
                runtime,
            }),
        }
    }

    /// Whether the bucket has all of an image, under the tag that it has unless it was told another one.
    ///
    /// # Errors
    /// What the store says. A tag that is damaged is none.
    pub fn holds(&self, image: &SealedImage) -> Result<bool, LayoutError> {
        let Place::Bucket(remote) = &self.place else {
            return Ok(false);
        };
        let tag = tag_of(image);
        let Some(of) = remote.tag(self, &tag)? else {
            return Ok(false);
        };
        let Ok(oci) = self.manifest(&tag, &of) else {
            return Ok(false);
        };
        for layer in oci.layers.iter().chain([&oci.config]) {
            let Ok(digest) = layer.digest.parse::<BlobDigest>() else {
                return Ok(false);
            };
            if remote.size(&digest.path())? != Some(layer.size) {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// The tags of a bucket, in their order; of a folder none, whose `index.json` has them.
    ///
    /// # Errors
    /// What the store says.
    pub fn bucket_tags(&self) -> Result<Vec<String>, LayoutError> {
        let Place::Bucket(remote) = &self.place else {
            return Ok(Vec::new());
        };
        let keys = remote.wait(remote.bucket.list(TAGS, MAX_TAGS))?;
        let tags = keys.iter().filter_map(|key| key.strip_prefix(TAGS));
        Ok(tags.map(str::to_owned).collect())
    }

    /// The tag of the newest image `namespace/name`, if there is one.
    ///
    /// # Errors
    /// What the store says.
    pub fn newest(
        &self,
        namespace: &Namespace,
        name: &ImageName,
    ) -> Result<Option<String>, LayoutError> {
        match &self.place {
            Place::Bucket(remote) => remote.newest(&format!("{namespace}/{name}")),
            Place::Folder(_) => Ok(None),
        }
    }
}

/// What an image's tag is, unless it is told another one.
pub(super) fn tag_of(image: &SealedImage) -> String {
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

impl Remote {
    pub(super) fn wait<T>(&self, doing: impl Future<Output = T>) -> T {
        self.runtime.block_on(doing)
    }

    pub(super) fn size(&self, key: &str) -> Result<Option<u64>, S3Error> {
        self.wait(self.bucket.size(key))
    }

    pub(super) fn small(&self, key: &str, max: u64) -> Result<Option<Small>, S3Error> {
        self.wait(self.bucket.small(key, max))
    }

    /// How many requests for parts of an object may be on their way at once.
    pub(super) fn requests(&self) -> usize {
        self.bucket.concurrency()
    }

    /// Begins to fetch an object.
    pub(super) fn read(&self, key: &str, size: u64) -> Coming {
        let (sender, pieces) = mpsc::channel(1);
        let mut parts = Box::pin(Arc::clone(&self.bucket).read(key.to_owned(), size));
        let fetching = self.runtime.spawn(async move {
            while let Some(part) = parts.next().await {
                // Nobody wants it any more.
                if sender.send(part).await.is_err() {
                    return;
                }
            }
        });
        Coming {
            pieces,
            rest: Bytes::new(),
            failed: None,
            fetching,
        }
    }

    /// Makes sure that the prefix is a layout to other tools.
    pub(super) fn mark(&self) -> Result<(), S3Error> {
        if self.size(LAYOUT_FILE)?.is_none() {
            let version = Bytes::from_static(br#"{"imageLayoutVersion": "1.0.0"}"#);
            self.wait(self.bucket.put(LAYOUT_FILE, version, &Condition::Always))?;
        }
        Ok(())
    }

    pub(super) fn put(&self, key: &str, bytes: &[u8]) -> Result<(), S3Error> {
        let bytes = Bytes::copy_from_slice(bytes);
        self.wait(self.bucket.put(key, bytes, &Condition::Always))
            .map(drop)
    }

    pub(super) fn put_file(
        &self,
        path: &std::path::Path,
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

    /// Sets a tag: first in `index.json`, for other tools, and then where it is believed.
    pub(super) fn set_tag(
        &self,
        layout: &Layout,
        tag: &str,
        of: &Descriptor,
    ) -> Result<(), LayoutError> {
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
        self.put(&format!("{TAGS}{tag}"), descriptor.to_string().as_bytes())?;
        Ok(())
    }

    /// What a tag names; none where there is no such tag.
    pub(super) fn tag(
        &self,
        layout: &Layout,
        tag: &str,
    ) -> Result<Option<Descriptor>, LayoutError> {
        let key = format!("{TAGS}{tag}");
        match self.small(&key, MAX_TAG_BYTES)? {
            Some(found) => layout.json(&key, &found.bytes).map(Some),
            None => Ok(None),
        }
    }

    /// The tag of the newest image of a name: `<name>@<when>-<digest>`.
    fn newest(&self, name: &str) -> Result<Option<String>, LayoutError> {
        let start = format!("{TAGS}{name}@");
        let keys = self.wait(self.bucket.list(&start, MAX_TAGS))?;
        let when = |key: &&String| {
            let (when, _) = key.strip_prefix(&start)?.split_once('-')?;
            when.parse::<u64>().ok()
        };
        let dated = keys.iter().filter(|key| when(key).is_some());
        // Of two that were made in one second the same one for all who ask.
        let newest = dated.max_by_key(|key| (when(key), (*key).clone()));
        Ok(newest
            .and_then(|key| key.strip_prefix(TAGS))
            .map(str::to_owned))
    }

    /// The tag that is meant, and what it names: itself, the newest image of that name, or the only one that there is.
    /// None where it has to be looked for in `index.json`.
    pub(super) fn choose(
        &self,
        layout: &Layout,
        wanted: Option<&str>,
    ) -> Result<Option<(String, Descriptor)>, LayoutError> {
        let tag = match wanted {
            Some(wanted) => match self.tag(layout, wanted)? {
                Some(of) => return Ok(Some((wanted.to_owned(), of))),
                None => self.newest(wanted)?,
            },
            None => {
                let mut tags = self.wait(self.bucket.list(TAGS, MAX_TAGS))?;
                if tags.len() > 1 {
                    let first = tags.iter().take(10);
                    let names: Vec<&str> = first.filter_map(|key| key.strip_prefix(TAGS)).collect();
                    return Err(LayoutError::NoTag {
                        path: layout.path.clone(),
                        wanted: "that could be meant without a tag".to_owned(),
                        there: format!("it has {}", shorten(&names.join(", "))),
                    });
                }
                let only = tags.pop();
                only.and_then(|key| key.strip_prefix(TAGS).map(str::to_owned))
            }
        };
        let Some(tag) = tag else { return Ok(None) };
        let of = self.tag(layout, &tag)?;
        Ok(of.map(|of| (tag, of)))
    }
}

/// The packs of an image.
#[derive(Debug)]
pub(super) struct Packs {
    bucket: Arc<Bucket>,
    runtime: Handle,
    /// The key and the size of each.
    blobs: Vec<(String, u64)>,
}

impl Packs {
    pub(super) fn new(remote: &Remote, blobs: Vec<(String, u64)>) -> Self {
        Self {
            bucket: Arc::clone(&remote.bucket),
            runtime: remote.runtime.clone(),
            blobs,
        }
    }
}

impl chunks::Remote for Packs {
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

/// An object on its way.
pub(super) struct Coming {
    pieces: mpsc::Receiver<Result<Bytes, S3Error>>,
    rest: Bytes,
    failed: Option<S3Error>,
    fetching: JoinHandle<()>,
}

impl Coming {
    /// Why it did not come, where it did not.
    pub(super) fn failed(self) -> Option<S3Error> {
        let mut this = self;
        this.failed.take()
    }
}

impl Read for Coming {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        while !self.rest.has_remaining() {
            match self.pieces.blocking_recv() {
                None => return Ok(0),
                Some(Ok(piece)) => self.rest = piece,
                Some(Err(error)) => {
                    self.failed = Some(error);
                    return Err(io::Error::other("the store failed"));
                }
            }
        }
        let n = into.len().min(self.rest.len());
        self.rest.copy_to_slice(&mut into[..n]);
        Ok(n)
    }
}

impl Drop for Coming {
    fn drop(&mut self) {
        self.fetching.abort();
    }
}
