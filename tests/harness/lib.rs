//! A throwaway containerd node, driven from Rust, so that a test reads like a story.
//!
//! [`Node::start`] makes a node over a cached Debian root ([`root`]): its own mounts, processes, cgroups and network, and
//! a containerd with the runtime under test. [`images`] writes what runs on it. Nothing of a node outlives the process
//! that started it, also when that process is killed: see `node/keeper.sh`.

mod catch;
pub mod container;
pub mod counter;
pub mod cri;
pub mod events;
pub mod fifo;
pub mod halting;
mod http;
pub mod images;
pub mod kube;
pub mod model;
pub mod node;
pub mod options;
pub mod poll;
pub mod progress;
pub mod root;
pub mod s3;
#[path = "../../shim/agent/tests/schema/mod.rs"]
pub mod schema;
pub mod shim;
mod spec;
mod traces;
pub mod vm;
pub mod weights;

pub use container::{Container, Exec};
pub use counter::Count;
pub use cri::Pod;
pub use images::Image;
pub use node::{Node, NodeConfig, Runtime, cli, s3_server};
pub use root::Suite;
