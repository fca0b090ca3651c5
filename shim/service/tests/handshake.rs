//! The handshake of containerd 2.3, which no containerd of the suites speaks yet: parameters on stdin, and the
//! task service under its third version. And what containerd asks of it by its environment.
#![allow(
    clippy::unwrap_used,
    clippy::disallowed_methods,
    reason = "a test, which waits on its own thread"
)]

mod shim;

use std::{
    fs,
    io::Write,
    os::unix::net::UnixListener,
    path::Path,
    process::{Command, Output, Stdio},
    time::{Duration, Instant},
};

use containerd_shim::bootstrap::{BootstrapParams, BootstrapResult};
use containerd_shim_protos::{
    api::{ConnectRequest, ShutdownRequest},
    protobuf::Message,
    shim_async::TaskClient,
    ttrpc::{r#async::Client, context},
};
use rustix::{
    process::{Pid, getpid},
    thread::{CoreSchedulingScope, core_scheduling_cookie},
};

/// Runs `start` with the parameters of containerd 2.3.
fn start(bundle: &Path, sched_core: &str) -> Output {
    start_in(bundle, &bundle.join("sockets"), sched_core)
}

fn start_in(bundle: &Path, sockets: &Path, sched_core: &str) -> Output {
    fs::write(bundle.join("config.json"), r#"{"ociVersion": "1.1.0"}"#).unwrap();
    let params = BootstrapParams {
        instance_id: "one".to_owned(),
        namespace: "test".to_owned(),
        containerd_grpc_address: bundle.join("containerd.sock").display().to_string(),
        socket_dir: Some(sockets.display().to_string()),
        ..Default::default()
    };
    let mut start = Command::new(env!("CARGO_BIN_EXE_containerd-shim-rekindle-v1"))
        .args(["-namespace", "test", "-id", "one", "start"])
        .current_dir(bundle)
        .env("SCHED_CORE", sched_core)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let input = params.write_to_bytes().unwrap();
    start.stdin.take().unwrap().write_all(&input).unwrap();
    start.wait_with_output().unwrap()
}

/// Connects to the shim that has answered, looks at its process, and ends it.
fn meet_and_end(answer: &BootstrapResult, look: impl FnOnce(Pid)) {
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
        let pid = connected
            .as_ref()
            .map(|answer| answer.shim_pid.cast_signed());
        if let Some(pid) = pid.ok().and_then(Pid::from_raw) {
            look(pid);
        }
        let shutdown = ShutdownRequest {
            now: true,
            ..Default::default()
        };
        let ended = task.shutdown(deadline(), &shutdown).await;
        ended.unwrap();
        connected.unwrap().shim_pid
    });
    shim::ends(pid);
}

#[test]
fn parameters_on_stdin_are_answered_in_kind() {
    let bundle = tempfile::tempdir().unwrap();
    let output = start(bundle.path(), "");
    assert!(output.status.success());
    let answer = BootstrapResult::parse_from_bytes(&output.stdout).unwrap();
    assert_eq!((answer.version, answer.protocol.as_str()), (3, "ttrpc"));
    let socket = answer.address.strip_prefix("unix://").unwrap();
    assert!(
        Path::new(socket).starts_with(bundle.path().join("sockets")),
        "{socket}"
    );
    meet_and_end(&answer, |_| {});
    assert!(!Path::new(socket).exists());
}

#[test]
fn the_socket_of_a_shim_that_was_killed_is_no_obstacle() {
    let bundle = tempfile::tempdir().unwrap();
    let address = || {
        let output = start(bundle.path(), "");
        assert!(output.status.success());
        let answer = BootstrapResult::parse_from_bytes(&output.stdout).unwrap();
        meet_and_end(&answer, |_| {});
        answer.address
    };
    let first = address();
    let socket = first.strip_prefix("unix://").unwrap();
    // Nobody listens there when this is dropped, and the file stays.
    drop(UnixListener::bind(socket).unwrap());
    assert!(Path::new(socket).exists());
    assert_eq!(address(), first);
}

#[test]
fn a_shim_without_a_container_ends_when_its_bundle_is_gone() {
    let (bundle, sockets) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let output = start_in(bundle.path(), sockets.path(), "");
    assert!(output.status.success());
    let answer = BootstrapResult::parse_from_bytes(&output.stdout).unwrap();
    let socket = Path::new(answer.address.strip_prefix("unix://").unwrap());
    assert!(socket.exists());
    bundle.close().unwrap();
    let since = Instant::now();
    // The last that it does before its end.
    while socket.exists() {
        assert!(since.elapsed() < Duration::from_secs(40), "it serves on");
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// Not every kernel has it, and none without threads that share a core.
#[test]
fn core_scheduling_is_done_or_refused_as_the_kernel_can() {
    let cookie = |pid| core_scheduling_cookie(pid, CoreSchedulingScope::Thread);
    let bundle = tempfile::tempdir().unwrap();
    let output = start(bundle.path(), "true");
    match cookie(getpid()) {
        Ok(mine) => {
            assert!(output.status.success());
            let answer = BootstrapResult::parse_from_bytes(&output.stdout).unwrap();
            let mut its = None;
            meet_and_end(&answer, |pid| its = cookie(pid).ok());
            assert!(its.is_some_and(|its| its != 0 && its != mine), "{its:?}");
        }
        Err(_) => {
            assert!(!output.status.success());
            let said = String::from_utf8_lossy(&output.stderr);
            assert!(said.contains("core scheduling"), "{said}");
            let left = fs::read_dir(bundle.path().join("sockets")).unwrap();
            assert_eq!(left.count(), 0);
        }
    }
}
