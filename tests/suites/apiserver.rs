//! What is asked of an apiserver, and what comes of it when it is away, does not want to say, or has another pod of that
//! name. Neither a node nor root is needed; `make test-kube` asks a real one.
#![allow(
    clippy::unwrap_used,
    reason = "helpers of tests, which clippy does not know for tests"
)]

use rekindle_harness::cli;
use rekindle_harness::kube::{Apiserver, Pods, Who};
use rekindle_harness::poll::{self, patient};
use std::fs;
use std::path::PathBuf;
use std::process::{Output, Stdio};
use std::time::Duration;
use tempfile::TempDir;
use tokio::process::{Child, Command};

const NODE: &str = "node-1";
const ID: &str = "0123456789abcdef";

/// An apiserver, and a kubelet's kubeconfig.
struct Stage {
    apiserver: Apiserver,
    pods: Pods,
    folder: TempDir,
}

impl Stage {
    async fn new() -> Stage {
        let apiserver = Apiserver::start().await.unwrap();
        let pods = apiserver.pods("default").await.unwrap();
        let folder = tempfile::tempdir().unwrap();
        let stage = Stage {
            apiserver,
            pods,
            folder,
        };
        stage.write(Who::Node(NODE));
        stage
    }

    fn kubeconfig(&self) -> PathBuf {
        self.folder.path().join("kubelet.conf")
    }

    fn write(&self, who: Who<'_>) {
        let text = self.apiserver.kubeconfig(who).unwrap();
        fs::write(self.kubeconfig(), text).unwrap();
    }

    /// `rekindle await ready`, as the shim starts it.
    fn awaits(&self, pod: &str, uid: &str, within: &str) -> Child {
        let (pod, kubeconfig) = (format!("default/{pod}"), self.kubeconfig());
        Command::new(cli().unwrap())
            .args(["await", "--pid", "1", "--within", within, "ready"])
            .args(["--pod", &pod, "--uid", uid, "--container", ID])
            .arg("--kubeconfig")
            .arg(kubeconfig)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .unwrap()
    }

    /// `rekindle doctor`, with a configuration that names the kubeconfig.
    async fn doctor(&self) -> (String, String) {
        let config = self.folder.path().join("config.toml");
        let text = format!("[kubernetes]\nkubeconfig = {:?}\n", self.kubeconfig());
        fs::write(&config, text).unwrap();
        let output = Command::new(cli().unwrap())
            .arg("--config")
            .arg(config)
            .args(["doctor", "--json"])
            .output();
        let report: serde_json::Value =
            serde_json::from_slice(&output.await.unwrap().stdout).unwrap();
        let checks = report["checks"].as_array().unwrap();
        let check = checks.iter().find(|check| check["name"] == "apiserver");
        let text = |key: &str| check.unwrap()[key].as_str().unwrap().to_owned();
        (text("state"), text("found"))
    }
}

async fn ended(child: Child) -> Output {
    let limit = patient(Duration::from_secs(60));
    let output = tokio::time::timeout(limit, child.wait_with_output());
    output.await.expect("it did not end").unwrap()
}

/// It has become ready.
async fn succeeds(child: Child) {
    let output = ended(child).await;
    assert!(output.status.success(), "{output:?}");
    assert!(output.stdout.is_empty(), "{output:?}");
}

/// It is given up, with one line that has all of `words`.
async fn gives_up(child: Child, words: &[&str]) {
    let output = ended(child).await;
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    let said = String::from_utf8(output.stdout).unwrap();
    assert_eq!(said.lines().count(), 1, "{said}");
    for word in words {
        assert!(said.contains(word), "{word:?} is not in {said}");
    }
}

/// It waits, after it has been given the time to find that it need not.
async fn waits(child: &mut Child) {
    tokio::time::sleep(Duration::from_secs(2)).await;
    assert_eq!(child.try_wait().unwrap(), None);
}

#[tokio::test]
async fn it_waits_for_the_containers_own_readiness() {
    let stage = Stage::new().await;
    let uid = stage.pods.create("web-0", NODE).await.unwrap();
    let mut child = stage.awaits("web-0", &uid, "5m");
    waits(&mut child).await;
    // What it was before it was started again; then itself, on its way.
    let status =
        async |id: &str, ready| stage.pods.status("web-0", "main", id, ready).await.unwrap();
    status("fedcba", true).await;
    status(ID, false).await;
    waits(&mut child).await;
    status(ID, true).await;
    succeeds(child).await;
    // And who comes later need not wait.
    succeeds(stage.awaits("web-0", &uid, "5m")).await;
}

#[tokio::test]
async fn a_pod_that_goes_or_is_replaced_is_given_up() {
    let stage = Stage::new().await;
    let uid = stage.pods.create("web-0", NODE).await.unwrap();
    let mut child = stage.awaits("web-0", &uid, "5m");
    waits(&mut child).await;
    stage.pods.delete("web-0").await.unwrap();
    gives_up(child, &["default/web-0", &uid, "deleted"]).await;
    // A node is not told whether there is a pod that is not its own.
    stage.write(Who::Admin);
    let none = stage.awaits("web-0", &uid, "5m");
    gives_up(none, &["default/web-0", "no such pod"]).await;
    stage.write(Who::Node(NODE));
    let other = stage.pods.create("web-0", NODE).await.unwrap();
    stage.pods.status("web-0", "main", ID, true).await.unwrap();
    let replaced = stage.awaits("web-0", &uid, "5m");
    gives_up(replaced, &["default/web-0", "another pod"]).await;
    succeeds(stage.awaits("web-0", &other, "5m")).await;
}

#[tokio::test]
async fn an_apiserver_that_is_away_is_asked_again() {
    let mut stage = Stage::new().await;
    let uid = stage.pods.create("web-0", NODE).await.unwrap();
    stage.apiserver.stop().await.unwrap();
    let mut before = stage.awaits("web-0", &uid, "5m");
    waits(&mut before).await;
    let late = stage.awaits("web-0", &uid, "1s");
    gives_up(late, &["not within 1 s", "apiserver", "refused"]).await;
    stage.apiserver.go_on().await.unwrap();
    let mut beside = stage.awaits("web-0", &uid, "5m");
    waits(&mut beside).await;
    // In the middle of what it watches.
    stage.apiserver.stop().await.unwrap();
    waits(&mut beside).await;
    stage.apiserver.go_on().await.unwrap();
    let pods = &stage.pods;
    poll::until("the apiserver to take it", async || {
        Ok(pods.status("web-0", "main", ID, true).await.ok())
    })
    .await
    .unwrap();
    succeeds(before).await;
    succeeds(beside).await;
}

#[tokio::test]
async fn one_that_is_not_ready_in_time_is_told() {
    let stage = Stage::new().await;
    let uid = stage.pods.create("web-0", NODE).await.unwrap();
    let late = stage.awaits("web-0", &uid, "3s");
    gives_up(late, &["not within 3 s", "default/web-0", "not ready"]).await;
    fs::remove_file(stage.kubeconfig()).unwrap();
    let without = stage.awaits("web-0", &uid, "1s");
    let file = stage.kubeconfig().display().to_string();
    gives_up(without, &["not within 1 s", "kubeconfig", &file]).await;
}

#[tokio::test]
async fn a_refusal_is_final_and_one_sentence() {
    let stage = Stage::new().await;
    let uid = stage.pods.create("web-0", NODE).await.unwrap();
    stage.write(Who::Nobody);
    let unknown = stage.awaits("web-0", &uid, "5m");
    gives_up(unknown, &["default/web-0", "answers 401", "kubelet.conf"]).await;
    stage.write(Who::Node("node-2"));
    let anothers = stage.awaits("web-0", &uid, "5m");
    gives_up(anothers, &["default/web-0", "answers 403", "node-2"]).await;
    // Credentials are read each time: what is put in order meanwhile is.
    stage.write(Who::Nobody);
    let child = stage.awaits("web-0", &uid, "5m");
    stage.write(Who::Node(NODE));
    stage.pods.status("web-0", "main", ID, true).await.unwrap();
    succeeds(child).await;
}

#[tokio::test]
async fn doctor_asks_it() {
    let mut stage = Stage::new().await;
    let (state, found) = stage.doctor().await;
    assert_eq!(state, "passed", "{found}");
    assert!(found.contains("https://127.0.0.1:"), "{found}");
    stage.write(Who::Nobody);
    let (state, found) = stage.doctor().await;
    assert_eq!(state, "failed", "{found}");
    assert!(found.contains("401"), "{found}");
    stage.write(Who::Node(NODE));
    stage.apiserver.stop().await.unwrap();
    let (state, found) = stage.doctor().await;
    assert_eq!(state, "failed", "{found}");
    assert!(found.contains("refused"), "{found}");
    fs::remove_file(stage.kubeconfig()).unwrap();
    let (state, found) = stage.doctor().await;
    assert_eq!(state, "failed", "{found}");
    assert!(found.contains("kubelet.conf"), "{found}");
}
