//! What a folder of CRIU's images must be before CRIU, running as root, may read it.

use std::{collections::HashMap, fs, io::Read, path::Path};

use super::{COMMON_MAGIC, CriuImageError, PE_PARENT, Pagemap, pages_file};

/// The inventory has no common magic before its own.
const INVENTORY_MAGIC: u32 = 0x5831_3116;
pub(super) const FILES_MAGIC: u32 = 0x5630_3138;
pub(super) const CORE_MAGIC: u32 = 0x5505_3847;

/// How a file of that name begins: its second word (`criu/include/magic.h`). Longest prefix first where
/// one is the beginning of another.
const MAGICS: &[(&str, u32)] = &[
    ("pagemap-", super::PAGEMAP_MAGIC),
    ("pstree.", 0x5027_3030),
    ("core-", CORE_MAGIC),
    ("mm-", 0x5749_2820),
    ("fdinfo-", 0x5621_3732),
    ("ids-", 0x5443_2030),
    ("fs-", 0x5140_3912),
    ("files.", FILES_MAGIC),
    ("utsns-", 0x5447_3203),
    ("mountpoints-", 0x5556_3928),
    ("cgroup.", 0x5938_3330),
    ("seccomp.", 0x6441_3049),
];

/// Checks that the folder is an image of its own: the files that every image has, each beginning as its
/// name demands, and no pagemap claiming a page that the folder does not hold.
///
/// # Errors
/// The first file that is wrong, and why.
pub fn check_folder(dir: &Path) -> Result<(), CriuImageError> {
    let read = |path: &Path| {
        let path = path.to_owned();
        |source| CriuImageError::Read { path, source }
    };
    for required in ["inventory.img", "pstree.img"] {
        if !dir.join(required).is_file() {
            return Err(CriuImageError::Absent(required));
        }
    }
    let page_size = rustix::param::page_size() as u64;
    let mut claims: HashMap<u32, u64> = HashMap::new();
    for entry in fs::read_dir(dir).map_err(read(dir))? {
        let path = entry.map_err(read(dir))?.path();
        let Some(name) = path.file_name().and_then(|name| name.to_str()) else {
            continue;
        };
        check_magic(&path, name)?;
        if name.starts_with("pagemap-") {
            check_pagemap(dir, &path, page_size, &mut claims)?;
        }
    }
    Ok(())
}

fn check_magic(path: &Path, name: &str) -> Result<(), CriuImageError> {
    let wanted = match MAGICS.iter().find(|(prefix, _)| name.starts_with(prefix)) {
        Some((_, magic)) => [COMMON_MAGIC, *magic],
        None if name == "inventory.img" => [INVENTORY_MAGIC, 0],
        None => return Ok(()),
    };
    let mut head = [0; 8];
    let read = fs::File::open(path).and_then(|mut file| file.read_exact(&mut head));
    let [a, b, c, d, rest @ ..] = head;
    let found = [u32::from_le_bytes([a, b, c, d]), u32::from_le_bytes(rest)];
    let fits = found[0] == wanted[0] && (wanted[1] == 0 || found[1] == wanted[1]);
    if read.is_err() || !fits {
        return Err(CriuImageError::Magic(path.to_owned()));
    }
    Ok(())
}

fn check_pagemap(
    dir: &Path,
    path: &Path,
    page_size: u64,
    claims: &mut HashMap<u32, u64>,
) -> Result<(), CriuImageError> {
    let mut map = Pagemap::open(path)?;
    let pages = pages_file(map.pages_id);
    // A pagemap without present pages needs no pages file.
    let held = fs::metadata(dir.join(&pages)).map_or(0, |file| file.len() / page_size);
    let claimed = claims.entry(map.pages_id).or_default();
    while let Some(run) = map.next_run()? {
        if run.flags & PE_PARENT != 0 || run.left_behind() {
            return Err(CriuImageError::Elsewhere {
                path: path.to_owned(),
                vaddr: run.vaddr,
                place: if run.left_behind() {
                    "still in the dumped process"
                } else {
                    "in a parent image"
                },
            });
        }
        if run.present() {
            *claimed = claimed.saturating_add(run.pages);
        }
        if *claimed > held {
            return Err(CriuImageError::Claim {
                path: path.to_owned(),
                claimed: *claimed,
                pages_file: pages,
                held,
            });
        }
    }
    Ok(())
}
