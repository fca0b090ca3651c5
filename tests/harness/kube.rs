//! An apiserver: a stand-in that speaks as much of the API as is asked of it here, over TLS with client certificates, and
//! lets a node read what a real one lets it read.
//!
//! Where `REKINDLE_KUBE` names a folder with `kube-apiserver` and `etcd` (`make test-kube`), it is these.

mod pki;
mod real;
mod stand_in;

use crate::poll;
use anyhow::{Context, Result};
use k8s_openapi::api::core::v1::{Namespace, Pod};
use kube::api::{Api, DeleteParams, Patch, PatchParams, PostParams};
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Client, Config};
use pki::Pki;
use real::Real;
use serde_json::json;
use stand_in::StandIn;
use std::net::{SocketAddr, TcpListener};
use std::path::PathBuf;

/// Who a kubeconfig is of.
#[derive(Debug, Clone, Copy)]
pub enum Who<'a> {
    /// Who may do anything.
    Admin,
    /// The kubelet of this node.
    Node(&'a str),
    /// Somebody with a token that nobody has given out.
    Nobody,
}

/// A running apiserver. Dropped, it ends.
#[derive(Debug)]
pub struct Apiserver {
    pki: Pki,
    address: SocketAddr,
    server: Server,
}

#[derive(Debug)]
enum Server {
    StandIn(StandIn),
    Real(Box<Real>),
}

impl Apiserver {
    /// One on the loopback of the host.
    pub async fn start() -> Result<Apiserver> {
        match std::env::var_os("REKINDLE_KUBE") {
            None => Self::stand_in(Vec::new()),
            Some(programs) => {
                let (pki, address) = (Pki::new()?, free()?);
                let real = Real::start(&PathBuf::from(programs), &pki, address).await?;
                let server = Server::Real(Box::new(real));
                Ok(Apiserver {
                    pki,
                    address,
                    server,
                })
            }
        }
    }

    /// A stand-in that is asked at these sockets, too.
    pub fn stand_in(also: Vec<TcpListener>) -> Result<Apiserver> {
        let (pki, address) = (Pki::new()?, free()?);
        let server = Server::StandIn(StandIn::start(&pki, address, also)?);
        Ok(Apiserver {
            pki,
            address,
            server,
        })
    }

    /// What `who` reaches it with.
    pub fn kubeconfig(&self, who: Who<'_>) -> Result<String> {
        self.kubeconfig_at(self.address, who)
    }

    /// The same at another of its sockets.
    pub fn kubeconfig_at(&self, address: SocketAddr, who: Who<'_>) -> Result<String> {
        let user = match who {
            Who::Admin => self.pki.user("admin", "system:masters")?,
            Who::Node(name) => self
                .pki
                .user(&format!("system:node:{name}"), "system:nodes")?,
            Who::Nobody => json!({"token": "no.such.token"}),
        };
        let cluster = json!({"server": format!("https://{address}"), "certificate-authority-data": self.pki.ca()});
        // JSON is YAML.
        Ok(json!({
            "apiVersion": "v1", "kind": "Config", "current-context": "test",
            "clusters": [{"name": "test", "cluster": cluster}],
            "users": [{"name": "test", "user": user}],
            "contexts": [{"name": "test", "context": {"cluster": "test", "user": "test"}}],
        })
        .to_string())
    }

    /// Waits until it can do what is asked of it: a real one makes its first namespaces and roles after it listens.
    async fn is_ready(&self) -> Result<()> {
        if matches!(self.server, Server::StandIn(_)) {
            return Ok(());
        }
        let client = self.client().await?;
        poll::until("the apiserver to be ready", async || {
            let readyz = hyper::Request::get("/readyz").body(Vec::new())?;
            client.request_text(readyz).await?;
            let namespaces: Api<Namespace> = Api::all(client.clone());
            Ok(namespaces.get_opt("default").await?.map(drop))
        })
        .await
    }

    /// The pods of a namespace, as who may do anything sees them.
    pub async fn pods(&self, namespace: &str) -> Result<Pods> {
        self.is_ready().await?;
        Ok(Pods(Api::namespaced(self.client().await?, namespace)))
    }

    async fn client(&self) -> Result<Client> {
        let kubeconfig = Kubeconfig::from_yaml(&self.kubeconfig(Who::Admin)?)?;
        let options = KubeConfigOptions::default();
        let config = Config::from_custom_kubeconfig(kubeconfig, &options).await?;
        Ok(Client::try_from(config)?)
    }

    /// Takes it away for a while: nobody listens, and who is connected is cut off. What it knows it knows again later.
    pub async fn stop(&mut self) -> Result<()> {
        match &mut self.server {
            Server::StandIn(server) => server.stop(),
            Server::Real(server) => server.stop().await,
        }
    }

    /// Has it back.
    pub async fn go_on(&mut self) -> Result<()> {
        match &mut self.server {
            Server::StandIn(server) => server.go_on(),
            Server::Real(server) => server.go_on().await,
        }
    }
}

/// A port of the loopback that is free now.
fn free() -> Result<SocketAddr> {
    Ok(TcpListener::bind("127.0.0.1:0")?.local_addr()?)
}

/// The pods of a namespace.
#[derive(Debug)]
pub struct Pods(Api<Pod>);

impl Pods {
    /// Makes a pod that is bound to a node; its uid.
    pub async fn create(&self, name: &str, node: &str) -> Result<String> {
        let pod = serde_json::from_value(json!({
            "metadata": {"name": name},
            "spec": {"nodeName": node, "containers": [{"name": "main", "image": "localhost/busybox:test"}]},
        }))?;
        let made = self.0.create(&PostParams::default(), &pod).await?;
        made.metadata.uid.context("it has no uid")
    }

    /// Says of one container of a pod whether it is ready, as its kubelet would; of no other one anything.
    pub async fn status(&self, name: &str, container: &str, id: &str, ready: bool) -> Result<()> {
        let status = json!({"phase": "Running", "containerStatuses": [{
            "name": container, "containerID": format!("containerd://{id}"), "ready": ready,
            "image": "localhost/busybox:test", "imageID": "", "restartCount": 0,
        }]});
        let patch = Patch::Merge(json!({"status": status}));
        self.0
            .patch_status(name, &PatchParams::default(), &patch)
            .await?;
        Ok(())
    }

    /// Deletes a pod at once.
    pub async fn delete(&self, name: &str) -> Result<()> {
        let at_once = DeleteParams {
            grace_period_seconds: Some(0),
            ..DeleteParams::default()
        };
        self.0.delete(name, &at_once).await?;
        Ok(())
    }
}
