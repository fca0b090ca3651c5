//! What a registry, or what stands in front of it, can do wrong. There is an image on the other side then, whole, or none
//! and one sentence.

use rekindle_checkpoint::SealedImage;
use serde_json::{Value, json};

use crate::{
    http::Message,
    nodes::{MIB, Nodes, chain, names},
    proxy::{Lie, Op, Proxy, Request},
};

type Rule = fn(&Request) -> Lie;

fn when(lies: bool, lie: Lie) -> Lie {
    match lies {
        true => lie,
        false => Lie::None,
    }
}

fn busy() -> Lie {
    let answer = Message::answer("429 TOOMANYREQUESTS", &[("retry-after", "3600")], b"");
    Lie::Answer(answer)
}

/// What a registry does to whoever takes an image out of it. None: it is pulled all the same.
const PULLED: &[(&str, Rule, Option<&str>)] = &[
    ("the truth", |_| Lie::None, None),
    (
        "the first request for each thing fails",
        |r| when(r.first, Lie::says("503 UNAVAILABLE")),
        None,
    ),
    (
        "it is busy, and says for how long",
        |r| when(r.op == Op::Get && r.nth == 3, busy()),
        None,
    ),
    (
        "a body that breaks off",
        |r| when(r.op == Op::Get && r.nth == 4, Lie::Cut(1000)),
        None,
    ),
    (
        "a manifest that breaks off",
        |r| when(r.op == Op::Manifest && r.nth == 1, Lie::Cut(100)),
        None,
    ),
    (
        "a body that stalls once",
        |r| when(r.op == Op::Get && r.nth == 4, Lie::Stall(1000)),
        None,
    ),
    (
        "a registry that gives no parts",
        |r| when(r.op == Op::Get, Lie::NoRange),
        None,
    ),
    (
        "all bodies stall",
        |r| when(r.op == Op::Get, Lie::Stall(0)),
        Some("no answer for 1000 ms"),
    ),
    ("it is always busy", |_| busy(), Some("HTTP 429")),
    (
        "it goes away in mid-load",
        |r| when(r.op == Op::Get && r.nth == 4, Lie::GoAway),
        Some("gave up after 4 attempts"),
    ),
    (
        "it knows us no more",
        |r| when(r.op == Op::Get, Lie::says("403 DENIED")),
        Some("the registry refuses who has no credentials (HTTP 403 DENIED a lie)"),
    ),
    (
        "a blob is gone",
        |r| when(r.op == Op::Get && r.nth > 3, Lie::says("404 BLOB_UNKNOWN")),
        Some("is missing"),
    ),
    (
        "the manifest of a tag is gone",
        |r| {
            when(
                r.op == Op::Manifest && r.nth == 2,
                Lie::says("404 MANIFEST_UNKNOWN"),
            )
        },
        Some("is missing"),
    ),
    (
        "a wrong byte in the manifest of a tag",
        |r| when(r.op == Op::Manifest && r.nth == 1, Lie::Flip),
        Some("Docker-Content-Digest says"),
    ),
    (
        "a wrong byte in a manifest",
        |r| when(r.op == Op::Manifest && r.nth == 2, Lie::Flip),
        Some("Docker-Content-Digest says"),
    ),
    (
        "a wrong byte in a manifest, under the digest that has",
        |r| match r.op == Op::Manifest && r.nth == 2 {
            true => Lie::Answer(Message::answer("200 OK", &[], b"{}")),
            false => Lie::None,
        },
        Some("what came does not have that digest"),
    ),
    (
        "a manifest that does not end",
        |r| match r.op == Op::Manifest {
            true => Lie::Answer(Message::answer("200 OK", &[], &vec![b' '; 49 * MIB])),
            false => Lie::None,
        },
        Some("it has more than the 50331648 bytes that are read of it"),
    ),
    (
        "another digest in the header",
        |r| {
            let other = format!("sha256:{}", "0".repeat(64));
            let lie = Lie::Header("docker-content-digest", other);
            when(r.op == Op::Manifest, lie)
        },
        Some("Docker-Content-Digest says \"sha256:0000"),
    ),
    (
        "another digest in the header of a blob",
        |r| {
            let other = format!("sha256:{}", "0".repeat(64));
            let lie = Lie::Header("docker-content-digest", other);
            when(r.op == Op::Get, lie)
        },
        Some("Docker-Content-Digest says \"sha256:0000"),
    ),
    (
        "a wrong byte in a blob",
        |r| when(r.op == Op::Get && r.nth == 1, Lie::Flip),
        Some("does not have that digest"),
    ),
    (
        "a wrong byte in a pack",
        |r| when(r.op == Op::Get && r.nth == 8, Lie::Flip),
        Some("does not have that digest"),
    ),
    (
        "another blob's bytes",
        |r| when(r.op == Op::Get && r.nth == 8, Lie::Other),
        Some("does not have that digest"),
    ),
    (
        "another part than was asked for",
        |r| {
            let lie = Lie::Header("content-range", "bytes 5-9/10".to_owned());
            when(r.op == Op::Get && r.nth == 8, lie)
        },
        Some("got HTTP 206 and Content-Range"),
    ),
    (
        "a redirect that does not end",
        |r| match r.op == Op::Get {
            true => {
                let target = r.message.target().to_owned();
                let headers = [("location", target.as_str())];
                Lie::Answer(Message::answer("307 MOVED", &headers, b""))
            }
            false => Lie::None,
        },
        Some("HTTP 307"),
    ),
    (
        "a redirect to no address",
        |r| match r.op == Op::Get {
            true => {
                let headers = [("location", "file:///etc/passwd")];
                Lie::Answer(Message::answer("307 MOVED", &headers, b""))
            }
            false => Lie::None,
        },
        Some("the answer leads nowhere"),
    ),
    (
        "tags that are none",
        |r| match r.op == Op::Tags {
            true => Lie::Answer(Message::answer("200 OK", &[], b"[\"hunter2\"]")),
            false => Lie::None,
        },
        Some("it is no list of tags"),
    ),
    (
        "pages that do not end",
        |r| match r.op == Op::Tags {
            true => {
                let link = format!("<{}>; rel=\"next\"", r.message.target());
                let headers = [("link", link.as_str())];
                Lie::Answer(Message::answer("200 OK", &headers, b"{\"tags\": null}"))
            }
            false => Lie::None,
        },
        Some("the registry's pages do not end"),
    ),
];

#[test]
fn a_registry_that_lies_gives_a_whole_image_or_none() {
    let nodes = Nodes::new();
    let image = nodes.make(None, 1, 4 * MIB);
    nodes.push(&nodes.layout(nodes.address), &image).unwrap();
    for (what, rule, words) in PULLED {
        let proxy = Proxy::start(nodes.address, rule);
        match (
            nodes.pull(&nodes.layout(proxy.at()), "team-a/warm", None),
            words,
        ) {
            (Ok(pulled), None) => {
                let reference = pulled.image.reference();
                drop(pulled);
                let (namespace, name) = names();
                nodes.to.remove(&namespace, &name, None, true).unwrap();
                println!("{what}: {reference}");
            }
            (Err(error), Some(words)) => {
                let said = chain(&error);
                assert!(said.contains(words), "{what}: {said}");
                nodes.assert_nothing_pulled(what);
            }
            (Ok(_), Some(_)) => panic!("{what}: it was pulled"),
            (Err(error), None) => panic!("{what}: {}", chain(&error)),
        }
    }
    println!("{} registries that lie to whoever pulls", PULLED.len());
}

/// What a registry does to whoever puts an image into it. None: it is pushed all the same.
const PUSHED: &[(&str, Rule, Option<&str>)] = &[
    ("the truth", |_| Lie::None, None),
    (
        // An upload that fails is begun anew, at another address. Three go on at once: not each third.
        "each fifth request fails",
        |r| when(r.nth % 5 == 0, Lie::says("503 UNAVAILABLE")),
        None,
    ),
    (
        "an upload that breaks in the middle of a chunk",
        |r| when(r.op == Op::Chunk && r.nth == 3, Lie::Half),
        None,
    ),
    (
        "a chunk's answer is lost",
        |r| when(r.op == Op::Chunk && r.nth == 2, Lie::Cut(0)),
        None,
    ),
    (
        "an upload that is forgotten",
        |r| {
            when(
                r.op == Op::Chunk && r.nth == 3,
                Lie::says("404 BLOB_UPLOAD_UNKNOWN"),
            )
        },
        None,
    ),
    (
        "an upload that is elsewhere",
        |r| {
            when(
                r.op == Op::Chunk && r.nth == 3,
                Lie::says("416 RANGE_INVALID"),
            )
        },
        None,
    ),
    (
        "a registry that is busy with a chunk, and has kept the others",
        |r| when(r.op == Op::Chunk && r.nth == 3, busy()),
        None,
    ),
    (
        "the answer to the last of an upload is lost",
        |r| when(r.op == Op::Put && r.nth == 6, Lie::Cut(0)),
        None,
    ),
    (
        "the answer to a small blob is lost",
        |r| when(r.op == Op::Put && r.nth == 3, Lie::Cut(0)),
        None,
    ),
    (
        "it says that it has less than it has",
        |r| {
            let lie = Lie::Header("range", "0-1048575".to_owned());
            when(r.op == Op::Chunk && r.nth == 2, lie)
        },
        Some("DIGEST_INVALID"),
    ),
    (
        "blobs are taken and not kept",
        |r| match r.op == Op::Put {
            true => Lie::Answer(Message::answer("201 Created", &[], b"")),
            false => Lie::None,
        },
        Some(""),
    ),
    (
        "it says that it has more than was sent",
        |r| {
            let lie = Lie::Header("range", "0-99999999999".to_owned());
            when(r.op == Op::Chunk, lie)
        },
        Some("it has more than was sent"),
    ),
    (
        "it goes away in the midst of an upload",
        |r| when(r.op == Op::Chunk && r.nth == 2, Lie::GoAway),
        Some("gave up after 4 attempts"),
    ),
    (
        "all chunks break",
        |r| when(r.op == Op::Chunk, Lie::Half),
        Some("gave up after 4 attempts"),
    ),
    (
        "a proxy that takes no large bodies",
        |r| when(r.op == Op::Chunk, Lie::says("413 TOO_LARGE")),
        Some("HTTP 413 TOO_LARGE a lie"),
    ),
    (
        "chunks that are too large for us",
        |r| {
            let lie = Lie::Header("oci-chunk-min-length", (1_u64 << 40).to_string());
            when(r.op == Op::Begin, lie)
        },
        Some("chunks of no less than 1099511627776"),
    ),
    (
        "we may not write",
        |r| when(r.op == Op::Begin, Lie::says("403 DENIED")),
        Some("the registry refuses who has no credentials"),
    ),
    (
        "the manifest is refused",
        |r| when(r.op == Op::PutManifest, Lie::says("400 MANIFEST_INVALID")),
        Some("MANIFEST_INVALID"),
    ),
    (
        "another manifest was taken",
        |r| {
            let other = format!("sha256:{}", "0".repeat(64));
            match r.op == Op::PutManifest {
                true => {
                    let headers = [("docker-content-digest", other.as_str())];
                    Lie::Answer(Message::answer("201 Created", &headers, b""))
                }
                false => Lie::None,
            }
        },
        Some("Docker-Content-Digest says"),
    ),
    (
        "nothing is answered",
        |_| Lie::Silence,
        Some("gave up after 4 attempts"),
    ),
];

#[test]
fn a_registry_that_lies_has_a_tag_when_it_has_the_image() {
    for (what, rule, words) in PUSHED {
        let nodes = Nodes::new();
        let image = nodes.make(None, 1, 4 * MIB);
        let proxy = Proxy::start(nodes.address, rule);
        let lying = nodes.layout(proxy.at());
        let sound = nodes.layout(nodes.address);
        match (nodes.push(&lying, &image), words) {
            (Ok(_), None) => {}
            (Err(error), Some(words)) => {
                let said = chain(&error);
                assert!(said.contains(words), "{what}: {said}");
                assert_eq!(nodes.tags(), Vec::<String>::new(), "{what}");
                assert!(!sound.holds(&image).unwrap(), "{what}");
                nodes.push(&sound, &image).unwrap();
            }
            (Ok(_), Some(_)) => panic!("{what}: it was pushed"),
            (Err(error), None) => panic!("{what}: {}", chain(&error)),
        }
        assert!(sound.holds(&image).unwrap(), "{what}");
        nodes.pull(&sound, "team-a/warm", None).unwrap();
        assert!(
            proxy.count(Op::Chunk) <= 40,
            "{what}: it is not sent for ever"
        );
    }
    println!("{} registries that lie to whoever pushes", PUSHED.len());
}

/// What a broken upload has brought there is not sent again, where the registry has kept it.
#[test]
fn an_upload_goes_on_where_it_broke() {
    let nodes = Nodes::new();
    let image = nodes.make(None, 1, 6 * MIB);
    let proxy = Proxy::start(nodes.address, |r| {
        when(
            r.op == Op::Chunk && r.nth == 5,
            Lie::says("502 BAD_GATEWAY"),
        )
    });
    nodes.push(&nodes.layout(proxy.at()), &image).unwrap();
    assert_eq!(proxy.count(Op::Look), 1);
    // Six whole ones, what is behind them, and the one that failed.
    let sent = proxy.count(Op::Chunk);
    assert!((7..=9).contains(&sent), "{sent} chunks");
}

/// Who can write into the registry is not who is asked for.
#[test]
fn a_hostile_repository_is_refused() {
    type Harm = fn(&mut Value);
    let table: &[(&str, Harm, &str)] = &[
        (
            "a file that climbs",
            |m| m["layers"][0]["annotations"]["org.opencontainers.image.title"] = json!("../../x"),
            "is not in the image's manifest",
        ),
        (
            "a file that is listed twice",
            |m| m["layers"][1] = m["layers"][0].clone(),
            "listed",
        ),
        (
            "a file that claims all there is",
            |m| m["layers"][0]["size"] = json!(1_u64 << 60),
            "has another size",
        ),
        (
            "a digest that climbs",
            |m| m["layers"][0]["digest"] = json!("sha256:../../x"),
            "",
        ),
        (
            "another artifact",
            |m| m["artifactType"] = json!("application/vnd.example"),
            "artifact type",
        ),
        (
            "a manifest that claims all there is",
            |m| m["config"]["size"] = json!(1_u64 << 60),
            "claims more",
        ),
    ];
    for (what, harm, words) in table {
        let nodes = Nodes::new();
        let registry = nodes.layout(nodes.address);
        let image = nodes.make(None, 1, MIB);
        let digest = nodes.push(&registry, &image).unwrap().digest.to_string();
        let text = std::fs::read(nodes.kept(digest.trim_start_matches("sha256:"))).unwrap();
        let mut manifest: Value = serde_json::from_slice(&text).unwrap();
        harm(&mut manifest);
        // Debian's registry would not take it; another may.
        let answer = Message::answer(
            "200 OK",
            &[("content-type", "application/vnd.oci.image.manifest.v1+json")],
            manifest.to_string().as_bytes(),
        );
        let proxy = Proxy::start(nodes.address, move |r| {
            when(r.op == Op::Manifest, Lie::Answer(answer.clone()))
        });
        let refused = nodes
            .pull(&nodes.layout(proxy.at()), "x", None)
            .unwrap_err();
        let refused = chain(&refused);
        assert!(refused.contains(words), "{what}: {refused}");
        nodes.assert_nothing_pulled(what);
    }
}

#[test]
fn another_image_under_its_name_is_refused() {
    let nodes = Nodes::new();
    let registry = nodes.layout(nodes.address);
    let other = ("team-b".parse().unwrap(), "warm".parse().unwrap());
    let streams = [("upper".to_owned(), b"b".to_vec())];
    let other: SealedImage = nodes.make_of(None, other, &streams);
    let tag = registry.tag_for(&other);
    assert!(tag.starts_with("team-b.warm."), "{tag}");
    let stolen = tag.replacen("team-b", "team-a", 1);
    registry.push(&other, &stolen, &Default::default()).unwrap();
    let (namespace, name) = names();
    let refused = registry.find_image(&namespace, &name).unwrap_err();
    let refused = refused.to_string();
    assert!(
        refused.contains("its manifest says that it is team-b/warm"),
        "{refused}"
    );
}

/// Debian's registry gives all tags at once; others do not, and some list what is none.
#[test]
fn a_list_of_many_pages_is_read_to_its_end() {
    let nodes = Nodes::new();
    let proxy = Proxy::start(nodes.address, |r| {
        let target = r.message.target();
        let (page, next) = match target {
            _ if target.contains("last=b") => (r#"{"name": "x", "tags": ["c"]}"#, None),
            _ if target.contains("last=a") => (
                r#"{"name": "x", "tags": null}"#,
                Some("</v2/team/images/tags/list?last=b>; rel=\"next\""),
            ),
            _ => (
                r#"{"name": "x", "tags": ["b", "a", "\u001b[31m", "a/b", ""]}"#,
                // As one says it that does not know under which name it is reached.
                Some("<http://10.0.0.1:5000/v2/team/images/tags/list?last=a&n=2>; rel=\"next\""),
            ),
        };
        let headers: Vec<_> = next.map(|next| ("link", next)).into_iter().collect();
        Lie::Answer(Message::answer("200 OK", &headers, page.as_bytes()))
    });
    let listed = nodes.layout(proxy.at()).listed().unwrap();
    let tags: Vec<String> = listed.into_iter().map(|(tag, _)| tag).collect();
    assert_eq!(tags, ["a", "b", "c"]);
    assert_eq!(proxy.count(Op::Tags), 3);
}
