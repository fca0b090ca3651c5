//! The CRI log format: a line is `TIME STREAM P|F TEXT`, and a line of the container may come in several parts.

/// One line that a container wrote.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Line {
    /// `stdout` or `stderr`.
    pub stream: String,
    /// The line, its parts put together.
    pub text: String,
}

/// The lines of a log; the last one may still grow, as an output's last line has no end of its own. What cannot be a line of the format is kept as the stream `?`, so that a test sees it.
pub(super) fn parse(log: &str) -> Vec<Line> {
    let mut lines: Vec<Line> = Vec::new();
    let mut open = false;
    let complete = log.rfind('\n').map_or("", |end| &log[..end]);
    for raw in complete.lines() {
        let mut words = raw.splitn(4, ' ');
        let (Some(time), Some(stream), Some(tag), text) =
            (words.next(), words.next(), words.next(), words.next())
        else {
            lines.push(line("?", raw));
            continue;
        };
        if !time.contains('T') || !matches!(tag, "P" | "F") {
            lines.push(line("?", raw));
            continue;
        }
        let text = text.unwrap_or_default();
        match lines.last_mut() {
            Some(last) if open && last.stream == stream => last.text.push_str(text),
            _ => lines.push(line(stream, text)),
        }
        open = tag == "P";
    }
    lines
}

fn line(stream: &str, text: &str) -> Line {
    Line {
        stream: stream.to_owned(),
        text: text.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_put_together_and_a_line_of_the_log_that_is_not_written_yet_is_none() {
        let log = "2026-01-01T00:00:00.1Z stdout F one\n2026-01-01T00:00:00.2Z stderr F two words\n\
                   2026-01-01T00:00:00.3Z stdout P thr\n2026-01-01T00:00:00.3Z stdout F ee\n\
                   2026-01-01T00:00:00.4Z stdout F \n2026-01-01T00:00:00.5Z stdout F hal";
        let expected = [
            line("stdout", "one"),
            line("stderr", "two words"),
            line("stdout", "three"),
            line("stdout", ""),
        ];
        assert_eq!(parse(log), expected);
    }
}
