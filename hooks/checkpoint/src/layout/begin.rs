//! An image out of a place over a network, to be restored before all of it is here.

use std::{path::Path, sync::atomic::AtomicU64};

use rekindle_core::name::{ImageName, Namespace};
use rekindle_store::space;

use super::{BlobDigest, Found, Layout, LayoutError, PACK, media_type};
use crate::{
    chunks::{Key, Remote},
    image::{ImageStore, Origin, SealedImage, Source},
    manifest::{Manifest, shorten},
};

impl Layout {
    /// The packs of an image of which this layout has the blobs that `origin` says.
    ///
    /// # Errors
    /// [`LayoutError::Listing`] when that does not say all of them; [`LayoutError::NotALayout`] for a folder.
    pub fn packs(
        &self,
        manifest: &Manifest,
        origin: &Origin,
    ) -> Result<Box<dyn Remote>, LayoutError> {
        let away = self.away().ok_or_else(|| LayoutError::NotALayout {
            path: self.path.clone(),
            reason: "an image comes bit by bit from a bucket or a registry only".to_owned(),
        })?;
        let mut blobs = Vec::new();
        for pack in &manifest.packs {
            let file = pack.id.file();
            let digest = origin
                .packs
                .get(&file)
                .ok_or_else(|| LayoutError::Listing {
                    tag: shorten(&origin.tier),
                    file: shorten(&file),
                    what: "is not listed",
                })?;
            let digest: BlobDigest = digest.parse()?;
            blobs.push((digest, pack.size));
        }
        Ok(away.parts(blobs))
    }
}

impl Found<'_> {
    /// Whether it can be begun: a folder's cannot, nor can that of a registry which gives whole blobs only.
    ///
    /// # Errors
    /// What the store says.
    pub fn comes_in_parts(&self) -> Result<bool, LayoutError> {
        let Some(away) = self.layout.away() else {
            return Ok(false);
        };
        let packs = self
            .files
            .iter()
            .filter(|(file, _)| media_type(file) == PACK);
        match packs.map(|(_, of)| of).max_by_key(|of| of.size) {
            Some(of) => away.gives_parts(of.digest.parse()?, of.size),
            None => Ok(true),
        }
    }

    /// Takes it into the store as the next generation of its name, as soon as there is what a restore with a pager
    /// needs to begin; [`SealedImage::complete`] brings the rest. `key` and `into` as with [`Found::pull`]; `tier` is
    /// what the configuration calls this place. `done` grows by the bytes of its small files.
    ///
    /// # Errors
    /// The first thing that is wrong with it; nothing is left then.
    pub fn begin(
        mut self,
        store: &ImageStore,
        (namespace, name): (&Namespace, &ImageName),
        (key, into): (Option<&Key>, &Path),
        tier: &str,
        done: &AtomicU64,
    ) -> Result<SealedImage, LayoutError> {
        store.sweep()?;
        let arriving = store.arriving(namespace, name)?;
        space::require(arriving.dir(), self.bytes())?;
        let packs = self.head(&arriving, key, done)?;
        let origin = Origin {
            tier: tier.to_owned(),
            packs: packs
                .into_iter()
                .map(|(file, of)| (file, of.digest))
                .collect(),
        };
        let source = Source {
            remote: self.layout.packs(&self.manifest, &origin)?,
            requests: self.layout.requests(),
        };
        let bytes = std::mem::take(&mut self.manifest_bytes);
        let begun = arriving.begin(self.manifest, bytes, &origin, source, (key, into))?;
        self.layout.bring_note(&begun);
        Ok(begun)
    }
}
