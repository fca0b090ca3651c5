use std::collections::BTreeMap;

use proptest::prelude::*;

use super::*;
use crate::{
    criu_image::{
        PE_LAZY, PE_PRESENT,
        tests::{mappings, pagemap},
    },
    pager::first_parts,
    touches::Touch,
};

const PAGE: u64 = 4096;

/// The same, page by page: the offset in the pages file by address.
type Model = BTreeMap<u64, u64>;

fn pages(missing: &Missing) -> Model {
    let mut model = Model::new();
    for piece in missing.0.values() {
        assert!(piece.bytes > 0 && piece.bytes.is_multiple_of(PAGE));
        for page in (0..piece.bytes).step_by(PAGE as usize) {
            let twice = model.insert(piece.vaddr + page, piece.at + page);
            assert_eq!(twice, None, "two pieces have {:#x}", piece.vaddr + page);
        }
    }
    model
}

fn of(pieces: &[(u64, u64, u64)]) -> Missing {
    let mut missing = Missing::default();
    for (vaddr, count, at) in pieces {
        missing.insert(Piece {
            vaddr: vaddr * PAGE,
            bytes: count * PAGE,
            at: at * PAGE,
            inherited: true,
        });
    }
    missing
}

#[derive(Debug, Clone)]
enum Step {
    Next(u64, u64),
    Around(u64, u64, u64),
    Remove(u64, u64),
    Shift(u64, u64, u64),
}

fn step() -> impl Strategy<Value = Step> {
    let page = 0..200_u64;
    let count = 1..40_u64;
    prop_oneof![
        (page.clone(), count.clone()).prop_map(|(page, count)| Step::Next(page, count)),
        (page.clone(), 0..16_u64, 1..16_u64)
            .prop_map(|(page, before, behind)| Step::Around(page, before, behind)),
        (page.clone(), count.clone()).prop_map(|(page, count)| Step::Remove(page, count)),
        (page.clone(), page, count).prop_map(|(from, to, count)| Step::Shift(from, to, count)),
    ]
}

/// Of what is noted, an image has some, not all, and in other places.
#[test]
fn the_first_parts_are_where_the_noted_blocks_lie() {
    let dir = tempfile::tempdir().unwrap();
    let lazy = PE_LAZY | PE_PRESENT;
    let runs = [(0x10_0000, 16, lazy), (0x12_0000, 20, lazy)];
    std::fs::write(dir.path().join("pagemap-7.img"), pagemap(3, &runs)).unwrap();
    let ranges = mappings(&[(0x10_0000, 0x14_0000)]);
    std::fs::write(dir.path().join("mm-7.img"), ranges).unwrap();
    let noted = [
        (7, 0x13_0000),
        (7, 0x11_0000),
        (8, 0x10_0000),
        (7, 0x10_0000),
    ];
    let noted = noted.map(|(pid, at)| Touch::at(pid, at));
    let name = || "criu/pages-3.img".to_owned();
    assert_eq!(
        first_parts(dir.path(), &noted),
        [(name(), 32 * PAGE..36 * PAGE), (name(), 0..16 * PAGE),]
    );
}

proptest! {
    /// Whatever is done, every page is missing as often and from where it should be.
    #[test]
    fn it_is_what_a_list_of_pages_would_be(steps in prop::collection::vec(step(), 1..60)) {
        let mut missing = of(&[(10, 30, 0), (40, 1, 30), (41, 60, 31), (120, 50, 100)]);
        let mut model = pages(&missing);
        for step in steps {
            match step {
                Step::Next(from, count) => {
                    let next = missing.next(from * PAGE, count * PAGE, PAGE);
                    let expected = model.range(from * PAGE..).next().or(model.iter().next());
                    prop_assert_eq!(next.map(|piece| (piece.vaddr, piece.at)), expected.map(|(v, a)| (*v, *a)));
                    prop_assert!(next.is_none_or(|piece| piece.bytes <= count * PAGE));
                }
                Step::Around(page, before, behind) => {
                    let vaddr = page * PAGE;
                    let (start, end) = (vaddr.saturating_sub(before * PAGE), vaddr + behind * PAGE);
                    let piece = missing.take_around(vaddr, start, end);
                    prop_assert_eq!(piece.is_some(), model.contains_key(&vaddr));
                    if let Some(piece) = piece {
                        prop_assert!(start <= piece.vaddr && piece.end() <= end);
                        prop_assert!((piece.vaddr..piece.end()).contains(&vaddr));
                        for page in (0..piece.bytes).step_by(PAGE as usize) {
                            prop_assert_eq!(model.remove(&(piece.vaddr + page)), Some(piece.at + page));
                        }
                    }
                }
                Step::Remove(page, count) => {
                    let (start, end) = (page * PAGE, (page + count) * PAGE);
                    let removed: u64 = missing.remove(start, end).iter().map(|piece| piece.bytes).sum();
                    let before = model.len();
                    model.retain(|vaddr, _| !(start..end).contains(vaddr));
                    prop_assert_eq!(removed, (before - model.len()) as u64 * PAGE);
                }
                Step::Shift(from, to, count) => {
                    // The kernel refuses to move a mapping onto itself.
                    if from.abs_diff(to) >= count {
                        missing.shift(from * PAGE, to * PAGE, count * PAGE);
                        let moved: Model = (0..count).filter_map(|i| Some(((to + i) * PAGE, model.remove(&((from + i) * PAGE))?))).collect();
                        model.retain(|vaddr, _| !(to * PAGE..(to + count) * PAGE).contains(vaddr));
                        model.extend(moved);
                    }
                }
            }
            prop_assert_eq!(&pages(&missing), &model);
            prop_assert_eq!(missing.is_empty(), model.is_empty());
        }
    }
}

#[test]
fn the_images_say_what_is_missing() {
    let dir = tempfile::tempdir().unwrap();
    let lazy = PE_LAZY | PE_PRESENT;
    let runs = [
        (0x1000, 2, PE_PRESENT),
        (0x10000, 4, lazy),
        (0x20000, 1, PE_PRESENT),
        (0x30000, 1, lazy),
    ];
    std::fs::write(dir.path().join("pagemap-7.img"), pagemap(3, &runs)).unwrap();
    let map = |ranges: &[(u64, u64)]| {
        std::fs::write(dir.path().join("mm-7.img"), mappings(ranges)).unwrap();
        Missing::read(dir.path(), 7)
    };
    // One run over two mappings.
    let (missing, pages_id) = map(&[
        (0x1000, 0x3000),
        (0x8000, 0x12000),
        (0x12000, 0x20000),
        (0x30000, 0x40000),
    ])
    .unwrap();
    assert_eq!(pages_id, 3);
    assert_eq!(missing, of(&[(0x10, 2, 2), (0x12, 2, 4), (0x30, 1, 7)]));
    for ranges in [
        // A page that is nowhere, and mappings that no kernel has.
        &[(0x10000, 0x13000), (0x30000, 0x40000)][..],
        &[(0x10000, 0x14000), (0x13000, 0x40000)],
        &[(0x14000, 0x10000), (0x30000, 0x40000)],
    ] {
        let refused = map(ranges).unwrap_err();
        assert!(
            matches!(refused, CriuImageError::Malformed { .. }),
            "{refused}"
        );
    }
}

/// A step that begins in a chunk ends with one: otherwise each of its chunks would be read twice.
#[test]
fn a_step_ends_where_a_block_does() {
    let missing = of(&[(3, 100, 0)]);
    let step = |from: u64| missing.next(from * PAGE, 32 * PAGE, 16 * PAGE).unwrap();
    assert_eq!((step(0).vaddr, step(0).end()), (3 * PAGE, 32 * PAGE));
    assert_eq!((step(32).vaddr, step(32).end()), (32 * PAGE, 64 * PAGE));
    assert_eq!((step(96).vaddr, step(96).end()), (96 * PAGE, 103 * PAGE));
}
