//! Every path that more than one program uses, in one place.

/// The node's configuration. Absent: all defaults.
pub const CONFIG_FILE: &str = "/etc/rekindle/config.toml";
/// Sockets over which runc hands over terminals; gone after a reboot.
pub const RUN_DIR: &str = "/run/rekindle";
/// The API of the node's agent.
pub const AGENT_SOCKET: &str = "/run/rekindle/agent.sock";
/// Datasets on the node's disk; see `rekindle-dataset` for what lies inside.
pub const DATASETS_DIR: &str = "/var/lib/rekindle/datasets";
/// Checkpoint images on the node's disk; see `rekindle-checkpoint` for what lies inside.
pub const IMAGES_DIR: &str = "/var/lib/rekindle/images";
/// Checkpoint images in memory, where the node has room for some.
pub const MEMORY_DIR: &str = "/run/rekindle/images";
/// The CLI, started by the shim for whatever needs a network, and as the pager.
///
/// The shim looks beside its own binary first, then here.
pub const CLI_BINARY: &str = "/opt/rekindle/bin/rekindle";
