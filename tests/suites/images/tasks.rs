//! Through containerd's own API, as `ctr` would.

use crate::stage::{Stage, continues, counts_to, shell};
use anyhow::{Context, Result};
use rekindle_harness::Count;
use rekindle_harness::container::State;

pub(crate) async fn a_new_container_continues_exactly(stage: &Stage) -> Result<()> {
    let (task, before) = stage.lived_in("exactly").await?;
    let made = stage.checkpoint("exactly", "exactly", &[]).await?;
    assert_eq!(made["image"], "default/exactly@1");
    assert_eq!(made["exited"], false);
    assert_eq!(task.state().await?, State::Running);
    let at = counts_to(task.io().out()?, before.n).await?;
    counts_to(task.io().out()?, at.n + 3).await?;

    let warm = stage.warm("exactly-2", "exactly").create().await?;
    let process = warm.process().await?;
    assert_eq!((process.status(), process.pid), (State::Created, 0));
    assert!(warm.start().await? > 0);
    continues(&warm, &before, at.n).await?;
    assert_eq!(shell(&warm, "note", "cat /root/note").await?, "kept");
    assert_eq!(
        shell(&warm, "gone", "ls /etc").await?,
        shell(&task, "gone", "ls /etc").await?
    );
    assert_eq!(
        shell(&warm, "group", "test ! -e /etc/group && echo gone").await?,
        "gone"
    );
    assert_eq!(shell(&warm, "shm", "cat /dev/shm/note").await?, "shared");
    // Their layers are two.
    shell(
        &warm,
        "write",
        "echo changed > /root/note; echo changed > /dev/shm/note",
    )
    .await?;
    assert_eq!(
        shell(&task, "read", "cat /root/note /dev/shm/note").await?,
        "kept\nshared"
    );

    warm.kill(9).await?;
    assert_eq!(warm.wait().await?.status, 137);
    warm.remove().await?;
    stage.node.is_rid_of("exactly-2").await?;
    task.remove().await
}

/// What PyTorch does with its semaphores.
pub(crate) async fn files_deleted_but_open_are_there(stage: &Stage) -> Result<()> {
    let line = "exec 3<>/root/layer 4<>/dev/shm/sem 5<>/tmp/dir/file; echo layer >&3; echo sem >&4; echo dir >&5; \
                rm -r /root/layer /dev/shm/sem /tmp/dir; exec /counter";
    let task = stage
        .container("unlinked")
        .shell(&format!("mkdir /tmp/dir; {line}"))
        .run()
        .await?;
    let before = counts_to(task.io().out()?, 3).await?;
    stage.checkpoint("unlinked", "unlinked", &[]).await?;
    let at = counts_to(task.io().out()?, before.n).await?;
    let warm = stage.warm("unlinked-2", "unlinked").run().await?;
    continues(&warm, &before, at.n).await?;
    let read = "cat /proc/1/fd/3 /proc/1/fd/4 /proc/1/fd/5; ls -A /root /dev/shm /tmp";
    let expected = "layer\nsem\ndir\n/dev/shm:\n\n/root:\n\n/tmp:";
    assert_eq!(shell(&warm, "read", read).await?, expected);
    // The dump has cleaned up behind itself.
    assert_eq!(shell(&task, "read", read).await?, expected);
    warm.remove().await?;
    task.remove().await
}

/// A regression: CRIU waits ten seconds for a parent in `vfork`, and fails.
pub(crate) async fn programs_that_start_others_all_the_time(stage: &Stage) -> Result<()> {
    let line = "for i in 1 2 3 4; do (while :; do sleep 0; done) & done; exec /counter";
    let task = stage.container("busy").shell(line).run().await?;
    let before = counts_to(task.io().out()?, 3).await?;
    for _ in 0..8 {
        stage.checkpoint("busy", "busy", &[]).await?;
    }
    let at = counts_to(task.io().out()?, before.n).await?;
    let warm = stage.warm("busy-2", "busy").run().await?;
    continues(&warm, &before, at.n).await?;
    warm.remove().await?;
    task.remove().await
}

pub(crate) async fn a_paused_container_stays_paused(stage: &Stage) -> Result<()> {
    let (task, before) = stage.lived_in("paused").await?;
    task.pause().await?;
    stage.checkpoint("paused", "paused", &[]).await?;
    assert_eq!(task.state().await?, State::Paused);
    let at = Count::last(&task.io().out()?.so_far()).context("the counter said nothing")?;
    let warm = stage.warm("paused-2", "paused").run().await?;
    continues(&warm, &before, at.n + 1).await?;
    assert_eq!(task.state().await?, State::Paused);
    task.resume().await?;
    counts_to(task.io().out()?, at.n + 3).await?;
    warm.remove().await?;
    task.remove().await
}

/// As of a probe that comes just then: the kernel has taken it, and the server has not. This one is paused, so that it
/// does not.
pub(crate) async fn a_connection_that_nobody_has_taken_yet_is_no_hindrance(
    stage: &Stage,
) -> Result<()> {
    let line = "echo hello | nc -l -p 7000 & exec /counter";
    let task = stage.container("untaken").shell(line).run().await?;
    let before = counts_to(task.io().out()?, 3).await?;
    if !stage.dumps_tcp_of("untaken").await? {
        return task.remove().await;
    }
    let pid = task
        .pids()
        .await?
        .first()
        .context("it has no process")?
        .to_string();
    let dial = "{ sleep 100 | busybox nc 127.0.0.1 7000; } > /tmp/untaken 2>&1 & \
                until busybox netstat -tn | grep -q ' 127.0.0.1:7000 *ESTABLISHED'; do sleep 0.05; done";
    task.pause().await?;
    let enter = ["nsenter", "-t", &pid, "-n", "sh", "-c", dial];
    stage.node.run(enter).await?;
    stage.checkpoint("untaken", "untaken", &[]).await?;
    let at = Count::last(&task.io().out()?.so_far()).context("the counter said nothing")?;
    let warm = stage.warm("untaken-2", "untaken").run().await?;
    continues(&warm, &before, at.n + 1).await?;
    // The one that goes on running takes it, and the restored one another.
    task.resume().await?;
    let answered = "until grep -q hello /tmp/untaken; do sleep 0.05; done";
    stage.node.run(["sh", "-c", answered]).await?;
    assert_eq!(
        shell(&warm, "dial", "nc 127.0.0.1 7000 < /dev/null").await?,
        "hello"
    );
    warm.remove().await?;
    task.remove().await
}

pub(crate) async fn exit_ends_it_and_the_image_continues(stage: &Stage) -> Result<()> {
    let (task, before) = stage.lived_in("exits").await?;
    let made = stage.checkpoint("exits", "exits", &["--exit"]).await?;
    assert_eq!(made["exited"], true);
    assert_eq!(task.wait().await?.status, 137);
    task.reaches(State::Stopped).await?;
    let at = Count::last(&task.io().out()?.text().await?).context("the counter said nothing")?;
    task.remove().await?;
    stage.node.is_rid_of("exits").await?;
    let warm = stage.warm("exits-2", "exits").run().await?;
    continues(&warm, &before, at.n).await?;
    assert_eq!(shell(&warm, "note", "cat /root/note").await?, "kept");
    warm.remove().await
}

pub(crate) async fn the_newest_generation_is_meant(stage: &Stage) -> Result<()> {
    let (task, first) = stage.lived_in("newest").await?;
    stage.checkpoint("newest", "newest", &[]).await?;
    let at = counts_to(task.io().out()?, first.n).await?;
    let second = counts_to(task.io().out()?, at.n + 10).await?;
    let made = stage.checkpoint("newest", "newest", &["--exit"]).await?;
    assert_eq!(made["image"], "default/newest@2");
    let end = Count::last(&task.io().out()?.text().await?).context("the counter said nothing")?;
    let warm = stage.warm("newest-2", "newest").run().await?;
    continues(&warm, &second, end.n).await?;
    let old = stage.warm("newest-1", "newest@1").run().await?;
    continues(&old, &first, at.n).await?;
    for task in [task, warm, old] {
        task.remove().await?;
    }
    Ok(())
}

pub(crate) async fn a_restored_container_is_checkpointed_again(stage: &Stage) -> Result<()> {
    let (mut task, mut from) = stage.lived_in("again").await?;
    for round in 1..=3 {
        let (id, name) = (task.id().to_owned(), format!("again-{round}"));
        stage.checkpoint(&id, &name, &["--exit"]).await?;
        let until =
            Count::last(&task.io().out()?.text().await?).context("the counter said nothing")?;
        task.remove().await?;
        task = stage.warm(&format!("again-r{round}"), &name).run().await?;
        from = continues(&task, &from, until.n).await?;
        let files = shell(
            &task,
            "files",
            "cat /root/note /dev/shm/note; test -e /etc/group || echo gone",
        )
        .await?;
        assert_eq!(files, "kept\nshared\ngone");
    }
    task.remove().await
}

pub(crate) async fn two_containers_start_from_one_image(stage: &Stage) -> Result<()> {
    let (task, before) = stage.lived_in("twins").await?;
    stage.checkpoint("twins", "twins", &[]).await?;
    let at = counts_to(task.io().out()?, before.n).await?;
    let (one, two) = (
        stage.warm("twins-1", "twins"),
        stage.warm("twins-2", "twins"),
    );
    let (one, two) = tokio::try_join!(one.run(), two.run())?;
    continues(&one, &before, at.n).await?;
    continues(&two, &before, at.n).await?;
    for task in [task, one, two] {
        task.remove().await?;
    }
    Ok(())
}

/// What processes have become by themselves, and zombies, who have nothing: a restore that compares them lets both
/// pass. Other users than root are in `vm/story.sh`, for not every host that runs this one can dump them.
pub(crate) async fn every_process_is_who_it_was(stage: &Stage) -> Result<()> {
    // A sleep would end with its restore.
    let line = "(sleep 0.1 & echo $! > /run/zombie; exec tail -f /dev/null) & echo $! >> /run/pids; \
                setpriv --inh-caps +net_raw tail -f /dev/null & echo $! >> /run/pids; exec /counter";
    let all = "for p in 1 $(sort -n /run/pids); do \
               grep -E '^(Name|Uid|Gid|Groups|Cap|NoNewPrivs|Seccomp)' /proc/$p/status; done; \
               grep zombie /proc/$(cat /run/zombie)/status";
    let task = stage.container("who").shell(line).run().await?;
    let before = counts_to(task.io().out()?, 5).await?;
    let who = shell(&task, "who", all).await?;
    for words in ["(zombie)", "CapInh:\t0000000000002000"] {
        assert!(who.contains(words), "{words:?} is not in {who}");
    }
    stage.checkpoint("who", "who", &[]).await?;
    let at = counts_to(task.io().out()?, before.n).await?;
    let warm = stage.warm("who-2", "who").run().await?;
    continues(&warm, &before, at.n).await?;
    assert_eq!(shell(&warm, "who", all).await?, who);
    warm.remove().await?;
    task.remove().await
}
