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

fn is_pack(file: &Path) -> bool {
    file.to_string_lossy().starts_with("pack-")
}

const SHM: &str = "/run/flipped-shm";

fn bound_shm(container: Builder<'_>) -> Builder<'_> {
    container.change_spec(|spec| {
        for mount in spec["mounts"].as_array_mut().into_iter().flatten() {
            if mount["destination"] == "/dev/shm" {
                *mount = json!({"destination": "/dev/shm", "type": "bind", "source": SHM, "options": ["rbind", "rw"]});
            }
        }
    })
}

/// A sound image called `name`, whose container is gone.
async fn image(stage: &Stage, name: &str) -> Result<()> {
    let (task, _) = stage.lived_in(name).await?;
    stage.checkpoint(name, name, &[]).await?;
    task.remove().await
}

pub(crate) async fn one_flipped_byte_in_any_file(stage: &Stage) -> Result<()> {
    // As in a pod, /dev/shm is a bind, which has an archive of its own.
    stage.node.run(["mkdir", "-p", SHM]).await?;
    let line = "echo kept > /root/note; echo shared > /dev/shm/note; exec /counter";
    let task = bound_shm(stage.container("flipped").shell(line))
        .run()
        .await?;
    counts_to(task.io().out()?, 2).await?;
    stage.checkpoint("flipped", "flipped", &[]).await?;
    task.remove().await?;
    let folder = stage.image("default", "flipped");
    let all = files(&folder)?;
    for needed in [
        "manifest.json",
        "manifest.blake3",
        "chunks.index",
        "criu/inventory.img",
        "criu/core-1.img",
    ] {
        ensure!(
            all.iter().any(|file| file == Path::new(needed)),
            "the image has no {needed}: {all:?}"
        );
    }
    ensure!(
        all.iter().any(|file| is_pack(file)),
        "the image has no pack: {all:?}"
    );
    let mut count = 0;
    for relative in &all {
        let file = fs::OpenOptions::new()
            .read(true)
            .write(true)
            .open(folder.join(relative))?;
        let size = file.metadata()?.len();
        let mut places = vec![0, size / 2, size.saturating_sub(1)];
        places.dedup();
        for at in places {
            count += 1;
            let id = format!("flipped-{count}");
            let mut byte = [0];
            // A file of no bytes gets one.
            let grown = file.read_at(&mut byte, at)? == 0;
            file.write_all_at(&[byte[0] ^ 1], at)?;
            let refused = stage
                .refuses(
                    &id,
                    bound_shm(stage.warm(&id, "flipped")),
                    &["default/flipped"],
                )
                .await;
            refused.with_context(|| format!("byte {at} of {} was flipped", relative.display()))?;
            match grown {
                true => file.set_len(0)?,
                false => file.write_all_at(&byte, at)?,
            }
        }
    }
    // Put back as it was, it is an image again: nothing but the byte was the reason.
    let warm = bound_shm(stage.warm("flipped-back", "flipped"))
        .run()
        .await?;
    counts_to(warm.io().out()?, 6).await?;
    warm.remove().await
}

/// An image for one test, and a copy of it.
async fn copy(stage: &Stage, name: &str) -> Result<Copy> {
    image(stage, name).await?;
    Copy::of(stage, name, &format!("{name}-copy"))
}

async fn refuses(stage: &Stage, name: &str, words: &[&str]) -> Result<()> {
    let (id, image) = (format!("{name}-2"), format!("{name}-copy"));
    stage.refuses(&id, stage.warm(&id, &image), words).await?;
    let verified = stage.rekindle(&["image", "verify", &image]).await?;
    assert_eq!(verified.status.code(), Some(1));
    Ok(())
}

pub(crate) async fn a_truncated_file(stage: &Stage) -> Result<()> {
    let copy = copy(stage, "truncated").await?;
    let all = files(&copy.0)?;
    let pack = all.iter().find(|file| is_pack(file)).context("no pack")?;
    let pack = fs::OpenOptions::new().write(true).open(copy.0.join(pack))?;
    pack.set_len(pack.metadata()?.len() - 1)?;
    refuses(stage, "truncated", &["pack-", "bytes"]).await
}

pub(crate) async fn a_missing_file(stage: &Stage) -> Result<()> {
    let copy = copy(stage, "missing").await?;
    fs::remove_file(copy.path("criu/core-1.img"))?;
    refuses(stage, "missing", &["core-1.img", "missing"]).await
}

pub(crate) async fn an_extra_file(stage: &Stage) -> Result<()> {
    let copy = copy(stage, "extra").await?;
    fs::write(copy.path("criu/tty-info.img"), "")?;
    refuses(stage, "extra", &["tty-info.img", "not in the manifest"]).await
}

pub(crate) async fn a_link_in_place_of_a_file(stage: &Stage) -> Result<()> {
    let copy = copy(stage, "linked").await?;
    let elsewhere = stage.node.path("/tmp/core-1.img");
    fs::copy(copy.path("criu/core-1.img"), elsewhere)?;
    fs::remove_file(copy.path("criu/core-1.img"))?;
    std::os::unix::fs::symlink("/tmp/core-1.img", copy.path("criu/core-1.img"))?;
    refuses(stage, "linked", &["core-1.img", "not a regular file"]).await
}

/// Of right checksum, but not where it belongs: who may use an image is decided by where it lies.
pub(crate) async fn a_manifest_of_another_image(stage: &Stage) -> Result<()> {
    let copy = copy(stage, "moved").await?;
    copy.change_manifest(|manifest| manifest["namespace"] = "platform".into())?;
    refuses(stage, "moved", &["platform/moved-copy"]).await
}

/// Of right checksum too: a claim of 4 TB, which whoever believed it would have to find room for.
pub(crate) async fn a_pagemap_that_claims_a_billion_pages(stage: &Stage) -> Result<()> {
    let copy = copy(stage, "greedy").await?;
    copy.reseal("criu/pagemap-1.img", |bytes| {
        // One more run: vaddr = 1 << 47, beyond all others, and nr_pages = 10^9 in both fields, lazy and present.
        let address = [8, 0x80, 0x80, 0x80, 0x80, 0x80, 0x80, 0x20];
        let billion = [0x80, 0x94, 0xeb, 0xdc, 0x03];
        let run = [&address[..], &[16], &billion, &[32, 6, 40], &billion].concat();
        bytes.extend_from_slice(&u32::try_from(run.len()).unwrap_or_default().to_le_bytes());
        bytes.extend_from_slice(&run);
    })?;
    refuses(stage, "greedy", &["pagemap-1.img", "claims 1000"]).await
}
