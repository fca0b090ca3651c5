//! What is in an image, for people: memory by what it is for, sockets, and what another image has of it too.
//!
//! CRIU's own files say where a process's mappings are and what they are for, its pagemaps which pages of them are in the
//! image, and the index of chunks what those pages are made of. No byte of the memory is read.

use std::{collections::BTreeMap, path::Path, sync::Arc};

use serde::Serialize;

use crate::{
    chunks::{Chunks, Common, Composition},
    criu_image::{Area, AreaKind, CriuImageError, OpenFiles, Pagemap, Socket, areas, pages_file},
    image::ImageError,
    manifest::criu_path,
    pages::{PagesError, pagemaps},
};

/// Which memory: of whom, and what it is for.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct Memory {
    /// The process, by its number in the container; none for memory that processes share.
    pub pid: Option<u32>,
    /// What it is for.
    pub kind: AreaKind,
    /// The mapped file, or the number of the shared memory.
    pub name: Option<String>,
}

/// What is in an image.
#[derive(Debug)]
pub struct Contents {
    /// The memory that it has, all mappings of one process, kind and name together.
    pub memory: BTreeMap<Memory, Composition>,
    /// The sockets that were open.
    pub sockets: Vec<Socket>,
    /// Its chunks.
    pub chunks: Arc<Chunks>,
}

impl Contents {
    /// Reads what is in the CRIU folder `dir` of an image with these chunks. `common` says which of them another image
    /// has too. `image` is only named in errors.
    pub(crate) fn read(
        image: &str,
        dir: &Path,
        chunks: Arc<Chunks>,
        common: Option<&Common>,
    ) -> Result<Self, ImageError> {
        let refused = |source| ImageError::Criu {
            image: image.to_owned(),
            source,
        };
        let files = OpenFiles::read(dir).map_err(refused)?;
        let maps = pagemaps(dir).map_err(|e| match e {
            PagesError::File { path, source, .. } => ImageError::io("read", &path)(source),
            other => ImageError::io("read", dir)(std::io::Error::other(other)),
        })?;
        let mut memory = BTreeMap::new();
        for (path, pid) in maps {
            let pid = pid.and_then(|pid| u32::try_from(pid).ok());
            let found = match pid {
                Some(pid) => of_process(dir, &path, pid, &files, &chunks, common),
                None => of_shared(&path, &chunks, common),
            };
            for (of, composition) in found.map_err(refused)? {
                memory
                    .entry(of)
                    .or_insert_with(Composition::default)
                    .add(composition);
            }
        }
        Ok(Self {
            memory,
            sockets: files.sockets,
            chunks,
        })
    }

    /// All memory of one kind.
    pub fn by_kind(&self) -> BTreeMap<AreaKind, Composition> {
        let mut kinds: BTreeMap<_, Composition> = BTreeMap::new();
        for (memory, composition) in &self.memory {
            kinds.entry(memory.kind).or_default().add(*composition);
        }
        kinds
    }
}

type Found = Vec<(Memory, Composition)>;

/// The pages of a process, each with the mapping that it is in.
fn of_process(
    dir: &Path,
    map: &Path,
    pid: u32,
    files: &OpenFiles,
    chunks: &Chunks,
    common: Option<&Common>,
) -> Result<Found, CriuImageError> {
    let areas = areas(dir, pid)?;
    let mut found = Vec::new();
    each_run(map, |stream, vaddr, at, bytes| {
        let end = vaddr + bytes;
        let first = areas.partition_point(|area| area.end <= vaddr);
        for area in areas[first..].iter().take_while(|area| area.start < end) {
            let (from, to) = (vaddr.max(area.start), end.min(area.end));
            let (from, to) = (at + (from - vaddr), at + (to - vaddr));
            let composition = chunks.composition(stream, from, to, common);
            found.push((memory(pid, area, files), composition));
        }
    })?;
    Ok(found)
}

fn memory(pid: u32, area: &Area, files: &OpenFiles) -> Memory {
    let name = match area.kind {
        AreaKind::File => files.names.get(&area.object).cloned(),
        AreaKind::Shared => Some(area.object.to_string()),
        _ => None,
    };
    Memory {
        pid: Some(pid),
        kind: area.kind,
        name,
    }
}

/// `pagemap-shmem-<number>.img`.
fn of_shared(
    map: &Path,
    chunks: &Chunks,
    common: Option<&Common>,
) -> Result<Found, CriuImageError> {
    let name = map.file_stem().unwrap_or_default().to_string_lossy();
    let number = name.rsplit('-').next().unwrap_or_default().to_owned();
    let memory = Memory {
        pid: None,
        kind: AreaKind::Shared,
        name: Some(number),
    };
    let mut found = Vec::new();
    each_run(map, |stream, _, at, bytes| {
        let composition = chunks.composition(stream, at, at + bytes, common);
        found.push((memory.clone(), composition));
    })?;
    Ok(found)
}

/// Calls `each` with the stream, the address, the offset in the stream, and the bytes of each run of pages that the
/// image has.
fn each_run(map: &Path, mut each: impl FnMut(&str, u64, u64, u64)) -> Result<(), CriuImageError> {
    let page_size = rustix::param::page_size() as u64;
    let mut map = Pagemap::open(map)?;
    let stream = criu_path(Path::new(&pages_file(map.pages_id)));
    let mut at = 0_u64;
    while let Some(run) = map.next_run()? {
        if run.present() {
            let bytes = run.bytes(page_size);
            each(&stream, run.vaddr, at, bytes);
            at = at.saturating_add(bytes);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
