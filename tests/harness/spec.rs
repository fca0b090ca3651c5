//! The OCI specification of a test's container: what `ctr run` would write, less what tests do not need.

use crate::container::Builder;
use serde_json::{Value, json};

const CAPABILITIES: [&str; 14] = [
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_FSETID",
    "CAP_FOWNER",
    "CAP_MKNOD",
    "CAP_NET_RAW",
    "CAP_SETGID",
    "CAP_SETUID",
    "CAP_SETFCAP",
    "CAP_SETPCAP",
    "CAP_NET_BIND_SERVICE",
    "CAP_SYS_CHROOT",
    "CAP_KILL",
    "CAP_AUDIT_WRITE",
];

/// A process: of a container, or of an exec in it.
pub(crate) fn process(
    args: &[String],
    env: &[String],
    cwd: &str,
    user: (u32, u32),
    terminal: bool,
) -> Value {
    let mut all =
        vec!["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin".to_owned()];
    if terminal {
        all.push("TERM=xterm".into());
    }
    all.extend_from_slice(env);
    json!({
        "terminal": terminal,
        "user": {"uid": user.0, "gid": user.1},
        "args": args,
        "env": all,
        "cwd": cwd,
        "noNewPrivileges": true,
        "capabilities": {"bounding": CAPABILITIES, "effective": CAPABILITIES, "permitted": CAPABILITIES},
        "rlimits": [{"type": "RLIMIT_NOFILE", "hard": 1024, "soft": 1024}],
    })
}

pub(crate) fn container(of: &Builder<'_>) -> Value {
    let mount = |to: &str, kind: &str, options: &[&str]| json!({"destination": to, "type": kind, "source": kind, "options": options});
    let mut mounts = vec![
        mount("/proc", "proc", &["nosuid", "noexec", "nodev"]),
        mount(
            "/dev",
            "tmpfs",
            &["nosuid", "strictatime", "mode=755", "size=65536k"],
        ),
        mount(
            "/dev/pts",
            "devpts",
            &[
                "nosuid",
                "noexec",
                "newinstance",
                "ptmxmode=0666",
                "mode=0620",
                "gid=5",
            ],
        ),
        mount(
            "/dev/shm",
            "tmpfs",
            &["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"],
        ),
        mount("/dev/mqueue", "mqueue", &["nosuid", "noexec", "nodev"]),
        mount("/sys", "sysfs", &["nosuid", "noexec", "nodev", "ro"]),
        mount(
            "/run",
            "tmpfs",
            &["nosuid", "strictatime", "mode=755", "size=65536k"],
        ),
    ];
    for (from, to, writable) in &of.binds {
        let access = if *writable { "rw" } else { "ro" };
        mounts.push(json!({"destination": to, "type": "bind", "source": from, "options": ["rbind", access]}));
    }
    let mut namespaces = vec!["pid", "ipc", "uts", "mount"];
    if !of.host_network {
        namespaces.push("network");
    }
    let namespaces: Vec<Value> = namespaces
        .iter()
        .map(|&kind| match of.pids_of {
            Some(pid) if kind == "pid" => {
                json!({"type": kind, "path": format!("/proc/{pid}/ns/pid")})
            }
            _ => json!({"type": kind}),
        })
        .collect();
    let mut resources = json!({"devices": [{"allow": false, "access": "rwm"}]});
    if let Some(limit) = of.memory_limit {
        resources["memory"] = json!({"limit": limit});
    }
    json!({
        "ociVersion": "1.1.0",
        "process": process(&of.args, &of.env, &of.cwd, of.user, of.terminal),
        "root": {"path": "rootfs"},
        "hostname": of.id,
        "mounts": mounts,
        "annotations": of.annotations,
        "linux": {
            "cgroupsPath": of.node.cgroups_path(&of.id),
            "namespaces": namespaces,
            "resources": resources,
            "maskedPaths": ["/proc/kcore", "/proc/keys", "/proc/sysrq-trigger", "/sys/firmware"],
            "readonlyPaths": ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys"],
        },
    })
}
