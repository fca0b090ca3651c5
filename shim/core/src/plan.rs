//! What a container gets: the pod's words and the node's, brought together once.

use std::collections::BTreeMap;

use crate::{
    annotations::{
        AfterRestore, AnnotationError, CheckpointRequest, DatasetRequest, PodRequest, Policy,
        WarmRequest, WarmWhen,
    },
    config::NodeConfig,
    identity::{Identity, Role},
    name::{ImageName, NameError, Namespace},
    uri::DatasetUri,
};

/// The image a container starts from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RestorePlan {
    /// Whose image it is.
    pub namespace: Namespace,
    /// Which.
    pub name: ImageName,
    /// Which generation; none means the newest.
    pub generation: Option<u64>,
    /// What a missing or unfit image means.
    pub policy: Policy,
    /// Whether a host that differs from the image's is no reason to refuse it.
    pub force: bool,
}

/// What one container gets.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plan {
    /// Who it is.
    pub identity: Identity,
    /// For a sandbox: all of the pod's datasets, to be fetched. Otherwise: those that this container
    /// mounts.
    pub datasets: Vec<DatasetRequest>,
    /// The image it starts from, if any.
    pub restore: Option<RestorePlan>,
    /// For a sandbox: the image that a container of the pod will start from, to be fetched where it is not on the node.
    pub ahead: Option<RestorePlan>,
    /// Whether it starts from an image of its own kind in its own namespace, or makes one.
    pub warm: Option<WarmRequest>,
    /// What it is told after a restore.
    pub after_restore: Option<AfterRestore>,
    /// The images that are made of it while it runs, in its own namespace.
    pub checkpoint: Option<CheckpointRequest>,
}

/// Why a container gets nothing. Found before anything is touched.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PlanError {
    /// The pod's annotations are wrong.
    #[error(transparent)]
    Annotation(#[from] AnnotationError),
    /// The namespace cannot be one.
    #[error(transparent)]
    Namespace(#[from] NameError),
    /// No source of the node's configuration serves this dataset to this namespace.
    #[error("dataset {uri}: no source of {file} allows it for namespace {namespace}; add [[datasets.source]] with a matching allow and namespaces", file = crate::paths::CONFIG_FILE)]
    NotAllowed {
        /// The dataset.
        uri: DatasetUri,
        /// Who asked.
        namespace: Namespace,
    },
    /// `warm-start: auto` goes by a pod's readiness, and this is no pod's container.
    #[error(
        "annotation rekindle.dev/warm-when: ready, which is meant where nothing is said, is what a pod is, and this container is no pod's; allowed here are http://:PORT/PATH, tcp://:PORT, file:///PATH and after:DURATION"
    )]
    NoReadiness,
    /// Another namespace's image that is not exported.
    #[error("image {namespace}/{name}: it belongs to namespace {namespace} and is not exported to {user}; see [[images.export]] in {file}", file = crate::paths::CONFIG_FILE)]
    NotExported {
        /// Whose image it is.
        namespace: Namespace,
        /// Which.
        name: ImageName,
        /// Who asked.
        user: Namespace,
    },
}

impl Plan {
    /// Brings a bundle's annotations and the node's configuration together.
    ///
    /// # Errors
    /// The first reason why this container may not have what it asks for.
    pub fn resolve(
        annotations: &BTreeMap<String, String>,
        containerd_namespace: &str,
        node: &NodeConfig,
    ) -> Result<Self, PlanError> {
        let identity = Identity::resolve(annotations, containerd_namespace)?;
        let request = PodRequest::parse(annotations)?;
        for dataset in &request.datasets {
            if node.source_for(&dataset.uri, &identity.namespace).is_none() {
                let namespace = identity.namespace.clone();
                return Err(PlanError::NotAllowed {
                    uri: dataset.uri.clone(),
                    namespace,
                });
            }
        }
        let meant = identity.is_meant(request.container.as_deref());
        let (mut restore, mut ahead) = (None, None);
        if let Some(image) = request.restore_from {
            let namespace = image
                .namespace
                .unwrap_or_else(|| identity.namespace.clone());
            if !node.may_restore(&namespace, &image.name, &identity.namespace) {
                let user = identity.namespace;
                return Err(PlanError::NotExported {
                    namespace,
                    name: image.name,
                    user,
                });
            }
            let plan = RestorePlan {
                namespace,
                name: image.name,
                generation: image.generation,
                policy: request.restore_policy,
                force: request.restore_force,
            };
            if meant {
                restore = Some(plan);
            } else if identity.role == Role::Sandbox {
                ahead = Some(plan);
            }
        }
        let checkpoint = request.checkpoint.filter(|_| meant);
        let warm = request.warm.filter(|_| meant);
        let by_readiness = warm
            .as_ref()
            .is_some_and(|warm| warm.when == WarmWhen::Ready);
        if by_readiness && identity.role == Role::Standalone {
            return Err(PlanError::NoReadiness);
        }
        let after_restore = request.after_restore.filter(|_| meant);
        let datasets = request
            .datasets
            .into_iter()
            .filter(|dataset| {
                identity.role == Role::Sandbox || identity.is_meant(dataset.container.as_deref())
            })
            .collect();
        Ok(Self {
            identity,
            datasets,
            restore,
            ahead,
            warm,
            after_restore,
            checkpoint,
        })
    }
}

impl Identity {
    /// Whether a request for `container` (none: any) means this one. A sandbox is never meant.
    fn is_meant(&self, container: Option<&str>) -> bool {
        match self.role {
            Role::Sandbox => false,
            Role::Standalone => true,
            Role::Container => {
                container.is_none_or(|name| self.container_name.as_deref() == Some(name))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NODE: &str = "[[datasets.source]]\nallow = \"s3://models/\"\nnamespaces = [\"team-a\"]\n";

    fn resolve(role: &str, container: &str, pairs: &[(&str, &str)]) -> Result<Plan, PlanError> {
        let mut map: BTreeMap<String, String> = pairs
            .iter()
            .map(|(k, v)| ((*k).to_owned(), (*v).to_owned()))
            .collect();
        map.insert("io.kubernetes.cri.container-type".into(), role.into());
        map.insert(
            "io.kubernetes.cri.sandbox-namespace".into(),
            "team-a".into(),
        );
        map.insert("io.kubernetes.cri.container-name".into(), container.into());
        Plan::resolve(&map, "k8s.io", &NodeConfig::parse("", NODE).unwrap())
    }

    #[test]
    fn a_sandbox_fetches_all_and_a_container_mounts_its_own() {
        let list = "[{name: a, uri: 's3://models/a/', mount: /a, container: one}, {name: b, uri: 's3://models/b/', mount: /b}]";
        let pairs = [
            ("rekindle.dev/datasets", list),
            ("rekindle.dev/restore-from", "warm"),
            ("rekindle.dev/container", "one"),
        ];
        let sandbox = resolve("sandbox", "", &pairs).unwrap();
        assert_eq!((sandbox.datasets.len(), sandbox.restore), (2, None));
        assert_eq!(sandbox.ahead.unwrap().name.as_str(), "warm");
        let one = resolve("container", "one", &pairs).unwrap();
        assert_eq!((one.datasets.len(), one.restore.is_some()), (2, true));
        assert_eq!(one.ahead, None);
        let two = resolve("container", "two", &pairs).unwrap();
        assert_eq!((two.datasets.len(), two.restore), (1, None));
    }

    #[test]
    fn only_a_pod_has_a_readiness() {
        let auto = ("rekindle.dev/warm-start", "auto");
        let plan = resolve("container", "one", &[auto]).unwrap();
        assert_eq!(plan.warm.unwrap().when, WarmWhen::Ready);
        assert_eq!(resolve("sandbox", "", &[auto]).unwrap().warm, None);
        for pairs in [&[auto][..], &[auto, ("rekindle.dev/warm-when", "ready")]] {
            let refused = resolve("", "", pairs).unwrap_err();
            assert_eq!(refused, PlanError::NoReadiness);
        }
        let after = ("rekindle.dev/warm-when", "after:1s");
        assert!(resolve("", "", &[auto, after]).unwrap().warm.is_some());
    }

    #[test]
    fn what_is_not_its_own_is_refused_already_at_the_sandbox() {
        for role in ["sandbox", "container"] {
            let error =
                resolve(role, "one", &[("rekindle.dev/dataset", "s3://private/a/")]).unwrap_err();
            assert!(error.to_string().contains("namespace team-a"), "{error}");
            let error =
                resolve(role, "one", &[("rekindle.dev/restore-from", "team-b/warm")]).unwrap_err();
            assert!(error.to_string().contains("not exported"), "{error}");
        }
    }
}
