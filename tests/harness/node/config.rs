//! What a node's containerd and CNI are told.

use crate::root::Suite;

/// A bridge inside the node's network namespace; pods get 10.88.0.0/24.
pub(super) const CNI: &str = r#"{"cniVersion": "1.0.0", "name": "rekindle", "plugins": [{
  "type": "bridge", "bridge": "cni0", "isGateway": true, "ipMasq": false,
  "ipam": {"type": "host-local", "ranges": [[{"subnet": "10.88.0.0/24"}]], "routes": [{"dst": "0.0.0.0/0"}]}
}]}
"#;

/// containerd's configuration. `runc` is the shim it ships, `rekindle` is ours, registered as on a real node.
/// Without CAP_SYS_RESOURCE a sandbox's negative OOM score cannot be set, hence `restrict_oom_score_adj`.
pub(super) fn containerd(suite: Suite, level: &str) -> String {
    let (version, runtime, sandbox_image, cni) = match suite {
        Suite::Forky => (
            3,
            "io.containerd.cri.v1.runtime",
            "[plugins.\"io.containerd.cri.v1.images\".pinned_images]\nsandbox = \"localhost/pause:test\"\n",
            "bin_dirs = [\"/usr/lib/cni\"]",
        ),
        Suite::Trixie => (
            2,
            "io.containerd.grpc.v1.cri",
            "[plugins.\"io.containerd.grpc.v1.cri\"]\nsandbox_image = \"localhost/pause:test\"\nrestrict_oom_score_adj = true\n",
            "bin_dir = \"/usr/lib/cni\"",
        ),
    };
    let restrict = match suite {
        Suite::Forky => format!("[plugins.\"{runtime}\"]\nrestrict_oom_score_adj = true\n"),
        Suite::Trixie => String::new(),
    };
    format!(
        r#"version = {version}
[debug]
level = "{level}"
{sandbox_image}{restrict}[plugins."{runtime}".containerd]
default_runtime_name = "runc"
[plugins."{runtime}".containerd.runtimes.runc]
runtime_type = "io.containerd.runc.v2"
[plugins."{runtime}".containerd.runtimes.rekindle]
runtime_type = "io.containerd.runc.v2"
runtime_path = "/opt/rekindle/bin/containerd-shim-rekindle-v1"
pod_annotations = ["rekindle.dev/*"]
container_annotations = ["rekindle.dev/*"]
[plugins."{runtime}".cni]
{cni}
"#
    )
}
