//! Blobs into a registry.
//!
//! ```text
//!  begun (POST) ──▶ sent, chunk by chunk (PATCH) ──▶ completed under its digest (PUT) ──▶ there
//!     ▲                │ a chunk fails
//!     │                ▼
//!     └── lost ◀── how much of it is there? (GET) ──▶ sent on from there
//! ```

use std::{fs::File, os::unix::fs::FileExt as _, path::Path, sync::Arc, time::Duration};

use bytes::Bytes;
use hyper::{
    HeaderMap, Method, Uri,
    header::{CONTENT_RANGE, CONTENT_TYPE, HeaderValue, RANGE},
};

use super::{
    Answer, Ask, Failure, Registry, RegistryError, auth::Scope, location, manifests::digest,
};
use crate::StoreError;

/// Slower than this an upload has stalled.
const SLOWEST: u64 = 64 << 10;
/// A registry that puts a blob together, and hashes it, answers when it is done.
const COMPLETING: u32 = 8;
/// A registry that takes chunks of no less than this is asked for more memory than it gets.
const LARGEST_CHUNK: u64 = 256 << 20;
const OCTETS: HeaderValue = HeaderValue::from_static("application/octet-stream");

/// An upload that was begun.
struct Upload {
    to: Uri,
    /// Bytes that the registry has of it.
    at: u64,
    chunk: u64,
}

impl Registry {
    /// With the time that so many bytes take on a slow link.
    pub(super) fn upload_stall(&self, bytes: u64) -> Duration {
        self.limits.tuning.stall + Duration::from_secs(bytes / SLOWEST)
    }

    fn to<'a>(&self, doing: &'a str, method: Method, to: Uri, body: Bytes) -> Ask<'a> {
        Ask {
            doing,
            method,
            to,
            scope: Scope::Push,
            headers: vec![(CONTENT_TYPE, OCTETS)],
            stall: self.upload_stall(body.len() as u64),
            body,
        }
    }

    /// Puts a small blob there by one request, whose SHA-256 is known.
    ///
    /// # Errors
    /// What the registry says.
    pub async fn put_blob(&self, sha256: [u8; 32], bytes: Bytes) -> Result<(), RegistryError> {
        let digest = digest(sha256);
        let doing = &format!("writing {digest} of {}", self.uri());
        let mut attempts = self.attempts(doing);
        loop {
            match self.put_once(doing, &digest, &bytes).await {
                Ok(()) => return Ok(()),
                Err(failure) => attempts.after(failure).await?,
            }
        }
    }

    async fn put_once(&self, doing: &str, digest: &str, bytes: &Bytes) -> Result<(), Failure> {
        let upload = self.begin_once(doing).await?;
        let to = completed(doing, &upload.to, digest)?;
        let ask = self.to(doing, Method::PUT, to, bytes.clone());
        self.ask(&ask).await.map(drop).map_err(lost)
    }

    /// Puts a file of `size` bytes there, whose SHA-256 is known, chunk by chunk where it is larger than one; the registry
    /// compares it. What a broken upload has brought there is not sent again, where the registry has kept it. `sent` is
    /// told of bytes that are there.
    ///
    /// # Errors
    /// What the registry or the file system says.
    pub async fn put_file(
        &self,
        (file, path): (File, &Path),
        (size, sha256): (u64, [u8; 32]),
        sent: &(dyn Fn(u64) + Sync),
    ) -> Result<(), RegistryError> {
        let source = Source {
            file: Arc::new(file),
            path,
            size,
        };
        if size <= self.limits.part_size {
            let bytes = source.read(0, size).await?;
            self.put_blob(sha256, bytes).await?;
            sent(size);
        } else {
            self.put_chunks(&digest(sha256), &source, sent).await?;
        }
        // A registry that took it and does not have it is told of here, and not by whoever needs it.
        let digest = digest(sha256);
        match self.blob_size(&digest).await? {
            Some(found) if found == size => Ok(()),
            found => Err(RegistryError::Answer {
                doing: format!("writing {digest} of {}", self.uri()),
                answer: format!(
                    "{size} bytes were put, and the registry has {}",
                    found.map_or_else(|| "nothing".to_owned(), |found| found.to_string())
                ),
            }),
        }
    }

    async fn put_chunks(
        &self,
        digest: &str,
        source: &Source<'_>,
        sent: &(dyn Fn(u64) + Sync),
    ) -> Result<(), RegistryError> {
        let doing = &format!("writing {digest} of {}", self.uri());
        let mut told = 0;
        let mut attempts = self.attempts(doing);
        let mut upload: Option<Upload> = None;
        loop {
            let before = told;
            let mut there = |at: u64| {
                sent(at.saturating_sub(told));
                told = told.max(at);
            };
            let ended = self.advance(&mut upload, doing, source, digest, &mut there);
            let Err(failure) = ended.await else {
                return Ok(());
            };
            if told > before {
                attempts.patience.renew();
            }
            if let Err(error) = attempts.after(failure).await {
                self.abandon(upload, doing).await;
                return Err(error);
            }
            self.look(&mut upload, doing).await;
        }
    }

    /// Begins an upload where there is none, and goes on with it until it is complete.
    async fn advance(
        &self,
        upload: &mut Option<Upload>,
        doing: &str,
        source: &Source<'_>,
        digest: &str,
        there: &mut (dyn FnMut(u64) + Send),
    ) -> Result<(), Failure> {
        let begun = match upload.take() {
            Some(upload) => upload,
            None => self.begin_once(doing).await?,
        };
        let upload = upload.insert(begun);
        while upload.at < source.size {
            let length = upload.chunk.min(source.size - upload.at);
            let bytes = source
                .read(upload.at, length)
                .await
                .map_err(Failure::Final)?;
            self.send(upload, doing, bytes).await.map_err(lost)?;
            there(upload.at.min(source.size));
        }
        if upload.at > source.size {
            let reason = "the registry says that it has more than was sent";
            return Err(Failure::answer(doing, reason));
        }
        let to = completed(doing, &upload.to, digest)?;
        let mut ask = self.to(doing, Method::PUT, to, Bytes::new());
        ask.stall *= COMPLETING;
        match self.ask(&ask).await {
            Ok(_) => Ok(()),
            // An attempt whose answer was lost may have completed it: then the upload is gone, and the blob is there.
            Err(failure) => match self.blob_size(digest).await {
                Ok(Some(found)) if found == source.size => Ok(()),
                _ => Err(lost(failure)),
            },
        }
    }

    async fn begin_once(&self, doing: &str) -> Result<Upload, Failure> {
        let to = self.at("blobs/uploads/").map_err(Failure::Final)?;
        let (answer, from) = self
            .ask(&self.to(doing, Method::POST, to, Bytes::new()))
            .await?;
        let least = answer.headers().get("oci-chunk-min-length");
        let least = least.and_then(|least| least.to_str().ok()?.parse().ok());
        let chunk = self.limits.part_size.max(least.unwrap_or(0));
        if chunk > LARGEST_CHUNK.max(self.limits.part_size) {
            let reason = format!("it takes chunks of no less than {chunk} bytes");
            return Err(Failure::answer(doing, reason));
        }
        Ok(Upload {
            to: location(doing, &answer, &from)?,
            at: 0,
            chunk,
        })
    }

    /// Sends a chunk.
    async fn send(&self, upload: &mut Upload, doing: &str, bytes: Bytes) -> Result<(), Failure> {
        let end = upload.at + bytes.len() as u64;
        let range = format!("{}-{}", upload.at, end.saturating_sub(1));
        let mut ask = self.to(doing, Method::PATCH, upload.to.clone(), bytes);
        ask.headers.extend(
            HeaderValue::try_from(range)
                .ok()
                .map(|of| (CONTENT_RANGE, of)),
        );
        let (answer, from) = self.ask(&ask).await?;
        upload.to = location(doing, &answer, &from)?;
        // It may have taken less.
        upload.at = has(answer.headers()).unwrap_or(end);
        Ok(())
    }

    /// Asks how much of an upload is there; one that the registry does not know any more is none.
    async fn look(&self, upload: &mut Option<Upload>, doing: &str) {
        let Some(begun) = upload.take() else { return };
        let mut ask = self.to(doing, Method::GET, begun.to.clone(), Bytes::new());
        ask.headers.clear();
        if let Ok((answer, from)) = self.ask(&ask).await
            && let Some(at) = has(answer.headers())
        {
            let to = location(doing, &answer, &from).unwrap_or(begun.to);
            *upload = Some(Upload { to, at, ..begun });
        }
    }

    /// Ends an upload that will not be completed. What cannot be ended now is for the registry's own rule for those.
    async fn abandon(&self, upload: Option<Upload>, doing: &str) {
        if let Some(upload) = upload {
            let ask = self.to(doing, Method::DELETE, upload.to, Bytes::new());
            let _: Result<(Answer, Uri), Failure> = self.ask(&ask).await;
        }
    }
}

/// An upload that the registry does not know any more, or has otherwise, is begun anew.
fn lost(failure: Failure) -> Failure {
    match failure {
        Failure::Final(
            RegistryError::Missing { answer, .. } | RegistryError::Offset { answer, .. },
        ) => Failure::again(format!("the registry has lost the upload ({answer})")),
        other => other,
    }
}

/// How many bytes of an upload the registry has: `Range: 0-<last>`. Of none some say `0-0`, as of one: sent again, that
/// one is refused, and the upload begun anew.
fn has(headers: &HeaderMap) -> Option<u64> {
    let range = headers.get(RANGE)?.to_str().ok()?;
    let (first, last) = range.trim_start_matches("bytes=").split_once('-')?;
    let last: u64 = last.trim().parse().ok()?;
    if first.trim() != "0" {
        return None;
    }
    if last == 0 {
        Some(0)
    } else {
        last.checked_add(1)
    }
}

/// Where an upload is completed under a digest.
fn completed(doing: &str, to: &Uri, digest: &str) -> Result<Uri, Failure> {
    let joint = if to.query().is_some() { '&' } else { '?' };
    let digest = super::http::encoded(digest);
    let to = format!("{to}{joint}digest={digest}").parse();
    to.map_err(|_| Failure::answer(doing, "the answer leads nowhere"))
}

/// A file that is put into a registry.
struct Source<'a> {
    file: Arc<File>,
    path: &'a Path,
    size: u64,
}

impl Source<'_> {
    async fn read(&self, at: u64, length: u64) -> Result<Bytes, RegistryError> {
        let file = Arc::clone(&self.file);
        let read = tokio::task::spawn_blocking(move || {
            let mut bytes = vec![0; length as usize];
            file.read_exact_at(&mut bytes, at)?;
            Ok(Bytes::from(bytes))
        });
        let read = read.await.map_err(std::io::Error::other);
        let read = read.and_then(|read| read);
        Ok(read.map_err(StoreError::io("read", self.path))?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_registry_has_is_said_by_its_range() {
        let of = |range: &str| {
            let mut headers = HeaderMap::new();
            headers.insert(RANGE, range.parse().unwrap());
            has(&headers)
        };
        assert_eq!(of("0-9"), Some(10));
        assert_eq!(of("bytes=0-9"), Some(10));
        assert_eq!(of("0-0"), Some(0));
        for bad in ["5-9", "0", "0--1", "0-x", "0-18446744073709551615x"] {
            assert_eq!(of(bad), None, "{bad}");
        }
        assert_eq!(has(&HeaderMap::new()), None);
    }
}
