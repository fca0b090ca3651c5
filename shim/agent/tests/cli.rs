//! The program as a person meets it: no containerd, no root.
#![allow(clippy::unwrap_used)]

use std::{
    fs,
    os::unix::net::UnixListener,
    process::{Command, Output},
};

fn rekindle(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_rekindle"))
        .args(args)
        .env_remove("REKINDLE_LOG")
        .output()
        .unwrap()
}

fn stdout(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).unwrap()
}

fn stderr(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).unwrap()
}

#[test]
fn help_of_every_command_shows_examples_and_exit_codes() {
    let top = rekindle(&["--help"]);
    assert_eq!(top.status.code(), Some(0));
    for code in ["0  done", "3  refused", "4  no such"] {
        assert!(stdout(&top).contains(code), "{}", stdout(&top));
    }
    assert!(
        !stdout(&top).contains("container-image"),
        "it is the shim's, not a person's"
    );
    for command in [
        "checkpoint",
        "image",
        "prefetch",
        "dataset",
        "doctor",
        "completion",
    ] {
        assert!(stdout(&top).contains(command), "{command}");
        let help = rekindle(&[command, "--help"]);
        assert_eq!(help.status.code(), Some(0), "{command}");
        assert!(
            stdout(&help).contains("Examples:"),
            "{command}: {}",
            stdout(&help)
        );
    }
}

#[test]
fn wrong_usage_exits_with_2() {
    for args in [
        &["no-such-command"][..],
        &[],
        &["checkpoint"],
        &["checkpoint", "demo"],
        &["checkpoint", "demo", "--name", "../up"],
        &["checkpoint", "demo", "--name", "warm", "--timeout", "5"],
        &["completion", "tcsh"],
        &["container-image", "--id", "x"],
    ] {
        let output = rekindle(args);
        assert_eq!(
            output.status.code(),
            Some(2),
            "{args:?}: {}",
            stderr(&output)
        );
    }
}

#[test]
fn a_broken_configuration_is_told_and_does_not_break_completion() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("config.toml");
    fs::write(&file, "[images]\nrooot = \"/srv\"\n").unwrap();
    let file = file.to_str().unwrap();

    let output = rekindle(&["--config", file, "doctor"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(
        stderr(&output).contains("rooot") && stderr(&output).contains(file),
        "{}",
        stderr(&output)
    );

    let absent = rekindle(&["--config", "/nowhere/config.toml", "doctor"]);
    assert_eq!(
        absent.status.code(),
        Some(1),
        "only the usual file may be absent"
    );
    assert!(
        stderr(&absent).contains("/nowhere/config.toml"),
        "{}",
        stderr(&absent)
    );

    assert_eq!(
        rekindle(&["--config", file, "completion", "bash"])
            .status
            .code(),
        Some(0)
    );
}

#[test]
fn doctor_answers_in_json_with_a_configuration_that_can_be_read() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("config.toml");
    let root = folder.path().join("images");
    fs::write(&file, format!("[images]\nroot = {root:?}\n")).unwrap();
    let args = [
        "--config",
        file.to_str().unwrap(),
        "doctor",
        "--json",
        "--address",
        "/nowhere/containerd.sock",
    ];
    let output = rekindle(&args);
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(report["config"]["images"]["root"], root.to_str().unwrap());
    let checks = report["checks"].as_array().unwrap();
    let state = |name: &str| {
        let check = checks.iter().find(|check| check["name"] == name).unwrap();
        check["state"].as_str().unwrap().to_owned()
    };
    assert_eq!(state("containerd"), "failed");
    assert_eq!(state("images.root"), "passed");
    assert_eq!(
        (output.status.code(), report["ok"].as_bool()),
        (Some(1), Some(false))
    );
    for check in checks {
        let advised = check["advice"].is_string();
        assert_eq!(
            advised,
            check["state"] != "passed",
            "what is wrong says what to do: {check}"
        );
    }
}

#[test]
fn completion_is_printed_for_each_shell() {
    for shell in ["bash", "zsh", "fish"] {
        let output = rekindle(&["completion", shell]);
        assert_eq!(output.status.code(), Some(0), "{shell}");
        assert!(stdout(&output).contains("checkpoint"), "{shell}");
    }
}

#[test]
fn no_containerd_is_said_in_one_sentence_that_names_the_socket() {
    let folder = tempfile::tempdir().unwrap();
    let absent = folder.path().join("absent.sock");
    let deaf = folder.path().join("deaf.sock");
    drop(UnixListener::bind(&deaf).unwrap());
    for socket in [absent, deaf] {
        let socket = socket.to_str().unwrap();
        let output = rekindle(&["checkpoint", "demo", "--name", "warm", "--address", socket]);
        assert_eq!(output.status.code(), Some(1));
        assert!(stderr(&output).contains(socket), "{}", stderr(&output));
        assert_eq!(stderr(&output).lines().count(), 1, "{}", stderr(&output));
    }
}

#[test]
fn colours_are_for_terminals() {
    let output = rekindle(&["doctor", "--address", "/nowhere/containerd.sock"]);
    assert!(!stdout(&output).contains('\x1b'), "{}", stdout(&output));
    assert!(
        stdout(&output).contains("# the resolved configuration"),
        "{}",
        stdout(&output)
    );
}

/// As behind `| head`.
#[test]
fn nobody_reading_is_no_error() {
    let folder = tempfile::tempdir().unwrap();
    let config = folder.path().join("config.toml");
    let root = folder.path().join("images");
    fs::write(&config, format!("[images]\nroot = {root:?}\n")).unwrap();
    let (reader, writer) = std::io::pipe().unwrap();
    drop(reader);
    let ended = Command::new(env!("CARGO_BIN_EXE_rekindle"))
        .args(["--config", config.to_str().unwrap(), "image", "ls"])
        .env_remove("REKINDLE_LOG")
        .stdout(writer)
        .output()
        .unwrap();
    assert!(
        ended.status.success() && ended.stderr.is_empty(),
        "{ended:?}"
    );
}
