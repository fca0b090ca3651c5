//! The options of `io.containerd.runc.v2`, which the client crate does not carry: `containerd.runc.v1` of containerd's API.

use prost::Message;
use prost_types::Any;

/// `containerd.runc.v1.Options`; fields that no test sets are left out.
#[derive(Clone, PartialEq, Message)]
pub struct Options {
    /// Change the root with `MS_MOVE`.
    #[prost(bool, tag = "1")]
    pub no_pivot_root: bool,
    /// Leave the session keyring as it is.
    #[prost(bool, tag = "2")]
    pub no_new_keyring: bool,
    /// A cgroup for the shim itself.
    #[prost(string, tag = "3")]
    pub shim_cgroup: String,
    /// Who owns the pipes of stdio.
    #[prost(uint32, tag = "4")]
    pub io_uid: u32,
    /// As [`Options::io_uid`].
    #[prost(uint32, tag = "5")]
    pub io_gid: u32,
    /// The program to use in place of `runc`.
    #[prost(string, tag = "6")]
    pub binary_name: String,
    /// Where runc keeps its state.
    #[prost(string, tag = "7")]
    pub root: String,
    /// Lets systemd make the cgroup.
    #[prost(bool, tag = "9")]
    pub systemd_cgroup: bool,
    /// A folder with a CRIU image: the task is created from it, and start restores.
    #[prost(string, tag = "10")]
    pub criu_image_path: String,
    /// CRIU's work folder.
    #[prost(string, tag = "11")]
    pub criu_work_path: String,
}

/// `containerd.runc.v1.CheckpointOptions`.
#[derive(Clone, PartialEq, Message)]
pub struct CheckpointOptions {
    /// End the tasks when they are dumped.
    #[prost(bool, tag = "1")]
    pub exit: bool,
    /// Dump established TCP connections.
    #[prost(bool, tag = "2")]
    pub open_tcp: bool,
    /// Dump unix sockets whose other end is outside.
    #[prost(bool, tag = "3")]
    pub external_unix_sockets: bool,
    /// Dump a container with a terminal.
    #[prost(bool, tag = "4")]
    pub terminal: bool,
    /// Dump file locks.
    #[prost(bool, tag = "5")]
    pub file_locks: bool,
    /// Namespaces to create empty at restore.
    #[prost(string, repeated, tag = "6")]
    pub empty_namespaces: Vec<String>,
    /// How CRIU treats cgroups: soft, full, strict.
    #[prost(string, tag = "7")]
    pub cgroups_mode: String,
    /// Where to write the image; without it the image goes into containerd's content store.
    #[prost(string, tag = "8")]
    pub image_path: String,
    /// CRIU's work folder.
    #[prost(string, tag = "9")]
    pub work_path: String,
    /// An earlier image that this one builds on, relative to the image.
    #[prost(string, tag = "10")]
    pub parent_path: String,
}

impl Options {
    /// As containerd wants to see it.
    pub fn to_any(&self) -> Any {
        Any {
            type_url: "containerd.runc.v1.Options".into(),
            value: self.encode_to_vec(),
        }
    }
}

impl CheckpointOptions {
    /// As containerd wants to see it.
    pub fn to_any(&self) -> Any {
        Any {
            type_url: "containerd.runc.v1.CheckpointOptions".into(),
            value: self.encode_to_vec(),
        }
    }
}
