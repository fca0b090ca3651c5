//! Files that were deleted and are still open, and the names under which a restore looks for them.

use std::{
    collections::HashMap,
    fs::File,
    io::BufReader,
    path::{Path, PathBuf},
};

use super::{CriuImageError, Records, folder::FILES_MAGIC, wire};

const REMAP_FPATH_MAGIC: u32 = 0x5913_3954;
/// `LINKED` of `images/remap-file-path.proto`. The others (`GHOST`: the content is in the image; `PROCFS`)
/// need nothing of ours.
const LINKED: u64 = 0;

/// A deleted file that still has another name, so that CRIU linked it back instead of saving its content.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LinkRemap {
    /// The name that it was deleted under, absolute in the container.
    pub deleted: PathBuf,
    /// The name that CRIU gave it, which a restore needs to find: `/dev/shm/link_remap.7`.
    pub link: PathBuf,
}

/// The deleted files that a restore of the image in `dir` will look for.
///
/// # Errors
/// When the images that list them cannot be read.
pub fn link_remaps(dir: &Path) -> Result<Vec<LinkRemap>, CriuImageError> {
    let mut wanted = Vec::new();
    each_record(&dir.join("remap-fpath.img"), REMAP_FPATH_MAGIC, |bytes| {
        let (mut file, mut link, mut kind) = (None, None, LINKED);
        wire::fields(bytes, |field, _| match field.number {
            1 => file = field.value,
            2 => link = field.value,
            3 => kind = field.value.unwrap_or(LINKED),
            _ => {}
        })?;
        if kind == LINKED {
            wanted.extend(file.zip(link));
        }
        Ok(())
    })?;
    if wanted.is_empty() {
        return Ok(Vec::new());
    }
    let path = dir.join("files.img");
    let mut names = HashMap::new();
    each_record(&path, FILES_MAGIC, |bytes| {
        let (mut id, mut regular) = (None, None);
        wire::fields(bytes, |field, _| match field.number {
            2 => id = field.value,
            3 => regular = Some(field.bytes),
            _ => {}
        })?;
        if let (Some(id), Some(regular)) = (id, regular) {
            wire::fields(regular, |field, _| {
                if field.number == 6 {
                    let name = String::from_utf8_lossy(field.bytes).into_owned();
                    names.insert(id, Path::new("/").join(name));
                }
            })?;
        }
        Ok(())
    })?;
    let found = wanted.iter().map(|(file, link)| {
        Some(LinkRemap {
            deleted: names.get(file)?.clone(),
            link: names.get(link)?.clone(),
        })
    });
    found
        .collect::<Option<Vec<_>>>()
        .ok_or(CriuImageError::Malformed {
            path,
            what: "it lacks a deleted file that remap-fpath.img names",
        })
}

/// The numbers of the deleted files whose content is in CRIU's own files.
///
/// # Errors
/// When the image that lists them cannot be read.
#[cfg(feature = "archives")]
pub(crate) fn kept(dir: &Path) -> Result<std::collections::HashSet<u64>, CriuImageError> {
    let mut kept = std::collections::HashSet::new();
    each_record(&dir.join("remap-fpath.img"), REMAP_FPATH_MAGIC, |bytes| {
        let (mut file, mut kind) = (None, LINKED);
        wire::fields(bytes, |field, _| match field.number {
            1 => file = field.value,
            3 => kind = field.value.unwrap_or(LINKED),
            _ => {}
        })?;
        kept.extend(file.filter(|_| kind != LINKED));
        Ok(())
    })?;
    Ok(kept)
}

/// Calls `each` with every record; an image that is not there has none.
pub(super) fn each_record(
    path: &Path,
    magic: u32,
    mut each: impl FnMut(&[u8]) -> Result<(), &'static str>,
) -> Result<(), CriuImageError> {
    let file = match File::open(path) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        other => other.map_err(|source| CriuImageError::Read {
            path: path.to_owned(),
            source,
        })?,
    };
    let mut records = Records::new(path, BufReader::new(file), magic)?;
    while let Some((_, bytes)) = records.next()? {
        each(&bytes).map_err(|what| records.malformed(what))?;
    }
    Ok(())
}
