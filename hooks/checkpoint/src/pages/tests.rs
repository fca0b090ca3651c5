use std::{io::Read as _, sync::Arc};

use super::*;
use crate::{
    chunks::{Base, CHUNK, Chunks, Compression, Index},
    criu_image::{
        PE_LAZY, PE_PRESENT, check_folder,
        tests::{folder, pagemap},
    },
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

/// Takes the pages of a dump, and gives what its pages file holds then.
fn taken(dir: &Path, tasks: &Tasks) -> Result<Vec<u8>, PagesError> {
    let store = tempfile::tempdir().unwrap();
    let writer = ChunkWriter::new(store.path(), None, Compression::None, None).unwrap();
    take_pages(dir, tasks, &Precopied::default(), &writer)?;
    let (index, packs, _) = writer.finish(None).unwrap();
    let sizes: Vec<u64> = packs.iter().map(|pack| pack.size).collect();
    let index = Index::parse(&index, &sizes, false).unwrap();
    let chunks = Arc::new(Chunks::open(store.path(), &packs, index, None).unwrap());
    let mut bytes = Vec::new();
    let mut stream = chunks.stream("criu/pages-1.img").unwrap();
    stream.read_to_end(&mut bytes).unwrap();
    Ok(bytes)
}

#[test]
fn a_lazy_dump_becomes_a_complete_image() {
    let dir = tempfile::tempdir().unwrap();
    folder(dir.path());
    // More than two pieces, with the dump's own pages before, between and behind.
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

    let pages = taken(dir.path(), &me(1)).unwrap();
    let expected = [
        &dumped[..2 * PAGE as usize],
        at(&memory, vaddr, 4500 * PAGE),
        at(&memory, vaddr + 4501 * PAGE, 400 * PAGE),
        &dumped[2 * PAGE as usize..],
    ]
    .concat();
    assert!(pages == expected);
    // They are chunks now; what CRIU needs in a file is laid out by the restore.
    assert!(!dir.path().join("pages-1.img").exists());
    fs::write(dir.path().join("pages-1.img"), pages).unwrap();
    check_folder(dir.path()).unwrap();
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
    let pages = taken(dir.path(), &me(1)).unwrap();
    assert_eq!(pages.len() as u64, 3000 * PAGE);
    for (page, (vaddr, _, flags)) in pages.chunks(PAGE as usize).zip(runs) {
        if flags == PE_PRESENT {
            assert!(page.iter().all(|byte| *byte == 9));
        } else {
            assert!(page == at(&memory, vaddr, PAGE));
        }
    }
}

/// A page that is new must not shift what follows into other chunks.
#[test]
fn a_new_page_changes_one_chunk() {
    let (_memory, vaddr) = memory(4000, 11);
    let stored = |runs: &[(u64, u64, u32)], base: Option<Base>, into: &Path| {
        let dir = tempfile::tempdir().unwrap();
        folder(dir.path());
        fs::write(dir.path().join("pagemap-1.img"), pagemap(1, runs)).unwrap();
        let writer = ChunkWriter::new(into, None, Compression::None, base).unwrap();
        take_pages(dir.path(), &me(1), &Precopied::default(), &writer).unwrap();
        writer.finish(None).unwrap()
    };
    let root = tempfile::tempdir().unwrap();
    let dirs = ["1", "2"].map(|name| root.path().join(name));
    dirs.iter().for_each(|dir| fs::create_dir(dir).unwrap());
    let gap = vaddr + 1000 * PAGE;
    let with_gap = [(vaddr, 1000, PE_LAZY), (gap + PAGE, 2999, PE_LAZY)];
    let (index, packs, first) = stored(&with_gap, None, &dirs[0]);
    assert_eq!(first.bytes, 3999 * PAGE);
    let index = Index::parse(&index, &[packs[0].size], false).unwrap();
    let dir = dirs[0].clone();
    let base = Base { dir, packs, index };
    let (_, _, second) = stored(&[(vaddr, 4000, PE_LAZY)], Some(base), &dirs[1]);
    assert!(second.written <= CHUNK as u64, "{second:?}");
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
        let refused = taken(dir.path(), &me(1)).unwrap_err();
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
    let refused = taken(dir.path(), &me(2)).unwrap_err();
    assert!(
        matches!(refused, PagesError::NoSuchTask { pid: 1, .. }),
        "{refused}"
    );
}
