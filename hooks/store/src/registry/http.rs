//! HTTP, and what of it is a registry's own.

use std::{path::Path, sync::Arc, time::Duration};

use bytes::{Bytes, BytesMut};
use http_body_util::{BodyExt as _, Full};
use hyper::{Request, Response, Uri, body::Incoming};
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::{
    client::legacy::{Client, connect::HttpConnector},
    rt::TokioExecutor,
};
use rustls::{ClientConfig, RootCertStore};
use serde::Deserialize;
use tokio::time::timeout;

use super::{Ask, Failure, RegistryError, rest};
use crate::s3::{authorities, hopeless, sentence, stalled};

/// A connection that takes longer does not come: retransmits of SYN alone are 1 s and 3 s.
const CONNECT: Duration = Duration::from_secs(5);
/// Most bytes that are read of a refusal.
const MAX_REFUSAL: usize = 16 << 10;

pub(super) type Answer = Response<Incoming>;

#[derive(Debug, Clone)]
pub(super) struct Http {
    client: Client<HttpsConnector<HttpConnector>, Full<Bytes>>,
}

impl Http {
    pub(super) fn new(ca_file: Option<&Path>, connections: usize) -> Result<Self, RegistryError> {
        let mut roots = RootCertStore::empty();
        // One that cannot be read is the system's own business; without any no https connection comes about.
        roots.add_parsable_certificates(rustls_native_certs::load_native_certs().certs);
        if let Some(path) = ca_file {
            let (_, more) = authorities(path).map_err(RegistryError::Access)?;
            roots.extend(more.roots);
        }
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let config = ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(|e| RegistryError::Access(e.to_string()))?
            .with_root_certificates(roots)
            .with_no_client_auth();
        let mut tcp = HttpConnector::new();
        tcp.enforce_http(false);
        tcp.set_nodelay(true);
        tcp.set_connect_timeout(Some(CONNECT));
        let connector = HttpsConnectorBuilder::new()
            .with_tls_config(config)
            .https_or_http()
            .enable_http1()
            .wrap_connector(tcp);
        let client = Client::builder(TokioExecutor::new())
            .pool_max_idle_per_host(connections)
            .build(connector);
        Ok(Self { client })
    }

    /// Sends a request, and waits for the head of the answer.
    pub(super) async fn send(
        &self,
        request: Request<Full<Bytes>>,
        ask: &Ask<'_>,
    ) -> Result<Answer, Failure> {
        match timeout(ask.stall, self.client.request(request)).await {
            Ok(Ok(answer)) => Ok(answer),
            Ok(Err(error)) if hopeless(&error) => Err(Failure::answer(ask.doing, sentence(&error))),
            Ok(Err(error)) => Err(Failure::again(sentence(&error))),
            Err(_) => Err(Failure::again(stalled(ask.stall))),
        }
    }
}

/// The next bytes of a body; none at its end.
pub(super) async fn piece(body: &mut Incoming, stall: Duration) -> Result<Option<Bytes>, Failure> {
    loop {
        let frame = timeout(stall, body.frame()).await;
        match frame.map_err(|_| Failure::again(stalled(stall)))? {
            None => return Ok(None),
            Some(Err(error)) => {
                let reason = format!("the body broke off: {}", sentence(&error));
                return Err(Failure::again(reason));
            }
            // Trailers are nobody's.
            Some(Ok(frame)) => match frame.into_data() {
                Ok(data) => return Ok(Some(data)),
                Err(_) => continue,
            },
        }
    }
}

/// All of a body of at most `max` bytes.
pub(super) async fn whole(
    doing: &str,
    mut body: Incoming,
    max: u64,
    stall: Duration,
) -> Result<Bytes, Failure> {
    let mut bytes = BytesMut::new();
    while let Some(piece) = piece(&mut body, stall).await? {
        if (bytes.len() + piece.len()) as u64 > max {
            let reason = format!("it has more than the {max} bytes that are read of it");
            return Err(Failure::answer(doing, reason));
        }
        bytes.extend_from_slice(&piece);
    }
    Ok(bytes.freeze())
}

#[derive(Deserialize)]
struct Refusal {
    errors: Vec<Reason>,
}

#[derive(Deserialize)]
struct Reason {
    #[serde(default)]
    code: String,
    #[serde(default)]
    message: String,
}

/// What a refusal means.
pub(super) async fn refused(answer: Answer, ask: &Ask<'_>, whom: &str) -> Failure {
    let (head, mut body) = answer.into_parts();
    let status = head.status.as_u16();
    let mut bytes = BytesMut::new();
    while bytes.len() < MAX_REFUSAL
        && let Ok(Some(piece)) = piece(&mut body, ask.stall).await
    {
        bytes.extend_from_slice(&piece[..piece.len().min(MAX_REFUSAL - bytes.len())]);
    }
    let said = serde_json::from_slice::<Refusal>(&bytes).ok();
    let reason = said.and_then(|said| said.errors.into_iter().next());
    let words = reason.map_or_else(String::new, |of| format!(" {} {}", of.code, of.message));
    let words: String = words
        .chars()
        .filter(|c| !c.is_control())
        .take(200)
        .collect();
    let answer = format!("HTTP {status}{}", words.trim_end());
    let doing = ask.doing.to_owned();
    let whom = whom.to_owned();
    match status {
        501 => Failure::Final(RegistryError::Answer { doing, answer }),
        408 | 429 | 500..=599 => Failure::Again(answer, rest(&head.headers)),
        401 | 403 => Failure::Final(RegistryError::Denied {
            doing,
            whom,
            answer,
        }),
        404 => Failure::Final(RegistryError::Missing { doing, answer }),
        416 => Failure::Final(RegistryError::Offset { doing, answer }),
        _ => Failure::Final(RegistryError::Answer { doing, answer }),
    }
}

/// Scheme and host of a registry.
pub(super) fn base(endpoint: Option<&str>, host: &str) -> Result<Uri, RegistryError> {
    let named = match (endpoint, host) {
        (Some(endpoint), _) => endpoint.to_owned(),
        // What everybody calls it, and where it is.
        (None, "docker.io") => "https://registry-1.docker.io".to_owned(),
        (None, host) if is_loopback(host) => format!("http://{host}"),
        (None, host) => format!("https://{host}"),
    };
    let refuse = || RegistryError::Access(format!("{named:?} is no https://host:port"));
    let uri: Uri = named.parse().map_err(|_| refuse())?;
    match (uri.scheme_str(), uri.path()) {
        (Some("https" | "http"), "/" | "") if plain(&uri) => Ok(uri),
        _ => Err(refuse()),
    }
}

fn is_loopback(host: &str) -> bool {
    let name = match host.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
        Some((address, _)) => address,
        None => host.split(':').next().unwrap_or_default(),
    };
    name == "localhost"
        || name
            .parse()
            .is_ok_and(|address: std::net::IpAddr| address.is_loopback())
}

/// Whether it names a host, and nobody's password.
fn plain(uri: &Uri) -> bool {
    uri.authority().is_some_and(|of| !of.as_str().contains('@'))
}

/// A path of a host.
pub(super) fn at(base: &Uri, path: &str) -> Option<Uri> {
    let mut parts = base.clone().into_parts();
    parts.path_and_query = Some(path.parse().ok()?);
    Uri::from_parts(parts).ok()
}

/// What `Location` means, and `Link`: an address, or a path of the same host.
pub(super) fn resolve(from: &Uri, to: &str) -> Option<Uri> {
    if to.starts_with('/') && !to.starts_with("//") {
        return at(from, to);
    }
    let uri: Uri = to.parse().ok()?;
    let known = matches!(uri.scheme_str(), Some("https" | "http"));
    (known && plain(&uri)).then_some(uri)
}

pub(super) fn is_https(uri: &Uri) -> bool {
    uri.scheme_str() == Some("https")
}

/// Whether what one may have, the other may.
pub(super) fn same_origin(a: &Uri, b: &Uri) -> bool {
    let port = |uri: &Uri| {
        uri.port_u16()
            .unwrap_or(if is_https(uri) { 443 } else { 80 })
    };
    let host = |uri: &Uri| uri.host().map(str::to_ascii_lowercase);
    (a.scheme(), host(a), port(a)) == (b.scheme(), host(b), port(b))
}

/// For a part of a query.
pub(super) fn encoded(text: &str) -> String {
    let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'.' | b'_' | b'~');
    let one = |b: u8| match plain(b) {
        true => char::from(b).to_string(),
        false => format!("%{b:02X}"),
    };
    text.bytes().map(one).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_this_host_is_spoken_to_in_clear_unless_the_configuration_says_so() {
        let of = |endpoint, host| base(endpoint, host).map(|uri| uri.to_string()).ok();
        assert_eq!(of(None, "r.example").unwrap(), "https://r.example/");
        assert_eq!(
            of(None, "docker.io").unwrap(),
            "https://registry-1.docker.io/"
        );
        for host in [
            "localhost:5000",
            "127.0.0.1:5000",
            "127.9.9.9",
            "[::1]:5000",
        ] {
            assert!(of(None, host).unwrap().starts_with("http://"), "{host}");
        }
        for host in [
            "localhost.example",
            "10.0.0.1:5000",
            "[::2]",
            "127.0.0.1.example",
        ] {
            assert!(of(None, host).unwrap().starts_with("https://"), "{host}");
        }
        let plain = Some("http://r.example:5000");
        assert_eq!(of(plain, "r.example").unwrap(), "http://r.example:5000/");
        for bad in [
            "r.example",
            "ftp://r.example",
            "https://r.example/v2",
            "https://a:b@r.example",
        ] {
            assert_eq!(of(Some(bad), "r.example"), None, "{bad}");
        }
    }

    #[test]
    fn an_origin_is_scheme_host_and_port() {
        let uri = |text: &str| text.parse::<Uri>().unwrap();
        let here = uri("https://r.example/v2/");
        assert!(same_origin(&uri("https://R.example:443/x"), &here));
        for other in [
            "http://r.example/",
            "https://r.example:444/",
            "https://s.r.example/",
        ] {
            assert!(!same_origin(&uri(other), &here), "{other}");
        }
    }

    #[test]
    fn a_location_is_an_address_or_a_path() {
        let from = "https://r.example/v2/a/blobs/x?y".parse().unwrap();
        let to = |text| resolve(&from, text).map(|uri| uri.to_string());
        assert_eq!(to("/b?c=d").unwrap(), "https://r.example/b?c=d");
        assert_eq!(to("http://s.example/b").unwrap(), "http://s.example/b");
        for bad in [
            "",
            "b",
            "//s.example/b",
            "file:///etc",
            "https://a:b@s.example/",
            "a b",
        ] {
            assert_eq!(to(bad), None, "{bad}");
        }
    }
}
