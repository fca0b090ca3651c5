//! Images that are not, bit for bit, those that were sealed.

use crate::stage::{Stage, counts_to};
use anyhow::{Context, Result, ensure};
use rekindle_checkpoint::chunks::Digest;
use rekindle_harness::container::Builder;
use serde_json::{Value, json};
use std::fs;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

/// A copy of an image, under a name of its own, to be tampered with.
pub(crate) struct Copy(PathBuf);

impl Copy {
    pub(crate) fn of(stage: &Stage, image: &str, name: &str) -> Result<Copy> {
        let (from, to) = (stage.image("default", image), stage.image("default", name));
        fs::create_dir_all(to.join("criu"))?;
        for file in files(&from)? {
            fs::copy(from.join(&file), to.join(&file))?;
        }
        let copy = Copy(to);
        copy.change_manifest(|manifest| manifest["name"] = name.into())?;
        Ok(copy)
    }

    /// Changes the manifest, and its checksum with it.
    pub(crate) fn change_manifest(&self, change: impl FnOnce(&mut Value)) -> Result<()> {
        let mut manifest: Value = serde_json::from_slice(&fs::read(self.0.join("manifest.json"))?)?;
        change(&mut manifest);
        let bytes = serde_json::to_vec(&manifest)?;
        fs::write(
            self.0.join("manifest.blake3"),
            format!("{}\n", Digest::of(&bytes)),
        )?;
        Ok(fs::write(self.0.join("manifest.json"), bytes)?)
    }

    /// Changes a file, and what the manifest says about it.
    pub(crate) fn reseal(&self, file: &str, change: impl FnOnce(&mut Vec<u8>)) -> Result<()> {
        let mut bytes = fs::read(self.0.join(file))?;
        let before = bytes.clone();
        change(&mut bytes);
        ensure!(bytes != before, "{file} was not changed");
        fs::write(self.0.join(file), &bytes)?;
        self.change_manifest(|manifest| {
            for entry in manifest["files"].as_array_mut().into_iter().flatten() {
                if entry["path"] == file {
                    entry["size"] = bytes.len().into();
                    entry["blake3"] = Digest::of(&bytes).to_string().into();
                }
            }
        })
    }

    pub(crate) fn path(&self, file: &str) -> PathBuf {
        self.0.join(file)
    }

    /// Its one pack.
    fn pack(&self) -> Result<String> {
        let all = files(&self.0)?.into_iter();
        let mut packs = all.filter_map(|file| file.into_os_string().into_string().ok());
        let pack = packs.find(|file| file.starts_with("pack-"));
        pack.context("the image has no pack")
    }

    /// Flips the byte at a place, of so many.
    fn flip(&self, file: &str, at: fn(u64) -> u64) -> Result<()> {
        let file = fs::OpenOptions::new()
            .read(true)
            .write(true)
            .open(self.path(file))?;
        let at = at(file.metadata()?.len());
        let mut byte = [0];
        file.read_exact_at(&mut byte, at)?;
        Ok(file.write_all_at(&[byte[0] ^ 1], at)?)
    }

    fn set_len(&self, file: &str, of: fn(u64) -> u64) -> Result<()> {
        let file = fs::OpenOptions::new().write(true).open(self.path(file))?;
        Ok(file.set_len(of(file.metadata()?.len()))?)
    }
}

/// The files of an image, relative to its folder.
fn files(image: &Path) -> Result<Vec<PathBuf>> {
    let mut all = Vec::new();
    for folder in ["", "criu"] {
        let entries = fs::read_dir(image.join(folder))
            .with_context(|| format!("listing {}", image.display()))?;
        for entry in entries {
            let entry = entry?;
            if entry.file_type()?.is_file() {
                all.push(Path::new(folder).join(entry.file_name()));
            }
        }
    }
    Ok(all)
}

const SHM: &str = "/run/damaged-shm";

fn bound_shm(container: Builder<'_>) -> Builder<'_> {
    container.change_spec(|spec| {
        for mount in spec["mounts"].as_array_mut().into_iter().flatten() {
            if mount["destination"] == "/dev/shm" {
                *mount = json!({"destination": "/dev/shm", "type": "bind", "source": SHM, "options": ["rbind", "rw"]});
            }
        }
    })
}

/// What becomes of an image, and the words with which it is refused.
type Case = (
    &'static str,
    fn(&Copy) -> Result<()>,
    &'static [&'static str],
);

/// One of each kind; `hooks/checkpoint/src/image/tests/faults.rs` has all of them.
const CASES: &[Case] = &[
    (
        "the first byte of the manifest is flipped",
        |image| image.flip("manifest.json", |_| 0),
        &["manifest.json", "cannot be understood"],
    ),
    (
        "a byte of the manifest's digest is flipped",
        |image| image.flip("manifest.blake3", |bytes| bytes / 2),
        &["manifest.json", "checksum"],
    ),
    (
        "a byte of the index is flipped",
        |image| image.flip("chunks.index", |bytes| bytes / 2),
        &["chunks.index", "checksum"],
    ),
    (
        "the magic of a file of CRIU's is flipped",
        |image| image.flip("criu/core-1.img", |_| 0),
        &["criu/core-1.img", "checksum"],
    ),
    (
        "the last byte of a file of CRIU's is flipped",
        |image| image.flip("criu/mm-1.img", |bytes| bytes - 1),
        &["criu/mm-1.img", "checksum"],
    ),
    // It has the archives at its end, the last of them of /dev/shm, and an archive ends with zeros that are in no pack.
    (
        "the last byte of the pack is flipped",
        |image| image.flip(&image.pack()?, |bytes| bytes - 1),
        &["pack-", "is damaged"],
    ),
    (
        "the pack is cut by a byte",
        |image| image.set_len(&image.pack()?, |bytes| bytes - 1),
        &["pack-", "bytes where"],
    ),
    (
        "a file of CRIU's is empty",
        |image| image.set_len("criu/core-1.img", |_| 0),
        &["criu/core-1.img", "has 0 bytes"],
    ),
    (
        "the index has a TiB of holes",
        |image| image.set_len("chunks.index", |_| 1 << 40),
        &["chunks.index", "has 1099511627776 bytes"],
    ),
    (
        "a file is missing",
        |image| Ok(fs::remove_file(image.path("criu/core-1.img"))?),
        &["core-1.img", "missing"],
    ),
    (
        "there is a file too many",
        |image| Ok(fs::write(image.path("criu/tty-info.img"), "")?),
        &["tty-info.img", "not in the manifest"],
    ),
    (
        "a link is in place of a file",
        |image| {
            let file = image.path("criu/core-1.img");
            fs::copy(&file, image.path("../core-1.img"))?;
            fs::remove_file(&file)?;
            Ok(std::os::unix::fs::symlink("../../core-1.img", file)?)
        },
        &["core-1.img", "not a regular file"],
    ),
    (
        "a FIFO is in place of the manifest's digest",
        |image| {
            let file = image.path("manifest.blake3");
            fs::remove_file(&file)?;
            Ok(nix::unistd::mkfifo(&file, nix::sys::stat::Mode::S_IRWXU)?)
        },
        &["manifest.blake3", "not a regular file"],
    ),
    (
        "a folder is in place of the index",
        |image| {
            let file = image.path("chunks.index");
            fs::remove_file(&file)?;
            Ok(fs::create_dir(file)?)
        },
        &["chunks.index", "not a regular file"],
    ),
    (
        "its manifest names a file outside",
        |image| {
            image.change_manifest(|manifest| {
                manifest["files"][0]["path"] = "../../../../../etc/passwd".into();
            })
        },
        &["manifest.json", "plain name"],
    ),
    // Of right checksum, but not where it belongs: who may use an image is decided by where it lies.
    (
        "its manifest says that it is another namespace's",
        |image| image.change_manifest(|manifest| manifest["namespace"] = "platform".into()),
        &["says that it is platform/"],
    ),
    // Of right checksum too: a claim of 4 TB, which whoever believed it would have to find room for.
    (
        "a pagemap claims a billion pages",
        |image| image.reseal("criu/pagemap-1.img", claim_a_billion_pages),
        &["pagemap-1.img", "claims 1000"],
    ),
];

/// Whatever it is: refused in one sentence, nothing left, and the image as it was still starts.
pub(crate) async fn one_of_each_kind_is_refused(stage: &Stage) -> Result<()> {
    // As in a pod, /dev/shm is a bind, which has an archive of its own.
    stage.node.run(["mkdir", "-p", SHM]).await?;
    let line = "echo kept > /root/note; echo shared > /dev/shm/note; exec /counter";
    let task = bound_shm(stage.container("damaged").shell(line));
    let task = task.run().await?;
    let before = counts_to(task.io().out()?, 2).await?;
    stage.checkpoint("damaged", "damaged", &[]).await?;
    let at = counts_to(task.io().out()?, before.n).await?;
    task.remove().await?;
    for (number, (what, harm, words)) in CASES.iter().enumerate() {
        let id = format!("damaged-{number}");
        let copy = Copy::of(stage, "damaged", &id)?;
        harm(&copy).with_context(|| (*what).to_owned())?;
        let refused = stage.refuses(&id, bound_shm(stage.warm(&id, &id)), words);
        refused.await.with_context(|| (*what).to_owned())?;
        let verified = stage.rekindle(&["image", "verify", &id]).await?;
        assert_eq!(verified.status.code(), Some(1), "{what}: {verified:?}");
    }
    println!("{} kinds of damage", CASES.len());
    // Nothing but that was the reason.
    Copy::of(stage, "damaged", "damaged-not")?;
    let warm = bound_shm(stage.warm("damaged-not", "damaged-not"));
    let warm = warm.run().await?;
    crate::stage::continues(&warm, &before, at.n).await?;
    warm.remove().await
}

/// One more run: vaddr = 1 << 47, beyond all others, and nr_pages = 10^9 in both fields, lazy and present.
fn claim_a_billion_pages(pagemap: &mut Vec<u8>) {
    let address = [8, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x20];
    let billion = [0x80, 0x94, 0xeb, 0xdc, 0x03];
    let run = [&address[..], &[16], &billion, &[32, 6, 40], &billion].concat();
    pagemap.extend_from_slice(&u32::try_from(run.len()).unwrap_or_default().to_le_bytes());
    pagemap.extend_from_slice(&run);
}
