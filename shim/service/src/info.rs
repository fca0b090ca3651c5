//! `-info`: what this runtime is and can do, for containerd's introspection.

use std::{
    io::{self, IsTerminal, Read},
    process::Command,
};

use containerd_shim_protos::{
    protobuf::{Message, MessageField, well_known_types::any::Any},
    types::introspection::{RuntimeInfo, RuntimeVersion},
};

use crate::{error::Error, options::RuncOptions};

/// The name that containerd knows the OCI features by (`typeurl` of runtime-spec's `Features`).
const FEATURES: &str = "types.containerd.io/opencontainers/runtime-spec/1/features/Features";

/// Reads the runtime's options from stdin and returns what to print.
pub(crate) fn run() -> Result<Vec<u8>, Error> {
    let mut input = Vec::new();
    if !io::stdin().is_terminal() {
        io::stdin()
            .lock()
            .take(1 << 20)
            .read_to_end(&mut input)
            .map_err(Error::io("reading stdin"))?;
    }
    let options = Any::parse_from_bytes(&input)
        .ok()
        .filter(|any| !any.type_url.is_empty());
    let binary = RuncOptions::parse(options.as_ref())?.binary();

    let mut version = RuntimeVersion::new();
    env!("CARGO_PKG_VERSION").clone_into(&mut version.version);
    let mut info = RuntimeInfo::new();
    // The runtime's name, as the Go shim gives its own, not the program's.
    "io.containerd.rekindle.v1".clone_into(&mut info.name);
    info.version = MessageField::some(version);
    info.options = options.into();
    info.features = features(&binary).into();
    info.write_to_bytes().map_err(|e| Error::Io {
        doing: "answering containerd",
        source: io::Error::other(e),
    })
}

/// `runc features`; an OCI runtime that does not know the command has none to report.
fn features(binary: &str) -> Option<Any> {
    #[allow(
        clippy::disallowed_methods,
        reason = "asks the OCI runtime, once, in a process of its own"
    )]
    let output = Command::new(binary).arg("features").output().ok()?;
    let features: serde_json::Value = serde_json::from_slice(&output.stdout).ok()?;
    let mut any = Any::new();
    FEATURES.clone_into(&mut any.type_url);
    any.value = serde_json::to_vec(&features).ok()?;
    output.status.success().then_some(any)
}
