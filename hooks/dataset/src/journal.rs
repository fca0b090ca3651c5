//! Which parts are in a partial folder, so that a download that was killed continues.
//!
//! One line a part, written after its bytes. Neither is synced: after a kill the page cache has both;
//! after a power cut the journal may claim what the disk never got, so a claim is only believed when the
//! bytes, read back, have the checksum that it names.

use std::{
    collections::HashMap,
    fs::{File, OpenOptions},
    io::{Read, Write},
    path::Path,
    sync::{Mutex, PoisonError},
};

use rekindle_store::{StoreError, crc::Crc64};

/// A part: its file's place in the listing, and its own place in the file.
pub(crate) type PartId = (u32, u32);

/// 64 bytes a line at most, 16 million parts: 128 TB at 8 MiB a part.
const MAX_BYTES: u64 = 1 << 30;

#[derive(Debug)]
pub(crate) struct Journal(Mutex<File>);

impl Journal {
    /// Opens the journal at `path` with all that it claims. One of another part size is begun anew.
    pub(crate) fn open(
        path: &Path,
        part_size: u64,
    ) -> Result<(Self, HashMap<PartId, Crc64>), StoreError> {
        let head = format!("rekindle-parts 1 {part_size}");
        let mut text = String::new();
        if let Ok(file) = File::open(path) {
            // What is not text is not ours; then nothing is claimed.
            let _ = file.take(MAX_BYTES).read_to_string(&mut text);
        }
        let mut lines = text.split_inclusive('\n');
        let same = lines.next().is_some_and(|line| line.trim_end() == head);
        let claims = if same {
            lines.filter_map(claim).collect()
        } else {
            HashMap::new()
        };
        let begin = || -> std::io::Result<File> {
            let mut file = OpenOptions::new()
                .create(true)
                .write(true)
                .truncate(!same)
                .append(same)
                .open(path)?;
            if !same {
                writeln!(file, "{head}")?;
            } else if !text.ends_with('\n') {
                // The line that a kill cut short must not run into the next.
                writeln!(file)?;
            }
            Ok(file)
        };
        let file = begin().map_err(StoreError::io("write", path))?;
        Ok((Self(Mutex::new(file)), claims))
    }

    /// Notes a part whose bytes are written. A later line for the same part counts.
    pub(crate) fn note(&self, (file, part): PartId, crc: Crc64) -> std::io::Result<()> {
        let line = format!("{file} {part} {crc}\n");
        self.0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .write_all(line.as_bytes())
    }
}

fn claim(line: &str) -> Option<(PartId, Crc64)> {
    let mut words = line.strip_suffix('\n')?.split(' ');
    let id = (words.next()?.parse().ok()?, words.next()?.parse().ok()?);
    let crc = words.next()?.parse().ok()?;
    words.next().is_none().then_some((id, crc))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_torn_journal_claims_only_whole_lines() {
        let root = tempfile::tempdir().unwrap();
        let path = root.path().join("journal");
        let (journal, claims) = Journal::open(&path, 8).unwrap();
        assert!(claims.is_empty());
        for part in 0..3 {
            journal.note((1, part), Crc64(u64::from(part))).unwrap();
        }
        let text = std::fs::read_to_string(&path).unwrap();
        for cut in 0..=text.len() {
            std::fs::write(&path, &text[..cut]).unwrap();
            let (journal, claims) = Journal::open(&path, 8).unwrap();
            let whole = text[..cut].matches('\n').count().saturating_sub(1);
            assert_eq!(claims.len(), whole, "cut at {cut}");
            journal.note((7, 7), Crc64(7)).unwrap();
            let (_, again) = Journal::open(&path, 8).unwrap();
            // A line that lacks only its end is a claim as well, once there is a next one.
            assert!(
                (whole + 1..=whole + 2).contains(&again.len()),
                "cut at {cut}"
            );
            let true_claim = |(id, crc): (&PartId, &Crc64)| u64::from(id.1) == crc.0;
            assert!(again.iter().all(true_claim), "cut at {cut}: {again:?}");
            assert_eq!(again[&(7, 7)], Crc64(7));
        }
        assert!(
            Journal::open(&path, 16).unwrap().1.is_empty(),
            "another part size"
        );
    }
}
