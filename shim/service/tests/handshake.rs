//! The handshake of containerd 2.3, which no containerd of the suites speaks yet: parameters on stdin, and the
//! task service under its third version.
#![allow(
    clippy::unwrap_used,
    clippy::disallowed_methods,
    reason = "a test, which waits on its own thread"
)]

use std::{
    fs,
    io::Write,
    path::Path,
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use containerd_shim::bootstrap::{BootstrapParams, BootstrapResult};
use containerd_shim_protos::{
    api::{ConnectRequest, ShutdownRequest},
    protobuf::Message,
    shim_async::TaskClient,
    ttrpc::{r#async::Client, context},
};

#[test]
fn parameters_on_stdin_are_answered_in_kind() {
    let bundle = tempfile::tempdir().unwrap();
    fs::write(
        bundle.path().join("config.json"),
        r#"{"ociVersion": "1.1.0"}"#,
    )
    .unwrap();
    let sockets = bundle.path().join("sockets");
    let params = BootstrapParams {
        instance_id: "one".to_owned(),
        namespace: "test".to_owned(),
        containerd_grpc_address: bundle.path().join("containerd.sock").display().to_string(),
        socket_dir: Some(sockets.display().to_string()),
        ..Default::default()
    };
    let mut start = Command::new(env!("CARGO_BIN_EXE_containerd-shim-rekindle-v1"))
        .args(["-namespace", "test", "-id", "one", "start"])
        .current_dir(&bundle)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let input = params.write_to_bytes().unwrap();
    start.stdin.take().unwrap().write_all(&input).unwrap();
    let output = start.wait_with_output().unwrap();
    assert!(output.status.success());
    let answer = BootstrapResult::parse_from_bytes(&output.stdout).unwrap();
    assert_eq!((answer.version, answer.protocol.as_str()), (3, "ttrpc"));
    let socket = answer.address.strip_prefix("unix://").unwrap();
    assert!(Path::new(socket).starts_with(&sockets), "{socket}");

    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    let pid = runtime.block_on(async {
        let client = Client::connect(&answer.address).await.unwrap();
        // The client's name for the service is that of version 3.
        let task = TaskClient::new(client);
        let deadline = || context::with_duration(Duration::from_secs(10));
        let connected = task.connect(deadline(), &ConnectRequest::default()).await;
        let shutdown = ShutdownRequest {
            now: true,
            ..Default::default()
        };
        let ended = task.shutdown(deadline(), &shutdown).await;
        ended.unwrap();
        connected.unwrap().shim_pid
    });
    let since = Instant::now();
    // A zombie has no program: whoever adopts it here may not reap it.
    while fs::read_link(format!("/proc/{pid}/exe")).is_ok() {
        assert!(
            since.elapsed() < Duration::from_secs(40),
            "the shim did not end"
        );
        std::thread::sleep(Duration::from_millis(10));
    }
    assert!(!Path::new(socket).exists());
}
