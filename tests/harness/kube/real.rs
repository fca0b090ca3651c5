//! A real apiserver with its etcd, as processes of the test.

use super::free;
use super::pki::Pki;
use crate::poll;
use anyhow::{Context, Result};
use std::fs::{self, File};
use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use tempfile::TempDir;
use tokio::process::{Child, Command};

/// Both, and what they keep.
#[derive(Debug)]
pub(super) struct Real {
    programs: PathBuf,
    folder: TempDir,
    address: SocketAddr,
    store: SocketAddr,
    _etcd: Child,
    apiserver: Option<Child>,
}

impl Real {
    pub(super) async fn start(programs: &Path, pki: &Pki, address: SocketAddr) -> Result<Real> {
        let folder = tempfile::tempdir()?;
        let pair = pki.server()?;
        for (name, text) in [
            ("ca.pem", pki.ca_pem.as_str()),
            ("server.pem", pair.certificate_pem.as_str()),
            ("server.key", pair.key_pem.as_str()),
        ] {
            fs::write(folder.path().join(name), text)?;
        }
        let store = free()?;
        let peers = format!("http://{}", free()?);
        let clients = format!("http://{store}");
        let etcd = Command::new(programs.join("etcd"))
            .arg("--data-dir")
            .arg(folder.path().join("etcd"))
            .args([
                "--listen-client-urls",
                &clients,
                "--advertise-client-urls",
                &clients,
            ])
            .args([
                "--listen-peer-urls",
                &peers,
                "--initial-advertise-peer-urls",
                &peers,
            ])
            .args(["--initial-cluster", &format!("default={peers}")])
            .stdout(Stdio::null())
            .stderr(File::create(folder.path().join("etcd.log"))?)
            .kill_on_drop(true)
            .spawn()
            .with_context(|| format!("starting etcd of {}", programs.display()))?;
        let mut this = Real {
            programs: programs.to_owned(),
            folder,
            address,
            store,
            _etcd: etcd,
            apiserver: None,
        };
        this.go_on().await?;
        Ok(this)
    }

    pub(super) async fn stop(&mut self) -> Result<()> {
        if let Some(mut apiserver) = self.apiserver.take() {
            apiserver.kill().await?;
        }
        Ok(())
    }

    pub(super) async fn go_on(&mut self) -> Result<()> {
        let file = |name: &str| self.folder.path().join(name);
        let log = fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(file("apiserver.log"))?;
        let apiserver = Command::new(self.programs.join("kube-apiserver"))
            .args(["--etcd-servers", &format!("http://{}", self.store)])
            .args([
                "--bind-address",
                "127.0.0.1",
                "--advertise-address",
                "127.0.0.1",
            ])
            .args(["--secure-port", &self.address.port().to_string()])
            .args(["--authorization-mode", "Node,RBAC"])
            // Of the accounts that another program would make.
            .args(["--disable-admission-plugins", "ServiceAccount"])
            .args(["--service-account-issuer", "https://kubernetes.default.svc"])
            .arg("--client-ca-file")
            .arg(file("ca.pem"))
            .arg("--tls-cert-file")
            .arg(file("server.pem"))
            .arg("--tls-private-key-file")
            .arg(file("server.key"))
            .arg("--service-account-key-file")
            .arg(file("server.pem"))
            .arg("--service-account-signing-key-file")
            .arg(file("server.key"))
            .arg("--cert-dir")
            .arg(self.folder.path())
            .stdout(Stdio::null())
            .stderr(log)
            .kill_on_drop(true)
            .spawn()
            .with_context(|| format!("starting kube-apiserver of {}", self.programs.display()))?;
        self.apiserver = Some(apiserver);
        let address = self.address;
        poll::until("the apiserver to listen", async || {
            Ok(TcpStream::connect(address).ok())
        })
        .await?;
        Ok(())
    }
}
