//! From a description to a running pod, and to a container of it.

use super::{Answer, Cri, CriContainer, Pod, ask, folder_of};
use anyhow::{Context, Result};
use k8s_cri::v1 as api;
use std::collections::HashMap;

/// A pod that is being described.
#[derive(Debug)]
pub struct PodBuilder<'n> {
    cri: Cri<'n>,
    handler: String,
    config: api::PodSandboxConfig,
}

impl<'n> PodBuilder<'n> {
    pub(super) fn new(cri: Cri<'n>, name: &str, handler: &str) -> PodBuilder<'n> {
        PodBuilder {
            cri,
            handler: handler.to_owned(),
            config: config(name),
        }
    }

    /// Its namespace, where it is not `default`.
    pub fn namespace(mut self, namespace: &str) -> Self {
        if let Some(metadata) = &mut self.config.metadata {
            namespace.clone_into(&mut metadata.namespace);
        }
        self
    }

    /// Its uid, where it is not one of its own.
    pub fn uid(mut self, uid: &str) -> Self {
        if let Some(metadata) = &mut self.config.metadata {
            uid.clone_into(&mut metadata.uid);
        }
        self
    }

    /// One more annotation.
    pub fn annotation(mut self, key: &str, value: &str) -> Self {
        self.config
            .annotations
            .insert(key.to_owned(), value.to_owned());
        self
    }

    /// The runtime class's handler, where it is not the node's.
    pub fn handler(mut self, handler: &str) -> Self {
        handler.clone_into(&mut self.handler);
        self
    }

    /// Lets its containers share one PID namespace (`shareProcessNamespace`).
    pub fn shared_pids(mut self) -> Self {
        if let Some(options) = self.namespaces() {
            options.pid = api::NamespaceMode::Pod as i32;
        }
        self
    }

    /// Lets it share the node's IPC namespace (`hostIPC`).
    pub fn host_ipc(mut self) -> Self {
        if let Some(options) = self.namespaces() {
            options.ipc = api::NamespaceMode::Node as i32;
        }
        self
    }

    /// Gives it a user namespace of its own (`hostUsers: false`).
    pub fn own_users(mut self) -> Self {
        let mapping = api::IdMapping {
            host_id: 200_000,
            container_id: 0,
            length: 65536,
        };
        if let Some(options) = self.namespaces() {
            options.userns_options = Some(api::UserNamespace {
                mode: api::NamespaceMode::Pod as i32,
                uids: vec![mapping],
                gids: vec![mapping],
            });
        }
        self
    }

    /// Allows privileged containers in it.
    pub fn privileged(mut self) -> Self {
        if let Some(security) = self
            .config
            .linux
            .as_mut()
            .and_then(|linux| linux.security_context.as_mut())
        {
            security.privileged = true;
        }
        self
    }

    fn namespaces(&mut self) -> Option<&mut api::NamespaceOption> {
        self.config
            .linux
            .as_mut()?
            .security_context
            .as_mut()?
            .namespace_options
            .as_mut()
    }

    /// Runs its sandbox.
    pub async fn run(self) -> Result<Pod<'n>> {
        let name = self.config.hostname.clone();
        self.try_run()
            .await?
            .with_context(|| format!("running the sandbox of pod {name}"))
    }

    /// [`PodBuilder::run`], with the runtime's answer on its own, for tests of refusals; a refused one has left nothing.
    pub async fn try_run(mut self) -> Result<Answer<Pod<'n>>> {
        let node = self.cri.node;
        if let Some(metadata) = &mut self.config.metadata {
            if metadata.uid.is_empty() {
                // As unique as the apiserver's: a pod of a repeated name is another pod.
                let uid = std::fs::read_to_string("/proc/sys/kernel/random/uuid")?;
                uid.trim().clone_into(&mut metadata.uid);
            }
            self.config.log_directory = format!(
                "/var/log/pods/{}_{}_{}",
                metadata.namespace, metadata.name, metadata.uid
            );
            let labels = [
                ("io.kubernetes.pod.name", &metadata.name),
                ("io.kubernetes.pod.namespace", &metadata.namespace),
                ("io.kubernetes.pod.uid", &metadata.uid),
            ];
            self.config.labels = labels
                .map(|(key, value)| (key.to_owned(), value.clone()))
                .into();
            if let Some(linux) = &mut self.config.linux {
                linux.cgroup_parent = node.cgroup_parent(&metadata.uid);
            }
        }
        let folder = folder_of(&self.config);
        node.run(["mkdir", "-p", &self.config.log_directory, &folder])
            .await?;
        let request = api::RunPodSandboxRequest {
            config: Some(self.config.clone()),
            runtime_handler: self.handler,
        };
        let id = match self.cri.service().run_pod_sandbox(ask(request)).await {
            Ok(answer) => answer.into_inner().pod_sandbox_id,
            Err(refused) => {
                let uid = self
                    .config
                    .metadata
                    .as_ref()
                    .map_or("", |metadata| &metadata.uid);
                node.is_rid_of_pod(uid).await?;
                return Ok(Err(refused));
            }
        };
        let request = api::PodSandboxStatusRequest {
            pod_sandbox_id: id.clone(),
            verbose: false,
        };
        let status = self
            .cri
            .service()
            .pod_sandbox_status(ask(request))
            .await?
            .into_inner()
            .status;
        let address = status
            .and_then(|status| status.network)
            .context("the pod has no network")?
            .ip;
        let hosts = format!(
            "127.0.0.1\tlocalhost\n{address}\t{}\n",
            self.config.hostname
        );
        std::fs::write(node.path(format!("{folder}/etc-hosts")), hosts)?;
        let socket = node.shim_socket(&id).await?;
        Ok(Ok(Pod {
            cri: self.cri,
            socket,
            id,
            config: self.config,
            address,
        }))
    }
}

fn config(name: &str) -> api::PodSandboxConfig {
    let security_context = api::LinuxSandboxSecurityContext {
        namespace_options: Some(api::NamespaceOption {
            pid: api::NamespaceMode::Container as i32,
            ..Default::default()
        }),
        ..Default::default()
    };
    api::PodSandboxConfig {
        metadata: Some(api::PodSandboxMetadata {
            name: name.to_owned(),
            namespace: "default".into(),
            ..Default::default()
        }),
        hostname: name.to_owned(),
        dns_config: Some(api::DnsConfig {
            servers: vec!["10.96.0.10".into()],
            ..Default::default()
        }),
        linux: Some(api::LinuxPodSandboxConfig {
            security_context: Some(security_context),
            ..Default::default()
        }),
        ..Default::default()
    }
}

/// A container that is being described.
#[derive(Debug)]
pub struct ContainerBuilder<'p, 'n> {
    pod: &'p Pod<'n>,
    config: api::ContainerConfig,
}

impl<'p, 'n> ContainerBuilder<'p, 'n> {
    pub(super) fn new(pod: &'p Pod<'n>, name: &str) -> ContainerBuilder<'p, 'n> {
        let security = api::LinuxContainerSecurityContext {
            namespace_options: pod
                .config
                .linux
                .as_ref()
                .and_then(|linux| linux.security_context.as_ref())
                .and_then(|security| security.namespace_options.clone()),
            masked_paths: ["/proc/kcore", "/proc/keys", "/sys/firmware"]
                .map(str::to_owned)
                .into(),
            readonly_paths: ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys"]
                .map(str::to_owned)
                .into(),
            ..Default::default()
        };
        let config = api::ContainerConfig {
            metadata: Some(api::ContainerMetadata {
                name: name.to_owned(),
                attempt: 0,
            }),
            image: Some(api::ImageSpec {
                image: "localhost/busybox:test".into(),
                ..Default::default()
            }),
            labels: pod.config.labels.clone(),
            linux: Some(api::LinuxContainerConfig {
                resources: Some(api::LinuxContainerResources {
                    cpu_shares: 2,
                    oom_score_adj: 1000,
                    ..Default::default()
                }),
                security_context: Some(security),
            }),
            ..Default::default()
        };
        ContainerBuilder { pod, config }
    }

    /// One more annotation, of this container alone.
    pub fn annotation(mut self, key: &str, value: &str) -> Self {
        self.config
            .annotations
            .insert(key.to_owned(), value.to_owned());
        self
    }

    /// What it is made of: another image, or a checkpoint archive on the node.
    pub fn image(mut self, image: &str) -> Self {
        if let Some(spec) = &mut self.config.image {
            image.clone_into(&mut spec.image);
        }
        self
    }

    /// What it runs.
    pub fn args(mut self, args: &[&str]) -> Self {
        self.config.command = args.iter().map(|&arg| arg.to_owned()).collect();
        self
    }

    /// A shell line for it to run.
    pub fn shell(self, line: &str) -> Self {
        self.args(&["sh", "-c", line])
    }

    /// One more variable.
    pub fn env(mut self, key: &str, value: &str) -> Self {
        self.config.envs.push(api::KeyValue {
            key: key.to_owned(),
            value: value.to_owned(),
        });
        self
    }

    /// Binds a folder or file of the node into it.
    pub fn bind(mut self, from: &str, to: &str, writable: bool) -> Self {
        self.config.mounts.push(api::Mount {
            host_path: from.to_owned(),
            container_path: to.to_owned(),
            readonly: !writable,
            ..Default::default()
        });
        self
    }

    /// As whom it runs.
    pub fn user(mut self, uid: i64) -> Self {
        if let Some(security) = self.security() {
            security.run_as_user = Some(api::Int64Value { value: uid });
        }
        self
    }

    /// Makes it privileged; the pod must allow that.
    pub fn privileged(mut self) -> Self {
        if let Some(security) = self.security() {
            security.privileged = true;
        }
        self
    }

    /// Gives it a terminal.
    pub fn terminal(mut self) -> Self {
        self.config.tty = true;
        self
    }

    /// Limits its memory.
    pub fn memory_limit(mut self, bytes: i64) -> Self {
        if let Some(resources) = self
            .config
            .linux
            .as_mut()
            .and_then(|linux| linux.resources.as_mut())
        {
            resources.memory_limit_in_bytes = bytes;
        }
        self
    }

    /// How often a container of this name was there before: the next one after a restart has 1.
    pub fn attempt(mut self, attempt: u32) -> Self {
        if let Some(metadata) = &mut self.config.metadata {
            metadata.attempt = attempt;
        }
        self
    }

    fn security(&mut self) -> Option<&mut api::LinuxContainerSecurityContext> {
        self.config.linux.as_mut()?.security_context.as_mut()
    }

    /// Creates it.
    pub async fn create(self) -> Result<CriContainer<'p, 'n>> {
        let name = self.name();
        self.try_create()
            .await?
            .with_context(|| format!("creating container {name}"))
    }

    /// [`ContainerBuilder::create`], with the runtime's answer on its own, for tests of refusals.
    pub async fn try_create(mut self) -> Result<Answer<CriContainer<'p, 'n>>> {
        let (pod, name) = (self.pod, self.name());
        let attempt = self
            .config
            .metadata
            .as_ref()
            .map_or(0, |metadata| metadata.attempt);
        self.config.log_path = format!("{name}/{attempt}.log");
        self.config.labels.extend(HashMap::from([(
            "io.kubernetes.container.name".to_owned(),
            name.clone(),
        )]));
        let termination = format!("{}/containers/{name}/{attempt}", pod.folder());
        let make = format!(
            "mkdir -p '{log}/{name}' '{folder}/containers/{name}' && : > '{termination}'",
            log = pod.config.log_directory,
            folder = pod.folder(),
        );
        pod.node().run(["sh", "-c", &make]).await?;
        let this = self
            .bind(&format!("{}/etc-hosts", pod.folder()), "/etc/hosts", true)
            .bind(&termination, "/dev/termination-log", true);
        let log = format!("{}/{}", pod.config.log_directory, this.config.log_path);
        let request = api::CreateContainerRequest {
            pod_sandbox_id: pod.id.clone(),
            config: Some(this.config),
            sandbox_config: Some(pod.config.clone()),
        };
        let answer = pod.cri.service().create_container(ask(request)).await;
        Ok(answer.map(|answer| {
            CriContainer::new(pod, answer.into_inner().container_id, log, termination)
        }))
    }

    /// Creates and starts it.
    pub async fn run(self) -> Result<CriContainer<'p, 'n>> {
        let name = self.name();
        let container = self.create().await?;
        container
            .start()
            .await
            .with_context(|| format!("starting container {name}"))?;
        Ok(container)
    }

    fn name(&self) -> String {
        self.config
            .metadata
            .as_ref()
            .map(|metadata| metadata.name.clone())
            .unwrap_or_default()
    }
}
