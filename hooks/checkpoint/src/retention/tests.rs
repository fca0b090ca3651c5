use std::collections::HashSet;

use proptest::prelude::*;

use super::*;

const NOW: u64 = 1_000_000;

/// An image with one file of its own, and those packs.
pub(super) fn held(name: &str, generation: u64, last_used: u64, packs: &[(u64, u64, u64)]) -> Held {
    let own = name
        .bytes()
        .fold(generation, |sum, byte| sum * 31 + u64::from(byte));
    let own = HeldFile {
        inode: (1, own << 16),
        bytes: 1,
        links: 1,
    };
    let packs = packs.iter().map(|(inode, bytes, links)| HeldFile {
        inode: (1, *inode),
        bytes: *bytes,
        links: *links,
    });
    let (namespace, name) = name.split_once('/').unwrap();
    Held {
        namespace: namespace.parse().unwrap(),
        name: name.parse().unwrap(),
        generation,
        last_used,
        in_use: false,
        usable: true,
        incoming: false,
        remade: false,
        files: [own].into_iter().chain(packs).collect(),
        memory: Vec::new(),
    }
}

fn none() -> Retention {
    Retention::default()
}

const ROOMY: Option<Disk> = Some(Disk {
    total: 1 << 40,
    available: 1 << 40,
});

/// Names, generations and bytes of what goes.
fn gone(images: &[Held], policy: &Retention, disk: Option<Disk>) -> Vec<(String, u64)> {
    let plan = plan(images, policy, disk, NOW);
    let removals = plan.removals.iter();
    removals
        .map(|removal| {
            let image = &images[removal.image];
            let name = format!("{}/{}@{}", image.namespace, image.name, image.generation);
            (name, removal.frees)
        })
        .collect()
}

#[test]
fn without_a_policy_nothing_goes_while_the_disk_has_room() {
    let images = [held("a/x", 1, 0, &[]), held("a/x", 2, 0, &[])];
    assert_eq!(gone(&images, &none(), ROOMY), []);
}

#[test]
fn the_newest_generations_are_kept_and_one_that_cannot_be_read_is_none_of_them() {
    let mut images: Vec<_> = (1..=4).map(|n| held("a/x", n, NOW - n, &[])).collect();
    images.push(held("b/x", 1, 0, &[]));
    let policy = Retention {
        keep: Some(2),
        ..none()
    };
    assert_eq!(
        gone(&images, &policy, ROOMY),
        [("a/x@1".to_owned(), 1), ("a/x@2".to_owned(), 1)]
    );
    images[3].usable = false;
    assert_eq!(gone(&images, &policy, ROOMY), [("a/x@1".to_owned(), 1)]);
    images[0].in_use = true;
    assert_eq!(gone(&images, &policy, ROOMY), []);
}

/// What pods make anew by themselves is not spared: each new version of a container image has a name of its own.
#[test]
fn of_what_is_made_anew_the_newest_goes_too() {
    let mut images = [
        held("a/auto-1", 1, NOW - 200_000, &[]),
        held("a/auto-2", 1, NOW - 100_000, &[]),
        held("a/auto-3", 1, NOW - 1000, &[]),
        held("a/x", 1, NOW - 400_000, &[]),
    ];
    for image in &mut images[..3] {
        image.remade = true;
    }
    let policy = Retention {
        idle: Some(Duration::from_secs(150_000)),
        ..none()
    };
    assert_eq!(
        gone(&images, &policy, ROOMY),
        [("a/auto-1@1".to_owned(), 1)]
    );
    let full = Some(Disk {
        total: 1000,
        available: 0,
    });
    // What a container has used today is made again at once, and stays.
    let names: Vec<_> = gone(&images, &none(), full)
        .into_iter()
        .map(|(name, _)| name)
        .collect();
    assert_eq!(names, ["a/auto-1@1", "a/auto-2@1"]);
}

#[test]
fn what_is_idle_goes_but_for_the_newest_generation() {
    let images = [
        held("a/x", 1, NOW - 100, &[]),
        held("a/x", 2, NOW - 300, &[]),
        held("a/x", 3, NOW - 200, &[]),
        held("a/y", 1, NOW - 99, &[]),
    ];
    let mut policy = Retention {
        idle: Some(Duration::from_secs(100)),
        ..none()
    };
    assert_eq!(
        gone(&images, &policy, ROOMY),
        [("a/x@2".to_owned(), 1), ("a/x@1".to_owned(), 1)]
    );
    policy.idle_newest = true;
    assert_eq!(gone(&images, &policy, ROOMY).len(), 3);
}

/// The sum of what the manifests list would say 2 × 100 + 2.
#[test]
fn a_pack_that_two_generations_have_counts_once_and_comes_free_with_the_last_of_them() {
    let images = [
        held("a/x", 1, 1, &[(7, 100, 2)]),
        held("a/x", 2, 2, &[(7, 100, 2)]),
        held("a/y", 1, 3, &[]),
    ];
    let policy = |quota| Retention {
        quota: Some(quota),
        ..none()
    };
    assert_eq!(gone(&images, &policy(103), ROOMY), []);
    let both = [("a/x@1".to_owned(), 1), ("a/x@2".to_owned(), 101)];
    assert_eq!(gone(&images, &policy(102), ROOMY), both[..1]);
    assert_eq!(gone(&images, &policy(101), ROOMY), both);
}

/// Whoever makes the next generation has linked the pack already.
#[test]
fn a_pack_that_somebody_else_has_too_does_not_come_free() {
    let images = [held("a/x", 1, 1, &[(7, 100, 2)])];
    let policy = Retention {
        quota: Some(50),
        ..none()
    };
    let plan = plan(&images, &policy, ROOMY, NOW);
    assert_eq!(plan.removals[0].frees, 1);
    assert_eq!((plan.before, plan.after, plan.over()), (101, 100, 50));
}

#[test]
fn a_namespace_has_its_own_quota() {
    let images = [
        held("a/x", 1, 2, &[(1, 100, 1)]),
        held("a/y", 1, 1, &[(2, 100, 1)]),
        held("b/z", 1, 0, &[(3, 90, 1)]),
    ];
    let policy = Retention {
        namespace_quota: Some(150),
        ..none()
    };
    assert_eq!(gone(&images, &policy, ROOMY), [("a/y@1".to_owned(), 101)]);
    let (all, some) = (
        plan(&images, &none(), ROOMY, NOW),
        plan(&images, &none(), None, NOW),
    );
    assert!(all.quota.is_some() && some.quota.is_none());
}

#[test]
fn without_a_quota_a_fifth_of_the_disk_stays_free_and_each_name_its_newest() {
    let images = [
        held("a/x", 1, 1, &[(1, 99, 1)]),
        held("a/x", 2, 2, &[(2, 99, 1)]),
        held("a/x", 3, 3, &[(3, 99, 1)]),
    ];
    let disk = |total, available| Some(Disk { total, available });
    assert_eq!(gone(&images, &none(), disk(1000, 200)), []);
    assert_eq!(
        gone(&images, &none(), disk(1000, 199)),
        [("a/x@1".to_owned(), 100)]
    );
    // Others have filled the disk. That the images do not make up for it is told.
    let left = plan(&images, &none(), disk(2000, 0), NOW);
    assert_eq!((left.removals.len(), left.over()), (2, 100));
    let also = Retention {
        idle_newest: true,
        ..none()
    };
    assert_eq!(gone(&images, &also, disk(2000, 0)).len(), 3);
}

/// Images of few names and packs, so that they share.
fn images() -> impl Strategy<Value = Vec<Held>> {
    let one = (
        0..2_u64,
        0..3_u64,
        0..8_u64,
        0..20_u64,
        any::<bool>(),
        0..8_u8,
        proptest::collection::hash_set(0..6_u64, 0..4),
    );
    proptest::collection::vec(one, 0..16).prop_map(|rows| {
        let mut all: Vec<Held> = Vec::new();
        let mut seen = HashSet::new();
        for (namespace, name, generation, used, usable, in_use, packs) in rows {
            if !seen.insert((namespace, name, generation)) {
                continue;
            }
            // As in a store, only generations of one name share packs.
            let base = (namespace * 3 + name) * 6 + 1;
            let packs: Vec<_> = packs
                .iter()
                .map(|pack| (base + pack, 10 + pack, 0))
                .collect();
            let name = format!("n{namespace}/i{name}");
            let mut image = held(&name, generation + 1, NOW - used * 10, &packs);
            image.usable = usable;
            image.in_use = in_use == 0;
            image.remade = in_use == 1;
            all.push(image);
        }
        let mut links: HashMap<(u64, u64), u64> = HashMap::new();
        for file in all.iter().flat_map(|image| &image.files) {
            *links.entry(file.inode).or_default() += 1;
        }
        for file in all.iter_mut().flat_map(|image| &mut image.files) {
            file.links = links[&file.inode];
        }
        all
    })
}

fn policies() -> impl Strategy<Value = Retention> {
    let maybe = |range: std::ops::Range<u64>| proptest::option::of(range);
    (
        maybe(1..4),
        maybe(0..200),
        any::<bool>(),
        maybe(0..120),
        maybe(0..80),
    )
        .prop_map(
            |(keep, idle, idle_newest, quota, namespace_quota)| Retention {
                keep: keep.map(|n| n as u32),
                idle: idle.map(Duration::from_secs),
                idle_newest: idle_newest && idle.is_some(),
                quota,
                namespace_quota,
            },
        )
}

/// Bytes of the files that these images have, each once: what `du` would say of them.
fn du<'a>(images: impl Iterator<Item = &'a Held>) -> u64 {
    let files: HashMap<_, _> = images
        .flat_map(|image| &image.files)
        .map(|file| (file.inode, file.bytes))
        .collect();
    files.values().sum()
}

proptest! {
    #[test]
    fn what_is_leased_stays_and_the_plan_is_what_du_says(images in images(), policy in policies()) {
        let plan = plan(&images, &policy, ROOMY, NOW);
        let removed: HashSet<usize> = plan.removals.iter().map(|removal| removal.image).collect();
        prop_assert_eq!(removed.len(), plan.removals.len());
        prop_assert!(removed.iter().all(|image| !images[*image].in_use));
        let left = images.iter().enumerate().filter(|(place, _)| !removed.contains(place));
        prop_assert_eq!(plan.before, du(images.iter()));
        prop_assert_eq!(plan.after, du(left.map(|(_, image)| image)));
        let freed: u64 = plan.removals.iter().map(|removal| removal.frees).sum();
        prop_assert_eq!(plan.before - freed, plan.after);
    }

    #[test]
    fn a_quota_is_met_or_all_that_is_left_is_leased_or_protected(
        images in images(),
        policy in policies(),
        available in 0..200_u64,
    ) {
        let disk = Disk { total: 500, available };
        let plan = plan(&images, &policy, Some(disk), NOW);
        let removed: HashSet<usize> = plan.removals.iter().map(|removal| removal.image).collect();
        let left: Vec<&Held> = images
            .iter()
            .enumerate()
            .filter(|(place, _)| !removed.contains(place))
            .map(|(_, image)| image)
            .collect();
        let leased = |images: &[&Held]| images.iter().all(|image| image.in_use);
        let newest = newest(&images, |image| !image.remade || NOW - image.last_used < IN_DEMAND);
        let protected = |place: usize| policy.quota.is_none() && !policy.idle_newest && newest[place];
        let stays = (0..images.len())
            .filter(|place| !removed.contains(place))
            .all(|place| images[place].in_use || protected(place));
        prop_assert!(plan.over() == 0 || stays, "{plan:?}");
        if let Some(quota) = policy.quota {
            prop_assert_eq!(plan.quota, Some(quota));
        }
        if let Some(quota) = policy.namespace_quota {
            for namespace in ["n0", "n1"] {
                let of: Vec<&Held> = left
                    .iter()
                    .copied()
                    .filter(|image| image.namespace.as_str() == namespace)
                    .collect();
                prop_assert!(du(of.iter().copied()) <= quota || leased(&of), "{plan:?}");
            }
        }
    }

    /// One removal less, and the rule that asked for it would not be met.
    #[test]
    fn no_more_goes_than_the_rules_ask_for(images in images(), policy in policies()) {
        let plan = plan(&images, &policy, ROOMY, NOW);
        let mut left: Vec<&Held> = images.iter().collect();
        let is = |image: &Held, other: &Held| {
            (&image.namespace, &image.name, image.generation)
                == (&other.namespace, &other.name, other.generation)
        };
        for removal in &plan.removals {
            let image = &images[removal.image];
            match removal.reason {
                Reason::Keep { keep } => {
                    let newer = images.iter().filter(|other| {
                        (&other.namespace, &other.name) == (&image.namespace, &image.name)
                            && other.generation > image.generation
                            && other.usable
                    });
                    prop_assert!(newer.count() >= keep as usize);
                }
                Reason::Idle { seconds } => {
                    prop_assert!(policy.idle.is_some_and(|idle| seconds >= idle.as_secs()));
                    let newer = images.iter().any(|other| {
                        (&other.namespace, &other.name) == (&image.namespace, &image.name)
                            && other.generation > image.generation
                            && other.usable
                    });
                    prop_assert!(policy.idle_newest || !image.usable || image.remade || newer);
                }
                Reason::NamespaceQuota { quota } => {
                    let of = left.iter().copied().filter(|other| other.namespace == image.namespace);
                    prop_assert!(du(of) > quota);
                }
                Reason::Quota { quota } => prop_assert!(du(left.iter().copied()) > quota),
            }
            // And of what could have gone, the least recently used did.
            if matches!(removal.reason, Reason::Quota { .. }) {
                let older = left.iter().any(|other| !other.in_use && other.last_used < image.last_used);
                prop_assert!(!older);
            }
            left.retain(|other| !is(other, image));
        }
    }

    #[test]
    fn the_order_is_that_of_the_images_and_not_of_the_listing(images in images(), policy in policies()) {
        let names = |images: &[Held]| gone(images, &policy, ROOMY);
        let mut reversed = images.clone();
        reversed.reverse();
        prop_assert_eq!(names(&images), names(&reversed));
    }
}
