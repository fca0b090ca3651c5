//! Who we are to a registry.
//!
//! ```text
//!  asked without ──▶ 401 with a challenge ──▶ Basic: the credentials themselves
//!                                         └─▶ Bearer: a token of the server that the challenge names, for this
//!                                             repository and what is to be done with it, until it has expired
//! ```

use std::time::{Duration, Instant};

use bytes::Bytes;
use hyper::{
    HeaderMap, Method, Request, Uri,
    header::{AUTHORIZATION, CONTENT_TYPE, HeaderName, HeaderValue, USER_AGENT, WWW_AUTHENTICATE},
};
use rekindle_core::uri::Repository;
use serde::Deserialize;
use tokio::sync::Mutex;

use super::{
    AGENT, Access, Answer, Ask, Failure, RegistryError,
    credentials::{self, Credentials},
    http::{self, Http, encoded},
};

/// Most bytes of a token server's answer.
const MAX_TOKEN: u64 = 64 << 10;
/// What a token lasts unless it is said, by the specification.
const LASTS: u64 = 60;

/// What is to be done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Scope {
    Pull,
    Push,
}

pub(super) struct Auth {
    credentials: Credentials,
    /// Where they are from.
    from: String,
    repository: String,
    https: bool,
    known: Mutex<Known>,
}

#[derive(Default)]
struct Known {
    challenge: Option<Challenge>,
    /// For each scope.
    granted: [Option<Granted>; 2],
}

struct Granted {
    header: HeaderValue,
    until: Option<Instant>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Challenge {
    Basic,
    Bearer { realm: Uri, service: Option<String> },
}

#[derive(Deserialize)]
struct Token {
    token: Option<String>,
    access_token: Option<String>,
    expires_in: Option<u64>,
}

impl std::fmt::Debug for Auth {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Auth")
            .field("from", &self.from)
            .finish_non_exhaustive()
    }
}

impl Auth {
    pub(super) fn new(
        access: &Access,
        repository: &Repository,
        base: &Uri,
    ) -> Result<Self, RegistryError> {
        let found = match access.anonymous {
            true => None,
            false => credentials::find(access.credentials_file.as_deref(), repository)?,
        };
        let (credentials, from) = found.unwrap_or_default();
        Ok(Self {
            credentials,
            from,
            repository: repository.name.clone(),
            https: http::is_https(base),
            known: Mutex::default(),
        })
    }

    /// Who is refused, in a sentence.
    pub(super) fn whom(&self) -> String {
        match self.credentials {
            Credentials::None => "who has no credentials".to_owned(),
            _ => format!("the credentials of {}", self.from),
        }
    }

    /// The authorization for a request, as far as the registry has asked for one before.
    pub(super) async fn granted(
        &self,
        http: &Http,
        ask: &Ask<'_>,
    ) -> Result<Option<HeaderValue>, Failure> {
        let mut known = self.known.lock().await;
        let now = Instant::now();
        if let Some(granted) = &known.granted[ask.scope as usize]
            && granted.until.is_none_or(|until| now < until)
        {
            return Ok(Some(granted.header.clone()));
        }
        let Some(challenge) = known.challenge.clone() else {
            return Ok(None);
        };
        let granted = self.obtain(http, ask, &challenge).await?;
        let header = granted.header.clone();
        known.granted[ask.scope as usize] = Some(granted);
        Ok(Some(header))
    }

    /// Answers a challenge: the next request of that scope has what it asks for. `used` is what did not suffice.
    pub(super) async fn challenged(
        &self,
        http: &Http,
        ask: &Ask<'_>,
        answer: Answer,
        used: Option<&HeaderValue>,
    ) -> Result<(), Failure> {
        let mut known = self.known.lock().await;
        if let Some(granted) = &known.granted[ask.scope as usize]
            && Some(&granted.header) != used
        {
            // Another request was challenged at the same time.
            return Ok(());
        }
        let challenge = match (challenge(answer.headers()), &self.credentials) {
            // Nothing that could be answered: what the registry says to that is the reason.
            (None, _) | (Some(Challenge::Basic), Credentials::None | Credentials::Identity(_)) => {
                return Err(http::refused(answer, ask, &self.whom()).await);
            }
            (Some(challenge), _) => challenge,
        };
        known.granted[ask.scope as usize] = None;
        known.challenge = Some(challenge.clone());
        known.granted[ask.scope as usize] = Some(self.obtain(http, ask, &challenge).await?);
        Ok(())
    }

    async fn obtain(
        &self,
        http: &Http,
        ask: &Ask<'_>,
        challenge: &Challenge,
    ) -> Result<Granted, Failure> {
        let for_ever = |header| Granted {
            header,
            until: None,
        };
        match (challenge, &self.credentials) {
            (_, Credentials::Token(token)) => Ok(for_ever(bearer(ask.doing, token)?)),
            (Challenge::Basic, credentials) => {
                Ok(for_ever(credentials.basic().ok_or_else(|| {
                    Failure::answer(ask.doing, "the credentials are none for Basic")
                })?))
            }
            (Challenge::Bearer { realm, service }, credentials) => {
                let service = service.as_deref();
                self.token(http, ask, realm, service, credentials).await
            }
        }
    }

    /// Asks a token server. What is asked for is said by us and not by the challenge: this repository, and no more of
    /// it than is needed.
    async fn token(
        &self,
        http: &Http,
        ask: &Ask<'_>,
        realm: &Uri,
        service: Option<&str>,
        credentials: &Credentials,
    ) -> Result<Granted, Failure> {
        if self.https && !http::is_https(realm) {
            let reason = "the registry names a token server that is spoken to in clear";
            return Err(Failure::answer(ask.doing, reason));
        }
        let actions = match ask.scope {
            Scope::Pull => "pull",
            Scope::Push => "pull,push",
        };
        let scope = format!("repository:{}:{actions}", self.repository);
        let mut query = format!("scope={}&client_id=rekindle", encoded(&scope));
        if let Some(service) = service {
            query = format!("{query}&service={}", encoded(service));
        }
        let mut headers: Vec<(HeaderName, HeaderValue)> = Vec::new();
        headers.push((USER_AGENT, HeaderValue::from_static(AGENT)));
        let (method, to, body) = match credentials {
            Credentials::Identity(token) => {
                let token = encoded(token);
                let form = format!("{query}&grant_type=refresh_token&refresh_token={token}");
                let kind = HeaderValue::from_static("application/x-www-form-urlencoded");
                headers.push((CONTENT_TYPE, kind));
                (Method::POST, realm.clone(), Bytes::from(form))
            }
            other => {
                headers.extend(other.basic().map(|basic| (AUTHORIZATION, basic)));
                let joint = if realm.query().is_some() { '&' } else { '?' };
                let to = format!("{realm}{joint}{query}").parse();
                let to = to.map_err(|_| Failure::answer(ask.doing, "no token server is named"))?;
                (Method::GET, to, Bytes::new())
            }
        };
        let mut request = Request::new(body.into());
        (*request.method_mut(), *request.uri_mut()) = (method, to);
        for (name, value) in headers {
            request.headers_mut().insert(name, value);
        }
        let begun = Instant::now();
        let answer = http.send(request, ask).await?;
        if !answer.status().is_success() {
            return Err(of_token_server(
                http::refused(answer, ask, &self.whom()).await,
            ));
        }
        let bytes = http::whole(ask.doing, answer.into_body(), MAX_TOKEN, ask.stall).await?;
        let refuse = |reason| Failure::answer(ask.doing, reason);
        let token: Token = serde_json::from_slice(&bytes)
            .map_err(|_| refuse("what the token server says is no token"))?;
        let lasts = token.expires_in.unwrap_or(LASTS);
        let text = token.token.or(token.access_token);
        let text = text.ok_or_else(|| refuse("what the token server says has no token"))?;
        Ok(Granted {
            header: bearer(ask.doing, &text)?,
            // The last tenth is for requests that are under way.
            until: begun.checked_add(Duration::from_secs(lasts.min(86_400)) * 9 / 10),
        })
    }
}

/// Says who has refused.
fn of_token_server(failure: Failure) -> Failure {
    let of = |answer: String| format!("its token server says {answer}");
    match failure {
        Failure::Again(answer, rest) => Failure::Again(of(answer), rest),
        Failure::Final(RegistryError::Denied {
            doing,
            whom,
            answer,
        }) => {
            let answer = of(answer);
            Failure::Final(RegistryError::Denied {
                doing,
                whom,
                answer,
            })
        }
        Failure::Final(
            RegistryError::Missing { doing, answer } | RegistryError::Answer { doing, answer },
        ) => Failure::answer(&doing, of(answer)),
        other => other,
    }
}

fn bearer(doing: &str, token: &str) -> Result<HeaderValue, Failure> {
    let mut value = HeaderValue::from_str(&format!("Bearer {token}"))
        .map_err(|_| Failure::answer(doing, "the token is none"))?;
    value.set_sensitive(true);
    Ok(value)
}

/// The first challenge that can be answered.
fn challenge(headers: &HeaderMap) -> Option<Challenge> {
    let all = headers.get_all(WWW_AUTHENTICATE).iter();
    all.filter_map(|value| one(value.to_str().ok()?)).next()
}

fn one(text: &str) -> Option<Challenge> {
    let (scheme, rest) = text.trim().split_once(' ').unwrap_or((text.trim(), ""));
    if scheme.eq_ignore_ascii_case("basic") {
        return Some(Challenge::Basic);
    }
    if !scheme.eq_ignore_ascii_case("bearer") {
        return None;
    }
    let (mut realm, mut service) = (None, None);
    let mut rest = rest.trim_start();
    while let Some((key, value)) = rest.split_once('=') {
        let (value, after) = value_of(value);
        match key.trim().to_ascii_lowercase().as_str() {
            "realm" => realm = Some(value),
            "service" => service = Some(value),
            _ => {}
        }
        rest = after
            .trim_start()
            .strip_prefix(',')
            .unwrap_or("")
            .trim_start();
    }
    let realm: Uri = realm?.parse().ok()?;
    // A password in an address is nobody's that is meant to be sent.
    let realm = http::resolve(&realm, &realm.to_string())?;
    Some(Challenge::Bearer { realm, service })
}

/// A token or a quoted string, and what follows.
fn value_of(text: &str) -> (String, &str) {
    let Some(quoted) = text.trim_start().strip_prefix('"') else {
        let end = text.find(',').unwrap_or(text.len());
        return (text[..end].trim().to_owned(), &text[end..]);
    };
    let mut value = String::new();
    let mut chars = quoted.char_indices();
    while let Some((at, c)) = chars.next() {
        match c {
            '"' => return (value, &quoted[at + 1..]),
            '\\' => value.extend(chars.next().map(|(_, c)| c)),
            c => value.push(c),
        }
    }
    (value, "")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn challenges_are_read_as_they_are_written() {
        let bearer = |realm: &str, service: Option<&str>| {
            Some(Challenge::Bearer {
                realm: realm.parse().unwrap(),
                service: service.map(str::to_owned),
            })
        };
        for (text, wanted) in [
            ("Basic realm=\"x\"", Some(Challenge::Basic)),
            ("basic", Some(Challenge::Basic)),
            (
                "Bearer realm=\"https://a.example/token\"",
                bearer("https://a.example/token", None),
            ),
            (
                "Bearer realm=\"https://a.example/t\",service=\"r, \\\"x\\\"\",scope=\"repository:a:pull,push\"",
                bearer("https://a.example/t", Some("r, \"x\"")),
            ),
            (
                "bearer service=r , realm=https://a.example/t",
                bearer("https://a.example/t", Some("r")),
            ),
            ("Bearer service=\"x\"", None),
            ("Bearer realm=\"file:///etc/passwd\"", None),
            ("Bearer realm=\"https://a:b@a.example/\"", None),
            ("Bearer realm=\"", None),
            ("Negotiate", None),
            ("", None),
        ] {
            assert_eq!(one(text), wanted, "{text}");
        }
    }
}
