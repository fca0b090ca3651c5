//! What this host is, in the words of a manifest.

use std::{collections::BTreeSet, fs, io};

use crate::manifest::Host;

/// Why this host could not be described.
#[derive(Debug, thiserror::Error)]
#[error("cannot read {path}, which says what this host's CPU can do")]
pub struct HostError {
    path: &'static str,
    source: io::Error,
}

const CPUINFO: &str = "/proc/cpuinfo";

/// CPU features of x86 that user code can use and that a C library, a BLAS or a JIT choose code by; once
/// chosen, the code runs on wherever the process is restored. Names as in `/proc/cpuinfo`. What only the
/// kernel uses (and what it sets by boot options, as `ibrs`) is not here: it differs between twin nodes.
/// Other architectures: all features that the kernel lists, for it lists only those of user code (HWCAP).
const X86: &[&str] = &[
    "cx16",
    "sse3",
    "pni",
    "ssse3",
    "sse4_1",
    "sse4_2",
    "sse4a",
    "popcnt",
    "lahf_lm",
    "abm",
    "bmi1",
    "bmi2",
    "movbe",
    "fma",
    "fma4",
    "f16c",
    "aes",
    "vaes",
    "pclmulqdq",
    "vpclmulqdq",
    "gfni",
    "sha_ni",
    "rdrand",
    "rdseed",
    "adx",
    "xsave",
    "xsaveopt",
    "xsavec",
    "xgetbv1",
    "fsgsbase",
    "rdpid",
    "rdtscp",
    "erms",
    "fsrm",
    "clflushopt",
    "clwb",
    "avx",
    "avx2",
    "avx_vnni",
    "avx512f",
    "avx512dq",
    "avx512cd",
    "avx512bw",
    "avx512vl",
    "avx512ifma",
    "avx512vbmi",
    "avx512_vbmi2",
    "avx512_vnni",
    "avx512_bitalg",
    "avx512_vpopcntdq",
    "avx512_bf16",
    "avx512_fp16",
    "avx512_vp2intersect",
    "amx_tile",
    "amx_int8",
    "amx_bf16",
    "amx_fp16",
    "serialize",
    "movdiri",
    "movdir64b",
    "waitpkg",
    "pku",
    "ospke",
    "user_shstk",
    "rtm",
    "hle",
    "xop",
    "tbm",
];

/// The features among `flags` that a process may depend on.
pub fn relevant_flags(arch: &str, flags: &str) -> BTreeSet<String> {
    flags
        .split_ascii_whitespace()
        .filter(|flag| arch != "x86_64" || X86.contains(flag))
        .map(str::to_owned)
        .collect()
}

/// Describes this host; `criu` and `runc` are their versions, which the caller has asked them for.
///
/// # Errors
/// When `/proc/cpuinfo` cannot be read.
pub fn host_facts(criu: &str, runc: &str) -> Result<Host, HostError> {
    let text = fs::read_to_string(CPUINFO).map_err(|source| HostError {
        path: CPUINFO,
        source,
    })?;
    let uname = rustix::system::uname();
    let arch = uname.machine().to_string_lossy().into_owned();
    Ok(Host {
        cpu_vendor: cpuinfo(&text, &["vendor_id", "CPU implementer"]),
        cpu_model: cpuinfo(&text, &["model name", "CPU part"]),
        cpu_flags: relevant_flags(&arch, &cpuinfo(&text, &["flags", "Features"])),
        kernel: uname.release().to_string_lossy().into_owned(),
        criu: criu.to_owned(),
        runc: runc.to_owned(),
        arch,
    })
}

/// The value of the first line that has one of these keys.
fn cpuinfo(text: &str, keys: &[&str]) -> String {
    text.lines()
        .filter_map(|line| line.split_once(':'))
        .find(|(key, _)| keys.contains(&key.trim()))
        .map(|(_, value)| value.trim().to_owned())
        .unwrap_or_default()
}
