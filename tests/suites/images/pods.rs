//! Through CRI, into a new pod.

use crate::refused::spoil;
use crate::stage::{POLICY, RESTORE_FROM, Stage, one_sentence};
use anyhow::{Context, Result, ensure};
use rekindle_harness::Count;
use rekindle_harness::cri::{ContainerState, CriContainer};

const CONTAINER: &str = "rekindle.dev/container";
const LIVED_IN: &str =
    "echo kept > /root/note; rm /etc/group; echo shared > /dev/shm/note; exec /counter";

/// Asserts that a container of a pod is the counter that was dumped after `from`, gone on; how far it is.
async fn continues(restored: &CriContainer<'_, '_>, from: &Count, until: u64) -> Result<Count> {
    let count = restored.counts_to(until + 3).await?;
    from.continues_in(&restored.said("stdout")?, until)?;
    Ok(count)
}

pub(crate) async fn a_new_pod_continues_exactly(stage: &Stage) -> Result<()> {
    let cri = stage.node.cri().await?;
    let old = cri.pod("exactly-old").run().await?;
    let volume = old.empty_dir("scratch").await?;
    let task = old
        .container("main")
        .bind(&volume, "/scratch", true)
        .shell(LIVED_IN)
        .run()
        .await?;
    let before = task.counts_to(5).await?;
    task.shell("echo theirs > /scratch/note").await?;
    let made = stage
        .checkpoint("exactly-old/main", "pod-exactly", &["--exit"])
        .await?;
    assert_eq!(
        (&made["namespace"], &made["name"]),
        (&"default".into(), &"pod-exactly".into())
    );
    assert_eq!(task.ended().await?.exit_code, 137);
    let at = Count::last(&task.said("stdout")?).context("the counter said nothing")?;
    let address = old.address().to_owned();
    old.remove().await?;

    let new = cri
        .pod("exactly-new")
        .annotation(RESTORE_FROM, "pod-exactly")
        .run()
        .await?;
    let volume = new.empty_dir("scratch").await?;
    let warm = new
        .container("main")
        .bind(&volume, "/scratch", true)
        .shell(LIVED_IN)
        .run()
        .await?;
    assert_eq!(warm.state().await?, ContainerState::ContainerRunning);
    continues(&warm, &before, at.n).await?;
    assert_ne!(new.address(), address);
    assert_eq!(
        warm.shell("cat /root/note /dev/shm/note").await?,
        "kept\nshared"
    );
    assert_eq!(
        warm.shell("test ! -e /etc/group && echo gone").await?,
        "gone"
    );
    assert_eq!(warm.shell("hostname").await?, "exactly-new");
    assert!(
        warm.shell("cat /etc/hosts")
            .await?
            .contains(&format!("{}\texactly-new", new.address()))
    );
    assert!(
        warm.shell("ip -4 addr show eth0")
            .await?
            .contains(new.address())
    );
    // The volume is the new pod's own, and its termination log is there to be written.
    assert_eq!(warm.shell("ls /scratch").await?, "");
    warm.shell("echo bye > /dev/termination-log").await?;
    assert_eq!(warm.last_words()?, "bye\n");
    warm.stop(0).await?;
    assert_eq!(warm.ended().await?.exit_code, 137);
    new.remove().await
}

pub(crate) async fn one_container_of_the_pod_is_chosen(stage: &Stage) -> Result<()> {
    let cri = stage.node.cri().await?;
    let old = cri.pod("chosen-old").run().await?;
    let task = old.container("main").shell(LIVED_IN).run().await?;
    let before = task.counts_to(5).await?;
    stage.checkpoint("chosen-old/main", "chosen", &[]).await?;
    let at = task.counts_to(before.n).await?;
    let pod = cri
        .pod("chosen-new")
        .annotation(RESTORE_FROM, "chosen")
        .annotation(CONTAINER, "main");
    let new = pod.run().await?;
    let beside = new.container("beside").args(&["/counter"]).run().await?;
    let warm = new.container("main").shell(LIVED_IN).run().await?;
    continues(&warm, &before, at.n).await?;
    let cold = beside.counts_to(3).await?;
    assert_ne!(cold.nonce, before.nonce);
    assert!(beside.said("stdout")?.contains(" 1\n"));
    // The name of the pod is one for both, and what is in /dev/shm is shared.
    assert_eq!(beside.shell("hostname").await?, "chosen-new");
    assert_eq!(warm.shell("hostname").await?, "chosen-new");
    assert_eq!(beside.shell("cat /dev/shm/note").await?, "shared");
    old.remove().await?;
    new.remove().await
}

/// As PyTorch's semaphores are, in the /dev/shm that the sandbox lends.
pub(crate) async fn a_file_deleted_but_open_in_the_pods_shm_is_there(stage: &Stage) -> Result<()> {
    let cri = stage.node.cri().await?;
    let old = cri.pod("unlinked-old").run().await?;
    let line = "exec 3<>/dev/shm/sem; echo sem >&3; rm /dev/shm/sem; exec /counter";
    let task = old.container("main").shell(line).run().await?;
    let before = task.counts_to(3).await?;
    stage
        .checkpoint("unlinked-old/main", "pod-unlinked", &[])
        .await?;
    let at = task.counts_to(before.n).await?;
    let new = cri.pod("unlinked-new");
    let new = new.annotation(RESTORE_FROM, "pod-unlinked").run().await?;
    let warm = new.container("main").shell(line).run().await?;
    continues(&warm, &before, at.n).await?;
    // Under no name, before the dump and after it.
    let read = "cat /proc/1/fd/3; readlink /proc/1/fd/3; ls -A /dev/shm";
    for task in [&task, &warm] {
        let found = task.shell(read).await?;
        let lines: Vec<&str> = found.lines().collect();
        ensure!(
            matches!(lines[..], ["sem", path] if path.ends_with(" (deleted)")),
            "{found}"
        );
    }
    // Two files: what is written to one is not in the other.
    warm.shell("echo more >> /proc/1/fd/3").await?;
    assert_eq!(warm.shell("cat /proc/1/fd/3").await?, "sem\nmore");
    assert_eq!(task.shell("cat /proc/1/fd/3").await?, "sem");
    old.remove().await?;
    new.remove().await
}

/// The pod's annotation can name one image only; a container's own annotation, which CRI has, names another.
pub(crate) async fn two_containers_of_a_pod_start_from_two_images(stage: &Stage) -> Result<()> {
    let cri = stage.node.cri().await?;
    let old = cri.pod("both-old").run().await?;
    let line = |name: &str| {
        format!("echo {name} > /root/note; echo {name} > /dev/shm/{name}; exec /counter")
    };
    let one = old.container("one").shell(&line("one")).run().await?;
    let two = old.container("two").shell(&line("two")).run().await?;
    let (one_before, two_before) = (one.counts_to(5).await?, two.counts_to(5).await?);
    assert_ne!(one_before.nonce, two_before.nonce);
    stage.checkpoint("both-old/one", "both-one", &[]).await?;
    stage.checkpoint("both-old/two", "both-two", &[]).await?;
    let (one_at, two_at) = (one.counts_to(1).await?, two.counts_to(1).await?);
    old.remove().await?;

    let new = cri.pod("both-new").run().await?;
    let warm = |name: &str| {
        let container = new.container(name).shell(&line(name));
        container.annotation(RESTORE_FROM, &format!("both-{name}"))
    };
    let (one, two) = tokio::try_join!(warm("one").run(), warm("two").run())?;
    continues(&one, &one_before, one_at.n).await?;
    continues(&two, &two_before, two_at.n).await?;
    assert_eq!(one.shell("cat /root/note").await?, "one");
    assert_eq!(two.shell("cat /root/note").await?, "two");
    for task in [&one, &two] {
        let shared = task
            .shell("cat /dev/shm/one /dev/shm/two; hostname")
            .await?;
        assert_eq!(shared, "one\ntwo\nboth-new");
    }
    // The end of one is no other's.
    one.stop(0).await?;
    let now = two.counts_to(two_at.n + 3).await?;
    two.counts_to(now.n + 3).await?;
    new.remove().await
}

pub(crate) async fn a_live_connection_is_closed(stage: &Stage) -> Result<()> {
    a_connection_is_closed(stage, "connected", "127.0.0.1").await
}

/// Which is the old pod's: in the new one there is no such address.
pub(crate) async fn a_live_connection_to_the_pods_address_is_closed(stage: &Stage) -> Result<()> {
    a_connection_is_closed(stage, "reached", "$(hostname -i)").await
}

async fn a_connection_is_closed(stage: &Stage, name: &str, address: &str) -> Result<()> {
    let cri = stage.node.cri().await?;
    let old = cri.pod(name).run().await?;
    // Both ends stay silent and open: each reads what nobody writes.
    let server = "echo ready; tail -f /dev/null | nc -l -p 7000";
    let client =
        format!("tail -f /dev/null | {{ nc {address} 7000; echo closed; }} & exec /counter");
    let peer = old.container("peer").shell(server).run().await?;
    peer.says("the server", |text| text == "ready\n").await?;
    let listening = "until netstat -ltn | grep -q :7000; do sleep 0.05; done";
    peer.shell(listening).await?;
    let task = old.container("main").shell(&client).run().await?;
    let before = task.counts_to(5).await?;
    let established = format!("netstat -tn | grep -c \" {address}:7000 *ESTABLISHED\" || true");
    assert_eq!(task.shell(&established).await?, "1");
    let main = format!("{name}/main");
    if !stage.dumps_tcp_of(&main).await? {
        task.counts_to(before.n + 3).await?;
        return old.remove().await;
    }
    stage.checkpoint(&main, name, &[]).await?;
    // The running one has kept its connection, and nothing is closed behind its back.
    let at = task.counts_to(before.n).await?;
    task.counts_to(at.n + 3).await?;
    assert_eq!(task.shell(&established).await?, "1");
    assert!(!task.said("stdout")?.contains("closed"));

    let pod = cri.pod(&format!("{name}-new"));
    let new = pod.annotation(RESTORE_FROM, name).run().await?;
    assert_ne!(new.address(), old.address());
    let warm = new.container("main").shell(&client).run().await?;
    continues(&warm, &before, at.n).await?;
    warm.says("the end of the connection", |text| {
        text.contains("closed\n")
    })
    .await?;
    assert_eq!(
        warm.shell("netstat -tn | grep -c :7000 || true").await?,
        "0"
    );
    let ended = warm.counts_to(at.n).await?;
    warm.counts_to(ended.n + 3).await?;
    // The old one's is still there, now that the other has ended its copy.
    assert_eq!(task.shell(&established).await?, "1");
    assert!(!task.said("stdout")?.contains("closed"));
    old.remove().await?;
    new.remove().await
}

pub(crate) async fn a_restored_pod_is_checkpointed_again(stage: &Stage) -> Result<()> {
    let cri = stage.node.cri().await?;
    let mut pod = cri.pod("pod-again-0").run().await?;
    let task = pod.container("main").shell(LIVED_IN).run().await?;
    let mut from = task.counts_to(5).await?;
    for round in 1..=2 {
        let name = format!("pod-again-{round}");
        stage
            .checkpoint(&format!("{}/main", pod.name()), &name, &[])
            .await?;
        let old = pod;
        pod = cri.pod(&name).annotation(RESTORE_FROM, &name).run().await?;
        old.remove().await?;
        let warm = pod.container("main").shell(LIVED_IN).run().await?;
        let first = warm
            .says("the counter", |text| Count::first(text).is_some())
            .await?;
        let first = Count::first(&first).context("the restored counter said nothing")?;
        // The old one ran on until its pod was removed; how far nobody can tell.
        ensure!(
            first.nonce == from.nonce && first.n >= from.n,
            "{first:?} does not continue {from:?}"
        );
        from = warm.counts_to(first.n + 5).await?;
        assert_eq!(
            warm.shell("cat /root/note /dev/shm/note; hostname").await?,
            format!("kept\nshared\n{name}")
        );
    }
    pod.remove().await
}

pub(crate) async fn an_exported_image_serves_another_namespace(stage: &Stage) -> Result<()> {
    let cri = stage.node.cri().await?;
    let old = cri.pod("exporter").namespace("platform").run().await?;
    let task = old.container("main").shell(LIVED_IN).run().await?;
    let before = task.counts_to(5).await?;
    let made = stage
        .checkpoint("platform/exporter/main", "shared", &[])
        .await?;
    assert_eq!(made["image"], "platform/shared@1");
    let at = task.counts_to(before.n).await?;
    let new = cri
        .pod("importer")
        .annotation(RESTORE_FROM, "platform/shared")
        .run()
        .await?;
    let warm = new.container("main").shell(LIVED_IN).run().await?;
    continues(&warm, &before, at.n).await?;
    // To a third namespace it is not exported.
    let third = cri
        .pod("thief")
        .namespace("elsewhere")
        .annotation(RESTORE_FROM, "platform/shared");
    let refusal = third
        .try_run()
        .await?
        .err()
        .context("an image that is not exported was accepted")?;
    one_sentence(&refusal, &["platform/shared", "elsewhere"])?;
    old.remove().await?;
    new.remove().await
}

/// Under either policy: it is not a matter of what there is.
pub(crate) async fn another_namespaces_image_is_refused_at_the_sandbox(
    stage: &Stage,
) -> Result<()> {
    let cri = stage.node.cri().await?;
    for policy in ["Required", "Opportunistic"] {
        let pod = cri.pod(&format!("stranger-{}", policy.to_lowercase()));
        let pod = pod
            .annotation(RESTORE_FROM, "platform/private")
            .annotation(POLICY, policy);
        let refusal = pod
            .try_run()
            .await?
            .err()
            .context("another namespace's image was accepted")?;
        one_sentence(&refusal, &["platform/private", "default"])?;
    }
    Ok(())
}

pub(crate) async fn a_refused_image_fails_the_start_with_its_reason(stage: &Stage) -> Result<()> {
    let cri = stage.node.cri().await?;
    let pod = cri
        .pod("no-image")
        .annotation(RESTORE_FROM, "never-made")
        .run()
        .await?;
    let task = pod.container("main").shell(LIVED_IN).create().await?;
    let refusal = task
        .start()
        .await
        .err()
        .context("it was started from nothing")?;
    one_sentence(&refusal, &["default/never-made", "no image"])?;
    let status = task.ended().await?;
    assert_eq!(
        (status.exit_code, status.reason.as_str()),
        (128, "StartError")
    );
    assert!(
        status.message.contains("default/never-made"),
        "{}",
        status.message
    );
    pod.remove().await?;

    let pod = cri
        .pod("no-image-cold")
        .annotation(RESTORE_FROM, "never-made")
        .annotation(POLICY, "Opportunistic");
    let pod = pod.run().await?;
    let task = pod.container("main").shell(LIVED_IN).run().await?;
    task.counts_to(2).await?;
    assert!(task.said("stdout")?.contains(" 1\n"));
    pod.remove().await
}

pub(crate) async fn more_than_the_pod_allows_is_refused(stage: &Stage) -> Result<()> {
    let cri = stage.node.cri().await?;
    let old = cri.pod("mighty").privileged().run().await?;
    let task = old
        .container("main")
        .privileged()
        .args(&["/counter"])
        .run()
        .await?;
    task.counts_to(2).await?;
    stage.checkpoint("mighty/main", "mighty", &[]).await?;
    old.remove().await?;
    let pod = cri
        .pod("humble")
        .annotation(RESTORE_FROM, "mighty")
        .run()
        .await?;
    let task = pod.container("main").args(&["/counter"]).create().await?;
    let refusal = task
        .start()
        .await
        .err()
        .context("a privileged image was restored unprivileged")?;
    one_sentence(&refusal, &["default/mighty", "CAP_SYS_ADMIN"])?;
    let nobody = pod
        .container("nobody")
        .user(65534)
        .args(&["/counter"])
        .create()
        .await?;
    let refusal = nobody
        .start()
        .await
        .err()
        .context("root's image was restored as nobody")?;
    one_sentence(&refusal, &["user 0", "65534"])?;
    pod.remove().await?;

    for (name, word) in [
        ("shares-pids", "PID namespace"),
        ("own-users", "user namespace"),
    ] {
        let pod = cri.pod(name).annotation(RESTORE_FROM, "mighty");
        let pod = if name == "own-users" {
            pod.own_users()
        } else {
            pod.shared_pids()
        };
        let refusal = match pod.try_run().await? {
            Err(refusal) => refusal,
            Ok(pod) => {
                let task = pod.container("main").args(&["/counter"]).create().await?;
                let refusal = task
                    .start()
                    .await
                    .err()
                    .with_context(|| format!("{name} was restored"))?;
                pod.remove().await?;
                refusal
            }
        };
        one_sentence(&refusal, &[word])?;
    }
    Ok(())
}

/// The image's files are in the /dev/shm that the pod's containers share when CRIU fails.
pub(crate) async fn a_cold_start_finds_the_shm_of_its_pod_and_nothing_of_the_image(
    stage: &Stage,
) -> Result<()> {
    let cri = stage.node.cri().await?;
    let old = cri.pod("staged-old").run().await?;
    let line =
        "cd /dev/shm; mkdir -p both own; echo image | tee note both/note own/note; exec /counter";
    let task = old.container("main").shell(line).run().await?;
    task.counts_to(2).await?;
    stage.checkpoint("staged-old/main", "staged", &[]).await?;
    old.remove().await?;

    let pod = cri.pod("staged-new").annotation(CONTAINER, "main");
    let pod = pod.annotation(RESTORE_FROM, &spoil(stage, "staged")?);
    let pod = pod.annotation(POLICY, "Opportunistic").run().await?;
    let line = "cd /dev/shm; mkdir both; echo theirs | tee kept both/kept; exec /counter";
    let beside = pod.container("beside").shell(line).run().await?;
    beside.counts_to(1).await?;
    let main = pod.container("main").args(&["/counter"]).run().await?;
    main.counts_to(2).await?;
    assert!(main.said("stdout")?.contains(" 1\n"));
    assert_eq!(
        main.shell("cd /dev/shm; find . -type f | sort | xargs cat; find . | sort")
            .await?,
        "theirs\ntheirs\n.\n./both\n./both/kept\n./kept"
    );
    pod.remove().await
}
