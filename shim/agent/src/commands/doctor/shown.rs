//! The resolved configuration, written as the file that would make it.

use std::{path::Path, time::Duration};

use rekindle_core::{
    config::{Compression, Export, ImageKey, Kubernetes, NodeConfig, Paging, Source, Tier},
    size,
};
use serde::Serialize;

#[derive(Debug, Serialize)]
pub(super) struct Shown<'a> {
    restore: Restore,
    #[serde(rename = "warm-start")]
    warm_start: WarmStart,
    deadlines: Deadlines,
    agent: Agent<'a>,
    #[serde(skip_serializing_if = "is_default")]
    kubernetes: &'a Kubernetes,
    images: Images<'a>,
    datasets: Datasets<'a>,
}

#[derive(Debug, Serialize)]
struct Restore {
    paging: Paging,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
struct WarmStart {
    within: String,
    early: String,
    failures: u32,
    min_free: u8,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
struct Deadlines {
    sandbox_data: String,
    container: String,
    checkpoint: String,
}

#[derive(Debug, Serialize)]
struct Agent<'a> {
    every: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    group: Option<&'a str>,
}

#[derive(Debug, Serialize)]
struct Images<'a> {
    root: &'a Path,
    compression: Compression,
    precopy: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    memory: Option<Memory<'a>>,
    retention: Retention,
    #[serde(skip_serializing_if = "<[_]>::is_empty")]
    key: &'a [ImageKey],
    #[serde(skip_serializing_if = "<[_]>::is_empty")]
    export: &'a [Export],
    #[serde(skip_serializing_if = "<[_]>::is_empty")]
    tier: &'a [Tier],
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
struct Memory<'a> {
    root: &'a Path,
    quota: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    namespace_quota: Option<String>,
    idle: String,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
struct Retention {
    #[serde(skip_serializing_if = "Option::is_none")]
    keep: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    idle: Option<String>,
    idle_newest: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    quota: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    namespace_quota: Option<String>,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
struct Datasets<'a> {
    root: &'a Path,
    concurrency: usize,
    part_size_mib: u64,
    #[serde(skip_serializing_if = "<[_]>::is_empty")]
    source: &'a [Source],
}

impl<'a> From<&'a NodeConfig> for Shown<'a> {
    fn from(config: &'a NodeConfig) -> Self {
        Self {
            restore: Restore {
                paging: config.restore.paging,
            },
            warm_start: WarmStart {
                within: duration(config.warm_start.within),
                early: duration(config.warm_start.early),
                failures: config.warm_start.failures,
                min_free: config.warm_start.min_free,
            },
            deadlines: Deadlines {
                sandbox_data: duration(config.deadlines.sandbox_data),
                container: duration(config.deadlines.container),
                checkpoint: duration(config.deadlines.checkpoint),
            },
            agent: Agent {
                every: duration(config.agent.every),
                group: config.agent.group.as_deref(),
            },
            kubernetes: &config.kubernetes,
            images: Images {
                root: &config.images.root,
                compression: config.images.compression,
                precopy: config.images.precopy,
                memory: config.images.memory.as_ref().map(|memory| Memory {
                    root: &memory.root,
                    quota: size::written(memory.quota),
                    namespace_quota: memory.namespace_quota.map(size::written),
                    idle: duration(memory.idle),
                }),
                retention: Retention {
                    keep: config.images.retention.keep,
                    idle: config.images.retention.idle.map(duration),
                    idle_newest: config.images.retention.idle_newest,
                    quota: config.images.retention.quota.map(size::written),
                    namespace_quota: config.images.retention.namespace_quota.map(size::written),
                },
                key: &config.images.keys,
                export: &config.images.exports,
                tier: &config.images.tiers,
            },
            datasets: Datasets {
                root: &config.datasets.root,
                concurrency: config.datasets.concurrency,
                part_size_mib: config.datasets.part_size >> 20,
                source: &config.datasets.sources,
            },
        }
    }
}

fn is_default(kubernetes: &&Kubernetes) -> bool {
    **kubernetes == Kubernetes::default()
}

fn duration(of: Duration) -> String {
    if of.subsec_millis() == 0 {
        format!("{}s", of.as_secs())
    } else {
        format!("{}ms", of.as_millis())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_shown_is_a_configuration_that_resolves_to_the_same() {
        const EVERY_KEY: &str = r#"
            [restore]
            paging = "eager"
            [warm-start]
            within = "5m"
            early = "10s"
            failures = 2
            min-free = 15
            [deadlines]
            sandbox-data = "3m"
            container = "80s"
            checkpoint = "1m500ms"
            [agent]
            every = "10s"
            group = "rekindle"
            [kubernetes]
            kubeconfig = "/etc/rekindle/kubeconfig"
            [images]
            root = "/srv/images"
            compression = "lz4"
            precopy = false
            export = [{ namespace = "team-a", name = "warm", to = ["team-b"] }]
            [images.memory]
            root = "/dev/shm/images"
            quota = "64GiB"
            namespace-quota = "16GiB"
            idle = "30m"
            [images.retention]
            keep = 2
            idle = "72h"
            idle-newest = true
            quota = "200GiB"
            namespace-quota = "1GiB"
            [[images.key]]
            id = "a"
            namespaces = ["team-a"]
            command = ["/bin/keys", "a"]
            [[images.tier]]
            url = "s3://images/node/"
            namespaces = ["team-a"]
            endpoint = "http://s3.example.com"
            anonymous = true
            [datasets]
            root = "/srv/datasets"
            concurrency = 4
            part-size-mib = 16
            [[datasets.source]]
            allow = "s3://models/"
            namespaces = ["*"]
            endpoint = "https://s3.example.com"
            path-style = true
            minimum-verification = "store-checksum"
        "#;
        for text in ["", EVERY_KEY] {
            let config = NodeConfig::parse("", text).unwrap();
            let shown = toml::to_string(&Shown::from(&config)).unwrap();
            assert_eq!(NodeConfig::parse("", &shown).unwrap(), config, "{shown}");
        }
    }
}
