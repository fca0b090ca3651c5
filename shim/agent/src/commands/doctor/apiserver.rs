//! The cluster's apiserver: whether it tells a node what it has to know of its pods.

use std::path::Path;

use rekindle_core::config::Kubernetes;
use tokio::time::timeout;

use super::{Check, checks::PATIENCE};
use crate::cluster;

const NAME: &str = "apiserver";

pub(super) async fn check(kubernetes: &Kubernetes) -> Check {
    let all = kubernetes.kubeconfigs();
    let Some(kubeconfig) = all.iter().find(|path| path.exists()) else {
        let all: Vec<_> = all.iter().map(|path| path.display().to_string()).collect();
        let found = format!("no kubeconfig at {}", all.join(" or "));
        return match kubernetes.kubeconfig {
            Some(_) => Check::failed(NAME, found, "name another one, or none, in [kubernetes]"),
            None => Check::noted(
                NAME,
                found,
                "of pods with warm-start: auto and no other warm-when than their readiness no image is made",
            ),
        };
    };
    match timeout(PATIENCE, ask(kubeconfig)).await {
        Ok(Ok(found)) => Check::passed(NAME, found),
        Ok(Err(error)) => Check::failed(
            NAME,
            format!("{error:#}"),
            format!("kubectl --kubeconfig {} version", kubeconfig.display()),
        ),
        Err(_) => Check::failed(
            NAME,
            format!("no answer within {}s", PATIENCE.as_secs()),
            "look at the way to it",
        ),
    }
}

async fn ask(kubeconfig: &Path) -> anyhow::Result<String> {
    let version = cluster::version(kubeconfig).await?;
    Ok(format!("{version}, with {}", kubeconfig.display()))
}
