//! One S3 store: listing with checksums, and ranged GETs.

use aws_sdk_s3::{
    Client,
    operation::head_object::HeadObjectOutput,
    primitives::ByteStream,
    types::{ChecksumMode, ServerSideEncryption},
};
use futures::stream::{self, StreamExt, TryStreamExt};
use rekindle_core::{config::Source, uri::DatasetUri};
use rekindle_store::s3::{self, S3Error, Tuning, classify, persist};

use crate::{
    DatasetError,
    checksum::{Expected, Kind, decode},
    listing::{Keys, Listing, MAX_OBJECTS, Object},
    origin::Failure,
};

/// Pages without a single key that are taken before a listing is called endless.
const MAX_EMPTY_PAGES: usize = 100;

#[derive(Debug)]
pub(crate) struct Bucket {
    client: Client,
    name: String,
    concurrency: usize,
    tuning: Tuning,
}

impl Bucket {
    pub(crate) async fn open(
        source: &Source,
        name: &str,
        concurrency: usize,
        tuning: Tuning,
    ) -> Result<Self, DatasetError> {
        let client = s3::client(&source.access, concurrency).await;
        let client = client.map_err(|e| match e {
            S3Error::Access(reason) => DatasetError::Source {
                allow: source.allow.clone(),
                reason,
            },
            other => other.into(),
        })?;
        Ok(Self {
            client,
            name: name.to_owned(),
            concurrency,
            tuning,
        })
    }

    /// LIST, then HEAD of every object: both with the asker's own credentials, also when the bytes are
    /// on the node already, so that a shared cache shows nobody what the store would not.
    pub(crate) async fn list(&self, uri: &DatasetUri) -> Result<Listing, DatasetError> {
        let DatasetUri::S3 { key, .. } = uri else {
            return Err(DatasetError::Listing {
                uri: uri.to_string(),
                reason: "it is no S3 URI".to_owned(),
            });
        };
        let listed = if uri.is_prefix() {
            self.keys(uri, key).await?
        } else {
            let name = key.rsplit('/').next().unwrap_or(key);
            vec![(name.to_owned(), key.clone(), None)]
        };
        let objects: Vec<Object> = stream::iter(listed)
            .map(|(path, key, size)| self.head(path, key, size))
            .buffered(self.concurrency)
            .try_collect()
            .await?;
        Listing::new(uri, objects)
    }

    /// All keys below a prefix, as (path, key, size).
    async fn keys(
        &self,
        uri: &DatasetUri,
        prefix: &str,
    ) -> Result<Vec<(String, String, Option<u64>)>, DatasetError> {
        let mut keys = Keys::below(uri, prefix);
        let mut found = Vec::new();
        let mut token: Option<String> = None;
        let mut empty_pages = 0;
        loop {
            let doing = || format!("listing {uri}");
            let page = persist(self.tuning, &doing, || {
                self.client
                    .list_objects_v2()
                    .bucket(&self.name)
                    .prefix(prefix)
                    .set_continuation_token(token.clone())
                    .send()
            })
            .await?;
            for object in page.contents() {
                let key = object.key().unwrap_or_default();
                let size = object.size().unwrap_or_default();
                if let Some(path) = keys.admit(key, size)? {
                    found.push((path, key.to_owned(), u64::try_from(size).ok()));
                }
            }
            empty_pages += usize::from(page.contents().is_empty());
            let next = page.next_continuation_token().map(str::to_owned);
            if !page.is_truncated().unwrap_or_default() || next.is_none() {
                break;
            }
            if next == token || empty_pages > MAX_EMPTY_PAGES {
                return Err(DatasetError::Listing {
                    uri: uri.to_string(),
                    reason: format!(
                        "the store's pages do not end (limit: {MAX_OBJECTS} objects, {MAX_EMPTY_PAGES} empty pages)"
                    ),
                });
            }
            token = next;
        }
        keys.finish()?;
        Ok(found)
    }

    async fn head(
        &self,
        path: String,
        key: String,
        listed: Option<u64>,
    ) -> Result<Object, DatasetError> {
        let doing = || format!("looking at s3://{}/{key}", self.name);
        let head = self.head_part(&key, None, &doing).await?;
        let size = head
            .content_length()
            .and_then(|size| u64::try_from(size).ok())
            .ok_or_else(|| DatasetError::Answer {
                doing: doing(),
                answer: "the store says no size".to_owned(),
            })?;
        if let Some(listed) = listed.filter(|listed| *listed != size) {
            return Err(DatasetError::Changed {
                doing: doing(),
                found: format!("{size} bytes, listed with {listed}"),
            });
        }
        let expected = self.expected(&key, &head, size, &doing).await?;
        Ok(Object {
            path,
            size,
            etag: head.e_tag().unwrap_or_default().to_owned(),
            state: match (head.version_id(), head.last_modified()) {
                (Some(version), _) if version != "null" => version.to_owned(),
                (_, Some(time)) => time.secs().to_string(),
                _ => String::new(),
            },
            expected,
            key,
        })
    }

    async fn head_part(
        &self,
        key: &str,
        part: Option<i32>,
        doing: &impl Fn() -> String,
    ) -> Result<HeadObjectOutput, DatasetError> {
        let sent = persist(self.tuning, doing, || {
            self.client
                .head_object()
                .bucket(&self.name)
                .key(key)
                .set_part_number(part)
                .checksum_mode(ChecksumMode::Enabled)
                .send()
        });
        Ok(sent.await?)
    }

    /// The strongest thing that the store says about the bytes; CRC-64/NVME first, because it is free.
    async fn expected(
        &self,
        key: &str,
        head: &HeadObjectOutput,
        size: u64,
        doing: &impl Fn() -> String,
    ) -> Result<Expected, DatasetError> {
        let given = [
            (Kind::Crc64, head.checksum_crc64_nvme()),
            (Kind::Sha256, head.checksum_sha256()),
            (Kind::Crc32c, head.checksum_crc32_c()),
            (Kind::Crc32, head.checksum_crc32()),
            (Kind::Sha1, head.checksum_sha1()),
        ];
        for (kind, text) in given {
            match text.and_then(|text| decode(kind, text)) {
                Some((value, None)) => return Ok(Expected::Whole { kind, value }),
                Some((value, Some(parts))) => {
                    if let Some(part) = self.part_size(key, size, parts, doing).await? {
                        return Ok(Expected::Composite { kind, value, part });
                    }
                }
                None => {}
            }
        }
        // With SSE-KMS or a customer's key the ETag is not the MD5 of the bytes.
        let plain = head.sse_customer_algorithm().is_none()
            && matches!(
                head.server_side_encryption(),
                None | Some(ServerSideEncryption::Aes256)
            );
        Ok(match head.e_tag() {
            Some(etag) if plain => Expected::from_etag(etag),
            _ => Expected::Nothing,
        })
    }

    /// The size of the upload's parts, when all but the last have one size. A composite checksum cannot
    /// be computed without it.
    async fn part_size(
        &self,
        key: &str,
        size: u64,
        parts: u64,
        doing: &impl Fn() -> String,
    ) -> Result<Option<u64>, DatasetError> {
        let Some(last) = i32::try_from(parts).ok().filter(|last| *last > 0) else {
            return Ok(None);
        };
        let first = match self.head_part(key, Some(1), doing).await {
            Ok(head) => head.content_length().and_then(|n| u64::try_from(n).ok()),
            // Stores that do not know part numbers say so in many ways; then there is no part size.
            Err(DatasetError::Answer { .. }) => None,
            Err(other) => return Err(other),
        };
        let Some(part) = first.filter(|part| *part > 0 && size.div_ceil(*part) == parts) else {
            return Ok(None);
        };
        let rest = self.head_part(key, Some(last), doing).await?;
        let tail = size - part * (parts - 1);
        Ok((rest.content_length() == i64::try_from(tail).ok()).then_some(part))
    }

    /// The bytes `start..end` of an object, as it was when it was listed.
    pub(crate) async fn get(
        &self,
        object: &Object,
        start: u64,
        end: u64,
    ) -> Result<ByteStream, Failure> {
        let doing = || format!("fetching s3://{}/{}", self.name, object.key);
        let etag = Some(&object.etag).filter(|etag| !etag.is_empty());
        let sent = self
            .client
            .get_object()
            .bucket(&self.name)
            .key(&object.key)
            .range(format!("bytes={start}-{}", end - 1))
            .set_if_match(etag.cloned())
            .send()
            .await;
        let answer = sent.map_err(|error| match classify(&error, &doing) {
            s3::Failure::Final(error) => Failure::Final(error.into()),
            s3::Failure::Again(reason) => Failure::Again(reason),
        })?;
        // A store that ignores If-Match still says what it sends.
        if answer.e_tag().is_some_and(|found| *found != object.etag) {
            return Err(Failure::Final(DatasetError::Changed {
                doing: doing(),
                found: format!("ETag {:?}", answer.e_tag().unwrap_or_default()),
            }));
        }
        let wanted = format!("bytes {start}-{}/{}", end - 1, object.size);
        match answer.content_range() {
            Some(range) if range == wanted => {}
            None if (start, end) == (0, object.size) => {}
            // Another size behind the slash: another object. Else a store that cannot do ranges.
            Some(range) if range.rsplit('/').next() != Some(&object.size.to_string()) => {
                return Err(Failure::Final(DatasetError::Changed {
                    doing: doing(),
                    found: format!("Content-Range {range:?}"),
                }));
            }
            other => {
                return Err(Failure::Final(DatasetError::Answer {
                    doing: doing(),
                    answer: format!("asked for {wanted:?}, got Content-Range {other:?}"),
                }));
            }
        }
        Ok(answer.body)
    }
}
