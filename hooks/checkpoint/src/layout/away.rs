//! Layouts that are reached over a network.

use std::{
    fmt,
    io::{self, Read},
    path::Path,
    pin::pin,
    sync::atomic::AtomicU64,
};

use bytes::{Buf as _, Bytes};
use futures::{Stream, StreamExt as _};
use rekindle_core::name::{ImageName, Namespace};
use tokio::{runtime::Handle, sync::mpsc, task::JoinHandle};

use super::{BlobDigest, Descriptor, Layout, LayoutError, Place, bucket::Remote, some_of};
use crate::{
    chunks,
    image::SealedImage,
    parallel::at_once,
    touches::{self, Touch},
};

/// Most tags that are looked through.
pub(super) const MAX_TAGS: usize = 100_000;

/// Where a layout lies that is no folder: its blobs, and the tags that name some of them. All calls block.
pub(super) trait Away: fmt::Debug + Send + Sync {
    /// The tag of an image that is told no other one: the same on each node.
    fn tag_of(&self, image: &SealedImage) -> String;

    /// What a tag says of its image: all of it, if it is one of [`Away::tag_of`].
    fn told(&self, tag: &str) -> Option<Told>;

    /// Refuses what cannot be a tag here.
    fn check_tag(&self, tag: &str) -> Result<(), LayoutError>;

    /// Makes sure that blobs can be put there.
    fn prepare(&self) -> Result<(), LayoutError>;

    /// How large a blob is; none where there is none.
    fn size(&self, blob: BlobDigest) -> Result<Option<u64>, LayoutError>;

    /// Begins to fetch a blob, of which nothing is believed but that at most `size` bytes come.
    fn read(&self, kind: Kind, blob: BlobDigest, size: u64) -> Coming;

    /// Whether parts of a blob can be had.
    fn gives_parts(&self, blob: BlobDigest, size: u64) -> Result<bool, LayoutError>;

    /// What gives parts of blobs, by their places in `blobs`.
    fn parts(&self, blobs: Vec<(BlobDigest, u64)>) -> Box<dyn chunks::Remote>;

    /// How many requests for parts may be on their way at once.
    fn requests(&self) -> usize;

    /// Puts bytes there as a blob.
    fn put(&self, blob: BlobDigest, bytes: &[u8]) -> Result<(), LayoutError>;

    /// Puts a file there as a blob. `done` grows by the bytes that are there.
    fn put_file(
        &self,
        path: &Path,
        blob: (BlobDigest, u64),
        done: &AtomicU64,
    ) -> Result<(), LayoutError>;

    /// Puts an OCI manifest there, all of whose blobs are there, and sets the tag that `of` says. Says whether the
    /// manifest was not there before.
    fn publish(&self, layout: &Layout, of: &Descriptor, text: &[u8]) -> Result<bool, LayoutError>;

    /// What a tag names; none where there is no such tag.
    fn tag(&self, layout: &Layout, tag: &str) -> Result<Option<Descriptor>, LayoutError>;

    /// All tags, in their order.
    fn tags(&self) -> Result<Vec<String>, LayoutError>;

    /// The tags of [`Away::tag_of`] of the images of one name.
    fn tags_of(&self, namespace: &Namespace, name: &ImageName) -> Result<Vec<String>, LayoutError>;

    /// When the image of one of these was made, in seconds since 1970; none where the tag is somebody's own.
    fn made(&self, tag: &str) -> Option<u64>;

    /// Puts a note beside the image of one of these tags, in place of the one that was there.
    fn put_note(&self, layout: &Layout, tag: &str, note: &[u8]) -> Result<(), LayoutError>;

    /// The note beside such an image, if there is one of at most `max` bytes.
    fn note(&self, layout: &Layout, tag: &str, max: u64) -> Result<Option<Vec<u8>>, LayoutError>;

    /// The bucket, where it is one: what goes from there is for others to decide than what goes from a registry.
    fn bucket(&self) -> Option<&Remote> {
        None
    }

    /// What other tools have written in place of tags.
    fn index(&self, layout: &Layout) -> Result<Vec<Descriptor>, LayoutError>;
}

/// What is fetched.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// An OCI manifest.
    Manifest,
    /// What such one names.
    Blob,
}

/// What a tag says of its image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Told {
    /// Whose it is.
    pub namespace: Namespace,
    /// Its name, and when it was made, in seconds since 1970.
    pub image: Option<(ImageName, u64)>,
}

impl Layout {
    pub(super) fn away(&self) -> Option<&dyn Away> {
        match &self.place {
            Place::Folder(_) => None,
            Place::Away(away) => Some(&**away),
        }
    }

    /// Whether this place has all of an image, under the tag that it has unless it was told another one. Of a folder
    /// that is not known.
    ///
    /// # Errors
    /// What the store says. A tag that is damaged is none.
    pub fn holds(&self, image: &SealedImage) -> Result<bool, LayoutError> {
        let Some(away) = self.away() else {
            return Ok(false);
        };
        let tag = away.tag_of(image);
        let Some(of) = away.tag(self, &tag)? else {
            return Ok(false);
        };
        let Ok(oci) = self.manifest(&tag, &of) else {
            return Ok(false);
        };
        let all: Vec<&Descriptor> = oci.layers.iter().chain([&oci.config]).collect();
        let there = at_once(away.requests(), all.len(), |nth| {
            let Ok(digest) = all[nth].digest.parse() else {
                return Ok(false);
            };
            Ok::<_, LayoutError>(away.size(digest)? == Some(all[nth].size))
        })?;
        Ok(there.into_iter().all(|there| there))
    }

    /// Puts what restores of an image have asked for first beside it, for those on other nodes. Of an encrypted image
    /// nothing is told that its key does not open, and so not where its processes have their memory.
    ///
    /// # Errors
    /// What the store says. Restores do without.
    pub fn put_note(&self, image: &SealedImage, touches: &[Touch]) -> Result<(), LayoutError> {
        let Some(away) = self.away().filter(|_| image.key().is_none()) else {
            return Ok(());
        };
        let note = touches::write(touches, image.manifest_bytes());
        away.put_note(self, &away.tag_of(image), &note)
    }

    /// Has the note of [`Layout::put_note`] come, if there is one. A restore does without.
    pub(super) fn bring_note(&self, image: &SealedImage) {
        let Some(away) = self.away() else { return };
        let tag = away.tag_of(image);
        let noted = match away.note(self, &tag, touches::MAX_FILE as u64) {
            Ok(Some(note)) => touches::read(&note, image.manifest_bytes()),
            Ok(None) => return,
            Err(error) => return tracing::debug!(tag, %error, "its note has not come"),
        };
        match noted.map(|touches| image.note_touches(&touches)) {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::debug!(tag, %error, "its note is not kept"),
            Err(error) => tracing::debug!(tag, %error, "its note is not used"),
        }
    }

    /// The tags of a place, in their order, each with what it says of its image; of a folder none, whose `index.json`
    /// has them.
    ///
    /// # Errors
    /// What the store says.
    pub fn listed(&self) -> Result<Vec<(String, Option<Told>)>, LayoutError> {
        let Some(away) = self.away() else {
            return Ok(Vec::new());
        };
        let tags = away.tags()?.into_iter();
        Ok(tags
            .map(|tag| {
                let told = away.told(&tag);
                (tag, told)
            })
            .collect())
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
        let Some(away) = self.away() else {
            return Ok(None);
        };
        let tags = away.tags_of(namespace, name)?.into_iter();
        // Of two that were made in one second the same one for all who ask.
        Ok(tags.max_by_key(|tag| (away.made(tag), tag.clone())))
    }

    /// The tag that is meant, and what it names: itself, the newest image of that name, or the only one that there is.
    /// None where it has to be looked for in `index.json`.
    pub(super) fn choose(
        &self,
        away: &dyn Away,
        wanted: Option<&str>,
    ) -> Result<Option<(String, Descriptor)>, LayoutError> {
        let tag = match wanted {
            Some(wanted) => {
                let image = wanted.split_once('/');
                let image = image.and_then(|(a, b)| Some((a.parse().ok()?, b.parse().ok()?)));
                match (away.tag(self, wanted)?, image) {
                    (Some(of), _) => return Ok(Some((wanted.to_owned(), of))),
                    (None, Some((namespace, name))) => self.newest(&namespace, &name)?,
                    (None, None) => None,
                }
            }
            None => {
                let mut tags = away.tags()?;
                if tags.len() > 1 {
                    return Err(LayoutError::NoTag {
                        path: self.path.clone(),
                        wanted: "that could be meant without a tag".to_owned(),
                        there: some_of(&tags),
                    });
                }
                tags.pop()
            }
        };
        let Some(tag) = tag else { return Ok(None) };
        let of = away.tag(self, &tag)?;
        Ok(of.map(|of| (tag, of)))
    }
}

/// A blob on its way.
pub(super) struct Coming {
    pieces: mpsc::Receiver<Result<Bytes, LayoutError>>,
    rest: Bytes,
    failed: Option<LayoutError>,
    fetching: JoinHandle<()>,
}

impl Coming {
    /// Has it come in such pieces. Dropped, it stops.
    pub(super) fn begin<E: Into<LayoutError> + Send>(
        runtime: &Handle,
        pieces: impl Stream<Item = Result<Bytes, E>> + Send + 'static,
    ) -> Self {
        let (sender, receiver) = mpsc::channel(1);
        let fetching = runtime.spawn(async move {
            let mut pieces = pin!(pieces);
            while let Some(piece) = pieces.next().await {
                // Nobody wants it any more.
                if sender.send(piece.map_err(Into::into)).await.is_err() {
                    return;
                }
            }
        });
        Self {
            pieces: receiver,
            rest: Bytes::new(),
            failed: None,
            fetching,
        }
    }

    /// Why it did not come, where it did not.
    pub(super) fn failed(mut self) -> Option<LayoutError> {
        self.failed.take()
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
