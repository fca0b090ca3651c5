//! Pods through CRI, as a kubelet would make them.
//!
//! What a kubelet lays beside a pod (its log folder, its `/etc/hosts`, a termination log for each container) lies on the
//! node here too, because all of it is bound into the containers and decides what a restore finds.

mod builder;
mod container;
mod log;

pub use builder::{ContainerBuilder, PodBuilder};
pub use container::{CriContainer, Output};
pub use log::Line;

use crate::{Node, Runtime, poll};
use anyhow::{Context, Result};
use k8s_cri::v1 as api;
use k8s_cri::v1::runtime_service_client::RuntimeServiceClient;
use std::fmt;
use tonic::transport::Channel;
use tonic::{Request, Status};

pub use api::ContainerState;

/// What the runtime service answers.
pub type Answer<T> = Result<T, Status>;

/// Longer than containerd waits for a stopped container to die, and than any restore has.
const DEADLINE: std::time::Duration = std::time::Duration::from_secs(120);

/// A connection to a node's runtime service. One per test, as with [`Node::containerd`].
#[derive(Debug, Clone)]
pub struct Cri<'n> {
    node: &'n Node,
    service: RuntimeServiceClient<Channel>,
}

/// A request that gives up in the end: a call that never returns must fail its test and not hang it.
fn ask<T>(message: T) -> Request<T> {
    let mut request = Request::new(message);
    request.set_timeout(DEADLINE);
    request
}

impl Node {
    /// Connects to its runtime service.
    pub async fn cri(&self) -> Result<Cri<'_>> {
        let client = self.containerd().await?;
        Ok(Cri {
            node: self,
            service: RuntimeServiceClient::new(client.channel()),
        })
    }
}

impl<'n> Cri<'n> {
    /// A pod to be described and run, under the runtime that the node is about.
    pub fn pod(&self, name: &str) -> PodBuilder<'n> {
        let handler = match self.node.runtime() {
            Runtime::Go => "runc",
            Runtime::Rekindle => "rekindle",
        };
        PodBuilder::new(self.clone(), name, handler)
    }

    /// The node.
    pub fn node(&self) -> &'n Node {
        self.node
    }

    fn service(&self) -> RuntimeServiceClient<Channel> {
        self.service.clone()
    }
}

/// A pod that runs. [`Pod::remove`] takes it away; left alone it goes with the node.
pub struct Pod<'n> {
    cri: Cri<'n>,
    id: String,
    config: api::PodSandboxConfig,
    address: String,
    socket: String,
}

impl fmt::Debug for Pod<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Pod")
            .field("id", &self.id)
            .finish_non_exhaustive()
    }
}

impl<'n> Pod<'n> {
    /// The id of its sandbox.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Its name.
    pub fn name(&self) -> &str {
        self.config
            .metadata
            .as_ref()
            .map_or("", |metadata| &metadata.name)
    }

    /// Its address.
    pub fn address(&self) -> &str {
        &self.address
    }

    /// The node it runs on.
    pub fn node(&self) -> &'n Node {
        self.cri.node
    }

    /// A container of it, to be described and created.
    pub fn container<'p>(&'p self, name: &str) -> ContainerBuilder<'p, 'n> {
        ContainerBuilder::new(self, name)
    }

    /// A folder on the node that lives as long as the pod: where an emptyDir called `name` lies.
    pub async fn empty_dir(&self, name: &str) -> Result<String> {
        let folder = format!("{}/volumes/{name}", self.folder());
        self.node().run(["mkdir", "-p", &folder]).await?;
        Ok(folder)
    }

    /// The state of its sandbox.
    pub async fn state(&self) -> Answer<api::PodSandboxState> {
        let request = api::PodSandboxStatusRequest {
            pod_sandbox_id: self.id.clone(),
            verbose: false,
        };
        let answer = self.cri.service().pod_sandbox_status(ask(request)).await?;
        let status = answer.into_inner().status;
        Ok(status
            .ok_or_else(|| Status::internal("no status in the answer"))?
            .state())
    }

    /// The ids of its containers that exist, whatever their state.
    pub async fn containers(&self) -> Answer<Vec<String>> {
        let filter = api::ContainerFilter {
            pod_sandbox_id: self.id.clone(),
            ..Default::default()
        };
        let request = api::ListContainersRequest {
            filter: Some(filter),
        };
        let answer = self.cri.service().list_containers(ask(request)).await?;
        let containers = answer.into_inner().containers;
        Ok(containers
            .into_iter()
            .map(|container| container.id)
            .collect())
    }

    /// Ends its containers and its sandbox.
    pub async fn stop(&self) -> Answer<()> {
        let request = api::StopPodSandboxRequest {
            pod_sandbox_id: self.id.clone(),
        };
        self.cri
            .service()
            .stop_pod_sandbox(ask(request))
            .await
            .map(drop)
    }

    /// Ends it and removes it with its containers; then waits until nothing of them is on the node.
    pub async fn remove(self) -> Result<()> {
        let mut ids = self.containers().await?;
        ids.push(self.id.clone());
        self.stop().await?;
        let request = api::RemovePodSandboxRequest {
            pod_sandbox_id: self.id.clone(),
        };
        self.cri.service().remove_pod_sandbox(ask(request)).await?;
        for id in &ids {
            self.node().is_rid_of(id).await?;
        }
        poll::until("the shim's socket to go", async || {
            Ok((!self.node().path(&self.socket).exists()).then_some(()))
        })
        .await
        .with_context(|| format!("{} of pod {}", self.socket, self.name()))?;
        // What the kubelet made, the kubelet removes.
        self.node()
            .run(["rm", "-rf", &self.folder(), &self.config.log_directory])
            .await?;
        Ok(())
    }

    fn folder(&self) -> String {
        folder_of(&self.config)
    }
}

/// Where the kubelet keeps what it binds into a pod's containers.
fn folder_of(config: &api::PodSandboxConfig) -> String {
    let uid = config
        .metadata
        .as_ref()
        .map_or("", |metadata| &metadata.uid);
    format!("/var/lib/kubelet/pods/{uid}")
}
