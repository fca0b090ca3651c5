//! A shim, spoken to without containerd in between, which asks for a process's state before most of its calls.

use crate::Node;
use anyhow::{Context as _, Result};
use containerd_shim_protos::shim_async::Client;
use containerd_shim_protos::ttrpc::{self, context, context::Context};

pub use containerd_shim_protos::{
    api, protobuf, shim_async::TaskClient as Shim, ttrpc::Code as ShimCode,
};

/// How long a call may take.
pub fn deadline() -> Context {
    context::with_duration(*crate::poll::DEADLINE)
}

/// The code of an answer.
pub fn code<T>(answer: ttrpc::Result<T>) -> Result<ShimCode> {
    match answer {
        Ok(_) => Ok(ShimCode::OK),
        Err(ttrpc::Error::RpcStatus(status)) => status
            .code
            .enum_value()
            .map_err(|code| anyhow::anyhow!("code {code} does not exist")),
        Err(error) => Err(error).context("the shim did not answer"),
    }
}

impl Node {
    /// Connects to the shim that serves `id`. It must know version 3 of the task service.
    pub async fn shim(&self, id: &str) -> Result<Shim> {
        let socket = self.path(self.shim_socket(id).await?);
        let address = format!("unix://{}", socket.display());
        let client = Client::connect(&address).await;
        let client = client.with_context(|| format!("connecting to the shim at {address}"))?;
        Ok(Shim::new(client))
    }
}
