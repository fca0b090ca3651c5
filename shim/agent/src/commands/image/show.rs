//! `rekindle image show`: what an image is, and what is in it.

use std::{collections::BTreeMap, process::ExitCode};

use rekindle_checkpoint::{
    ImageError, ImageStore, SealedImage,
    chunks::Chunks,
    contents::Contents,
    criu_image::Socket,
    image::Listed,
    manifest::{SHM_FILE, UPPER_FILE, Unknown},
};
use rekindle_core::config::{Compression, NodeConfig};
use serde_json::{Value, json};

use super::{Which, age, failure, locate, opened::Opened};
use crate::output;

/// Digits of a digest that are shown, and enough to tell two apart.
const SHORT: usize = 12;

/// What two images of one name have in common.
struct Shared {
    generation: u64,
    chunks: usize,
    bytes: u64,
}

/// All that is told of an image beside its manifest.
struct Told {
    contents: Contents,
    /// The generation before it, where there still is one that the same key opens.
    parent: Option<Shared>,
}

pub(super) fn run(
    store: &ImageStore,
    config: &NodeConfig,
    which: &Which,
    json: bool,
) -> anyhow::Result<ExitCode> {
    let (namespace, _) = locate(store, &which.image, which.namespace.as_ref())?;
    let image = store.resolve(&namespace, &which.image.name, which.image.generation);
    let image = image.map_err(failure)?;
    let told = tell(store, config, &image);
    let sharing = sharing(store, &image)?;
    let (told, refused) = match told {
        Ok(told) => (Some(told), None),
        Err(error) => (None, Some(error)),
    };
    if json {
        let mut whole = serde_json::to_value(image.manifest())?;
        whole["contents"] = told.as_ref().map_or(Value::Null, contents);
        let record = store.warm_record(&namespace, &which.image.name);
        whole["place"] = json!(image.places().to_string());
        whole["quarantined"] = json!(record.quarantined(image.generation()));
        whole["kind"] = json!(record.kind);
        whole["packs_shared_with"] = serde_json::to_value(&sharing)?;
        output::json(&whole)?;
    } else {
        describe(&image, &sharing);
        let record = store.warm_record(&namespace, &which.image.name);
        if let Some(why) = record.quarantined(image.generation()) {
            line("in quarantine", why);
        }
        if let Some(told) = &told {
            describe_contents(told);
        }
    }
    match refused {
        None => Ok(ExitCode::SUCCESS),
        // Who has no key is told what is in clear.
        Some(error) if is_locked(&error) => {
            if !json {
                line("contents", &format!("not told: {error:#}"));
            }
            Ok(ExitCode::SUCCESS)
        }
        Some(error) => Err(error),
    }
}

fn is_locked(error: &anyhow::Error) -> bool {
    let mut causes = error.chain();
    causes.any(|cause| matches!(cause.downcast_ref(), Some(ImageError::Locked { .. })))
}

fn tell(store: &ImageStore, config: &NodeConfig, image: &SealedImage) -> anyhow::Result<Told> {
    let opened = Opened::new(store, config, image)?;
    let contents = opened.contents(image, None)?;
    let parent = match parent(store, image)? {
        Some(parent) => shared_with(store, config, &opened.chunks, &parent),
        None => None,
    };
    Ok(Told { contents, parent })
}

/// The newest generation before this one; what it was built on, where nobody removed that.
fn parent(store: &ImageStore, image: &SealedImage) -> anyhow::Result<Option<SealedImage>> {
    let manifest = image.manifest();
    let is = |found: &Listed| {
        found.name == manifest.name
            && found.generation < image.generation()
            && matches!(&found.manifest, Ok(parent) if parent.encryption == manifest.encryption)
    };
    let before = store.list(Some(&manifest.namespace))?;
    let Some(before) = before.into_iter().rfind(is) else {
        return Ok(None);
    };
    let parent = store.resolve(&before.namespace, &before.name, Some(before.generation));
    Ok(parent.ok())
}

/// None where it is damaged: that is another image's matter.
fn shared_with(
    store: &ImageStore,
    config: &NodeConfig,
    chunks: &Chunks,
    parent: &SealedImage,
) -> Option<Shared> {
    let other = Opened::new(store, config, parent).ok()?;
    let common = chunks.common(&other.chunks);
    let (count, bytes) = chunks.in_common(&common);
    Some(Shared {
        generation: parent.generation(),
        chunks: count,
        bytes,
    })
}

/// The other generations that have each pack.
fn sharing(store: &ImageStore, image: &SealedImage) -> anyhow::Result<BTreeMap<String, Vec<u64>>> {
    let manifest = image.manifest();
    let mut packs: BTreeMap<String, Vec<u64>> = BTreeMap::new();
    for found in store.list(Some(&manifest.namespace))? {
        let Ok(other) = &found.manifest else { continue };
        if found.name != manifest.name || found.generation == image.generation() {
            continue;
        }
        for pack in other
            .packs
            .iter()
            .filter(|pack| manifest.packs.contains(pack))
        {
            let generations = packs.entry(pack.id.to_string()).or_default();
            generations.push(found.generation);
        }
    }
    Ok(packs)
}

fn contents(told: &Told) -> Value {
    let contents = &told.contents;
    let memory = contents.memory.iter().map(|(memory, composition)| {
        json!({
            "pid": memory.pid,
            "kind": memory.kind,
            "name": memory.name,
            "bytes": composition.bytes,
            "zeros": composition.zeros,
        })
    });
    json!({
        "memory": memory.collect::<Vec<_>>(),
        "sockets": contents.sockets,
        "writable_layer": contents.chunks.bytes_of(UPPER_FILE),
        "shm": contents.chunks.bytes_of(SHM_FILE),
        "parent": told.parent.as_ref().map(|parent| json!({
            "generation": parent.generation,
            "chunks": parent.chunks,
            "bytes": parent.bytes,
        })),
    })
}

fn describe_contents(told: &Told) {
    let contents = &told.contents;
    for (kind, composition) in contents.by_kind() {
        let kind = super::diff::word(&kind);
        let bytes = output::bytes(composition.bytes);
        let zeros = output::bytes(composition.zeros);
        line(
            "memory",
            &format!("{bytes:>10}  {kind}, of it zeros {zeros}"),
        );
    }
    for (name, title) in [(UPPER_FILE, "writable layer"), (SHM_FILE, "/dev/shm")] {
        if let Some(bytes) = contents.chunks.bytes_of(name) {
            line(title, &format!("{:>10}", output::bytes(bytes)));
        }
    }
    for socket in &contents.sockets {
        line("socket", &socket_text(socket));
    }
    match &told.parent {
        Some(parent) => line(
            "has of its parent",
            &format!(
                "{:>10}  in {} chunks of @{}",
                output::bytes(parent.bytes),
                parent.chunks,
                parent.generation
            ),
        ),
        None => line(
            "has of its parent",
            "nothing: there is no generation before it",
        ),
    }
}

fn socket_text(socket: &Socket) -> String {
    let mut text = super::diff::word(&socket.kind);
    text.extend(socket.state.map(|state| format!(" {state}")));
    text.extend(socket.local.as_ref().map(|local| format!(" {local}")));
    text.extend(socket.peer.as_ref().map(|peer| format!(" to {peer}")));
    text
}

fn describe(image: &SealedImage, sharing: &BTreeMap<String, Vec<u64>>) {
    let manifest = image.manifest();
    let facts = &manifest.facts;
    let (host, security) = (&facts.host, &facts.container.security);
    let or_none = |text: &Option<String>| text.clone().unwrap_or_else(|| "none".to_owned());
    let list = |items: Vec<String>| match items.len() {
        0 => "none".to_owned(),
        _ => items.join(" "),
    };
    let seccomp = security
        .seccomp
        .as_deref()
        .map(|digest| cut(digest).to_owned());
    let digest = or_none(&facts.source.image_digest);
    let none = || "none".to_owned();
    let compression = match manifest.compression {
        Compression::None => "no",
        Compression::Lz4 => "with LZ4",
    };
    for (title, text) in [
        ("image", image.reference()),
        ("made", format!("{} ago", age(manifest.created))),
        ("size", output::bytes(manifest.total_bytes())),
        ("lies in", image.places().to_string()),
        ("container", facts.source.container.clone()),
        ("pod", or_none(&facts.source.pod)),
        ("container image", or_none(&facts.source.image_ref)),
        ("its digest", digest),
        (
            "host",
            format!("{}, {} {}", host.arch, host.cpu_vendor, host.cpu_model),
        ),
        ("kernel", host.kernel.clone()),
        ("made by", format!("CRIU {}, runc {}", host.criu, host.runc)),
        ("not known", list(unknown(image))),
        ("dumped with", list(dump_flags(image))),
        (
            "encrypted with",
            image.key().map_or_else(none, str::to_owned),
        ),
        ("compressed", compression.to_owned()),
        ("user", format!("{}:{}", security.uid, security.gid)),
        (
            "capabilities",
            list(security.capabilities.bounding.iter().cloned().collect()),
        ),
        ("seccomp", or_none(&seccomp)),
        ("no new privileges", security.no_new_privileges.to_string()),
        ("AppArmor", or_none(&security.apparmor)),
        ("SELinux", or_none(&security.selinux)),
        (
            "mounts",
            list(facts.container.mounts.iter().cloned().collect()),
        ),
        ("terminal", facts.container.terminal.to_string()),
    ] {
        line(title, &text);
    }
    for process in &facts.processes {
        let rss = output::bytes(process.rss);
        line(
            "process",
            &format!("{:>6}  {rss:>10}  {}", process.pid, process.comm),
        );
    }
    let stored = &manifest.stored;
    line("memory and layers", &output::bytes(stored.bytes));
    line("  zeros", &output::bytes(stored.zeros));
    line("  stored already", &output::bytes(stored.shared));
    line("  stored for it", &output::bytes(stored.written));
    for pack in &manifest.packs {
        let size = output::bytes(pack.size);
        let generations = sharing.get(&pack.id.to_string());
        let shared = generations.map_or_else(String::new, |generations| {
            let list = generations.iter().map(|n| format!("@{n}"));
            format!(", also of {}", list.collect::<Vec<_>>().join(" "))
        });
        line("pack", &format!("{size:>10}  {}{shared}", pack.id));
    }
    let size = manifest.files.iter().map(|file| file.size).sum();
    let files = format!(
        "{:>10}  in {} files",
        output::bytes(size),
        manifest.files.len()
    );
    line("CRIU's own", &files);
}

/// One line of a description. What a container chose (its names, labels) must not reach the terminal as
/// control characters.
pub(super) fn line(title: &str, text: &str) {
    let text: String = text
        .chars()
        .flat_map(|c| {
            if c.is_control() {
                c.escape_default().collect()
            } else {
                vec![c]
            }
        })
        .collect();
    output::line(format!("{title:<18} {text}").trim_end());
}

/// What others have made and did not write down.
fn unknown(image: &SealedImage) -> Vec<String> {
    let unknown = image.manifest().facts.unknown.iter();
    let name = |unknown: &Unknown| match unknown {
        Unknown::Host => "host",
        Unknown::Layer => "layer",
        Unknown::Shm => "shm",
    };
    unknown.map(|unknown| name(unknown).to_owned()).collect()
}

fn dump_flags(image: &SealedImage) -> Vec<String> {
    let dump = &image.manifest().facts.dump;
    [
        (dump.open_tcp, "tcp-established"),
        (dump.external_unix_sockets, "ext-unix-sk"),
        (dump.terminal, "shell-job"),
        (dump.file_locks, "file-locks"),
        (dump.link_remap, "link-remap"),
        (dump.lazy, "lazy-pages"),
    ]
    .into_iter()
    .filter(|(set, _)| *set)
    .map(|(_, name)| name.to_owned())
    .collect()
}

fn cut(digest: &str) -> &str {
    digest.get(..SHORT).unwrap_or(digest)
}
