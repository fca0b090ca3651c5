//! How the story is told: one line per step with its time, alive while it lasts, and a table at the end.

use rekindle_harness::progress::Progress;
use std::io::{IsTerminal, Write};
use std::time::{Duration, Instant};

/// Wide enough for a sentence, narrow enough for a terminal of 96 columns with the time behind it.
const WIDTH: usize = 84;

/// A line on stdout; a reader who has gone is no reason to stop.
pub(crate) fn line(text: &str) {
    let _ = writeln!(std::io::stdout(), "{text}");
}

/// A headline.
pub(crate) fn chapter(text: &str) {
    let (bold, plain) = if std::io::stdout().is_terminal() {
        ("\x1b[1m", "\x1b[0m")
    } else {
        ("", "")
    };
    line(&format!("\n{bold}{text}{plain}"));
}

/// Something that takes a while.
#[derive(Debug)]
pub(crate) struct Step {
    progress: Progress,
    began: Instant,
}

impl Step {
    /// It begins; `what` is shown while it lasts.
    pub(crate) fn begin(what: &str) -> Step {
        Step {
            progress: Progress::live(what),
            began: Instant::now(),
        }
    }

    /// It is done: what came of it, and how long it took.
    pub(crate) fn done(self, what: &str) -> Duration {
        let took = self.began.elapsed();
        self.took(what, took)
    }

    /// The same, where the moment of its end is known better.
    pub(crate) fn took(self, what: &str, took: Duration) -> Duration {
        self.progress.hide();
        line(&format!("  {what:<WIDTH$} {:>9}", seconds(took)));
        took
    }
}

/// A fact below a step.
pub(crate) fn fact(text: &str) {
    line(&format!("    {text}"));
}

/// A time, as exact as it is worth.
pub(crate) fn seconds(time: Duration) -> String {
    format!("{:.2} s", time.as_secs_f64())
}

/// Bytes, as people say them.
pub(crate) fn size(bytes: u64) -> String {
    format!("{:.1} MB", bytes as f64 / 1e6)
}

/// A table: the first row heads it, the first column names the rows.
pub(crate) fn table(rows: &[Vec<String>]) {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width = |column: usize| {
        rows.iter()
            .filter_map(|row| row.get(column))
            .map(|cell| cell.chars().count())
            .max()
            .unwrap_or(0)
    };
    let widths: Vec<usize> = (0..columns).map(width).collect();
    for (number, row) in rows.iter().enumerate() {
        let cells = row
            .iter()
            .zip(&widths)
            .enumerate()
            .map(|(column, (cell, &width))| {
                if column == 0 {
                    format!("{cell:<width$}")
                } else {
                    format!("{cell:>width$}")
                }
            });
        line(&format!("  {}", cells.collect::<Vec<_>>().join("   ")));
        if number == 0 {
            let rule: usize = widths.iter().sum::<usize>() + 3 * columns.saturating_sub(1);
            line(&format!("  {}", "─".repeat(rule)));
        }
    }
}

/// The story did not come to its end.
pub(crate) fn failure(error: &anyhow::Error) {
    let _ = writeln!(
        std::io::stderr(),
        "\nthe demo failed: {error:#}\n\n\
         docs/TROUBLESHOOTING.md explains the sentences; `make node` gives a shell on such a node; the node of this run is gone."
    );
}

/// Somebody pressed Ctrl-C.
pub(crate) fn interrupted() {
    let _ = writeln!(
        std::io::stderr(),
        "\ninterrupted: the node and all that ran on it are gone"
    );
}
