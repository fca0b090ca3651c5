//! What the shim relies on: the lines of `rekindle prefetch --json`, and its exit codes.
#![allow(
    clippy::unwrap_used,
    reason = "helpers of tests, which clippy does not know for tests"
)]

use std::{
    fs,
    io::{BufRead, BufReader},
    net::TcpListener,
    path::Path,
    process::{Command, Output, Stdio},
};

use serde_json::Value;
use tempfile::TempDir;

mod schema;

fn node(store: &str) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    let root = folder.path();
    fs::create_dir_all(root.join("allowed/m")).unwrap();
    fs::write(root.join("allowed/m/a"), vec![7; 5_000_000]).unwrap();
    let config = format!(
        "[datasets]\nroot = {:?}\n[[datasets.source]]\nallow = \"file://{}/allowed/\"\n\
         namespaces = [\"default\"]\n[[datasets.source]]\nallow = \"s3://bucket/\"\n\
         namespaces = [\"default\"]\nanonymous = true\nendpoint = \"http://{store}\"\n",
        root.join("cache"),
        root.display()
    );
    fs::write(root.join("config.toml"), config).unwrap();
    folder
}

fn rekindle(node: &Path, args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_rekindle"));
    command
        .arg("--config")
        .arg(node.join("config.toml"))
        .args(args);
    command
}

fn lines(output: &Output) -> Vec<Value> {
    schema::check(&["prefetch", "--json"], &output.stdout);
    let text = String::from_utf8(output.stdout.clone()).unwrap();
    text.lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect()
}

#[test]
fn the_lines_of_a_success() {
    let node = node("127.0.0.1:1");
    let uri = format!("file://{}/allowed/m/", node.path().display());
    for hit in [false, true] {
        let ran = rekindle(node.path(), &["prefetch", "--json", &uri])
            .output()
            .unwrap();
        assert_eq!(ran.status.code(), Some(0), "{ran:?}");
        let lines = lines(&ran);
        assert_eq!(lines[0]["event"], "listing");
        let progress = lines.iter().find(|line| line["event"] == "progress");
        assert_eq!(progress.is_none(), hit);
        if let Some(progress) = progress {
            for key in [
                "done",
                "total",
                "files_done",
                "files_total",
                "bytes_per_second",
            ] {
                assert!(progress[key].is_u64(), "{key}: {progress}");
            }
        }
        let last = lines.last().unwrap();
        assert_eq!(
            (&last["event"], &last["hit"]),
            (&"ready".into(), &hit.into())
        );
        assert_eq!(
            (&last["files"], &last["bytes"]),
            (&1.into(), &5_000_000.into())
        );
        assert_eq!(last["verified"], "transport-only");
        assert_eq!(last["version"].as_str().unwrap().len(), 32);
        let path = Path::new(last["path"].as_str().unwrap());
        assert_eq!(fs::read(path.join("a")).unwrap(), vec![7; 5_000_000]);
    }
}

#[test]
fn exit_codes() {
    // Accepts nothing, but listens: the kernel completes the handshake, and no answer comes.
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let node = node(&silent.local_addr().unwrap().to_string());
    let missing = format!("file://{}/allowed/none/", node.path().display());
    for (args, code, retryable) in [
        (
            vec!["--namespace", "other", "s3://bucket/m/"],
            3,
            Some(false),
        ),
        (vec!["s3://elsewhere/m/"], 3, Some(false)),
        (vec![missing.as_str()], 1, Some(false)),
        (
            vec!["--deadline", "100ms", "s3://bucket/m/"],
            75,
            Some(true),
        ),
        (vec!["s3://bucket/../m/"], 2, None),
        (vec!["--namespace", "../x", "s3://bucket/m/"], 2, None),
        (vec!["--deadline", "5", "s3://bucket/m/"], 2, None),
    ] {
        let all = [vec!["prefetch", "--json"], args.clone()].concat();
        let ran = rekindle(node.path(), &all).output().unwrap();
        assert_eq!(ran.status.code(), Some(code), "{args:?}: {ran:?}");
        let lines = lines(&ran);
        let last = lines.last();
        assert_eq!(
            last.map(|last| last["event"] == "failed"),
            retryable.map(|_| true)
        );
        let found = last.and_then(|last| last["retryable"].as_bool());
        assert_eq!(found, retryable, "{args:?}");
    }
}

#[test]
fn sigterm_ends_it_in_words() {
    let silent = TcpListener::bind("127.0.0.1:0").unwrap();
    let node = node(&silent.local_addr().unwrap().to_string());
    let mut running = rekindle(node.path(), &["prefetch", "--json", "s3://bucket/m/"])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdout = BufReader::new(running.stdout.take().unwrap());
    let mut line = String::new();
    stdout.read_line(&mut line).unwrap();
    assert!(line.contains("listing"), "{line}");
    let pid = rustix::process::Pid::from_child(&running);
    rustix::process::kill_process(pid, rustix::process::Signal::TERM).unwrap();
    line.clear();
    stdout.read_line(&mut line).unwrap();
    let last: Value = serde_json::from_str(&line).unwrap();
    assert_eq!(
        (&last["event"], &last["retryable"]),
        (&"failed".into(), &true.into())
    );
    assert_eq!(running.wait().unwrap().code(), Some(75));
}
