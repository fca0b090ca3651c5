//! The cluster that this node is of: what its apiserver says of a pod of the node.
//!
//! It is asked as the kubelet asks, and with what the kubelet asks with: a node may read its own pods, one by name, and
//! watch those that it selects by its own name.

use std::{path::Path, time::Duration};

use anyhow::Context as _;
use futures::{Stream, StreamExt as _};
use k8s_openapi::api::core::v1::Pod;
use kube::{
    Api, Client, Config,
    api::{WatchEvent, WatchParams},
    config::{KubeConfigOptions, Kubeconfig},
    core::Status,
};
use tokio::time::{sleep, timeout};

/// What one answer may take.
const ANSWER: Duration = Duration::from_secs(10);
/// How long the apiserver is to keep a watch: whoever reads knows after that and [`ANSWER`] that a connection is dead.
const WATCH: Duration = Duration::from_secs(60);
/// Before the first and the last of the tries to ask again.
const PAUSES: (Duration, Duration) = (Duration::from_millis(500), Duration::from_secs(15));
/// So many refusals in a row are final. The first may come from an apiserver that does not know yet that the pod is this
/// node's, or of a certificate that is just replaced.
const REFUSALS: u32 = 3;
/// Where the kubelet writes on a static pod's copy in the apiserver, which has a uid of its own, that of the pod.
const STATIC_UID: &str = "kubernetes.io/config.hash";

/// A container of a pod, as CRI knows it.
#[derive(Debug, Clone)]
pub(crate) struct PodContainer {
    pub(crate) namespace: String,
    pub(crate) pod: String,
    /// A pod of the same name may come after it.
    pub(crate) uid: String,
    /// Its id, which is another one after a restart.
    pub(crate) id: String,
}

/// What the apiserver has of it.
#[derive(Debug, PartialEq, Eq)]
enum Seen {
    Ready,
    NotYet,
    /// It does not become ready any more.
    Gone(&'static str),
}

/// Why a container is not ready.
#[derive(Debug)]
enum NotReady {
    /// It cannot become so any more.
    Never(anyhow::Error),
    /// It was not until the watch ended.
    NotYet,
    /// The apiserver does not want to say.
    Refused(anyhow::Error),
    /// It could not be asked.
    Unknown(anyhow::Error),
}

/// A client with what is in `kubeconfig`, read now: certificates and tokens are replaced while the node runs.
pub(crate) async fn client(kubeconfig: &Path) -> anyhow::Result<(Client, String)> {
    let doing = || format!("reading the kubeconfig {}", kubeconfig.display());
    // Whose own error says so twice.
    std::fs::metadata(kubeconfig).with_context(doing)?;
    let read = Kubeconfig::read_from(kubeconfig).with_context(doing)?;
    let mut config = Config::from_custom_kubeconfig(read, &KubeConfigOptions::default())
        .await
        .with_context(doing)?;
    config.connect_timeout = Some(ANSWER);
    config.read_timeout = Some(WATCH + ANSWER);
    // Whoever asks tries again, with what is in the kubeconfig then.
    config.default_retry = false;
    let server = config.cluster_url.to_string();
    Ok((Client::try_from(config).with_context(doing)?, server))
}

/// Which version the apiserver is of, and where.
pub(crate) async fn version(kubeconfig: &Path) -> anyhow::Result<String> {
    let (client, server) = client(kubeconfig).await?;
    let asking = format!("asking the apiserver {server} for its version");
    let version = client.apiserver_version().await;
    let version = version.map_err(|error| words(error, &asking).0)?;
    Ok(format!("version {} at {server}", version.git_version))
}

/// Waits until `container` is ready in the apiserver's eyes, for as long as that can come; `why` has what it waits for.
///
/// # Errors
/// The pod or the container is gone, or the apiserver refuses to tell of it.
pub(crate) async fn until_ready(
    kubeconfig: &Path,
    container: &PodContainer,
    why: &mut String,
) -> anyhow::Result<()> {
    let mut pause = PAUSES.0;
    let mut refusals = 0;
    loop {
        match look(kubeconfig, container, why).await {
            Ok(()) => return Ok(()),
            Err(NotReady::Never(error)) => return Err(error),
            Err(NotReady::NotYet) => (pause, refusals) = (PAUSES.0, 0),
            Err(NotReady::Refused(error)) => {
                refusals += 1;
                if refusals == REFUSALS {
                    return Err(error);
                }
                *why = format!("{error:#}");
            }
            Err(NotReady::Unknown(error)) => {
                tracing::debug!("{error:#}");
                *why = format!("{error:#}");
            }
        }
        sleep(pause).await;
        pause = (pause * 2).min(PAUSES.1);
    }
}

/// Asks for the pod, and watches it until the container is ready or the watch ends.
async fn look(
    kubeconfig: &Path,
    container: &PodContainer,
    why: &mut String,
) -> Result<(), NotReady> {
    let (client, server) = client(kubeconfig).await.map_err(NotReady::Unknown)?;
    let (namespace, name) = (&container.namespace, &container.pod);
    let asking = format!(
        "asking the apiserver {server} for pod {namespace}/{name}, with {}",
        kubeconfig.display()
    );
    let failed = |error| failure(error, &asking);
    let pods: Api<Pod> = Api::namespaced(client, namespace);
    let late = |_| NotReady::Unknown(anyhow::anyhow!("{asking}: no answer within {ANSWER:?}"));
    let found = timeout(ANSWER, pods.get_opt(name)).await.map_err(late)?;
    let Some(pod) = found.map_err(failed)? else {
        return Err(never(container, "the apiserver has no such pod"));
    };
    let judge = |pod: &Pod| match container.seen(pod) {
        Seen::Ready => Some(Ok(())),
        Seen::NotYet => None,
        Seen::Gone(reason) => Some(Err(never(container, reason))),
    };
    if let Some(judged) = judge(&pod) {
        return judged;
    }
    *why = format!("pod {namespace}/{name} is there, and the container is not ready");
    let version = pod.metadata.resource_version.as_deref().unwrap_or("0");
    let watching = pods.watch(&container.selected(&pod), version).await;
    let events = watching.map_err(failed)?;
    watch(std::pin::pin!(events), judge, failed, || {
        never(container, "the pod was deleted")
    })
    .await
}

/// Goes by what a watch tells, until it says what is to be known or ends.
async fn watch(
    mut events: impl Stream<Item = kube::Result<WatchEvent<Pod>>> + Unpin,
    judge: impl Fn(&Pod) -> Option<Result<(), NotReady>>,
    failed: impl Fn(kube::Error) -> NotReady,
    deleted: impl Fn() -> NotReady,
) -> Result<(), NotReady> {
    while let Some(event) = events.next().await {
        match event.map_err(&failed)? {
            WatchEvent::Added(pod) | WatchEvent::Modified(pod) => {
                if let Some(judged) = judge(&pod) {
                    return judged;
                }
            }
            WatchEvent::Deleted(_) => return Err(deleted()),
            WatchEvent::Bookmark(_) => {}
            // What it was to begin with is forgotten; the pod is asked for anew.
            WatchEvent::Error(status) if status.code == 410 => return Err(NotReady::NotYet),
            WatchEvent::Error(status) => return Err(failed(kube::Error::Api(status))),
        }
    }
    Err(NotReady::NotYet)
}

impl PodContainer {
    /// The pod and no other one, in the words that a node is allowed.
    fn selected(&self, pod: &Pod) -> WatchParams {
        let node = pod.spec.as_ref().and_then(|spec| spec.node_name.as_deref());
        let node = node.unwrap_or_default();
        WatchParams::default()
            .fields(&format!("metadata.name={},spec.nodeName={node}", self.pod))
            .timeout(u32::try_from(WATCH.as_secs()).unwrap_or(u32::MAX))
    }

    fn seen(&self, pod: &Pod) -> Seen {
        let metadata = &pod.metadata;
        let of_static = metadata.annotations.as_ref();
        let uids = [
            metadata.uid.as_ref(),
            of_static.and_then(|all| all.get(STATIC_UID)),
        ];
        if !uids.contains(&Some(&self.uid)) {
            return Seen::Gone("another pod has its name");
        }
        let Some(status) = &pod.status else {
            return Seen::NotYet;
        };
        if matches!(status.phase.as_deref(), Some("Succeeded" | "Failed")) {
            return Seen::Gone("the pod has ended");
        }
        // One that is started before the others, and runs on beside them, is ready as they are.
        let all = [&status.container_statuses, &status.init_container_statuses];
        let is_ready = all.into_iter().flatten().flatten().any(|status| {
            let id = status.container_id.as_deref().unwrap_or_default();
            // `containerd://ID`
            let id = id.rsplit_once("://").map_or(id, |(_, id)| id);
            status.ready && id == self.id
        });
        if is_ready { Seen::Ready } else { Seen::NotYet }
    }
}

fn never(container: &PodContainer, reason: &str) -> NotReady {
    let PodContainer {
        namespace,
        pod,
        uid,
        ..
    } = container;
    NotReady::Never(anyhow::anyhow!("pod {namespace}/{pod} ({uid}): {reason}"))
}

fn failure(error: kube::Error, asking: &str) -> NotReady {
    match words(error, asking) {
        (said, Some(401 | 403)) => NotReady::Refused(said),
        (said, _) => NotReady::Unknown(said),
    }
}

/// A failure in the words of who has failed and not of the libraries between; and the apiserver's code for it.
fn words(error: kube::Error, asking: &str) -> (anyhow::Error, Option<u16>) {
    match error {
        kube::Error::Api(status) => {
            let Status { code, message, .. } = &*status;
            let said = anyhow::anyhow!("{asking}: it answers {code}: {message}");
            (said, Some(*code))
        }
        error => {
            let error = anyhow::Error::from(error);
            (anyhow::anyhow!("{asking}: {}", error.root_cause()), None)
        }
    }
}

#[cfg(test)]
mod tests;
