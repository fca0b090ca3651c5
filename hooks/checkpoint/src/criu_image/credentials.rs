//! What CRIU gives back to each task: user, groups, capabilities, `no_new_privs`, seccomp mode, LSM label.
//!
//! Every process and every further thread has a `core-<tid>.img`, and a restore takes these from there and
//! from nowhere else (`images/{core,creds}.proto`; `restore_creds` and `restore_seccomp` in
//! `criu/pie/restorer.c`; `rst_prep_creds` and `check_core` in `criu/cr-restore.c`; 4.2). All are read, not
//! only those that the process tree names.
//!
//! What CRIU would read otherwise than we do must not pass, so the reader knows one way to say a thing. A
//! field that comes twice is refused (a protobuf parser merges the two), and so are packed lists, numbers
//! of more than 32 bits and further records, none of which CRIU writes. Places where old versions of CRIU
//! kept the same facts are refused for the same reason.

use std::{
    collections::{BTreeMap, BTreeSet, btree_map::Entry},
    fs::{self, File},
    io::BufReader,
    path::{Path, PathBuf},
};

use super::{
    CriuImageError, Records,
    folder::CORE_MAGIC,
    wire::{self, Field},
};

/// `TASK_DEAD` of `criu/include/pid.h`: a zombie, which has no credentials in the image and only exits.
const TASK_DEAD: u32 = 2;
/// Most groups of a task: `NGROUPS_MAX` of Linux.
const MAX_GROUPS: usize = 65_536;
/// Longest LSM label: a page, which is what the kernel takes at once in `/proc/<tid>/attr/current`.
const MAX_LABEL: usize = 4096;
/// Longest name of a task that is kept: `TASK_COMM_LEN` less its end.
const MAX_COMM: usize = 15;
/// Most bytes of credentials that differ from each other. A container has a few hundred bytes of them.
const MAX_HELD: usize = 16 << 20;

/// Capabilities, each the bit of its number in `linux/capability.h`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub struct CapabilityBits {
    /// What can ever be gained.
    pub bounding: u64,
    /// What may be made effective.
    pub permitted: u64,
    /// What is checked.
    pub effective: u64,
    /// What survives an exec of a file that has it too.
    pub inheritable: u64,
    /// What survives any exec.
    pub ambient: u64,
}

/// What one task gets.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Default)]
pub struct Credentials {
    /// Its real, effective, saved and file system user.
    pub users: [u32; 4],
    /// Its real, effective, saved and file system group.
    pub groups: [u32; 4],
    /// Its further groups.
    pub additional_groups: BTreeSet<u32>,
    /// Its capabilities.
    pub capabilities: CapabilityBits,
    /// Whether its execs can gain no privileges.
    pub no_new_privileges: bool,
    /// Whether seccomp confines it, strictly or by a filter.
    pub seccomp: bool,
    /// Its AppArmor profile or SELinux label, whichever the host has.
    pub label: Option<String>,
    /// The SELinux label of the sockets that it makes, where that is another.
    pub socket_label: Option<String>,
}

/// A task of an image: a process, or a further thread of one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Task {
    /// Its number in the container.
    pub tid: u32,
    /// Its name, at most 15 bytes; whatever it liked to call itself.
    pub comm: String,
    /// What it gets.
    pub credentials: Credentials,
}

/// The tasks of the image in `dir`, of those with the same credentials only the first; by number. Zombies
/// have none.
///
/// # Errors
/// When a task's image cannot be read or does not say what the task gets, and when the folder has a file
/// that would change what the others mean.
pub fn credentials(dir: &Path) -> Result<Vec<Task>, CriuImageError> {
    let mut found: BTreeMap<Credentials, (u32, String)> = BTreeMap::new();
    let mut held = 0;
    for (tid, path) in cores(dir)? {
        let Some((comm, credentials)) = read(&path)? else {
            continue;
        };
        let labels = [&credentials.label, &credentials.socket_label];
        let texts: usize = labels.into_iter().flatten().map(String::len).sum();
        let size = size_of::<Task>() + texts + 4 * credentials.additional_groups.len();
        if let Entry::Vacant(entry) = found.entry(credentials) {
            entry.insert((tid, comm));
            held += size;
        }
        if held > MAX_HELD {
            let what = "its folder has more different credentials than any container";
            return Err(CriuImageError::Malformed { path, what });
        }
    }
    let mut tasks: Vec<Task> = found
        .into_iter()
        .map(|(credentials, (tid, comm))| Task {
            tid,
            comm,
            credentials,
        })
        .collect();
    tasks.sort_by_key(|task| task.tid);
    Ok(tasks)
}

/// The tasks' images by number.
pub(super) fn cores(dir: &Path) -> Result<Vec<(u32, PathBuf)>, CriuImageError> {
    let read = |source| CriuImageError::Read {
        path: dir.to_owned(),
        source,
    };
    let mut cores = Vec::new();
    for entry in fs::read_dir(dir).map_err(read)? {
        let entry = entry.map_err(read)?;
        let name = entry.file_name();
        let name = name.to_string_lossy();
        foreign(&name)?;
        if let Some(rest) = name.strip_prefix("core-") {
            let tid = rest.strip_suffix(".img").and_then(|tid| tid.parse().ok());
            cores.push((
                tid.ok_or_else(|| CriuImageError::Malformed {
                    path: entry.path(),
                    what: "its name has no number of a task",
                })?,
                entry.path(),
            ));
        }
    }
    if cores.is_empty() {
        return Err(CriuImageError::Absent("core-*.img"));
    }
    cores.sort();
    Ok(cores)
}

/// Refuses files by which the credentials in the tasks' images would come to mean something else.
fn foreign(name: &str) -> Result<(), CriuImageError> {
    let what = if name.starts_with("userns-") {
        // User 1000 of it can be any user of the host.
        "the users of a user namespace"
    } else if name.starts_with("creds-") {
        "credentials where an old CRIU kept them"
    } else if name == "apparmor.img" {
        // CRIU would load it into the kernel.
        "an AppArmor policy of its own"
    } else {
        return Ok(());
    };
    Err(CriuImageError::Foreign {
        name: name.to_owned(),
        what,
    })
}

/// The one record of a task's image: the task's name and what it gets; none of a zombie.
fn read(path: &Path) -> Result<Option<(String, Credentials)>, CriuImageError> {
    let file = File::open(path).map_err(|source| CriuImageError::Read {
        path: path.to_owned(),
        source,
    })?;
    let mut records = Records::new(path, BufReader::new(file), CORE_MAGIC)?;
    let Some((_, bytes)) = records.next()? else {
        return Err(records.malformed("it has no record"));
    };
    let core = core(&bytes).map_err(|what| records.malformed(what))?;
    if records.next()?.is_some() {
        return Err(records.malformed("it has more than one record"));
    }
    Ok(core)
}

/// `core_entry`.
fn core(bytes: &[u8]) -> Result<Option<(String, Credentials)>, &'static str> {
    let (mut process, mut thread) = (None, None);
    each_field(bytes, |field| match field.number {
        3 => once(&mut process, message(field)?),
        5 => once(&mut thread, message(field)?),
        _ => Ok(()),
    })?;
    let (mut state, mut process_comm) = (None, None);
    each_field(process.unwrap_or_default(), |field| match field.number {
        1 => once(&mut state, number(field)?),
        6 => once(&mut process_comm, field.bytes),
        11 | 12 => Err("it has its seccomp mode where an old CRIU kept it"),
        _ => Ok(()),
    })?;
    let (mut creds, mut seccomp, mut comm) = (None, None, None);
    each_field(thread.unwrap_or_default(), |field| match field.number {
        10 => once(&mut creds, message(field)?),
        11 => once(&mut seccomp, number(field)?),
        13 => once(&mut comm, field.bytes),
        _ => Ok(()),
    })?;
    let Some(creds) = creds else {
        return match state {
            Some(TASK_DEAD) => Ok(None),
            _ => Err("it has no credentials"),
        };
    };
    let mut credentials = creds_entry(creds)?;
    // `SECCOMP_MODE_DISABLED`; where there is none, CRIU takes it for that.
    credentials.seccomp = seccomp.unwrap_or(0) != 0;
    let comm = comm.or(process_comm).unwrap_or_default();
    let comm = comm.get(..MAX_COMM).unwrap_or(comm);
    let comm = String::from_utf8_lossy(comm).into_owned();
    Ok(Some((comm, credentials)))
}

/// `creds_entry`.
fn creds_entry(bytes: &[u8]) -> Result<Credentials, &'static str> {
    // uid, gid, euid, egid, suid, sgid, fsuid, fsgid.
    let mut ids = [None; 8];
    let mut sets = [Bits::default(); 5];
    let [inheritable, permitted, effective, bounding, ambient] = &mut sets;
    let mut found = Credentials::default();
    let (mut label, mut socket_label, mut no_new_privileges) = (None, None, None);
    each_field(bytes, |field| match field.number {
        at @ 1..=8 => match ids.get_mut(at as usize - 1) {
            Some(id) => once(id, number(field)?),
            None => Ok(()),
        },
        9 => inheritable.push(field),
        10 => permitted.push(field),
        11 => effective.push(field),
        12 => bounding.push(field),
        14 => {
            found.additional_groups.insert(number(field)?);
            if found.additional_groups.len() > MAX_GROUPS {
                return Err("it has more groups than any task can have");
            }
            Ok(())
        }
        15 => once(&mut label, text(field)?),
        16 => once(&mut socket_label, text(field)?),
        18 => once(&mut no_new_privileges, number(field)?),
        19 => ambient.push(field),
        _ => Ok(()),
    })?;
    let [
        Some(uid),
        Some(gid),
        Some(euid),
        Some(egid),
        Some(suid),
        Some(sgid),
        Some(fsuid),
        Some(fsgid),
    ] = ids
    else {
        return Err("its credentials lack a user or group");
    };
    found.users = [uid, euid, suid, fsuid];
    found.groups = [gid, egid, sgid, fsgid];
    found.capabilities = CapabilityBits {
        inheritable: inheritable.bits,
        permitted: permitted.bits,
        effective: effective.bits,
        bounding: bounding.bits,
        ambient: ambient.bits,
    };
    // What CRIU hands to prctl, which takes no other number for a yes.
    found.no_new_privileges = no_new_privileges == Some(1);
    (found.label, found.socket_label) = (label, socket_label);
    Ok(found)
}

/// A set of capabilities: words of 32, the lowest first. Linux has two.
#[derive(Debug, Clone, Copy, Default)]
struct Bits {
    bits: u64,
    words: u32,
}

impl Bits {
    fn push(&mut self, field: Field<'_>) -> Result<(), &'static str> {
        if self.words == 2 {
            return Err("it has more capabilities than Linux can have");
        }
        self.bits |= u64::from(number(field)?) << (32 * self.words);
        self.words += 1;
        Ok(())
    }
}

/// Calls `each` with every field, until it finds a fault.
fn each_field<'a>(
    message: &'a [u8],
    mut each: impl FnMut(Field<'a>) -> Result<(), &'static str>,
) -> Result<(), &'static str> {
    let mut outcome = Ok(());
    wire::fields(message, |field, _| {
        if outcome.is_ok() {
            outcome = each(field);
        }
    })?;
    outcome
}

fn once<T>(place: &mut Option<T>, value: T) -> Result<(), &'static str> {
    match place.replace(value) {
        None => Ok(()),
        Some(_) => Err("it says something twice that can be said once"),
    }
}

fn number(field: Field<'_>) -> Result<u32, &'static str> {
    let value = field.value.and_then(|value| u32::try_from(value).ok());
    value.ok_or("it has something else where a number of 32 bits belongs")
}

fn message<'a>(field: Field<'a>) -> Result<&'a [u8], &'static str> {
    match field.value {
        None => Ok(field.bytes),
        Some(_) => Err("it has a number where a message belongs"),
    }
}

fn text(field: Field<'_>) -> Result<String, &'static str> {
    let bytes = message(field)?;
    if bytes.len() > MAX_LABEL {
        return Err("it has a label that is longer than any that the kernel takes");
    }
    // Its comparison is exact, and no rule for what is no UTF-8 can be.
    String::from_utf8(bytes.to_vec()).map_err(|_| "it has a label that is no text")
}

#[cfg(test)]
mod tests;
