//! A real model server on a node: PyTorch and Transformers serve an embedding model whose weights come from S3.

use crate::container::{Builder, Container};
use crate::{Image, Node, NodeConfig, Runtime, images, s3, weights};
use anyhow::{Context, Result, bail};
use serde_json::Value;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Instant;

/// The bucket on the node's S3 server.
pub const BUCKET: &str = "models";
/// Where the weights lie in it.
pub const PREFIX: &str = "all-minilm-l6-v2";
/// The dataset as a container asks for it.
pub const DATASET: &str = "s3://models/all-minilm-l6-v2/";
/// Where the server answers: it shares the node's network.
const ADDRESS: ([u8; 4], u16) = ([127, 0, 0, 1], 8000);
const TARGET: &str = "/?text=rekindle";

/// Everything that is downloaded, built and kept.
#[derive(Debug)]
pub struct Prepared {
    /// A node that has the image, and may fetch from the bucket.
    pub config: NodeConfig,
    /// PyTorch and the server.
    pub image: Image,
    /// The folder with the weights.
    pub weights: PathBuf,
}

/// Makes what is missing in the cache.
pub async fn prepare() -> Result<Prepared> {
    let image = images::torch()?;
    let weights = weights::minilm()?;
    let mut config = NodeConfig::new(Runtime::Rekindle)?
        .with_image(&image)
        .await?;
    config.rekindle_toml = Some(s3::source(BUCKET));
    Ok(Prepared {
        config,
        image,
        weights,
    })
}

/// One answer of the server.
#[derive(Debug, Clone, PartialEq)]
pub struct Embedding {
    /// How many requests this process has answered, this one included.
    pub n: u64,
    /// Drawn once when the process started.
    pub boot: String,
    /// The numbers the vector begins with.
    pub vector: Vec<f64>,
    /// How many numbers it has.
    pub dimensions: u64,
    /// A digest of all of them, bit by bit.
    pub sha256: String,
}

/// A container of the server, which waits for the weights.
pub fn server<'n>(node: &'n Node, image: &Image, id: &str) -> Builder<'n> {
    node.container(id)
        .image(image)
        .args(&["python3", "/server.py"])
        .host_network()
        .annotation("rekindle.dev/dataset", DATASET)
}

/// Waits for the first answer, as long as the container runs; the moment it came.
pub async fn first_answer(container: &Container<'_>) -> Result<(Embedding, Instant)> {
    tokio::select! {
        first = container.node().http_first(ADDRESS.into(), TARGET) => {
            let (body, at) = first?;
            Ok((parse(&body)?, at))
        }
        ended = container.wait() => {
            bail!(
                "{} ended with status {} before it answered; it said:\n{}",
                container.id(),
                ended?.status,
                container.io().err()?.so_far().trim()
            )
        }
    }
}

/// The answer to one more request.
pub async fn ask(node: &Node) -> Result<Embedding> {
    let address: SocketAddr = ADDRESS.into();
    parse(&node.http_get(address, TARGET).await?)
}

fn parse(body: &str) -> Result<Embedding> {
    let of = || -> Option<Embedding> {
        let answer: Value = serde_json::from_str(body).ok()?;
        Some(Embedding {
            n: answer["n"].as_u64()?,
            boot: answer["boot"].as_str()?.to_owned(),
            vector: answer["vector"]
                .as_array()?
                .iter()
                .filter_map(Value::as_f64)
                .collect(),
            dimensions: answer["dimensions"].as_u64()?,
            sha256: answer["sha256"].as_str()?.to_owned(),
        })
    };
    of().with_context(|| format!("the server answered {body:?}"))
}
