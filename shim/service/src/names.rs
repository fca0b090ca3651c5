//! Ids become names of files and arguments of runc: looked at where they come in.

use crate::error::Error;

/// containerd's own limit (`pkg/identifiers`).
const LONGEST: usize = 76;

/// Refuses an id that containerd would not have made.
pub(crate) fn check(what: &str, id: &str) -> Result<(), Error> {
    let fits = id.len() <= LONGEST
        && id.starts_with(|c: char| c.is_ascii_alphanumeric())
        && id
            .chars()
            .all(|c| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-'));
    if fits {
        return Ok(());
    }
    let shown: String = id.chars().take(LONGEST).collect();
    Err(Error::Argument {
        key: format!("{what} {shown:?}"),
        reason: format!(
            "not an id: 1 to {LONGEST} of a-z, A-Z, 0-9, '.', '_' and '-', beginning with a letter or digit"
        ),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_would_leave_its_folder_or_look_like_an_option_is_refused() {
        for good in ["a", "redis-1_2.x", &"f".repeat(64)] {
            check("id", good).unwrap();
        }
        for bad in ["", ".", "..", "a/b", "-f", "a\0b", "ä", &"x".repeat(10_000)] {
            let error = check("id", bad).unwrap_err().to_string();
            assert!(error.len() < 1000, "{error}");
        }
    }
}
