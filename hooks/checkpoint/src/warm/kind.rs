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

/// Hex digits of a hash that is shown or compared by people, and of a kind's in its images' name. Whether an image is of a
/// kind is decided by all of the hash, which its manifest has.
const DIGITS: usize = 16;
/// With what the kubelet's variables of a service's port begin, behind the port's number (kubernetes
/// `pkg/kubelet/envvars/envvars.go`).
const PROTOCOLS: [&str; 3] = ["TCP", "UDP", "SCTP"];

/// All that two containers have in common which may share an image. Of what may be secret there are hashes.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Kind {
    /// The format of images.
    pub format: u32,
    /// The digest of the container image.
    pub image: String,
    /// The container's name in the pod's spec.
    pub container: Option<String>,
    /// A hash of its command and its working folder.
    pub command: String,
    /// Its environment, with hashes of the values.
    pub environment: BTreeMap<String, String>,
    /// What is mounted, by destination.
    pub mounts: BTreeMap<String, String>,
    /// The pod's service account.
    pub account: Option<String>,
    /// Its namespaces, each with whether it has one of its own, joins one, or shares the host's.
    pub namespaces: BTreeSet<String>,
    /// What its processes may do.
    pub security: Security,
    /// What it may use: memory, processors, descriptors, devices.
    pub limits: BTreeMap<String, String>,
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
    pub own: &'a [String],
    /// What is mounted, by destination.
    pub mounts: BTreeMap<String, String>,
    /// The pod's service account.
    pub account: Option<String>,
    /// The namespaces that it joins and that are the host's, by their type.
    pub of_the_host: Vec<String>,
}

impl Kind {
    /// The kind of a container on this host.
    pub fn of(spec: &Spec, host: &Host, around: Surroundings<'_>) -> Self {
        let Container {
            security, terminal, ..
        } = container_facts(spec);
        let process = spec.process().as_ref();
        let env = process.and_then(|process| process.env().as_deref());
        let args = process.and_then(|process| process.args().as_deref());
        let cwd = process.map(|process| process.cwd());
        Self {
            format: FORMAT,
            image: around.image,
            container: around.container,
            command: hash(&serde_json::to_vec(&(args, cwd)).unwrap_or_default()),
            environment: environment(env.unwrap_or_default(), around.ignore_env, around.own),
            mounts: around.mounts,
            account: around.account,
            namespaces: namespaces(spec, &around.of_the_host),
            security,
            limits: limits(spec),
            terminal,
            arch: host.arch.clone(),
            cpu: format!("{} {}", host.cpu_vendor, host.cpu_model),
            cpu_flags: host.cpu_flags.clone(),
            criu: host.criu.clone(),
        }
    }

    /// All of it, in 64 hex digits.
    pub fn hash(&self) -> String {
        let bytes = serde_json::to_vec(self).unwrap_or_default();
        blake3::hash(&bytes).to_hex().to_string()
    }

    /// With what the names of all images of this container begin, whatever their kind.
    pub(super) fn family(&self) -> String {
        // Room for the rest in the 63 characters of a name.
        let container = self.container.as_deref().unwrap_or("container");
        let container: String = container.chars().take(40).collect();
        format!("{}{container}-", super::PREFIX)
    }

    /// The name of its images; none where the container's name cannot be part of one.
    pub fn image_name(&self) -> Option<ImageName> {
        format!("{}{}", self.family(), &self.hash()[..DIGITS])
            .parse()
            .ok()
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
        compare("the command", self.command == other.command);
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
            ("limit", &self.limits, &other.limits),
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

fn hash(bytes: &[u8]) -> String {
    blake3::hash(bytes).to_hex()[..DIGITS].to_owned()
}

fn namespaces(spec: &Spec, of_the_host: &[String]) -> BTreeSet<String> {
    let linux = spec.linux().as_ref();
    let all = linux.and_then(|linux| linux.namespaces().as_deref());
    let all = all.unwrap_or_default().iter().map(|namespace| {
        // As the spec spells it.
        let kind = serde_json::to_value(namespace.typ()).unwrap_or_default();
        let kind = kind.as_str().unwrap_or_default().to_owned();
        let path = namespace.path().as_deref().unwrap_or(Path::new(""));
        let whose = match path == Path::new("") {
            true => "own",
            false if of_the_host.contains(&kind) => "host",
            false => "joined",
        };
        format!("{kind}:{whose}")
    });
    all.collect()
}

/// What a program sizes itself by when it starts, and what a restore brings back from the image.
fn limits(spec: &Spec) -> BTreeMap<String, String> {
    let process = spec.process().as_ref();
    let linux = spec.linux().as_ref();
    let resources = linux.and_then(|linux| linux.resources().as_ref());
    let memory = resources.and_then(|all| all.memory().as_ref()?.limit());
    let cpu = resources.and_then(|all| all.cpu().as_ref());
    let devices = linux.and_then(|linux| linux.devices().as_deref());
    let devices: BTreeSet<String> = devices
        .unwrap_or_default()
        .iter()
        .map(|device| device.path().display().to_string())
        .collect();
    let json = |value: serde_json::Value| value.to_string();
    [
        ("memory", memory.map(|bytes| bytes.to_string())),
        (
            "cpu",
            cpu.and_then(|cpu| Some(format!("{}/{}", cpu.quota()?, cpu.period()?))),
        ),
        ("cpus", cpu.and_then(|cpu| cpu.cpus().clone())),
        (
            "oom_score_adj",
            process.and_then(|process| Some(process.oom_score_adj()?.to_string())),
        ),
        (
            "rlimits",
            process
                .and_then(|process| serde_json::to_value(process.rlimits().as_ref()?).ok())
                .map(json),
        ),
        (
            "devices",
            (!devices.is_empty()).then(|| devices.into_iter().collect::<Vec<_>>().join(" ")),
        ),
    ]
    .into_iter()
    .filter_map(|(name, value)| Some((name.to_owned(), value?)))
    .collect()
}

/// The variables that count, with hashes of their values. Left out: those that a person named, those that have the
/// pod's own name or uid as their value, `HOSTNAME`, and what the kubelet says of the namespace's services, which
/// changes with every service that comes and goes.
fn environment(env: &[String], ignore: &[String], own: &[String]) -> BTreeMap<String, String> {
    let all: BTreeMap<&str, &str> = env.iter().filter_map(|pair| pair.split_once('=')).collect();
    let services: Vec<Service<'_>> = all
        .keys()
        .filter_map(|name| Service::of(name, &all))
        .collect();
    all.iter()
        .filter(|(name, value)| {
            **name != "HOSTNAME"
                && !ignore.iter().any(|ignored| ignored == *name)
                && !own.iter().any(|own| own == *value)
                && !services.iter().any(|service| service.has(name, value))
        })
        .map(|(name, value)| ((*name).to_owned(), hash(value.as_bytes())))
        .collect()
}

/// A service, as the kubelet tells of it in variables.
struct Service<'a> {
    name: &'a str,
    host: &'a str,
}

impl<'a> Service<'a> {
    /// The one whose host is in the variable `name`, where its other variables agree: a person may call variables so,
    /// too.
    fn of(name: &'a str, all: &BTreeMap<&str, &'a str>) -> Option<Self> {
        let of = name.strip_suffix("_SERVICE_HOST")?;
        let host = all.get(name)?;
        let port = all.get(format!("{of}_SERVICE_PORT").as_str())?;
        let url = all.get(format!("{of}_PORT").as_str())?;
        let (protocol, rest) = url.split_once("://")?;
        let address = rest.rsplit_once(':')?;
        let bare = |host: &str| host.trim_matches(['[', ']']).to_owned();
        let agrees = PROTOCOLS.contains(&protocol.to_uppercase().as_str())
            && bare(address.0) == bare(host)
            && address.1 == *port;
        agrees.then_some(Self { name: of, host })
    }

    fn has(&self, name: &str, value: &str) -> bool {
        let Some(rest) = name.strip_prefix(self.name) else {
            return false;
        };
        let is_port = |text: &str| text.parse::<u16>().is_ok();
        if let Some(port) = rest.strip_prefix("_PORT_") {
            let mut parts = port.split('_');
            let numbered = parts.next().is_some_and(is_port)
                && parts
                    .next()
                    .is_some_and(|protocol| PROTOCOLS.contains(&protocol));
            return numbered
                && match (parts.next(), parts.next()) {
                    (None, _) => value.contains(self.host),
                    (Some("PROTO" | "PORT"), None) => true,
                    (Some("ADDR"), None) => value == self.host,
                    _ => false,
                };
        }
        match rest {
            "_SERVICE_HOST" | "_PORT" => true,
            rest => rest.starts_with("_SERVICE_PORT") && is_port(value),
        }
    }
}
