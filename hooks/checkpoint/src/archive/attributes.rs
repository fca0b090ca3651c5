//! Extended attributes of one file, and their spelling in an archive.

use std::{
    ffi::{CStr, CString},
    io,
    os::{fd::AsFd, unix::ffi::OsStrExt},
    path::Path,
};

use rustix::fs::{XattrFlags, fgetxattr, flistxattr, fsetxattr};

use super::ArchiveError;

/// Before an attribute's name in a PAX key.
const KEY: &str = "REKINDLE.xattr.";
/// The key of a symlink's target that does not fit into a header.
pub(super) const LINK_KEY: &str = "REKINDLE.linkpath";
/// Linux's own bounds: `XATTR_LIST_MAX`, `XATTR_SIZE_MAX`.
const MAX: usize = 64 << 10;

/// What overlay writes for itself: hints that name the lower layer's inodes, wrong on any other mount. It
/// works without them.
const OVERLAY_HINTS: &[&str] = &["origin", "impure", "nlink", "upper", "uuid"];

/// The attributes of an open file, as PAX records.
pub(super) fn read(file: impl AsFd, path: &Path) -> Result<Vec<(String, Vec<u8>)>, ArchiveError> {
    let file = file.as_fd();
    let mut names = vec![0; MAX];
    let length = match flistxattr(file, &mut names[..]) {
        Ok(length) => length,
        Err(rustix::io::Errno::NOTSUP) => return Ok(Vec::new()),
        Err(e) => return Err(ArchiveError::io("list the attributes of", path)(e)),
    };
    let mut found = Vec::new();
    for name in names[..length].split_inclusive(|byte| *byte == 0) {
        let Ok(name) = CStr::from_bytes_with_nul(name) else {
            continue;
        };
        let Ok(text) = name.to_str() else { continue };
        match text
            .strip_prefix("trusted.overlay.")
            .or(text.strip_prefix("user.overlay."))
        {
            Some("metacopy") => return Err(ArchiveError::Metacopy(path.to_owned())),
            Some(hint) if OVERLAY_HINTS.contains(&hint) => continue,
            _ => {}
        }
        // Labels and signatures are the new node's to give; file capabilities are the container's own.
        if text.starts_with("security.") && text != "security.capability" {
            continue;
        }
        let mut value = vec![0; MAX];
        let length = fgetxattr(file, name, &mut value[..])
            .map_err(ArchiveError::io("read an attribute of", path))?;
        found.push((format!("{KEY}{text}"), to_hex(&value[..length])));
    }
    Ok(found)
}

/// Gives an open file an attribute, if this PAX record is one.
pub(super) fn write(
    file: impl AsFd,
    path: &Path,
    key: &[u8],
    value: &[u8],
) -> Result<(), ArchiveError> {
    let Some(name) = key.strip_prefix(KEY.as_bytes()) else {
        return Ok(());
    };
    let malformed = || ArchiveError::Malformed {
        path: path.to_owned(),
        source: io::Error::new(
            io::ErrorKind::InvalidData,
            "an attribute is not spelt as we spell it",
        ),
    };
    let name = CString::new(name).map_err(|_| malformed())?;
    let value = from_hex(value).ok_or_else(malformed)?;
    fsetxattr(file, name.as_c_str(), &value, XattrFlags::empty())
        .map_err(ArchiveError::io("write an attribute of", path))
}

/// The key of an attribute.
#[cfg(feature = "archives")]
pub(super) fn key(name: &str) -> String {
    format!("{KEY}{name}")
}

/// The attributes among these records; none where one is not spelt as we spell it.
#[cfg(feature = "archives")]
pub(super) fn decoded(records: &[(Vec<u8>, Vec<u8>)]) -> Option<Vec<(String, Vec<u8>)>> {
    let ours = records
        .iter()
        .filter_map(|(key, value)| Some((key.strip_prefix(KEY.as_bytes())?, value)));
    ours.map(|(name, value)| {
        let name = String::from_utf8(name.to_vec()).ok()?;
        Some((name, from_hex(value)?))
    })
    .collect()
}

/// Whether an attribute is taken over from what others have made, and given to them. Labels, signatures and what the
/// kernel keeps for its file systems are each node's own.
#[cfg(feature = "archives")]
pub(super) fn travels(name: &str) -> bool {
    let hint = name.starts_with("user.overlay.");
    name == "security.capability" || (name.starts_with("user.") && !hint)
}

pub(super) fn to_hex(bytes: &[u8]) -> Vec<u8> {
    bytes
        .iter()
        .flat_map(|byte| format!("{byte:02x}").into_bytes())
        .collect()
}

pub(super) fn from_hex(text: &[u8]) -> Option<Vec<u8>> {
    let digit = |byte: u8| (byte as char).to_digit(16).map(|digit| digit as u8);
    let pairs = text.chunks(2).map(|pair| match pair {
        [high, low] => Some(digit(*high)? << 4 | digit(*low)?),
        _ => None,
    });
    pairs.collect()
}

/// A path from an archive's bytes.
pub(super) fn path_of(bytes: &[u8]) -> &Path {
    Path::new(std::ffi::OsStr::from_bytes(bytes))
}
