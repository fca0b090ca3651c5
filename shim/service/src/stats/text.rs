//! The kernel's small text formats.

use std::collections::HashMap;

/// Lines of a key and a number.
#[derive(Debug, Default)]
pub(crate) struct Table(HashMap<String, u64>);

impl Table {
    pub(super) fn parse(text: &str) -> Self {
        let entry = |line: &str| {
            let (key, value) = line.split_once(' ')?;
            Some((key.to_owned(), number(value, u64::MAX)?))
        };
        Self(text.lines().filter_map(entry).collect())
    }

    /// 0 where the kernel does not have it, as protobuf says "not there".
    pub(crate) fn get(&self, key: &str) -> u64 {
        self.0.get(key).copied().unwrap_or_default()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

/// A number, `unlimited` for `max`, and 0 for one below: sums over CPUs may be, for a moment.
pub(super) fn number(text: &str, unlimited: u64) -> Option<u64> {
    match text.trim() {
        "max" => Some(unlimited),
        text => match text.strip_prefix('-') {
            Some(below) => below.parse::<u64>().ok().map(|_| 0),
            None => text.parse().ok(),
        },
    }
}

/// `8:16` as major and minor number.
pub(super) fn device(text: &str) -> Option<(u64, u64)> {
    let (major, minor) = text.split_once(':')?;
    Some((major.parse().ok()?, minor.parse().ok()?))
}

/// A line of `rdma.current` or `rdma.max`.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Rdma {
    pub(super) device: String,
    pub(super) handles: u32,
    pub(super) objects: u32,
}

/// Lines of `mlx4_0 hca_handle=2 hca_object=max`.
pub(super) fn rdma(text: &str) -> Vec<Rdma> {
    let entry = |line: &str| {
        let mut fields = line.split_whitespace();
        let mut entry = Rdma {
            device: fields.next()?.to_owned(),
            handles: 0,
            objects: 0,
        };
        for (key, value) in fields.filter_map(|field| field.split_once('=')) {
            let value = number(value, u32::MAX.into()).and_then(|value| value.try_into().ok());
            match key {
                "hca_handle" => entry.handles = value?,
                "hca_object" => entry.objects = value?,
                _ => {}
            }
        }
        Some(entry)
    };
    text.lines().filter_map(entry).collect()
}

/// `2MB` of `hugetlb.2MB.current`, but nothing of `hugetlb.2MB.rsvd.current`: reserved pages are counted
/// a second time there.
pub(super) fn huge_page_size(name: &str, file: &str) -> Option<String> {
    let (size, rest) = name.strip_prefix("hugetlb.")?.split_once('.')?;
    (rest == file).then(|| size.to_owned())
}

/// Whether `/proc/PID/stat` is that of a process that waits to be reaped.
pub(super) fn has_ended(stat: &str) -> bool {
    // The name before the state may hold spaces and parentheses of its own.
    let state = stat
        .rsplit_once(") ")
        .and_then(|(_, rest)| rest.chars().next());
    matches!(state, Some('Z' | 'X') | None)
}

/// A path of mountinfo, in which blanks and backslashes are three octal digits.
pub(super) fn unescaped(path: &str) -> String {
    let mut parts = path.split('\\');
    let mut plain = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        let code = part
            .get(..3)
            .and_then(|digits| u8::from_str_radix(digits, 8).ok());
        match code {
            Some(code) if code.is_ascii() => {
                plain.push(char::from(code));
                plain.push_str(&part[3..]);
            }
            _ => {
                plain.push('\\');
                plain.push_str(part);
            }
        }
    }
    plain
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_those_that_the_kernel_writes() {
        assert_eq!(
            number("9223372036854771712\n", 0),
            Some(9_223_372_036_854_771_712)
        );
        assert_eq!(number("max\n", 0), Some(0));
        assert_eq!(number("max", u64::MAX), Some(u64::MAX));
        assert_eq!(number("-4096\n", 7), Some(0));
        assert_eq!(number("", 7), None);
        assert_eq!(number("-", 7), None);
    }

    #[test]
    fn a_table_leaves_out_what_it_does_not_understand() {
        let table = Table::parse("usage_usec 17\nodd line here\nnr_periods 3\n\n");
        assert_eq!(table.get("usage_usec"), 17);
        assert_eq!(table.get("nr_periods"), 3);
        assert_eq!(table.get("odd"), 0);
        assert!(Table::parse("").is_empty());
    }

    #[test]
    fn rdma_devices_have_handles_and_objects() {
        let entry = |device: &str, handles, objects| Rdma {
            device: device.to_owned(),
            handles,
            objects,
        };
        assert_eq!(
            rdma("mlx4_0 hca_handle=2 hca_object=2000\nocrdma1 hca_handle=3 hca_object=max\n"),
            [entry("mlx4_0", 2, 2000), entry("ocrdma1", 3, u32::MAX)]
        );
        assert_eq!(rdma(""), []);
    }

    #[test]
    fn sizes_of_huge_pages_are_in_the_names_of_files() {
        let size = |name| huge_page_size(name, "current");
        assert_eq!(size("hugetlb.2MB.current").as_deref(), Some("2MB"));
        assert_eq!(size("hugetlb.2MB.rsvd.current"), None);
        assert_eq!(size("memory.current"), None);
    }

    #[test]
    fn a_zombie_is_known_whatever_it_is_called() {
        assert!(has_ended("7 (a) Z (b)) Z 1 7"));
        assert!(!has_ended("7 (sh) S 1 7"));
        assert!(has_ended(""));
    }

    #[test]
    fn paths_of_mountinfo_are_unescaped() {
        assert_eq!(unescaped("/a\\040b\\134c"), "/a b\\c");
        assert_eq!(unescaped("/a\\zz"), "/a\\zz");
        assert_eq!(unescaped("/plain"), "/plain");
    }
}
