use super::*;
use crate::{criu_image::Credentials, manifest::Capabilities};

fn names(names: &[&str]) -> BTreeSet<String> {
    names.iter().map(|name| (*name).to_owned()).collect()
}

fn image() -> Facts {
    let capabilities = Capabilities {
        bounding: names(&["CAP_CHOWN"]),
        permitted: names(&["CAP_CHOWN"]),
        effective: names(&["CAP_CHOWN"]),
        ..Capabilities::default()
    };
    Facts {
        host: Host {
            arch: "x86_64".to_owned(),
            cpu_flags: names(&["avx", "avx2"]),
            kernel: "6.12.3-cloud".to_owned(),
            criu: "4.1.1".to_owned(),
            runc: "1.1.15".to_owned(),
            ..Host::default()
        },
        container: Container {
            security: Security {
                uid: 1000,
                gid: 1000,
                additional_gids: BTreeSet::from([7]),
                capabilities,
                seccomp: Some("aaaaaaaaaaaaaaaa".to_owned()),
                no_new_privileges: true,
                ..Security::default()
            },
            mounts: names(&["/data", "/dev/shm"]),
            ..Container::default()
        },
        ..Facts::default()
    }
}

/// What `fit` says of the image after `image` was changed, on a host and for a spec that were changed too.
fn verdict(change: impl Fn(&mut Facts, &mut Host, &mut Container)) -> Result<(), String> {
    let mut facts = image();
    facts.source.image_digest = Some("sha256:aa".to_owned());
    let (mut host, mut spec) = (facts.host.clone(), facts.container.clone());
    change(&mut facts, &mut host, &mut spec);
    fit(&facts, &[], &host, &spec, Some("sha256:aa")).map_err(|misfit| misfit.to_string())
}

#[test]
fn an_image_fits_where_it_was_made_and_on_a_better_host() {
    verdict(|_, _, _| {}).unwrap();
    verdict(|_, host, spec| {
        host.cpu_flags.insert("avx512f".to_owned());
        host.kernel = "6.18.0".to_owned();
        host.criu = "4.2.1".to_owned();
        spec.security
            .capabilities
            .bounding
            .insert("CAP_KILL".to_owned());
        spec.security.additional_gids.insert(8);
    })
    .unwrap();
    // A spec that confines less than the image's processes are confined.
    verdict(|_, _, spec| {
        spec.security.seccomp = None;
        spec.security.no_new_privileges = false;
    })
    .unwrap();
}

#[test]
fn every_difference_is_named() {
    type Change = fn(&mut Facts, &mut Host, &mut Container);
    let table: &[(Change, &str)] = &[
        (
            |_, host, _| host.arch = "aarch64".to_owned(),
            "made on x86_64, and this host is aarch64",
        ),
        (
            |_, host, _| host.cpu_flags = names(&["avx"]),
            "CPU lacks avx2",
        ),
        (|_, host, _| host.kernel = "6.6.9".to_owned(), "older 6.6.9"),
        (|_, host, _| host.criu = "3.19".to_owned(), "older 3.19"),
        (
            |facts, _, _| facts.source.image_digest = Some("sha256:bb".to_owned()),
            "image was sha256:bb",
        ),
        (
            |facts, _, _| facts.container.security.uid = 0,
            "as user 0, and this container's as 1000",
        ),
        (|_, _, spec| spec.security.gid = 5, "as group 1000"),
        (
            |_, _, spec| spec.security.additional_gids.clear(),
            "groups 7",
        ),
        (
            |facts, _, _| {
                let set = &mut facts.container.security.capabilities.bounding;
                set.insert("CAP_SYS_ADMIN".to_owned());
            },
            "CAP_SYS_ADMIN (bounding)",
        ),
        (
            |facts, _, _| {
                let set = &mut facts.container.security.capabilities.ambient;
                set.insert("CAP_CHOWN".to_owned());
            },
            "CAP_CHOWN (ambient)",
        ),
        (
            |facts, _, _| facts.container.security.seccomp = None,
            "no seccomp profile",
        ),
        (
            |_, _, spec| spec.security.seccomp = Some("bbbbbbbbbbbbbb".to_owned()),
            "seccomp profile bbbbbbbbbbbb",
        ),
        (
            |facts, _, _| facts.container.security.no_new_privileges = false,
            "no_new_privs",
        ),
        (
            |_, _, spec| spec.security.apparmor = Some("tight".to_owned()),
            "AppArmor profile none",
        ),
        (
            |facts, _, _| facts.container.security.selinux = Some("s0".to_owned()),
            "SELinux label s0",
        ),
        (
            |_, _, spec| spec.mounts = names(&["/dev/shm"]),
            "lacks its mounts /data",
        ),
        (
            |_, _, spec| spec.mounts = names(&["/data", "/dev/shm", "/x"]),
            "it had not: /x",
        ),
        (|_, _, spec| spec.terminal = true, "had no terminal"),
    ];
    for (change, words) in table {
        let sentence = verdict(change).unwrap_err();
        assert!(
            sentence.contains(words),
            "{sentence:?} does not say {words:?}"
        );
        assert_eq!(
            sentence.matches("; ").count(),
            0,
            "more than one difference: {sentence}"
        );
    }
}

#[test]
fn all_differences_come_at_once() {
    let sentence = verdict(|_, host, spec| {
        host.cpu_flags.clear();
        spec.security.uid = 0;
        spec.terminal = true;
    })
    .unwrap_err();
    assert_eq!(sentence.matches("; ").count(), 2, "{sentence}");
}

#[test]
fn a_manifest_is_not_believed_and_a_difference_is_not_said_twice() {
    let mut facts = image();
    let mut task = Task {
        tid: 1,
        comm: "counter".to_owned(),
        credentials: Credentials::default(),
    };
    task.credentials.no_new_privileges = true;
    task.credentials.seccomp = true;
    let say = |facts: &Facts, spec: &Container| {
        let fitted = fit(facts, std::slice::from_ref(&task), &facts.host, spec, None);
        fitted.unwrap_err().to_string()
    };
    let spec = facts.container.clone();
    let sentence = say(&facts, &spec);
    let words = "its task 1 (counter) runs as user 0, and this container's processes cannot become other than 1000";
    assert!(sentence.contains(words), "{sentence}");
    facts.container.security.uid = 0;
    let sentence = say(&facts, &spec);
    assert!(
        !sentence.contains("its task") && sentence.contains("as user 0"),
        "{sentence}"
    );
}

#[test]
fn an_unknown_digest_is_not_compared() {
    let mut facts = image();
    facts.source.image_digest = Some("sha256:aa".to_owned());
    fit(&facts, &[], &facts.host, &facts.container, None).unwrap();
}

#[test]
fn a_spec_is_read() {
    let text = r#"{"ociVersion": "1.1.0", "hostname": "h",
        "process": {"cwd": "/", "user": {"uid": 7, "gid": 8, "additionalGids": [9]}, "terminal": true,
            "capabilities": {"bounding": ["CAP_CHOWN", "CAP_SYS_ADMIN"], "permitted": ["CAP_CHOWN"]},
            "noNewPrivileges": true, "apparmorProfile": "cri", "selinuxLabel": ""},
        "mounts": [{"destination": "/proc"}, {"destination": "/data"}],
        "linux": {"seccomp": {"defaultAction": "SCMP_ACT_ERRNO"}}}"#;
    let spec: oci_spec::runtime::Spec = serde_json::from_str(text).unwrap();
    let facts = container_facts(&spec);
    let security = &facts.security;
    assert_eq!(
        (security.uid, security.gid, &security.additional_gids),
        (7, 8, &BTreeSet::from([9]))
    );
    assert_eq!(
        security.capabilities.bounding,
        names(&["CAP_CHOWN", "CAP_SYS_ADMIN"])
    );
    assert_eq!(security.capabilities.permitted, names(&["CAP_CHOWN"]));
    assert!(security.no_new_privileges && facts.terminal);
    assert_eq!(
        (security.apparmor.as_deref(), security.selinux.as_deref()),
        (Some("cri"), None)
    );
    assert_eq!(security.seccomp.as_ref().unwrap().len(), 64);
    assert_eq!(
        (facts.mounts, facts.hostname.as_deref()),
        (names(&["/proc", "/data"]), Some("h"))
    );
}

#[test]
fn this_host_is_described() {
    let host = host_facts("4.2.1", "1.3.6").unwrap();
    assert!(!host.arch.is_empty() && !host.kernel.is_empty() && !host.cpu_flags.is_empty());
    let flags = relevant_flags("x86_64", "fpu avx2 ibrs sse4_2");
    assert_eq!(flags, names(&["avx2", "sse4_2"]));
    assert_eq!(relevant_flags("aarch64", "fp sve").len(), 2);
}
