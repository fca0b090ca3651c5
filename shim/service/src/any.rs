//! Messages with their type's name beside them.
//!
//! The generated types could tell their names themselves, by reflection: that builds a description of every message of
//! their file, and keeps it, in each shim.

use containerd_shim_protos::protobuf::{Message, well_known_types::any::Any};

/// A message as containerd's typeurl writes it: the name of its type is bare, without `type.googleapis.com/`.
pub(crate) fn pack<M: Message>(package: &str, message: &M) -> Any {
    let mut any = Any::new();
    any.type_url = format!("{package}.{}", M::NAME);
    any.value = message.write_to_bytes().unwrap_or_default();
    any
}

/// Whether it is of this type. Some clients write a host before the name.
pub(crate) fn is(any: &Any, name: &str) -> bool {
    any.type_url.rsplit('/').next() == Some(name)
}
