//! Whether a process of the new container could have come to what a task of the image gets.
//!
//! A manifest says what the dumped container's *spec* said, and whoever can write an image can write that. CRIU
//! asks its own files. So each task in them is compared with what the new spec lets a process become in its
//! life, which is more than what it begins with:
//!
//! | | without `no_new_privs` | with it, root | with it, not root |
//! |---|---|---|---|
//! | bounding set | the spec's | the spec's | the spec's |
//! | permitted, effective, ambient | the spec's bounding set | the spec's permitted | the same, but `SETUID` and `SETGID` only where ambient |
//! | inheritable | the same, and the spec's inheritable | the same | the same |
//! | users | any | any with `SETUID`, else root | any with `SETUID`, else the spec's |
//! | groups | any | any with `SETGID`, else the spec's | as root |
//! | further groups | any with `SETGID`, else the spec's and its group | the same | the same |
//!
//! - *Without `no_new_privs`* a file with the setuid bit makes a process any user, root among them, and root gets
//!   the bounding set with its next exec. Nothing gets beyond that set (`capabilities(7)`), and nobody sets
//!   further groups without `SETGID`.
//! - *With it* no exec gives anything (`PR_SET_NO_NEW_PRIVS`), but runc's own, of the container's program: that
//!   begins with the spec's permitted set. Root keeps it. Another user keeps what is ambient and what the
//!   program's file has as capabilities of its own, which are in nobody's spec: a name server that may bind port
//!   53 must come back, so of the permitted set any is believed. `SETUID` and `SETGID` are not, for with them any
//!   root's image would fit any other user. A program that has those two as capabilities of its file, and runs as
//!   another user than root with `no_new_privs`, is refused.
//! - *Seccomp* and `no_new_privs` are never taken off again, and every child and thread has them. What a filter
//!   forbids is not compared.
//! - *A label* is the spec's; an AppArmor profile may also be one inside it or stacked on it (`P//child`, `P//&Q`).
//!   Where the spec has none nothing confines the container, and every label is less.
//! - *Securebits* are not compared: they take privileges away, or keep what is compared here.
//!
//! What a container's spec gives is also what an exec in it has (`kubectl exec`), whose orphans are init's. An exec
//! that was given more than the container (`ctr task exec --user 0`) leaves orphans that are refused.

use std::collections::BTreeSet;

use super::Difference;
use crate::{
    criu_image::{CapabilityBits, Credentials, Task},
    manifest::{Security, shorten},
};

/// Names as in OCI, by their number in `linux/capability.h`.
const NAMES: [&str; 41] = [
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_DAC_READ_SEARCH",
    "CAP_FOWNER",
    "CAP_FSETID",
    "CAP_KILL",
    "CAP_SETGID",
    "CAP_SETUID",
    "CAP_SETPCAP",
    "CAP_LINUX_IMMUTABLE",
    "CAP_NET_BIND_SERVICE",
    "CAP_NET_BROADCAST",
    "CAP_NET_ADMIN",
    "CAP_NET_RAW",
    "CAP_IPC_LOCK",
    "CAP_IPC_OWNER",
    "CAP_SYS_MODULE",
    "CAP_SYS_RAWIO",
    "CAP_SYS_CHROOT",
    "CAP_SYS_PTRACE",
    "CAP_SYS_PACCT",
    "CAP_SYS_ADMIN",
    "CAP_SYS_BOOT",
    "CAP_SYS_NICE",
    "CAP_SYS_RESOURCE",
    "CAP_SYS_TIME",
    "CAP_SYS_TTY_CONFIG",
    "CAP_MKNOD",
    "CAP_LEASE",
    "CAP_AUDIT_WRITE",
    "CAP_AUDIT_CONTROL",
    "CAP_SETFCAP",
    "CAP_MAC_OVERRIDE",
    "CAP_MAC_ADMIN",
    "CAP_SYSLOG",
    "CAP_WAKE_ALARM",
    "CAP_BLOCK_SUSPEND",
    "CAP_AUDIT_READ",
    "CAP_PERFMON",
    "CAP_BPF",
    "CAP_CHECKPOINT_RESTORE",
];
const SETGID: u64 = 1 << 6;
const SETUID: u64 = 1 << 7;

/// What a task of an image gets that no process of the new container could have.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("its task {task} {excess}")]
pub struct TaskDifference {
    /// Its number in the container, and its name.
    pub task: String,
    /// What it gets.
    pub excess: Excess,
}

/// What is too much of a task's credentials.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Excess {
    /// Another user or group.
    #[error("runs as {what} {id}, and this container's processes cannot become other than {spec}")]
    Id {
        /// "user", "group".
        what: &'static str,
        /// The task's: real, effective, saved or of the file system.
        id: u32,
        /// The spec's.
        spec: u32,
    },
    /// Groups that it cannot get.
    #[error("has the groups {}, which this container's processes cannot get", super::join(.0))]
    Groups(Vec<u32>),
    /// Capabilities that it cannot get.
    #[error("has {} ({set}), which this container's processes cannot get", names.join(", "))]
    Capabilities {
        /// Which set.
        set: &'static str,
        /// Which of it.
        names: Vec<String>,
    },
    /// No seccomp filter.
    #[error("is not confined by seccomp, and this container demands a profile")]
    Seccomp,
    /// Privileges can be gained.
    #[error("may gain privileges (no_new_privs is not set), and this container forbids it")]
    NoNewPrivileges,
    /// Another label.
    #[error("has the label {task}, and this container's is {spec}")]
    Label {
        /// The task's, or "none".
        task: String,
        /// The spec's.
        spec: String,
    },
}

/// Looks for one kind of excess.
type Kind<'a> = &'a dyn Fn(&Credentials) -> Option<Excess>;

/// Adds what is too much of any task: of each kind the first, for the tasks of a container mostly share it.
pub(super) fn fit_tasks(tasks: &[Task], spec: &Security, found: &mut Vec<Difference>) {
    let reach = Reach::of(spec);
    let kinds: [Kind<'_>; 7] = [
        &|task| id("user", &task.users, reach.user),
        &|task| id("group", &task.groups, reach.group),
        &|task| reach.groups(task),
        &|task| reach.capabilities(&task.capabilities),
        &|task| (spec.seccomp.is_some() && !task.seccomp).then_some(Excess::Seccomp),
        &|task| {
            let may_gain = spec.no_new_privileges && !task.no_new_privileges;
            may_gain.then_some(Excess::NoNewPrivileges)
        },
        &|task| label(task, spec),
    ];
    found.extend(kinds.iter().filter_map(|kind| {
        tasks.iter().find_map(|task| {
            let excess = kind(&task.credentials)?;
            let task = named(task);
            Some(TaskDifference { task, excess }.into())
        })
    }));
}

/// What a process of a container can become.
struct Reach {
    capabilities: CapabilityBits,
    /// Its only user; none where it can become any.
    user: Option<u32>,
    /// Its only group; none where it can become any.
    group: Option<u32>,
    /// Its only further groups; none where it can get any.
    groups: Option<BTreeSet<u32>>,
}

impl Reach {
    fn of(spec: &Security) -> Self {
        let sets = &spec.capabilities;
        let (bounding, permitted) = (bits(&sets.bounding), bits(&sets.permitted));
        let held = match (spec.no_new_privileges, spec.uid) {
            (false, _) => bounding | permitted,
            (true, 0) => permitted,
            (true, _) => permitted & (bits(&sets.ambient) | !(SETUID | SETGID)),
        };
        let only = |capability: u64, id: u32| {
            (spec.no_new_privileges && held & capability == 0).then_some(id)
        };
        let groups = || {
            let groups = spec.additional_gids.iter().copied();
            groups.chain([spec.gid]).collect()
        };
        Self {
            user: only(SETUID, spec.uid),
            group: only(SETGID, spec.gid),
            groups: (held & SETGID == 0).then(groups),
            capabilities: CapabilityBits {
                bounding,
                permitted: held,
                effective: held,
                inheritable: held | bits(&sets.inheritable),
                ambient: held,
            },
        }
    }

    fn groups(&self, task: &Credentials) -> Option<Excess> {
        let more = task.additional_groups.difference(self.groups.as_ref()?);
        // As many as a reader can use; a hostile image can have thousands.
        let more: Vec<u32> = more.take(8).copied().collect();
        (!more.is_empty()).then_some(Excess::Groups(more))
    }

    fn capabilities(&self, task: &CapabilityBits) -> Option<Excess> {
        let may = &self.capabilities;
        let sets = [
            ("bounding", task.bounding & !may.bounding),
            ("permitted", task.permitted & !may.permitted),
            ("effective", task.effective & !may.effective),
            ("inheritable", task.inheritable & !may.inheritable),
            ("ambient", task.ambient & !may.ambient),
        ];
        let (set, more) = sets.into_iter().find(|(_, more)| *more != 0)?;
        let numbers = (0..u64::BITS as usize).filter(|number| more & 1 << number != 0);
        let names = numbers.map(|number| match NAMES.get(number) {
            Some(name) => (*name).to_owned(),
            None => format!("capability {number}"),
        });
        let names = names.collect();
        Some(Excess::Capabilities { set, names })
    }
}

fn id(what: &'static str, ids: &[u32], only: Option<u32>) -> Option<Excess> {
    let spec = only?;
    let id = *ids.iter().find(|id| **id != spec)?;
    Some(Excess::Id { what, id, spec })
}

fn label(task: &Credentials, spec: &Security) -> Option<Excess> {
    // What a spec without a profile says, and one that is asked to have none.
    let profile = spec.apparmor.as_deref();
    let profile = profile.filter(|profile| *profile != "unconfined");
    // A host has one of the two, and CRIU takes the task's for that one: the other would not be known to it.
    let labels: Vec<&str> = profile.into_iter().chain(spec.selinux.as_deref()).collect();
    let is_within = |label: &str| {
        let inside = |rest: &str| rest.starts_with("//");
        labels.contains(&label)
            || profile
                .and_then(|p| label.strip_prefix(p))
                .is_some_and(inside)
    };
    let socket = task.socket_label.as_deref();
    let found = match task.label.as_deref() {
        _ if labels.is_empty() => return None,
        Some(label) if !is_within(label) => label,
        None => "none",
        Some(_) => socket.filter(|label| !is_within(label))?,
    };
    Some(Excess::Label {
        task: plain(found),
        spec: labels.join(" or "),
    })
}

fn bits(names: &BTreeSet<String>) -> u64 {
    let numbers = NAMES.iter().enumerate();
    let set = numbers.filter(|(_, name)| names.contains(**name));
    set.fold(0, |bits, (number, _)| bits | 1 << number)
}

fn named(task: &Task) -> String {
    match plain(&task.comm) {
        comm if comm.is_empty() => task.tid.to_string(),
        comm => format!("{} ({comm})", task.tid),
    }
}

/// A hostile text, fit to stand in one sentence.
fn plain(text: &str) -> String {
    let one = |c: char| if c.is_control() { '?' } else { c };
    shorten(text).chars().map(one).collect()
}

#[cfg(test)]
mod tests;
