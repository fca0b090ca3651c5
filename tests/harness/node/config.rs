//! What a node's containerd, CNI and shim are told.

use super::{NodeConfig, machine};
use crate::root::Suite;
use anyhow::{Context, Result};
use std::fs;
use std::path::Path;

/// A bridge inside the node's network namespace; pods get 10.88.0.0/24.
const CNI: &str = r#"{"cniVersion": "1.0.0", "name": "rekindle", "plugins": [{
  "type": "bridge", "bridge": "cni0", "isGateway": true, "ipMasq": false,
  "ipam": {"type": "host-local", "ranges": [[{"subnet": "10.88.0.0/24"}]], "routes": [{"dst": "0.0.0.0/0"}]}
}]}
"#;

/// What an operator gives to a containerd: the runtime `rekindle`.
const DROP_IN: &str = include_str!("../../../runtimeclass/manifests/containerd-2.toml");
/// The same for containerd 1.7, to be merged by hand.
const TO_MERGE: &str = include_str!("../../../runtimeclass/manifests/containerd-1.7.toml");

/// Writes the files of a node whose root is `root`. A machine has systemd, and lets it make the cgroups, as what is
/// shipped says; a node of namespaces has none.
pub(super) fn write(config: &NodeConfig, root: &Path) -> Result<()> {
    let systemd = machine::is_here();
    let shipped = |text: &str| match systemd {
        true => text.to_owned(),
        false => text.replace("SystemdCgroup = true", "SystemdCgroup = false"),
    };
    let mut containerd = containerd(config.suite, config.log_level, systemd);
    let mut files = vec![("cni/net.d/10-rekindle.conflist", CNI.to_owned())];
    match config.suite {
        Suite::Forky => files.push(("containerd/conf.d/rekindle.toml", shipped(DROP_IN))),
        Suite::Trixie => containerd += &shipped(TO_MERGE).replace("version = 2\n", ""),
    }
    files.push(("containerd/config.toml", containerd));
    if let Some(text) = &config.rekindle_toml {
        files.push(("rekindle/config.toml", text.clone()));
    }
    let etc = root.join("etc");
    for folder in ["containerd/conf.d", "cni/net.d", "rekindle"] {
        fs::create_dir_all(etc.join(folder))?;
    }
    for (path, text) in files {
        let path = etc.join(path);
        fs::write(&path, text).with_context(|| format!("writing {}", path.display()))?;
    }
    Ok(())
}

/// containerd's configuration, less our runtime. Without CAP_SYS_RESOURCE a sandbox's negative OOM score cannot be set,
/// hence `restrict_oom_score_adj`.
fn containerd(suite: Suite, level: &str, systemd: bool) -> String {
    let (head, runtime, sandbox_image, cni) = match suite {
        Suite::Forky => (
            "version = 3\nimports = [\"/etc/containerd/conf.d/*.toml\"]",
            "io.containerd.cri.v1.runtime",
            "[plugins.\"io.containerd.cri.v1.images\".pinned_images]\nsandbox = \"localhost/pause:test\"\n",
            "bin_dirs = [\"/usr/lib/cni\"]",
        ),
        Suite::Trixie => (
            "version = 2",
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
        r#"{head}
[debug]
level = "{level}"
{sandbox_image}{restrict}[plugins."{runtime}".containerd]
default_runtime_name = "runc"
[plugins."{runtime}".containerd.runtimes.runc]
runtime_type = "io.containerd.runc.v2"
[plugins."{runtime}".containerd.runtimes.runc.options]
SystemdCgroup = {systemd}
[plugins."{runtime}".cni]
{cni}
"#
    )
}
