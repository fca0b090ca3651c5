//! How a registry is reached, and as whom; and that credentials go to nobody else.

use std::{
    collections::HashMap,
    fs,
    os::unix::fs::PermissionsExt as _,
    path::Path,
    process::Command,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering::SeqCst},
    },
};

use rekindle_checkpoint::layout::LayoutError;
use rekindle_store::registry::{Access, Registry, RegistryError};
use serde_json::json;

use crate::{
    http::{Message, answers},
    nodes::{MIB, Nodes, chain},
    proxy::{Lie, Op, Proxy, Request},
};

/// Base64 of `anna:hunter2` and of `anna:wrong`.
const ANNA: &str = "YW5uYTpodW50ZXIy";
const WRONG: &str = "YW5uYTp3cm9uZw==";

/// A registry that knows Anna only, by its own htpasswd.
fn of_anna() -> Nodes {
    Nodes::with(|folder| {
        let file = folder.join("htpasswd");
        let made = Command::new("htpasswd")
            .args(["-Bbn", "anna", "hunter2"])
            .output();
        let made = made.expect("the Debian package apache2-utils is installed by `make deps`");
        fs::write(&file, made.stdout).unwrap();
        format!(
            "auth:\n  htpasswd:\n    realm: basic-realm\n    path: {}\n",
            file.display()
        )
    })
}

fn auths(nodes: &Nodes, auth: &str) -> String {
    let host = nodes.address.to_string();
    json!({"auths": {host: {"auth": auth}}}).to_string()
}

#[test]
fn who_may_is_said_by_dockers_own_file() {
    let nodes = of_anna();
    let image = nodes.make(None, 1, 2 * MIB);
    let none = nodes.layout_as(nodes.address, "{}");
    let refused = nodes.push(&none, &image).unwrap_err().to_string();
    assert!(
        refused.contains("refuses who has no credentials (HTTP 401)"),
        "{refused}"
    );

    let wrong = nodes.layout_as(nodes.address, &auths(&nodes, WRONG));
    let refused = nodes.push(&wrong, &image).unwrap_err().to_string();
    assert!(
        refused.contains("refuses the credentials of /"),
        "{refused}"
    );
    assert!(
        refused.contains("config.json") && !refused.contains("wrong"),
        "{refused}"
    );

    let right = nodes.layout_as(nodes.address, &auths(&nodes, ANNA));
    nodes.push(&right, &image).unwrap();
    nodes.pull(&right, "team-a/warm", None).unwrap();
    // As whom is said once, and then with each request: of all only the first is challenged.
    let proxy = Proxy::start(nodes.address, |_| Lie::None);
    let file = json!({"auths": {proxy.at().to_string(): {"auth": ANNA}}}).to_string();
    let through = nodes.layout_as(proxy.at(), &file);
    assert!(through.holds(&image).unwrap());
    assert_eq!(
        proxy.count(Op::Manifest),
        3,
        "asked without, asked, and by its digest"
    );
}

#[test]
fn a_program_has_the_credentials() {
    let nodes = of_anna();
    let image = nodes.make(None, 1, MIB);
    nodes
        .push(
            &nodes.layout_as(nodes.address, &auths(&nodes, ANNA)),
            &image,
        )
        .unwrap();
    let folder = nodes.folder.path().join("bin");
    fs::create_dir(&folder).unwrap();
    let says = |name: &str, script: &str| {
        let program = folder.join(format!("docker-credential-{name}"));
        fs::write(&program, format!("#!/bin/sh\n{script}\n")).unwrap();
        fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
    };
    says(
        "anna",
        "read server; test \"$1\" = get && echo \"{\\\"ServerURL\\\": \\\"$server\\\", \\\"Username\\\": \\\"anna\\\", \\\"Secret\\\": \\\"hunter2\\\"}\"",
    );
    says("broken", "echo hunter2 >&2; exit 2");
    says(
        "none",
        "echo credentials not found in native keychain; exit 1",
    );
    let host = nodes.address.to_string();
    for (file, words) in [
        (json!({"credHelpers": {&host: "anna"}}), None),
        (json!({"credsStore": "anna"}), None),
        (
            json!({"credsStore": "none", "auths": {&host: {"auth": ANNA}}}),
            None,
        ),
        (
            json!({"credHelpers": {&host: "anna"}, "credsStore": "broken"}),
            None,
        ),
        (
            json!({"credsStore": "none"}),
            Some("who has no credentials"),
        ),
        (
            json!({"credsStore": "broken"}),
            Some("docker-credential-broken: it ended with exit status: 2"),
        ),
        (
            json!({"credsStore": "missing"}),
            Some("docker-credential-missing: it cannot be started"),
        ),
    ] {
        let config = nodes.folder.path().join("docker.json");
        fs::write(&config, file.to_string()).unwrap();
        let tier = format!(
            "[[images.tier]]\nurl = \"docker://{host}/team/images\"\nnamespaces = [\"*\"]\ncredentials-file = {config:?}\n"
        );
        let path = format!("{}:{}", folder.display(), std::env::var("PATH").unwrap());
        let mut command = nodes.command(
            "to",
            &tier,
            &["image", "ls", &format!("docker://{host}/team/images")],
        );
        let output = command.env("PATH", path).output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!said.contains("hunter2"), "{said}");
        match words {
            None => assert!(output.status.success(), "{file}: {output:?}"),
            Some(words) => assert!(said.contains(words), "{file}: {said}"),
        }
    }
}

/// A token server that gives numbered tokens, and what it was asked.
struct Tokens {
    realm: String,
    asked: Arc<Mutex<Vec<Message>>>,
    /// Tokens that were given.
    number: Arc<AtomicUsize>,
}

impl Tokens {
    fn start(answer: fn(&Message, usize) -> Message) -> Self {
        let (asked, number) = (Arc::<Mutex<Vec<Message>>>::default(), Arc::default());
        let (seen, count) = (Arc::clone(&asked), Arc::<AtomicUsize>::clone(&number));
        let address = answers(move |message| {
            seen.lock().unwrap().push(message.clone());
            answer(message, count.fetch_add(1, SeqCst) + 1)
        });
        Self {
            realm: format!("http://{address}/token"),
            asked,
            number,
        }
    }

    /// A registry that takes the tokens of that server, each for so many requests.
    fn guard(&self, nodes: &Nodes, lasts: usize) -> Arc<Proxy> {
        let (realm, number) = (self.realm.clone(), Arc::clone(&self.number));
        let used = Mutex::new(HashMap::<String, usize>::new());
        Proxy::start(nodes.address, move |r: &Request| {
            let given = 1..=number.load(SeqCst);
            let known = r.message.header("authorization").filter(|said| {
                let token = said.strip_prefix("Bearer token-");
                token.is_some_and(|n| n.parse().is_ok_and(|n| given.contains(&n)))
            });
            if let Some(token) = known {
                let mut used = used.lock().unwrap();
                let used = used.entry(token.to_owned()).or_default();
                *used += 1;
                if *used <= lasts {
                    return Lie::Unauthorized;
                }
            }
            let challenge = format!(
                "Bearer realm=\"{realm}\",service=\"a registry\",scope=\"repository:all/there/is:*\""
            );
            let headers = [("www-authenticate", challenge.as_str())];
            Lie::Answer(Message::answer("401 UNAUTHORIZED", &headers, b""))
        })
    }
}

fn token(_: &Message, number: usize) -> Message {
    let text = json!({"token": format!("token-{number}"), "expires_in": 300}).to_string();
    Message::answer("200 OK", &[], text.as_bytes())
}

#[test]
fn a_token_server_is_asked_for_what_is_needed_and_no_more() {
    let nodes = Nodes::new();
    let image = nodes.make(None, 1, 2 * MIB);
    let tokens = Tokens::start(token);
    let proxy = tokens.guard(&nodes, usize::MAX);
    let anna = json!({"auths": {proxy.at().to_string(): {"auth": ANNA}}}).to_string();
    let registry = nodes.layout_as(proxy.at(), &anna);
    nodes.push(&registry, &image).unwrap();
    let asked = tokens.asked.lock().unwrap().clone();
    let targets: Vec<&str> = asked.iter().map(Message::target).collect();
    assert_eq!(
        targets,
        [
            "/token?scope=repository%3Ateam%2Fimages%3Apull&client_id=rekindle&service=a%20registry",
            "/token?scope=repository%3Ateam%2Fimages%3Apull%2Cpush&client_id=rekindle&service=a%20registry",
        ]
    );
    let as_whom = asked.iter().map(|message| message.header("authorization"));
    assert!(
        as_whom.eq([Some(format!("Basic {ANNA}").as_str()); 2]),
        "{asked:?}"
    );

    // Without credentials a token is asked for all the same: that is how public repositories are read.
    let tokens = Tokens::start(token);
    let proxy = tokens.guard(&nodes, usize::MAX);
    nodes
        .pull(&nodes.layout(proxy.at()), "team-a/warm", None)
        .unwrap();
    let asked = tokens.asked.lock().unwrap();
    assert_eq!(asked.len(), 1);
    assert_eq!(asked[0].header("authorization"), None);
}

#[test]
fn a_token_that_has_expired_is_asked_for_anew() {
    let nodes = Nodes::new();
    let image = nodes.make(None, 1, 4 * MIB);
    let tokens = Tokens::start(token);
    let proxy = tokens.guard(&nodes, 5);
    nodes.push(&nodes.layout(proxy.at()), &image).unwrap();
    let number = tokens.number.load(SeqCst);
    assert!(number > 3, "{number} tokens");
    // One that says that it has expired is not tried.
    let tokens = Tokens::start(|_, number| {
        let text = json!({"access_token": format!("token-{number}"), "expires_in": 0}).to_string();
        Message::answer("200 OK", &[], text.as_bytes())
    });
    let proxy = tokens.guard(&nodes, 1);
    assert!(nodes.layout(proxy.at()).holds(&image).unwrap());
}

#[test]
fn an_identity_token_is_given_to_the_token_server_only() {
    let nodes = Nodes::new();
    nodes
        .push(&nodes.layout(nodes.address), &nodes.make(None, 1, MIB))
        .unwrap();
    let tokens = Tokens::start(token);
    let proxy = tokens.guard(&nodes, usize::MAX);
    let host = proxy.at().to_string();
    let file = json!({"auths": {host: {"identitytoken": "id/1"}}}).to_string();
    nodes
        .pull(&nodes.layout_as(proxy.at(), &file), "team-a/warm", None)
        .unwrap();
    let asked = tokens.asked.lock().unwrap();
    assert_eq!(asked[0].line, "POST /token HTTP/1.1");
    let form = String::from_utf8(asked[0].body.clone()).unwrap();
    assert!(
        form.contains("grant_type=refresh_token&refresh_token=id%2F1"),
        "{form}"
    );
    assert!(
        form.contains("scope=repository%3Ateam%2Fimages%3Apull&"),
        "{form}"
    );
}

#[test]
fn a_token_server_that_refuses_or_lies_is_told() {
    let nodes = Nodes::new();
    for (answer, words) in [
        (
            (|_, _| Message::answer("401 UNAUTHORIZED", &[], b"hunter2"))
                as fn(&Message, usize) -> Message,
            "(its token server says HTTP 401)",
        ),
        (
            |_, _| Message::answer("503 BUSY", &[], b""),
            "its token server says HTTP 503",
        ),
        (
            |_, _| Message::answer("404 NOT FOUND", &[], b""),
            "its token server says HTTP 404",
        ),
        (
            |_, _| Message::answer("200 OK", &[], b"hunter2"),
            "is no token",
        ),
        (|_, _| Message::answer("200 OK", &[], b"{}"), "has no token"),
        (
            |_, _| Message::answer("200 OK", &[], b"{\"token\": \"a\\nb: hunter2\"}"),
            "the token is none",
        ),
        (
            |_, _| Message::answer("200 OK", &[], &vec![b' '; MIB]),
            "more than the 65536 bytes",
        ),
    ] {
        let tokens = Tokens::start(answer);
        let proxy = tokens.guard(&nodes, usize::MAX);
        let refused = nodes.layout(proxy.at()).listed().unwrap_err();
        let refused = chain(&refused);
        assert!(
            refused.contains(words) && !refused.contains("hunter2"),
            "{words}: {refused}"
        );
    }
}

/// Registries lead to a store for their blobs. What they know us by is none of its business.
#[test]
fn credentials_do_not_follow_a_blob_to_another_host() {
    let nodes = of_anna();
    let image = nodes.make(None, 1, 4 * MIB);
    nodes
        .push(
            &nodes.layout_as(nodes.address, &auths(&nodes, ANNA)),
            &image,
        )
        .unwrap();
    let asked: Arc<Mutex<Vec<Message>>> = Arc::default();
    let (seen, folder) = (Arc::clone(&asked), nodes.kept(&"0".repeat(64)));
    let blobs = folder.ancestors().nth(3).map(Path::to_owned).unwrap();
    let store = answers(move |message| {
        seen.lock().unwrap().push(message.clone());
        let hex = message.target().rsplit('/').next().unwrap();
        let blob = fs::read(blobs.join(&hex[..2]).join(hex).join("data")).unwrap();
        let range = message
            .header("range")
            .unwrap()
            .trim_start_matches("bytes=");
        let (first, last) = range.split_once('-').unwrap();
        let (first, last): (usize, usize) = (first.parse().unwrap(), last.parse().unwrap());
        let said = format!("bytes {first}-{last}/{}", blob.len());
        Message::answer(
            "206 Partial Content",
            &[("content-range", &said)],
            &blob[first..=last],
        )
    });
    let proxy = Proxy::start(nodes.address, move |r| {
        if r.op != Op::Get || r.message.header("authorization").is_none() {
            return Lie::None;
        }
        let (_, digest) = r.message.target().rsplit_once("sha256:").unwrap();
        let to = format!("http://{store}/{digest}");
        Lie::Answer(Message::answer(
            "307 Temporary Redirect",
            &[("location", &to)],
            b"",
        ))
    });
    let file = json!({"auths": {proxy.at().to_string(): {"auth": ANNA}}}).to_string();
    nodes
        .pull(&nodes.layout_as(proxy.at(), &file), "team-a/warm", None)
        .unwrap();
    let asked = asked.lock().unwrap();
    assert!(
        asked.len() > 4,
        "{} requests came to the store",
        asked.len()
    );
    for message in asked.iter() {
        assert_eq!(message.header("authorization"), None, "{message:?}");
    }
}

/// An upload that is led elsewhere goes there, and credentials do not.
#[test]
fn credentials_do_not_follow_an_upload_to_another_host() {
    let nodes = Nodes::new();
    let image = nodes.make(None, 1, MIB);
    let asked: Arc<Mutex<Vec<Message>>> = Arc::default();
    let seen = Arc::clone(&asked);
    let elsewhere = answers(move |message| {
        seen.lock().unwrap().push(message.clone());
        Message::answer("403 DENIED", &[], b"")
    });
    let proxy = Proxy::start(nodes.address, move |r| match r.op {
        _ if r.message.header("authorization").is_none() => {
            let headers = [("www-authenticate", "Basic realm=\"x\"")];
            Lie::Answer(Message::answer("401 UNAUTHORIZED", &headers, b""))
        }
        Op::Begin => {
            let to = format!("http://{elsewhere}/upload?id=1");
            Lie::Answer(Message::answer("202 Accepted", &[("location", &to)], b""))
        }
        _ => Lie::Unauthorized,
    });
    let file = json!({"auths": {proxy.at().to_string(): {"auth": ANNA}}}).to_string();
    nodes
        .push(&nodes.layout_as(proxy.at(), &file), &image)
        .unwrap_err();
    let asked = asked.lock().unwrap();
    assert!(!asked.is_empty());
    for message in asked.iter() {
        assert_eq!(message.header("authorization"), None, "{message:?}");
    }
}

/// A registry with a certificate of a CA that only the configuration knows; and what it may not lead to.
#[test]
fn a_certificate_has_to_be_one_that_the_configuration_trusts() {
    let certificate = rcgen::generate_simple_self_signed(vec!["localhost".to_owned()]).unwrap();
    let nodes = Nodes::with(|folder| {
        let (cert, key) = (folder.join("cert.pem"), folder.join("key.pem"));
        fs::write(&cert, certificate.cert.pem()).unwrap();
        fs::write(&key, certificate.signing_key.serialize_pem()).unwrap();
        format!(
            "  tls:\n    certificate: {}\n    key: {}\n",
            cert.display(),
            key.display()
        )
    });
    let image = nodes.make(None, 1, MIB);
    let host = format!("localhost:{}", nodes.address.port());
    let access = |ca_file: Option<&str>| Access {
        endpoint: Some(format!("https://{host}")),
        ca_file: ca_file.map(|name| nodes.folder.path().join(name)),
        anonymous: true,
        ..Access::default()
    };
    let refused = nodes
        .push(&nodes.layout_with(&access(None), &host), &image)
        .unwrap_err();
    let refused = refused.to_string();
    assert!(
        refused.contains("certificate") && !refused.contains("gave up"),
        "{refused}"
    );
    let trusted = nodes.layout_with(&access(Some("cert.pem")), &host);
    nodes.push(&trusted, &image).unwrap();
    nodes.pull(&trusted, "team-a/warm", None).unwrap();
    // The same host in clear.
    let clear = Access {
        anonymous: true,
        ..Access::default()
    };
    nodes.layout_with(&clear, &host).listed().unwrap_err();
    for (file, words) in [
        ("key.pem", "no certificate"),
        ("nowhere.pem", "nowhere.pem"),
    ] {
        let repository = format!("docker://{host}/a").parse().unwrap();
        let limits = rekindle_store::s3::Limits {
            concurrency: 1,
            part_size: 1,
            tuning: Default::default(),
        };
        let refused = Registry::open(&access(Some(file)), &repository, limits).unwrap_err();
        assert!(matches!(refused, RegistryError::Access(_)), "{refused}");
        assert!(refused.to_string().contains(words), "{refused}");
    }
}

/// What nobody serves is told within the patience, and in words.
#[test]
fn a_registry_that_is_not_there_is_given_up() {
    let nodes = Nodes::new();
    let nobody = "127.0.0.1:1".parse().unwrap();
    let refused = nodes.layout(nobody).listed().unwrap_err();
    assert!(
        matches!(
            refused,
            LayoutError::Registry(RegistryError::Unavailable { attempts: 4, .. })
        ),
        "{refused}"
    );
    assert!(
        refused
            .to_string()
            .contains("docker://127.0.0.1:1/team/images"),
        "{refused}"
    );
}
