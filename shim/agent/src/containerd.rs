//! What the CLI asks containerd: which container is meant, what image it runs, and the checkpoint.

use std::{collections::BTreeMap, path::Path, time::Duration};

use anyhow::Context as _;
use containerd_client::{
    services::v1::{
        CheckpointTaskRequest, GetContainerRequest, GetImageRequest, ListContainersRequest,
        ListTasksRequest, PauseTaskRequest, ResumeTaskRequest, containers_client::ContainersClient,
        images_client::ImagesClient, tasks_client::TasksClient, version_client::VersionClient,
    },
    tonic::{Code, Request, Status, metadata::MetadataValue, transport::Channel},
    types::v1::Status as TaskStatus,
};
use prost::{Message as _, Name as _};
use prost_types::Any;

use crate::exit::Failure;

mod make;
pub(crate) mod select;
pub(crate) mod shim;

use select::{Container, State};

/// Where containerd listens unless it was told otherwise.
pub(crate) const ADDRESS: &str = "/run/containerd/containerd.sock";

/// Where a container is looked for when no namespace was named: Kubernetes' first, then ctr's.
const NAMESPACES: [&str; 2] = ["k8s.io", "default"];

/// How much later than here a deadline ends at the shim.
const GRACE: Duration = Duration::from_secs(5);

/// `containerd.runc.v1.CheckpointOptions`; fields 6 (empty namespaces), 7 (cgroups mode) and 10
/// (parent image) are never set here.
#[derive(Clone, PartialEq, prost::Message)]
pub(crate) struct CheckpointOptions {
    #[prost(bool, tag = "1")]
    pub(crate) exit: bool,
    #[prost(bool, tag = "2")]
    pub(crate) open_tcp: bool,
    #[prost(bool, tag = "3")]
    pub(crate) external_unix_sockets: bool,
    #[prost(bool, tag = "4")]
    pub(crate) terminal: bool,
    #[prost(bool, tag = "5")]
    pub(crate) file_locks: bool,
    #[prost(string, tag = "8")]
    pub(crate) image_path: String,
    #[prost(string, tag = "9")]
    pub(crate) work_path: String,
}

impl prost::Name for CheckpointOptions {
    const PACKAGE: &'static str = "containerd.runc.v1";
    const NAME: &'static str = "CheckpointOptions";
}

impl CheckpointOptions {
    /// containerd looks the type up by what follows the last slash of the URL, and shims compare the
    /// whole of it with the bare name, which is what Go clients send. So: the bare name.
    fn to_any(&self) -> Any {
        Any {
            type_url: Self::full_name(),
            value: self.encode_to_vec(),
        }
    }
}

/// A connection to containerd.
#[derive(Debug, Clone)]
pub(crate) struct Containerd {
    channel: Channel,
}

impl Containerd {
    pub(crate) async fn connect(address: &Path) -> anyhow::Result<Self> {
        let channel = containerd_client::connect(address).await.with_context(|| {
            format!(
                "connecting to containerd at {}: is it running, and is this its socket?",
                address.display()
            )
        })?;
        Ok(Self { channel })
    }

    pub(crate) async fn version(&self) -> anyhow::Result<String> {
        let answer = VersionClient::new(self.channel.clone())
            .version(())
            .await
            .map_err(|status| failure("asking containerd for its version", &status))?;
        Ok(answer.into_inner().version)
    }

    /// The containers of a namespace, with the state of their tasks.
    pub(crate) async fn containers(&self, namespace: &str) -> anyhow::Result<Vec<Container>> {
        let doing = |what: &str| format!("listing the {what} of containerd namespace {namespace}");
        let mut tasks: BTreeMap<String, State> = TasksClient::new(self.channel.clone())
            .list(within(namespace, ListTasksRequest::default())?)
            .await
            .map_err(|status| failure(&doing("tasks"), &status))?
            .into_inner()
            .tasks
            .into_iter()
            .map(|task| {
                let state = State {
                    alive: matches!(task.status(), TaskStatus::Running | TaskStatus::Paused),
                    paused: task.status() == TaskStatus::Paused,
                    word: task.status().as_str_name().to_lowercase(),
                    terminal: task.terminal,
                    pid: task.pid,
                };
                (task.id, state)
            })
            .collect();
        let containers = ContainersClient::new(self.channel.clone())
            .list(within(namespace, ListContainersRequest::default())?)
            .await
            .map_err(|status| failure(&doing("containers"), &status))?
            .into_inner()
            .containers;
        Ok(containers
            .into_iter()
            .map(|container| Container {
                namespace: namespace.to_owned(),
                state: tasks.remove(&container.id).unwrap_or_default(),
                id: container.id,
                image: container.image,
                labels: container.labels.into_iter().collect(),
            })
            .collect())
    }

    /// The living container that a person means, of a namespace or of those where one would be; `doing` is what is to be
    /// done with it.
    pub(crate) async fn find(
        &self,
        query: &str,
        namespace: Option<&str>,
        doing: &str,
    ) -> anyhow::Result<Container> {
        let searched = match namespace {
            Some(namespace) => vec![namespace],
            None => NAMESPACES.to_vec(),
        };
        let mut containers = Vec::new();
        for namespace in &searched {
            containers.extend(self.containers(namespace).await?);
        }
        Ok(select::select(query, doing, &searched, containers)?)
    }

    /// One container by its full id; its state is not asked for.
    pub(crate) async fn container(&self, namespace: &str, id: &str) -> anyhow::Result<Container> {
        let request = GetContainerRequest { id: id.to_owned() };
        let container = ContainersClient::new(self.channel.clone())
            .get(within(namespace, request)?)
            .await
            .map_err(|status| failure(&format!("looking up container {namespace}/{id}"), &status))?
            .into_inner()
            .container
            .unwrap_or_default();
        Ok(Container {
            namespace: namespace.to_owned(),
            id: container.id,
            image: container.image,
            labels: container.labels.into_iter().collect(),
            state: State::default(),
        })
    }

    /// The digest that an image's name points at now; none for a container made without an image.
    pub(crate) async fn image_digest(
        &self,
        namespace: &str,
        name: &str,
    ) -> anyhow::Result<Option<String>> {
        if name.is_empty() {
            return Ok(None);
        }
        let request = GetImageRequest {
            name: name.to_owned(),
        };
        let image = ImagesClient::new(self.channel.clone())
            .get(within(namespace, request)?)
            .await
            .map_err(|status| failure(&format!("looking up image {namespace}/{name}"), &status))?
            .into_inner()
            .image;
        Ok(image
            .and_then(|image| image.target)
            .map(|target| target.digest))
    }

    /// Has all of its processes stand still.
    pub(crate) async fn pause(&self, container: &Container) -> anyhow::Result<()> {
        let request = PauseTaskRequest {
            container_id: container.id.clone(),
        };
        let mut tasks = TasksClient::new(self.channel.clone());
        let paused = tasks.pause(within(&container.namespace, request)?).await;
        let doing = || format!("suspending container {}", container.id);
        paused.map_err(|status| failure(&doing(), &status))?;
        Ok(())
    }

    /// Has them go on.
    pub(crate) async fn resume(&self, container: &Container) -> anyhow::Result<()> {
        let request = ResumeTaskRequest {
            container_id: container.id.clone(),
        };
        let mut tasks = TasksClient::new(self.channel.clone());
        let resumed = tasks.resume(within(&container.namespace, request)?).await;
        let doing = || format!("resuming container {}", container.id);
        resumed.map_err(|status| failure(&doing(), &status))?;
        Ok(())
    }

    /// Asks for a checkpoint. Only the shim's own words come back when it refuses.
    pub(crate) async fn checkpoint(
        &self,
        container: &Container,
        options: &CheckpointOptions,
        timeout: Duration,
    ) -> anyhow::Result<()> {
        let request = CheckpointTaskRequest {
            container_id: container.id.clone(),
            parent_checkpoint: String::new(),
            options: Some(options.to_any()),
        };
        let mut request = within(&container.namespace, request)?;
        // containerd hands this on to the shim. Ours comes first: the client's own words for a call that
        // took too long are "transport error". A call that is dropped is taken back.
        request.set_timeout(timeout + GRACE);
        let mut tasks = TasksClient::new(self.channel.clone());
        match tokio::time::timeout(timeout, tasks.checkpoint(request)).await {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(status)) => Err(classified(status.code(), sentence(&status).to_owned())),
            Err(_) => Err(anyhow::anyhow!(
                "checkpoint of container {}: not done within {timeout:?} (--timeout, or deadlines.checkpoint of the configuration); it was given up, and no image is made",
                container.id
            )),
        }
    }
}

fn within<T>(namespace: &str, message: T) -> anyhow::Result<Request<T>> {
    let value = MetadataValue::try_from(namespace)
        .with_context(|| format!("containerd namespace {namespace:?}: not a namespace"))?;
    let mut request = Request::new(message);
    request.metadata_mut().insert("containerd-namespace", value);
    Ok(request)
}

fn failure(doing: &str, status: &Status) -> anyhow::Error {
    classified(status.code(), format!("{doing}: {}", sentence(status)))
}

fn classified(code: Code, words: String) -> anyhow::Error {
    match code {
        Code::NotFound => Failure::NotFound(words).into(),
        Code::FailedPrecondition
        | Code::InvalidArgument
        | Code::PermissionDenied
        | Code::Unimplemented => Failure::Refused(words).into(),
        _ => anyhow::anyhow!(words),
    }
}

/// containerd closes a shim's sentence with the name of the error's class; the exit code says that.
fn sentence(status: &Status) -> &str {
    const CLASSES: [&str; 7] = [
        ": failed precondition",
        ": invalid argument",
        ": permission denied",
        ": not implemented",
        ": not found",
        ": internal",
        ": unknown",
    ];
    let message = status.message();
    CLASSES
        .iter()
        .find_map(|class| message.strip_suffix(class))
        .unwrap_or(message)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_are_what_go_clients_send() {
        let options = CheckpointOptions {
            exit: true,
            file_locks: true,
            image_path: "/i".into(),
            ..CheckpointOptions::default()
        };
        let any = options.to_any();
        assert_eq!(any.type_url, "containerd.runc.v1.CheckpointOptions");
        // Field 1 = true, field 5 = true, field 8 = "/i", as protoc encodes them.
        assert_eq!(any.value, [0x08, 1, 0x28, 1, 0x42, 2, b'/', b'i']);
    }

    #[test]
    fn a_shims_sentence_comes_back_as_it_is() {
        let status = Status::failed_precondition("pid 7 holds /dev/nvidia0: failed precondition");
        assert_eq!(sentence(&status), "pid 7 holds /dev/nvidia0");
        assert_eq!(sentence(&Status::unknown("plain")), "plain");
    }
}
