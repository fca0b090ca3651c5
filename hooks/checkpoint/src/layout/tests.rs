use std::{
    fs,
    os::unix::fs::{MetadataExt, symlink},
    sync::atomic::AtomicU64,
};

use serde_json::{Value, json};
use tempfile::TempDir;

use super::*;
use crate::{
    ImageStore, Key,
    chunks::Compression,
    image::tests::{Making, flip, leftovers, make, names, pack, with_causes},
    manifest::CRIU_DIR,
};

/// Two nodes, and a layout between them.
struct Between {
    root: TempDir,
    from: ImageStore,
    to: ImageStore,
}

impl Between {
    fn new() -> Self {
        let root = tempfile::tempdir().unwrap();
        let store = |name: &str| ImageStore::open(&root.path().join(name)).unwrap();
        Self {
            from: store("from"),
            to: store("to"),
            root,
        }
    }

    /// With one image in it, under the tag `one`.
    fn with_one() -> Self {
        let between = Self::new();
        drop(make(&between.from));
        between.push("one");
        between
    }

    fn dir(&self) -> PathBuf {
        self.root.path().join("layout")
    }

    /// Pushes the newest generation.
    fn push(&self, tag: &str) -> Pushed {
        let (namespace, name) = names();
        let image = self.from.resolve(&namespace, &name, None).unwrap();
        let layout = Layout::create(&self.dir()).unwrap();
        layout.push(&image, tag, &Default::default()).unwrap()
    }

    fn pull_as(
        &self,
        tag: Option<&str>,
        image: &str,
        key: Option<&Key>,
    ) -> Result<Pulled, LayoutError> {
        let (namespace, name) = image.split_once('/').unwrap();
        let (namespace, name) = (namespace.parse().unwrap(), name.parse().unwrap());
        let layout = Layout::open(&self.dir())?;
        let found = layout.find(tag)?;
        let into = self.root.path().join("into");
        let counts = (&AtomicU64::new(0), &AtomicU64::new(0));
        found.pull(&self.to, (&namespace, &name), key, &into, counts)
    }

    fn pull(&self, tag: Option<&str>) -> Result<Pulled, LayoutError> {
        self.pull_as(tag, "team-a/warm", None)
    }

    /// Changes the OCI manifest of the one tag, and gives it the digest that it then has.
    fn rewrite(&self, change: impl FnOnce(&mut Value)) {
        let index = self.dir().join(INDEX_JSON);
        let mut tags: Value = serde_json::from_slice(&fs::read(&index).unwrap()).unwrap();
        let of = &mut tags["manifests"][0];
        let blob = self.blob(of["digest"].as_str().unwrap());
        let mut manifest = serde_json::from_slice(&fs::read(blob).unwrap()).unwrap();
        change(&mut manifest);
        let text = manifest.to_string();
        of["digest"] = self.put(text.as_bytes()).into();
        of["size"] = text.len().into();
        fs::write(index, tags.to_string()).unwrap();
    }

    /// Replaces the content of one file, with all digests of the layout right.
    fn replace(&self, title: &str, change: impl FnOnce(&mut Vec<u8>)) {
        self.rewrite(|manifest| {
            let of = match title {
                "manifest.json" => &mut manifest["config"],
                _ => layer(manifest, title),
            };
            let mut bytes = fs::read(self.blob(of["digest"].as_str().unwrap())).unwrap();
            change(&mut bytes);
            of["digest"] = self.put(&bytes).into();
            of["size"] = bytes.len().into();
        });
    }

    fn put(&self, bytes: &[u8]) -> String {
        let digest = BlobDigest::of(bytes).to_string();
        fs::write(self.blob(&digest), bytes).unwrap();
        digest
    }

    fn blob(&self, digest: &str) -> PathBuf {
        let hex = digest.strip_prefix("sha256:").unwrap();
        self.dir().join(BLOBS).join(hex)
    }

    /// The blob of the layer whose title begins so.
    fn blob_of(&self, title: &str) -> PathBuf {
        let mut found = None;
        self.rewrite(|manifest| {
            let digest = layer(manifest, title)["digest"].as_str().unwrap();
            found = Some(self.blob(digest));
        });
        found.unwrap()
    }
}

fn layer<'a>(manifest: &'a mut Value, title: &str) -> &'a mut Value {
    let layers = manifest["layers"].as_array_mut().unwrap();
    let is = |layer: &&mut Value| {
        let found = layer["annotations"][TITLE].as_str();
        found.is_some_and(|found| found.starts_with(title))
    };
    layers.iter_mut().find(is).unwrap()
}

fn files(dir: &Path) -> Vec<(String, Vec<u8>)> {
    let mut all = Vec::new();
    for dir in [dir.to_owned(), dir.join(CRIU_DIR)] {
        for entry in fs::read_dir(&dir).into_iter().flatten() {
            let path = entry.unwrap().path();
            if path.is_file() {
                all.push((path.display().to_string(), fs::read(path).unwrap()));
            }
        }
    }
    all.sort();
    all.iter_mut().for_each(|(path, _)| {
        *path = path.rsplit('/').next().unwrap().to_owned();
    });
    all
}

#[test]
fn an_image_travels_and_is_the_same() {
    let between = Between::with_one();
    let pulled = between.pull(None).unwrap();
    assert_eq!(pulled.image.reference(), "team-a/warm@1");
    assert_eq!((pulled.proof, pulled.linked), (Proof::Whole, 0));
    let dir = |store: &str| between.root.path().join(store).join("team-a/warm/1");
    assert!(files(&dir("from")) == files(&dir("to")));
    drop(pulled);
    assert_eq!(leftovers(&between.to), 0);
    // What whoever knows OCI and not us reads.
    let index = fs::read(between.dir().join(INDEX_JSON)).unwrap();
    let index: Value = serde_json::from_slice(&index).unwrap();
    let of = &index["manifests"][0];
    assert_eq!(index["schemaVersion"], 2);
    assert_eq!(of["mediaType"], MANIFEST);
    assert_eq!(of["artifactType"], ARTIFACT);
    assert_eq!(of["annotations"][REF_NAME], "one");
    between.rewrite(|manifest| {
        assert_eq!(manifest["schemaVersion"], 2);
        assert_eq!(manifest["config"]["mediaType"], CONFIG);
        assert_eq!(layer(manifest, "criu/pstree.img")["mediaType"], CRIU);
    });
}

#[test]
fn a_descriptor_that_does_not_tell_the_artifact_is_found_by_its_manifest() {
    let between = Between::with_one();
    of_tag(&between, "artifactType", Value::Null);
    between.pull(None).unwrap();
    of_tag(&between, "artifactType", "application/x".into());
    let refused = between.pull(None).unwrap_err();
    assert!(matches!(refused, LayoutError::NoTag { .. }), "{refused}");
}

#[test]
fn a_pack_that_is_there_is_written_once_on_either_side() {
    let between = Between::with_one();
    drop(make(&between.from));
    let second = between.push("two");
    let pack_bytes = fs::metadata(pack(&between.root.path().join("from/team-a/warm/2")))
        .unwrap()
        .len();
    assert!(
        second.bytes > pack_bytes && second.written < pack_bytes / 10,
        "{second:?}"
    );
    // Again, and there is nothing to write.
    assert_eq!(between.push("two").written, 0);
    between.pull(Some("one")).unwrap();
    let pulled = between.pull(Some("two")).unwrap();
    assert_eq!((pulled.image.generation(), pulled.linked), (2, pack_bytes));
    let link = pack(&between.root.path().join("to/team-a/warm/1"));
    assert_eq!(fs::metadata(link).unwrap().nlink(), 2);
    let refused = between.pull(None).unwrap_err().to_string();
    assert!(refused.contains("one, two"), "{refused}");
    assert!(matches!(
        between.pull(Some("three")),
        Err(LayoutError::NoTag { .. })
    ));
}

#[test]
fn an_image_gets_another_name_by_who_could_have_made_it() {
    let between = Between::with_one();
    let renamed = between.pull_as(None, "team-b/other", None).unwrap();
    assert_eq!(renamed.image.reference(), "team-b/other@1");
    assert_eq!(renamed.image.manifest().name.as_str(), "other");

    let key = |id: &str, fill: u8| Key::parse(id, &[fill; 32]).unwrap();
    let between = Between::new();
    let making = Making {
        key: Some(key("k", 7)),
        compression: Compression::None,
        private: between.root.path().join("private"),
    };
    drop(making.make(&between.from));
    between.push("one");
    // It travels without its key, and what is not proved is said.
    let pulled = between.pull(None).unwrap();
    assert_eq!(pulled.proof, Proof::WithoutKey);
    drop(pulled);
    let into = between.root.path().join("opened");
    let (namespace, name) = names();
    let image = between.to.resolve(&namespace, &name, None).unwrap();
    image.verify(&into, Some(&key("k", 7))).unwrap();
    let refused = between.pull_as(None, "team-b/other", None).unwrap_err();
    assert!(matches!(refused, LayoutError::Renamed { .. }), "{refused}");
    let refused = between.pull_as(None, "team-a/warm", Some(&key("k", 8)));
    assert!(refused.unwrap_err().to_string().contains("another one"));
    let with = key("k", 7);
    let pulled = between.pull_as(None, "team-b/other", Some(&with)).unwrap();
    assert_eq!(pulled.proof, Proof::Whole);
    pulled.image.verify(&into, Some(&with)).unwrap();
    // One that is in clear is none of a namespace that has a key.
    let between = Between::with_one();
    let refused = between
        .pull_as(None, "team-a/warm", Some(&with))
        .unwrap_err();
    assert!(
        refused.to_string().contains("is not encrypted"),
        "{refused}"
    );
    assert_eq!(leftovers(&between.to), 0);
}

/// Each layout is refused in words, and leaves the store as it was.
#[test]
fn a_hostile_layout_is_refused_and_leaves_nothing() {
    type Harm = fn(&Between);
    const EMPTY: &str = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";
    let table: &[(&str, Harm, &str)] = &[
        (
            "no marker",
            |b| fs::remove_file(b.dir().join(LAYOUT_FILE)).unwrap(),
            "has no oci-layout",
        ),
        (
            "a marker that is a link",
            |b| {
                fs::remove_file(b.dir().join(LAYOUT_FILE)).unwrap();
                symlink("/etc/hostname", b.dir().join(LAYOUT_FILE)).unwrap();
            },
            "cannot open",
        ),
        (
            "another version",
            |b| {
                fs::write(
                    b.dir().join(LAYOUT_FILE),
                    r#"{"imageLayoutVersion": "2.0.0"}"#,
                )
                .unwrap()
            },
            "2.0.0",
        ),
        (
            "no index",
            |b| fs::remove_file(b.dir().join(INDEX_JSON)).unwrap(),
            "index.json",
        ),
        (
            "an index that is a link",
            |b| {
                fs_rename::rename(&b.dir().join(INDEX_JSON), &b.root.path().join("elsewhere"));
                symlink(b.root.path().join("elsewhere"), b.dir().join(INDEX_JSON)).unwrap();
            },
            "cannot open",
        ),
        (
            "an index that is no JSON",
            |b| fs::write(b.dir().join(INDEX_JSON), "[").unwrap(),
            "cannot be understood",
        ),
        (
            "an index of a deep nest",
            |b| fs::write(b.dir().join(INDEX_JSON), "[".repeat(1 << 20)).unwrap(),
            "cannot be understood",
        ),
        (
            "an index that is too large",
            |b| fs::write(b.dir().join(INDEX_JSON), " ".repeat(17 << 20)).unwrap(),
            "more than the 16777216 bytes",
        ),
        (
            "an index without tags",
            |b| fs::write(b.dir().join(INDEX_JSON), "{}").unwrap(),
            "it has no tags",
        ),
        (
            "a digest that climbs",
            |b| of_tag(b, "digest", "sha256:../../../../etc/passwd".into()),
            "is no digest",
        ),
        (
            "a digest of another kind",
            |b| of_tag(b, "digest", format!("sha512:{EMPTY}").into()),
            "is no digest",
        ),
        (
            "a digest in capitals",
            |b| {
                of_tag(
                    b,
                    "digest",
                    format!("sha256:{}", EMPTY.to_uppercase()).into(),
                )
            },
            "is no digest",
        ),
        (
            "a manifest that is not there",
            |b| of_tag(b, "digest", format!("sha256:{EMPTY}").into()),
            "is missing",
        ),
        (
            "a manifest that claims all there is",
            |b| of_tag(b, "size", u64::MAX.into()),
            "does not have the 18446744073709551615 bytes",
        ),
        (
            "an index in place of a manifest",
            |b| of_tag(b, "mediaType", INDEX.into()),
            "media type",
        ),
        (
            "another artifact",
            |b| b.rewrite(|m| m["artifactType"] = "application/x".into()),
            "artifact type",
        ),
        (
            "another config",
            |b| b.rewrite(|m| m["config"]["mediaType"] = "application/x".into()),
            "config's media type",
        ),
        (
            "a manifest without layers",
            |b| b.rewrite(|m| m["layers"] = Value::Null),
            "cannot be understood",
        ),
        (
            "a manifest with too few layers",
            |b| b.rewrite(|m| m["layers"] = json!([])),
            "is not listed",
        ),
        (
            "a title that climbs",
            |b| b.rewrite(|m| layer(m, "pack-")["annotations"][TITLE] = "../../../evil".into()),
            "is not in the image's manifest",
        ),
        (
            "an absolute title",
            |b| b.rewrite(|m| layer(m, "pack-")["annotations"][TITLE] = "/etc/cron.d/evil".into()),
            "is not in the image's manifest",
        ),
        (
            "a title twice",
            |b| {
                b.rewrite(|m| {
                    let again = layer(m, "chunks.index").clone();
                    m["layers"].as_array_mut().unwrap().push(again);
                })
            },
            "is listed twice",
        ),
        (
            "a file too many",
            |b| {
                b.rewrite(|m| {
                    let mut more = layer(m, "chunks.index").clone();
                    more["annotations"][TITLE] = "criu/more.img".into();
                    m["layers"].as_array_mut().unwrap().push(more);
                })
            },
            "is not in the image's manifest",
        ),
        (
            "a manifest of the image as a layer",
            |b| {
                b.rewrite(|m| {
                    layer(m, "chunks.index")["annotations"][TITLE] = "manifest.json".into();
                })
            },
            "is not in the image's manifest",
        ),
        (
            "another size",
            |b| b.rewrite(|m| layer(m, "pack-")["size"] = 1.into()),
            "another size",
        ),
        (
            "another type",
            |b| b.rewrite(|m| layer(m, "pack-")["mediaType"] = CRIU.into()),
            "media type that is not its own",
        ),
        (
            "a blob that is missing",
            |b| fs::remove_file(b.blob_of("pack-")).unwrap(),
            "is missing",
        ),
        (
            "a blob that is a link",
            |b| {
                let blob = b.blob_of("pack-");
                fs_rename::rename(&blob, &b.root.path().join("elsewhere"));
                symlink(b.root.path().join("elsewhere"), blob).unwrap();
            },
            "is not a regular file of the layout",
        ),
        (
            "a blob that is a folder",
            |b| {
                let blob = b.blob_of("criu/pstree.img");
                fs::remove_file(&blob).unwrap();
                fs::create_dir(blob).unwrap();
            },
            "is not a regular file of the layout",
        ),
        (
            "a blob that is a FIFO",
            |b| {
                use rustix::fs::{CWD, FileType, mknodat};
                let blob = b.blob_of("criu/pstree.img");
                fs::remove_file(&blob).unwrap();
                mknodat(CWD, &blob, FileType::Fifo, Mode::RUSR, 0).unwrap();
            },
            "is not a regular file of the layout",
        ),
        (
            "blobs behind a link",
            |b| {
                fs_rename::rename(&b.dir().join("blobs"), &b.root.path().join("elsewhere"));
                symlink(b.root.path().join("elsewhere"), b.dir().join("blobs")).unwrap();
            },
            "is not a regular file of the layout",
        ),
        (
            "a blob that was cut",
            |b| {
                let blob = File::options()
                    .write(true)
                    .open(b.blob_of("pack-"))
                    .unwrap();
                blob.set_len(9).unwrap();
            },
            "does not have the",
        ),
        (
            "a blob that grew",
            |b| {
                let blob = File::options()
                    .append(true)
                    .open(b.blob_of("criu/pstree.img"))
                    .unwrap();
                io::Write::write_all(&mut &blob, b"x").unwrap();
            },
            "does not have the 8 bytes",
        ),
        (
            "a flipped bit of a pack",
            |b| flip(&b.blob_of("pack-"), 1000, 1),
            "does not have that digest",
        ),
        (
            "a flipped bit of a file of CRIU's",
            |b| flip(&b.blob_of("criu/inventory.img"), 0, 1),
            "does not have that digest",
        ),
        (
            "a flipped bit, and a digest for it: a pack",
            |b| b.replace("pack-", |bytes| bytes[1000] ^= 1),
            "is damaged",
        ),
        (
            "a flipped bit, and a digest for it: the index",
            |b| b.replace("chunks.index", |bytes| bytes[30] ^= 1),
            "chunks.index does not have the checksum",
        ),
        (
            "a flipped bit, and a digest for it: CRIU's",
            |b| b.replace("criu/pstree.img", |bytes| bytes[0] ^= 1),
            "does not have the checksum",
        ),
        (
            "a flipped bit, and a digest for it: the seal",
            |b| b.replace("manifest.blake3", |bytes| bytes[0] ^= 1),
            "manifest.json does not have the checksum",
        ),
        (
            "a manifest that was changed, and a digest for it",
            |b| {
                b.replace("manifest.json", |bytes| {
                    edit(bytes, "\"uid\": 0", "\"uid\": 1")
                })
            },
            "manifest.json does not have the checksum",
        ),
        (
            "a manifest of another format",
            |b| {
                b.replace("manifest.json", |bytes| {
                    edit(bytes, "\"format\": 2", "\"format\": 3")
                })
            },
            "format 3",
        ),
        (
            "a manifest that names a file outside",
            |b| {
                b.replace("manifest.json", |bytes| {
                    edit(bytes, "criu/pstree.img", "../pstree.img")
                })
            },
            "plain name",
        ),
        (
            "a manifest that is too large",
            |b| b.replace("manifest.json", |bytes| bytes.resize(17 << 20, b' ')),
            "claims more than the 16777216 bytes",
        ),
    ];
    for (what, harm, words) in table {
        let between = Between::with_one();
        harm(&between);
        let refused = with_causes(&between.pull(None).map(drop).unwrap_err());
        assert!(refused.contains(words), "{what}: {refused}");
        assert_eq!(leftovers(&between.to), 0, "{what}");
        assert_eq!(between.to.list(None).unwrap().len(), 0, "{what}");
        assert!(!between.root.path().join("into").exists(), "{what}");
        assert!(!between.root.path().join("evil").exists(), "{what}");
    }
    println!("{} hostile layouts were refused", table.len());
}

/// Changes a key of the one tag's descriptor.
fn of_tag(between: &Between, key: &str, value: Value) {
    let path = between.dir().join(INDEX_JSON);
    let mut index: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    index["manifests"][0][key] = value;
    fs::write(path, index.to_string()).unwrap();
}

fn edit(bytes: &mut Vec<u8>, from: &str, to: &str) {
    let text = String::from_utf8(bytes.clone()).unwrap();
    assert!(text.contains(from));
    *bytes = text.replace(from, to).into_bytes();
}

#[test]
fn nothing_is_put_where_something_else_is() {
    let root = tempfile::tempdir().unwrap();
    fs::write(root.path().join("mine"), "x").unwrap();
    let refused = Layout::create(root.path()).unwrap_err().to_string();
    assert!(refused.contains("is not empty"), "{refused}");
    assert_eq!(fs::read_dir(root.path()).unwrap().count(), 1);
    for tag in ["", "-a", "a b", "a:b", "../up", &"a".repeat(256)] {
        assert!(matches!(check_tag(tag), Err(LayoutError::Tag(_))), "{tag}");
    }
    check_tag("team-a/warm@3").unwrap();
}

#[test]
fn what_others_have_in_a_layout_stays_and_what_a_killed_push_left_goes() {
    let between = Between::with_one();
    let path = between.dir().join(INDEX_JSON);
    let mut index: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    let others = json!({"mediaType": MANIFEST, "digest": "sha256:00", "size": 1, "platform": {"os": "linux"}});
    index["manifests"]
        .as_array_mut()
        .unwrap()
        .insert(0, others.clone());
    index["annotations"] = json!({"a": "b"});
    fs::write(&path, index.to_string()).unwrap();
    let left = between.dir().join(".rekindle-1");
    fs::write(&left, "half").unwrap();
    between.push("one");
    between.push("two");
    let index: Value = serde_json::from_slice(&fs::read(&path).unwrap()).unwrap();
    assert_eq!(index["manifests"][0], others);
    assert_eq!(index["manifests"].as_array().unwrap().len(), 3);
    assert_eq!(index["annotations"]["a"], "b");
    assert!(!left.exists());
    between.pull(Some("two")).unwrap();
}

#[test]
fn an_image_that_is_not_whole_is_not_pushed() {
    let between = Between::with_one();
    let image = between.root.path().join("from/team-a/warm/1");
    fs::write(image.join("more"), "x").unwrap();
    let (namespace, name) = names();
    let image = between.from.resolve(&namespace, &name, None).unwrap();
    let layout = Layout::create(&between.dir()).unwrap();
    let refused = layout.push(&image, "two", &Default::default()).unwrap_err();
    assert!(
        refused.to_string().contains("more is not in the manifest"),
        "{refused}"
    );
    assert!(matches!(
        between.pull(Some("two")),
        Err(LayoutError::NoTag { .. })
    ));
}

/// The house bans renames outside of one place.
mod fs_rename {
    use std::path::Path;

    #[allow(
        clippy::disallowed_methods,
        reason = "what a hostile layout is made with"
    )]
    pub(super) fn rename(from: &Path, to: &Path) {
        std::fs::rename(from, to).unwrap();
    }
}
