//! `rekindle prefetch`: fetches a dataset, for a person or for the shim.
//!
//! With `--json` it writes one object per line, and the last one is `ready` or `failed`. The shim reads
//! exactly these lines; nobody reading them does not stop the download.

use std::{
    io::{IsTerminal as _, Write as _, stderr, stdout},
    process::ExitCode,
    sync::{Mutex, PoisonError},
    time::{Duration, Instant},
};

use indicatif::{ProgressBar, ProgressStyle};
use rekindle_core::{config::NodeConfig, duration, name::Namespace, uri::DatasetUri};
use rekindle_dataset::{DatasetError, Event, Progress, Ready, Tuning, acquire};
use serde_json::{Value, json};
use tokio::signal::unix::{SignalKind, signal};

use crate::output;

/// `EX_TEMPFAIL` of sysexits.h: the same command may succeed later.
const TRY_AGAIN: u8 = 75;
/// As everywhere in this CLI: not allowed.
const REFUSED: u8 = 3;

/// Without a terminal, a line this often.
const LINE_EVERY: Duration = Duration::from_secs(5);

#[derive(Debug, clap::Args)]
#[command(after_help = "\
Examples:
  rekindle prefetch s3://models/all-minilm-l6-v2/
  rekindle prefetch --namespace team-a --deadline 10m s3://models/llama/

It exits with 75 when the same command may succeed later; what was fetched is kept, and the next call
continues from it.")]
pub(crate) struct PrefetchArgs {
    /// The dataset: s3://bucket/prefix/, or file:///folder/ where the configuration allows it.
    uri: DatasetUri,
    /// The namespace whose permission counts.
    #[arg(long, value_name = "NAMESPACE", default_value = "default")]
    namespace: Namespace,
    /// One JSON object per line on stdout.
    #[arg(long)]
    json: bool,
    /// Give up after this long (90s, 5m, 1h30m); what was fetched is kept.
    #[arg(long, value_name = "DURATION", value_parser = duration::parse)]
    deadline: Option<Duration>,
}

/// How it ended, when not with a dataset.
enum Ended {
    Failed(DatasetError),
    Deadline(Duration),
    Signal(&'static str),
}

pub(crate) async fn run(args: PrefetchArgs, config: &NodeConfig) -> anyhow::Result<ExitCode> {
    let view = View::new(args.json, &args.uri);
    let mut term = signal(SignalKind::terminate())?;
    let mut int = signal(SignalKind::interrupt())?;
    let on_event = |event| view.event(event);
    // Dropped, it leaves the parts that are verified to the next call.
    let ended = tokio::select! {
        result = acquire(config, &args.uri, &args.namespace, Tuning::default(), &on_event) =>
            result.map_err(Ended::Failed),
        after = sleep(args.deadline) => Err(Ended::Deadline(after)),
        _ = term.recv() => Err(Ended::Signal("SIGTERM")),
        _ = int.recv() => Err(Ended::Signal("SIGINT")),
    };
    Ok(match ended {
        Ok(ready) => {
            view.ready(&ready);
            ExitCode::SUCCESS
        }
        Err(ended) => view.failed(&args.uri, &ended),
    })
}

async fn sleep(deadline: Option<Duration>) -> Duration {
    match deadline {
        Some(after) => {
            tokio::time::sleep(after).await;
            after
        }
        None => std::future::pending().await,
    }
}

/// Who looks at it.
enum View {
    Json,
    Bar(ProgressBar),
    Lines(Mutex<Option<Instant>>),
}

impl View {
    fn new(json: bool, uri: &DatasetUri) -> Self {
        if json {
            return Self::Json;
        }
        if !stderr().is_terminal() {
            return Self::Lines(Mutex::new(None));
        }
        let bar = ProgressBar::no_length();
        let style =
            "{spinner} {prefix}  {wide_bar} {bytes}/{total_bytes}  {bytes_per_sec}  {eta}  {msg}";
        if let Ok(style) = ProgressStyle::with_template(style) {
            bar.set_style(style);
        }
        bar.set_prefix(uri.to_string());
        bar.enable_steady_tick(Duration::from_millis(100));
        Self::Bar(bar)
    }

    fn event(&self, event: Event) {
        match (self, event) {
            (Self::Json, Event::Listing) => line(&json!({"event": "listing"})),
            (Self::Json, Event::Progress(progress)) => {
                if let Ok(Value::Object(mut fields)) = serde_json::to_value(progress) {
                    fields.insert("event".to_owned(), "progress".into());
                    line(&Value::Object(fields));
                }
            }
            (Self::Bar(bar), Event::Listing) => bar.set_message("listing"),
            (Self::Bar(bar), Event::Progress(progress)) => {
                bar.set_length(progress.total);
                bar.set_position(progress.done);
                bar.set_message(format!(
                    "{}/{} files",
                    progress.files_done, progress.files_total
                ));
            }
            (Self::Lines(_), Event::Listing) => {}
            (Self::Lines(last), Event::Progress(progress)) => {
                let mut last = last.lock().unwrap_or_else(PoisonError::into_inner);
                if last.is_none_or(|last| last.elapsed() >= LINE_EVERY) {
                    *last = Some(Instant::now());
                    // A person's log; nobody reading it stops nothing.
                    let _ = writeln!(stderr(), "{}", sentence(&progress));
                }
            }
        }
    }

    fn ready(&self, ready: &Ready) {
        if let Self::Json = self {
            return line(&json!({
                "event": "ready",
                "path": ready.path,
                "files": ready.files,
                "bytes": ready.bytes,
                "verified": ready.verified,
                "version": ready.version,
                "hit": ready.hit,
            }));
        }
        self.clear();
        output::line(format!(
            "{} ({} files, {}, verified by {}{})",
            ready.path.display(),
            ready.files,
            output::bytes(ready.bytes),
            serde_json::to_value(ready.verified)
                .ok()
                .and_then(|name| name.as_str().map(str::to_owned))
                .unwrap_or_default(),
            if ready.hit { ", already here" } else { "" }
        ));
    }

    fn failed(&self, uri: &DatasetUri, ended: &Ended) -> ExitCode {
        let kept = "what was fetched is kept, and the next call continues from it";
        let (reason, retryable, refused) = match ended {
            Ended::Failed(error) => {
                let sentence = chain(error);
                (sentence, error.is_retryable(), error.is_refusal())
            }
            Ended::Deadline(after) => {
                let seconds = after.as_secs_f64();
                (
                    format!("{uri} is not here after {seconds} s: {kept}"),
                    true,
                    false,
                )
            }
            Ended::Signal(name) => (
                format!("fetching {uri}: stopped by {name}; {kept}"),
                true,
                false,
            ),
        };
        self.clear();
        if let Self::Json = self {
            line(&json!({"event": "failed", "reason": reason, "retryable": retryable}));
        } else {
            output::error(&anyhow::anyhow!(reason));
        }
        match (refused, retryable) {
            (true, _) => ExitCode::from(REFUSED),
            (_, true) => ExitCode::from(TRY_AGAIN),
            _ => ExitCode::FAILURE,
        }
    }

    fn clear(&self) {
        if let Self::Bar(bar) = self {
            bar.finish_and_clear();
        }
    }
}

/// An error with its causes, as one sentence.
fn chain(error: &DatasetError) -> String {
    let mut sentence = error.to_string();
    let mut next = std::error::Error::source(error);
    while let Some(cause) = next {
        sentence.push_str(": ");
        sentence.push_str(&cause.to_string());
        next = cause.source();
    }
    sentence
}

fn sentence(progress: &Progress) -> String {
    format!(
        "{} of {}, {}/s, {} of {} files",
        output::bytes(progress.done),
        output::bytes(progress.total),
        output::bytes(progress.bytes_per_second),
        progress.files_done,
        progress.files_total
    )
}

fn line(value: &Value) {
    // The reader may be gone (a shim that was killed); the download goes on for the next one.
    let _ = writeln!(stdout().lock(), "{value}");
}
