//! Standard input, output and error.

use crate::Stage;
use anyhow::Result;

pub(crate) async fn stdout_and_stderr_stay_apart(stage: &Stage) -> Result<()> {
    let task = stage
        .container("apart")
        .shell("echo one; echo two >&2; echo three")
        .run()
        .await?;
    assert_eq!(task.io().out()?.text().await?, "one\nthree\n");
    assert_eq!(task.io().err()?.text().await?, "two\n");
    task.remove().await
}

pub(crate) async fn large_output_arrives_whole(stage: &Stage) -> Result<()> {
    const LINES: usize = 400_000;
    let task = stage
        .container("large")
        .shell(&format!("seq 1 {LINES}; seq 1 {LINES} >&2"))
        .run()
        .await?;
    let expected: String = (1..=LINES).map(|n| format!("{n}\n")).collect();
    assert!(
        task.io().out()?.text().await? == expected,
        "stdout lost or changed something"
    );
    assert!(
        task.io().err()?.text().await? == expected,
        "stderr lost or changed something"
    );
    assert_eq!(task.wait().await?.status, 0);
    task.remove().await
}

pub(crate) async fn closing_stdin_ends_it(stage: &Stage) -> Result<()> {
    let task = stage
        .container("stdin")
        .stdin()
        .shell("cat; echo end")
        .run()
        .await?;
    let mut stdin = task.io().writer()?;
    stdin.write("first\n")?;
    task.io()
        .out()?
        .until("the echo", |text| text == "first\n")
        .await?;
    stdin.write("second\n")?;
    drop(stdin);
    task.close_stdin().await?;
    assert_eq!(task.wait().await?.status, 0);
    assert_eq!(task.io().out()?.text().await?, "first\nsecond\nend\n");
    task.remove().await
}

pub(crate) async fn a_terminal_echoes_and_is_resized(stage: &Stage) -> Result<()> {
    let line = "test -t 0 && test -t 1 && test -t 2 && echo all terminals; read line; stty size; echo got $line";
    let task = stage
        .container("terminal")
        .terminal()
        .stdin()
        .shell(line)
        .run()
        .await?;
    task.io()
        .out()?
        .until("the prompt", |text| text.contains("all terminals\r\n"))
        .await?;
    task.resize(101, 37).await?;
    let mut stdin = task.io().writer()?;
    stdin.write("typed\n")?;
    assert_eq!(task.wait().await?.status, 0);
    assert_eq!(
        task.io().out()?.text().await?,
        "all terminals\r\ntyped\r\n37 101\r\ngot typed\r\n"
    );
    assert!(task.process().await?.terminal);
    task.remove().await
}

pub(crate) async fn no_stdio_is_fine(stage: &Stage) -> Result<()> {
    let task = stage
        .container("mute")
        .detached()
        .shell("echo unheard; echo unheard >&2; read x; exit 2")
        .run()
        .await?;
    assert_eq!(task.wait().await?.status, 2);
    task.remove().await
}
