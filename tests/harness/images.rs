//! Container images without a registry: OCI layouts in a tar file, as `ctr image import` takes them.

use crate::{progress::Progress, root};
use anyhow::{Context, Result};
use serde_json::json;
use sha2::{Digest, Sha256};
use std::fs::{self, File};
use std::io::{self, BufReader, BufWriter, Read, Seek, Write};
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};
use tar::{Builder, EntryType, Header};

/// An image in the cache: its name for containerd, its archive, and the digest of its one layer.
#[derive(Debug, Clone)]
pub struct Image {
    /// As containerd knows it; `localhost/…`, because a name without a registry is taken for docker.io's.
    pub name: String,
    /// The archive.
    pub archive: PathBuf,
    /// The layer's digest, which is the snapshot's chain id too, as there is but one.
    pub layer: String,
}

const COUNTER: &str = include_str!("images/counter.sh");
const PAUSE: &str = include_str!("images/pause.sh");
const SERVER: &str = include_str!("images/server.py");

/// `localhost/busybox:test`: a shell and its tools in 2 MB; in it `/counter`, the smallest workload whose continuation can
/// be told from a new start.
pub fn busybox() -> Result<Image> {
    from_busybox("localhost/busybox:test", &["sh"])
}

/// `localhost/pause:test`: what holds a pod's namespaces.
pub fn pause() -> Result<Image> {
    from_busybox("localhost/pause:test", &["/pause"])
}

/// `localhost/torch:test`: PyTorch and Transformers serving the model in `/data`.
pub fn torch() -> Result<Image> {
    let root = root::torch()?;
    let mut key = Sha256::new();
    key.update(fs::read(root.join(".recipe"))?);
    key.update(SERVER);
    let files = |layer: &mut Builder<&mut dyn Write>| -> Result<()> {
        let progress = Progress::start("packing localhost/torch:test (once)");
        layer.follow_symlinks(false);
        layer
            .append_dir_all(".", &root)
            .context("packing the PyTorch root")?;
        directory(layer, "data", 0o755)?;
        file(layer, "server.py", 0o644, SERVER.as_bytes())?;
        progress.done();
        Ok(())
    };
    archive(
        "localhost/torch:test",
        &["python3", "/server.py"],
        key,
        files,
    )
}

fn from_busybox(name: &str, command: &[&str]) -> Result<Image> {
    // The root's own, not the host's: one program less that a host must have.
    let program = root::node(root::Suite::from_env()?)?.join("usr/bin/busybox");
    let binary = fs::read(&program).with_context(|| format!("reading {}", program.display()))?;
    let list = std::process::Command::new(&program)
        .arg("--list")
        .output()?;
    let applets =
        String::from_utf8(list.stdout).context("reading the list of busybox's applets")?;
    let mut key = Sha256::new();
    for part in [binary.as_slice(), COUNTER.as_bytes(), PAUSE.as_bytes()] {
        key.update(part);
    }
    let files = |layer: &mut Builder<&mut dyn Write>| -> Result<()> {
        for dir in ["bin", "dev", "proc", "sys", "etc", "root", "data", "run"] {
            directory(layer, dir, 0o755)?;
        }
        directory(layer, "tmp", 0o1777)?;
        file(layer, "bin/busybox", 0o755, &binary)?;
        for applet in applets.lines().filter(|name| *name != "busybox") {
            let mut header = header(EntryType::Symlink, 0o777, 0);
            layer.append_link(&mut header, format!("bin/{applet}"), "busybox")?;
        }
        file(
            layer,
            "etc/passwd",
            0o644,
            b"root:x:0:0:root:/root:/bin/sh\nnobody:x:65534:65534:nobody:/:/bin/sh\n",
        )?;
        file(layer, "etc/group", 0o644, b"root:x:0:\nnogroup:x:65534:\n")?;
        file(layer, "counter", 0o755, COUNTER.as_bytes())?;
        file(layer, "pause", 0o755, PAUSE.as_bytes())
    };
    archive(name, command, key, files)
}

/// Writes the archive unless the cache has it under the same key; the layer goes through a file, it may be large.
#[allow(
    clippy::disallowed_methods,
    reason = "the commit of a cached archive, made again when it is missing"
)]
fn archive(
    name: &str,
    command: &[&str],
    key: Sha256,
    files: impl FnOnce(&mut Builder<&mut dyn Write>) -> Result<()>,
) -> Result<Image> {
    let key = hex(&key
        .chain_update(name)
        .chain_update(command.join(" "))
        .finalize());
    let folder = root::cache().join("images");
    fs::create_dir_all(&folder).with_context(|| format!("making {}", folder.display()))?;
    let short = name.trim_start_matches("localhost/").replace(':', "-");
    let archive = folder.join(format!("{short}-{}.tar", &key[..12]));
    let noted = archive.with_extension("layer");
    // Two tests of a program may want it at once, and one makes it.
    static MAKING: Mutex<()> = Mutex::new(());
    let _alone = MAKING.lock().unwrap_or_else(PoisonError::into_inner);
    if let (true, Ok(layer)) = (archive.exists(), fs::read_to_string(&noted)) {
        return Ok(Image {
            name: name.into(),
            archive,
            layer,
        });
    }

    let partial = folder.join(format!("{short}.{}.partial", std::process::id()));
    let layer_path = partial.with_extension("blob");
    let mut out = Hashing {
        inner: BufWriter::new(File::create(&layer_path)?),
        hash: Sha256::new(),
    };
    {
        let mut layer = Builder::new(&mut out as &mut dyn Write);
        files(&mut layer)?;
        layer.finish()?;
    }
    out.flush()?;
    let layer = format!("sha256:{}", hex(&out.hash.finalize()));
    write_layout(&partial, name, command, &layer_path, &layer)?;
    fs::remove_file(&layer_path)?;
    fs::rename(&partial, &archive)?;
    fs::write(&noted, &layer)?;
    Ok(Image {
        name: name.into(),
        archive,
        layer,
    })
}

fn write_layout(
    to: &Path,
    name: &str,
    command: &[&str],
    layer_path: &Path,
    layer: &str,
) -> Result<()> {
    let config = json!({
        "architecture": if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" },
        "os": "linux",
        "config": {"Cmd": command, "Env": ["PATH=/usr/local/bin:/usr/bin:/bin"]},
        "rootfs": {"type": "layers", "diff_ids": [layer]},
    });
    let config = serde_json::to_vec(&config)?;
    let mut blob = BufReader::new(File::open(layer_path)?);
    let manifest = json!({
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": {"mediaType": "application/vnd.oci.image.config.v1+json", "digest": digest(&config), "size": config.len()},
        "layers": [{
            "mediaType": "application/vnd.oci.image.layer.v1.tar",
            "digest": layer,
            "size": blob.seek(io::SeekFrom::End(0))?,
        }],
    });
    let manifest = serde_json::to_vec(&manifest)?;
    let index = json!({"schemaVersion": 2, "manifests": [{
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "digest": digest(&manifest),
        "size": manifest.len(),
        "annotations": {"io.containerd.image.name": name},
    }]});
    blob.rewind()?;
    let mut out = Builder::new(BufWriter::new(File::create(to)?));
    file(
        &mut out,
        "oci-layout",
        0o644,
        br#"{"imageLayoutVersion":"1.0.0"}"#,
    )?;
    file(&mut out, "index.json", 0o644, &serde_json::to_vec(&index)?)?;
    for content in [&config, &manifest] {
        file(&mut out, &blob_path(&digest(content)), 0o644, content)?;
    }
    let mut entry = header(EntryType::Regular, 0o644, blob.get_ref().metadata()?.len());
    out.append_data(&mut entry, blob_path(layer), &mut blob as &mut dyn Read)?;
    out.into_inner()?.flush()?;
    Ok(())
}

fn blob_path(digest: &str) -> String {
    format!("blobs/{}", digest.replace(':', "/"))
}

fn digest(content: &[u8]) -> String {
    format!("sha256:{}", hex(&Sha256::digest(content)))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn header(kind: EntryType, mode: u32, size: u64) -> Header {
    let mut header = Header::new_gnu();
    header.set_entry_type(kind);
    header.set_mode(mode);
    header.set_size(size);
    header
}

fn directory<W: Write>(tar: &mut Builder<W>, path: &str, mode: u32) -> Result<()> {
    let mut header = header(EntryType::Directory, mode, 0);
    Ok(tar.append_data(&mut header, path, io::empty())?)
}

fn file<W: Write>(tar: &mut Builder<W>, path: &str, mode: u32, content: &[u8]) -> Result<()> {
    let mut header = header(EntryType::Regular, mode, content.len() as u64);
    Ok(tar.append_data(&mut header, path, content)?)
}

struct Hashing<W> {
    inner: W,
    hash: Sha256,
}

impl<W: Write> Write for Hashing<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let n = self.inner.write(bytes)?;
        self.hash.update(&bytes[..n]);
        Ok(n)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}
