//! What this host is, found out once per shim and only when an image is made or used.

use std::{path::PathBuf, process::Command, sync::Arc, time::Duration};

use rekindle_checkpoint::{fit::host_facts, manifest::Host, pager};
use tokio::sync::OnceCell;

use crate::{exits::Exits, programs};

/// CRIU, as runc finds it: by name.
pub(crate) const CRIU: &str = "criu";

/// What was found out.
#[derive(Debug, Clone, Default)]
pub(crate) struct HostFacts {
    facts: Arc<OnceCell<Host>>,
    lazy: Arc<OnceCell<bool>>,
}

impl HostFacts {
    /// Architecture, CPU, kernel, and the versions of CRIU and of this container's runc.
    pub(crate) async fn get(&self, exits: &Exits, runc: &str) -> Result<Host, String> {
        let found = self.facts.get_or_try_init(|| async {
            let (criu, runc_version) = tokio::join!(
                programs::version(exits, CRIU),
                programs::version(exits, runc)
            );
            let criu = criu
                .map_err(|e| format!("{CRIU}: {e}; is it installed, and on containerd's PATH?"))?;
            let runc_version = runc_version.map_err(|e| format!("{runc}: {e}"))?;
            host_facts(&criu, &runc_version).map_err(|e| e.to_string())
        });
        found.await.cloned()
    }

    /// Whether kernel and CRIU can restore lazily.
    pub(crate) async fn can_page_lazily(&self, exits: &Exits) -> bool {
        let asked = self.lazy.get_or_init(|| async {
            let check = pager::lazy_check(&PathBuf::from(CRIU));
            #[allow(clippy::disallowed_methods, reason = "asks CRIU what it can do")]
            let mut command = Command::new(check.program);
            command.args(check.args);
            matches!(
                programs::capture(exits, command, Duration::from_secs(10)).await,
                Ok((0, _))
            )
        });
        *asked.await
    }
}
