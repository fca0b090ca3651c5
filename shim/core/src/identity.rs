//! Who a container is: its namespace, its pod, its place in the pod.

use std::collections::BTreeMap;

use crate::name::{NameError, Namespace};

/// Annotations that containerd's CRI plugin writes into every bundle (containerd
/// `internal/cri/annotations/annotations.go`). A pod cannot set them: they overwrite what it says.
mod cri {
    pub(super) const CONTAINER_TYPE: &str = "io.kubernetes.cri.container-type";
    pub(super) const SANDBOX_NAMESPACE: &str = "io.kubernetes.cri.sandbox-namespace";
    pub(super) const SANDBOX_NAME: &str = "io.kubernetes.cri.sandbox-name";
    pub(super) const SANDBOX_UID: &str = "io.kubernetes.cri.sandbox-uid";
    pub(super) const CONTAINER_NAME: &str = "io.kubernetes.cri.container-name";
}

/// What a container is to its pod.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// Not made by CRI: `ctr`, or a client of containerd.
    Standalone,
    /// A pod's sandbox ("pause") container.
    Sandbox,
    /// A container of a pod.
    Container,
}

/// Who a container is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    /// The pod's namespace under CRI, containerd's own otherwise. Images and datasets are checked
    /// against this and nothing else.
    pub namespace: Namespace,
    /// What it is to its pod.
    pub role: Role,
    /// `<pod namespace>/<pod name>`, for messages.
    pub pod: Option<String>,
    /// The pod's uid; none outside CRI.
    pub pod_uid: Option<String>,
    /// The container's name in the pod spec; none for a sandbox and outside CRI.
    pub container_name: Option<String>,
}

impl Identity {
    /// Reads it from a bundle's annotations.
    ///
    /// # Errors
    /// When the namespace cannot be one: nothing is guessed, for access is decided by it.
    pub fn resolve(
        annotations: &BTreeMap<String, String>,
        containerd_namespace: &str,
    ) -> Result<Self, NameError> {
        let get = |key: &str| {
            annotations
                .get(key)
                .filter(|value| !value.is_empty())
                .cloned()
        };
        let role = match get(cri::CONTAINER_TYPE).as_deref() {
            Some("sandbox") => Role::Sandbox,
            Some("container") => Role::Container,
            _ => Role::Standalone,
        };
        let pod_namespace = get(cri::SANDBOX_NAMESPACE);
        let namespace = match (role, &pod_namespace) {
            (Role::Standalone, _) => containerd_namespace.parse()?,
            (_, Some(namespace)) => namespace.parse()?,
            (_, None) => "".parse()?,
        };
        Ok(Self {
            namespace,
            role,
            pod: pod_namespace
                .zip(get(cri::SANDBOX_NAME))
                .map(|(ns, name)| format!("{ns}/{name}")),
            pod_uid: get(cri::SANDBOX_UID),
            container_name: get(cri::CONTAINER_NAME),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn resolve(pairs: &[(&str, &str)]) -> Result<Identity, NameError> {
        let map = pairs
            .iter()
            .map(|(k, v)| ((*k).to_owned(), (*v).to_owned()))
            .collect();
        Identity::resolve(&map, "default")
    }

    #[test]
    fn outside_cri_the_namespace_is_containerds() {
        let identity = resolve(&[("io.kubernetes.cri.sandbox-namespace", "stolen")]).unwrap();
        assert_eq!(
            (identity.namespace.as_str(), identity.role),
            ("default", Role::Standalone)
        );
    }

    #[test]
    fn under_cri_it_is_the_pods_and_never_guessed() {
        let kind = ("io.kubernetes.cri.container-type", "container");
        let identity = resolve(&[kind, ("io.kubernetes.cri.sandbox-namespace", "team-a")]).unwrap();
        assert_eq!(
            (identity.namespace.as_str(), identity.role),
            ("team-a", Role::Container)
        );
        assert!(resolve(&[kind]).is_err());
    }
}
