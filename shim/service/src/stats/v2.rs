//! Version 2: the files of one folder, as `io.containerd.cgroups.v2.Metrics`. `max` is 2⁶⁴−1 there.

use containerd_shim_protos::{
    cgroups_v2::metrics::{
        CPUStat, HugeTlbStat, IOEntry, IOStat, MemoryEvents, MemoryStat, Metrics, PSIData,
        PSIStats, PidsStat, RdmaEntry, RdmaStat,
    },
    protobuf::MessageField,
};

use super::{
    cgroup::Folder,
    text::{self, Table},
};

pub(super) fn metrics(at: &Folder) -> Metrics {
    Metrics {
        pids: MessageField::some(PidsStat {
            current: number(at, "pids.current"),
            limit: number(at, "pids.max"),
            ..PidsStat::default()
        }),
        cpu: MessageField::some(cpu(at)),
        memory: MessageField::some(memory(at)),
        memory_events: memory_events(at).into(),
        io: MessageField::some(IOStat {
            usage: at.text("io.stat").map_or_else(Vec::new, |text| io(&text)),
            psi: pressure(at, "io.pressure"),
            ..IOStat::default()
        }),
        rdma: MessageField::some(RdmaStat {
            current: rdma(at, "rdma.current"),
            limit: rdma(at, "rdma.max"),
            ..RdmaStat::default()
        }),
        hugetlb: hugetlb(at),
        ..Metrics::default()
    }
}

fn number(at: &Folder, file: &str) -> u64 {
    at.number(file, u64::MAX).unwrap_or_default()
}

fn cpu(at: &Folder) -> CPUStat {
    let stat = at.table("cpu.stat").unwrap_or_default();
    CPUStat {
        usage_usec: stat.get("usage_usec"),
        user_usec: stat.get("user_usec"),
        system_usec: stat.get("system_usec"),
        nr_periods: stat.get("nr_periods"),
        nr_throttled: stat.get("nr_throttled"),
        throttled_usec: stat.get("throttled_usec"),
        nr_bursts: stat.get("nr_bursts"),
        burst_usec: stat.get("burst_usec"),
        psi: pressure(at, "cpu.pressure"),
        ..CPUStat::default()
    }
}

fn memory(at: &Folder) -> MemoryStat {
    let stat = at.table("memory.stat").unwrap_or_default();
    MemoryStat {
        usage: number(at, "memory.current"),
        usage_limit: number(at, "memory.max"),
        max_usage: number(at, "memory.peak"),
        swap_usage: number(at, "memory.swap.current"),
        swap_limit: number(at, "memory.swap.max"),
        swap_max_usage: number(at, "memory.swap.peak"),
        psi: pressure(at, "memory.pressure"),
        ..memory_stat(&stat)
    }
}

fn memory_stat(stat: &Table) -> MemoryStat {
    MemoryStat {
        anon: stat.get("anon"),
        file: stat.get("file"),
        kernel_stack: stat.get("kernel_stack"),
        slab: stat.get("slab"),
        sock: stat.get("sock"),
        shmem: stat.get("shmem"),
        file_mapped: stat.get("file_mapped"),
        file_dirty: stat.get("file_dirty"),
        file_writeback: stat.get("file_writeback"),
        anon_thp: stat.get("anon_thp"),
        inactive_anon: stat.get("inactive_anon"),
        active_anon: stat.get("active_anon"),
        inactive_file: stat.get("inactive_file"),
        active_file: stat.get("active_file"),
        unevictable: stat.get("unevictable"),
        slab_reclaimable: stat.get("slab_reclaimable"),
        slab_unreclaimable: stat.get("slab_unreclaimable"),
        pgfault: stat.get("pgfault"),
        pgmajfault: stat.get("pgmajfault"),
        workingset_refault: both_kinds(stat, "workingset_refault"),
        workingset_activate: both_kinds(stat, "workingset_activate"),
        workingset_nodereclaim: stat.get("workingset_nodereclaim"),
        pgrefill: stat.get("pgrefill"),
        pgscan: stat.get("pgscan"),
        pgsteal: stat.get("pgsteal"),
        pgactivate: stat.get("pgactivate"),
        pgdeactivate: stat.get("pgdeactivate"),
        pglazyfree: stat.get("pglazyfree"),
        pglazyfreed: stat.get("pglazyfreed"),
        thp_fault_alloc: stat.get("thp_fault_alloc"),
        thp_collapse_alloc: stat.get("thp_collapse_alloc"),
        ..MemoryStat::default()
    }
}

/// Linux 5.9 split these counters in two, for anonymous memory and files. The message has the one of
/// before, and Go, which looks for it by its old name, sends 0.
fn both_kinds(stat: &Table, key: &str) -> u64 {
    let part = |kind| stat.get(&format!("{key}_{kind}"));
    stat.get(key) + part("anon") + part("file")
}

fn memory_events(at: &Folder) -> Option<MemoryEvents> {
    let events = at.table("memory.events")?;
    (!events.is_empty()).then(|| MemoryEvents {
        low: events.get("low"),
        high: events.get("high"),
        max: events.get("max"),
        oom: events.get("oom"),
        oom_kill: events.get("oom_kill"),
        oom_group_kill: events.get("oom_group_kill"),
        ..MemoryEvents::default()
    })
}

/// Lines of `8:0 rbytes=1 wbytes=2 rios=3 wios=4 dbytes=0 dios=0`. Some kernels put devices that did
/// nothing before the one that did, in the same line.
fn io(text: &str) -> Vec<IOEntry> {
    let entry = |line: &str| {
        let idle = |field: &&str| !field.contains('=');
        let (major, minor) = text::device(line.split(' ').take_while(idle).last()?)?;
        let mut entry = IOEntry {
            major,
            minor,
            ..IOEntry::default()
        };
        let mut any = false;
        for (key, value) in line.split(' ').filter_map(|field| field.split_once('=')) {
            any = true;
            let Some(value) = text::number(value, u64::MAX) else {
                continue;
            };
            match key {
                "rbytes" => entry.rbytes = value,
                "wbytes" => entry.wbytes = value,
                "rios" => entry.rios = value,
                "wios" => entry.wios = value,
                _ => {}
            }
        }
        any.then_some(entry)
    };
    text.lines().filter_map(entry).collect()
}

fn rdma(at: &Folder, file: &str) -> Vec<RdmaEntry> {
    let entries = at
        .text(file)
        .map_or_else(Vec::new, |text| text::rdma(&text));
    let entry = |entry: text::Rdma| RdmaEntry {
        device: entry.device,
        hca_handles: entry.handles,
        hca_objects: entry.objects,
        ..RdmaEntry::default()
    };
    entries.into_iter().map(entry).collect()
}

fn hugetlb(at: &Folder) -> Vec<HugeTlbStat> {
    let stat = |size: String| HugeTlbStat {
        current: number(at, &format!("hugetlb.{size}.current")),
        max: number(at, &format!("hugetlb.{size}.max")),
        failcnt: at
            .table(&format!("hugetlb.{size}.events"))
            .map_or(0, |events| events.get("max")),
        pagesize: size,
        ..HugeTlbStat::default()
    };
    at.huge_page_sizes("current")
        .into_iter()
        .map(stat)
        .collect()
}

/// Not there on a kernel without pressure stall information, or where it was turned off.
fn pressure(at: &Folder, file: &str) -> MessageField<PSIStats> {
    at.text(file).map(|text| stalls(&text)).into()
}

/// Lines of `some avg10=0.00 avg60=0.00 avg300=0.00 total=0`.
fn stalls(text: &str) -> PSIStats {
    let mut stats = PSIStats::new();
    for line in text.lines() {
        let mut stall = PSIData::new();
        for (key, value) in line.split(' ').filter_map(|field| field.split_once('=')) {
            match key {
                "avg10" => stall.avg10 = value.parse().unwrap_or_default(),
                "avg60" => stall.avg60 = value.parse().unwrap_or_default(),
                "avg300" => stall.avg300 = value.parse().unwrap_or_default(),
                "total" => stall.total = value.parse().unwrap_or_default(),
                _ => {}
            }
        }
        match line.split(' ').next() {
            Some("some") => stats.some = MessageField::some(stall),
            Some("full") => stats.full = MessageField::some(stall),
            _ => {}
        }
    }
    stats
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn every_file_reaches_its_field() {
        let folder = tempfile::tempdir().unwrap();
        for (name, text) in [
            ("pids.current", "3\n"),
            ("pids.max", "max\n"),
            (
                "cpu.stat",
                "usage_usec 1234\nuser_usec 1000\nsystem_usec 234\nnr_periods 5\nnr_throttled 2\n\
                 throttled_usec 77\nnr_bursts 1\nburst_usec 9\n",
            ),
            (
                "cpu.pressure",
                "some avg10=1.50 avg60=0.25 avg300=0.00 total=42\n",
            ),
            (
                "memory.stat",
                "anon 4096\nfile 8192\nkernel_stack 16384\ninactive_file 100\npgfault 12\n\
                 workingset_refault_anon 1\nworkingset_refault_file 2\nthp_collapse_alloc 6\n",
            ),
            ("memory.current", "123456\n"),
            ("memory.max", "268435456\n"),
            ("memory.peak", "200000\n"),
            ("memory.swap.current", "0\n"),
            ("memory.swap.max", "max\n"),
            (
                "memory.events",
                "low 0\nhigh 1\nmax 2\noom 3\noom_kill 4\noom_group_kill 5\n",
            ),
            (
                "memory.pressure",
                "some avg10=0.00 avg60=0.00 avg300=0.00 total=7\n\
                 full avg10=0.00 avg60=0.00 avg300=0.10 total=6\n",
            ),
            (
                "io.stat",
                "8:0 rbytes=1 wbytes=2 rios=3 wios=4 dbytes=5 dios=6\n",
            ),
            ("hugetlb.2MB.current", "2097152\n"),
            ("hugetlb.2MB.max", "max\n"),
            ("hugetlb.2MB.events", "max 8\n"),
            ("hugetlb.2MB.rsvd.current", "0\n"),
            ("rdma.current", "mlx4_0 hca_handle=2 hca_object=2000\n"),
            ("rdma.max", "mlx4_0 hca_handle=max hca_object=max\n"),
        ] {
            fs::write(folder.path().join(name), text).unwrap();
        }
        let all = metrics(&Folder::new(folder.path()));

        assert_eq!((all.pids.current, all.pids.limit), (3, u64::MAX));
        let cpu = &all.cpu;
        assert_eq!(
            (cpu.usage_usec, cpu.user_usec, cpu.system_usec),
            (1234, 1000, 234)
        );
        assert_eq!(
            (cpu.nr_periods, cpu.nr_throttled, cpu.throttled_usec),
            (5, 2, 77)
        );
        assert_eq!((cpu.nr_bursts, cpu.burst_usec), (1, 9));
        assert_eq!((cpu.psi.some.avg10, cpu.psi.some.total), (1.5, 42));
        assert!(cpu.psi.full.is_none());
        let memory = &all.memory;
        assert_eq!(
            (memory.anon, memory.file, memory.kernel_stack),
            (4096, 8192, 16384)
        );
        assert_eq!((memory.inactive_file, memory.pgfault), (100, 12));
        assert_eq!(
            (memory.workingset_refault, memory.thp_collapse_alloc),
            (3, 6)
        );
        assert_eq!((memory.usage, memory.usage_limit), (123_456, 268_435_456));
        assert_eq!((memory.max_usage, memory.swap_limit), (200_000, u64::MAX));
        assert_eq!((memory.psi.some.total, memory.psi.full.avg300), (7, 0.1));
        let events = &all.memory_events;
        assert_eq!((events.low, events.high, events.max), (0, 1, 2));
        assert_eq!(
            (events.oom, events.oom_kill, events.oom_group_kill),
            (3, 4, 5)
        );
        assert_eq!(all.io.usage.len(), 1);
        let huge = &all.hugetlb[..];
        assert_eq!(huge.len(), 1);
        assert_eq!(
            (huge[0].current, huge[0].max, huge[0].failcnt),
            (2_097_152, u64::MAX, 8)
        );
        assert_eq!(huge[0].pagesize, "2MB");
        assert_eq!(all.rdma.current[0].hca_objects, 2000);
        assert_eq!(all.rdma.limit[0].hca_handles, u32::MAX);
    }

    #[test]
    fn controllers_that_are_not_enabled_are_left_out() {
        let folder = tempfile::tempdir().unwrap();
        let all = metrics(&Folder::new(folder.path()));
        assert!(all.memory_events.is_none() && all.hugetlb.is_empty());
        // CRI takes these for granted.
        assert!(all.cpu.is_some() && all.memory.is_some() && all.pids.is_some());
    }

    #[test]
    fn devices_that_did_nothing_do_not_take_the_numbers_of_others() {
        let all = io(
            "7:7 7:6 8:0 rbytes=4096 wbytes=0 rios=1 wios=0\n8:16 \n253:1 rbytes=1 wbytes=2 rios=3 wios=4\n",
        );
        let devices: Vec<_> = all.iter().map(|e| (e.major, e.minor, e.rbytes)).collect();
        assert_eq!(devices, [(8, 0, 4096), (253, 1, 1)]);
        assert_eq!((all[1].wbytes, all[1].rios, all[1].wios), (2, 3, 4));
    }
}
