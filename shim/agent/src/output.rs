//! Everything that is printed for a person.
#![allow(
    clippy::print_stdout,
    clippy::print_stderr,
    reason = "the one module of the CLI that prints"
)]

use std::{
    env,
    io::{IsTerminal as _, Write as _, stderr, stdout},
    time::Duration,
};

use indicatif::{ProgressBar, ProgressStyle};
use tracing_subscriber::EnvFilter;

/// Prints one line on stdout. Nobody reading it any more (`| head`) stops nothing.
pub(crate) fn line(text: impl AsRef<str>) {
    let _ = writeln!(stdout(), "{}", text.as_ref());
}

/// Prints a value as one line of JSON on stdout.
pub(crate) fn json(value: &impl serde::Serialize) -> anyhow::Result<()> {
    line(serde_json::to_string(value)?);
    Ok(())
}

/// Prints a line on stderr, for whoever keeps what a process of ours says.
pub(crate) fn note(line: &str) {
    eprintln!("{line}");
}

/// Prints an error with its causes on stderr, as one sentence.
pub(crate) fn error(error: &anyhow::Error) {
    eprintln!("rekindle: {error:#}");
}

/// What `usual` lets through goes to stderr, warnings of the libraries above all; `REKINDLE_LOG=debug` shows more.
pub(crate) fn log_to_stderr(usual: &str) {
    let filter = EnvFilter::try_from_env("REKINDLE_LOG").unwrap_or_else(|_| usual.into());
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(stderr)
        .with_ansi(colour_on(stderr().is_terminal()))
        .without_time()
        .init();
}

fn colour_on(terminal: bool) -> bool {
    // https://no-color.org: set and not empty means no colour.
    terminal && env::var_os("NO_COLOR").is_none_or(|value| value.is_empty())
}

/// Colours for stdout, or none.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Paint {
    on: bool,
}

impl Paint {
    pub(crate) fn for_stdout() -> Self {
        Self {
            on: colour_on(stdout().is_terminal()),
        }
    }

    pub(crate) fn green(self, text: &str) -> String {
        self.wrap("32", text)
    }

    pub(crate) fn red(self, text: &str) -> String {
        self.wrap("31", text)
    }

    pub(crate) fn yellow(self, text: &str) -> String {
        self.wrap("33", text)
    }

    fn wrap(self, code: &str, text: &str) -> String {
        if self.on {
            format!("\x1b[{code}m{text}\x1b[0m")
        } else {
            text.to_owned()
        }
    }
}

/// A spinner with the elapsed time on stderr; nothing where stderr is no terminal.
pub(crate) fn spinner(phase: &str) -> ProgressBar {
    if !stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let bar = ProgressBar::new_spinner();
    if let Ok(style) = ProgressStyle::with_template("{spinner} {msg} ({elapsed})") {
        bar.set_style(style);
    }
    bar.set_message(phase.to_owned());
    bar.enable_steady_tick(Duration::from_millis(100));
    bar
}

/// `1.2 GiB`.
pub(crate) fn bytes(n: u64) -> String {
    indicatif::BinaryBytes(n).to_string()
}
