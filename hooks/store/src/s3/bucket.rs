//! Objects below a prefix of one bucket: small ones whole, large ones in parallel parts, either way.
//!
//! Nothing that comes from the store is believed. What is asked for is compared with the size that the asker knows, and
//! never more than that is taken; what the bytes are has to be proved by whoever wants them, for a store can give any.
//! What goes to the store is signed with its SHA-256, which stores compare before they take it.

use std::{fs::File, os::unix::fs::FileExt as _, path::Path, sync::Arc};

use aws_sdk_s3::{
    Client,
    primitives::ByteStream,
    types::{CompletedMultipartUpload, CompletedPart},
};
use bytes::{Bytes, BytesMut};
use futures::{
    Stream,
    stream::{self, StreamExt, TryStreamExt},
};
use rekindle_core::config::S3Access;
use sha2::{Digest, Sha256};

use super::{Failure, Patience, S3Error, Tuning, classify, client, persist, sentence, stalled};
use crate::StoreError;

/// S3 takes no more parts of one object.
const MAX_PARTS: u64 = 10_000;
/// S3 takes no smaller part, but for the last.
const MIN_PART: u64 = 5 << 20;
/// Slower than this an upload has stalled.
const SLOWEST: u64 = 64 << 10;
/// A store that puts the parts of an object together answers when it is done: a part costs it milliseconds.
const COMPLETING: u32 = 8;

/// How much is in flight at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Parallel requests.
    pub concurrency: usize,
    /// Bytes of one part.
    pub part_size: u64,
    /// How patient they are.
    pub tuning: Tuning,
}

/// What must be true for an object to be written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Condition {
    /// Nothing.
    Always,
    /// It is not there.
    Absent,
    /// It has this ETag.
    Is(String),
}

/// A small object.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Small {
    /// All of it.
    pub bytes: Bytes,
    /// What the store calls this state of it.
    pub etag: Option<String>,
}

/// An object, as a listing tells of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Object {
    /// Its key, below the prefix.
    pub key: String,
    /// Its bytes.
    pub size: u64,
    /// When it was written, in seconds since 1970 by the store's clock; none where the store does not say.
    pub modified: Option<i64>,
}

/// What lies below a prefix of a bucket.
#[derive(Debug)]
pub struct Bucket {
    client: Client,
    name: String,
    prefix: String,
    limits: Limits,
}

impl Bucket {
    /// The keys of bucket `name` that begin with `prefix`. Nothing is asked of the store yet.
    ///
    /// # Errors
    /// [`S3Error::Access`].
    pub async fn open(
        access: &S3Access,
        name: &str,
        prefix: &str,
        limits: Limits,
    ) -> Result<Self, S3Error> {
        Ok(Self {
            client: client(access, limits.concurrency).await?,
            name: name.to_owned(),
            prefix: prefix.to_owned(),
            limits,
        })
    }

    /// `s3://bucket/prefix/key`.
    pub fn uri(&self, key: &str) -> String {
        format!("s3://{}/{}{key}", self.name, self.prefix)
    }

    fn key(&self, key: &str) -> String {
        format!("{}{key}", self.prefix)
    }

    /// How large an object is; none where there is none.
    ///
    /// # Errors
    /// What the store says.
    pub async fn size(&self, key: &str) -> Result<Option<u64>, S3Error> {
        let doing = || format!("looking at {}", self.uri(key));
        let sent = persist(self.limits.tuning, &doing, || {
            let head = self.client.head_object().bucket(&self.name);
            head.key(self.key(key)).send()
        });
        match sent.await {
            Ok(head) => Ok(head.content_length().and_then(|n| u64::try_from(n).ok())),
            Err(S3Error::Missing { .. }) => Ok(None),
            Err(other) => Err(other),
        }
    }

    /// All of an object of at most `max` bytes; none where there is none.
    ///
    /// # Errors
    /// What the store says; [`S3Error::Answer`] for one that is larger.
    pub async fn small(&self, key: &str, max: u64) -> Result<Option<Small>, S3Error> {
        let doing = || format!("fetching {}", self.uri(key));
        let mut patience = Patience::new(self.limits.tuning);
        loop {
            let last = match self.small_once(key, max, &doing).await {
                Ok(small) => return Ok(Some(small)),
                Err(Failure::Final(S3Error::Missing { .. })) => return Ok(None),
                Err(Failure::Final(error)) => return Err(error),
                Err(Failure::Again(reason)) => reason,
            };
            if !patience.wait().await {
                return Err(patience.ended(doing(), last));
            }
        }
    }

    async fn small_once(
        &self,
        key: &str,
        max: u64,
        doing: &impl Fn() -> String,
    ) -> Result<Small, Failure> {
        let stall = self.limits.tuning.stall;
        let get = self.client.get_object().bucket(&self.name);
        let answer = tokio::time::timeout(stall, get.key(self.key(key)).send()).await;
        let answer = answer.map_err(|_| Failure::Again(stalled(stall)))?;
        let mut answer = answer.map_err(|error| classify(&error, doing))?;
        let mut bytes = BytesMut::new();
        loop {
            let piece = tokio::time::timeout(stall, answer.body.next()).await;
            match piece.map_err(|_| Failure::Again(stalled(stall)))? {
                Some(Ok(piece)) if (bytes.len() + piece.len()) as u64 > max => {
                    return Err(Failure::Final(S3Error::Answer {
                        doing: doing(),
                        answer: format!("it has more than the {max} bytes that are read of it"),
                    }));
                }
                Some(Ok(piece)) => bytes.extend_from_slice(&piece),
                Some(Err(e)) => return Err(Failure::Again(broke_off(&e))),
                None => break,
            }
        }
        Ok(Small {
            bytes: bytes.freeze(),
            etag: answer.e_tag,
        })
    }

    /// An object of `size` bytes, in its order, fetched in parallel parts of which at most as many as may be in flight
    /// are held. Dropped, it stops.
    pub fn read(
        self: Arc<Self>,
        key: String,
        size: u64,
    ) -> impl Stream<Item = Result<Bytes, S3Error>> + Send {
        let part = self.limits.part_size;
        let concurrency = self.limits.concurrency;
        let starts = (0..size.div_ceil(part)).map(move |n| n * part);
        let parts = starts.map(move |start| {
            let (bucket, key) = (Arc::clone(&self), key.clone());
            async move {
                let end = size.min(start + part);
                bucket.part(&key, start..end, size).await
            }
        });
        stream::iter(parts).buffered(concurrency)
    }

    /// How many requests for parts of an object are on their way at once.
    pub fn concurrency(&self) -> usize {
        self.limits.concurrency
    }

    /// Some bytes of an object of `size` bytes; what was received of them is not asked for again.
    ///
    /// # Errors
    /// What the store says.
    pub async fn part(
        &self,
        key: &str,
        range: std::ops::Range<u64>,
        size: u64,
    ) -> Result<Bytes, S3Error> {
        let doing = || format!("fetching {}", self.uri(key));
        let mut patience = Patience::new(self.limits.tuning);
        let mut bytes = BytesMut::new();
        let wanted = (range.end - range.start) as usize;
        while bytes.len() < wanted {
            let before = bytes.len();
            let rest = range.start + before as u64..range.end;
            let last = match self.part_once(key, rest, size, &mut bytes, &doing).await {
                Ok(()) => continue,
                Err(Failure::Final(error)) => return Err(error),
                Err(Failure::Again(reason)) => reason,
            };
            if bytes.len() > before {
                patience.renew();
            }
            if !patience.wait().await {
                return Err(patience.ended(doing(), last));
            }
        }
        Ok(bytes.freeze())
    }

    async fn part_once(
        &self,
        key: &str,
        range: std::ops::Range<u64>,
        size: u64,
        into: &mut BytesMut,
        doing: &impl Fn() -> String,
    ) -> Result<(), Failure> {
        let stall = self.limits.tuning.stall;
        let asked = format!("bytes={}-{}", range.start, range.end - 1);
        let get = self.client.get_object().bucket(&self.name);
        let get = get.key(self.key(key)).range(asked).send();
        let answer = tokio::time::timeout(stall, get).await;
        let answer = answer.map_err(|_| Failure::Again(stalled(stall)))?;
        let mut answer = answer.map_err(|error| classify(&error, doing))?;
        let wanted = format!("bytes {}-{}/{size}", range.start, range.end - 1);
        match answer.content_range() {
            Some(found) if found == wanted => {}
            None if (range.start, range.end) == (0, size) => {}
            other => {
                return Err(Failure::Final(S3Error::Answer {
                    doing: doing(),
                    answer: format!("asked for {wanted:?}, got Content-Range {other:?}"),
                }));
            }
        }
        let mut left = (range.end - range.start) as usize;
        loop {
            let piece = tokio::time::timeout(stall, answer.body.next()).await;
            match piece.map_err(|_| Failure::Again(stalled(stall)))? {
                Some(Ok(piece)) if piece.len() > left => {
                    let reason = "the body is longer than what was asked for";
                    return Err(Failure::Again(reason.to_owned()));
                }
                Some(Ok(piece)) => {
                    left -= piece.len();
                    into.extend_from_slice(&piece);
                }
                Some(Err(e)) => return Err(Failure::Again(broke_off(&e))),
                None if left > 0 => {
                    let reason = "the body is shorter than announced";
                    return Err(Failure::Again(reason.to_owned()));
                }
                None => return Ok(()),
            }
        }
    }

    /// Writes a small object, under a condition where the store knows such; false when that was not met.
    ///
    /// # Errors
    /// What the store says.
    pub async fn put(
        &self,
        key: &str,
        bytes: Bytes,
        condition: &Condition,
    ) -> Result<bool, S3Error> {
        let doing = || format!("writing {}", self.uri(key));
        let tuning = self.upload_tuning(bytes.len() as u64);
        let send = |condition: Condition| {
            let bytes = bytes.clone();
            async move {
                let sent = persist(tuning, &doing, || {
                    let put = self.client.put_object().bucket(&self.name);
                    let put = put.key(self.key(key)).body(ByteStream::from(bytes.clone()));
                    let put = match &condition {
                        Condition::Always => put,
                        Condition::Absent => put.if_none_match("*"),
                        Condition::Is(etag) => put.if_match(etag),
                    };
                    put.send()
                });
                sent.await.map(drop)
            }
        };
        match send(condition.clone()).await {
            Err(S3Error::Changed { .. }) if *condition != Condition::Always => Ok(false),
            // Some stores have no such conditions. Of two who write at once one is lost then.
            Err(S3Error::Unsupported { .. }) if *condition != Condition::Always => {
                send(Condition::Always).await.map(|()| true)
            }
            ended => ended.map(|()| true),
        }
    }

    /// Writes a file of `size` bytes whose SHA-256 is known, and of which the key tells what it is, in parallel parts where it is larger than one. The file is
    /// compared with that on its way, and an object appears only when all of it is right. `sent` is told of bytes that
    /// the store has.
    ///
    /// # Errors
    /// What the store or the file system says; [`S3Error::Changed`] when the file is another one by now.
    pub async fn put_file(
        &self,
        key: &str,
        (file, path): (File, &Path),
        (size, sha256): (u64, [u8; 32]),
        sent: &(dyn Fn(u64) + Sync),
    ) -> Result<(), S3Error> {
        let source = Source {
            file: Arc::new(file),
            path,
            sha256,
        };
        let part = self.limits.part_size.max(MIN_PART);
        if size <= part {
            let (bytes, hash) = source.read(0, size, Sha256::new()).await?;
            source.compare(hash)?;
            self.put(key, bytes, &Condition::Always).await?;
            sent(size);
        } else {
            self.put_parts(key, &source, size, sent).await?;
        }
        // A store that took it and does not have it is told of here, and not by whoever needs it.
        match self.size(key).await? {
            Some(found) if found == size => Ok(()),
            found => Err(S3Error::Answer {
                doing: format!("writing {}", self.uri(key)),
                answer: format!(
                    "{size} bytes were put, and the store has {}",
                    found.map_or_else(|| "nothing".to_owned(), |found| found.to_string())
                ),
            }),
        }
    }

    async fn put_parts(
        &self,
        key: &str,
        source: &Source<'_>,
        size: u64,
        sent: &(dyn Fn(u64) + Sync),
    ) -> Result<(), S3Error> {
        let doing = || format!("writing {}", self.uri(key));
        let begun = persist(self.limits.tuning, &doing, || {
            let create = self.client.create_multipart_upload().bucket(&self.name);
            create.key(self.key(key)).send()
        });
        let upload = begun.await?.upload_id.ok_or_else(|| S3Error::Answer {
            doing: doing(),
            answer: "the store gave the upload no id".to_owned(),
        })?;
        let ended = match self.send_parts(key, &upload, source, size, sent).await {
            Ok(parts) => self.complete(key, &upload, parts, size).await,
            Err(error) => Err(error),
        };
        if ended.is_err() {
            let abort = self.client.abort_multipart_upload().bucket(&self.name);
            let abort = abort.key(self.key(key)).upload_id(&upload).send();
            // What cannot be removed now is for the bucket's own rule for uploads that were not completed.
            let _ = tokio::time::timeout(self.limits.tuning.stall, abort).await;
        }
        ended
    }

    async fn send_parts(
        &self,
        key: &str,
        upload: &str,
        source: &Source<'_>,
        size: u64,
        sent: &(dyn Fn(u64) + Sync),
    ) -> Result<Vec<CompletedPart>, S3Error> {
        let part = self.limits.part_size.max(MIN_PART);
        // Whole MiB, so that parts begin where pages of the file do.
        let part = part.max(size.div_ceil(MAX_PARTS).next_multiple_of(1 << 20));
        let pieces = stream::try_unfold((0_u64, Sha256::new()), |(start, hash)| async move {
            if start >= size {
                source.compare(hash)?;
                return Ok(None);
            }
            let (bytes, hash) = source.read(start, part.min(size - start), hash).await?;
            Ok::<_, S3Error>(Some(((start / part, bytes), (start + part, hash))))
        });
        let sending = pieces.map_ok(|(index, bytes)| async move {
            let length = bytes.len() as u64;
            let number = i32::try_from(index + 1).unwrap_or(i32::MAX);
            let done = self.send_part(key, upload, number, bytes).await?;
            sent(length);
            Ok(done)
        });
        let mut parts: Vec<CompletedPart> = sending
            .try_buffer_unordered(self.limits.concurrency)
            .try_collect()
            .await?;
        parts.sort_by_key(CompletedPart::part_number);
        Ok(parts)
    }

    async fn send_part(
        &self,
        key: &str,
        upload: &str,
        number: i32,
        bytes: Bytes,
    ) -> Result<CompletedPart, S3Error> {
        let doing = || format!("writing part {number} of {}", self.uri(key));
        let tuning = self.upload_tuning(bytes.len() as u64);
        let sent = persist(tuning, &doing, || {
            let put = self.client.upload_part().bucket(&self.name);
            let put = put.key(self.key(key)).upload_id(upload).part_number(number);
            put.body(ByteStream::from(bytes.clone())).send()
        });
        let etag = sent.await?.e_tag;
        let part = CompletedPart::builder().part_number(number);
        Ok(part.set_e_tag(etag).build())
    }

    async fn complete(
        &self,
        key: &str,
        upload: &str,
        parts: Vec<CompletedPart>,
        size: u64,
    ) -> Result<(), S3Error> {
        let doing = || format!("writing {}", self.uri(key));
        let parts = CompletedMultipartUpload::builder().set_parts(Some(parts));
        let parts = parts.build();
        let tuning = Tuning {
            stall: self.limits.tuning.stall * COMPLETING,
            ..self.limits.tuning
        };
        let sent = persist(tuning, &doing, || {
            let complete = self.client.complete_multipart_upload().bucket(&self.name);
            let complete = complete.key(self.key(key)).upload_id(upload);
            complete.multipart_upload(parts.clone()).send()
        });
        match sent.await.map(drop) {
            Ok(()) => Ok(()),
            // An attempt whose answer was lost may have completed it: then the upload is gone, which each store says in
            // its own way, and the object is there.
            Err(error) => match self.size(key).await? {
                Some(found) if found == size => Ok(()),
                _ => Err(error),
            },
        }
    }

    /// With the time that so many bytes take on a slow link.
    fn upload_tuning(&self, bytes: u64) -> Tuning {
        let tuning = self.limits.tuning;
        Tuning {
            stall: tuning.stall + std::time::Duration::from_secs(bytes / SLOWEST),
            ..tuning
        }
    }

    /// The keys that begin with `start`, at most `max` of them, in the store's order.
    ///
    /// # Errors
    /// As [`Bucket::objects`].
    pub async fn list(&self, start: &str, max: usize) -> Result<Vec<String>, S3Error> {
        let objects = self.objects(start, max).await?;
        Ok(objects.into_iter().map(|object| object.key).collect())
    }

    /// The objects whose keys begin with `start`, at most `max` of them, in the store's order.
    ///
    /// # Errors
    /// What the store says; [`S3Error::Answer`] for one that has more, or whose listing does not end.
    pub async fn objects(&self, start: &str, max: usize) -> Result<Vec<Object>, S3Error> {
        let doing = || format!("listing {}", self.uri(start));
        let refuse = |answer: String| S3Error::Answer {
            doing: doing(),
            answer,
        };
        let mut found = Vec::new();
        let mut token: Option<String> = None;
        // A page has up to 1,000 keys; one without any is no reason to go on for ever.
        for _ in 0..=max / 1000 + 100 {
            let sent = persist(self.limits.tuning, &doing, || {
                let list = self.client.list_objects_v2().bucket(&self.name);
                let list = list.prefix(self.key(start));
                list.set_continuation_token(token.clone()).send()
            });
            let page = sent.await?;
            for object in page.contents() {
                // A store may list what it was not asked for.
                let key = object.key().and_then(|key| key.strip_prefix(&self.prefix));
                found.extend(key.filter(|key| key.starts_with(start)).map(|key| {
                    Object {
                        key: key.to_owned(),
                        size: object
                            .size()
                            .and_then(|n| u64::try_from(n).ok())
                            .unwrap_or(0),
                        modified: object
                            .last_modified()
                            .map(aws_sdk_s3::primitives::DateTime::secs),
                    }
                }));
            }
            if found.len() > max {
                return Err(refuse(format!("there are more than {max}")));
            }
            token = page.next_continuation_token().map(str::to_owned);
            if !page.is_truncated().unwrap_or_default() || token.is_none() {
                return Ok(found);
            }
        }
        Err(refuse("the store's pages do not end".to_owned()))
    }
}

impl Bucket {
    /// Removes an object; one that is not there is removed.
    ///
    /// # Errors
    /// What the store says.
    pub async fn delete(&self, key: &str) -> Result<(), S3Error> {
        let doing = || format!("removing {}", self.uri(key));
        let sent = persist(self.limits.tuning, &doing, || {
            let delete = self.client.delete_object().bucket(&self.name);
            delete.key(self.key(key)).send()
        });
        match sent.await {
            Ok(_) | Err(S3Error::Missing { .. }) => Ok(()),
            Err(other) => Err(other),
        }
    }
}

fn broke_off(error: &impl std::error::Error) -> String {
    format!("the body broke off: {}", sentence(error))
}

/// A file that is put into a store.
struct Source<'a> {
    file: Arc<File>,
    path: &'a Path,
    sha256: [u8; 32],
}

impl Source<'_> {
    /// Some bytes of it, and the hash of all until there.
    async fn read(&self, at: u64, length: u64, hash: Sha256) -> Result<(Bytes, Sha256), S3Error> {
        let file = Arc::clone(&self.file);
        let read = tokio::task::spawn_blocking(move || {
            let mut hash = hash;
            let mut bytes = vec![0; length as usize];
            file.read_exact_at(&mut bytes, at)?;
            hash.update(&bytes);
            Ok((Bytes::from(bytes), hash))
        });
        let read = read.await.map_err(std::io::Error::other);
        let read = read.and_then(|read| read);
        Ok(read.map_err(StoreError::io("read", self.path))?)
    }

    fn compare(&self, hash: Sha256) -> Result<(), S3Error> {
        if <[u8; 32]>::from(hash.finalize()) == self.sha256 {
            return Ok(());
        }
        Err(S3Error::Changed {
            doing: format!("reading {}", self.path.display()),
            found: "its bytes are others than a moment ago".to_owned(),
        })
    }
}
