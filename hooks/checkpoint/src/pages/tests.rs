use super::*;
use crate::criu_image::{
    PE_LAZY, PE_PRESENT, check_folder,
    tests::{folder, pagemap},
};

const PAGE: u64 = 4096;

/// This process's own memory stands for a stopped task's.
fn me(container_pid: i32) -> Tasks {
    let task = Task {
        parent: 0,
        pid: std::process::id().cast_signed(),
        container_pid,
        comm: String::new(),
        rss: 0,
    };
    Tasks::from_iter([task])
}

/// Pages of memory with a pattern, and the address of the first whole one.
fn memory(pages: u64, seed: u64) -> (Vec<u8>, u64) {
    let bytes = ((pages + 1) * PAGE) as usize;
    let memory: Vec<u8> = (0..bytes as u64)
        .map(|i| (((i + seed) * 31) >> 3) as u8)
        .collect();
    let vaddr = (memory.as_ptr() as u64).next_multiple_of(PAGE);
    (memory, vaddr)
}

fn at(memory: &[u8], vaddr: u64, bytes: u64) -> &[u8] {
    let begin = (vaddr - memory.as_ptr() as u64) as usize;
    &memory[begin..begin + bytes as usize]
}

#[test]
fn a_lazy_dump_becomes_a_complete_image() {
    let dir = tempfile::tempdir().unwrap();
    folder(dir.path());
    // More than two pieces of 8 MiB, with the dump's own pages before, between and behind.
    let (memory, vaddr) = memory(5000, 7);
    let runs = [
        (0x1000, 2, PE_PRESENT),
        (vaddr, 4500, PE_LAZY),
        (vaddr + 4501 * PAGE, 400, PE_LAZY),
        (0x7fff_ffff_0000, 1, PE_PRESENT),
    ];
    fs::write(dir.path().join("pagemap-1.img"), pagemap(1, &runs)).unwrap();
    let dumped: Vec<u8> = (0..3 * PAGE).map(|i| (i / PAGE) as u8 + 100).collect();
    fs::write(dir.path().join("pages-1.img"), &dumped).unwrap();
    assert_eq!(lazy_bytes(dir.path()).unwrap(), 4900 * PAGE);

    let copied = copy_lazy_pages(dir.path(), &me(1)).unwrap();
    assert_eq!(copied.bytes, 4900 * PAGE);
    let pages = fs::read(dir.path().join("pages-1.img")).unwrap();
    let expected = [
        &dumped[..2 * PAGE as usize],
        at(&memory, vaddr, 4500 * PAGE),
        at(&memory, vaddr + 4501 * PAGE, 400 * PAGE),
        &dumped[2 * PAGE as usize..],
    ]
    .concat();
    assert!(pages == expected);
    check_folder(dir.path()).unwrap();
    for file in &copied.files {
        let path = dir.path().join(file.path.strip_prefix("criu/").unwrap());
        let (crc64, size) = rekindle_store::crc::file_crc(&path).unwrap();
        assert_eq!((file.crc64, file.size), (crc64, size), "{}", file.path);
    }
    let complete = [
        PE_PRESENT,
        PE_PRESENT | PE_LAZY,
        PE_PRESENT | PE_LAZY,
        PE_PRESENT,
    ];
    let runs: Vec<_> = runs
        .iter()
        .zip(complete)
        .map(|((v, n, _), flags)| (*v, *n, flags))
        .collect();
    assert_eq!(
        fs::read(dir.path().join("pagemap-1.img")).unwrap(),
        pagemap(1, &runs)
    );
    // Once more: there is nothing left to do.
    assert_eq!(copy_lazy_pages(dir.path(), &me(1)).unwrap().files.len(), 0);
}

#[test]
fn many_small_runs_keep_their_order() {
    let dir = tempfile::tempdir().unwrap();
    folder(dir.path());
    let (memory, vaddr) = memory(6000, 3);
    // Every other page, every third of them dumped: more ranges than one call takes.
    let runs: Vec<_> = (0..3000)
        .map(|i| {
            (
                vaddr + i * 2 * PAGE,
                1,
                if i % 3 == 0 { PE_PRESENT } else { PE_LAZY },
            )
        })
        .collect();
    fs::write(dir.path().join("pagemap-1.img"), pagemap(1, &runs)).unwrap();
    fs::write(
        dir.path().join("pages-1.img"),
        vec![9; 1000 * PAGE as usize],
    )
    .unwrap();
    copy_lazy_pages(dir.path(), &me(1)).unwrap();
    let pages = fs::read(dir.path().join("pages-1.img")).unwrap();
    assert_eq!(pages.len() as u64, 3000 * PAGE);
    for (page, (vaddr, _, flags)) in pages.chunks(PAGE as usize).zip(runs) {
        if flags == PE_PRESENT {
            assert!(page.iter().all(|byte| *byte == 9));
        } else {
            assert!(page == at(&memory, vaddr, PAGE));
        }
    }
}

/// The promise: a page that cannot be read fails the checkpoint.
#[test]
fn a_page_that_cannot_be_read_is_an_error() {
    let dir = tempfile::tempdir().unwrap();
    folder(dir.path());
    let (_memory, vaddr) = memory(10, 0);
    for runs in [
        // Nothing is ever mapped at the first page after null's.
        &[(0x1000, 1, PE_LAZY)][..],
        &[(0x1000, 1, PE_LAZY), (vaddr, 10, PE_LAZY)],
        &[(vaddr, 10, PE_LAZY), (0x7fff_ffff_e000, 1, PE_LAZY)],
    ] {
        fs::write(dir.path().join("pagemap-1.img"), pagemap(1, runs)).unwrap();
        let refused = copy_lazy_pages(dir.path(), &me(1)).unwrap_err();
        assert!(matches!(refused, PagesError::Memory { .. }), "{refused}");
        assert!(refused.to_string().contains("would have a hole"));
    }
}

#[test]
fn a_process_that_is_not_there_is_an_error() {
    let dir = tempfile::tempdir().unwrap();
    folder(dir.path());
    fs::write(
        dir.path().join("pagemap-1.img"),
        pagemap(1, &[(0x1000, 1, PE_LAZY)]),
    )
    .unwrap();
    let refused = copy_lazy_pages(dir.path(), &me(2)).unwrap_err();
    assert!(
        matches!(refused, PagesError::NoSuchTask { pid: 1, .. }),
        "{refused}"
    );
}
