//! `rekindle.json` beside a plain checkpoint: what CRIU's own files do not say.
//!
//! A checkpoint to a path that is not in our store (ctr, CRI) is a folder of CRIU's files that stock runc
//! can restore. This file beside them holds the dump's flags, which a restore must repeat, and what `fit`
//! compares. It proves nothing about the other files: a plain checkpoint is as good as whoever kept it.

use std::{
    fs::OpenOptions,
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
};

use rekindle_store::{StoreError, write_file};
use rustix::fs::OFlags;
use serde::{Deserialize, Serialize};

use crate::manifest::{Facts, ManifestError, declared_format, parse_json, read_bounded};

/// The format of this file, which is not that of images.
const FORMAT: u32 = 1;
/// Its name.
pub const PLAIN_FILE: &str = "rekindle.json";

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Plain {
    format: u32,
    facts: Facts,
}

/// Writes the facts beside the CRIU files in `dir`.
///
/// # Errors
/// What the file system says.
pub fn write(dir: &Path, facts: &Facts) -> Result<(), StoreError> {
    let path = file(dir);
    let plain = Plain {
        format: FORMAT,
        facts: facts.clone(),
    };
    let text =
        serde_json::to_vec_pretty(&plain).map_err(|e| StoreError::io("write", &path)(e.into()))?;
    write_file(&path, &text, false)
}

/// The facts beside the CRIU files in `dir`; none when this is not a checkpoint of ours.
///
/// # Errors
/// When there is such a file and it cannot be understood.
pub fn read(dir: &Path) -> Result<Option<Facts>, ManifestError> {
    let path = file(dir);
    let opened = OpenOptions::new()
        .read(true)
        .custom_flags((OFlags::NOFOLLOW | OFlags::NONBLOCK).bits().cast_signed())
        .open(&path);
    let mut opened = match opened {
        Ok(opened) => opened,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(source) => return Err(ManifestError::Read { path, source }),
    };
    let bytes = read_bounded(&path, &mut opened)?;
    let found = declared_format(&path, &bytes)?;
    if found != u64::from(FORMAT) {
        return Err(ManifestError::Format {
            path,
            found,
            reads: FORMAT,
        });
    }
    let plain: Plain = parse_json(&path, &bytes)?;
    plain.facts.check(&path)?;
    Ok(Some(plain.facts))
}

fn file(dir: &Path) -> PathBuf {
    dir.join(PLAIN_FILE)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::manifest::DumpFlags;

    #[test]
    fn the_flags_of_a_plain_checkpoint_are_remembered() {
        let dir = tempfile::tempdir().unwrap();
        assert!(read(dir.path()).unwrap().is_none());
        let facts = Facts {
            dump: DumpFlags {
                open_tcp: true,
                ..DumpFlags::default()
            },
            ..Facts::default()
        };
        write(dir.path(), &facts).unwrap();
        assert_eq!(read(dir.path()).unwrap(), Some(facts));
    }

    #[test]
    fn what_is_not_ours_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        for (text, words) in [
            ("{\"format\": 7}".to_owned(), "format 7"),
            ("{\"format\": 1}".to_owned(), "facts"),
            ("{".to_owned(), "damaged"),
            (" ".repeat(17 << 20), "17825792 bytes"),
        ] {
            std::fs::write(dir.path().join(PLAIN_FILE), text).unwrap();
            let refused = read(dir.path()).unwrap_err().to_string();
            assert!(refused.contains(words), "{refused}");
        }
        std::fs::remove_file(dir.path().join(PLAIN_FILE)).unwrap();
        std::os::unix::fs::symlink("/etc/passwd", dir.path().join(PLAIN_FILE)).unwrap();
        assert!(read(dir.path()).is_err());
    }
}
