//! `rekindle image` on stores that are made here: no containerd, no root.
#![allow(clippy::unwrap_used)]

#[path = "../schema/mod.rs"]
mod schema;

mod diff;
mod gc;
mod memory;
mod node;
mod oci;
