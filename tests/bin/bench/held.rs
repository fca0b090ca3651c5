//! The measurement: how soon a container answers whose restore stands still. The shim that containerd ships answers when
//! its restore is over.

use crate::figures::Series;
use anyhow::{Context, Result, ensure};
use nix::sys::signal::Signal;
use rekindle_harness::container::State;
use rekindle_harness::options::CheckpointOptions;
use rekindle_harness::{Image, Node};
use std::time::Instant;

const DUMP: &str = "/tmp/bench-held";
const KILL: u32 = 9;

/// Milliseconds, each through containerd's API.
#[derive(Debug, Clone, Default)]
pub(crate) struct Answers {
    pub(crate) state: Series,
    pub(crate) kill: Series,
}

pub(crate) async fn measure(node: &Node, busybox: &Image, times: usize) -> Result<Answers> {
    let task = node.container("held").image(busybox).args(&["/counter"]);
    let task = task.run().await?;
    let options = CheckpointOptions {
        exit: true,
        image_path: DUMP.into(),
        ..Default::default()
    };
    task.checkpoint(&options)
        .await
        .context("dumping a counter")?;
    task.wait().await?;
    task.remove().await?;
    let (mut state, mut kill) = (Vec::new(), Vec::new());
    for number in 0..times {
        let id = format!("held-{number}");
        let task = node.container(&id).image(busybox).args(&["/counter"]);
        let task = task.restore_from(DUMP).create().await?;
        let ask = async {
            node.catch(&["criu", "swrk"], Signal::SIGSTOP).await?;
            let since = Instant::now();
            ensure!(
                task.state().await? == State::Created,
                "it is restored already"
            );
            state.push(since.elapsed().as_secs_f64() * 1e3);
            let since = Instant::now();
            task.kill(KILL).await?;
            kill.push(since.elapsed().as_secs_f64() * 1e3);
            Ok(())
        };
        let (started, asked) = tokio::join!(task.start(), ask);
        asked?;
        ensure!(started.is_err(), "a restore that was killed has started");
        task.delete().await?;
        task.remove().await?;
    }
    Ok(Answers {
        state: state.into_iter().collect(),
        kill: kill.into_iter().collect(),
    })
}
