//! What a machine says on its serial console, and what of it is a verdict: a line of a story's, or of Rust's test harness.

use std::collections::HashMap;
use std::io::{BufRead, BufReader, Read};
use std::sync::{Condvar, Mutex, PoisonError};
use std::time::Duration;

/// What was heard so far.
#[derive(Debug, Default)]
pub(super) struct Console {
    heard: Mutex<Heard>,
    more: Condvar,
}

#[derive(Debug, Default)]
struct Heard {
    lines: Vec<String>,
    /// By check; the error is its reason, and what was said since the check before.
    verdicts: HashMap<String, Result<(), String>>,
    /// How many lines there were at the last verdict.
    told: usize,
    /// The test whose words are being repeated after the last test, and from which line on.
    failed: Option<(String, usize)>,
    over: bool,
}

/// What the machine says of a check.
pub(super) enum Answer {
    /// How it went.
    Verdict(Result<(), String>),
    /// Nothing until its end, or until the limit. What it said last.
    Silence {
        /// It has ended.
        over: bool,
        /// The last lines.
        tail: String,
    },
}

impl Console {
    /// Notes every line until there are no more.
    pub(super) fn listen(&self, out: impl Read) {
        let note = |change: &dyn Fn(&mut Heard)| {
            change(&mut self.heard.lock().unwrap_or_else(PoisonError::into_inner));
            self.more.notify_all();
        };
        for line in BufReader::new(out).split(b'\n').map_while(Result::ok) {
            let line = String::from_utf8_lossy(&line).trim_end().to_owned();
            note(&|heard| heard.note(&line));
        }
        note(&|heard| heard.over = true);
    }

    /// Waits for what is said of `check`, no longer than `limit`.
    pub(super) fn wait(&self, check: &str, limit: Duration) -> Answer {
        let heard = self.heard.lock().unwrap_or_else(PoisonError::into_inner);
        let (heard, _) = self
            .more
            .wait_timeout_while(heard, limit, |heard| {
                !heard.over && !heard.verdicts.contains_key(check)
            })
            .unwrap_or_else(PoisonError::into_inner);
        match heard.verdicts.get(check) {
            Some(verdict) => Answer::Verdict(verdict.clone()),
            None => Answer::Silence {
                over: heard.over,
                tail: heard.tail(),
            },
        }
    }
}

impl Heard {
    fn note(&mut self, line: &str) {
        let at = self.lines.len();
        self.lines.push(line.to_owned());
        let section = line.strip_prefix("---- ");
        let section = section.and_then(|rest| rest.strip_suffix(" stdout ----"));
        if (section.is_some() || line == "failures:")
            && let Some((test, from)) = self.failed.take()
        {
            let said = self.lines[from..at].join("\n");
            self.verdicts.insert(test, Err(said));
        }
        if let Some(test) = section {
            self.failed = Some((test.to_owned(), at + 1));
        }
        if let Some((check, verdict)) = verdict(line) {
            let said = || self.lines[self.told..at].join("\n");
            let verdict = verdict.map_err(|reason| format!("{reason}\n{}", said()));
            self.told = at + 1;
            self.verdicts.insert(check.to_owned(), verdict);
        }
    }

    fn tail(&self) -> String {
        let from = self.lines.len().saturating_sub(40);
        format!("its console ends with\n{}", self.lines[from..].join("\n"))
    }
}

/// `PASS name`, `FAIL name reason`; `test name ... ok`. Why a test of Rust's failed comes after the last one.
fn verdict(line: &str) -> Option<(&str, Result<(), String>)> {
    let mut words = line.splitn(3, ' ');
    match (words.next()?, words.next()?, words.next()) {
        ("PASS", check, _) | ("test", check, Some("... ok")) => Some((check, Ok(()))),
        ("FAIL", check, reason) => {
            Some((check, Err(reason.unwrap_or("it gave no reason").to_owned())))
        }
        _ => None,
    }
}
