//! `rekindle container-image`: hidden; the shim's way to learn what image a container runs.

use std::{path::PathBuf, process::ExitCode};

use clap::Args;
use serde::Serialize;

use crate::{containerd::Containerd, output};

#[derive(Debug, Args)]
pub(crate) struct ContainerImageArgs {
    /// The container's full id.
    #[arg(long)]
    id: String,
    /// Its containerd namespace.
    #[arg(long)]
    namespace: String,
    /// containerd's socket.
    #[arg(long)]
    address: PathBuf,
}

/// What is printed. Both empty for a container that was made without an image (`ctr run --rootfs`).
#[derive(Debug, Serialize)]
struct Answer {
    r#ref: String,
    digest: String,
}

pub(crate) async fn run(args: ContainerImageArgs) -> anyhow::Result<ExitCode> {
    let containerd = Containerd::connect(&args.address).await?;
    let container = containerd.container(&args.namespace, &args.id).await?;
    let digest = containerd
        .image_digest(&args.namespace, &container.image)
        .await?;
    output::json(&Answer {
        r#ref: container.image,
        digest: digest.unwrap_or_default(),
    })?;
    Ok(ExitCode::SUCCESS)
}
