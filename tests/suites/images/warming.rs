//! `warm-start: auto`: the first container of a kind makes an image, the others start from it.

use crate::stage::{
    KUBECONFIG, POLICY, RESTORE_FROM, Stage, continues, counts_to, one_sentence, shell,
};
use anyhow::{Context, Result, ensure};
use rekindle_harness::container::Builder;
use rekindle_harness::{Container, Count, poll};
use serde_json::Value;

const START: &str = "rekindle.dev/warm-start";
const WHEN: &str = "rekindle.dev/warm-when";
const AFTER: &str = "rekindle.dev/after-restore";

/// A counter of a kind of its own, which is warm once it has a file.
fn counter<'s>(stage: &'s Stage, id: &str, kind: &str) -> Builder<'s> {
    let of_kind = stage.container(id).args(&["/counter"]);
    of_kind
        .env(&format!("KIND={kind}"))
        .annotation(START, "auto")
        .annotation(WHEN, "file:///ready")
}

/// What `image ls` tells of the image that a container has made of itself, once it is there.
async fn made_by(stage: &Stage, id: &str) -> Result<Value> {
    poll::until("an image for others of its kind", async || {
        let all: Vec<Value> =
            serde_json::from_slice(&stage.rekindle(&["image", "ls", "--json"]).await?.stdout)?;
        let made = |row: &Value| row["source"]["container"] == id;
        Ok(all.into_iter().find(made))
    })
    .await
}

/// The first line of a counter that started cold.
fn begins(count: &str) -> Result<()> {
    let first = Count::first(count).context("it said nothing")?;
    ensure!(first.n == 1, "it did not start cold: {first:?}");
    Ok(())
}

pub(crate) async fn the_second_of_a_kind_goes_on_where_the_first_was_warm(
    stage: &Stage,
) -> Result<()> {
    let first = counter(stage, "kind-1", "second").run().await?;
    let from = counts_to(first.io().out()?, 2).await?;
    shell(&first, "ready", "touch /ready").await?;
    let row = made_by(stage, "kind-1").await?;
    let name = row["name"].as_str().context("no name")?;
    ensure!(name.starts_with("auto-container-"), "{name}");
    let hash = row["source"]["warm"].as_str().context("no kind")?;
    ensure!(hash.len() == 64, "{row}");
    let at = counts_to(first.io().out()?, from.n).await?;
    let second = counter(stage, "kind-2", "second").run().await?;
    continues(&second, &from, at.n).await?;
    assert_eq!(shell(&second, "ls", "ls /ready").await?, "/ready");
    // Another kind has no part in it.
    let other = counter(stage, "kind-3", "another").run().await?;
    counts_to(other.io().out()?, 2).await?;
    begins(&other.io().out()?.so_far())?;
    // Nor does one that did not ask.
    let plain = stage
        .container("kind-4")
        .args(&["/counter"])
        .env("KIND=second")
        .run()
        .await?;
    counts_to(plain.io().out()?, 2).await?;
    begins(&plain.io().out()?.so_far())?;
    for task in [first, second, other, plain] {
        task.remove().await?;
    }
    // A person who removes it has it made anew.
    let removed = stage.rekindle(&["image", "rm", name]).await?;
    ensure!(removed.status.success(), "{removed:?}");
    let again = counter(stage, "kind-5", "second").run().await?;
    counts_to(again.io().out()?, 2).await?;
    begins(&again.io().out()?.so_far())?;
    shell(&again, "ready", "touch /ready").await?;
    assert_eq!(made_by(stage, "kind-5").await?["generation"], 2);
    again.remove().await
}

pub(crate) async fn a_damaged_image_goes_into_quarantine(stage: &Stage) -> Result<()> {
    let first = counter(stage, "bad-1", "bad").run().await?;
    shell(&first, "ready", "touch /ready").await?;
    let row = made_by(stage, "bad-1").await?;
    let name = row["name"].as_str().context("no name")?.to_owned();
    first.remove().await?;
    let damaged = stage.image("default", &name).join("criu/files.img");
    let mut bytes = std::fs::read(&damaged)?;
    let last = bytes.last_mut().context("it is empty")?;
    *last ^= 1;
    std::fs::write(&damaged, bytes)?;
    // It starts all the same, cold and from a clean root, and makes another one when it is warm.
    let second = counter(stage, "bad-2", "bad").run().await?;
    counts_to(second.io().out()?, 2).await?;
    begins(&second.io().out()?.so_far())?;
    let there = shell(&second, "ls", "ls /ready || echo none").await?;
    ensure!(there.ends_with("none"), "{there}");
    let ls = stage.rekindle(&["image", "ls"]).await?;
    let ls = String::from_utf8_lossy(&ls.stdout).into_owned();
    ensure!(
        ls.lines()
            .any(|line| line.contains(&name) && line.contains("quarantined")),
        "{ls}"
    );
    let shown = stage.rekindle(&["image", "show", &name, "--json"]).await?;
    let shown: Value = serde_json::from_slice(&shown.stdout)?;
    let why = shown["quarantined"].as_str().context("no reason")?;
    ensure!(why.contains("bad-2"), "{why}");
    ensure!(
        shown["kind"]["image"] == row["source"]["image_digest"],
        "{shown}"
    );
    let from = counts_to(second.io().out()?, 3).await?;
    shell(&second, "ready", "touch /ready").await?;
    assert_eq!(made_by(stage, "bad-2").await?["generation"], 2);
    let at = counts_to(second.io().out()?, from.n).await?;
    let third = counter(stage, "bad-3", "bad").run().await?;
    continues(&third, &from, at.n).await?;
    second.remove().await?;
    third.remove().await
}

/// It ends with 3 once it is told, which it is soon after each start.
pub(crate) async fn an_image_whose_containers_end_early_goes_into_quarantine(
    stage: &Stage,
) -> Result<()> {
    let line = "n=0; touch /ready; until [ -e /end ]; do n=$((n + 1)); echo at $n; sleep 0.1; done; exit 3";
    let start = async |id: &str| {
        let task = stage.container(id).shell(line);
        let task = task.annotation(START, "auto");
        task.annotation(WHEN, "file:///ready").run().await
    };
    let end = async |task: Container<'_>| {
        let heard = |text: &str| text.contains('\n');
        let said = task.io().out()?.until("its first line", heard).await?;
        shell(&task, "end", "touch /end").await?;
        ensure!(task.wait().await?.status == 3, "{said}");
        task.remove().await?;
        Ok::<_, anyhow::Error>(said.lines().next() == Some("at 1"))
    };
    let first = start("early-1").await?;
    let row = made_by(stage, "early-1").await?;
    ensure!(end(first).await?, "the first one starts cold");
    // Of the configuration's two failures each is one.
    for id in ["early-2", "early-3"] {
        ensure!(!end(start(id).await?).await?, "{id} is restored");
    }
    let name = row["name"].as_str().context("no name")?;
    poll::until("the quarantine", async || {
        let shown = stage
            .rekindle(&["image", "show", &format!("{name}@1"), "--json"])
            .await?;
        let shown: Value = serde_json::from_slice(&shown.stdout)?;
        let why = shown["quarantined"].as_str().unwrap_or_default();
        Ok(why.contains("early-3 ended with status 3").then_some(()))
    })
    .await?;
    ensure!(end(start("early-4").await?).await?, "it starts cold again");
    Ok(())
}

pub(crate) async fn of_many_at_once_one_makes_it(stage: &Stage) -> Result<()> {
    let mut tasks = Vec::new();
    for n in 1..=3 {
        let of_kind = stage.container(&format!("many-{n}")).args(&["/counter"]);
        let of_kind = of_kind.env("KIND=many").annotation(START, "auto");
        tasks.push(of_kind.annotation(WHEN, "after:2s").create().await?);
    }
    futures::future::try_join_all(tasks.iter().map(|task| task.start())).await?;
    let images = async || {
        let all: Vec<Value> =
            serde_json::from_slice(&stage.rekindle(&["image", "ls", "--json"]).await?.stdout)?;
        let of_many = |row: &&Value| {
            let of = row["source"]["container"].as_str();
            of.is_some_and(|of| of.starts_with("many-"))
        };
        Ok::<_, anyhow::Error>(all.iter().filter(of_many).count())
    };
    poll::until("an image", async || Ok((images().await? > 0).then_some(()))).await?;
    for task in &tasks {
        // Each was asked for two seconds ago, and goes on.
        let at = counts_to(task.io().out()?, 60).await?;
        counts_to(task.io().out()?, at.n + 20).await?;
    }
    assert_eq!(images().await?, 1);
    for task in tasks {
        task.remove().await?;
    }
    Ok(())
}

pub(crate) async fn it_is_told_after_its_restore(stage: &Stage) -> Result<()> {
    let line = "trap 'echo reseeded' USR1; while :; do sleep 0.05; done";
    let task = stage.container("hinted").shell(line).run().await?;
    shell(&task, "settle", "true").await?;
    stage.checkpoint("hinted", "hinted", &[]).await?;
    task.remove().await?;
    let from = |id: &str| {
        stage
            .container(id)
            .shell(line)
            .annotation(RESTORE_FROM, "hinted")
    };
    let signalled = from("hinted-2").annotation(AFTER, "SIGUSR1").run().await?;
    let heard = |text: &str| text.contains("reseeded");
    signalled.io().out()?.until("its word", heard).await?;
    signalled.remove().await?;
    // With the environment of the new container, and done when the start is.
    let command = r#"["sh", "-c", "echo $WHO > /told"]"#;
    let ran = from("hinted-3")
        .env("WHO=new")
        .annotation(AFTER, command)
        .run()
        .await?;
    assert_eq!(shell(&ran, "cat", "cat /told").await?, "new");
    ran.remove().await?;
    // One that fails is a restore that failed.
    let failing = from("hinted-4").annotation(AFTER, r#"["sh", "-c", "exit 4"]"#);
    let (task, created) = failing.try_create().await?;
    created.ok().context("it is told at its start")?;
    let refusal = task.start().await.err().context("it was started")?;
    one_sentence(&refusal, &["after-restore", "\"sh\""])?;
    task.delete().await?;
    stage.node.is_rid_of("hinted-4").await?;
    task.remove().await?;
    let cold = from("hinted-5")
        .annotation(AFTER, r#"["/absent"]"#)
        .annotation(POLICY, "Opportunistic");
    let cold = cold.run().await?;
    assert_eq!(
        shell(&cold, "ls", "ls /told || echo clean")
            .await?
            .lines()
            .last(),
        Some("clean")
    );
    cold.remove().await
}

/// Pods that differ as those of one deployment do.
pub(crate) async fn pods_of_one_deployment_share_it(stage: &Stage) -> Result<()> {
    let cri = stage.node.cri().await?;
    let line = "mkdir -p /www; echo fine > /www/health; httpd -f -p 8080 -h /www & exec /counter";
    let pod = |name: &str| {
        let pod = cri.pod(name).annotation(START, "auto");
        pod.annotation(WHEN, "http://:8080/health")
            .annotation("rekindle.dev/warm-ignore-env", "POD_IP")
    };
    let first = pod("server-7f-a").run().await?;
    let task = |ip: &str, name: &str, service: &str| {
        [
            ("POD_NAME", name.to_owned()),
            ("POD_IP", ip.to_owned()),
            (&*format!("{service}_SERVICE_HOST"), "10.0.0.1".to_owned()),
            (&*format!("{service}_SERVICE_PORT"), "80".to_owned()),
            (&*format!("{service}_PORT"), "tcp://10.0.0.1:80".to_owned()),
        ]
        .map(|(key, value)| (key.to_owned(), value))
    };
    let mut container = first.container("main").shell(line);
    for (key, value) in task(first.address(), "server-7f-a", "REDIS") {
        container = container.env(&key, &value);
    }
    let one = container.run().await?;
    let from = one.counts_to(2).await?;
    if !stage.dumps_tcp_of("server-7f-a/main").await? {
        return first.remove().await;
    }
    let all = || async {
        let all: Vec<Value> =
            serde_json::from_slice(&stage.rekindle(&["image", "ls", "--json"]).await?.stdout)?;
        let of_pod = |row: &Value| row["source"]["pod"] == "default/server-7f-a";
        Ok::<_, anyhow::Error>(all.into_iter().find(of_pod))
    };
    let row = poll::until("an image", all).await?;
    ensure!(
        row["name"]
            .as_str()
            .is_some_and(|name| name.starts_with("auto-main-")),
        "{row}"
    );
    let at = one.counts_to(from.n).await?;
    let second = pod("server-7f-b").run().await?;
    let mut container = second.container("main").shell(line);
    for (key, value) in task(second.address(), "server-7f-b", "MYSQL") {
        container = container.env(&key, &value);
    }
    let two = container.run().await?;
    let count = two.counts_to(at.n + 3).await?;
    from.continues_in(&two.said("stdout")?, at.n)?;
    ensure!(count.nonce == from.nonce, "{count:?}");
    assert_eq!(
        two.shell("wget -q -O - http://127.0.0.1:8080/health")
            .await?,
        "fine"
    );
    first.remove().await?;
    second.remove().await
}

/// The images that containers of pods have made of themselves.
async fn made_of(stage: &Stage, pod: &str) -> Result<Option<Value>> {
    let ls = stage.rekindle(&["image", "ls", "--json"]).await?;
    let all: Vec<Value> = serde_json::from_slice(&ls.stdout)?;
    Ok(all.into_iter().find(|row| row["source"]["pod"] == pod))
}

/// With nothing but `warm-start: auto`: the apiserver knows when.
pub(crate) async fn a_pod_that_is_ready_is_imaged(stage: &Stage) -> Result<()> {
    let cri = stage.node.cri().await?;
    let pods = stage.apiserver.pods("default").await?;
    let pod = async |name: &str| {
        let uid = pods.create(name, "node").await?;
        let pod = cri.pod(name).uid(&uid).annotation(START, "auto");
        pod.run().await
    };
    let first = pod("probed-a").await?;
    let one = first.container("main").env("KIND", "probed");
    let one = one.args(&["/counter"]).run().await?;
    one.counts_to(2).await?;
    // It runs, and so does one beside it that is ready; of itself nothing is known, and then that it is not.
    pods.status("probed-a", "main", "its-predecessor", true)
        .await?;
    pods.status("probed-a", "main", one.id(), false).await?;
    let from = one.counts_to(60).await?;
    ensure!(
        made_of(stage, "default/probed-a").await?.is_none(),
        "imaged before it was ready"
    );
    pods.status("probed-a", "main", one.id(), true).await?;
    poll::until("an image", async || {
        made_of(stage, "default/probed-a").await
    })
    .await?;
    let at = one.counts_to(from.n).await?;
    let second = pod("probed-b").await?;
    let two = second.container("main").env("KIND", "probed");
    let two = two.args(&["/counter"]).run().await?;
    let count = two.counts_to(at.n + 3).await?;
    from.continues_in(&two.said("stdout")?, at.n)?;
    ensure!(count.nonce == from.nonce, "{count:?}");
    first.remove().await?;
    second.remove().await?;
    // Nobody knows of one that `ctr` has made.
    let alone = stage.container("unprobed").args(&["/counter"]);
    let words = ["warm-when", "no pod's", "http://:PORT/PATH"];
    stage
        .refuses("unprobed", alone.annotation(START, "auto"), &words)
        .await?;
    Ok(())
}

/// It is said at its create, and it starts.
pub(crate) async fn without_a_kubeconfig_no_image_is_made(stage: &Stage) -> Result<()> {
    let cri = stage.node.cri().await?;
    let file = stage.node.path(KUBECONFIG);
    let text = std::fs::read(&file)?;
    std::fs::remove_file(&file)?;
    let pod = cri.pod("unknown").annotation(START, "auto").run().await?;
    let task = pod.container("main").args(&["/counter"]).run().await;
    let said = stage
        .node
        .logs(&[
            task.as_ref().map_or("", |task| task.id()),
            "no image will be made",
            KUBECONFIG,
        ])
        .await;
    std::fs::write(&file, text)?;
    task?.counts_to(2).await?;
    said?;
    ensure!(made_of(stage, "default/unknown").await?.is_none());
    pod.remove().await
}
