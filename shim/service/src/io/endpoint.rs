//! What containerd writes in the place of a stream: a path, or a URI.

use std::{
    ffi::OsString,
    os::unix::ffi::OsStringExt,
    path::{Path, PathBuf},
};

use super::Streams;
use crate::error::Error;

/// What is opened for a stream.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Target {
    /// A FIFO, or what else lies there: a terminal, `/dev/null`.
    Path(PathBuf),
    /// A file to append to, made where there is none.
    File(PathBuf),
}

/// A program that takes the output.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Program {
    pub(super) path: PathBuf,
    pub(super) args: Vec<OsString>,
}

/// Where the streams of one process lead.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Endpoints {
    pub(super) stdin: Option<PathBuf>,
    pub(super) output: Output,
}

/// Where output goes.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Output {
    /// stdout and stderr, each to a place of its own, or to none.
    Apart(Option<Target>, Option<Target>),
    /// Both to one program.
    Program(Program),
}

impl Default for Output {
    fn default() -> Self {
        Self::Apart(None, None)
    }
}

/// One stream, understood.
enum Uri {
    Target(Target),
    Program(Program),
}

impl Endpoints {
    /// Understands all three streams. A program that is named for stdout takes stderr too, whatever is
    /// named there, as with the Go shim; clients name it for both.
    pub(super) fn parse(streams: &Streams) -> Result<Self, Error> {
        let stdin = match Uri::parse(&streams.stdin)? {
            None => None,
            Some(Uri::Target(Target::Path(path))) => Some(path),
            Some(_) => return Err(refused(&streams.stdin, "stdin comes from a FIFO's path")),
        };
        let output = match Uri::parse(&streams.stdout)? {
            Some(Uri::Program(program)) => Output::Program(program),
            Some(Uri::Target(stdout)) => Output::Apart(Some(stdout), target(&streams.stderr)?),
            None => Output::Apart(None, target(&streams.stderr)?),
        };
        Ok(Self { stdin, output })
    }
}

/// Where stderr goes, when it does not go with stdout.
fn target(stderr: &str) -> Result<Option<Target>, Error> {
    match Uri::parse(stderr)? {
        None => Ok(None),
        Some(Uri::Target(target)) => Ok(Some(target)),
        Some(Uri::Program(_)) => {
            let reason = "a program takes both outputs: name it for stdout";
            Err(refused(stderr, reason))
        }
    }
}

impl Uri {
    fn parse(text: &str) -> Result<Option<Self>, Error> {
        if text.is_empty() {
            return Ok(None);
        }
        let Some((scheme, rest)) = text.split_once("://") else {
            return match text.starts_with('/') {
                true => Ok(Some(Self::Target(Target::Path(text.into())))),
                false => Err(refused(text, "a stream needs an absolute path")),
            };
        };
        let rest = rest.split_once('#').map_or(rest, |(rest, _)| rest);
        let (path, query) = rest.split_once('?').unwrap_or((rest, ""));
        let path = || match decoded(path, false) {
            Some(path) if Path::new(&path).is_absolute() => Ok(PathBuf::from(path)),
            Some(_) => Err(refused(text, "a stream needs an absolute path")),
            None => Err(refused(text, "a % without two hexadecimal digits")),
        };
        match scheme {
            "fifo" => Ok(Some(Self::Target(Target::Path(path()?)))),
            "file" => Ok(Some(Self::Target(Target::File(path()?)))),
            "binary" => Ok(Some(Self::Program(Program {
                path: path()?,
                args: arguments(query)
                    .ok_or_else(|| refused(text, "a % without two hexadecimal digits"))?,
            }))),
            _ => Err(refused(
                text,
                "allowed are a FIFO's path, fifo://, file:// and binary://",
            )),
        }
    }
}

fn refused(text: &str, reason: &str) -> Error {
    Error::Argument {
        key: format!("stream {text:?}"),
        reason: reason.to_owned(),
    }
}

/// The arguments of a query: each key and its first value.
fn arguments(query: &str) -> Option<Vec<OsString>> {
    let mut args: Vec<OsString> = Vec::new();
    for pair in query.split('&').filter(|pair| !pair.is_empty()) {
        let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
        let (key, value) = (decoded(key, true)?, decoded(value, true)?);
        if !args.iter().step_by(2).any(|known| *known == key) {
            args.extend([key, value]);
        }
    }
    Some(args)
}

/// Text of a URI without its escapes; in a query a plus is a blank.
fn decoded(text: &str, in_query: bool) -> Option<OsString> {
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        bytes.push(match byte {
            b'%' => {
                let mut digit = || char::from(rest.next()?).to_digit(16);
                u8::try_from(digit()? << 4 | digit()?).ok()?
            }
            b'+' if in_query => b' ',
            byte => byte,
        });
    }
    Some(OsString::from_vec(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn output(stdout: &str, stderr: &str) -> Result<Output, String> {
        let streams = Streams {
            stdout: stdout.to_owned(),
            stderr: stderr.to_owned(),
            ..Streams::default()
        };
        let parsed = Endpoints::parse(&streams);
        parsed
            .map(|endpoints| endpoints.output)
            .map_err(|e| e.to_string())
    }

    #[test]
    fn what_is_understood() {
        let path = |path: &str| Some(Target::Path(path.into()));
        let file = |path: &str| Some(Target::File(path.into()));
        for (text, expected) in [
            ("", None),
            ("/run/x", path("/run/x")),
            ("/run/100%?", path("/run/100%?")),
            ("fifo:///run/x", path("/run/x")),
            ("file:///var/log/a%20b?x=1#y", file("/var/log/a b")),
        ] {
            assert_eq!(
                output(text, ""),
                Ok(Output::Apart(expected, None)),
                "{text}"
            );
        }
        let uri = "binary:///bin/log?dir=/a%2Fb&name=one+two&dir=again&flag";
        let program = Program {
            path: "/bin/log".into(),
            args: ["dir", "/a/b", "name", "one two", "flag", ""]
                .map(OsString::from)
                .to_vec(),
        };
        for stderr in ["", uri, "/run/x"] {
            assert_eq!(output(uri, stderr), Ok(Output::Program(program.clone())));
        }
    }

    #[test]
    fn what_is_refused_is_named() {
        for bad in [
            "x",
            "file://x",
            "fifo://",
            "binary://",
            "binary://log/x?a",
            "binary:///log?a=%2",
            "file:///%zz",
            "http://x/y",
            "binary:/log",
        ] {
            let error = output(bad, "").unwrap_err();
            assert!(error.contains(&format!("{bad:?}: ")), "{error}");
        }
        assert!(
            output("/x", "binary:///log")
                .unwrap_err()
                .contains("stdout")
        );
        let stdin = Streams {
            stdin: "file:///x".to_owned(),
            ..Streams::default()
        };
        assert!(Endpoints::parse(&stdin).is_err());
    }
}
