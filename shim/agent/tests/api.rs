//! What is generated from `proto/agent.proto` is what is committed.
#![allow(
    clippy::unwrap_used,
    reason = "helpers of tests, which clippy does not know for tests"
)]

use std::{fs, path::Path};

use ttrpc_codegen::{Codegen, Customize, ProtobufCustomize};

/// Set, it is written anew.
const REGENERATE: &str = "REKINDLE_REGENERATE";

#[test]
fn what_is_committed_is_what_is_generated() {
    let package = Path::new(env!("CARGO_MANIFEST_DIR"));
    let made = tempfile::tempdir().unwrap();
    Codegen::new()
        .out_dir(made.path())
        .input(package.join("proto/agent.proto"))
        .include(package.join("proto"))
        .rust_protobuf()
        .customize(Customize {
            async_all: true,
            ..Customize::default()
        })
        .rust_protobuf_customize(ProtobufCustomize::default().gen_mod_rs(false))
        .run()
        .unwrap();
    for name in ["agent.rs", "agent_ttrpc.rs"] {
        let text = fs::read_to_string(made.path().join(name)).unwrap();
        // Attributes of a file are of no use in a module, whose own say the same.
        let lines = text.lines().filter(|line| !line.starts_with("#!["));
        let text = lines.collect::<Vec<_>>().join("\n") + "\n";
        let committed = package.join("src/api").join(name);
        if std::env::var_os(REGENERATE).is_some() {
            fs::write(&committed, &text).unwrap();
        }
        assert!(
            fs::read_to_string(&committed).unwrap_or_default() == text,
            "{name} is not what proto/agent.proto makes: {REGENERATE}=1 cargo test --test api writes it anew"
        );
    }
}
