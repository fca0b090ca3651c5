//! Images that may not, or cannot, be restored into a container: refused before runc runs, or undone.

use crate::damaged::Copy;
use crate::stage::{POLICY, RESTORE_FROM, Stage, counts_to, one_sentence, shell};
use anyhow::{Context, Result, ensure};
use rekindle_harness::container::Builder;
use serde_json::{Value, json};

/// An image called `name` of a counter that ran in `source`, which is gone.
async fn image_of(stage: &Stage, source: Builder<'_>, id: &str) -> Result<()> {
    let line = "echo kept > /root/note; exec /counter";
    let task = source.shell(line).run().await?;
    counts_to(task.io().out()?, 2).await?;
    stage.checkpoint(id, id, &[]).await?;
    task.remove().await
}

pub(crate) async fn what_does_not_exist(stage: &Stage) -> Result<()> {
    let words = ["default/never-made", "rekindle image ls"];
    stage
        .refuses("absent", stage.warm("absent", "never-made"), &words)
        .await?;
    image_of(stage, stage.container("one-only"), "one-only").await?;
    stage
        .refuses(
            "absent-2",
            stage.warm("absent-2", "one-only@7"),
            &["default/one-only@7"],
        )
        .await?;
    Ok(())
}

pub(crate) async fn another_namespaces_image(stage: &Stage) -> Result<()> {
    for policy in ["Required", "Opportunistic"] {
        let id = format!("foreign-{}", policy.to_lowercase());
        let warm = stage
            .warm(&id, "platform/private")
            .annotation(POLICY, policy);
        stage
            .refuses(&id, warm, &["platform/private", "default"])
            .await?;
    }
    Ok(())
}

pub(crate) async fn another_architectures_image(stage: &Stage) -> Result<()> {
    image_of(stage, stage.container("arch"), "arch").await?;
    let copy = Copy::of(stage, "arch", "other-arch")?;
    copy.change_manifest(|manifest| manifest["facts"]["host"]["arch"] = "s390x".into())?;
    let text = stage
        .refuses("arch-2", stage.warm("arch-2", "other-arch"), &["s390x"])
        .await?;
    ensure!(
        text.contains(std::env::consts::ARCH),
        "the host's architecture is not in: {text}"
    );
    copy.change_manifest(|manifest| {
        manifest["facts"]["host"]["arch"] = std::env::consts::ARCH.into();
        manifest["facts"]["host"]["cpu_flags"] = json!(["fpu", "warp_drive"]);
    })?;
    stage
        .refuses(
            "arch-3",
            stage.warm("arch-3", "other-arch"),
            &["warp_drive"],
        )
        .await?;
    Ok(())
}

fn make_mighty(spec: &mut Value) {
    for set in ["bounding", "effective", "permitted"] {
        if let Some(set) = spec["process"]["capabilities"][set].as_array_mut() {
            set.push("CAP_SYS_ADMIN".into());
        }
    }
}

pub(crate) async fn a_more_privileged_image(stage: &Stage) -> Result<()> {
    let mighty = stage.container("mighty").change_spec(make_mighty);
    image_of(stage, mighty, "mighty").await?;
    stage
        .refuses("humble", stage.warm("humble", "mighty"), &["CAP_SYS_ADMIN"])
        .await?;
    let gains = stage
        .container("gains")
        .change_spec(|spec| spec["process"]["noNewPrivileges"] = false.into());
    image_of(stage, gains, "gains").await?;
    stage
        .refuses(
            "gains-not",
            stage.warm("gains-not", "gains"),
            &["no_new_privs"],
        )
        .await?;
    Ok(())
}

/// What the manifest says is not believed where CRIU's own files say otherwise.
pub(crate) async fn another_user(stage: &Stage) -> Result<()> {
    image_of(stage, stage.container("rooted"), "rooted").await?;
    let nobody = || stage.warm("nobody", "rooted").user(65534, 65534);
    stage
        .refuses("nobody", nobody(), &["user 0", "65534"])
        .await?;
    let liar = Copy::of(stage, "rooted", "rooted-lies")?;
    liar.change_manifest(|manifest| {
        let security = &mut manifest["facts"]["container"]["security"];
        security["uid"] = 65534.into();
        security["gid"] = 65534.into();
    })?;
    let nobody = stage
        .warm("nobody-2", "rooted-lies")
        .user(65534, 65534)
        .annotation(POLICY, "Required");
    let words = ["default/rooted-lies", "its task 1 (", "user 0", "65534"];
    stage.refuses("nobody-2", nobody, &words).await?;
    Ok(())
}

/// As above: more capabilities, and privileges that can be gained.
pub(crate) async fn a_manifest_that_lies(stage: &Stage) -> Result<()> {
    let mighty = stage.container("lies").change_spec(|spec| {
        make_mighty(spec);
        spec["process"]["noNewPrivileges"] = false.into();
    });
    image_of(stage, mighty, "lies").await?;
    let liar = Copy::of(stage, "lies", "lies-about-it")?;
    liar.change_manifest(|manifest| {
        let security = &mut manifest["facts"]["container"]["security"];
        security["no_new_privileges"] = true.into();
        for set in security["capabilities"]
            .as_object_mut()
            .into_iter()
            .flatten()
        {
            if let Some(names) = set.1.as_array_mut() {
                names.retain(|name| name != "CAP_SYS_ADMIN");
            }
        }
    })?;
    let words = ["its task 1 (", "CAP_SYS_ADMIN (bounding)", "no_new_privs"];
    stage
        .refuses("lies-2", stage.warm("lies-2", "lies-about-it"), &words)
        .await?;
    // What cannot be read is not believed either.
    liar.reseal("criu/core-1.img", |core| core.truncate(core.len() / 2))?;
    stage
        .refuses(
            "lies-3",
            stage.warm("lies-3", "lies-about-it"),
            &["core-1.img"],
        )
        .await?;
    Ok(())
}

pub(crate) async fn another_kind_of_stdio(stage: &Stage) -> Result<()> {
    image_of(stage, stage.container("piped"), "piped").await?;
    let terminal = stage.warm("on-terminal", "piped").terminal();
    stage
        .refuses("on-terminal", terminal, &["terminal"])
        .await?;
    Ok(())
}

pub(crate) async fn a_shared_pid_namespace(stage: &Stage) -> Result<()> {
    image_of(stage, stage.container("own-pids"), "own-pids").await?;
    let shares = stage.warm("host-pids", "own-pids").change_spec(|spec| {
        if let Some(namespaces) = spec["linux"]["namespaces"].as_array_mut() {
            namespaces.retain(|namespace| namespace["type"] != "pid");
        }
    });
    stage
        .refuses("host-pids", shares, &["PID namespace"])
        .await?;
    Ok(())
}

pub(crate) async fn a_user_namespace(stage: &Stage) -> Result<()> {
    image_of(stage, stage.container("hosts-users"), "hosts-users").await?;
    let own = stage.warm("own-users", "hosts-users").change_spec(|spec| {
        if let Some(namespaces) = spec["linux"]["namespaces"].as_array_mut() {
            namespaces.push(json!({"type": "user"}));
        }
        let mapping = json!([{"containerID": 0, "hostID": 200_000, "size": 65536}]);
        spec["linux"]["uidMappings"] = mapping.clone();
        spec["linux"]["gidMappings"] = mapping;
    });
    stage.refuses("own-users", own, &["user namespace"]).await?;
    Ok(())
}

/// Its /dev/shm is the node's, and an image's would replace it.
pub(crate) async fn the_nodes_ipc_namespace(stage: &Stage) -> Result<()> {
    let cri = stage.node.cri().await?;
    let line = "echo image > /dev/shm/of-the-node; exec /counter";
    let old = cri.pod("own-ipc").run().await?;
    let task = old.container("main").shell(line).run().await?;
    task.counts_to(2).await?;
    stage.checkpoint("own-ipc/main", "own-ipc", &[]).await?;
    old.remove().await?;
    let nodes = "echo node > /dev/shm/of-the-node";
    stage.node.run(["sh", "-c", nodes]).await?;

    let pod = cri
        .pod("host-ipc")
        .host_ipc()
        .annotation(RESTORE_FROM, "own-ipc");
    let pod = pod.run().await?;
    let task = pod.container("main").shell(line).create().await?;
    let refusal = task.start().await.err().context("it was restored")?;
    one_sentence(
        &refusal,
        &["shares the node's IPC namespace (hostIPC)", "/dev/shm"],
    )?;
    pod.remove().await?;
    let pod = cri
        .pod("host-ipc-cold")
        .host_ipc()
        .annotation(POLICY, "Opportunistic");
    let pod = pod.annotation(RESTORE_FROM, "own-ipc").run().await?;
    let task = pod.container("main").args(&["/counter"]).run().await?;
    task.counts_to(2).await?;
    assert!(task.said("stdout")?.contains(" 1\n"));
    assert_eq!(task.shell("cat /dev/shm/of-the-node").await?, "node");
    pod.remove().await?;
    stage.node.run(["rm", "/dev/shm/of-the-node"]).await?;
    Ok(())
}

pub(crate) async fn other_mounts(stage: &Stage) -> Result<()> {
    image_of(stage, stage.container("bare"), "bare").await?;
    let more = stage
        .warm("with-mount", "bare")
        .bind("/tmp", "/extra", false);
    stage.refuses("with-mount", more, &["/extra"]).await?;
    Ok(())
}

pub(crate) async fn opportunistic_starts_cold(stage: &Stage) -> Result<()> {
    let warm = stage
        .warm("cold", "never-made")
        .annotation(POLICY, "Opportunistic")
        .run()
        .await?;
    counts_to(warm.io().out()?, 3).await?;
    assert!(
        warm.io()
            .out()?
            .so_far()
            .lines()
            .next()
            .is_some_and(|line| line.ends_with(" 1"))
    );
    assert_eq!(shell(&warm, "root", "ls -A /root").await?, "");
    warm.remove().await
}

/// An image whose checksums are right and whose files CRIU cannot use: what comes after the verification.
async fn unusable(stage: &Stage, id: &str) -> Result<String> {
    image_of(stage, stage.container(id), id).await?;
    spoil(stage, id)
}

/// Makes an unusable copy of a counter's image; its name.
pub(crate) fn spoil(stage: &Stage, image: &str) -> Result<String> {
    let name = format!("{image}-unusable");
    let copy = Copy::of(stage, image, &name)?;
    // An open file that lies nowhere.
    copy.reseal("criu/files.img", |bytes| {
        let (from, to) = (b"/counter".as_slice(), b"/c0unter".as_slice());
        for at in 0..bytes.len().saturating_sub(from.len()) {
            if &bytes[at..at + from.len()] == from {
                bytes[at..at + to.len()].copy_from_slice(to);
            }
        }
    })?;
    Ok(name)
}

pub(crate) async fn under_a_configuration_that_is_wrong(stage: &Stage) -> Result<()> {
    let file = stage.node.path("/etc/rekindle/config.toml");
    let before = std::fs::read_to_string(&file)?;
    std::fs::write(&file, "[restore]\npaging = \"sometimes\"\n")?;
    let (task, created) = stage
        .container("wrong-config")
        .args(&["/counter"])
        .try_create()
        .await?;
    std::fs::write(&file, before)?;
    let refusal = created.err().context("it was created")?;
    for words in ["/etc/rekindle/config.toml", "sometimes"] {
        ensure!(
            refusal.message().contains(words),
            "{words:?} is not in: {refusal}"
        );
    }
    task.remove().await?;
    stage.node.is_rid_of("wrong-config").await
}

pub(crate) async fn criu_refuses_and_nothing_stays(stage: &Stage) -> Result<()> {
    let name = unusable(stage, "required").await?;
    let task = stage.warm("required-2", &name).create().await?;
    let refusal = task
        .start()
        .await
        .err()
        .context("an unusable image was restored")?;
    one_sentence(&refusal, &["restore"])?;
    task.delete().await?;
    stage.node.is_rid_of("required-2").await?;
    let left = stage.node.layer_of("required-2").await?;
    ensure!(
        left.is_empty(),
        "the refused container's layer has {left:?}"
    );
    task.remove().await
}

pub(crate) async fn criu_refuses_and_opportunistic_starts_cold_from_a_clean_root(
    stage: &Stage,
) -> Result<()> {
    let name = unusable(stage, "fallback").await?;
    let cold = stage
        .container("fallback-2")
        .shell("ls -A /root; exec /counter")
        .annotation(RESTORE_FROM, &name);
    let cold = cold.annotation(POLICY, "Opportunistic").run().await?;
    counts_to(cold.io().out()?, 3).await?;
    let first = cold.io().out()?.so_far();
    ensure!(
        first
            .lines()
            .next()
            .is_some_and(|line| line.ends_with(" 1")),
        "it did not start cold and clean: {first}"
    );
    cold.remove().await?;
    stage.node.is_rid_of("fallback-2").await
}

/// What an earlier task of the container wrote is nobody's to remove, least of all when it keeps an image out.
pub(crate) async fn a_layer_that_was_written_is_refused_and_kept(stage: &Stage) -> Result<()> {
    image_of(stage, stage.container("layer"), "layer").await?;
    for policy in ["Required", "Opportunistic"] {
        let id = format!("layer-{}", policy.to_lowercase());
        let line = "cat /root/mine; exec /counter";
        let container = stage.container(&id).shell(line).annotation(POLICY, policy);
        let first = container.annotation(RESTORE_FROM, "layer").run().await?;
        shell(&first, "write", "echo mine > /root/mine").await?;
        first.kill(9).await?;
        first.wait().await?;
        first.delete().await?;
        let written = stage.node.layer_of(&id).await?;
        let (next, created) = first.next_task().await?;
        match created {
            Err(refusal) if policy == "Required" => {
                one_sentence(&refusal, &["its writable layer is not empty"])?;
                stage.node.is_rid_of(&id).await?;
            }
            Ok(_) if policy == "Opportunistic" => {
                next.start().await?;
                counts_to(next.io().out()?, 2).await?;
                let said = next.io().out()?.so_far();
                ensure!(said.starts_with("mine\n"), "its file is gone: {said}");
                ensure!(said.contains(" 1\n"), "it did not start cold: {said}");
            }
            other => anyhow::bail!("under {policy} the answer was {other:?}"),
        }
        assert_eq!(stage.node.layer_of(&id).await?, written);
        next.remove().await?;
    }
    Ok(())
}
