//! `put`: a folder's files become objects, as any client of S3 would make them: signed, encrypted, each with
//! its CRC-64/NVME, which the server compares with what has come.

use std::{
    fs::{self, File},
    io::{self, Write},
    path::{Path, PathBuf},
};

use anyhow::{Context, ensure};
use aws_sdk_s3::{
    Client, Config,
    config::{BehaviorVersion, Credentials, Region, RequestChecksumCalculation},
    primitives::ByteStream,
};
use aws_smithy_http_client::{
    Builder,
    tls::{Provider, TlsContext, TrustStore, rustls_provider::CryptoMode},
};
use base64_simd::STANDARD;
use clap::Args;
use rekindle_store::crc;

#[derive(Debug, Args)]
pub(crate) struct Put {
    /// The server.
    #[arg(long)]
    endpoint: String,
    /// The certificate of whoever signed the server's.
    #[arg(long)]
    ca: PathBuf,
    /// Requests are signed with this key.
    #[arg(long, default_value = "rekindle")]
    access_key: String,
    /// The key's secret.
    #[arg(long, default_value = "rekindle-secret")]
    secret_key: String,
    /// The bucket; it is made when it is not there.
    #[arg(long)]
    bucket: String,
    /// What the keys begin with.
    #[arg(long, default_value = "")]
    prefix: String,
    /// The folder whose files are put.
    folder: PathBuf,
}

/// Puts all files, and prints the bytes of each when it is there.
pub(crate) async fn put(args: &Put) -> anyhow::Result<()> {
    let client = client(args)?;
    // The bucket of an earlier put does as well.
    let _ = client.create_bucket().bucket(&args.bucket).send().await;
    let mut files = Vec::new();
    files_below(&args.folder, &mut files)?;
    ensure!(
        !files.is_empty(),
        "{} holds no files",
        args.folder.display()
    );
    for path in files {
        let name = path.strip_prefix(&args.folder)?.to_string_lossy();
        let key = format!("{}{name}", args.prefix);
        let (crc, bytes) = crc::copy(&mut File::open(&path)?, &mut io::sink())?;
        client
            .put_object()
            .bucket(&args.bucket)
            .key(&key)
            .checksum_crc64_nvme(STANDARD.encode_to_string(crc.0.to_be_bytes()))
            .body(ByteStream::from_path(&path).await?)
            .send()
            .await
            .with_context(|| format!("putting s3://{}/{key}", args.bucket))?;
        writeln!(io::stdout(), "{bytes}")?;
    }
    Ok(())
}

fn client(args: &Put) -> anyhow::Result<Client> {
    let ca = fs::read(&args.ca).with_context(|| format!("reading {}", args.ca.display()))?;
    let mut trust = TrustStore::empty();
    trust.add_pem_certificate(ca);
    let tls = TlsContext::builder().with_trust_store(trust).build()?;
    let http = Builder::new()
        .tls_provider(Provider::Rustls(CryptoMode::Ring))
        .tls_context(tls)
        .build_https();
    let credentials = Credentials::new(&args.access_key, &args.secret_key, None, None, "arguments");
    Ok(Client::from_conf(
        Config::builder()
            .behavior_version(BehaviorVersion::latest())
            .http_client(http)
            .region(Region::from_static("us-east-1"))
            .force_path_style(true)
            .endpoint_url(&args.endpoint)
            .credentials_provider(credentials)
            .request_checksum_calculation(RequestChecksumCalculation::WhenRequired)
            .build(),
    ))
}

fn files_below(folder: &Path, found: &mut Vec<PathBuf>) -> anyhow::Result<()> {
    let entries = fs::read_dir(folder).with_context(|| format!("reading {}", folder.display()))?;
    for entry in entries {
        let entry = entry?;
        if entry.file_type()?.is_dir() {
            files_below(&entry.path(), found)?;
        } else {
            found.push(entry.path());
        }
    }
    found.sort();
    Ok(())
}
