//! Where copies of images are.

use std::{fmt, str::FromStr};

use super::{DatasetUri, UriError};

/// Longest name of a repository that is accepted: together with a host it fits everywhere.
const MAX_REPOSITORY: usize = 255;

/// Where copies of images are. What parses is safe to log and to compare.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ImagePlace {
    /// `s3://bucket/prefix/`: all keys below the prefix.
    Bucket {
        /// The bucket's name.
        bucket: String,
        /// What keys begin with: nothing, or a prefix with its slash.
        key: String,
    },
    /// `docker://host[:port]/repository`.
    Registry(Repository),
}

/// A repository of an OCI registry: `docker://host[:port]/repository`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Repository {
    /// The registry: `host` or `host:port`.
    pub host: String,
    /// The repository's name, of one part or several: `team/images`.
    pub name: String,
}

/// Why a place was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PlaceError {
    /// Neither a bucket's prefix nor a repository.
    #[error(
        "{0:?} is no place of images: s3://bucket/prefix/ or docker://host/repository is meant"
    )]
    Scheme(String),
    /// The registry's part is none.
    #[error(
        "{uri:?}: {host:?} is no registry: a lower-case host name or address, with a port or without"
    )]
    Host {
        /// The URI.
        uri: String,
        /// What stood in the registry's place.
        host: String,
    },
    /// The repository's part is none.
    #[error(
        "{uri:?}: {name:?} is no repository: parts of a-z, 0-9, and '.', '_', '__' or '-' between them, with '/' between the parts"
    )]
    Name {
        /// The URI.
        uri: String,
        /// What stood in the repository's place.
        name: String,
    },
    /// Not a bucket's prefix.
    #[error(transparent)]
    Bucket(#[from] UriError),
}

impl ImagePlace {
    /// Whether `other` is this place, or lies below it.
    pub fn contains(&self, other: &Self) -> bool {
        match (self, other) {
            // A prefix ends with a slash: `s3://a/x/` never begins `s3://a/x-private/`.
            (Self::Bucket { .. }, Self::Bucket { .. }) => {
                other.to_string().starts_with(&self.to_string())
            }
            (Self::Registry(this), Self::Registry(other)) => {
                let rest = other.name.strip_prefix(&this.name);
                this.host == other.host
                    && rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
            }
            _ => false,
        }
    }
}

impl FromStr for ImagePlace {
    type Err = PlaceError;
    fn from_str(text: &str) -> Result<Self, PlaceError> {
        let refuse = || PlaceError::Scheme(shown(text));
        if text.starts_with("docker://") {
            return text.parse().map(Self::Registry);
        }
        if !text.starts_with("s3://") {
            return Err(refuse());
        }
        match text.parse::<DatasetUri>()? {
            DatasetUri::S3 { bucket, key } if text.ends_with('/') => {
                Ok(Self::Bucket { bucket, key })
            }
            _ => Err(refuse()),
        }
    }
}

impl fmt::Display for ImagePlace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Bucket { bucket, key } => write!(f, "s3://{bucket}/{key}"),
            Self::Registry(repository) => repository.fmt(f),
        }
    }
}

impl FromStr for Repository {
    type Err = PlaceError;
    fn from_str(text: &str) -> Result<Self, PlaceError> {
        let rest = text.strip_prefix("docker://");
        let rest = rest.ok_or_else(|| PlaceError::Scheme(shown(text)))?;
        let (host, name) = rest.split_once('/').unwrap_or((rest, ""));
        if !is_host(host) {
            return Err(PlaceError::Host {
                uri: shown(text),
                host: shown(host),
            });
        }
        if name.len() > MAX_REPOSITORY || !name.split('/').all(is_part) {
            return Err(PlaceError::Name {
                uri: shown(text),
                name: shown(name),
            });
        }
        Ok(Self {
            host: host.to_owned(),
            name: name.to_owned(),
        })
    }
}

impl fmt::Display for Repository {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "docker://{}/{}", self.host, self.name)
    }
}

fn shown(text: &str) -> String {
    text.chars().take(200).collect()
}

fn is_host(text: &str) -> bool {
    // An address of version 6 is in brackets.
    let (host, port) = match text.strip_prefix('[').and_then(|rest| rest.split_once(']')) {
        Some((address, "")) => (is_address(address), None),
        Some((address, rest)) => (
            is_address(address),
            Some(rest.strip_prefix(':').unwrap_or("")),
        ),
        None => match text.split_once(':') {
            Some((host, port)) => (is_name(host), Some(port)),
            None => (is_name(text), None),
        },
    };
    let digits = |port: &str| port.bytes().all(|b| b.is_ascii_digit());
    host && port.is_none_or(|port| digits(port) && port.parse::<u16>().is_ok_and(|port| port > 0))
}

fn is_address(text: &str) -> bool {
    text.parse::<std::net::Ipv6Addr>().is_ok()
}

fn is_name(host: &str) -> bool {
    let plain = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-';
    let edge = |label: &str| label.starts_with('-') || label.ends_with('-');
    let label = |label: &str| !label.is_empty() && !edge(label) && label.bytes().all(plain);
    host.len() <= 253 && host.split('.').all(label)
}

/// `[a-z0-9]+((\.|_|__|-+)[a-z0-9]+)*`, as OCI's distribution specification has it.
fn is_part(part: &str) -> bool {
    let plain = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    let words = part.split(|c: char| c.is_ascii_lowercase() || c.is_ascii_digit());
    let separates =
        |word: &str| matches!(word, "" | "." | "_" | "__") || word.bytes().all(|b| b == b'-');
    part.bytes().next().is_some_and(plain)
        && part.bytes().last().is_some_and(plain)
        && words.into_iter().all(separates)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_understood_is_written_back() {
        for good in [
            "s3://bucket/",
            "s3://bucket/a/b/",
            "docker://registry.example.com/images",
            "docker://localhost:5000/team-a/warm__1.2_x",
            "docker://10.0.0.1/a--b",
            "docker://[::1]:5000/a",
            "docker://[::1]/a",
        ] {
            assert_eq!(good.parse::<ImagePlace>().unwrap().to_string(), good);
        }
    }

    #[test]
    fn what_is_refused() {
        for bad in [
            "",
            "s3://bucket",
            "s3://bucket/a",
            "s3://bucket/../",
            "file:///images/",
            "oci://x/y",
            "docker://",
            "docker://host",
            "docker://host/",
            "docker:///name",
            "docker://host/a/",
            "docker://host//a",
            "docker://host/../a",
            "docker://host/A",
            "docker://HOST/a",
            "docker://host/a:tag",
            "docker://host/a@sha256:00",
            "docker://host:/a",
            "docker://host:0/a",
            "docker://host:65536/a",
            "docker://host:+5/a",
            "docker://user@host/a",
            "docker://user:word@host/a",
            "docker://-host/a",
            "docker://ho st/a",
            "docker://[::1/a",
            "docker://[::1]5000/a",
            "docker://[x]/a",
            "docker://host/a___b",
            "docker://host/a.-b",
            "docker://host/-a",
            "docker://host/a?b",
            "docker://host/a\nb",
            &format!("docker://host/{}", "a".repeat(256)),
        ] {
            assert!(bad.parse::<ImagePlace>().is_err(), "{bad:?}");
        }
    }

    #[test]
    fn what_lies_in_a_place_is_below_it() {
        let place = |text: &str| text.parse::<ImagePlace>().unwrap();
        let tier = place("docker://host/team");
        assert!(tier.contains(&place("docker://host/team")));
        assert!(tier.contains(&place("docker://host/team/a")));
        for other in [
            "docker://host/team-b",
            "docker://host/other/team",
            "docker://host:5000/team",
            "docker://other/team",
            "s3://host/team/",
        ] {
            assert!(!tier.contains(&place(other)), "{other}");
        }
        assert!(!place("s3://team/").contains(&tier));
    }
}
