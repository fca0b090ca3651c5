//! Names that become folder names: checked once, by type.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};

/// With what the names of images begin that containers make for others of their kind: nobody else names one so.
pub const WARM_PREFIX: &str = "auto-";
/// Longest name that is accepted: what Kubernetes allows for most objects (RFC 1123 label).
pub const MAX_NAME: usize = 63;

/// Why a name was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{what} {value:?} is not a name: 1 to {MAX_NAME} of a-z, A-Z, 0-9, '.', '_' and '-', beginning with a letter or digit"
)]
pub struct NameError {
    /// What the name was meant for.
    pub what: &'static str,
    /// What was found, cut to 80 characters.
    pub value: String,
}

fn check(what: &'static str, value: &str) -> Result<(), NameError> {
    let fits = !value.is_empty()
        && value.len() <= MAX_NAME
        && value.starts_with(|c: char| c.is_ascii_alphanumeric())
        && value
            .chars()
            .all(|c| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-'));
    if fits {
        return Ok(());
    }
    Err(NameError {
        what,
        value: value.chars().take(80).collect(),
    })
}

macro_rules! name {
    ($(#[$doc:meta])* $name:ident, $what:literal) => {
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $name(String);

        impl $name {
            /// The name as text; never empty, never with a slash, never beginning with a dot.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl FromStr for $name {
            type Err = NameError;
            fn from_str(value: &str) -> Result<Self, NameError> {
                check($what, value)?;
                Ok(Self(value.to_owned()))
            }
        }

        impl TryFrom<String> for $name {
            type Error = NameError;
            fn try_from(value: String) -> Result<Self, NameError> {
                value.parse()
            }
        }

        impl From<$name> for String {
            fn from(name: $name) -> String {
                name.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
    };
}

name!(
    /// A namespace: the pod's under CRI, containerd's own under `ctr`.
    Namespace,
    "namespace"
);
name!(
    /// The name of a checkpoint image inside its namespace.
    ImageName,
    "image name"
);

/// `[<namespace>/]<name>[@<generation>]`, as `restore-from` and the CLI take it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ImageRef {
    /// The namespace, where one was named; else the caller's own.
    pub namespace: Option<Namespace>,
    /// The name.
    pub name: ImageName,
    /// The generation; none means the newest.
    pub generation: Option<u64>,
}

/// Why an image reference was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ImageRefError {
    /// One of its parts is not a name.
    #[error(transparent)]
    Name(#[from] NameError),
    /// What follows the `@` is not a number from 1.
    #[error(
        "generation {0:?} is not a whole number from 1 (an image reference is [namespace/]name[@generation])"
    )]
    Generation(String),
}

impl FromStr for ImageRef {
    type Err = ImageRefError;
    fn from_str(text: &str) -> Result<Self, ImageRefError> {
        let (path, generation) = match text.split_once('@') {
            None => (text, None),
            Some((path, number)) => match number.parse::<u64>() {
                Ok(n) if n > 0 => (path, Some(n)),
                _ => return Err(ImageRefError::Generation(number.chars().take(40).collect())),
            },
        };
        let (namespace, name) = match path.split_once('/') {
            None => (None, path),
            Some((namespace, name)) => (Some(namespace.parse()?), name),
        };
        Ok(Self {
            namespace,
            name: name.parse()?,
            generation,
        })
    }
}

impl fmt::Display for ImageRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(namespace) = &self.namespace {
            write!(f, "{namespace}/")?;
        }
        write!(f, "{}", self.name)?;
        match self.generation {
            Some(generation) => write!(f, "@{generation}"),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_never_leaves_its_folder() {
        for bad in [
            "",
            ".",
            "..",
            "a/b",
            "-a",
            ".a",
            "a b",
            "a\0",
            &"a".repeat(64),
        ] {
            assert!(bad.parse::<ImageName>().is_err(), "{bad:?}");
        }
        for good in ["a", "vllm-70b", "0.1_x", &"a".repeat(63)] {
            assert!(good.parse::<ImageName>().is_ok(), "{good:?}");
        }
    }

    #[test]
    fn references_round_trip() {
        for text in ["a", "a@3", "ns/a", "ns/a@12"] {
            assert_eq!(text.parse::<ImageRef>().unwrap().to_string(), text);
        }
        for bad in ["a@", "a@0", "a@x", "/a", "ns/", "a/b/c", "a@1@2", "../a"] {
            assert!(bad.parse::<ImageRef>().is_err(), "{bad:?}");
        }
    }
}
