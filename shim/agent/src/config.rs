//! Finds and reads the node's configuration.

use std::{fs, io::ErrorKind, path::Path};

use anyhow::Context as _;
use rekindle_core::{config::NodeConfig, paths};

/// Reads `named`, or the usual file. Only the usual one may be absent: then all defaults hold.
pub(crate) fn load(named: Option<&Path>) -> anyhow::Result<NodeConfig> {
    let file = named.unwrap_or(Path::new(paths::CONFIG_FILE));
    match fs::read_to_string(file) {
        Ok(text) => Ok(NodeConfig::parse(&file.display().to_string(), &text)?),
        Err(e) if e.kind() == ErrorKind::NotFound && named.is_none() => Ok(NodeConfig::default()),
        Err(e) => Err(e).with_context(|| format!("reading the configuration {}", file.display())),
    }
}
