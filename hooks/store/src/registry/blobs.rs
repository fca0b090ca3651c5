//! Blobs out of a registry, in parts where it gives such, and whole where not.

use std::{ops::Range, sync::Arc};

use bytes::{Bytes, BytesMut};
use futures::{
    Stream,
    future::{self, Either},
    stream::{self, StreamExt, TryStreamExt},
};
use hyper::{
    Method, StatusCode,
    body::Incoming,
    header::{CONTENT_LENGTH, CONTENT_RANGE, HeaderValue, RANGE},
};

use super::{Answer, Ask, Attempts, Failure, Registry, RegistryError, http, same_digest};

impl Registry {
    /// How large a blob is; none where there is none. `digest` is `sha256:` and 64 hex digits, as everywhere here.
    ///
    /// # Errors
    /// What the registry says.
    pub async fn blob_size(&self, digest: &str) -> Result<Option<u64>, RegistryError> {
        let doing = &format!("looking at {digest} of {}", self.uri());
        let mut ask = self.get(doing, self.at(&format!("blobs/{digest}"))?);
        ask.method = Method::HEAD;
        let mut attempts = self.attempts(doing);
        loop {
            match self.ask(&ask).await {
                Ok((answer, _)) => return Ok(length(&answer)),
                Err(Failure::Final(RegistryError::Missing { .. })) => return Ok(None),
                Err(failure) => attempts.after(failure).await?,
            }
        }
    }

    /// Whether parts of a blob can be had, of which it has to have some: the registry is asked for its first byte.
    ///
    /// # Errors
    /// What the registry says.
    pub async fn gives_parts(&self, digest: &str, size: u64) -> Result<bool, RegistryError> {
        match self.part(digest, 0..1.min(size), size).await {
            Ok(_) => Ok(true),
            Err(RegistryError::NoParts { .. }) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// A blob of `size` bytes, in its order: in parallel parts, of which at most as many as may be in flight are held,
    /// or piece by piece from a registry that gives no parts. Dropped, it stops.
    pub fn read(
        self: Arc<Self>,
        digest: String,
        size: u64,
    ) -> impl Stream<Item = Result<Bytes, RegistryError>> + Send {
        let step = self.limits.part_size;
        let first = {
            let (this, digest) = (Arc::clone(&self), digest.clone());
            async move { this.part(&digest, 0..size.min(step), size).await }
        };
        stream::once(first).flat_map(move |first| {
            let (this, digest) = (Arc::clone(&self), digest.clone());
            match first {
                Err(RegistryError::NoParts { .. }) => Either::Left(this.pieces(digest, size)),
                first => {
                    let rest = this.rest(digest, size).take(match first {
                        Ok(_) => usize::MAX,
                        Err(_) => 0,
                    });
                    Either::Right(stream::once(future::ready(first)).chain(rest))
                }
            }
        })
    }

    /// All parts but the first.
    fn rest(
        self: Arc<Self>,
        digest: String,
        size: u64,
    ) -> impl Stream<Item = Result<Bytes, RegistryError>> + Send {
        let (step, concurrency) = (self.limits.part_size, self.limits.concurrency);
        let starts = (1..size.div_ceil(step)).map(move |n| n * step);
        let parts = starts.map(move |start| {
            let (this, digest) = (Arc::clone(&self), digest.clone());
            async move {
                let end = size.min(start + step);
                this.part(&digest, start..end, size).await
            }
        });
        stream::iter(parts).buffered(concurrency)
    }

    /// Some bytes of a blob of `size` bytes; what was received of them is not asked for again.
    ///
    /// # Errors
    /// What the registry says; [`RegistryError::NoParts`].
    pub async fn part(
        &self,
        digest: &str,
        range: Range<u64>,
        size: u64,
    ) -> Result<Bytes, RegistryError> {
        let doing = &format!("fetching {digest} of {}", self.uri());
        let mut ask = self.get(doing, self.at(&format!("blobs/{digest}"))?);
        let mut attempts = self.attempts(doing);
        let mut bytes = BytesMut::new();
        let wanted = (range.end - range.start) as usize;
        while bytes.len() < wanted {
            let before = bytes.len();
            let rest = range.start + before as u64..range.end;
            let range = format!("bytes={}-{}", rest.start, rest.end - 1);
            // Digits and a dash are a header.
            ask.headers = Vec::from_iter(HeaderValue::try_from(range).ok().map(|of| (RANGE, of)));
            let Err(failure) = self.part_once(&ask, digest, rest, size, &mut bytes).await else {
                continue;
            };
            if bytes.len() > before {
                attempts.patience.renew();
            }
            attempts.after(failure).await?;
        }
        Ok(bytes.freeze())
    }

    async fn part_once(
        &self,
        ask: &Ask<'_>,
        digest: &str,
        range: Range<u64>,
        size: u64,
        into: &mut BytesMut,
    ) -> Result<(), Failure> {
        let (answer, _) = self.ask(ask).await?;
        same_digest(ask.doing, answer.headers(), digest)?;
        let wanted = format!("bytes {}-{}/{size}", range.start, range.end - 1);
        let found = answer.headers().get(CONTENT_RANGE);
        match (answer.status(), found) {
            (StatusCode::PARTIAL_CONTENT, Some(found)) if found.as_bytes() == wanted.as_bytes() => {
            }
            (StatusCode::OK, None) if (range.start, range.end) == (0, size) => {
                same_length(ask.doing, &answer, size)?;
            }
            (StatusCode::OK, None) => {
                let doing = ask.doing.to_owned();
                return Err(Failure::Final(RegistryError::NoParts { doing }));
            }
            (status, found) => {
                let reason = format!(
                    "asked for {wanted:?}, got HTTP {} and Content-Range {found:?}",
                    status.as_u16()
                );
                return Err(Failure::answer(ask.doing, reason));
            }
        }
        let mut left = (range.end - range.start) as usize;
        let mut body = answer.into_body();
        while let Some(piece) = http::piece(&mut body, ask.stall).await? {
            if piece.len() > left {
                return Err(Failure::again("the body is longer than what was asked for"));
            }
            left -= piece.len();
            into.extend_from_slice(&piece);
        }
        match left {
            0 => Ok(()),
            _ => Err(Failure::again("the body is shorter than announced")),
        }
    }

    /// A blob of `size` bytes by one request. One that breaks off is asked for again, and what has come is skipped.
    fn pieces(
        self: Arc<Self>,
        digest: String,
        size: u64,
    ) -> impl Stream<Item = Result<Bytes, RegistryError>> + Send {
        let begun = Whole {
            doing: format!("fetching {digest} of {}", self.uri()),
            registry: self,
            digest,
            size,
            at: 0,
            body: None,
        };
        stream::try_unfold(begun, |mut whole| async move {
            let piece = whole.next().await?;
            Ok(piece.map(|piece| (piece, whole)))
        })
        .into_stream()
    }
}

/// A blob that comes by one request.
struct Whole {
    registry: Arc<Registry>,
    doing: String,
    digest: String,
    size: u64,
    /// Bytes that were handed out.
    at: u64,
    /// What comes, and how much of it is to be skipped.
    body: Option<(Incoming, u64)>,
}

impl Whole {
    async fn next(&mut self) -> Result<Option<Bytes>, RegistryError> {
        let doing = self.doing.clone();
        let registry = Arc::clone(&self.registry);
        let mut attempts: Attempts<'_> = registry.attempts(&doing);
        while self.at < self.size {
            match self.piece().await {
                Ok(Some(piece)) => {
                    self.at += piece.len() as u64;
                    return Ok(Some(piece));
                }
                Ok(None) => {}
                Err(failure) => {
                    self.body = None;
                    attempts.after(failure).await?;
                }
            }
        }
        Ok(None)
    }

    /// The next bytes that have not been handed out; none where all that came had been.
    async fn piece(&mut self) -> Result<Option<Bytes>, Failure> {
        let stall = self.registry.limits.tuning.stall;
        if self.body.is_none() {
            let to = self.registry.at(&format!("blobs/{}", self.digest));
            let ask = self.registry.get(&self.doing, to.map_err(Failure::Final)?);
            let (answer, _) = self.registry.ask(&ask).await?;
            same_digest(&self.doing, answer.headers(), &self.digest)?;
            same_length(&self.doing, &answer, self.size)?;
            self.body = Some((answer.into_body(), self.at));
        }
        let Some((body, skip)) = &mut self.body else {
            return Ok(None);
        };
        let Some(mut piece) = http::piece(body, stall).await? else {
            return Err(Failure::again("the body is shorter than announced"));
        };
        let skipped = piece
            .len()
            .min(usize::try_from(*skip).unwrap_or(usize::MAX));
        *skip -= skipped as u64;
        let _ = piece.split_to(skipped);
        let left = usize::try_from(self.size - self.at).unwrap_or(usize::MAX);
        piece.truncate(left);
        Ok((!piece.is_empty()).then_some(piece))
    }
}

fn length(answer: &Answer) -> Option<u64> {
    let length = answer.headers().get(CONTENT_LENGTH)?;
    length.to_str().ok()?.parse().ok()
}

/// Refuses an answer that announces another size.
fn same_length(doing: &str, answer: &Answer, size: u64) -> Result<(), Failure> {
    match length(answer) {
        Some(found) if found != size => {
            let reason = format!("it should have {size} bytes, and the registry has {found}");
            Err(Failure::answer(doing, reason))
        }
        _ => Ok(()),
    }
}
