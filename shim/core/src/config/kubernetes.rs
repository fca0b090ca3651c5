//! The cluster that the node is of, for what only its apiserver knows.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

/// Where kubelets keep what they reach their apiserver with: as kubeadm makes it, and as most others do.
const KUBELETS: [&str; 2] = [
    "/etc/kubernetes/kubelet.conf",
    "/var/lib/kubelet/kubeconfig",
];

/// How the apiserver is reached.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Kubernetes {
    /// A kubeconfig of the node's own, in place of the kubelet's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub kubeconfig: Option<PathBuf>,
}

impl Kubernetes {
    /// The kubeconfigs of which the first that exists is used. A kubelet may read the pods of its node, and no others.
    pub fn kubeconfigs(&self) -> Vec<&Path> {
        match &self.kubeconfig {
            Some(named) => vec![named],
            None => KUBELETS.map(Path::new).into(),
        }
    }
}
