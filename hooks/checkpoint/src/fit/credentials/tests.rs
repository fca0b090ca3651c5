use super::*;
use crate::manifest::Capabilities;

fn names(names: &[&str]) -> BTreeSet<String> {
    names.iter().map(|name| (*name).to_owned()).collect()
}

/// The spec that most pods have: user 1000, or root, with a few capabilities.
fn spec(uid: u32, no_new_privileges: bool) -> Security {
    let some = || {
        names(&[
            "CAP_CHOWN",
            "CAP_SETUID",
            "CAP_SETGID",
            "CAP_NET_BIND_SERVICE",
        ])
    };
    Security {
        uid,
        gid: uid,
        additional_gids: BTreeSet::from([7]),
        capabilities: Capabilities {
            bounding: some(),
            permitted: some(),
            effective: some(),
            ..Capabilities::default()
        },
        no_new_privileges,
        ..Security::default()
    }
}

/// What such a container's program begins with.
fn task(spec: &Security) -> Task {
    let bounding = bits(&spec.capabilities.bounding);
    let held = if spec.uid == 0 { bounding } else { 0 };
    Task {
        tid: 12,
        comm: "python3".to_owned(),
        credentials: Credentials {
            users: [spec.uid; 4],
            groups: [spec.gid; 4],
            additional_groups: spec.additional_gids.clone(),
            capabilities: CapabilityBits {
                bounding,
                permitted: held,
                effective: held,
                ..CapabilityBits::default()
            },
            no_new_privileges: spec.no_new_privileges,
            seccomp: spec.seccomp.is_some(),
            label: spec.apparmor.clone().or(spec.selinux.clone()),
            socket_label: None,
        },
    }
}

fn found(tasks: &[Task], spec: &Security) -> Vec<String> {
    let mut found = Vec::new();
    fit_tasks(tasks, spec, &mut found);
    found.iter().map(ToString::to_string).collect()
}

/// What is found of the program of a container of `spec` that has become what `change` makes of it.
fn of(spec: &Security, change: impl Fn(&mut Credentials)) -> Vec<String> {
    let mut task = task(spec);
    change(&mut task.credentials);
    found(&[task], spec)
}

#[track_caller]
fn fits(spec: &Security, change: impl Fn(&mut Credentials)) {
    assert_eq!(of(spec, change), [""; 0]);
}

#[track_caller]
fn refused(spec: &Security, words: &str, change: impl Fn(&mut Credentials)) {
    let sentences = of(spec, change);
    assert_eq!(sentences.len(), 1, "{sentences:?}");
    assert!(
        sentences[0].starts_with("its task 12 (python3) "),
        "{sentences:?}"
    );
    assert!(
        sentences[0].contains(words),
        "{sentences:?} do not say {words:?}"
    );
}

#[test]
fn what_a_container_begins_with_fits() {
    for uid in [0, 1000] {
        for no_new_privileges in [false, true] {
            let mut spec = spec(uid, no_new_privileges);
            fits(&spec, |_| {});
            spec.capabilities = Capabilities::default();
            spec.seccomp = Some("aa".to_owned());
            spec.apparmor = Some("cri".to_owned());
            fits(&spec, |_| {});
        }
    }
}

/// The real user, the effective one, the saved one, that of the file system.
#[test]
fn none_of_the_ids_can_be_anothers() {
    let spec = spec(1000, true);
    for at in 0..4 {
        refused(
            &spec,
            "as user 0, and this container's processes cannot become other than 1000",
            |task| {
                task.users[at] = 0;
            },
        );
        refused(&spec, "as group 5, and this", |task| task.groups[at] = 5);
    }
}

#[test]
fn who_may_change_its_user_has_changed_it() {
    // Root with SETUID and SETGID, as most containers are; a server that has given up root.
    fits(&spec(0, true), |task| {
        task.users = [101; 4];
        task.groups = [101; 4];
        task.additional_groups = BTreeSet::from([101]);
        (task.capabilities.permitted, task.capabilities.effective) = (0, 0);
    });
    // sudo and its like.
    fits(&spec(1000, false), |task| {
        task.users = [1000, 0, 0, 0];
        task.additional_groups = BTreeSet::from([0]);
        task.capabilities.permitted = task.capabilities.bounding;
    });
    // Root from which SETUID was taken away.
    let mut weak = spec(0, true);
    weak.capabilities = Capabilities::default();
    refused(&weak, "as user 101", |task| task.users[0] = 101);
    refused(&weak, "as group 101", |task| task.groups[0] = 101);
    weak.no_new_privileges = false;
    fits(&weak, |task| {
        (task.users, task.groups) = ([101; 4], [101; 4])
    });
    // A user who was given it in so many words.
    let mut ambient = spec(1000, true);
    ambient.capabilities.ambient = names(&["CAP_SETUID"]);
    fits(&ambient, |task| task.users[0] = 0);
    refused(&ambient, "as group 0", |task| task.groups[0] = 0);
}

#[test]
fn nobody_gets_groups_without_setgid() {
    let with = |spec: &Security| {
        refused(spec, "the groups 0, 27, which", |task| {
            task.additional_groups.extend([0, 27]);
        });
        fits(spec, |task| {
            task.additional_groups.clear();
            task.additional_groups.insert(spec.gid);
        });
    };
    with(&spec(1000, true));
    let mut bound = spec(1000, false);
    bound.capabilities = Capabilities::default();
    with(&bound);
}

#[test]
fn no_set_has_what_its_container_cannot_get() {
    let admin = 1 << 21;
    type Set = fn(&mut CapabilityBits) -> &mut u64;
    let sets: [(&str, Set); 5] = [
        ("CAP_SYS_ADMIN (bounding)", |sets| &mut sets.bounding),
        ("CAP_SYS_ADMIN (permitted)", |sets| &mut sets.permitted),
        ("CAP_SYS_ADMIN (effective)", |sets| &mut sets.effective),
        ("CAP_SYS_ADMIN (inheritable)", |sets| &mut sets.inheritable),
        ("CAP_SYS_ADMIN (ambient)", |sets| &mut sets.ambient),
    ];
    for (words, set) in sets {
        for spec in [
            spec(0, true),
            spec(0, false),
            spec(1000, true),
            spec(1000, false),
        ] {
            refused(&spec, words, |task| *set(&mut task.capabilities) |= admin);
            fits(&spec, |task| *set(&mut task.capabilities) |= 1);
        }
    }
    // In the bounding set only: what an exec gives, where one may give anything.
    let mut more = spec(0, true);
    more.capabilities
        .bounding
        .insert("CAP_SYS_ADMIN".to_owned());
    refused(&more, "CAP_SYS_ADMIN (permitted)", |task| {
        task.capabilities.permitted |= admin;
    });
    more.no_new_privileges = false;
    fits(&more, |task| task.capabilities.permitted |= admin);
    refused(&spec(0, true), "capability 63 (bounding)", |task| {
        task.capabilities.bounding |= 1 << 63;
    });
}

/// A program's file may have capabilities of its own, but with these two it could become root.
#[test]
fn of_a_user_who_gains_nothing_setuid_is_not_believed() {
    let user = spec(1000, true);
    fits(&user, |task| {
        let bind = 1 << 10;
        (task.capabilities.permitted, task.capabilities.effective) = (bind, bind);
    });
    refused(&user, "CAP_SETGID, CAP_SETUID (permitted)", |task| {
        task.capabilities.permitted |= SETUID | SETGID;
    });
}

#[test]
fn confinement_is_never_less() {
    let mut spec = spec(1000, true);
    refused(&spec, "no_new_privs", |task| task.no_new_privileges = false);
    fits(&spec, |task| task.seccomp = true);
    spec.seccomp = Some("aa".to_owned());
    refused(&spec, "not confined by seccomp", |task| {
        task.seccomp = false
    });
    spec.no_new_privileges = false;
    fits(&spec, |task| task.no_new_privileges = true);
}

#[test]
fn a_label_is_the_specs_or_inside_it() {
    let label =
        |label: &'static str| move |task: &mut Credentials| task.label = Some(label.to_owned());
    let mut spec = spec(0, true);
    fits(&spec, label("anything"));
    spec.apparmor = Some("unconfined".to_owned());
    fits(&spec, label("anything"));
    fits(&spec, |task| task.label = None);
    spec.apparmor = Some("cri".to_owned());
    for inside in ["cri", "cri//child", "cri//&other"] {
        fits(&spec, label(inside));
    }
    for outside in ["unconfined", "cri2", "cr", "", ":cri:", "other//&cri"] {
        refused(&spec, "and this container's is cri", label(outside));
    }
    refused(&spec, "the label none, and", |task| task.label = None);
    spec.apparmor = None;
    spec.selinux = Some("u:r:container_t:s0:c1,c2".to_owned());
    fits(&spec, |_| {});
    refused(&spec, "the label u:r:spc_t:s0, and", label("u:r:spc_t:s0"));
    refused(
        &spec,
        "the label u:r:container_t:s0:c1,c2//x",
        label("u:r:container_t:s0:c1,c2//x"),
    );
    fits(&spec, |task| task.socket_label = task.label.clone());
    refused(&spec, "the label u:r:spc_t:s0, and", |task| {
        task.socket_label = Some("u:r:spc_t:s0".to_owned());
    });
}

#[test]
fn of_each_kind_the_first_task_is_named_and_stays_in_its_sentence() {
    let spec = spec(1000, true);
    let mut other = task(&spec);
    other.credentials.users[0] = 0;
    let mut wild = task(&spec);
    (wild.tid, wild.comm) = (13, "a\nb\u{1b}".to_owned());
    wild.credentials.users[1] = 5;
    wild.credentials.no_new_privileges = false;
    wild.credentials.capabilities.bounding = u64::MAX;
    let mut nameless = wild.clone();
    nameless.comm.clear();
    let sentences = found(&[task(&spec), other, wild, nameless.clone()], &spec);
    assert_eq!(sentences.len(), 3, "{sentences:?}");
    assert!(sentences[0].starts_with("its task 12 (python3) runs as user 0"));
    assert!(sentences[1].starts_with("its task 13 (a?b?) has CAP_DAC_OVERRIDE, "));
    assert!(sentences[2].starts_with("its task 13 (a?b?) may gain"));
    assert!(found(&[nameless], &spec)[0].starts_with("its task 13 runs"));
}

#[test]
fn names_are_those_of_the_spec() {
    // Each is one that the OCI spec knows, at the place of its number.
    for name in NAMES {
        let json = format!("\"{name}\"");
        serde_json::from_str::<oci_spec::runtime::Capability>(&json).unwrap();
    }
    assert_eq!((NAMES[6], NAMES[7]), ("CAP_SETGID", "CAP_SETUID"));
    assert_eq!((NAMES[21], NAMES[31]), ("CAP_SYS_ADMIN", "CAP_SETFCAP"));
    assert_eq!(NAMES[40], "CAP_CHECKPOINT_RESTORE");
}
