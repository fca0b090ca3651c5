//! Which parts of a process's address space are worth watching.

use std::{fs, io, ops::Range, path::Path};

use super::proc_file;

/// The private anonymous mappings of a process, in order: what a dump leaves to us.
pub(super) fn anonymous(pid: i32) -> io::Result<Vec<Range<u64>>> {
    Ok(parse(&io::read_to_string(proc_file(pid, "maps")?)?))
}

/// Whether a process has a ring of `io_setup` or of `io_uring_setup`.
pub(super) fn reads_asynchronously(pid: i32) -> io::Result<bool> {
    let maps = io::read_to_string(proc_file(pid, "maps")?)?;
    let mut rings = maps.lines().filter(|line| {
        // Name of the former's mapping, and what the latter's maps.
        line.contains(" /[aio] ") || line.contains(" anon_inode:[io_uring]")
    });
    if rings.next().is_some() {
        return Ok(true);
    }
    // One that has none of its queues mapped.
    let mut open = fs::read_dir(format!("/proc/{pid}/fd"))?.flatten();
    Ok(open.any(|fd| {
        fs::read_link(fd.path()).is_ok_and(|to| to == Path::new("anon_inode:[io_uring]"))
    }))
}

fn parse(maps: &str) -> Vec<Range<u64>> {
    maps.lines().filter_map(area).collect()
}

/// That of one line, if it is one of those: `start-end perms offset device inode name`.
fn area(line: &str) -> Option<Range<u64>> {
    let mut words = line.split_ascii_whitespace();
    let (start, end) = words.next()?.split_once('-')?;
    let private = words.next()?.ends_with('p');
    let inode = words.nth(2)?;
    // The kernel's own pages have names in brackets, too.
    let kernels = words.next().is_some_and(|name| name.starts_with("[v"));
    if !private || inode != "0" || kernels {
        return None;
    }
    let number = |text| u64::from_str_radix(text, 16).ok();
    Some(number(start)?..number(end)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn private_anonymous_mappings_are_found() {
        let maps = "\
00400000-00401000 r-xp 00000000 fd:00 1234  /bin/true
00600000-00700000 rw-p 00000000 00:00 0     [heap]
00700000-00701000 rw-p 00000000 00:00 0
7f0000000000-7f0000100000 rw-s 00000000 00:01 77  /dev/zero (deleted)
7f0000200000-7f0000300000 ---p 00000000 00:00 0   [anon: reserved]
7ffd00000000-7ffd00021000 rw-p 00000000 00:00 0   [stack]
7ffd00050000-7ffd00054000 r--p 00000000 00:00 0   [vvar]
7ffd00054000-7ffd00056000 r-xp 00000000 00:00 0   [vdso]
ffffffffff600000-ffffffffff601000 --xp 00000000 00:00 0  [vsyscall]
";
        let found = parse(maps);
        assert_eq!(
            found,
            [
                0x60_0000..0x70_0000,
                0x70_0000..0x70_1000,
                0x7f00_0020_0000..0x7f00_0030_0000,
                0x7ffd_0000_0000..0x7ffd_0002_1000
            ]
        );
    }

    #[test]
    fn a_process_has_mappings() {
        let me = std::process::id().cast_signed();
        assert!(anonymous(me).unwrap().len() > 1);
    }
}
