//! The processes of an image, for people, and the machine that it is of.

use std::path::Path;

use super::{CriuImageError, credentials::cores, folder::CORE_MAGIC, remaps::each_record, wire};

/// `core_entry.march` of `images/core.proto`, as `uname -m` calls them.
const MACHINES: &[(u64, &str)] = &[
    (1, "x86_64"),
    (2, "armv7l"),
    (3, "aarch64"),
    (4, "ppc64le"),
    (5, "s390x"),
    (6, "mips64"),
    (7, "loongarch64"),
    (8, "riscv64"),
];

/// One process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Process {
    /// Its number in the container.
    pub(crate) pid: u32,
    /// Its name, at most 15 bytes.
    pub(crate) comm: String,
}

/// The processes of the image in `dir`, by number, and its machine where all are of one that is known.
///
/// # Errors
/// When one of their images cannot be read.
pub(crate) fn processes(
    dir: &Path,
) -> Result<(Vec<Process>, Option<&'static str>), CriuImageError> {
    let mut found = Vec::new();
    let mut machines = Vec::new();
    for (tid, path) in cores(dir)? {
        each_record(&path, CORE_MAGIC, |core| {
            let mut process = None;
            wire::fields(core, |field, _| match field.number {
                1 => machines.push(field.value),
                // What a further thread does not have.
                3 => process = Some(field.bytes),
                _ => {}
            })?;
            let Some(process) = process else {
                return Ok(());
            };
            let mut comm = String::new();
            wire::fields(process, |field, _| {
                if field.number == 6 {
                    let text = String::from_utf8_lossy(field.bytes);
                    comm = text.chars().filter(|c| !c.is_control()).take(15).collect();
                }
            })?;
            found.push(Process { pid: tid, comm });
            Ok(())
        })?;
    }
    machines.dedup();
    let machine = match machines[..] {
        [Some(number)] => MACHINES.iter().find(|(known, _)| *known == number),
        _ => None,
    };
    Ok((found, machine.map(|(_, name)| *name)))
}
