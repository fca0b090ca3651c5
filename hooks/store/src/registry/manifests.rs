//! Manifests and tags.

use bytes::Bytes;
use hyper::{
    Method, Uri,
    header::{ACCEPT, CONTENT_TYPE, HeaderValue, LINK},
};
use serde::Deserialize;
use sha2::{Digest as _, Sha256};

use super::{Ask, Failure, Registry, RegistryError, auth::Scope, http, same_digest};

/// Tags that are asked for at once. Many registries give fewer.
const PAGE: usize = 1000;
/// Most bytes of one page, for a registry that gives all at once: a tag has at most 128 bytes.
const MAX_PAGE: u64 = 16 << 20;

/// A manifest, whose bytes have the digest that they were asked for by, or that is said.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Manifest {
    /// All of it.
    pub bytes: Bytes,
    /// What the registry says that it is; empty where it says nothing.
    pub media_type: String,
    /// `sha256:` and 64 hex digits, of these bytes.
    pub digest: String,
}

#[derive(Deserialize)]
struct Page {
    /// Some say null.
    tags: Option<Vec<String>>,
}

impl Registry {
    /// The manifest of a tag, or of a digest; none where there is none.
    ///
    /// # Errors
    /// What the registry says; [`RegistryError::Answer`] for one of more than `max` bytes, and for one that has not the
    /// digest that it should have.
    pub async fn manifest(
        &self,
        reference: &str,
        media_type: &str,
        max: u64,
    ) -> Result<Option<Manifest>, RegistryError> {
        let doing = &format!("fetching the manifest {reference:?} of {}", self.uri());
        let accept = HeaderValue::from_str(media_type);
        let accept = accept.map_err(|e| RegistryError::Access(e.to_string()))?;
        let mut ask = self.get(doing, self.at(&format!("manifests/{reference}"))?);
        ask.headers = vec![(ACCEPT, accept)];
        let mut attempts = self.attempts(doing);
        loop {
            match self.manifest_once(&ask, reference, max).await {
                Ok(found) => return Ok(Some(found)),
                Err(Failure::Final(RegistryError::Missing { .. })) => return Ok(None),
                Err(failure) => attempts.after(failure).await?,
            }
        }
    }

    async fn manifest_once(
        &self,
        ask: &Ask<'_>,
        reference: &str,
        max: u64,
    ) -> Result<Manifest, Failure> {
        let (answer, _) = self.ask(ask).await?;
        let (head, body) = answer.into_parts();
        let bytes = http::whole(ask.doing, body, max, ask.stall).await?;
        let digest = digest_of(&bytes);
        same_digest(ask.doing, &head.headers, &digest)?;
        if reference.starts_with("sha256:") && reference != digest {
            let reason = format!("what came does not have that digest, but {digest}");
            return Err(Failure::answer(ask.doing, reason));
        }
        let media_type = head.headers.get(CONTENT_TYPE);
        let media_type = media_type.and_then(|kind| kind.to_str().ok());
        let media_type = media_type.and_then(|kind| kind.split(';').next());
        Ok(Manifest {
            bytes,
            media_type: media_type.unwrap_or_default().trim().to_owned(),
            digest,
        })
    }

    /// Puts a manifest there, under a tag; all that it names has to be there.
    ///
    /// # Errors
    /// What the registry says; [`RegistryError::Answer`] when it says that it has taken something else.
    pub async fn put_manifest(
        &self,
        tag: &str,
        media_type: &str,
        bytes: Bytes,
    ) -> Result<(), RegistryError> {
        let doing = &format!("writing the manifest {tag:?} of {}", self.uri());
        let digest = digest_of(&bytes);
        let kind = HeaderValue::from_str(media_type);
        let kind = kind.map_err(|e| RegistryError::Access(e.to_string()))?;
        let ask = Ask {
            doing,
            method: Method::PUT,
            to: self.at(&format!("manifests/{tag}"))?,
            scope: Scope::Push,
            headers: vec![(CONTENT_TYPE, kind)],
            stall: self.upload_stall(bytes.len() as u64),
            body: bytes,
        };
        let mut attempts = self.attempts(doing);
        loop {
            let failure = match self.ask(&ask).await {
                Ok((answer, _)) => match same_digest(doing, answer.headers(), &digest) {
                    Ok(()) => return Ok(()),
                    Err(failure) => failure,
                },
                Err(failure) => failure,
            };
            attempts.after(failure).await?;
        }
    }

    /// All tags, at most `max`, in their order; of a repository that there is not, none. What cannot be a tag is none,
    /// whoever lists it.
    ///
    /// # Errors
    /// What the registry says; [`RegistryError::Answer`] for one that has more, or whose listing does not end.
    pub async fn tags(&self, max: usize) -> Result<Vec<String>, RegistryError> {
        let doing = &format!("listing the tags of {}", self.uri());
        let refuse = |answer: String| RegistryError::Answer {
            doing: doing.clone(),
            answer,
        };
        let mut tags = Vec::new();
        let mut next = Some(self.at(&format!("tags/list?n={PAGE}"))?);
        // A page without any tags is no reason to go on for ever.
        for _ in 0..=max / 10 {
            let Some(to) = next.take() else {
                tags.sort();
                tags.dedup();
                return Ok(tags);
            };
            let page = self.page(&self.get(doing, to)).await?;
            let Some((found, link)) = page else { continue };
            tags.extend(found.into_iter().filter(|tag| is_tag(tag)));
            if tags.len() > max {
                return Err(refuse(format!("there are more than {max}")));
            }
            next = link;
        }
        Err(refuse("the registry's pages do not end".to_owned()))
    }

    async fn page(
        &self,
        ask: &Ask<'_>,
    ) -> Result<Option<(Vec<String>, Option<Uri>)>, RegistryError> {
        let mut attempts = self.attempts(ask.doing);
        loop {
            match self.page_once(ask).await {
                Ok(page) => return Ok(Some(page)),
                Err(Failure::Final(RegistryError::Missing { .. })) => return Ok(None),
                Err(failure) => attempts.after(failure).await?,
            }
        }
    }

    async fn page_once(&self, ask: &Ask<'_>) -> Result<(Vec<String>, Option<Uri>), Failure> {
        let (answer, from) = self.ask(ask).await?;
        let (head, body) = answer.into_parts();
        let link = head.headers.get(LINK).and_then(|link| link.to_str().ok());
        let next = link.and_then(next_of);
        let next = next.map(|to| {
            let to = http::resolve(&from, to);
            // The rest of a listing is where its beginning is. A proxy in front may have other words for that.
            let to = to.and_then(|to| http::at(&self.base, to.path_and_query()?.as_str()));
            to.ok_or_else(|| Failure::answer(ask.doing, "the next page is nowhere"))
        });
        let bytes = http::whole(ask.doing, body, MAX_PAGE, ask.stall).await?;
        let page: Page = serde_json::from_slice(&bytes)
            .map_err(|e| Failure::answer(ask.doing, format!("it is no list of tags: {e}")))?;
        Ok((page.tags.unwrap_or_default(), next.transpose()?))
    }
}

pub(super) fn digest_of(bytes: &[u8]) -> String {
    digest(Sha256::digest(bytes).into())
}

pub(super) fn digest(sha256: [u8; 32]) -> String {
    let hex = sha256.iter().map(|byte| format!("{byte:02x}"));
    format!("sha256:{}", hex.collect::<String>())
}

/// `[a-zA-Z0-9_][a-zA-Z0-9._-]{0,127}`.
pub fn is_tag(text: &str) -> bool {
    let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'.' | b'_' | b'-');
    let begins = text.starts_with(|c: char| c.is_ascii_alphanumeric() || c == '_');
    begins && text.len() <= 128 && text.bytes().all(plain)
}

/// Where `<…>; rel="next"` leads.
fn next_of(link: &str) -> Option<&str> {
    let mut all = link.split(',').filter_map(|one| {
        let (to, rest) = one.trim().strip_prefix('<')?.split_once('>')?;
        let next = rest.split(';').any(|word| {
            let word = word.trim().to_ascii_lowercase();
            matches!(word.as_str(), "rel=next" | "rel=\"next\"")
        });
        next.then_some(to)
    });
    all.next()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_next_page_is_where_the_link_says() {
        for (link, wanted) in [
            (
                "</v2/a/tags/list?last=x&n=2>; rel=\"next\"",
                Some("/v2/a/tags/list?last=x&n=2"),
            ),
            ("</a>; rel=first, </b>;rel=next", Some("/b")),
            ("</a>; rel=\"prev\"", None),
            ("/a; rel=\"next\"", None),
            ("</a", None),
            ("", None),
        ] {
            assert_eq!(next_of(link), wanted, "{link}");
        }
    }

    #[test]
    fn what_is_no_tag_is_none() {
        for good in ["a", "_a", "1.2-x_y", &"a".repeat(128)] {
            assert!(is_tag(good), "{good}");
        }
        for bad in [
            "",
            "-a",
            ".a",
            "a/b",
            "a:b",
            "a b",
            "a\u{1b}[0m",
            "ä",
            &"a".repeat(129),
        ] {
            assert!(!is_tag(bad), "{bad}");
        }
    }
}
