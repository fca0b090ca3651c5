//! The folder that CRIU restores from: its own files, and of the pages what has to be in a file.

use std::{
    fs::{self, File},
    io,
    os::unix::fs::{FileExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

use rekindle_store::space;

use super::{ImageError, ImageStore, Scratch, folder::Private};
use crate::{
    chunks::Chunks,
    criu_image::{CriuImageError, Pagemap, Run, pages_file},
    manifest::criu_path,
    pages::{PagesError, pagemaps},
};

/// Bytes copied at a time.
pub(super) const BUFFER: usize = 128 << 10;

/// The folder that CRIU restores from, removed when this is dropped.
#[derive(Debug)]
pub(crate) enum LaidOut {
    /// Where the restore asked for it.
    At(Private),
    /// On the store's disk, where all pages have to be in it.
    InStore(Scratch),
}

impl LaidOut {
    /// A new one.
    pub(super) fn at(path: &Path) -> Result<Self, ImageError> {
        Ok(Self::At(Private::new(path)?))
    }

    /// The same files in a folder of the store.
    pub(super) fn copied_to(&self, store: &ImageStore) -> Result<Self, ImageError> {
        let scratch = store.scratch()?;
        let dir = self.path();
        for entry in fs::read_dir(dir).map_err(ImageError::io("list", dir))? {
            let entry = entry.map_err(ImageError::io("list", dir))?;
            let (from, to) = (entry.path(), scratch.path().join(entry.file_name()));
            fs::copy(&from, to).map_err(ImageError::io("copy", &from))?;
        }
        Ok(Self::InStore(scratch))
    }

    pub(crate) fn path(&self) -> &Path {
        match self {
            Self::At(private) => private.path(),
            Self::InStore(scratch) => scratch.path(),
        }
    }

    /// A file of it that is not there yet.
    pub(super) fn create(&self, name: &str) -> Result<(File, PathBuf), ImageError> {
        let path = self.path().join(name);
        let file = File::options()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&path)
            .map_err(ImageError::io("make", &path))?;
        Ok((file, path))
    }

    /// The pages files of the pagemaps that are in it, with those runs that are wanted. `image` is only named in
    /// errors.
    pub(super) fn plan(
        &self,
        image: &str,
        chunks: &Chunks,
        wanted: impl Fn(&Run) -> bool,
    ) -> Result<Plan, ImageError> {
        let dir = self.path();
        let maps = pagemaps(dir).map_err(|e| match e {
            PagesError::File { path, source, .. } => ImageError::io("read", &path)(source),
            other => ImageError::io("read", dir)(io::Error::other(other)),
        })?;
        let mut all = Vec::new();
        for (path, _) in maps {
            let pages = Pages::of(&path, chunks, &wanted);
            all.extend(pages.map_err(|source| ImageError::Criu {
                image: image.to_owned(),
                source,
            })?);
        }
        Ok(Plan(all))
    }

    /// Makes them, with holes elsewhere.
    pub(super) fn write(&self, plan: Plan, image: &str, chunks: &Chunks) -> Result<(), ImageError> {
        let dir = self.path();
        // A small index can claim more than there is anywhere.
        space::require(dir, plan.bytes())?;
        let mut buffer = vec![0; BUFFER];
        for pages in plan.0 {
            pages.write(dir, image, chunks, &mut buffer)?;
        }
        Ok(())
    }
}

/// Pages files that are to be made.
pub(super) struct Plan(Vec<Pages>);

impl Plan {
    /// What they take: what is more than zeros.
    pub(super) fn bytes(&self) -> u64 {
        let runs = self.0.iter().flat_map(|pages| &pages.runs);
        runs.map(|run| run.data).fold(0, u64::saturating_add)
    }
}

/// A pages file that is to be made.
struct Pages {
    file: String,
    /// Of its stream.
    name: String,
    bytes: u64,
    runs: Vec<Wanted>,
}

/// A part of it that has to be there, and how much of that is more than zeros.
struct Wanted {
    at: u64,
    end: u64,
    data: u64,
}

impl Pages {
    /// Those of one pagemap; none where the image has no such stream. What a pagemap claims and the stream does not
    /// have is told by who compares the two.
    fn of(
        map: &Path,
        chunks: &Chunks,
        wanted: impl Fn(&Run) -> bool,
    ) -> Result<Option<Self>, CriuImageError> {
        let page_size = rustix::param::page_size() as u64;
        let mut map = Pagemap::open(map)?;
        let file = pages_file(map.pages_id);
        let name = criu_path(Path::new(&file));
        let Some(bytes) = chunks.bytes_of(&name) else {
            return Ok(None);
        };
        let mut at = 0_u64;
        let mut runs = Vec::new();
        while let Some(run) = map.next_run()? {
            if !run.present() {
                continue;
            }
            let end = at.saturating_add(run.bytes(page_size)).min(bytes);
            if wanted(&run) && at < end {
                let data = chunks.data_in(&name, at, end);
                runs.push(Wanted { at, end, data });
            }
            at = end;
        }
        Ok(Some(Self {
            file,
            name,
            bytes,
            runs,
        }))
    }

    fn write(
        self,
        dir: &Path,
        image: &str,
        chunks: &Chunks,
        buffer: &mut [u8],
    ) -> Result<(), ImageError> {
        let path = dir.join(&self.file);
        let file = File::options()
            .write(true)
            .create(true)
            .truncate(false)
            .mode(0o600)
            .open(&path)
            .map_err(ImageError::io("make", &path))?;
        file.set_len(self.bytes)
            .map_err(ImageError::io("make", &path))?;
        for Wanted { mut at, end, .. } in self.runs {
            while at < end {
                let most = (end - at).min(buffer.len() as u64) as usize;
                let part = &mut buffer[..most];
                let read = chunks.read_at(&self.name, at, part);
                if read.map_err(ImageError::chunks(image))? {
                    file.write_all_at(part, at)
                        .map_err(ImageError::io("write", &path))?;
                }
                at += most as u64;
            }
        }
        Ok(())
    }
}
