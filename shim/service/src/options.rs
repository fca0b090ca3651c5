//! The options of a runtime, as containerd's configuration has them.

use std::{
    fs,
    path::{Path, PathBuf},
};

use containerd_shim_protos::{
    protobuf::{Message, well_known_types::any::Any},
    shim::oci::Options,
};
use serde::{Deserialize, Serialize, de::IgnoredAny};

use crate::{any, error::Error, runc};

const RUNC_OPTIONS: &str = "containerd.runc.v1.Options";
/// What containerd sends for a runtime type of its own.
const RUNTIME_OPTIONS: &str = "runtimeoptions.v1.Options";

/// `runc.v1.Options`, resolved.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct RuncOptions {
    pub(crate) binary: String,
    pub(crate) root: String,
    pub(crate) systemd_cgroup: bool,
    pub(crate) no_pivot_root: bool,
    pub(crate) no_new_keyring: bool,
    pub(crate) shim_cgroup: String,
    pub(crate) io_uid: u32,
    pub(crate) io_gid: u32,
    pub(crate) criu_image_path: String,
    pub(crate) criu_work_path: String,
}

/// The `[options]` table of containerd's configuration, or the file that it names.
#[derive(Deserialize, Default)]
#[serde(rename_all = "PascalCase", default, deny_unknown_fields)]
struct TomlOptions {
    binary_name: String,
    root: String,
    systemd_cgroup: bool,
    no_pivot_root: bool,
    no_new_keyring: bool,
    shim_cgroup: String,
    io_uid: u32,
    io_gid: u32,
    criu_image_path: String,
    criu_work_path: String,
    /// containerd's own, which are in the same table: nothing for a shim to do.
    type_url: IgnoredAny,
    task_api_address: IgnoredAny,
    task_api_version: IgnoredAny,
    /// Of containerd 1.7, which writes it empty.
    criu_path: String,
}

impl RuncOptions {
    /// Reads the options of a create call or of the `start` handshake.
    pub(crate) fn parse(any: Option<&Any>) -> Result<Self, Error> {
        let Some(any) = any.filter(|any| !any.type_url.is_empty()) else {
            return Ok(Self::default());
        };
        let wrong = |reason: String| Error::Argument {
            key: format!("runtime options {}", any.type_url),
            reason,
        };
        if any::is(any, RUNC_OPTIONS) {
            let options =
                Options::parse_from_bytes(&any.value).map_err(|e| wrong(e.to_string()))?;
            return Ok(options.into());
        }
        if any::is(any, RUNTIME_OPTIONS) {
            let options: TomlOptions =
                toml::from_str(&table(&any.value).map_err(wrong)?).map_err(|e| wrong(told(&e)))?;
            if !options.criu_path.is_empty() {
                let reason = "CriuPath is no option any more: runc takes the criu on its PATH";
                return Err(wrong(reason.to_owned()));
            }
            return Ok(options.into());
        }
        Err(wrong(format!(
            "allowed are {RUNC_OPTIONS} and {RUNTIME_OPTIONS}"
        )))
    }

    pub(crate) fn binary(&self) -> String {
        if self.binary.is_empty() {
            "runc".to_owned()
        } else {
            self.binary.clone()
        }
    }

    pub(crate) fn root(&self, namespace: &str) -> PathBuf {
        let root = if self.root.is_empty() {
            runc::DEFAULT_ROOT
        } else {
            &self.root
        };
        Path::new(root).join(namespace)
    }
}

impl From<Options> for RuncOptions {
    fn from(o: Options) -> Self {
        Self {
            binary: o.binary_name,
            root: o.root,
            systemd_cgroup: o.systemd_cgroup,
            no_pivot_root: o.no_pivot_root,
            no_new_keyring: o.no_new_keyring,
            shim_cgroup: o.shim_cgroup,
            io_uid: o.io_uid,
            io_gid: o.io_gid,
            criu_image_path: o.criu_image_path,
            criu_work_path: o.criu_work_path,
        }
    }
}

impl From<TomlOptions> for RuncOptions {
    fn from(o: TomlOptions) -> Self {
        Self {
            binary: o.binary_name,
            root: o.root,
            systemd_cgroup: o.systemd_cgroup,
            no_pivot_root: o.no_pivot_root,
            no_new_keyring: o.no_new_keyring,
            shim_cgroup: o.shim_cgroup,
            io_uid: o.io_uid,
            io_gid: o.io_gid,
            criu_image_path: o.criu_image_path,
            criu_work_path: o.criu_work_path,
        }
    }
}

/// The table in `runtimeoptions.v1.Options`, which containerd sends for a runtime type of its own: the file that
/// field 2 names (`ConfigPath`), else field 3.
fn table(message: &[u8]) -> Result<String, String> {
    let text = |number| -> Result<String, String> {
        let bytes = length_delimited_field(message, number)?.unwrap_or_default();
        String::from_utf8(bytes.to_owned()).map_err(|e| e.to_string())
    };
    match text(2)?.as_str() {
        "" => text(3),
        path => fs::read_to_string(path).map_err(|e| format!("reading ConfigPath {path}: {e}")),
    }
}

/// What is wrong with a table, in one line.
fn told(error: &toml::de::Error) -> String {
    error.message().trim().replace('\n', ", ")
}

/// The bytes of one length-delimited field of a protobuf message whose type is in no crate we use.
pub(crate) fn length_delimited_field(
    message: &[u8],
    number: u32,
) -> Result<Option<&[u8]>, &'static str> {
    const SHORT: &str = "not a protobuf message";
    fn varint(bytes: &mut &[u8]) -> Result<u64, &'static str> {
        let mut value = 0u64;
        for shift in (0..64).step_by(7) {
            let (&byte, rest) = bytes.split_first().ok_or(SHORT)?;
            *bytes = rest;
            value |= u64::from(byte & 0x7f) << shift;
            if byte & 0x80 == 0 {
                return Ok(value);
            }
        }
        Err(SHORT)
    }
    let mut rest = message;
    while !rest.is_empty() {
        let key = varint(&mut rest)?;
        match key & 7 {
            0 => {
                varint(&mut rest)?;
            }
            2 => {
                let length = usize::try_from(varint(&mut rest)?).map_err(|_| SHORT)?;
                let (value, after) = rest.split_at_checked(length).ok_or(SHORT)?;
                if key >> 3 == u64::from(number) {
                    return Ok(Some(value));
                }
                rest = after;
            }
            1 => rest = rest.get(8..).ok_or(SHORT)?,
            5 => rest = rest.get(4..).ok_or(SHORT)?,
            _ => return Err(SHORT),
        }
    }
    Ok(None)
}

#[cfg(test)]
mod tests;
