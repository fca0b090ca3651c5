//! Output to programs (`binary://`) and files.

use crate::{Stage, process::is_gone};
use anyhow::{Context, Result};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use rekindle_harness::container::State;
use rekindle_harness::options::CheckpointOptions;
use rekindle_harness::{Count, Runtime, poll};
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;

/// What every one of these begins with: it notes in its folder what it was told, and then that it was asked to end.
const NOTES: &str = r#"#!/bin/bash
dir=$2
printf '%s\n' "$@" > "$dir/args"
tr '\0' '\n' < /proc/$$/environ > "$dir/environ"
trap 'echo term > "$dir/term"' TERM
"#;
/// Keeps both outputs to their end.
const KEEPS: &str = r#"
cat <&3 > "$dir/out" 5>&- &
cat <&4 > "$dir/err" 5>&- &
exec 3<&- 4<&-
echo -n r >&5
exec 5>&-
wait; wait; wait
"#;

/// A logging program on a node, with the folder for what it notes.
struct Logger<'s> {
    stage: &'s Stage,
    name: String,
}

impl<'s> Logger<'s> {
    fn new(stage: &'s Stage, name: &str, body: &str) -> Result<Self> {
        let logger = Self {
            stage,
            name: name.to_owned(),
        };
        fs::create_dir_all(logger.file(""))?;
        let program = logger.file("logger");
        fs::write(&program, format!("{NOTES}{body}"))?;
        fs::set_permissions(&program, fs::Permissions::from_mode(0o755))?;
        Ok(logger)
    }

    fn folder(&self) -> String {
        format!("/run/loggers/{}", self.name)
    }

    fn file(&self, name: &str) -> PathBuf {
        self.stage.node.path(self.folder()).join(name)
    }

    fn uri(&self) -> String {
        let folder = self.folder();
        format!(
            "binary://{folder}/logger?dir={}",
            folder.replace('/', "%2F")
        )
    }

    fn noted(&self, what: &str) -> Result<String> {
        let file = self.file(what);
        fs::read_to_string(&file).with_context(|| format!("reading {}", file.display()))
    }

    fn pids(&self) -> Result<Vec<u32>> {
        let program = format!("{}/logger", self.folder());
        let found = self.stage.node.processes_with(&[&program])?;
        Ok(found.into_iter().map(|(pid, _)| pid).collect())
    }

    async fn has_ended(&self) -> Result<()> {
        poll::until("the logging program's end", async || {
            Ok(self.pids()?.is_empty().then_some(()))
        })
        .await
    }

    async fn says(&self, what: &str, text: &str) -> Result<()> {
        let mut last = String::new();
        let said = poll::until("the output", async || {
            last = self.noted(what)?;
            Ok((last == text).then_some(()))
        });
        let outcome = said.await;
        outcome.with_context(|| format!("what came is {last:?}"))
    }
}

/// The processes below a shim that nobody has reaped.
fn zombies_of(stage: &Stage, id: &str) -> Result<Vec<String>> {
    let (shim, _) = stage.node.shim_of(id)?;
    let children = fs::read_to_string(format!("/proc/{shim}/task/{shim}/children"))?;
    let stat = |pid: &str| fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let stats = children.split_whitespace().map(stat);
    Ok(stats.filter(|stat| stat.contains(") Z ")).collect())
}

pub(crate) async fn a_logging_program_gets_both_outputs(stage: &Stage) -> Result<()> {
    let logger = Logger::new(stage, "log-both", KEEPS)?;
    let task = stage
        .container("log-both")
        .log_uri(&logger.uri())
        .shell("echo one; echo two >&2; cat; seq 1 100000")
        .run()
        .await?;
    let process = task.process().await?;
    assert_eq!([&process.stdout, &process.stderr], [&logger.uri(); 2]);
    task.wait().await?;
    task.delete().await?;
    logger.has_ended().await?;
    let numbers: String = (1..=100_000).map(|n| format!("{n}\n")).collect();
    assert!(
        logger.noted("out")? == format!("one\n{numbers}"),
        "stdout lost something"
    );
    assert_eq!(logger.noted("err")?, "two\n");
    assert_eq!(logger.noted("args")?, format!("dir\n{}\n", logger.folder()));
    let environ = logger.noted("environ")?;
    let mut environ: Vec<&str> = environ.lines().collect();
    environ.sort_unstable();
    assert_eq!(
        environ,
        ["CONTAINER_ID=log-both", "CONTAINER_NAMESPACE=default"]
    );
    is_gone(stage, "log-both").await?;
    task.remove().await
}

pub(crate) async fn a_terminal_goes_to_a_logging_program(stage: &Stage) -> Result<()> {
    let logger = Logger::new(stage, "log-terminal", KEEPS)?;
    let task = stage
        .container("log-terminal")
        .terminal()
        .log_uri(&logger.uri())
        .shell("test -t 1 && test -t 2 && echo one; echo two >&2")
        .run()
        .await?;
    task.wait().await?;
    task.delete().await?;
    logger.says("out", "one\r\ntwo\r\n").await?;
    assert_eq!(logger.noted("err")?, "");
    logger.has_ended().await?;
    task.remove().await
}

pub(crate) async fn an_exec_has_a_logging_program_of_its_own(stage: &Stage) -> Result<()> {
    let logger = Logger::new(stage, "log-exec", KEEPS)?;
    let task = stage
        .container("log-exec")
        .shell("sleep 1000")
        .run()
        .await?;
    let exec = task
        .exec("speaker", &["sh", "-c", "echo one; echo two >&2; exit 4"])
        .log_uri(&logger.uri())
        .run()
        .await?;
    assert_eq!(exec.wait().await?.status, 4);
    exec.delete().await?;
    logger.has_ended().await?;
    assert_eq!(
        [logger.noted("out")?, logger.noted("err")?],
        ["one\n", "two\n"]
    );
    assert!(logger.noted("environ")?.contains("CONTAINER_ID=speaker\n"));
    let failed = Logger::new(stage, "log-exec-failed", KEEPS)?;
    let missing = task
        .exec("missing", &["/no/such/program"])
        .log_uri(&failed.uri())
        .add()
        .await?;
    assert!(missing.start().await.is_err());
    missing.delete().await?;
    failed.has_ended().await?;
    poll::until("the reaper", async || {
        Ok(zombies_of(stage, "log-exec")?.is_empty().then_some(()))
    })
    .await?;
    task.remove().await
}

/// The container has the only ends of the pipes but the program's: it is told, and does what it does then.
pub(crate) async fn a_dead_logging_program_breaks_the_pipes(stage: &Stage) -> Result<()> {
    let logger = Logger::new(stage, "log-dead", "exec 3<&- 4<&- 5>&-\nexit 3\n")?;
    let task = stage
        .container("log-dead")
        .log_uri(&logger.uri())
        .shell("sh -c 'while echo unheard; do :; done'; exit $?")
        .run()
        .await?;
    // SIGPIPE, of the shell that is not the init.
    assert_eq!(task.wait().await?.status, 128 + 13);
    task.delete().await?;
    task.remove().await
}

pub(crate) async fn one_that_does_not_end_is_killed(stage: &Stage) -> Result<()> {
    let deaf = "exec 5>&-\nwhile :; do sleep 1000 & wait; done\n";
    let logger = Logger::new(stage, "log-deaf", deaf)?;
    let task = stage
        .container("log-deaf")
        .log_uri(&logger.uri())
        .shell("exit 0")
        .run()
        .await?;
    task.wait().await?;
    task.delete().await?;
    assert_eq!(logger.noted("term")?, "term\n");
    logger.has_ended().await?;
    task.remove().await
}

pub(crate) async fn one_that_is_missing_fails_the_creation(stage: &Stage) -> Result<()> {
    let (task, refusal) = stage
        .container("log-missing")
        .log_uri("binary:///no/such/logger?a=b")
        .shell("sleep 1000")
        .try_create()
        .await?;
    let refusal = refusal.err().context("it was created without its logger")?;
    assert!(refusal.message().contains("/no/such/logger"), "{refusal}");
    is_gone(stage, "log-missing").await?;
    task.remove().await
}

pub(crate) async fn one_that_is_never_ready_fails_the_creation(stage: &Stage) -> Result<()> {
    // The shim that containerd ships waits for as long as its caller does.
    if stage.node.runtime() == Runtime::Go {
        return Ok(());
    }
    let logger = Logger::new(
        stage,
        "log-unready",
        "while :; do sleep 1000 & wait; done\n",
    )?;
    let (task, refusal) = stage
        .container("log-unready")
        .log_uri(&logger.uri())
        .shell("sleep 1000")
        .try_create()
        .await?;
    let refusal = refusal.err().context("it was created without its logger")?;
    let words = refusal.message();
    assert!(
        words.contains("did not say within 10 s that it is ready"),
        "{words}"
    );
    assert!(words.contains("/run/loggers/log-unready/logger"), "{words}");
    logger.has_ended().await?;
    is_gone(stage, "log-unready").await?;
    task.remove().await
}

pub(crate) async fn a_failed_creation_ends_its_logging_program(stage: &Stage) -> Result<()> {
    let logger = Logger::new(stage, "log-failed", KEEPS)?;
    let (task, refusal) = stage
        .container("log-failed")
        .log_uri(&logger.uri())
        .args(&["/no/such/program"])
        .try_create()
        .await?;
    let refusal = refusal
        .err()
        .context("it was created without its program")?;
    assert!(refusal.message().contains("/no/such/program"), "{refusal}");
    logger.has_ended().await?;
    is_gone(stage, "log-failed").await?;
    task.remove().await
}

pub(crate) async fn a_killed_shim_leaves_no_logging_program(stage: &Stage) -> Result<()> {
    let logger = Logger::new(stage, "log-orphan", KEEPS)?;
    let task = stage
        .container("log-orphan")
        .log_uri(&logger.uri())
        .shell("echo one; sleep 1000")
        .run()
        .await?;
    logger.says("out", "one\n").await?;
    let (shim, _) = stage.node.shim_of("log-orphan")?;
    kill(Pid::from_raw(shim.cast_signed()), Signal::SIGKILL)?;
    is_gone(stage, "log-orphan").await?;
    logger.has_ended().await?;
    task.remove().await
}

pub(crate) async fn what_has_a_logging_program_continues_from_an_image(
    stage: &Stage,
) -> Result<()> {
    let first = Logger::new(stage, "log-dumped", KEEPS)?;
    let task = stage
        .container("log-dumped")
        .log_uri(&first.uri())
        .args(&["/counter"])
        .run()
        .await?;
    let before = poll::until("the counter", async || {
        Ok(Count::last(&first.noted("out")?).filter(|count| count.n >= 5))
    })
    .await?;
    let options = CheckpointOptions {
        exit: true,
        image_path: "/tmp/log-dumped".to_owned(),
        ..Default::default()
    };
    task.checkpoint(&options).await?;
    task.wait().await?;
    task.delete().await?;
    first.has_ended().await?;
    let until = Count::last(&first.noted("out")?)
        .context("the counter said nothing")?
        .n;

    let second = Logger::new(stage, "log-restored", KEEPS)?;
    let restored = stage
        .container("log-restored")
        .log_uri(&second.uri())
        .args(&["/counter"])
        .restore_from("/tmp/log-dumped")
        .run()
        .await?;
    let restored_says = poll::until("the restored counter", async || {
        let text = second.noted("out")?;
        Ok(Count::last(&text)
            .is_some_and(|count| count.n > until)
            .then_some(text))
    })
    .await?;
    before.continues_in(&restored_says, until)?;
    assert_eq!(restored.state().await?, State::Running);
    restored.kill(9).await?;
    restored.wait().await?;
    restored.delete().await?;
    second.has_ended().await?;
    restored.remove().await?;
    task.remove().await
}

pub(crate) async fn output_goes_to_a_file(stage: &Stage) -> Result<()> {
    let task = stage
        .container("log-file")
        .log_uri("file:///run/loggers/log%20file/new/log")
        .shell("echo one; echo two >&2; echo three")
        .run()
        .await?;
    task.wait().await?;
    task.delete().await?;
    let log = stage.node.path("/run/loggers/log file/new/log");
    let text = fs::read_to_string(&log)?;
    let mut lines: Vec<&str> = text.lines().collect();
    lines.sort_unstable();
    assert_eq!(lines, ["one", "three", "two"]);
    task.remove().await
}

pub(crate) async fn an_unknown_scheme_is_refused_by_name(stage: &Stage) -> Result<()> {
    let (task, refusal) = stage
        .container("log-unknown")
        .log_uri("gopher://host/path")
        .shell("sleep 1000")
        .try_create()
        .await?;
    let refusal = refusal.err().context("it was created")?;
    assert!(refusal.message().contains("gopher"), "{refusal}");
    is_gone(stage, "log-unknown").await?;
    task.remove().await
}

pub(crate) async fn ctr_names_a_logging_program(stage: &Stage) -> Result<()> {
    let logger = Logger::new(stage, "log-ctr", KEEPS)?;
    let uri = logger.uri();
    let node = &stage.node;
    let run = [
        "ctr",
        "run",
        "--detach",
        "--log-uri",
        &uri,
        &stage.busybox.name,
        "log-ctr",
    ];
    let [ctr, a, b, c, d, image, id] = run;
    node.run([
        ctr,
        a,
        b,
        c,
        d,
        image,
        id,
        "sh",
        "-c",
        "echo one; sleep 1000",
    ])
    .await?;
    logger.says("out", "one\n").await?;
    node.run(["ctr", "task", "delete", "--force", "log-ctr"])
        .await?;
    logger.has_ended().await?;
    node.run(["ctr", "container", "delete", "log-ctr"]).await?;
    Ok(())
}
