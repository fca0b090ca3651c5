//! What image a container runs, which only containerd knows. The CLI asks it: the shim does not link its client.

use std::{process::Command, time::Duration};

use serde::Deserialize;

use crate::{context::Fixed, data, programs};

/// Both are none for a container that was made without an image.
#[derive(Debug, Default)]
pub(crate) struct ContainerImage {
    pub(crate) reference: Option<String>,
    pub(crate) digest: Option<String>,
}

#[derive(Deserialize)]
struct Answer {
    r#ref: String,
    digest: String,
}

/// None where containerd does not answer.
pub(crate) async fn ask(fixed: &Fixed) -> Option<ContainerImage> {
    #[allow(clippy::disallowed_methods, reason = "the launch of the CLI")]
    let mut command = Command::new(data::program());
    command.args([
        "container-image",
        "--id",
        &fixed.id,
        "--namespace",
        &fixed.shared.namespace,
    ]);
    command.args(["--address", &fixed.shared.containerd]);
    match programs::capture(&fixed.runc.exits, command, Duration::from_secs(5)).await {
        Ok((0, text)) => {
            let answer: Answer = serde_json::from_str(&text).ok()?;
            let some = |text: String| Some(text).filter(|text| !text.is_empty());
            Some(ContainerImage {
                reference: some(answer.r#ref),
                digest: some(answer.digest),
            })
        }
        other => {
            tracing::warn!(id = fixed.id, ?other, "the container's image is not known");
            None
        }
    }
}
