//! Checkpoint archives of containerd: into images, and images into them.

use crate::stage::{RESTORE_FROM, Stage, counts_to};
use anyhow::{Context, Result, ensure};
use rekindle_harness::cri::CriContainer;
use rekindle_harness::{Count, Suite};
use serde_json::Value;
use std::io::{BufRead, BufReader, Write as _};
use std::net::TcpListener;

const FORCE: &str = "rekindle.dev/restore-force";
/// It writes into its layer, and removes what its image has there.
const LIVED_IN: &str = "echo kept > /root/note; rm /etc/group; exec /counter";

/// `rekindle image …`, which must work; what it tells.
async fn image(stage: &Stage, args: &[&str]) -> Result<Value> {
    let args = [&["image"], args, &["--json"]].concat();
    let done = stage.rekindle(&args).await?;
    ensure!(done.status.success(), "{args:?}: {done:?}");
    Ok(serde_json::from_slice(&done.stdout)?)
}

/// A pod's container goes on where `before` was, with what it had written.
async fn went_on(warm: &CriContainer<'_, '_>, before: &Count, at: &Count) -> Result<()> {
    warm.counts_to(at.n + 3).await?;
    before.continues_in(&warm.said("stdout")?, at.n)?;
    let found = warm
        .shell("cat /root/note; test ! -e /etc/group && echo gone")
        .await?;
    assert_eq!(found, "kept\ngone");
    Ok(())
}

/// A pod that is dumped as the kubelet does it, imported, and gone on with in another one.
async fn from_the_kubelet(stage: &Stage, name: &str) -> Result<Value> {
    let cri = stage.node.cri().await?;
    let old_name = format!("{name}-old");
    let old = cri.pod(&old_name).run().await?;
    let task = old.container("main").shell(LIVED_IN).run().await?;
    let before = task.counts_to(5).await?;
    let file = format!("/tmp/{name}.tar");
    task.checkpoint(&file)
        .await
        .context("CheckpointContainer")?;
    let at = task.counts_to(before.n).await?;
    old.remove().await?;
    let told = image(stage, &["import", &file, "--name", name]).await?;
    assert_eq!(told["image"], format!("default/{name}@1"));

    // What is not known is not guessed.
    let cold = cri.pod(&format!("{name}-asked"));
    let cold = cold.annotation(RESTORE_FROM, name).run().await?;
    let task = cold.container("main").shell(LIVED_IN).create().await?;
    let refused = task.start().await.err().context("it was guessed")?;
    ensure!(
        refused
            .message()
            .contains("/dev/shm of its pod is not known"),
        "{refused}"
    );
    cold.remove().await?;

    let new = cri.pod(&format!("{name}-new"));
    let new = new.annotation(RESTORE_FROM, name);
    let new = new.annotation(FORCE, "host").run().await?;
    let warm = new.container("main").shell(LIVED_IN).run().await?;
    went_on(&warm, &before, &at).await?;
    new.remove().await?;
    Ok(told)
}

pub(crate) async fn the_kubelets_becomes_an_image(stage: &Stage) -> Result<()> {
    if stage.node.suite() == Suite::Trixie {
        // containerd 1.7 does not have the call.
        return Ok(());
    }
    let told = from_the_kubelet(stage, "kubelets").await?;
    // A shim of ours tells what made it.
    assert_eq!(told["unknown"], serde_json::json!(["shm"]));
    Ok(())
}

/// Nobody kept what the process has open there, so there is no image of it.
pub(crate) async fn a_file_of_the_pods_shm_that_nobody_kept_is_told(stage: &Stage) -> Result<()> {
    if stage.node.suite() == Suite::Trixie {
        return Ok(());
    }
    let cri = stage.node.cri().await?;
    let pod = cri.pod("lost-shm").run().await?;
    let line = "exec 3<>/dev/shm/held; exec /counter";
    let task = pod.container("main").shell(line).run().await?;
    task.counts_to(3).await?;
    task.checkpoint("/tmp/lost-shm.tar").await?;
    let args = ["image", "import", "/tmp/lost-shm.tar", "--name", "lost-shm"];
    let refused = stage.rekindle(&args).await?;
    let said = String::from_utf8_lossy(&refused.stderr);
    ensure!(
        refused.status.code() == Some(1) && said.contains("a process has \"dev/shm/held\" open")
            || said.contains("a process has \"/dev/shm/held\" open"),
        "{said}"
    );
    ensure!(
        !stage.images().await?.contains(&"lost-shm".to_owned()),
        "there is an image"
    );
    pod.remove().await
}

pub(crate) async fn what_ctr_exports_becomes_an_image(stage: &Stage) -> Result<()> {
    let (task, before) = stage.lived_in("ctrs").await?;
    let name = "localhost/ctrs:checkpoint";
    let node = &stage.node;
    let make = [
        "ctr",
        "-n",
        "default",
        "containers",
        "checkpoint",
        "--image",
        "--rw",
        "--task",
    ];
    let make = [&make[..], &["ctrs", name]].concat();
    let made = node.command(&make).output()?;
    ensure!(made.status.success(), "{made:?}");
    let at = counts_to(task.io().out()?, before.n).await?;
    task.remove().await?;
    let file = "/tmp/ctrs.tar";
    let export = [
        "ctr",
        "-n",
        "default",
        "images",
        "export",
        "--skip-manifest-json",
        file,
        name,
    ];
    let exported = node.command(&export).output()?;
    ensure!(exported.status.success(), "{exported:?}");
    let told = image(stage, &["import", file, "--name", "ctrs"]).await?;
    assert_eq!(told["image"], "default/ctrs@1");
    assert_eq!(told["unknown"], serde_json::json!([]));

    let warm = stage.warm("ctrs-2", "ctrs").run().await?;
    let count = counts_to(warm.io().out()?, at.n + 3).await?;
    assert_eq!(count.nonce, before.nonce);
    let read = "cat /root/note /dev/shm/note; test ! -e /etc/group && echo gone";
    let found = shell(stage, "ctrs-2", read).await?;
    assert_eq!(found, "kept\nshared\ngone\n");
    warm.remove().await?;

    // One byte of its memory is another one by now.
    let path = node.path(file);
    let mut bytes = std::fs::read(&path)?;
    let nonce = bytes
        .windows(36)
        .position(|text| text == before.nonce.as_bytes());
    bytes[nonce.context("its nonce is not in the archive")?] ^= 1;
    std::fs::write(&path, &bytes)?;
    let refused = stage
        .rekindle(&["image", "import", file, "--name", "spoilt"])
        .await?;
    let said = String::from_utf8_lossy(&refused.stderr);
    ensure!(said.contains("does not have the digest"), "{said}");
    ensure!(
        !stage.images().await?.contains(&"spoilt".to_owned()),
        "there is an image"
    );
    Ok(())
}

async fn shell(stage: &Stage, id: &str, line: &str) -> Result<String> {
    let exec = [
        "ctr",
        "-n",
        "default",
        "tasks",
        "exec",
        "--exec-id",
        "look",
        id,
        "sh",
        "-c",
        line,
    ];
    let done = stage.node.command(&exec).output()?;
    ensure!(done.status.success(), "{done:?}");
    Ok(String::from_utf8(done.stdout)?)
}

/// A named image, written as an archive, and restored from it by containerd itself: by its own shim, and by ours.
pub(crate) async fn an_exported_one_is_restored_by_containerd(stage: &Stage) -> Result<()> {
    if stage.node.suite() == Suite::Trixie {
        // containerd 1.7 does not restore from archives.
        return Ok(());
    }
    let cri = stage.node.cri().await?;
    let old = cri.pod("exported-old").run().await?;
    let task = old.container("main").shell(LIVED_IN).run().await?;
    let before = task.counts_to(5).await?;
    stage
        .checkpoint("exported-old/main", "exported", &["--exit"])
        .await?;
    task.ended().await?;
    let at = Count::last(&task.said("stdout")?).context("the counter said nothing")?;
    old.remove().await?;
    let file = "/tmp/exported.tar";
    image(stage, &["export", "default/exported", file]).await?;
    let _registry = registry(stage)?;
    for handler in ["runc", "rekindle"] {
        let pod = cri
            .pod(&format!("exported-{handler}"))
            .handler(handler)
            .run()
            .await?;
        let warm = pod.container("main").image(file).run().await?;
        went_on(&warm, &before, &at).await.context(handler)?;
        pod.remove().await?;
    }
    // It is there, and stays as it is.
    let again = stage
        .rekindle(&["image", "export", "default/exported", file])
        .await?;
    ensure!(!again.status.success(), "it was replaced");
    // And comes back as an image, with all that is known of it.
    let told = image(stage, &["import", file, "--name", "exported-again"]).await?;
    assert_eq!(told["unknown"], serde_json::json!([]));
    let new = cri
        .pod("exported-again")
        .annotation(RESTORE_FROM, "exported-again")
        .run()
        .await?;
    let warm = new.container("main").shell(LIVED_IN).run().await?;
    went_on(&warm, &before, &at).await?;
    new.remove().await
}

/// containerd pulls the container image before it restores, though it has it: something has to answer at
/// `localhost` of the node.
fn registry(stage: &Stage) -> Result<std::thread::JoinHandle<()>> {
    let node = &stage.node;
    let namespace = std::fs::File::open(format!("/proc/{}/ns/net", node.pid()))?;
    let listener = std::thread::spawn(move || {
        // Of this thread alone, which ends with it.
        nix::sched::setns(namespace, nix::sched::CloneFlags::CLONE_NEWNET)?;
        Ok::<_, anyhow::Error>(TcpListener::bind("127.0.0.1:80")?)
    });
    let listener = listener
        .join()
        .map_err(|_| anyhow::anyhow!("no listener"))??;
    let get = |digest: &str| -> Result<Vec<u8>> {
        let get = node
            .command(&["ctr", "-n", "k8s.io", "content", "get", digest])
            .output()?;
        ensure!(get.status.success(), "{get:?}");
        Ok(get.stdout)
    };
    let listed = node
        .command(&[
            "ctr",
            "-n",
            "k8s.io",
            "images",
            "ls",
            "name==localhost/busybox:test",
        ])
        .output()?;
    let listed = String::from_utf8(listed.stdout)?;
    let row: Vec<&str> = listed
        .lines()
        .nth(1)
        .context("no image")?
        .split_whitespace()
        .collect();
    let [_, kind, digest, ..] = row[..] else {
        anyhow::bail!("{listed}");
    };
    let (kind, digest, body) = (kind.to_owned(), digest.to_owned(), get(digest)?);
    Ok(std::thread::spawn(move || {
        for connection in listener.incoming().flatten() {
            let mut lines = BufReader::new(&connection).lines().map_while(Result::ok);
            let request = lines.next().unwrap_or_default();
            lines.take_while(|line| !line.is_empty()).for_each(drop);
            let head = format!(
                "HTTP/1.1 200 OK\r\nContent-Type: {kind}\r\nDocker-Content-Digest: {digest}\r\nContent-Length: {}\r\nConnection: close\r\n\r\n",
                body.len()
            );
            let mut out = &connection;
            let found = request.contains(&digest);
            let _ = match (found, request.starts_with("HEAD")) {
                (false, _) => out.write_all(
                    b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\nConnection: close\r\n\r\n",
                ),
                (true, true) => out.write_all(head.as_bytes()),
                (true, false) => out
                    .write_all(head.as_bytes())
                    .and_then(|()| out.write_all(&body)),
            };
        }
    }))
}

/// A namespace that has a key: what is imported is encrypted, and what is exported is said to be in clear.
pub(crate) async fn a_namespace_with_a_key_has_it_encrypted(stage: &Stage) -> Result<()> {
    if stage.node.suite() == Suite::Trixie {
        return Ok(());
    }
    let cri = stage.node.cri().await?;
    let pod = cri.pod("sealed-import").namespace("sealed").run().await?;
    let task = pod.container("main").shell(LIVED_IN).run().await?;
    let before = task.counts_to(3).await?;
    task.checkpoint("/tmp/sealed-import.tar").await?;
    let at = task.counts_to(before.n).await?;
    pod.remove().await?;
    let args = [
        "import",
        "/tmp/sealed-import.tar",
        "--name",
        "sealed-import",
    ];
    image(stage, &args).await?;
    let folder = stage.image("sealed", "sealed-import");
    let found = crate::sealed::with(&before.nonce, &folder)?;
    ensure!(found.is_empty(), "{} is in {found:?}", before.nonce);

    let args = [
        "image",
        "export",
        "sealed/sealed-import",
        "/tmp/sealed-export.tar",
    ];
    let refused = stage.rekindle(&args).await?;
    let said = String::from_utf8_lossy(&refused.stderr);
    ensure!(
        refused.status.code() == Some(3) && said.contains("--plain"),
        "{said}"
    );
    let shown = stage.rekindle(&[&args[..], &["--plain"]].concat()).await?;
    ensure!(shown.status.success(), "{shown:?}");

    let new = cri.pod("sealed-imported").namespace("sealed");
    let new = new.annotation(RESTORE_FROM, "sealed-import");
    let new = new.annotation(FORCE, "host").run().await?;
    let warm = new.container("main").shell(LIVED_IN).run().await?;
    went_on(&warm, &before, &at).await?;
    new.remove().await
}
