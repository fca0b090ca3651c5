use proptest::prelude::*;

use super::*;

/// A protobuf varint.
fn varint(mut value: u64, out: &mut Vec<u8>) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

/// Image files, as CRIU writes them.
pub(crate) mod records {
    pub(crate) use Value::{Number, Text};

    #[derive(Clone, Copy)]
    pub(crate) enum Value<'a> {
        Number(u64),
        Text(&'a [u8]),
    }

    /// Fields with their numbers: a message.
    pub(crate) fn message(fields: &[(u8, Value)]) -> Vec<u8> {
        let mut message = Vec::new();
        for (number, value) in fields {
            match value {
                Number(value) => {
                    super::varint(u64::from(*number) << 3, &mut message);
                    super::varint(*value, &mut message);
                }
                Text(text) => {
                    super::varint(u64::from(*number) << 3 | 2, &mut message);
                    super::varint(text.len() as u64, &mut message);
                    message.extend_from_slice(text);
                }
            }
        }
        message
    }

    /// Messages in a file of that magic.
    pub(crate) fn image(magic: u32, messages: &[Vec<u8>]) -> Vec<u8> {
        let mut image = [super::COMMON_MAGIC.to_le_bytes(), magic.to_le_bytes()].concat();
        for message in messages {
            image.extend((message.len() as u32).to_le_bytes());
            image.extend(message);
        }
        image
    }
}

/// A pagemap: runs of (address, pages, flags).
pub(crate) fn pagemap(pages_id: u32, runs: &[(u64, u64, u32)]) -> Vec<u8> {
    use records::{Number, message};
    let mut messages = vec![message(&[(1, Number(pages_id.into()))])];
    for (vaddr, pages, flags) in runs {
        let compat = (*pages).min(u64::from(u32::MAX));
        let numbers = [
            (1, *vaddr),
            (2, compat),
            (4, u64::from(*flags)),
            (5, *pages),
        ];
        messages.push(message(
            &numbers.map(|(number, value)| (number, Number(value))),
        ));
    }
    records::image(PAGEMAP_MAGIC, &messages)
}

/// The mappings of a process: ranges of addresses. The last page of each is a guard, which CRIU lists behind them.
pub(crate) fn mappings(ranges: &[(u64, u64)]) -> Vec<u8> {
    let ranges: Vec<_> = ranges
        .iter()
        .map(|(start, end)| (*start, *end, 0))
        .collect();
    advised(&ranges)
}

/// The same, with advice (`madvise`) as bits.
pub(crate) fn advised(ranges: &[(u64, u64, u64)]) -> Vec<u8> {
    use records::{Number, Text, message};
    let guards = ranges
        .iter()
        .map(|(_, end, _)| (end - 0x1000, *end, 1 << 16, 0));
    let ranges: Vec<_> = ranges
        .iter()
        .map(|(start, end, advice)| (*start, *end, 1, *advice))
        .chain(guards)
        .map(|(start, end, status, advice)| {
            message(&[
                (1, Number(start)),
                (2, Number(end)),
                (7, Number(status)),
                (9, Number(advice)),
            ])
        })
        .collect();
    let fields: Vec<_> = ranges.iter().map(|range| (14, Text(range))).collect();
    records::image(0x5749_2820, &[message(&fields)])
}

/// The least that passes [`check_folder`]: an inventory, a process tree, one page of memory.
pub(crate) fn folder(dir: &Path) {
    fs::create_dir_all(dir).unwrap();
    let head = |common: u32, own: u32| [common.to_le_bytes(), own.to_le_bytes()].concat();
    fs::write(dir.join("inventory.img"), head(0x5831_3116, 0)).unwrap();
    fs::write(dir.join("pstree.img"), head(COMMON_MAGIC, 0x5027_3030)).unwrap();
    let map = pagemap(1, &[(0x10000, 1, PE_PRESENT | PE_LAZY)]);
    fs::write(dir.join("pagemap-1.img"), map).unwrap();
    fs::write(dir.join("pages-1.img"), [7; 4096]).unwrap();
}

fn read(bytes: &[u8]) -> Result<Vec<Run>, CriuImageError> {
    let mut map = Pagemap::read(Path::new("pagemap-1.img"), bytes)?;
    let mut runs = Vec::new();
    while let Some(run) = map.next_run()? {
        runs.push(run);
    }
    Ok(runs)
}

#[test]
fn a_pagemap_is_read_and_its_flags_are_found() {
    let image = pagemap(
        7,
        &[
            (0x1000, 3, PE_LAZY),
            (0x7f00_0000_0000, 1 << 33, PE_PRESENT),
        ],
    );
    let runs = read(&image).unwrap();
    assert_eq!(
        (runs[0].vaddr, runs[0].pages, runs[0].flags),
        (0x1000, 3, PE_LAZY)
    );
    assert_eq!(runs[1].pages, 1 << 33);
    assert!(runs[0].left_behind() && !runs[1].left_behind() && runs[1].present());
    let at = runs[0].flags_at.unwrap() as usize;
    assert_eq!(image[at], PE_LAZY as u8);
}

#[test]
fn what_no_process_could_have_is_refused() {
    for (runs, why) in [
        (&[(0x1001, 1, PE_PRESENT)][..], "aligned"),
        (&[(0x3000, 1, PE_PRESENT), (0x1000, 1, PE_PRESENT)], "order"),
        (&[(0x1000, 2, PE_PRESENT), (0x2000, 1, PE_PRESENT)], "order"),
        (&[(0x1000, u64::MAX, PE_PRESENT)], "address space"),
        (&[(!0xfff, 1, PE_PRESENT)], "address space"),
    ] {
        let sentence = read(&pagemap(1, runs)).unwrap_err().to_string();
        assert!(sentence.contains(why), "{sentence}");
    }
}

/// CRIU looks for such a page in a parent image, whatever the flags beside it say.
#[test]
fn a_run_in_the_parent_is_one_whatever_its_flags() {
    use records::{Number, message};
    for flags in [None, Some(u64::from(PE_PRESENT))] {
        for in_parent in [1, 2] {
            let mut run = vec![(1, Number(0x1000)), (2, Number(1)), (3, Number(in_parent))];
            run.extend(flags.map(|flags| (4, Number(flags))));
            let head = message(&[(1, Number(1))]);
            let found = read(&records::image(PAGEMAP_MAGIC, &[head, message(&run)])).unwrap();
            assert_eq!(
                found[0].flags & PE_PARENT,
                PE_PARENT,
                "{flags:?} {in_parent}"
            );
        }
    }
}

/// Found by fuzzing: what is no number was taken for absent, and flags that are an empty text were to be changed in
/// place where the length of that text is.
#[test]
fn a_run_of_something_else_than_numbers_is_refused() {
    use records::{Number, Text, message};
    let run = [(1, Number(0x1000)), (2, Number(1))];
    for number in 1..=5 {
        let run = message(&[&run[..], &[(number, Text(b""))]].concat());
        let image = records::image(PAGEMAP_MAGIC, &[message(&[(1, Number(1))]), run]);
        let sentence = read(&image).unwrap_err().to_string();
        assert!(sentence.contains("where a number belongs"), "{sentence}");
    }
}

#[test]
fn a_folder_that_claims_a_billion_pages_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    folder(dir.path());
    check_folder(dir.path()).unwrap();
    for (runs, why) in [
        (
            &[(0x1000, 1_000_000_000, PE_PRESENT)][..],
            "claims 1000000000 pages, and pages-1.img holds 1",
        ),
        (
            &[(0x1000, 1, PE_PRESENT), (0x8000, 1, PE_PRESENT)],
            "claims 2 pages",
        ),
        (&[(0x1000, 1, PE_LAZY)], "still in the dumped process"),
        (&[(0x1000, 1, PE_PARENT)], "in a parent image"),
    ] {
        fs::write(dir.path().join("pagemap-1.img"), pagemap(1, runs)).unwrap();
        let sentence = check_folder(dir.path()).unwrap_err().to_string();
        assert!(sentence.contains(why), "{sentence}");
    }
}

#[test]
fn a_folder_without_its_own_magics_is_refused() {
    for name in ["inventory.img", "pstree.img", "pagemap-1.img"] {
        let dir = tempfile::tempdir().unwrap();
        folder(dir.path());
        fs::write(dir.path().join(name), b"GIF89a..").unwrap();
        let sentence = check_folder(dir.path()).unwrap_err().to_string();
        assert!(sentence.contains(name), "{sentence}");
        fs::remove_file(dir.path().join(name)).unwrap();
        assert_eq!(check_folder(dir.path()).is_ok(), name == "pagemap-1.img");
    }
}

proptest! {
    #[test]
    fn no_bytes_make_the_reader_panic(tail in proptest::collection::vec(any::<u8>(), 0..300)) {
        let _ = read(&tail);
        let mut image = pagemap(1, &[]);
        image.extend(tail);
        let _ = read(&image);
    }

    #[test]
    fn no_bytes_make_the_remaps_panic(a in proptest::collection::vec(any::<u8>(), 0..80), b in proptest::collection::vec(any::<u8>(), 0..80)) {
        let dir = tempfile::tempdir().unwrap();
        for (name, magic, bytes) in [("remap-fpath.img", 0x5913_3954, a), ("files.img", 0x5630_3138, b)] {
            let mut image = records::image(magic, &[]);
            image.extend(bytes);
            fs::write(dir.path().join(name), image).unwrap();
        }
        let _ = link_remaps(dir.path());
    }

    #[test]
    fn no_mutation_makes_the_reader_panic_or_leave_its_bounds(
        at in any::<prop::sample::Index>(), byte in any::<u8>(), cut in any::<prop::sample::Index>(),
    ) {
        let mut image = pagemap(3, &[(0x1000, 3, PE_LAZY), (0x9000, 5, PE_PRESENT | PE_LAZY)]);
        let at = at.index(image.len());
        image[at] = byte;
        image.truncate(cut.index(image.len() + 1));
        if let Ok(runs) = read(&image) {
            for run in runs {
                prop_assert!(run.vaddr + run.bytes(4096) <= 1 << 57);
                prop_assert!(run.flags_at.is_none_or(|at| at < image.len() as u64));
            }
        }
    }

    #[test]
    fn what_is_written_is_read(runs in proptest::collection::vec((1u64..1000, 1u64..100, 0u32..8), 0..20)) {
        let mut end = 0x1000;
        let runs: Vec<_> = runs.into_iter().map(|(gap, pages, flags)| {
            let vaddr = end + gap * 4096;
            end = vaddr + pages * 4096;
            (vaddr, pages, flags)
        }).collect();
        let found = read(&pagemap(1, &runs)).unwrap();
        let found: Vec<_> = found.iter().map(|run| (run.vaddr, run.pages, run.flags)).collect();
        prop_assert_eq!(found, runs);
    }
}
