use proptest::prelude::*;

use super::*;
use crate::criu_image::{
    COMMON_MAGIC,
    tests::records::{Number, Text, Value, image, message},
};

/// A `creds_entry` of user 7 and group 8 with all five sets, and `more` at its end.
fn creds(more: &[(u8, Value)]) -> Vec<u8> {
    let ids = (1..=8).map(|number| (number, Number(if number % 2 == 1 { 7 } else { 8 })));
    let sets = [(9, 1), (10, 2), (11, 4), (12, 8)].into_iter();
    let sets = sets.flat_map(|(number, word)| [(number, Number(word)), (number, Number(1))]);
    let fields = ids.chain(sets).chain([(13, Number(0))]);
    numbered(&fields.chain(more.iter().copied()).collect::<Vec<_>>())
}

/// As [`message`], with field numbers above 15.
fn numbered(fields: &[(u8, Value)]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for (number, value) in fields {
        let one = message(&[(number % 16, *value)]);
        if *number < 16 {
            bytes.extend(one);
        } else {
            // A key of two bytes; the value follows it as it is.
            bytes.extend([one[0] | 0x80, number >> 4]);
            bytes.extend(&one[1..]);
        }
    }
    bytes
}

/// A `core_entry` of a process with these `creds_entry` and further fields of `thread_core_entry`.
fn core_of(creds: &[u8], more: &[(u8, Value)]) -> Vec<u8> {
    let process = message(&[(1, Number(1)), (6, Text(b"sh"))]);
    let thread = numbered(&[&[(10, Text(creds))], more].concat());
    message(&[(1, Number(1)), (3, Text(&process)), (5, Text(&thread))])
}

fn folder(cores: &[(&str, Vec<u8>)]) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    for (name, bytes) in cores {
        fs::write(dir.path().join(name), bytes).unwrap();
    }
    dir
}

/// What is read of one task's image with these records.
fn one(records: &[Vec<u8>]) -> Result<Vec<Task>, String> {
    let dir = folder(&[("core-1.img", image(CORE_MAGIC, records))]);
    credentials(dir.path()).map_err(|e| e.to_string())
}

#[test]
fn a_task_is_read() {
    let creds = creds(&[
        (14, Number(5)),
        (14, Number(6)),
        (15, Text(b"tight")),
        (18, Number(1)),
        (19, Number(16)),
        (19, Number(1)),
    ]);
    let tasks = one(&[core_of(&creds, &[(11, Number(2)), (12, Number(0))])]).unwrap();
    let high = 1 << 32;
    let expected = Credentials {
        users: [7; 4],
        groups: [8; 4],
        additional_groups: BTreeSet::from([5, 6]),
        capabilities: CapabilityBits {
            inheritable: high | 1,
            permitted: high | 2,
            effective: high | 4,
            bounding: high | 8,
            ambient: high | 16,
        },
        no_new_privileges: true,
        seccomp: true,
        label: Some("tight".to_owned()),
        socket_label: None,
    };
    assert_eq!(
        tasks,
        [Task {
            tid: 1,
            comm: "sh".to_owned(),
            credentials: expected
        }]
    );
}

#[test]
fn each_of_the_eight_ids_is_read() {
    for number in 1..=8 {
        let ids: Vec<_> = (1..=8)
            .map(|at| (at, Number(u64::from(at == number))))
            .collect();
        let tasks = one(&[core_of(&message(&ids), &[])]).unwrap();
        let found = &tasks[0].credentials;
        let at = usize::from(number - 1) / 2;
        let (one, other) = match number % 2 {
            1 => (found.users, found.groups),
            _ => (found.groups, found.users),
        };
        assert_eq!((one[at], one.iter().sum(), other), (1, 1, [0; 4]));
    }
}

#[test]
fn what_is_not_said_is_less_confined() {
    let tasks = one(&[core_of(&creds(&[]), &[])]).unwrap();
    let found = &tasks[0].credentials;
    assert!(!found.seccomp && !found.no_new_privileges && found.label.is_none());
    let strange = core_of(&creds(&[(18, Number(2))]), &[]);
    assert!(!one(&[strange]).unwrap()[0].credentials.no_new_privileges);
}

#[test]
fn threads_are_read_zombies_have_none_and_equals_come_once() {
    let thread = |creds: &[u8], comm: &[u8]| {
        let thread = message(&[(10, Text(creds)), (13, Text(comm))]);
        image(
            CORE_MAGIC,
            &[message(&[(1, Number(1)), (5, Text(&thread))])],
        )
    };
    let dead = message(&[(1, Number(2)), (6, Text(b"gone"))]);
    let dead = image(CORE_MAGIC, &[message(&[(1, Number(1)), (3, Text(&dead))])]);
    let more = creds(&[(14, Number(5))]);
    let dir = folder(&[
        ("core-1.img", thread(&creds(&[]), b"first")),
        ("core-9.img", thread(&more, b"another name than ever")),
        ("core-10.img", thread(&creds(&[]), b"equal")),
        ("core-11.img", dead),
        ("mm-1.img", b"?".to_vec()),
    ]);
    let tasks = credentials(dir.path()).unwrap();
    let named: Vec<_> = tasks.iter().map(|t| (t.tid, t.comm.as_str())).collect();
    assert_eq!(named, [(1, "first"), (9, "another name th")]);
}

#[test]
fn what_could_be_read_in_two_ways_is_refused() {
    let good = || core_of(&creds(&[]), &[]);
    one(&[good()]).unwrap();
    let with = |more: &[(u8, Value)]| core_of(&creds(more), &[]);
    let thread = message(&[(10, Text(&creds(&[])))]);
    let twice = message(&[(5, Text(&thread)), (5, Text(&thread))]);
    let old = message(&[(1, Number(1)), (11, Number(2))]);
    let old = message(&[(3, Text(&old)), (5, Text(&thread))]);
    let zombie = message(&[(1, Number(3))]);
    let ids: Vec<_> = (1..=7).map(|number| (number, Number(0))).collect();
    let mut cut = good();
    cut.truncate(cut.len() - 1);
    let long = vec![b'x'; 4097];
    for (records, why) in [
        (vec![], "no record"),
        (vec![good(), good()], "more than one record"),
        (vec![twice], "twice"),
        (vec![with(&[(1, Number(0))])], "twice"),
        (
            vec![with(&[(15, Text(b"a")), (15, Text(b"unconfined"))])],
            "twice",
        ),
        (vec![with(&[(18, Number(1)), (18, Number(0))])], "twice"),
        (
            vec![core_of(&creds(&[]), &[(11, Number(2)), (11, Number(0))])],
            "twice",
        ),
        (vec![with(&[(14, Number(1 << 32))])], "32 bits"),
        // A packed list, which a protobuf parser would take.
        (vec![with(&[(14, Text(&[0]))])], "32 bits"),
        (
            vec![with(&[(12, Number(0))])],
            "more capabilities than Linux",
        ),
        (vec![with(&[(15, Number(1))])], "where a message belongs"),
        (vec![with(&[(15, Text(&[0xff]))])], "no text"),
        (vec![with(&[(15, Text(&long))])], "longer than any"),
        (vec![old], "an old CRIU"),
        (vec![message(&[(1, Number(1))])], "no credentials"),
        (vec![message(&[(3, Text(&zombie))])], "no credentials"),
        (vec![core_of(&message(&ids), &[])], "lack a user or group"),
        (vec![cut], "ends inside a field"),
    ] {
        let sentence = one(&records).unwrap_err();
        assert!(sentence.contains(why), "{sentence:?} is not {why:?}");
        assert!(sentence.contains("core-1.img"), "{sentence}");
    }
}

#[test]
fn more_groups_than_any_task_has_are_refused() {
    let mut many = creds(&[]);
    for group in 0..=MAX_GROUPS as u64 {
        many.extend(message(&[(14, Number(group))]));
    }
    let sentence = one(&[core_of(&many, &[])]).unwrap_err();
    assert!(sentence.contains("more groups"), "{sentence}");
}

#[test]
fn lengths_that_no_file_has_cost_no_memory() {
    let claims = |bytes: &[u8]| {
        let mut file = image(CORE_MAGIC, &[]);
        file.extend(bytes);
        let dir = folder(&[("core-1.img", file)]);
        credentials(dir.path()).unwrap_err().to_string()
    };
    assert!(claims(&u32::MAX.to_le_bytes()).contains("claims more bytes"));
    assert!(claims(&(30_u32 << 20).to_le_bytes()).contains("ends inside a record"));
    // A message inside it that claims 2^63 bytes.
    let mut record = vec![5 << 3 | 2];
    record.extend([0xff; 8]);
    record.push(0x7f);
    let mut bytes = (record.len() as u32).to_le_bytes().to_vec();
    bytes.extend(record);
    assert!(claims(&bytes).contains("ends inside a field"));
}

#[test]
fn files_that_change_the_meaning_are_refused() {
    let good = image(CORE_MAGIC, &[core_of(&creds(&[]), &[])]);
    for (name, why) in [
        ("userns-10.img", "user namespace"),
        ("creds-1.img", "old CRIU"),
        ("apparmor.img", "AppArmor policy"),
        ("core-1", "no number of a task"),
        ("core-x.img", "no number of a task"),
    ] {
        let dir = folder(&[("core-1.img", good.clone()), (name, good.clone())]);
        let sentence = credentials(dir.path()).unwrap_err().to_string();
        assert!(
            sentence.contains(why) && sentence.contains(name),
            "{sentence}"
        );
    }
    let sentence = credentials(folder(&[]).path()).unwrap_err().to_string();
    assert!(sentence.contains("core-"), "{sentence}");
}

proptest! {
    #[test]
    fn no_bytes_make_the_reader_panic(tail in proptest::collection::vec(any::<u8>(), 0..300)) {
        let head = [COMMON_MAGIC.to_le_bytes(), CORE_MAGIC.to_le_bytes()].concat();
        let dir = folder(&[("core-1.img", [head, tail.clone()].concat())]);
        let _ = credentials(dir.path());
        let _ = one(std::slice::from_ref(&tail));
        let _ = one(&[core_of(&tail, &[])]);
        let _ = core(&tail);
    }

    #[test]
    fn no_mutation_makes_the_reader_panic(
        at in any::<prop::sample::Index>(), byte in any::<u8>(), cut in any::<prop::sample::Index>(),
    ) {
        let mut bytes = core_of(&creds(&[(14, Number(5)), (15, Text(b"tight"))]), &[(11, Number(2))]);
        let at = at.index(bytes.len());
        bytes[at] = byte;
        bytes.truncate(cut.index(bytes.len() + 1));
        let _ = core(&bytes);
    }

    #[test]
    fn what_is_written_is_read(
        ids in any::<[u32; 8]>(),
        sets in any::<[[u32; 2]; 5]>(),
        groups in proptest::collection::btree_set(any::<u32>(), 0..20),
    ) {
        let numbers = (1..=8).zip(ids).map(|(number, id)| (number, Number(id.into())));
        let sets_of = [9, 10, 11, 12, 19].into_iter().zip(sets);
        let words = sets_of.flat_map(|(number, set)| set.map(|word| (number, Number(word.into()))));
        let groups_of = groups.iter().map(|group| (14, Number((*group).into())));
        let creds: Vec<_> = numbers.chain(words).chain(groups_of).collect();
        let tasks = one(&[core_of(&numbered(&creds), &[])]).unwrap();
        let found = &tasks[0].credentials;
        prop_assert_eq!(found.users, [ids[0], ids[2], ids[4], ids[6]]);
        prop_assert_eq!(found.groups, [ids[1], ids[3], ids[5], ids[7]]);
        prop_assert_eq!(&found.additional_groups, &groups);
        let [inheritable, permitted, effective, bounding, ambient] =
            sets.map(|[low, high]| u64::from(high) << 32 | u64::from(low));
        prop_assert_eq!(
            found.capabilities,
            CapabilityBits { bounding, permitted, effective, inheritable, ambient }
        );
    }
}
