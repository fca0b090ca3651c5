//! Credentials, where docker and podman keep them.

use std::{
    collections::BTreeMap,
    env, fmt, fs,
    io::{Read as _, Write as _},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use base64_simd::STANDARD;
use hyper::header::HeaderValue;
use rekindle_core::uri::Repository;
use serde::Deserialize;

use super::RegistryError;

/// What a program may take to tell credentials: those of clouds ask a service in the same cloud.
const DEADLINE: Duration = Duration::from_secs(10);
/// Most bytes of a file or an answer with credentials. A pipe holds as many.
const MAX: u64 = 64 << 10;
/// Under which name Docker Hub's are kept.
const HUB: &str = "https://index.docker.io/v1/";
/// What programs say when they have none, in docker's own words.
const NONE: &str = "credentials not found in native keychain";
/// The user name that says that the secret is an identity token.
const TOKEN_USER: &str = "<token>";

/// Who we are.
#[derive(Default)]
pub(super) enum Credentials {
    #[default]
    None,
    Basic {
        user: String,
        secret: String,
    },
    /// What tokens are given for.
    Identity(String),
    /// A token itself.
    Token(String),
}

impl fmt::Debug for Credentials {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::None => "None",
            Self::Basic { .. } => "Basic",
            Self::Identity(_) => "Identity",
            Self::Token(_) => "Token",
        })
    }
}

impl Credentials {
    /// For `Authorization`, where they are a name and a password.
    pub(super) fn basic(&self) -> Option<HeaderValue> {
        let Self::Basic { user, secret } = self else {
            return None;
        };
        let text = STANDARD.encode_to_string(format!("{user}:{secret}"));
        let mut value = HeaderValue::from_str(&format!("Basic {text}")).ok()?;
        value.set_sensitive(true);
        Some(value)
    }
}

#[derive(Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct File {
    auths: BTreeMap<String, Entry>,
    cred_helpers: BTreeMap<String, String>,
    creds_store: Option<String>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Entry {
    auth: String,
    username: String,
    password: String,
    identitytoken: String,
    registrytoken: String,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Told {
    username: String,
    secret: String,
}

/// The credentials for a repository, and where they are from; none where there are none. A file that is named has to be
/// there, and docker's own need not.
pub(super) fn find(
    named: Option<&Path>,
    repository: &Repository,
) -> Result<Option<(Credentials, String)>, RegistryError> {
    let Some(path) = named.map(Path::to_owned).or_else(usual) else {
        return Ok(None);
    };
    let refuse = |from: &str, reason: String| RegistryError::Credentials {
        host: repository.host.clone(),
        from: from.to_owned(),
        reason,
    };
    let from = path.display().to_string();
    let text = match bounded(&path) {
        Ok(text) => text,
        Err(e) if named.is_none() && e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(refuse(&from, e.to_string())),
    };
    // What serde says can have a piece of the file in it.
    let file: File = serde_json::from_slice(&text).map_err(|e| {
        refuse(
            &from,
            format!("line {} is no JSON that is understood", e.line()),
        )
    })?;
    let server = server(&repository.host);
    let helper = keys(repository).find_map(|key| file.cred_helpers.get(&key));
    if let Some(name) = helper.or(file.creds_store.as_ref()) {
        let program = format!("docker-credential-{name}");
        let told = asked(name, &program, server).map_err(|reason| refuse(&program, reason))?;
        if let Some(credentials) = told {
            return Ok(Some((credentials, program)));
        }
    }
    let Some(entry) = keys(repository).find_map(|key| file.auths.get(&key)) else {
        return Ok(None);
    };
    let credentials = entry.credentials();
    let credentials = credentials
        .ok_or_else(|| refuse(&from, "\"auth\" is no base64 of NAME:PASSWORD".to_owned()))?;
    Ok(match credentials {
        // What a program keeps leaves an empty entry here.
        Credentials::None => None,
        credentials => Some((credentials, from)),
    })
}

/// Docker's own file.
fn usual() -> Option<PathBuf> {
    let set = |name| env::var_os(name).filter(|value| !value.is_empty());
    let folder = set("DOCKER_CONFIG").map(PathBuf::from);
    let folder = folder.or_else(|| Some(PathBuf::from(set("HOME")?).join(".docker")));
    Some(folder?.join("config.json"))
}

fn bounded(path: &Path) -> std::io::Result<Vec<u8>> {
    let mut text = Vec::new();
    fs::File::open(path)?.take(MAX + 1).read_to_end(&mut text)?;
    if text.len() as u64 > MAX {
        let reason = format!("it has more than {MAX} bytes");
        return Err(std::io::Error::other(reason));
    }
    Ok(text)
}

fn server(host: &str) -> &str {
    match host {
        "docker.io" => HUB,
        host => host,
    }
}

/// What a repository's entry may be called, the closest first: podman's files know repositories, docker's registries,
/// and both may have been written with a scheme.
fn keys(repository: &Repository) -> impl Iterator<Item = String> {
    let whole = format!("{}/{}", repository.host, repository.name);
    let ends = whole.match_indices('/').map(|(at, _)| at);
    let mut keys: Vec<String> = ends.map(|at| whole[..at].to_owned()).rev().collect();
    keys.insert(0, whole.clone());
    let host = &repository.host;
    keys.push(server(host).to_owned());
    let old = ["", "/", "/v1", "/v1/", "/v2", "/v2/"];
    keys.extend(old.map(|path| format!("https://{host}{path}")));
    keys.into_iter()
}

impl Entry {
    fn credentials(&self) -> Option<Credentials> {
        if !self.registrytoken.is_empty() {
            return Some(Credentials::Token(self.registrytoken.clone()));
        }
        if !self.identitytoken.is_empty() {
            return Some(Credentials::Identity(self.identitytoken.clone()));
        }
        if !self.username.is_empty() {
            return Some(Credentials::Basic {
                user: self.username.clone(),
                secret: self.password.clone(),
            });
        }
        if self.auth.is_empty() {
            return Some(Credentials::None);
        }
        let text = STANDARD.decode_to_vec(self.auth.as_bytes()).ok()?;
        let text = String::from_utf8(text).ok()?;
        let (user, secret) = text.split_once(':')?;
        Some(Credentials::Basic {
            user: user.to_owned(),
            // Some versions of docker have padded it.
            secret: secret.trim_end_matches('\0').to_owned(),
        })
    }
}

/// What a program for credentials tells of a registry; none where it has none.
fn asked(name: &str, program: &str, server: &str) -> Result<Option<Credentials>, String> {
    let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.');
    if name.is_empty() || !name.bytes().all(plain) {
        return Err("it has no name of a program".to_owned());
    }
    let mut child = Command::new(program)
        .arg("get")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .map_err(|e| format!("it cannot be started: {e}"))?;
    // One that does not read it tells by what it says.
    let _ = child.stdin.take().map(|mut to| writeln!(to, "{server}"));
    let begun = Instant::now();
    let status = loop {
        match child.try_wait().map_err(|e| e.to_string())? {
            Some(status) => break status,
            None if begun.elapsed() < DEADLINE => {
                std::thread::park_timeout(Duration::from_millis(5))
            }
            None => {
                // It is ours, and nobody waits for it any more.
                let _ = child.kill().and_then(|()| child.wait());
                return Err(format!("it did not end within {} s", DEADLINE.as_secs()));
            }
        }
    };
    let mut text = Vec::new();
    let out = child.stdout.take().ok_or("its output is gone")?;
    out.take(MAX)
        .read_to_end(&mut text)
        .map_err(|e| e.to_string())?;
    if !status.success() {
        // What it prints else may be anything.
        let none = String::from_utf8_lossy(&text).contains(NONE);
        return if none {
            Ok(None)
        } else {
            Err(format!("it ended with {status}"))
        };
    }
    let told: Told =
        serde_json::from_slice(&text).map_err(|_| "what it prints is not understood")?;
    Ok(Some(match told.username.as_str() {
        "" if told.secret.is_empty() => return Ok(None),
        TOKEN_USER => Credentials::Identity(told.secret),
        _ => Credentials::Basic {
            user: told.username,
            secret: told.secret,
        },
    }))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    fn repository() -> Repository {
        "docker://r.example:5000/team/a".parse().unwrap()
    }

    /// What is found in a file of that text: how it would be used.
    fn found(text: &str) -> Result<String, String> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("config.json");
        fs::write(&path, text).unwrap();
        let found = find(Some(&path), &repository()).map_err(|e| e.to_string())?;
        Ok(match found.map(|(credentials, _)| credentials) {
            None | Some(Credentials::None) => String::new(),
            Some(Credentials::Basic { user, secret }) => format!("{user}:{secret}"),
            Some(Credentials::Identity(token)) => format!("identity {token}"),
            Some(Credentials::Token(token)) => format!("token {token}"),
        })
    }

    #[test]
    fn an_entry_is_the_closest_one() {
        let auths = |entries: &str| found(&format!("{{\"auths\": {{{entries}}}}}")).unwrap();
        let of = |text: &str| format!("{{\"auth\": {:?}}}", STANDARD.encode_to_string(text));
        let (a, b) = (of("a:x:y"), of("b:z"));
        assert_eq!(auths(""), "");
        assert_eq!(auths(&format!("\"other\": {a}")), "");
        assert_eq!(auths(&format!("\"r.example\": {a}")), "", "another port");
        assert_eq!(auths(&format!("\"r.example:5000\": {a}")), "a:x:y");
        assert_eq!(
            auths(&format!("\"https://r.example:5000/v1/\": {a}")),
            "a:x:y"
        );
        let both = format!("\"r.example:5000\": {a}, \"r.example:5000/team\": {b}");
        assert_eq!(auths(&both), "b:z");
        let other = format!("\"r.example:5000\": {a}, \"r.example:5000/team-b\": {b}");
        assert_eq!(auths(&other), "a:x:y");
        assert_eq!(auths("\"r.example:5000\": {}"), "");
        assert_eq!(
            auths("\"r.example:5000\": {\"identitytoken\": \"t\"}"),
            "identity t"
        );
        assert_eq!(
            auths("\"r.example:5000\": {\"registrytoken\": \"t\"}"),
            "token t"
        );
    }

    #[test]
    fn a_file_that_is_none_is_told_without_what_is_in_it() {
        for bad in [
            "",
            "hunter2",
            "{\"auths\": \"hunter2\"}",
            "{\"auths\": {\"r.example:5000\": {\"auth\": \"hunter2\"}}}",
        ] {
            let refused = found(bad).unwrap_err();
            assert!(
                refused.contains("r.example:5000") && !refused.contains("hunter2"),
                "{refused}"
            );
        }
        let missing = find(Some(Path::new("/nowhere/config.json")), &repository()).unwrap_err();
        assert!(
            missing.to_string().contains("/nowhere/config.json"),
            "{missing}"
        );
    }

    #[test]
    fn a_program_is_asked_and_its_words_are_not_repeated() {
        let folder = tempfile::tempdir().unwrap();
        let asked = |script: &str| {
            let path = folder.path().join("program");
            fs::write(&path, format!("#!/bin/sh\n{script}\n")).unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
            let program = path.display().to_string();
            match asked("x", &program, "r.example:5000") {
                Ok(None) => "none".to_owned(),
                Ok(Some(Credentials::Basic { user, secret })) => format!("{user}:{secret}"),
                Ok(Some(other)) => format!("{other:?}"),
                Err(reason) => reason,
            }
        };
        let says = "read server; echo \"{\\\"ServerURL\\\": \\\"\\\", \\\"Username\\\": \\\"$1\\\", \\\"Secret\\\": \\\"$server\\\"}\"";
        assert_eq!(asked(says), "get:r.example:5000");
        assert_eq!(
            asked("echo '{\"Username\": \"<token>\", \"Secret\": \"t\"}'"),
            "Identity"
        );
        assert_eq!(asked(&format!("echo {NONE}; exit 1")), "none");
        let failed = asked("echo hunter2; echo hunter2 >&2; exit 3");
        assert!(
            failed.contains("exit status: 3") && !failed.contains("hunter2"),
            "{failed}"
        );
        assert_eq!(asked("echo hunter2"), "what it prints is not understood");
        assert_eq!(
            super::asked("../x", "x", "s").unwrap_err(),
            "it has no name of a program"
        );
    }
}
