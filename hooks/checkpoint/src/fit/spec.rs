//! What a container's OCI spec says, in the words of a manifest.

use std::collections::BTreeSet;

use oci_spec::runtime::{Capabilities as CapabilitySet, LinuxCapabilities, Spec};
use sha2::{Digest, Sha256};

use crate::manifest::{Capabilities, Container, Security};

/// What `spec` says of the things that a manifest records and [`fit`](super::fit) compares.
pub fn container_facts(spec: &Spec) -> Container {
    let process = spec.process().as_ref();
    let linux = spec.linux().as_ref();
    let mounts = spec.mounts().as_deref().unwrap_or_default();
    let user = process.map(|process| process.user());
    let capabilities = process.and_then(|process| process.capabilities().as_ref());
    let label = |text: &Option<String>| text.clone().filter(|text| !text.is_empty());
    let seccomp = linux.and_then(|linux| linux.seccomp().as_ref());
    Container {
        security: Security {
            uid: user.map_or(0, |user| user.uid()),
            gid: user.map_or(0, |user| user.gid()),
            additional_gids: user
                .and_then(|user| user.additional_gids().clone())
                .unwrap_or_default()
                .into_iter()
                .collect(),
            capabilities: capabilities.map(sets).unwrap_or_default(),
            seccomp: seccomp.and_then(|profile| {
                let text = serde_json::to_vec(profile).ok()?;
                Some(hex(&Sha256::digest(text)))
            }),
            no_new_privileges: process
                .and_then(|process| process.no_new_privileges())
                .unwrap_or(false),
            apparmor: process.and_then(|process| label(process.apparmor_profile())),
            selinux: process.and_then(|process| label(process.selinux_label())),
        },
        mounts: mounts
            .iter()
            .map(|mount| mount.destination().to_string_lossy().into_owned())
            .collect(),
        terminal: process
            .and_then(|process| process.terminal())
            .unwrap_or(false),
        hostname: spec.hostname().clone(),
    }
}

fn sets(capabilities: &LinuxCapabilities) -> Capabilities {
    let set = |set: &Option<CapabilitySet>| -> BTreeSet<String> {
        let all = set.iter().flatten();
        // As the spec spells it: CAP_CHOWN.
        all.filter_map(|cap| serde_json::to_value(cap).ok()?.as_str().map(str::to_owned))
            .collect()
    };
    Capabilities {
        bounding: set(capabilities.bounding()),
        effective: set(capabilities.effective()),
        inheritable: set(capabilities.inheritable()),
        permitted: set(capabilities.permitted()),
        ambient: set(capabilities.ambient()),
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}
