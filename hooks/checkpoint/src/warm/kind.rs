//! What decides whether a container may go on from another one's image.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
};

use oci_spec::runtime::Spec;
use rekindle_core::name::ImageName;
use serde::{Deserialize, Serialize};

use crate::{
    fit::container_facts,
    manifest::{Container, FORMAT, Host, Security},
};

/// Hex digits of a kind's hash in its images' name: 64 bits, and nothing but a wrong image for a container of the same
/// namespace that somebody searched for is lost when two are equal; `fit` compares what matters then.
const DIGITS: usize = 16;

/// All that two containers have in common which may share an image, or hashes of it.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Kind {
    /// The format of images.
    pub format: u32,
    /// The digest of the container image.
    pub image: String,
    /// The container's name in the pod's spec.
    pub container: Option<String>,
    /// Its command.
    pub args: Vec<String>,
    /// Its working folder.
    pub cwd: String,
    /// Its environment: hashes of the values, for there may be secrets in it.
    pub environment: BTreeMap<String, String>,
    /// Destinations of its mounts, with what is there: a dataset's version, the hash of a ConfigMap's or a Secret's
    /// files, nothing for all others.
    pub mounts: BTreeMap<String, String>,
    /// The pod's service account.
    pub account: Option<String>,
    /// Its namespaces, each with whether it has one of its own (`pid:own`) or joins one (`network:joined`).
    pub namespaces: BTreeSet<String>,
    /// What its processes may do.
    pub security: Security,
    /// Whether its stdio is a terminal.
    pub terminal: bool,
    /// The instruction set.
    pub arch: String,
    /// The CPU.
    pub cpu: String,
    /// Its features.
    pub cpu_flags: BTreeSet<String>,
    /// CRIU's version.
    pub criu: String,
}

/// What a spec does not say of its container.
#[derive(Debug, Clone, Default)]
pub struct Surroundings<'a> {
    /// The digest of the container image.
    pub image: String,
    /// The container's name in the pod's spec.
    pub container: Option<String>,
    /// Names of variables that do not count.
    pub ignore_env: &'a [String],
    /// What does not count as a value: the pod's own name and uid.
    pub own: Vec<String>,
    /// What is mounted, by destination, where that is known.
    pub contents: BTreeMap<String, String>,
    /// The pod's service account.
    pub account: Option<String>,
}

impl Kind {
    /// The kind of a container on this host.
    pub fn of(spec: &Spec, host: &Host, around: Surroundings<'_>) -> Self {
        let Container {
            security,
            mounts,
            terminal,
            hostname: _,
        } = container_facts(spec);
        let process = spec.process().as_ref();
        let env = process.and_then(|process| process.env().as_deref());
        let mut contents = around.contents;
        Self {
            format: FORMAT,
            image: around.image,
            container: around.container,
            args: process
                .and_then(|process| process.args().clone())
                .unwrap_or_default(),
            cwd: process.map_or_else(String::new, |process| process.cwd().display().to_string()),
            environment: environment(env.unwrap_or_default(), around.ignore_env, &around.own),
            mounts: mounts
                .into_iter()
                .map(|destination| {
                    let content = contents.remove(&destination).unwrap_or_default();
                    (destination, content)
                })
                .collect(),
            account: around.account,
            namespaces: namespaces(spec),
            security,
            terminal,
            arch: host.arch.clone(),
            cpu: format!("{} {}", host.cpu_vendor, host.cpu_model),
            cpu_flags: host.cpu_flags.clone(),
            criu: host.criu.clone(),
        }
    }

    /// The name of its images; none where the container's name cannot be part of one.
    pub fn image_name(&self) -> Option<ImageName> {
        let bytes = serde_json::to_vec(self).ok()?;
        let hash = blake3::hash(&bytes).to_hex();
        // Room for the rest in the 63 characters of a name.
        let container = self.container.as_deref().unwrap_or("container");
        let container: String = container.chars().take(40).collect();
        format!("auto-{container}-{}", &hash[..DIGITS]).parse().ok()
    }

    /// In what it differs from another one, as short names: for people.
    pub fn differences(&self, other: &Self) -> Vec<String> {
        let mut found = Vec::new();
        let mut compare = |what: &str, same: bool| {
            if !same {
                found.push(what.to_owned());
            }
        };
        compare("the format of images", self.format == other.format);
        compare("the container image", self.image == other.image);
        compare("the command", self.args == other.args);
        compare("the working folder", self.cwd == other.cwd);
        compare("the service account", self.account == other.account);
        compare("the namespaces", self.namespaces == other.namespaces);
        compare("the security context", self.security == other.security);
        compare("the terminal", self.terminal == other.terminal);
        let cpu = |kind: &Self| (kind.arch.clone(), kind.cpu.clone(), kind.cpu_flags.clone());
        compare("the CPU", cpu(self) == cpu(other));
        compare("CRIU's version", self.criu == other.criu);
        for (what, mine, others) in [
            ("variable", &self.environment, &other.environment),
            ("mount", &self.mounts, &other.mounts),
        ] {
            let keys: BTreeSet<&String> = mine.keys().chain(others.keys()).collect();
            for key in keys {
                if mine.get(key) != others.get(key) {
                    compare(&format!("{what} {key}"), false);
                }
            }
        }
        found
    }
}

fn namespaces(spec: &Spec) -> BTreeSet<String> {
    let linux = spec.linux().as_ref();
    let all = linux.and_then(|linux| linux.namespaces().as_deref());
    let all = all.unwrap_or_default().iter().map(|namespace| {
        let joins = namespace
            .path()
            .as_ref()
            .is_some_and(|path| path != Path::new(""));
        format!(
            "{}:{}",
            namespace.typ(),
            if joins { "joined" } else { "own" }
        )
    });
    all.collect()
}

/// The variables that count, with hashes of their values. Left out: those that a person named, those that have the
/// pod's own name or uid as their value, `HOSTNAME`, and what the kubelet says of the namespace's services, which
/// changes with every service that comes and goes (kubernetes.io, "Service": environment variables).
fn environment(env: &[String], ignore: &[String], own: &[String]) -> BTreeMap<String, String> {
    let all: BTreeMap<&str, &str> = env.iter().filter_map(|pair| pair.split_once('=')).collect();
    let services: Vec<&str> = all
        .keys()
        .filter_map(|name| name.strip_suffix("_SERVICE_HOST"))
        .filter(|service| all.contains_key(format!("{service}_SERVICE_PORT").as_str()))
        .collect();
    let of_a_service = |name: &str| {
        services.iter().any(|service| {
            let rest = name.strip_prefix(service);
            rest.is_some_and(|rest| {
                rest.starts_with("_SERVICE_") || rest == "_PORT" || rest.starts_with("_PORT_")
            })
        })
    };
    all.iter()
        .filter(|(name, value)| {
            **name != "HOSTNAME"
                && !ignore.iter().any(|ignored| ignored == *name)
                && !own.iter().any(|own| own == *value)
                && !of_a_service(name)
        })
        .map(|(name, value)| {
            let hash = blake3::hash(value.as_bytes()).to_hex();
            ((*name).to_owned(), hash[..DIGITS].to_owned())
        })
        .collect()
}
