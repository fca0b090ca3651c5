//! Metrics, in containerd's own messages: the fields from which CRI computes a pod's use of the machine.

use crate::Stage;
use anyhow::{Context, Result, bail};
use prost::Message;

/// `io.containerd.cgroups.v1.Metrics`, as far as CRI reads it.
mod v1 {
    use prost::Message;

    #[derive(Clone, PartialEq, Message)]
    pub(super) struct Metrics {
        #[prost(message, optional, tag = "2")]
        pub(super) pids: Option<super::Pids>,
        #[prost(message, optional, tag = "3")]
        pub(super) cpu: Option<Cpu>,
        #[prost(message, optional, tag = "4")]
        pub(super) memory: Option<Memory>,
    }

    #[derive(Clone, PartialEq, Message)]
    pub(super) struct Cpu {
        #[prost(message, optional, tag = "1")]
        pub(super) usage: Option<CpuUsage>,
    }

    #[derive(Clone, PartialEq, Message)]
    pub(super) struct CpuUsage {
        #[prost(uint64, tag = "1")]
        pub(super) total: u64,
    }

    #[derive(Clone, PartialEq, Message)]
    pub(super) struct Memory {
        #[prost(uint64, tag = "19")]
        pub(super) total_rss: u64,
        #[prost(message, optional, tag = "33")]
        pub(super) usage: Option<MemoryUsage>,
    }

    #[derive(Clone, PartialEq, Message)]
    pub(super) struct MemoryUsage {
        #[prost(uint64, tag = "2")]
        pub(super) usage: u64,
    }
}

/// `io.containerd.cgroups.v2.Metrics`, as far as CRI reads it.
mod v2 {
    use prost::Message;

    #[derive(Clone, PartialEq, Message)]
    pub(super) struct Metrics {
        #[prost(message, optional, tag = "1")]
        pub(super) pids: Option<super::Pids>,
        #[prost(message, optional, tag = "2")]
        pub(super) cpu: Option<Cpu>,
        #[prost(message, optional, tag = "4")]
        pub(super) memory: Option<Memory>,
    }

    #[derive(Clone, PartialEq, Message)]
    pub(super) struct Cpu {
        #[prost(uint64, tag = "1")]
        pub(super) usage_usec: u64,
    }

    #[derive(Clone, PartialEq, Message)]
    pub(super) struct Memory {
        #[prost(uint64, tag = "1")]
        pub(super) anon: u64,
        #[prost(uint64, tag = "32")]
        pub(super) usage: u64,
    }
}

#[derive(Clone, PartialEq, Message)]
struct Pids {
    #[prost(uint64, tag = "1")]
    current: u64,
}

pub(crate) async fn metrics_tell_what_the_kubelet_asks_for(stage: &Stage) -> Result<()> {
    let line = "sleep 1000 & i=0; while [ $i -lt 20000 ]; do i=$((i+1)); done; echo done; wait";
    let task = stage.container("metrics").shell(line).run().await?;
    task.io()
        .out()?
        .until("some work", |text| text == "done\n")
        .await?;
    let metric = task.metrics().await?;
    assert_eq!(metric.id, "metrics");
    let data = metric.data.context("the metric has no data")?;
    let value = data.value.as_slice();
    let (pids, cpu, used, resident) = match data.type_url.rsplit('/').next().unwrap_or_default() {
        "io.containerd.cgroups.v1.Metrics" => {
            let all = v1::Metrics::decode(value)?;
            let memory = all.memory.context("no memory in the metrics")?;
            let used = memory.usage.map_or(0, |usage| usage.usage);
            let cpu = all
                .cpu
                .and_then(|cpu| cpu.usage)
                .map_or(0, |usage| usage.total);
            (all.pids, cpu, used, memory.total_rss)
        }
        "io.containerd.cgroups.v2.Metrics" => {
            let all = v2::Metrics::decode(value)?;
            let memory = all.memory.context("no memory in the metrics")?;
            (
                all.pids,
                all.cpu.map_or(0, |cpu| cpu.usage_usec),
                memory.usage,
                memory.anon,
            )
        }
        other => bail!("the metrics are of type {other}, which CRI cannot read"),
    };
    assert_eq!(pids.map(|pids| pids.current), Some(2));
    assert!(cpu > 0, "no processor time");
    assert!(used > 0, "no memory in use");
    assert!(resident > 0, "no resident memory");
    task.remove().await
}
