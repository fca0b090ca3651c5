//! The commands that a call starts, as a person would type them, and what is told of them meanwhile.

use std::{path::PathBuf, process::Stdio};

use serde_json::Value;
use tokio::{
    io::{AsyncBufReadExt as _, AsyncReadExt as _, BufReader},
    process::Command,
};
use ttrpc::Code;

use super::{Event, Kind, Told, refused};

/// Starts `rekindle …`.
#[derive(Debug, Clone)]
pub(super) struct Commands {
    pub(super) told: Told,
    /// Of this process: its commands read it too.
    pub(super) config: Option<PathBuf>,
}

/// What is told while a command runs.
#[derive(Debug)]
pub(super) struct Telling {
    /// What its lines of progress are.
    pub(super) progress: Option<Kind>,
    /// The container or the image that it is about.
    pub(super) about: Event,
}

impl Commands {
    /// `rekindle …`: the last line that it prints, as JSON. Each line before is told to who watches, and so is a failure.
    pub(super) async fn run(&self, args: &[&str], telling: Telling) -> ttrpc::Result<Value> {
        let program = std::env::current_exe().map_err(|e| refused(Code::INTERNAL, e))?;
        let mut command = Command::new(program);
        if let Some(config) = &self.config {
            command.arg("--config").arg(config);
        }
        command.args(args);
        let (told, about) = (self.told.clone(), telling.about.clone());
        // A caller that is gone ends nothing: what was begun is whole, or nothing of it.
        let answer = tokio::spawn(answer(command, self.told.clone(), telling)).await;
        let answer = answer.map_err(|e| refused(Code::INTERNAL, e))?;
        if let Err(ttrpc::Error::RpcStatus(status)) = &answer {
            let message = status.message.clone();
            told.event(Kind::FAILED, Event { message, ..about });
        }
        answer
    }
}

async fn answer(mut command: Command, told: Told, telling: Telling) -> ttrpc::Result<Value> {
    let failed = |e: &dyn std::fmt::Display| refused(Code::INTERNAL, e);
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|e| failed(&e))?;
    let (Some(out), Some(mut err)) = (child.stdout.take(), child.stderr.take()) else {
        return Err(failed(&"it has no output"));
    };
    let mut said = String::new();
    let lines = async {
        let (mut lines, mut last) = (BufReader::new(out).lines(), Value::Null);
        while let Some(line) = lines.next_line().await? {
            last = serde_json::from_str(&line).unwrap_or(Value::Null);
            telling.tell(&told, &last);
        }
        Ok::<_, std::io::Error>(last)
    };
    let (last, read) = tokio::join!(lines, err.read_to_string(&mut said));
    let status = child.wait().await.map_err(|e| failed(&e))?;
    read.map_err(|e| failed(&e))?;
    if !status.success() {
        let code = match status.code() {
            Some(2) => Code::INVALID_ARGUMENT,
            Some(3) => Code::FAILED_PRECONDITION,
            Some(4) => Code::NOT_FOUND,
            _ => Code::UNKNOWN,
        };
        return Err(refused(code, said.trim().trim_start_matches("rekindle: ")));
    }
    last.map_err(|e| failed(&e))
}

impl Telling {
    /// Tells of a line, if it is one of progress.
    fn tell(&self, told: &Told, line: &Value) {
        let Some(kind) = self.progress else { return };
        let text = |key: &str| line[key].as_str().map(str::to_owned);
        let mut event = self.about.clone();
        match line["event"].as_str() {
            Some("step" | "begun") => {}
            Some("progress") => {
                event.done = line["done"].as_u64().unwrap_or_default();
                event.total = line["total"].as_u64().unwrap_or_default();
            }
            _ => return,
        }
        event.step = text("step").unwrap_or_default();
        event.image = text("image").unwrap_or(event.image);
        told.event(kind, event);
    }
}
