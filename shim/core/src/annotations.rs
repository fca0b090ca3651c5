//! What a pod says, read once.
//!
//! Every key under our prefix is known or refused: a misspelt `rekindle.dev/dataest` must not start a
//! pod without its data. `docs/ANNOTATIONS.md` is the user's side of this file.

use std::{collections::BTreeMap, str::FromStr, time::Duration};

use serde::Deserialize;

use crate::{
    duration,
    name::{ImageName, ImageRef, WARM_PREFIX},
    uri::DatasetUri,
};

mod warm;

pub use warm::{AfterRestore, WarmRequest, WarmWhen, WarmWhenError};

/// Prefix of every annotation of ours.
pub const PREFIX: &str = "rekindle.dev/";
/// What kube-cache used for one dataset; understood as [`PREFIX`]`dataset`.
pub const KUBE_CACHE_DATASET: &str = "x-openai/required-dataset";
/// Most datasets one pod may name: more is a mistake, and each costs the node a listing.
pub const MAX_DATASETS: usize = 64;

/// What a missing dataset, or an image that is missing or does not fit, means.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Deserialize)]
pub enum Policy {
    /// The start fails with the reason.
    #[default]
    Required,
    /// The container starts without it, and the reason is reported.
    Opportunistic,
}

impl FromStr for Policy {
    type Err = ();
    fn from_str(text: &str) -> Result<Self, ()> {
        match text {
            "Required" => Ok(Self::Required),
            "Opportunistic" => Ok(Self::Opportunistic),
            _ => Err(()),
        }
    }
}

/// One dataset that a pod asks for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DatasetRequest {
    /// Its name in messages; `dataset` for the one of `rekindle.dev/dataset`.
    pub name: String,
    /// Where it comes from.
    pub uri: DatasetUri,
    /// Absolute path in the container, normal, never `/`.
    pub mount: String,
    /// The container that gets it; none means all of the pod's.
    pub container: Option<String>,
    /// What its absence means.
    pub policy: Policy,
}

/// Shortest time between two images: each stops the container for a moment and fills the node's disk.
const SHORTEST: Duration = Duration::from_secs(10);

/// Images that the container is to have of itself while it runs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CheckpointRequest {
    /// Their name, in the pod's namespace.
    pub name: ImageName,
    /// How long after its start, and after the one before.
    pub every: Option<Duration>,
    /// Whether one is made before the container hears of a SIGTERM.
    pub on_term: bool,
}

/// What a pod asks for.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct PodRequest {
    /// The datasets, mount paths all different.
    pub datasets: Vec<DatasetRequest>,
    /// The image to start from.
    pub restore_from: Option<ImageRef>,
    /// What a missing or unfit image means.
    pub restore_policy: Policy,
    /// Whether a host that differs from the image's is no reason to refuse it.
    pub restore_force: bool,
    /// The images to make.
    pub checkpoint: Option<CheckpointRequest>,
    /// An image of its own kind to start from, or to make.
    pub warm: Option<WarmRequest>,
    /// What it is told after a restore.
    pub after_restore: Option<AfterRestore>,
    /// The container that `restore-from`, `warm-start` and the images mean, where a pod has several.
    pub container: Option<String>,
}

/// Why a pod's annotations were refused. Each sentence names the key, the value and what is allowed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AnnotationError {
    /// A key under our prefix that does not exist.
    #[error("annotation {key}: no such key; allowed under rekindle.dev/ are: {allowed}")]
    UnknownKey {
        /// The key.
        key: String,
        /// The keys there are, comma separated.
        allowed: String,
    },
    /// A value that does not fit its key.
    #[error("annotation {key}={value:?}: {reason}")]
    Value {
        /// The key.
        key: String,
        /// The value, cut to 200 characters.
        value: String,
        /// What is wrong and what is allowed.
        reason: String,
    },
    /// A key that means nothing without another one.
    #[error("annotation {key} is set without {needs}; set both or neither")]
    Alone {
        /// The key.
        key: String,
        /// The key it needs.
        needs: &'static str,
    },
    /// Two datasets on one path, or one inside the other.
    #[error(
        "annotations: datasets {first:?} and {second:?} would both be mounted at or under {mount}; give each its own path"
    )]
    SameMount {
        /// One.
        first: String,
        /// The other.
        second: String,
        /// The path.
        mount: String,
    },
}

const KEYS: &[&str] = &[
    "after-restore",
    "checkpoint-every",
    "checkpoint-name",
    "checkpoint-on-term",
    "container",
    "dataset",
    "dataset-mount",
    "dataset-policy",
    "datasets",
    "restore-force",
    "restore-from",
    "restore-policy",
    "warm-ignore-env",
    "warm-start",
    "warm-when",
];

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Listed {
    name: String,
    uri: String,
    mount: String,
    #[serde(default)]
    container: Option<String>,
    #[serde(default)]
    policy: Policy,
}

fn wrong(key: &str, value: &str, reason: impl ToString) -> AnnotationError {
    wrong_at(&format!("{PREFIX}{key}"), value, reason)
}

/// The same for a key that is given with its prefix.
fn wrong_at(key: &str, value: &str, reason: impl ToString) -> AnnotationError {
    AnnotationError::Value {
        key: key.to_owned(),
        value: value.chars().take(200).collect(),
        reason: reason.to_string(),
    }
}

/// A mount path must be absolute and normal, and may not hide what every container needs.
fn mount_path(path: &str) -> Result<String, &'static str> {
    const WRONG: &str = "not a mount path: write an absolute path without '.', '..', '//' or control characters, and not /, /proc, /sys or /dev";
    let inner = path.strip_prefix('/').ok_or(WRONG)?;
    let inner = inner.strip_suffix('/').unwrap_or(inner);
    let plain = path.len() <= 4096
        && inner.split('/').all(|part| {
            !part.is_empty()
                && part != "."
                && part != ".."
                && !part.contains(|c: char| c.is_control())
        });
    let first = inner.split('/').next().unwrap_or("");
    if !plain || matches!(first, "proc" | "sys" | "dev") {
        return Err(WRONG);
    }
    Ok(format!("/{inner}"))
}

fn policy(key: &str, value: &str) -> Result<Policy, AnnotationError> {
    value
        .parse()
        .map_err(|()| wrong(key, value, "allowed are Required and Opportunistic"))
}

impl PodRequest {
    /// Reads the annotations of a bundle; those of others are passed over.
    ///
    /// # Errors
    /// The first thing that is wrong, in one sentence.
    pub fn parse(annotations: &BTreeMap<String, String>) -> Result<Self, AnnotationError> {
        for key in annotations
            .keys()
            .filter_map(|key| key.strip_prefix(PREFIX))
        {
            if !KEYS.contains(&key) {
                let key = format!("{PREFIX}{}", key.chars().take(80).collect::<String>());
                return Err(AnnotationError::UnknownKey {
                    key,
                    allowed: KEYS.join(", "),
                });
            }
        }
        let get = |key: &str| {
            annotations
                .get(&format!("{PREFIX}{key}"))
                .map(String::as_str)
        };

        let mut request = Self {
            container: get("container").map(str::to_owned),
            ..Self::default()
        };
        // With its key: a pod must not be told of one that it has not.
        let single = [format!("{PREFIX}dataset"), KUBE_CACHE_DATASET.to_owned()]
            .into_iter()
            .find_map(|key| annotations.get(&key).map(|value| (key, value)));
        if let Some((key, value)) = single {
            request.datasets.push(DatasetRequest {
                name: "dataset".to_owned(),
                uri: value.parse().map_err(|e| wrong_at(&key, value, e))?,
                mount: match get("dataset-mount") {
                    Some(path) => mount_path(path).map_err(|e| wrong("dataset-mount", path, e))?,
                    None => "/data".to_owned(),
                },
                container: None,
                policy: get("dataset-policy")
                    .map(|value| policy("dataset-policy", value))
                    .transpose()?
                    .unwrap_or_default(),
            });
        } else if let Some(key) = ["dataset-mount", "dataset-policy"]
            .into_iter()
            .find(|key| get(key).is_some())
        {
            return Err(AnnotationError::Alone {
                key: format!("{PREFIX}{key}"),
                needs: "rekindle.dev/dataset",
            });
        }
        if let Some(value) = get("datasets") {
            request.datasets.extend(listed(value)?);
        }
        distinct_mounts(&request.datasets)?;

        if let Some(value) = get("restore-from") {
            request.restore_from =
                Some(value.parse().map_err(|e| wrong("restore-from", value, e))?);
        }
        if let Some(value) = get("restore-policy") {
            request.restore_policy = policy("restore-policy", value)?;
            if request.restore_from.is_none() {
                let key = format!("{PREFIX}restore-policy");
                return Err(AnnotationError::Alone {
                    key,
                    needs: "rekindle.dev/restore-from",
                });
            }
        }
        for key in ["restore-from", "checkpoint-name"] {
            let value = get(key).unwrap_or_default();
            let name = value.rsplit_once('/').map_or(value, |(_, name)| name);
            if name.starts_with(WARM_PREFIX) {
                let reason = "names that begin with auto- are those of rekindle.dev/warm-start";
                return Err(wrong(key, value, reason));
            }
        }
        request.restore_force = match (get("restore-force"), &request.restore_from) {
            (None, _) => false,
            (Some("host"), Some(_)) => true,
            (Some("host"), None) => {
                let key = format!("{PREFIX}restore-force");
                return Err(AnnotationError::Alone {
                    key,
                    needs: "rekindle.dev/restore-from",
                });
            }
            (Some(value), _) => return Err(wrong("restore-force", value, "allowed is host")),
        };
        request.checkpoint = checkpoint(get, request.restore_from.as_ref())?;
        (request.warm, request.after_restore) = warm::parse(get, request.restore_from.as_ref())?;
        Ok(request)
    }
}

/// The images to make. They have the name of the image that the pod starts from, unless it names another: then the
/// pod goes on after its next start where it was.
fn checkpoint<'a>(
    get: impl Fn(&str) -> Option<&'a str>,
    restore_from: Option<&ImageRef>,
) -> Result<Option<CheckpointRequest>, AnnotationError> {
    const KEYS: [&str; 2] = ["checkpoint-every", "checkpoint-on-term"];
    let name = get("checkpoint-name")
        .map(|value| {
            value
                .parse()
                .map_err(|e| wrong("checkpoint-name", value, e))
        })
        .transpose()?;
    let alone = |key: &str, needs| AnnotationError::Alone {
        key: format!("{PREFIX}{key}"),
        needs,
    };
    let Some(key) = KEYS.into_iter().find(|key| get(key).is_some()) else {
        return match name {
            Some(_) => Err(alone(
                "checkpoint-name",
                "rekindle.dev/checkpoint-every or rekindle.dev/checkpoint-on-term",
            )),
            None => Ok(None),
        };
    };
    // Another namespace's image is no name for one of one's own.
    let own = restore_from.filter(|image| image.namespace.is_none());
    let name = name.or_else(|| own.map(|image| image.name.clone()));
    let name = name.ok_or_else(|| alone(key, "rekindle.dev/checkpoint-name"))?;
    let every = get("checkpoint-every").map(|value| match duration::parse(value) {
        Ok(every) if every >= SHORTEST => Ok(every),
        Ok(_) => Err(wrong("checkpoint-every", value, "the shortest is 10s")),
        Err(e) => Err(wrong("checkpoint-every", value, e)),
    });
    let on_term = match get("checkpoint-on-term") {
        None | Some("false") => false,
        Some("true") => true,
        Some(value) => {
            return Err(wrong(
                "checkpoint-on-term",
                value,
                "allowed are true and false",
            ));
        }
    };
    Ok(Some(CheckpointRequest {
        name,
        every: every.transpose()?,
        on_term,
    }))
}

fn listed(value: &str) -> Result<Vec<DatasetRequest>, AnnotationError> {
    let refuse = |reason: String| wrong("datasets", value, reason);
    let listed: Vec<Listed> = serde_yaml_ng::from_str(value).map_err(|e| {
        refuse(format!(
            "not a YAML list of {{name, uri, mount, container?, policy?}}: {e}"
        ))
    })?;
    if listed.len() > MAX_DATASETS {
        return Err(refuse(format!(
            "{} datasets, at most {MAX_DATASETS} are allowed",
            listed.len()
        )));
    }
    listed
        .into_iter()
        .map(|item| {
            let refuse = |reason: String| refuse(format!("dataset {:?}: {reason}", item.name));
            Ok(DatasetRequest {
                uri: item
                    .uri
                    .parse()
                    .map_err(|e: crate::uri::UriError| refuse(e.to_string()))?,
                mount: mount_path(&item.mount)
                    .map_err(|e| refuse(format!("mount {:?} is {e}", item.mount)))?,
                name: item.name,
                container: item.container,
                policy: item.policy,
            })
        })
        .collect()
}

fn distinct_mounts(datasets: &[DatasetRequest]) -> Result<(), AnnotationError> {
    let inside =
        |a: &str, b: &str| a == b || b.strip_prefix(a).is_some_and(|rest| rest.starts_with('/'));
    for (i, a) in datasets.iter().enumerate() {
        for b in &datasets[i + 1..] {
            let together =
                a.container.is_none() || b.container.is_none() || a.container == b.container;
            if together && (inside(&a.mount, &b.mount) || inside(&b.mount, &a.mount)) {
                let mount = a.mount.clone().min(b.mount.clone());
                return Err(AnnotationError::SameMount {
                    first: a.name.clone(),
                    second: b.name.clone(),
                    mount,
                });
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
