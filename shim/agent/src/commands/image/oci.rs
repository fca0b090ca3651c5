//! `rekindle image push` and `pull`: images in an OCI image layout, in a folder or a bucket, and in a registry.

use std::{
    fmt,
    path::PathBuf,
    process::ExitCode,
    str::FromStr,
    sync::atomic::{AtomicU64, Ordering},
};

use rekindle_checkpoint::{
    ImageStore,
    layout::{self, Layout, Proof},
};
use rekindle_core::{
    config::NodeConfig,
    name::{ImageRef, Namespace},
    uri::{ImagePlace, PlaceError},
};
use serde_json::json;

use super::{failure, locate, opened::Room, with_bar};
use crate::{exit::Failure, keys, output, tier};

/// Where images are pushed to and pulled from: `oci:DIR[:TAG]`, `s3://BUCKET/[PREFIX/][:TAG]`,
/// `docker://HOST[:PORT]/REPOSITORY[:TAG|@DIGEST]`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Place {
    pub(super) at: At,
    pub(super) tag: Option<String>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum At {
    Folder(PathBuf),
    /// What an `[[images.tier]]` has to name.
    Away(ImagePlace),
}

impl fmt::Display for At {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Folder(folder) => folder.display().fmt(f),
            Self::Away(place) => place.fmt(f),
        }
    }
}

impl FromStr for Place {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        let refuse = || {
            format!(
                "{text:?} is no place of images: oci:DIR[:TAG], s3://BUCKET/PREFIX/[:TAG] or docker://HOST/REPOSITORY[:TAG] is meant"
            )
        };
        if let Some(rest) = text.strip_prefix("docker://") {
            return in_registry(rest).ok_or_else(refuse)?;
        }
        let (at, tag) = if text.starts_with("s3://") {
            let (url, tag) = match text.split_once("/:") {
                Some((url, tag)) => (format!("{url}/"), Some(tag)),
                None => (text.to_owned(), None),
            };
            if !url.ends_with('/') {
                return Err(refuse());
            }
            let place = url.parse().map_err(|e: PlaceError| e.to_string())?;
            (At::Away(place), tag)
        } else {
            let rest = text.strip_prefix("oci:").ok_or_else(refuse)?;
            // A folder with a colon in its name cannot be written so; nor can it for other tools.
            let (folder, tag) = match rest.split_once(':') {
                Some((folder, tag)) => (folder, Some(tag)),
                None => (rest, None),
            };
            if folder.is_empty() {
                return Err(refuse());
            }
            (At::Folder(folder.into()), tag)
        };
        if let Some(tag) = tag {
            layout::check_tag(tag).map_err(|e| e.to_string())?;
        }
        Ok(Self {
            at,
            tag: tag.map(str::to_owned),
        })
    }
}

/// A repository, and what is behind it: neither a repository's name nor what follows has a colon or an `@`, but for the
/// one in a digest. None where there is no repository.
fn in_registry(rest: &str) -> Option<Result<Place, String>> {
    let (host, path) = rest.split_once('/')?;
    let (name, tag) = match path.find(['@', ':']) {
        Some(end) => (&path[..end], Some(&path[end + 1..])),
        None => (path, None),
    };
    let digest = path[name.len()..].starts_with('@');
    if let Some(tag) = tag {
        // Behind an @ is a digest, and behind a colon none.
        if digest != tag.contains(':') {
            return None;
        }
        if let Err(error) = layout::check_registry_reference(tag) {
            return Some(Err(error.to_string()));
        }
    }
    let place = format!("docker://{host}/{name}").parse();
    Some(match place {
        Ok(place) => Ok(Place {
            at: At::Away(place),
            tag: tag.map(str::to_owned),
        }),
        Err(error) => Err(PlaceError::to_string(&error)),
    })
}

impl At {
    /// The layout to put an image of `namespace` into.
    fn create(&self, config: &NodeConfig, namespace: &Namespace) -> anyhow::Result<Layout> {
        match self {
            Self::Folder(folder) => Ok(Layout::create(folder)?),
            Self::Away(place) => tier::at(config, place, Some(namespace)),
        }
    }

    /// The layout to take an image out of; whose, where that is known.
    fn open(&self, config: &NodeConfig, namespace: Option<&Namespace>) -> anyhow::Result<Layout> {
        match self {
            Self::Folder(folder) => Ok(Layout::open(folder)?),
            Self::Away(place) => tier::at(config, place, namespace),
        }
    }

    /// Refuses an image of a namespace that has nothing to do with this place.
    fn admit(&self, config: &NodeConfig, namespace: &Namespace) -> anyhow::Result<()> {
        match self {
            Self::Folder(_) => Ok(()),
            Self::Away(place) => tier::admit(config, place, namespace),
        }
    }
}

#[derive(Debug, clap::Args)]
pub(super) struct PushArgs {
    /// The image: [NAMESPACE/]NAME[@GENERATION].
    image: ImageRef,
    /// The layout, which is made where there is none, and the tag: a folder, oci:DIR[:TAG] [default:
    /// NAMESPACE/NAME@GENERATION]; or what [[images.tier]] names: a bucket, s3://BUCKET/PREFIX/[:TAG] [default:
    /// NAMESPACE/NAME@CREATED-DIGEST], or a repository, docker://HOST[:PORT]/REPOSITORY[:TAG] [default:
    /// NAMESPACE.NAME.CREATED-DIGEST].
    #[arg(value_name = "PLACE")]
    place: Place,
    /// Look in this namespace.
    #[arg(short, long, value_name = "NS")]
    namespace: Option<Namespace>,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
}

#[derive(Debug, clap::Args)]
pub(super) struct PullArgs {
    /// The layout, and the tag [default: that of the only image in it]: oci:DIR[:TAG]; or, where [[images.tier]] names
    /// it, s3://BUCKET/PREFIX/[:TAG] or docker://HOST[:PORT]/REPOSITORY[:TAG|@DIGEST], and there the tag NAMESPACE/NAME
    /// means the newest image of that name.
    #[arg(value_name = "PLACE")]
    place: Place,
    /// Call it [NAMESPACE/]NAME; its generation is the next one [default: as it was called].
    #[arg(value_name = "NAME")]
    name: Option<ImageRef>,
    /// Put it into this namespace.
    #[arg(short, long, value_name = "NS")]
    namespace: Option<Namespace>,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
}

/// What a bucket or a repository has, for the namespaces that it is a tier of.
pub(super) fn ls(
    config: &NodeConfig,
    place: &Place,
    namespace: Option<&Namespace>,
    json: bool,
) -> anyhow::Result<ExitCode> {
    let At::Away(uri) = &place.at else {
        let reason = "only a bucket or a registry is listed: index.json of a layout in a folder has its tags";
        return Err(Failure::Refused(reason.to_owned()).into());
    };
    let layout = tier::at(config, uri, namespace)?;
    let mut rows = Vec::new();
    for (tag, told) in layout.listed()? {
        // What somebody has called otherwise is what it is called.
        let owner = told.as_ref().map(|told| told.namespace.clone());
        let shown = match (&owner, namespace) {
            (Some(owner), Some(wanted)) => owner == wanted,
            (Some(owner), None) => config.tier_at(uri, Some(owner)).is_some(),
            (None, wanted) => wanted.is_none(),
        };
        let created = told.and_then(|told| told.image).map(|(_, created)| created);
        if shown {
            rows.push((tag, owner, created));
        }
    }
    if json {
        let rows = rows.iter().map(|(tag, owner, created): &(_, _, Option<u64>)| {
            json!({"tag": tag, "namespace": owner, "created": created})
        });
        output::json(&rows.collect::<Vec<_>>())?;
        return Ok(ExitCode::SUCCESS);
    }
    if rows.is_empty() {
        output::line(format!("no images in {uri}"));
    }
    for (tag, _, created) in rows {
        let age = created.map_or_else(String::new, |created| format!("  {}", super::age(created)));
        output::line(format!("{tag}{age}"));
    }
    Ok(ExitCode::SUCCESS)
}

pub(super) fn push(
    store: &ImageStore,
    config: &NodeConfig,
    args: &PushArgs,
) -> anyhow::Result<ExitCode> {
    let (namespace, generation) = locate(store, &args.image, args.namespace.as_ref())?;
    let image = store.resolve(&namespace, &args.image.name, Some(generation));
    let image = image.map_err(failure)?;
    let reference = image.reference();
    let layout = args.place.at.create(config, &namespace)?;
    let usual = layout.tag_for(&image);
    let tag = args.place.tag.as_deref().unwrap_or(&usual);
    let done = AtomicU64::new(0);
    let pushed = with_bar(
        &reference,
        image.manifest().total_bytes(),
        || done.load(Ordering::Relaxed),
        || layout.push(&image, tag, &done),
    )?;
    if args.json {
        let (key, place) = match &args.place.at {
            At::Folder(folder) => ("folder", folder.display().to_string()),
            At::Away(place) => ("url", place.to_string()),
        };
        output::json(&json!({
            "image": reference,
            key: place,
            "tag": tag,
            "digest": pushed.digest.to_string(),
            "bytes": pushed.bytes,
            "written": pushed.written,
        }))?;
    } else {
        let there = output::bytes(pushed.bytes - pushed.written);
        output::line(format!(
            "pushed {reference} to {} as {tag}: {}, of which {there} were there already",
            args.place.at,
            output::bytes(pushed.bytes)
        ));
    }
    Ok(ExitCode::SUCCESS)
}

pub(super) fn pull(
    store: &ImageStore,
    config: &NodeConfig,
    args: &PullArgs,
) -> anyhow::Result<ExitCode> {
    let named = args.name.as_ref().and_then(|name| name.namespace.clone());
    let of_tag = args.place.tag.as_deref().and_then(|tag| {
        let (namespace, _) = tag.split_once('/')?;
        namespace.parse().ok()
    });
    let whose = named.or(args.namespace.clone()).or(of_tag);
    let layout = args.place.at.open(config, whose.as_ref())?;
    let found = layout.find(args.place.tag.as_deref())?;
    let manifest = found.manifest();
    let (namespace, name) = match (&args.name, &args.namespace) {
        (Some(named), Some(b)) if named.namespace.as_ref().is_some_and(|a| a != b) => {
            let reason = format!("image {named}: it names another namespace than --namespace {b}");
            return Err(Failure::Refused(reason).into());
        }
        (Some(named), _) if named.generation.is_some() => {
            let reason = format!("image {named}: a pulled image is the next generation");
            return Err(Failure::Refused(reason).into());
        }
        (named, given) => {
            let of_name = named.as_ref().and_then(|named| named.namespace.clone());
            let namespace = of_name.or(given.clone());
            let name = named.as_ref().map(|named| named.name.clone());
            (
                namespace.unwrap_or(manifest.namespace.clone()),
                name.unwrap_or(manifest.name.clone()),
            )
        }
    };
    args.place.at.admit(config, &namespace)?;
    let encryption = manifest.encryption.as_ref();
    let key_name = encryption.map(|encryption| encryption.key.clone());
    let key = config.key_of(key_name.as_deref(), &namespace);
    let key = key.map(keys::read).transpose()?;
    let room = Room::new(store, key.as_ref())?;
    let bytes = found.bytes();
    let packs: u64 = manifest.packs.iter().map(|pack| pack.size).sum();
    let (done, checked) = (AtomicU64::new(0), AtomicU64::new(0));
    let pulled = with_bar(
        &format!("{namespace}/{name}"),
        bytes + packs,
        || done.load(Ordering::Relaxed) + checked.load(Ordering::Relaxed),
        || {
            let to = (&namespace, &name);
            found.pull(store, to, key.as_ref(), &room.path, (&done, &checked))
        },
    )?;
    let reference = pulled.image.reference();
    if args.json {
        output::json(&json!({
            "image": reference,
            "bytes": bytes,
            "linked": pulled.linked,
            "proof": match pulled.proof {
                Proof::Whole => "whole",
                Proof::WithoutKey => "without-key",
            },
        }))?;
        return Ok(ExitCode::SUCCESS);
    }
    let proof = match pulled.proof {
        Proof::Whole => "verified".to_owned(),
        Proof::WithoutKey => format!(
            "of which the files, their sizes and the index were verified; who made it and its chunks were not, for this node does not have the key {:?}",
            key_name.unwrap_or_default()
        ),
    };
    let linked = output::bytes(pulled.linked);
    output::line(format!(
        "pulled {reference}: {}, of which {linked} were there already; {proof}",
        output::bytes(bytes)
    ));
    Ok(ExitCode::SUCCESS)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_is_a_folder_and_a_tag() {
        let place = |text: &str| text.parse::<Place>();
        let is = |at: At, tag: Option<&str>| Place {
            at,
            tag: tag.map(str::to_owned),
        };
        let folder = |path: &str| At::Folder(path.into());
        assert_eq!(place("oci:/srv/x"), Ok(is(folder("/srv/x"), None)));
        let tagged = is(folder("x"), Some("team-a/warm@3"));
        assert_eq!(place("oci:x:team-a/warm@3"), Ok(tagged));
        let bucket = |url: &str| At::Away(url.parse().unwrap());
        let plain = is(bucket("s3://images/"), None);
        assert_eq!(place("s3://images/"), Ok(plain));
        let tagged = is(bucket("s3://images/a/b/"), Some("team-a/warm"));
        assert_eq!(place("s3://images/a/b/:team-a/warm"), Ok(tagged));
        let repository = || bucket("docker://r.example:5000/team/a");
        let digest = format!("sha256:{}", "0".repeat(64));
        for (behind, tag) in [
            (String::new(), None),
            (":latest".to_owned(), Some("latest")),
            (":team-a/warm".to_owned(), Some("team-a/warm")),
            (format!("@{digest}"), Some(digest.as_str())),
        ] {
            let text = format!("docker://r.example:5000/team/a{behind}");
            assert_eq!(place(&text), Ok(is(repository(), tag)), "{text}");
        }
        for bad in [
            "",
            "/srv/x",
            "oci:",
            "oci::tag",
            "oci:x:",
            "oci:x:a:b",
            "docker://x",
            "docker://x/",
            "docker://x/a:",
            "docker://x/a@",
            "docker://x/a@latest",
            "docker://x/a:b:c",
            "docker://x/a:b@sha256:00",
            "docker://x/a/:b",
            "docker://x/A",
            "docker://u:p@x/a",
            "s3://images",
            "s3://images/a",
            "s3://images/a:tag",
            "s3://images/a/:",
            "s3://images/../:tag",
            "s3://I/",
        ] {
            assert!(place(bad).is_err(), "{bad}");
        }
    }
}
