//! Whether an image may be restored here, into this container: a pure function of what the image says, what
//! the host is, and what the new container's spec allows.
//!
//! CRIU gives the processes back the uid, capabilities, seccomp filter, `no_new_privs` and LSM label that
//! they had, whatever the new spec says. So each of these is compared, and an image that has more than the
//! spec allows is refused: first by what its manifest says of the dumped container's spec, then by what
//! [CRIU's own files](credentials) say of every task.

use std::{collections::BTreeSet, fmt};

use crate::{
    criu_image::Task,
    manifest::{Container, Facts, Host, Security, Unknown},
};

pub mod credentials;
mod host;
mod spec;

pub use host::{HostError, host_facts, relevant_flags};
pub use spec::container_facts;

/// One thing that keeps an image from being restored here.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Difference {
    /// Another instruction set.
    #[error("it was made on {image}, and this host is {host}")]
    Arch {
        /// The image's.
        image: String,
        /// The host's.
        host: String,
    },
    /// CPU features that its processes may already have chosen code for.
    #[error("this host's CPU lacks {}", .0.join(", "))]
    CpuFlags(Vec<String>),
    /// An older kernel.
    #[error("it was made under kernel {image}, and this host runs the older {host}")]
    Kernel {
        /// The image's.
        image: String,
        /// The host's.
        host: String,
    },
    /// A CRIU that does not know the image's format.
    #[error("it was made by CRIU {image}, and this host has the older {host}")]
    Criu {
        /// The image's.
        image: String,
        /// The host's.
        host: String,
    },
    /// Another root file system.
    #[error("its container image was {image}, and this container's is {spec}")]
    ImageDigest {
        /// The checkpoint's.
        image: String,
        /// The new container's.
        spec: String,
    },
    /// Another user or group.
    #[error("its processes run as {what} {image}, and this container's as {spec}")]
    User {
        /// "user", "group".
        what: &'static str,
        /// The image's.
        image: u32,
        /// The spec's.
        spec: u32,
    },
    /// Groups that the spec does not give.
    #[error("its processes have the groups {}, which this container does not give", join(.0))]
    Groups(Vec<u32>),
    /// Capabilities that the spec does not allow.
    #[error("its processes have {} ({set}), which this container does not allow", names.join(", "))]
    Capabilities {
        /// Which set.
        set: &'static str,
        /// Which of it.
        names: Vec<String>,
    },
    /// Weaker confinement by seccomp.
    #[error("its processes have {image}, and this container demands {spec}")]
    Seccomp {
        /// The image's.
        image: String,
        /// The spec's.
        spec: String,
    },
    /// Privileges can be gained.
    #[error(
        "its processes may gain privileges (no_new_privs is not set), and this container forbids it"
    )]
    NoNewPrivileges,
    /// Another label.
    #[error("its processes have the {what} {image}, and this container's is {spec}")]
    Label {
        /// "AppArmor profile", "SELinux label".
        what: &'static str,
        /// The image's, or "none".
        image: String,
        /// The spec's, or "none".
        spec: String,
    },
    /// Mounts that its processes expect.
    #[error("this container lacks its mounts {}", .0.join(", "))]
    MountsMissing(Vec<String>),
    /// Mounts that it did not have.
    #[error("this container has mounts that it had not: {}", .0.join(", "))]
    MountsExtra(Vec<String>),
    /// Stdio of another kind.
    #[error("{}", if *image { "it had a terminal, and this container has none" } else { "it had no terminal, and this container has one" })]
    Terminal {
        /// Whether the image had one.
        image: bool,
    },
    /// What others have made and not written down.
    #[error("{}", match .0 {
        Unknown::Host => "what CPU, kernel and CRIU it was made with is not known",
        Unknown::Layer => "what was in its writable layer is not known",
        Unknown::Shm => "what was in the /dev/shm of its pod is not known",
    })]
    Unknown(Unknown),
    /// A task that gets more than its container's spec allows.
    #[error(transparent)]
    Task(#[from] credentials::TaskDifference),
}

impl Difference {
    /// Whether it is of the host, or nobody knows whether there is one, and harms nobody but the restored processes
    /// themselves.
    fn is_of_the_host(&self) -> bool {
        matches!(
            self,
            Self::CpuFlags(_) | Self::Kernel { .. } | Self::Criu { .. } | Self::Unknown(_)
        )
    }
}

/// Why an image is not restored here: every difference at once.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Misfit(pub Vec<Difference>);

impl Misfit {
    /// What is left of it for somebody who takes the host as it is.
    pub fn beyond_the_host(mut self) -> Option<Self> {
        self.0.retain(|difference| !difference.is_of_the_host());
        (!self.0.is_empty()).then_some(self)
    }
}

impl std::error::Error for Misfit {}

impl fmt::Display for Misfit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the image does not fit: ")?;
        for (i, difference) in self.0.iter().enumerate() {
            write!(f, "{}{difference}", if i == 0 { "" } else { "; " })?;
        }
        Ok(())
    }
}

/// Whether an image of these `tasks` may be restored on `host` into `container`, whose container image has
/// `digest`. An unknown digest on either side is not compared: under ctr there may be none.
///
/// # Errors
/// Every difference, so that they can be removed in one go.
pub fn fit(
    image: &Facts,
    tasks: &[Task],
    host: &Host,
    container: &Container,
    digest: Option<&str>,
) -> Result<(), Misfit> {
    let mut found = Vec::new();
    fit_host(&image.host, host, &mut found);
    found.extend(image.unknown.iter().copied().map(Difference::Unknown));
    if let (Some(image), Some(spec)) = (image.source.image_digest.as_deref(), digest)
        && image != spec
    {
        found.push(Difference::ImageDigest {
            image: image.to_owned(),
            spec: spec.to_owned(),
        });
    }
    let others = found.len();
    fit_security(&image.container.security, &container.security, &mut found);
    // Where the specs differ the tasks do, and would only say it again.
    if found.len() == others {
        credentials::fit_tasks(tasks, &container.security, &mut found);
    }
    let (had, has) = (&image.container.mounts, &container.mounts);
    let missing: Vec<String> = had.difference(has).cloned().collect();
    let extra: Vec<String> = has.difference(had).cloned().collect();
    if !missing.is_empty() {
        found.push(Difference::MountsMissing(missing));
    }
    if !extra.is_empty() {
        found.push(Difference::MountsExtra(extra));
    }
    if image.container.terminal != container.terminal {
        found.push(Difference::Terminal {
            image: image.container.terminal,
        });
    }
    if found.is_empty() {
        Ok(())
    } else {
        Err(Misfit(found))
    }
}

fn fit_host(image: &Host, host: &Host, found: &mut Vec<Difference>) {
    if image.arch != host.arch {
        // What follows could only confuse.
        found.push(Difference::Arch {
            image: image.arch.clone(),
            host: host.arch.clone(),
        });
        return;
    }
    let lacking: Vec<String> = image
        .cpu_flags
        .difference(&host.cpu_flags)
        .cloned()
        .collect();
    if !lacking.is_empty() {
        found.push(Difference::CpuFlags(lacking));
    }
    if older(&host.kernel, &image.kernel, 2) {
        found.push(Difference::Kernel {
            image: image.kernel.clone(),
            host: host.kernel.clone(),
        });
    }
    // Images are compatible within a major version of CRIU, and upwards.
    if older(&host.criu, &image.criu, 1) {
        found.push(Difference::Criu {
            image: image.criu.clone(),
            host: host.criu.clone(),
        });
    }
}

fn fit_security(image: &Security, spec: &Security, found: &mut Vec<Difference>) {
    for (what, image, spec) in [
        ("user", image.uid, spec.uid),
        ("group", image.gid, spec.gid),
    ] {
        if image != spec {
            found.push(Difference::User { what, image, spec });
        }
    }
    let groups: Vec<u32> = image
        .additional_gids
        .difference(&spec.additional_gids)
        .copied()
        .collect();
    if !groups.is_empty() {
        found.push(Difference::Groups(groups));
    }
    let (had, may) = (&image.capabilities, &spec.capabilities);
    // What a process has may not exceed what the spec would ever let it gain, nor begin with more than the
    // spec begins with.
    for (set, had, may) in [
        ("bounding", &had.bounding, &may.bounding),
        ("permitted", &had.permitted, &may.permitted),
        ("effective", &had.effective, &may.effective),
        ("inheritable", &had.inheritable, &may.inheritable),
        ("ambient", &had.ambient, &may.ambient),
    ] {
        let names: Vec<String> = had.difference(may).cloned().collect();
        if !names.is_empty() {
            found.push(Difference::Capabilities { set, names });
        }
    }
    if spec.seccomp.is_some() && spec.seccomp != image.seccomp {
        let say = |profile: &Option<String>| match profile {
            Some(digest) => format!("seccomp profile {}", digest.get(..12).unwrap_or(digest)),
            None => "no seccomp profile".to_owned(),
        };
        found.push(Difference::Seccomp {
            image: say(&image.seccomp),
            spec: say(&spec.seccomp),
        });
    }
    if spec.no_new_privileges && !image.no_new_privileges {
        found.push(Difference::NoNewPrivileges);
    }
    for (what, image, spec) in [
        ("AppArmor profile", &image.apparmor, &spec.apparmor),
        ("SELinux label", &image.selinux, &spec.selinux),
    ] {
        if image != spec {
            let say = |label: &Option<String>| label.clone().unwrap_or_else(|| "none".to_owned());
            found.push(Difference::Label {
                what,
                image: say(image),
                spec: say(spec),
            });
        }
    }
}

/// Whether version `a` is below version `b` in its first `parts` numbers. What is no number counts as 0, so
/// an unknown version is never newer.
fn older(a: &str, b: &str, parts: usize) -> bool {
    let numbers = |text: &str| -> Vec<u64> {
        text.split(|c: char| !c.is_ascii_digit())
            .map(|part| part.parse().unwrap_or(0))
            .chain(std::iter::repeat(0))
            .take(parts)
            .collect()
    };
    numbers(a) < numbers(b)
}

fn join(numbers: &[u32]) -> String {
    let texts: BTreeSet<String> = numbers.iter().map(u32::to_string).collect();
    texts.into_iter().collect::<Vec<_>>().join(", ")
}

#[cfg(test)]
mod tests;
