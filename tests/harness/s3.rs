//! An S3 server on a node: a process of its own with SigV4 and TLS, as strict as a real one and with nothing of the network.

use crate::{Node, progress::Progress};
use anyhow::{Context, Result, ensure};
use std::fs;
use std::path::Path;
use std::process::Stdio;
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::Child;

/// Where it listens, in the node's own network: no other node is in the way.
const LISTEN: &str = "127.0.0.1:9000";
/// The folder of its buckets, on the node.
pub const ROOT: &str = "/srv/s3";
/// What is to be uploaded.
const STAGING: &str = "/srv/upload";
const CREDENTIALS: &str = "/etc/rekindle/s3-credentials";
const CA: &str = "/srv/s3/.tls/ca.pem";
const KEY: (&str, &str) = ("rekindle", "rekindle-secret");

/// A running server. Dropped, it ends.
#[derive(Debug)]
pub struct S3Server {
    _process: Child,
}

/// What a node's `config.toml` says about the server: its bucket is everybody's, by a key of the node's own.
pub fn source(bucket: &str) -> String {
    format!(
        "[[datasets.source]]\nallow = \"s3://{bucket}/\"\nnamespaces = [\"*\"]\nendpoint = \"https://{LISTEN}\"\n\
         ca-file = \"{CA}\"\ncredentials-file = \"{CREDENTIALS}\"\nminimum-verification = \"store-checksum\"\n"
    )
}

/// What a node's `config.toml` says about the server as a tier of a namespace's images, below a prefix of its own.
pub fn tier(bucket: &str, namespace: &str) -> String {
    format!(
        "[[images.tier]]\nurl = \"s3://{bucket}/{namespace}/\"\nnamespaces = [\"{namespace}\"]\n\
         endpoint = \"https://{LISTEN}\"\nca-file = \"{CA}\"\ncredentials-file = \"{CREDENTIALS}\"\n"
    )
}

impl S3Server {
    /// Starts a server, and puts the files of `folder` under `prefix` of its `bucket`.
    pub async fn start(node: &Node, bucket: &str, prefix: &str, folder: &Path) -> Result<S3Server> {
        let server = Self::empty(node, bucket).await?;
        upload(node, bucket, prefix, folder)
            .await
            .with_context(|| {
                format!("filling s3://{bucket}/{prefix}/ from {}", folder.display())
            })?;
        Ok(server)
    }

    /// Starts a server with an empty bucket.
    pub async fn empty(node: &Node, bucket: &str) -> Result<S3Server> {
        fs::create_dir_all(node.path(ROOT).join(bucket))?;
        fs::write(
            node.path(CREDENTIALS),
            format!(
                "[default]\naws_access_key_id = {}\naws_secret_access_key = {}\n",
                KEY.0, KEY.1
            ),
        )?;
        let command = [
            "rekindle-s3server",
            "--root",
            ROOT,
            "--listen",
            LISTEN,
            "--access-key",
            KEY.0,
            "--secret-key",
            KEY.1,
        ];
        let mut process = tokio::process::Command::from(node.command(&command))
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .context("starting rekindle-s3server in the node")?;
        let out = process.stdout.take().context("no stdout")?;
        let ready = BufReader::new(out).lines().next_line().await?;
        if ready.is_none() {
            let said = process.wait_with_output().await?;
            anyhow::bail!(
                "rekindle-s3server ended with {} before it was ready: {}",
                said.status,
                String::from_utf8_lossy(&said.stderr).trim()
            );
        }
        Ok(S3Server { _process: process })
    }
}

/// Puts a folder's files as a client of S3 does, inside the node, whose network nobody else is in.
async fn upload(node: &Node, bucket: &str, prefix: &str, folder: &Path) -> Result<()> {
    // Where the node sees it.
    let there = node.path(STAGING);
    let files = files_below(folder)?;
    let total = files.iter().map(|(_, bytes)| bytes).sum();
    for (path, _) in &files {
        let copy = there.join(path.strip_prefix(folder)?);
        fs::create_dir_all(copy.parent().unwrap_or(&there))?;
        fs::copy(path, &copy).with_context(|| format!("copying {}", path.display()))?;
    }
    let (endpoint, prefix) = (format!("https://{LISTEN}"), format!("{prefix}/"));
    let command = [
        "rekindle-s3server",
        "put",
        "--endpoint",
        &endpoint,
        "--ca",
        CA,
        "--access-key",
        KEY.0,
        "--secret-key",
        KEY.1,
        "--bucket",
        bucket,
        "--prefix",
        &prefix,
        STAGING,
    ];
    let mut process = tokio::process::Command::from(node.command(&command))
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true)
        .spawn()?;
    let progress = Progress::bytes("uploading the weights", total);
    let mut lines = BufReader::new(process.stdout.take().context("no stdout")?).lines();
    while let Some(bytes) = lines.next_line().await? {
        progress.add(bytes.parse()?);
    }
    progress.hide();
    let ended = process.wait_with_output().await?;
    ensure!(
        ended.status.success(),
        "the upload ended with {}: {}",
        ended.status,
        String::from_utf8_lossy(&ended.stderr).trim()
    );
    Ok(fs::remove_dir_all(there)?)
}

fn files_below(folder: &Path) -> Result<Vec<(std::path::PathBuf, u64)>> {
    let mut found = Vec::new();
    for entry in
        fs::read_dir(folder).with_context(|| format!("reading the folder {}", folder.display()))?
    {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            found.extend(files_below(&entry.path())?);
        } else {
            found.push((entry.path(), entry.metadata()?.len()));
        }
    }
    Ok(found)
}
