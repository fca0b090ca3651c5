//! An archive into an image. Failure contract: the image is there, whole, or nothing is.

use std::{
    fs::{self, File},
    io::{self, Read},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
    sync::atomic::{AtomicU64, Ordering},
};

use rekindle_core::name::{ImageName, Namespace};
use rekindle_store::space;
use sha2::{Digest as _, Sha256};

use super::{Archive, Extent, ForeignError, MAX_CRIU, Nested};
use crate::{
    archive::{
        layer::{Layer, from_layer},
        members::{Section, Source as _, Stream},
    },
    chunks::{CHUNK, ChunkWriter, Compression, Key, Room, Stream as Chunked},
    criu_image::{Pagemap, check_folder, pages_file},
    image::{ImageStore, Partial, SealedImage},
    layout::BlobDigest,
    manifest::{self, SHM_FILE, UPPER_FILE, Unknown, criu_path, is_image_path},
    pages::{pagemaps, plan::Plan},
    plain::PLAIN_FILE,
};

/// Bytes copied at a time.
const BUFFER: usize = 256 << 10;

/// What became of an archive.
#[derive(Debug)]
pub struct Imported {
    /// The image.
    pub image: SealedImage,
    /// What is not known of it.
    pub unknown: Vec<Unknown>,
    /// Device nodes of its writable layer that were left out.
    pub devices: u64,
}

/// Bytes on their way, counted and hashed.
struct Passing<'a, R> {
    from: R,
    hash: Option<Sha256>,
    done: &'a AtomicU64,
}

impl<R: Read> Read for Passing<'_, R> {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let n = self.from.read(into)?;
        if let Some(hash) = &mut self.hash {
            hash.update(&into[..n]);
        }
        self.done.fetch_add(n as u64, Ordering::Relaxed);
        Ok(n)
    }
}

/// The pages files that the pagemaps name, each with the plan of its chunks.
type Plans = Vec<(String, Plan)>;

impl Archive {
    /// Makes it the next generation of an image, with `key` encrypted; CRIU's files go to `private` then, a folder that
    /// is made for them in memory. `done` grows to [`Archive::bytes`].
    ///
    /// # Errors
    /// The first thing that is wrong with it; nothing is left then.
    pub fn import(
        &self,
        store: &ImageStore,
        (namespace, name): (&Namespace, &ImageName),
        key: Option<Key>,
        compression: Compression,
        private: &Path,
        done: &AtomicU64,
    ) -> Result<Imported, ForeignError> {
        let source = manifest::Source::default();
        let request = store.begin(namespace, name, source)?;
        let order = store.partial_at(&request.dir())?;
        let order = order.ok_or_else(|| self.wrong("", "has no place in the store"))?;
        let partial = order.begin(key, compression, private)?;
        partial.require_space(self.bytes())?;
        let plans = self.criu_files(&partial, done)?;
        let dir = partial.criu_dir();
        self.check(&dir, &plans)?;
        let upper = self.layer(self.upper, UPPER_FILE, "the writable layer", &partial, done)?;
        let shm = self.layer(self.shm, SHM_FILE, "the /dev/shm", &partial, done)?;
        let facts = self.facts(&dir, upper.as_ref(), shm.as_ref())?;
        let plain = dir.join(PLAIN_FILE);
        match fs::remove_file(&plain) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => {
                return Err(ForeignError::io("remove", &plain)(e));
            }
            _ => {}
        }
        let unknown = facts.unknown.iter().copied().collect();
        let image = partial.seal(facts)?;
        let devices = [upper, shm].into_iter().flatten();
        Ok(Imported {
            image,
            unknown,
            devices: devices.map(|layer| layer.left_out).sum(),
        })
    }

    /// CRIU's files into the image's folder, and the pages into its chunks.
    fn criu_files(&self, partial: &Partial, done: &AtomicU64) -> Result<Plans, ForeignError> {
        let dir = partial.criu_dir();
        let criu: Vec<_> = self.criu.iter().filter(|(name, _)| !is_log(name)).collect();
        let small = criu.iter().filter(|(name, _)| !is_pages(name));
        let small = small.fold(0_u64, |sum, (_, extent)| sum.saturating_add(extent.size));
        if small > MAX_CRIU {
            let what =
                format!("files without pages have {small} bytes, and at most {MAX_CRIU} are read");
            return Err(self.wrong("checkpoint", what));
        }
        space::require(&dir, small)?;
        // First, wherever they lie: they say how the pages are cut.
        for (name, extent) in criu.iter().filter(|(name, _)| is_pagemap(name)) {
            let mut from = Section::new(&self.file, extent.at, extent.size);
            self.keep(&dir, name, &mut from, extent.size)?;
        }
        let plans = self.plans(&dir)?;
        let Nested { extent, digest } = self.criu_archive.unwrap_or(Nested {
            extent: Extent {
                at: 0,
                size: self.end(),
            },
            digest: None,
        });
        let mut at = extent.at;
        let section = Section::new(&self.file, extent.at, extent.size);
        let mut section = Stream(Passing {
            from: section,
            hash: digest.map(|_| Sha256::new()),
            done,
        });
        for (name, of) in criu {
            // What lies between is read where all of it is hashed, and else passed over.
            match digest {
                Some(_) => section.skip(of.at - at),
                None => section.0.from.skip(of.at - at),
            }
            .map_err(ForeignError::io("read", &self.path))?;
            if is_pages(name) {
                let plan = plans.iter().find(|(pages, _)| pages == name);
                let (_, plan) = plan.ok_or_else(|| self.wrong(name, "is named by no pagemap"))?;
                self.pages(name, plan, of.size, partial.chunks(), &mut section)?;
            } else if is_pagemap(name) {
                section
                    .skip(of.size)
                    .map_err(ForeignError::io("read", &self.path))?;
            } else {
                self.keep(&dir, name, &mut section, of.size)?;
            }
            at = of.at + of.size;
        }
        self.compare("CRIU's files", section.0, digest)?;
        let missing = plans.iter().find(|(pages, plan)| {
            !plan.pieces.is_empty() && !self.criu.iter().any(|(name, _)| name == pages)
        });
        match missing {
            Some((pages, _)) => Err(self.wrong(pages, "is missing")),
            None => Ok(plans),
        }
    }

    fn end(&self) -> u64 {
        let ends = self.criu.iter().map(|(_, extent)| extent.at + extent.size);
        ends.max().unwrap_or(0)
    }

    /// A file of CRIU's, as it is.
    fn keep(
        &self,
        dir: &Path,
        name: &str,
        from: &mut impl Read,
        size: u64,
    ) -> Result<(), ForeignError> {
        let path = dir.join(name);
        if !is_image_path(&criu_path(&path)) {
            return Err(self.wrong(name, "has a name that no file of CRIU's has"));
        }
        let mut file = File::options()
            .write(true)
            .create_new(true)
            .mode(0o600)
            .open(&path)
            .map_err(ForeignError::io("make", &path))?;
        let copied = io::copy(&mut from.take(size), &mut file);
        match copied.map_err(ForeignError::io("write", &path))? {
            copied if copied == size => Ok(()),
            _ => Err(self.wrong(name, "is cut short")),
        }
    }

    fn plans(&self, dir: &Path) -> Result<Plans, ForeignError> {
        let refuse = |source| ForeignError::Pages {
            path: self.path.clone(),
            source,
        };
        let mut plans = Plans::new();
        for (path, _) in pagemaps(dir).map_err(refuse)? {
            self.refuse_claims(&path)?;
            let plan = Plan::read(dir, &path).map_err(refuse)?;
            let pages = plan
                .pages
                .file_name()
                .unwrap_or_default()
                .to_string_lossy()
                .into_owned();
            let file = path
                .file_name()
                .unwrap_or_default()
                .to_string_lossy()
                .into_owned();
            if plan.left_behind {
                return Err(self.wrong(&file, "says that pages are still in the dumped process"));
            }
            if plans.iter().any(|(other, _)| *other == pages) {
                return Err(self.wrong(&file, "names the pages file of another one"));
            }
            plans.push((pages, plan));
        }
        Ok(plans)
    }

    /// Refuses a pagemap that claims more than the archive has: a plan of it would be as large as the claim.
    fn refuse_claims(&self, path: &Path) -> Result<(), ForeignError> {
        let page_size = rustix::param::page_size() as u64;
        let mut map = Pagemap::open(path).map_err(|source| self.criu(source))?;
        let name = pages_file(map.pages_id);
        let found = self.criu.iter().find(|(other, _)| *other == name);
        let held = found.map_or(0, |(_, extent)| extent.size);
        let mut claimed = 0_u64;
        while let Some(run) = map.next_run().map_err(|source| self.criu(source))? {
            // Of one that is left behind nothing is there, and that is told by its plan.
            if !run.present() && !run.left_behind() {
                continue;
            }
            claimed = claimed.saturating_add(run.bytes(page_size));
            if claimed > held {
                let what = match found {
                    Some(_) => format!("has {held} bytes, and its pagemap says {claimed} or more"),
                    None => "is missing".to_owned(),
                };
                return Err(self.wrong(&name, what));
            }
        }
        Ok(())
    }

    /// Pages, cut as those of any image.
    fn pages(
        &self,
        name: &str,
        plan: &Plan,
        size: u64,
        writer: &ChunkWriter,
        from: &mut impl Read,
    ) -> Result<(), ForeignError> {
        let chunks = || {
            let pieces = plan
                .pieces
                .iter()
                .flat_map(|piece| piece.chunk_by(|a, b| a.block() == b.block()));
            pieces.map(|chunk| chunk.iter().map(|stretch| stretch.bytes).sum::<u64>())
        };
        let wanted = chunks().fold(0_u64, u64::saturating_add);
        if wanted != size {
            let what = format!("has {size} bytes, and its pagemap says {wanted}");
            return Err(self.wrong(name, what));
        }
        let mut stream = Chunked {
            name: criu_path(Path::new(name)),
            parts: Vec::new(),
        };
        let mut room = Room::default();
        let mut buffer = vec![0; CHUNK];
        for bytes in chunks() {
            let buffer = &mut buffer[..bytes as usize];
            from.read_exact(buffer)
                .map_err(ForeignError::io("read", &self.path))?;
            stream.push(writer.put(buffer, &mut room)?);
        }
        if !stream.parts.is_empty() {
            writer.add(stream);
        }
        Ok(())
    }

    /// That what CRIU reads is an image of its own. Its pages are in the chunks; holes stand for them.
    fn check(&self, dir: &Path, plans: &Plans) -> Result<(), ForeignError> {
        let holes: Vec<PathBuf> = plans.iter().map(|(pages, _)| dir.join(pages)).collect();
        for (path, (_, plan)) in holes.iter().zip(plans) {
            let bytes = plan
                .pieces
                .iter()
                .flatten()
                .map(|stretch| stretch.bytes)
                .sum();
            File::create_new(path)
                .and_then(|file| file.set_len(bytes))
                .map_err(ForeignError::io("make", path))?;
        }
        check_folder(dir).map_err(|source| self.criu(source))?;
        for path in &holes {
            fs::remove_file(path).map_err(ForeignError::io("remove", path))?;
        }
        Ok(())
    }

    pub(super) fn criu(&self, source: crate::criu_image::CriuImageError) -> ForeignError {
        ForeignError::Criu {
            path: self.path.clone(),
            source,
        }
    }

    /// A layer, if there is one, as a stream of the image.
    fn layer(
        &self,
        nested: Option<Nested>,
        stream: &str,
        what: &'static str,
        partial: &Partial,
        done: &AtomicU64,
    ) -> Result<Option<Layer>, ForeignError> {
        let Some(Nested { extent, digest }) = nested else {
            return Ok(None);
        };
        let mut passing = Passing {
            from: Section::new(&self.file, extent.at, extent.size),
            hash: digest.map(|_| Sha256::new()),
            done,
        };
        let out = partial.chunks().stream(stream);
        let plain = unpacked(&self.file, extent, &mut passing);
        let plain = plain.map_err(ForeignError::io("read", &self.path))?;
        let (out, layer) =
            from_layer(Stream(plain), out).map_err(|source| ForeignError::Archive {
                what,
                path: self.path.clone(),
                source,
            })?;
        out.finish()?;
        // What is behind the end of an archive is part of its bytes.
        io::copy(&mut passing, &mut io::sink()).map_err(ForeignError::io("read", &self.path))?;
        self.compare(what, passing, digest)?;
        Ok(Some(layer))
    }

    /// That all of it had its digest.
    fn compare(
        &self,
        what: &str,
        passing: Passing<'_, impl Read>,
        digest: Option<BlobDigest>,
    ) -> Result<(), ForeignError> {
        let mut passing = passing;
        let Some(digest) = digest else { return Ok(()) };
        io::copy(&mut passing, &mut io::sink()).map_err(ForeignError::io("read", &self.path))?;
        let found = passing
            .hash
            .map(|hash| BlobDigest::new(hash.finalize().into()));
        match found == Some(digest) {
            true => Ok(()),
            false => Err(self.wrong(what, format_args!("does not have the digest {digest}"))),
        }
    }
}

/// A layer without its compression, which its first bytes tell.
fn unpacked<'a>(
    file: &File,
    extent: Extent,
    passing: &'a mut (impl Read + 'a),
) -> io::Result<Box<dyn Read + 'a>> {
    let mut head = [0; 4];
    // What is shorter is no archive either.
    let _ = Section::new(file, extent.at, extent.size).read(&mut head)?;
    let buffered = io::BufReader::with_capacity(BUFFER, passing);
    Ok(match head {
        [0x1f, 0x8b, ..] => Box::new(flate2::bufread::MultiGzDecoder::new(buffered)),
        [0x28, 0xb5, 0x2f, 0xfd] => {
            let decoder = ruzstd::decoding::StreamingDecoder::new(buffered);
            Box::new(decoder.map_err(io::Error::other)?)
        }
        _ => Box::new(buffered),
    })
}

fn is_pages(name: &str) -> bool {
    name.starts_with("pages-") && name.ends_with(".img")
}

fn is_pagemap(name: &str) -> bool {
    name.starts_with("pagemap-") && name.ends_with(".img")
}

/// What CRIU wrote of its own work, which runtimes put beside its files.
fn is_log(name: &str) -> bool {
    name.ends_with(".log") || name.starts_with("stats-")
}
