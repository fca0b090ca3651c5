//! Containers of a pod: output, commands, ends.

use anyhow::{Context, Result};
use rekindle_harness::cri::{ContainerState, Cri, Line};
use std::time::Instant;

pub(crate) async fn logs_are_apart(cri: &Cri<'_>) -> Result<()> {
    let pod = cri.pod("logs").run().await?;
    let one = pod
        .container("one")
        .shell("echo a; echo b >&2; printf c")
        .run()
        .await?;
    let two = pod.container("two").shell("echo d").run().await?;
    assert_eq!(one.ended().await?.exit_code, 0);
    assert_eq!(two.ended().await?.exit_code, 0);
    let line = |stream: &str, text: &str| Line {
        stream: stream.into(),
        text: text.into(),
    };
    assert_eq!(one.said("stderr")?, "b\n");
    assert_eq!(
        one.says("the unfinished line", |text| text.contains('c'))
            .await?,
        "a\nc\n"
    );
    assert_eq!(two.log()?, [line("stdout", "d")]);
    pod.remove().await
}

/// containerd cuts a line at 16 KiB and marks the parts.
pub(crate) async fn a_long_line_arrives_whole(cri: &Cri<'_>) -> Result<()> {
    let pod = cri.pod("long-line").run().await?;
    let shell = "seq 1 20000 | tr '\\n' ' '; echo; seq 1 20000";
    let one = pod.container("one").shell(shell).run().await?;
    one.ended().await?;
    let numbers: Vec<String> = (1..=20000).map(|n| n.to_string()).collect();
    let expected = format!("{} \n{}\n", numbers.join(" "), numbers.join("\n"));
    let said = one
        .says("the last line", |text| text.ends_with("\n20000\n"))
        .await?;
    assert!(said == expected, "the log lost or changed something");
    pod.remove().await
}

pub(crate) async fn exec_reports_output_and_code(cri: &Cri<'_>) -> Result<()> {
    let pod = cri.pod("exec").run().await?;
    let one = pod
        .container("one")
        .env("WHO", "me")
        .shell("sleep 1000")
        .run()
        .await?;
    let output = one
        .exec(&["sh", "-c", "echo $WHO; echo oops >&2; exit 42"])
        .await?;
    assert_eq!(
        (output.code, output.out.as_str(), output.err.as_str()),
        (42, "me\n", "oops\n")
    );
    let output = one.exec(&["seq", "1", "50000"]).await?;
    assert_eq!(
        (output.code, output.out.len()),
        (0, (1..=50000).map(|n: u32| n.to_string().len() + 1).sum())
    );
    let killed = one.exec(&["sh", "-c", "kill -9 $$"]).await?;
    assert_eq!(killed.code, 137);
    let refusal = one
        .exec(&["/no/such/program"])
        .await
        .err()
        .context("a missing program was run")?;
    assert!(refusal.message().contains("/no/such/program"), "{refusal}");
    // What it leaves in the background is not waited for for ever.
    let background = one
        .exec(&["sh", "-c", "sleep 1000 >/dev/null 2>&1 & exit 5"])
        .await?;
    assert_eq!(background.code, 5);
    one.stop(0).await?;
    assert!(one.exec(&["true"]).await.is_err());
    pod.remove().await
}

pub(crate) async fn stop_asks_before_it_kills(cri: &Cri<'_>) -> Result<()> {
    let pod = cri.pod("grace").run().await?;
    let polite = "trap 'echo bye; exit 7' TERM; echo ready; while :; do sleep 0.05; done";
    let stubborn = "trap '' TERM; echo ready; while :; do sleep 0.05; done";
    let polite = pod.container("polite").shell(polite).run().await?;
    let stubborn = pod.container("stubborn").shell(stubborn).run().await?;
    for container in [&polite, &stubborn] {
        container.says("the trap", |text| text == "ready\n").await?;
    }
    polite.stop(30).await?;
    let status = polite.status().await?;
    assert_eq!(
        (status.state(), status.exit_code),
        (ContainerState::ContainerExited, 7)
    );
    assert_eq!(
        polite
            .says("the farewell", |text| text.contains("bye"))
            .await?,
        "ready\nbye\n"
    );
    let since = Instant::now();
    stubborn.stop(1).await?;
    assert!(
        since.elapsed().as_secs_f32() >= 1.0,
        "it was killed before its grace was over"
    );
    assert_eq!(stubborn.ended().await?.exit_code, 137);
    // To stop what has ended is no error.
    stubborn.stop(1).await?;
    pod.remove().await
}

pub(crate) async fn one_container_restarts_alone(cri: &Cri<'_>) -> Result<()> {
    let pod = cri.pod("restart").run().await?;
    let other = pod.container("other").args(&["/counter"]).run().await?;
    let (pid, before) = (other.pid().await?, other.counts_to(2).await?);
    let first = pod
        .container("one")
        .shell("echo first > /tmp/file; exit 1")
        .run()
        .await?;
    assert_eq!(first.ended().await?.exit_code, 1);
    let second = pod
        .container("one")
        .attempt(1)
        .shell("ls /tmp; sleep 1000")
        .run()
        .await?;
    // A new layer, a new log.
    assert_eq!(second.shell("ls /tmp").await?, "");
    first.remove().await?;
    cri.node().is_rid_of(first.id()).await?;
    assert_eq!(second.state().await?, ContainerState::ContainerRunning);
    assert_eq!(other.pid().await?, pid);
    assert_eq!(other.counts_to(before.n + 3).await?.nonce, before.nonce);
    pod.remove().await
}

pub(crate) async fn a_killed_process_is_told(cri: &Cri<'_>) -> Result<()> {
    let pod = cri.pod("killed").run().await?;
    let one = pod.container("one").args(&["/counter"]).run().await?;
    let pid = nix::unistd::Pid::from_raw(one.pid().await?.try_into()?);
    nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGKILL)?;
    let status = one.ended().await?;
    assert_eq!((status.exit_code, status.reason.as_str()), (137, "Error"));
    assert!(status.started_at > 0 && status.finished_at > status.started_at);
    pod.remove().await
}

pub(crate) async fn an_end_is_told_with_its_reason(cri: &Cri<'_>) -> Result<()> {
    let pod = cri.pod("ends").run().await?;
    for (code, reason) in [(0, "Completed"), (3, "Error")] {
        let name = format!("exit-{code}");
        let one = pod
            .container(&name)
            .shell(&format!("exit {code}"))
            .run()
            .await?;
        let status = one.ended().await?;
        assert_eq!((status.exit_code, status.reason.as_str()), (code, reason));
    }
    pod.remove().await
}

pub(crate) async fn a_missing_program_fails_the_start_alone(cri: &Cri<'_>) -> Result<()> {
    let pod = cri.pod("no-program").run().await?;
    let other = pod.container("other").args(&["/counter"]).run().await?;
    let one = pod
        .container("one")
        .args(&["/no/such/program"])
        .create()
        .await?;
    let refusal = one
        .start()
        .await
        .err()
        .context("a missing program was started")?;
    assert!(refusal.message().contains("/no/such/program"), "{refusal}");
    let status = one.ended().await?;
    assert_eq!(
        (status.exit_code, status.reason.as_str()),
        (128, "StartError")
    );
    assert!(
        status.message.contains("/no/such/program"),
        "{}",
        status.message
    );
    assert_eq!(other.state().await?, ContainerState::ContainerRunning);
    pod.remove().await
}

pub(crate) async fn last_words_arrive(cri: &Cri<'_>) -> Result<()> {
    let pod = cri.pod("last-words").run().await?;
    let one = pod
        .container("one")
        .shell("echo why > /dev/termination-log; exit 9")
        .run()
        .await?;
    assert_eq!(one.ended().await?.exit_code, 9);
    assert_eq!(one.last_words()?, "why\n");
    pod.remove().await
}

pub(crate) async fn stats_are_there(cri: &Cri<'_>) -> Result<()> {
    let pod = cri.pod("stats").run().await?;
    let one = pod
        .container("one")
        .memory_limit(64 << 20)
        .args(&["/counter"])
        .run()
        .await?;
    one.counts_to(3).await?;
    let stats = one.stats().await?;
    let memory = stats
        .memory
        .and_then(|memory| memory.working_set_bytes)
        .context("no memory")?;
    assert!((1..64 << 20).contains(&memory.value), "{memory:?}");
    let cpu = stats
        .cpu
        .and_then(|cpu| cpu.usage_core_nano_seconds)
        .context("no cpu")?;
    assert!(cpu.value > 0);
    pod.remove().await
}
