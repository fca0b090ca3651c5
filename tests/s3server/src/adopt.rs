//! Files that somebody copied into a bucket get what an upload would have got: an ETag and a CRC-64/NVME,
//! as S3 computes them for every object. Without them s3s-fs hashes the whole file at every request.

use std::{
    fs::{self, File},
    io,
    path::Path,
};

use base64_simd::{STANDARD, URL_SAFE_NO_PAD};
use md5::{Digest, Md5};
use rekindle_store::crc;

/// Goes through all buckets below `root`. What already has its record is left alone.
pub(crate) fn adopt(root: &Path) -> io::Result<()> {
    for entry in fs::read_dir(root)? {
        let entry = entry?;
        let name = entry.file_name();
        let Some(bucket) = name.to_str().filter(|name| !name.starts_with('.')) else {
            continue;
        };
        if entry.file_type()?.is_dir() {
            adopt_folder(root, bucket, &entry.path(), "")?;
        }
    }
    Ok(())
}

fn adopt_folder(root: &Path, bucket: &str, folder: &Path, prefix: &str) -> io::Result<()> {
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        let name = entry.file_name();
        let Some(name) = name.to_str() else { continue };
        let key = format!("{prefix}{name}");
        if entry.file_type()?.is_dir() {
            adopt_folder(root, bucket, &entry.path(), &format!("{key}/"))?;
            continue;
        }
        // The name that s3s-fs looks for.
        let record = root.join(format!(
            ".bucket-{}.object-{}.internal.json",
            URL_SAFE_NO_PAD.encode_to_string(bucket),
            URL_SAFE_NO_PAD.encode_to_string(&key)
        ));
        if record.exists() {
            continue;
        }
        let mut hash = Hash(Md5::new());
        let (crc, _) = crc::copy(&mut File::open(entry.path())?, &mut hash)?;
        let md5: String = hash
            .0
            .finalize()
            .iter()
            .map(|b| format!("{b:02x}"))
            .collect();
        let text = serde_json::json!({
            "e_tag": md5,
            "checksum_crc64nvme": STANDARD.encode_to_string(crc.0.to_be_bytes()),
        });
        fs::write(record, text.to_string())?;
    }
    Ok(())
}

struct Hash(Md5);

impl io::Write for Hash {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.update(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
