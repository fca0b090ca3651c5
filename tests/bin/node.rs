//! `rekindle-node`: an interactive shell in a throwaway node with our shim registered. `make node` runs it.

use anyhow::Result;
use rekindle_harness::{Node, NodeConfig, Runtime, images, root};
use std::io::Write;
use std::process::{ExitCode, Stdio};

#[tokio::main(flavor = "current_thread")]
async fn main() -> Result<ExitCode> {
    let runtime = if std::env::var("REKINDLE_RUNTIMES").is_ok_and(|v| v == "go") {
        Runtime::Go
    } else {
        Runtime::Rekindle
    };
    let node = Node::start(NodeConfig::new(runtime)?).await?;
    for image in [images::busybox()?, images::pause()?] {
        node.import(&image).await?;
    }
    let mut out = std::io::stderr();
    let here = root::node(node.suite())?;
    let versions: Result<Vec<_>> = ["containerd", "runc", "criu"]
        .iter()
        .map(|p| Ok(format!("{p} {}", root::version(&here, p)?)))
        .collect();
    writeln!(
        out,
        "a node with {}; it goes when this shell ends",
        versions?.join(", ")
    )?;
    writeln!(
        out,
        "try: ctr run --rm -t localhost/busybox:test demo /counter"
    )?;
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let command: Vec<&str> = if arguments.is_empty() {
        vec!["bash"]
    } else {
        arguments.iter().map(String::as_str).collect()
    };
    let status = node.command(&command).stdin(Stdio::inherit()).status()?;
    Ok(if status.success() {
        ExitCode::SUCCESS
    } else {
        ExitCode::FAILURE
    })
}
