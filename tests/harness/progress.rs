//! One line on stderr while something takes long: alive on a terminal, a sentence before and after elsewhere.

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use std::io::{IsTerminal, Write};
use std::time::{Duration, Instant};

/// What takes long, until [`Progress::done`].
#[derive(Debug)]
pub struct Progress {
    bar: ProgressBar,
    what: String,
    since: Instant,
}

impl Progress {
    /// Something of which nobody knows how long it takes.
    pub fn start(what: &str) -> Progress {
        if !std::io::stderr().is_terminal() {
            let _ = writeln!(std::io::stderr(), "{what} …");
        }
        Progress::live(what)
    }

    /// The same, said on a terminal only.
    pub fn live(what: &str) -> Progress {
        Progress::with(what, None, "{spinner} {prefix} {elapsed} {wide_msg}")
    }

    /// Something that ends when `total` bytes have come by.
    pub fn bytes(what: &str, total: u64) -> Progress {
        Progress::with(
            what,
            Some(total),
            "{spinner} {prefix} {bar:30} {bytes}/{total_bytes} {bytes_per_sec} {eta}",
        )
    }

    fn with(what: &str, total: Option<u64>, template: &str) -> Progress {
        let target = if std::io::stderr().is_terminal() {
            ProgressDrawTarget::stderr()
        } else {
            ProgressDrawTarget::hidden()
        };
        let bar = ProgressBar::with_draw_target(total, target);
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style);
        }
        bar.set_prefix(what.to_owned());
        bar.enable_steady_tick(Duration::from_millis(200));
        Progress {
            bar,
            what: what.to_owned(),
            since: Instant::now(),
        }
    }

    /// What it is at.
    pub fn step(&self, line: &str) {
        self.bar.set_message(line.to_owned());
    }

    /// So many bytes more.
    pub fn add(&self, bytes: u64) {
        self.bar.inc(bytes);
    }

    /// It is done, and somebody else tells.
    pub fn hide(self) {
        self.bar.finish_and_clear();
    }

    /// It is done, and the line tells how long it took.
    pub fn done(self) {
        self.bar.finish_and_clear();
        let _ = writeln!(
            std::io::stderr(),
            "{}: {} s",
            self.what,
            self.since.elapsed().as_secs()
        );
    }
}
