//! `CheckpointContainer`: what the kubelet's checkpoint API asks for.

use anyhow::{Context, Result, ensure};
use rekindle_harness::Suite;
use rekindle_harness::cri::{ContainerState, Cri};

pub(crate) async fn the_kubelets_checkpoint_makes_an_archive(cri: &Cri<'_>) -> Result<()> {
    let pod = cri.pod("kubelet-dump").run().await?;
    let one = pod.container("one").args(&["/counter"]).run().await?;
    let before = one.counts_to(3).await?;
    let dumped = one.checkpoint("/tmp/kubelet-dump.tar").await;
    if cri.node().suite() == Suite::Trixie {
        // containerd 1.7 does not have the call.
        let refusal = dumped
            .err()
            .context("containerd 1.7 has learned CheckpointContainer")?;
        assert_eq!(refusal.code(), tonic::Code::Unimplemented, "{refusal}");
        return pod.remove().await;
    }
    dumped.context("CheckpointContainer")?;
    let listed = cri
        .node()
        .run(["tar", "-tf", "/tmp/kubelet-dump.tar"])
        .await?;
    for file in [
        "config.dump",
        "spec.dump",
        "checkpoint/inventory.img",
        "checkpoint/core-1.img",
    ] {
        ensure!(
            listed
                .lines()
                .any(|line| line.trim_start_matches("./") == file),
            "{file} is not among\n{listed}"
        );
    }
    assert_eq!(one.state().await?, ContainerState::ContainerRunning);
    assert_eq!(one.counts_to(before.n + 5).await?.nonce, before.nonce);
    pod.remove().await
}
