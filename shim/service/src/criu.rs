//! CRIU: what its configuration file says, and what its log meant.
//!
//! runc passes only some of CRIU's options on, and runc 1.1 not even `link-remap`; a configuration file
//! reaches CRIU with every version. runc reads the file's name from the annotation `org.criu.config` at
//! create, so each bundle gets one of its own, rewritten before each dump and restore.

use std::{
    fmt::Write as _,
    fs,
    io::{Read, Seek, SeekFrom},
    os::unix::fs::OpenOptionsExt,
    path::{Path, PathBuf},
};

use containerd_shim_protos::{
    protobuf::{Message, well_known_types::any::Any},
    shim::oci::CheckpointOptions,
};
use rekindle_checkpoint::manifest::DumpFlags;

use crate::{any, bundle::CRIU_CONFIG, error::Error, options::length_delimited_field};

const OPTIONS: &str = "containerd.runc.v1.CheckpointOptions";

/// The node's own CRIU configuration for runc, merged in. runc reads it when no annotation names another.
const NODE_CONFIG: &str = "/etc/criu/runc.conf";

/// Why CRIU failed, from its log.
#[derive(Debug, thiserror::Error)]
#[error("{action} of container {id} failed: {reason} (CRIU's log: {log})", log = log.display())]
pub(crate) struct CriuError {
    pub(crate) action: &'static str,
    pub(crate) id: String,
    pub(crate) reason: String,
    pub(crate) log: PathBuf,
}

/// A checkpoint call, resolved.
#[derive(Debug, Clone, Default)]
pub(crate) struct CheckpointRequest {
    pub(crate) image: PathBuf,
    pub(crate) work: Option<PathBuf>,
    pub(crate) parent: Option<String>,
    pub(crate) exit: bool,
    pub(crate) flags: DumpFlags,
}

impl CheckpointRequest {
    /// Reads a call of the task API. No options mean leave running, as from CRI with a runtime type of
    /// one's own.
    pub(crate) fn parse(path: &str, options: Option<&Any>) -> Result<Self, Error> {
        let Some(any) = options.filter(|any| !any.value.is_empty()) else {
            return Ok(Self {
                image: path.into(),
                ..Self::default()
            });
        };
        let wrong = |reason: String| Error::Argument {
            key: format!("checkpoint options {}", any.type_url),
            reason,
        };
        if !any::is(any, OPTIONS) {
            return Err(wrong(format!("allowed is {OPTIONS}")));
        }
        let options =
            CheckpointOptions::parse_from_bytes(&any.value).map_err(|e| wrong(e.to_string()))?;
        // Field 10, parent_path, came after the crate's copy of the message.
        let parent = length_delimited_field(&any.value, 10).map_err(|e| wrong(e.to_owned()))?;
        let parent = parent
            .filter(|p| !p.is_empty())
            .map(|p| String::from_utf8_lossy(p).into_owned());
        Ok(Self {
            image: path.into(),
            work: Some(options.work_path)
                .filter(|p| !p.is_empty())
                .map(PathBuf::from),
            parent,
            exit: options.exit,
            flags: DumpFlags {
                open_tcp: options.open_tcp,
                external_unix_sockets: options.external_unix_sockets,
                terminal: options.terminal,
                file_locks: options.file_locks,
                empty_namespaces: options.empty_namespaces,
                cgroups_mode: options.cgroups_mode,
                ..DumpFlags::default()
            },
        })
    }
}

/// The flags of a dump as arguments of `runc checkpoint` and `runc restore`. A restore has to use the
/// same; what runc does not pass on is in the configuration file.
pub(crate) fn arguments(flags: &DumpFlags) -> Vec<String> {
    let mut arguments = Vec::new();
    for (on, flag) in [
        (flags.open_tcp, "--tcp-established"),
        (flags.external_unix_sockets, "--ext-unix-sk"),
        (flags.terminal, "--shell-job"),
        (flags.file_locks, "--file-locks"),
    ] {
        if on {
            arguments.push(flag.to_owned());
        }
    }
    for namespace in &flags.empty_namespaces {
        arguments.extend(["--empty-ns".to_owned(), namespace.clone()]);
    }
    if !flags.cgroups_mode.is_empty() {
        arguments.extend([
            "--manage-cgroups-mode".to_owned(),
            flags.cgroups_mode.clone(),
        ]);
    }
    arguments
}

/// A bundle's CRIU configuration.
#[derive(Debug, Clone)]
pub(crate) struct CriuConfig {
    path: PathBuf,
    /// What the bundle or the node says already.
    base: String,
}

/// What a process tree is about to go through.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Purpose<'a> {
    /// A dump; the extra line is for the page transfer.
    Dump(&'a str),
    /// A restore with these flags of the dump.
    Restore(&'a DumpFlags),
}

impl CriuConfig {
    /// In `bundle`; `before` is the file that the bundle's annotation named until now.
    pub(crate) fn new(bundle: &Path, before: Option<&Path>) -> Self {
        let base = read_bounded(before.unwrap_or(Path::new(NODE_CONFIG)));
        Self {
            path: bundle.join(CRIU_CONFIG),
            base: base.unwrap_or_default(),
        }
    }

    /// Rewrites the file.
    pub(crate) fn write(&self, purpose: Purpose<'_>) -> Result<(), Error> {
        let mut text = self.base.clone();
        text.push('\n');
        // What every PyTorch process has: deleted semaphores (link-remap), connections, locks, sockets to
        // the outside. Allowing them costs nothing where there are none. And any server may have a connection that it
        // has not taken yet (skip-in-flight), as when a probe has just come: the image is without it, and who goes on
        // running still has it.
        let _ = match purpose {
            Purpose::Dump(extra) => writeln!(
                text,
                "link-remap\ntcp-established\nskip-in-flight\next-unix-sk\nfile-locks\n{extra}"
            ),
            // The connections' address may belong to another pod by now: unless the caller asked for
            // open connections to be kept, they come back closed and the program sees a reset.
            Purpose::Restore(flags) if flags.open_tcp => {
                writeln!(text, "tcp-established\next-unix-sk\nfile-locks")
            }
            Purpose::Restore(_) => writeln!(text, "tcp-close\next-unix-sk\nfile-locks"),
        };
        fs::write(&self.path, text).map_err(Error::file("writing", &self.path))
    }
}

/// A configuration is a regular file of some lines; a FIFO would block, and a device never end.
fn read_bounded(path: &Path) -> Option<String> {
    let file = fs::File::options()
        .read(true)
        .custom_flags(libc::O_NONBLOCK)
        .open(path)
        .ok()?;
    let mut text = String::new();
    file.metadata().ok()?.is_file().then_some(())?;
    file.take(64 << 10).read_to_string(&mut text).ok()?;
    Some(text)
}

/// The last errors of a CRIU log, as one line; the log may be tens of MB.
pub(crate) fn reason(log: &Path) -> Option<String> {
    let mut file = fs::File::open(log).ok()?;
    let length = file.metadata().ok()?.len();
    file.seek(SeekFrom::Start(length.saturating_sub(256 << 10)))
        .ok()?;
    let mut tail = Vec::new();
    file.take(256 << 10).read_to_end(&mut tail).ok()?;
    let tail = String::from_utf8_lossy(&tail);
    let errors: Vec<&str> = tail
        .lines()
        .filter_map(|line| line.split_once("Error ").map(|(_, message)| message))
        // "(criu/cr-dump.c:2098): Dumping FAILED." says nothing that the caller does not know.
        .filter(|message| !message.contains("FAILED"))
        // Where root has no CAP_SYS_RESOURCE; CRIU goes on without.
        .filter(|message| !message.contains("Can't setup RLIMIT_NOFILE for self"))
        .collect();
    let first: Vec<String> = errors
        .iter()
        .take(2)
        .map(|message| {
            message
                .split_once("): ")
                .map_or(*message, |(_, text)| text)
                .chars()
                .take(400)
                .collect()
        })
        .collect();
    (!first.is_empty()).then(|| first.join("; "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_checkpoint_call_is_read_whole() {
        let mut options = CheckpointOptions::new();
        options.exit = true;
        options.open_tcp = true;
        options.empty_namespaces = vec!["network".to_owned()];
        let mut value = options.write_to_bytes().unwrap();
        value.extend_from_slice(&[0x52, 3, b'.', b'.', b'/']); // field 10
        let any = Any {
            type_url: OPTIONS.to_owned(),
            value,
            ..Any::default()
        };
        let request = CheckpointRequest::parse("/image", Some(&any)).unwrap();
        assert!(request.exit && request.flags.open_tcp);
        assert_eq!(request.parent.as_deref(), Some("../"));
        assert_eq!(
            arguments(&request.flags),
            ["--tcp-established", "--empty-ns", "network"]
        );
        assert!(!CheckpointRequest::parse("/image", None).unwrap().exit);
    }

    #[test]
    fn a_log_is_told_in_its_first_errors() {
        let folder = tempfile::tempdir().unwrap();
        let log = folder.path().join("dump.log");
        fs::write(
            &log,
            "(00.01) Warn  (criu/x.c:1): hm\n(00.02) Error (criu/files-reg.c:1031): Can't dump ghost file /x\n\
             (00.03) Error (criu/cr-dump.c:2098): Dumping FAILED.\n",
        )
        .unwrap();
        assert_eq!(reason(&log).unwrap(), "Can't dump ghost file /x");
        assert!(reason(&folder.path().join("none")).is_none());
    }
}
