//! What the node says: its configuration, read once per shim.

use std::path::Path;

use rekindle_core::{config::NodeConfig, paths};

use crate::error::Error;

/// Reads `/etc/rekindle/config.toml`; absent means all defaults.
pub(crate) fn config() -> Result<NodeConfig, Error> {
    read(Path::new(paths::CONFIG_FILE))
}

fn read(path: &Path) -> Result<NodeConfig, Error> {
    match std::fs::read_to_string(path) {
        Ok(text) => Ok(NodeConfig::parse(&path.display().to_string(), &text)?),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(NodeConfig::default()),
        Err(error) => Err(Error::file("reading", path)(error)),
    }
}
