//! The dataset client against a server that checks signatures and has a certificate.
#![allow(
    clippy::unwrap_used,
    reason = "helpers of tests, which clippy does not know for tests"
)]

use std::{
    fs,
    io::{BufRead, BufReader},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use rekindle_core::config::NodeConfig;
use rekindle_dataset::{DatasetError, Ready, Tuning, Verification, acquire};
use tempfile::TempDir;

struct Server {
    process: Child,
    folder: TempDir,
    endpoint: String,
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

impl Server {
    fn start() -> Self {
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir_all(folder.path().join("s3/models/m/deep")).unwrap();
        fs::write(folder.path().join("s3/models/m/deep/a"), bytes()).unwrap();
        fs::write(folder.path().join("s3/models/m/empty"), b"").unwrap();
        let mut process = Command::new(env!("CARGO_BIN_EXE_rekindle-s3server"))
            .arg("--root")
            .arg(folder.path().join("s3"))
            .args(["--access-key", "key", "--secret-key", "secret"])
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        let stdout = process.stdout.take().unwrap();
        BufReader::new(stdout).read_line(&mut line).unwrap();
        let ready: serde_json::Value = serde_json::from_str(&line).unwrap();
        let endpoint = ready["endpoint"].as_str().unwrap().to_owned();
        let ca = folder.path().join("s3/.tls/ca.pem");
        assert_eq!(ready["ca"].as_str().unwrap(), ca.to_str().unwrap());
        Self {
            process,
            folder,
            endpoint,
        }
    }

    /// Acquires `s3://models/m/` with this secret and these lines in the source.
    async fn acquire(&self, secret: &str, extra: &str) -> Result<Ready, DatasetError> {
        let root = self.folder.path();
        let credentials = root.join("credentials");
        let keys = format!("[default]\naws_access_key_id=key\naws_secret_access_key={secret}\n");
        fs::write(&credentials, keys).unwrap();
        let text = format!(
            "[datasets]\nroot = {:?}\npart-size-mib = 1\n[[datasets.source]]\nallow = \"s3://models/\"\n\
             namespaces = [\"*\"]\nendpoint = {:?}\nregion = \"us-east-1\"\n{extra}\n",
            root.join("cache"),
            self.endpoint
        )
        .replace("CREDENTIALS", credentials.to_str().unwrap())
        .replace("FOLDER", root.to_str().unwrap());
        let config = NodeConfig::parse("test", &text).unwrap();
        let uri = "s3://models/m/".parse().unwrap();
        let namespace = "default".parse().unwrap();
        acquire(&config, &uri, &namespace, Tuning::default(), &|_| {}).await
    }
}

fn bytes() -> Vec<u8> {
    (0..3_000_000_u32).map(|i| (i ^ (i >> 9)) as u8).collect()
}

const SOUND: &str = "ca-file = \"FOLDER/s3/.tls/ca.pem\"\ncredentials-file = \"CREDENTIALS\"";

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn signed_encrypted_and_verified() {
    let server = Server::start();
    let ready = server.acquire("secret", SOUND).await.unwrap();
    assert!(fs::read(ready.path.join("deep/a")).unwrap() == bytes());
    assert_eq!((ready.files, ready.hit), (2, false));
    assert_eq!(ready.verified, Verification::StoreChecksum);
    assert!(server.acquire("secret", SOUND).await.unwrap().hit);
    let error = server.acquire("wrong", SOUND).await.unwrap_err();
    assert!(
        matches!(error, DatasetError::Denied { .. }),
        "a hit needs the right to it: {error}"
    );
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_wrong_with_a_source_is_said_at_once() {
    let server = Server::start();
    fs::write(server.folder.path().join("not.pem"), "nothing").unwrap();
    let broken = "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n";
    fs::write(server.folder.path().join("broken.pem"), broken).unwrap();
    let started = Instant::now();
    for (extra, words) in [
        ("credentials-file = \"CREDENTIALS\"", "UnknownIssuer"),
        ("ca-file = \"FOLDER/none.pem\"", "none.pem: No such file"),
        (
            "ca-file = \"FOLDER/not.pem\"",
            "not.pem: there is no certificate",
        ),
        ("ca-file = \"FOLDER/broken.pem\"", "broken.pem: "),
        (
            "ca-file = \"FOLDER/s3/.tls/ca.pem\"\ncredentials-file = \"/none\"",
            "/none: No such file",
        ),
        (
            "ca-file = \"FOLDER/s3/.tls/ca.pem\"\ncredentials-file = \"CREDENTIALS\"\nprofile = \"x\"",
            "credential",
        ),
        (
            "ca-file = \"FOLDER/s3/.tls/ca.pem\"\nanonymous = true",
            "403",
        ),
    ] {
        let error = server.acquire("secret", extra).await.unwrap_err();
        assert!(error.to_string().contains(words), "{extra}: {error}");
        assert!(!error.is_retryable(), "{extra}: {error}");
    }
    // Retried, one of them alone would take a minute.
    assert!(started.elapsed() < Duration::from_secs(30));
}
