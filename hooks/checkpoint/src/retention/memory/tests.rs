use std::time::Duration;

use proptest::prelude::*;

use super::{
    super::{HeldFile, Reason, tests::held},
    *,
};

const NOW: u64 = 1_000_000;

/// With files of its own of so many bytes, in those places.
fn image(name: &str, used_ago: u64, bytes: u64, memory: bool, disk: bool) -> Held {
    let mut image = held(name, 1, NOW - used_ago, &[]);
    let inode = image.files[0].inode.1;
    let file = |device| HeldFile {
        inode: (device, inode),
        bytes,
        links: 1,
    };
    image.files = disk.then(|| file(1)).into_iter().collect();
    image.memory = memory.then(|| file(2)).into_iter().collect();
    image
}

fn memory(quota: u64) -> Memory {
    Memory {
        root: "/run/rekindle/images".into(),
        quota,
        namespace_quota: None,
        idle: Duration::from_secs(100),
    }
}

fn leave(images: &[Held], memory: &Memory) -> Vec<usize> {
    let plan = demotions(images, memory, NOW, |_| false);
    plan.removals.iter().map(|removal| removal.image).collect()
}

fn come(images: &[Held], memory: &Memory) -> Vec<(usize, Vec<usize>)> {
    let all = promotions(images, memory, NOW).into_iter();
    all.map(|promotion| (promotion.image, promotion.instead_of))
        .collect()
}

#[test]
fn what_is_idle_or_too_much_leaves_and_only_what_is_on_the_disk() {
    let images = [
        image("a/idle", 100, 10, true, true),
        image("a/older", 50, 10, true, true),
        image("a/newer", 40, 10, true, true),
        image("a/only-there", 200, 10, true, false),
        image("a/not-there", 300, 10, false, true),
    ];
    assert_eq!(leave(&images, &memory(30)), [0]);
    assert_eq!(leave(&images, &memory(20)), [0, 1]);
    assert_eq!(leave(&images, &memory(1)), [0, 1, 2]);
    let mut leased = images.clone();
    leased[0].in_use = true;
    assert_eq!(leave(&leased, &memory(100)), Vec::<usize>::new());
    // What is whole in its tier is somewhere.
    let plan = demotions(&images, &memory(1), NOW, |image| !image.places().disk);
    assert_eq!(plan.removals[0].image, 3);
    assert!(matches!(
        plan.removals[0].reason,
        Reason::Idle { seconds: 200 }
    ));
}

#[test]
fn a_namespace_has_its_own_quota_in_memory() {
    let mut quota = memory(100);
    quota.namespace_quota = Some(15);
    let images = [
        image("a/one", 50, 10, true, true),
        image("a/two", 40, 10, true, true),
        image("b/one", 60, 10, true, true),
    ];
    assert_eq!(leave(&images, &quota), [0]);
    // And what takes the place of another one is of the namespace that has too much.
    let images = [
        image("a/one", 50, 10, true, true),
        image("b/one", 60, 10, true, true),
        image("a/new", 1, 10, false, true),
    ];
    assert_eq!(come(&images, &quota), [(2, vec![0])]);
}

#[test]
fn the_last_used_come_first_and_take_the_place_of_older_ones_only() {
    let images = [
        image("a/there", 30, 10, true, true),
        image("a/hot", 1, 10, false, true),
        image("a/warm", 20, 10, false, true),
        image("a/cold", 100, 1, false, true),
        image("a/older", 40, 10, false, true),
    ];
    assert_eq!(
        come(&images, &memory(40)),
        [(1, vec![]), (2, vec![]), (4, vec![])]
    );
    assert_eq!(come(&images, &memory(20)), [(1, vec![]), (2, vec![0])]);
    assert_eq!(come(&images, &memory(10)), [(1, vec![0])]);
    assert_eq!(come(&images, &memory(9)), []);
    let mut images = images;
    images[0].in_use = true;
    assert_eq!(come(&images, &memory(10)), []);
    // What lies nowhere else does not make room.
    images[0] = image("a/there", 30, 10, true, false);
    assert_eq!(come(&images, &memory(10)), []);
    images[1].usable = false;
    assert_eq!(come(&images, &memory(20)), [(2, vec![])]);
}

proptest! {
    /// What a round has put into memory the next one leaves there, and a third has nothing to do.
    #[test]
    fn two_rounds_after_each_other_do_not_undo_each_other(
        raw in prop::collection::vec((0..200_u64, 1..40_u64, any::<bool>(), any::<bool>()), 0..12),
        quota in 1..100_u64,
    ) {
        let quota = memory(quota);
        let mut images: Vec<Held> = raw
            .iter()
            .enumerate()
            .map(|(place, (ago, bytes, there, disk))| {
                image(&format!("a/n{place}"), *ago, *bytes, *there, *disk || !there)
            })
            .collect();
        let round = |images: &mut Vec<Held>| {
            let mut changed = 0;
            for promotion in promotions(images, &quota, NOW) {
                for other in promotion.instead_of {
                    prop_assert!(images[other].last_used < images[promotion.image].last_used);
                    images[other].memory.clear();
                }
                let held = &mut images[promotion.image];
                held.memory = held.files.clone();
                changed += 1;
            }
            let plan = demotions(images, &quota, NOW, |_| false);
            for removal in plan.removals {
                prop_assert!(!images[removal.image].files.is_empty());
                images[removal.image].memory.clear();
                changed += 1;
            }
            Ok(changed)
        };
        round(&mut images)?;
        let used = |images: &[Held]| images.iter().filter(|image| image.places().disk).map(Held::memory_bytes).sum::<u64>();
        prop_assert!(used(&images) <= quota.quota);
        round(&mut images)?;
        prop_assert_eq!(round(&mut images)?, 0);
    }
}
