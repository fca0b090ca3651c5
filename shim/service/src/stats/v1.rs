//! Version 1: the folders of the controllers, as `io.containerd.cgroups.v1.Metrics`. `max` is 0 there,
//! and all times are nanoseconds.

use std::{collections::HashMap, fs};

use containerd_shim_protos::{
    cgroups::metrics::{
        BlkIOEntry, BlkIOStat, CPUStat, CPUUsage, HugetlbStat, MemoryEntry, MemoryOomControl,
        MemoryStat, Metrics, PidsStat, RdmaEntry, RdmaStat, Throttle,
    },
    protobuf::MessageField,
};

use super::{
    cgroup::Folder,
    text::{self, Table},
};

/// `cpuacct.stat` counts in hundredths of a second whatever the kernel's clock: USER_HZ is 100 on every
/// architecture that containerd runs on.
const TICK_NS: u64 = 1_000_000_000 / 100;

pub(super) fn metrics(controllers: &HashMap<String, Folder>) -> Metrics {
    let of = |name: &str| controllers.get(name);
    let mut metrics = Metrics {
        cpu: MessageField::some(CPUStat {
            usage: MessageField::some(of("cpuacct").map(cpu_usage).unwrap_or_default()),
            throttling: MessageField::some(of("cpu").map(throttling).unwrap_or_default()),
            ..CPUStat::default()
        }),
        pids: of("pids").and_then(pids).into(),
        rdma: of("rdma").map(rdma).into(),
        hugetlb: of("hugetlb").map(hugetlb).unwrap_or_default(),
        ..Metrics::default()
    };
    if let Some(at) = of("memory") {
        metrics.memory = memory(at).into();
        metrics.memory_oom_control = at
            .table("memory.oom_control")
            .map(|t| oom_control(&t))
            .into();
    }
    if let Some(at) = of("blkio") {
        let partitions = fs::read_to_string("/proc/partitions").unwrap_or_default();
        metrics.blkio = MessageField::some(blkio(at, &devices(&partitions)));
    }
    metrics
}

fn number(at: &Folder, file: &str) -> u64 {
    at.number(file, 0).unwrap_or_default()
}

fn cpu_usage(at: &Folder) -> CPUUsage {
    let stat = at.table("cpuacct.stat").unwrap_or_default();
    let per_cpu = at.text("cpuacct.usage_percpu").unwrap_or_default();
    CPUUsage {
        total: number(at, "cpuacct.usage"),
        user: stat.get("user").saturating_mul(TICK_NS),
        kernel: stat.get("system").saturating_mul(TICK_NS),
        per_cpu: per_cpu
            .split_whitespace()
            .filter_map(|cpu| text::number(cpu, 0))
            .collect(),
        ..CPUUsage::default()
    }
}

fn throttling(at: &Folder) -> Throttle {
    let stat = at.table("cpu.stat").unwrap_or_default();
    Throttle {
        periods: stat.get("nr_periods"),
        throttled_periods: stat.get("nr_throttled"),
        throttled_time: stat.get("throttled_time"),
        ..Throttle::default()
    }
}

fn pids(at: &Folder) -> Option<PidsStat> {
    Some(PidsStat {
        current: at.number("pids.current", 0)?,
        limit: number(at, "pids.max"),
        ..PidsStat::default()
    })
}

fn memory(at: &Folder) -> Option<MemoryStat> {
    let stat = at.table("memory.stat")?;
    Some(MemoryStat {
        usage: entry(at, "memory"),
        swap: entry(at, "memory.memsw"),
        kernel: entry(at, "memory.kmem"),
        kernel_tcp: entry(at, "memory.kmem.tcp"),
        ..memory_stat(&stat)
    })
}

/// Always there, for Go sends it empty where the kernel does not count swap or its own memory.
fn entry(at: &Folder, prefix: &str) -> MessageField<MemoryEntry> {
    let number = |what: &str| number(at, &format!("{prefix}.{what}"));
    MessageField::some(MemoryEntry {
        limit: number("limit_in_bytes"),
        usage: number("usage_in_bytes"),
        max: number("max_usage_in_bytes"),
        failcnt: number("failcnt"),
        ..MemoryEntry::default()
    })
}

fn memory_stat(stat: &Table) -> MemoryStat {
    MemoryStat {
        cache: stat.get("cache"),
        rss: stat.get("rss"),
        rss_huge: stat.get("rss_huge"),
        mapped_file: stat.get("mapped_file"),
        dirty: stat.get("dirty"),
        writeback: stat.get("writeback"),
        pg_pg_in: stat.get("pgpgin"),
        pg_pg_out: stat.get("pgpgout"),
        pg_fault: stat.get("pgfault"),
        pg_maj_fault: stat.get("pgmajfault"),
        inactive_anon: stat.get("inactive_anon"),
        active_anon: stat.get("active_anon"),
        inactive_file: stat.get("inactive_file"),
        active_file: stat.get("active_file"),
        unevictable: stat.get("unevictable"),
        hierarchical_memory_limit: stat.get("hierarchical_memory_limit"),
        hierarchical_swap_limit: stat.get("hierarchical_memsw_limit"),
        total_cache: stat.get("total_cache"),
        total_rss: stat.get("total_rss"),
        total_rss_huge: stat.get("total_rss_huge"),
        total_mapped_file: stat.get("total_mapped_file"),
        total_dirty: stat.get("total_dirty"),
        total_writeback: stat.get("total_writeback"),
        total_pg_pg_in: stat.get("total_pgpgin"),
        total_pg_pg_out: stat.get("total_pgpgout"),
        total_pg_fault: stat.get("total_pgfault"),
        total_pg_maj_fault: stat.get("total_pgmajfault"),
        total_inactive_anon: stat.get("total_inactive_anon"),
        total_active_anon: stat.get("total_active_anon"),
        total_inactive_file: stat.get("total_inactive_file"),
        total_active_file: stat.get("total_active_file"),
        total_unevictable: stat.get("total_unevictable"),
        ..MemoryStat::default()
    }
}

fn oom_control(table: &Table) -> MemoryOomControl {
    MemoryOomControl {
        oom_kill_disable: table.get("oom_kill_disable"),
        under_oom: table.get("under_oom"),
        oom_kill: table.get("oom_kill"),
        ..MemoryOomControl::default()
    }
}

fn hugetlb(at: &Folder) -> Vec<HugetlbStat> {
    let stat = |size: String| HugetlbStat {
        usage: number(at, &format!("hugetlb.{size}.usage_in_bytes")),
        max: number(at, &format!("hugetlb.{size}.max_usage_in_bytes")),
        failcnt: number(at, &format!("hugetlb.{size}.failcnt")),
        pagesize: size,
        ..HugetlbStat::default()
    };
    let sizes = at.huge_page_sizes("usage_in_bytes");
    sizes.into_iter().map(stat).collect()
}

fn rdma(at: &Folder) -> RdmaStat {
    let entries = |file| {
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
    };
    RdmaStat {
        current: entries("rdma.current"),
        limit: entries("rdma.max"),
        ..RdmaStat::default()
    }
}

/// Names of block devices by their numbers.
type Devices = HashMap<(u64, u64), String>;

/// From `/proc/partitions`: a heading, an empty line, then `major minor #blocks name`.
fn devices(partitions: &str) -> Devices {
    let device = |line: &str| {
        let mut fields = line.split_whitespace();
        let numbers = (fields.next()?.parse().ok()?, fields.next()?.parse().ok()?);
        Some((numbers, format!("/dev/{}", fields.nth(1)?)))
    };
    partitions.lines().filter_map(device).collect()
}

/// The CFQ scheduler counted more, but is gone since Linux 5.0: the throttling layer then has what is
/// left, bytes and operations.
fn blkio(at: &Folder, devices: &Devices) -> BlkIOStat {
    let read = |file: &str| {
        let text = at.text(&format!("blkio.{file}")).unwrap_or_default();
        blkio_entries(&text, devices)
    };
    let scheduler = BlkIOStat {
        io_service_bytes_recursive: read("io_service_bytes_recursive"),
        io_serviced_recursive: read("io_serviced_recursive"),
        io_queued_recursive: read("io_queued_recursive"),
        io_service_time_recursive: read("io_service_time_recursive"),
        io_wait_time_recursive: read("io_wait_time_recursive"),
        io_merged_recursive: read("io_merged_recursive"),
        io_time_recursive: read("time_recursive"),
        sectors_recursive: read("sectors_recursive"),
        ..BlkIOStat::default()
    };
    if scheduler != BlkIOStat::default() {
        return scheduler;
    }
    let throttle = |what: &str| {
        let recursive = read(&format!("throttle.{what}_recursive"));
        if recursive.is_empty() {
            // Before Linux 4.17.
            return read(&format!("throttle.{what}"));
        }
        recursive
    };
    BlkIOStat {
        io_service_bytes_recursive: throttle("io_service_bytes"),
        io_serviced_recursive: throttle("io_serviced"),
        ..BlkIOStat::default()
    }
}

/// Lines of `8:0 Read 4096` or `8:0 4096`; the last one, `Total 4096`, is of no device.
fn blkio_entries(text: &str, devices: &Devices) -> Vec<BlkIOEntry> {
    let entry = |line: &str| {
        let fields: Vec<&str> = line.split_whitespace().collect();
        let (device, op, value) = match fields[..] {
            [device, op, value] => (device, op, value),
            [device, value] => (device, "", value),
            _ => return None,
        };
        let (major, minor) = text::device(device)?;
        Some(BlkIOEntry {
            op: op.to_owned(),
            device: devices.get(&(major, minor)).cloned().unwrap_or_default(),
            major,
            minor,
            value: text::number(value, 0)?,
            ..BlkIOEntry::default()
        })
    };
    text.lines().filter_map(entry).collect()
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    /// A folder per controller, with the files that a kernel puts there.
    fn controllers(root: &Path, files: &[(&str, &[(&str, &str)])]) -> HashMap<String, Folder> {
        let mut all = HashMap::new();
        for (controller, files) in files {
            let folder = root.join(controller);
            fs::create_dir(&folder).unwrap();
            for (name, text) in *files {
                fs::write(folder.join(name), text).unwrap();
            }
            all.insert((*controller).to_owned(), Folder::new(folder));
        }
        all
    }

    #[test]
    fn every_file_reaches_its_field() {
        let root = tempfile::tempdir().unwrap();
        let all = metrics(&controllers(
            root.path(),
            &[
                (
                    "cpuacct",
                    &[
                        ("cpuacct.usage", "123456789\n"),
                        ("cpuacct.stat", "user 7\nsystem 5\n"),
                        ("cpuacct.usage_percpu", "100 200 \n"),
                    ],
                ),
                (
                    "cpu",
                    &[(
                        "cpu.stat",
                        "nr_periods 3\nnr_throttled 2\nthrottled_time 99\n",
                    )],
                ),
                ("pids", &[("pids.current", "2\n"), ("pids.max", "max\n")]),
                (
                    "memory",
                    &[
                        (
                            "memory.stat",
                            "cache 1\nrss 4096\npgpgin 7\nhierarchical_memsw_limit 11\ntotal_cache 2\n\
                             total_rss 8192\ntotal_inactive_file 13\ntotal_unevictable 17\n",
                        ),
                        (
                            "memory.oom_control",
                            "oom_kill_disable 0\nunder_oom 1\noom_kill 3\n",
                        ),
                        ("memory.usage_in_bytes", "123\n"),
                        ("memory.limit_in_bytes", "9223372036854771712\n"),
                        ("memory.max_usage_in_bytes", "456\n"),
                        ("memory.failcnt", "6\n"),
                        ("memory.kmem.usage_in_bytes", "77\n"),
                        ("memory.kmem.tcp.failcnt", "1\n"),
                    ],
                ),
                (
                    "hugetlb",
                    &[
                        ("hugetlb.1GB.usage_in_bytes", "0\n"),
                        ("hugetlb.2MB.usage_in_bytes", "2097152\n"),
                        ("hugetlb.2MB.rsvd.usage_in_bytes", "0\n"),
                        ("hugetlb.2MB.max_usage_in_bytes", "4194304\n"),
                        ("hugetlb.2MB.failcnt", "5\n"),
                    ],
                ),
            ],
        ));

        let usage = &all.cpu.usage;
        assert_eq!(
            (usage.total, usage.user, usage.kernel),
            (123_456_789, 70_000_000, 50_000_000)
        );
        assert_eq!(usage.per_cpu, [100, 200]);
        let throttling = &all.cpu.throttling;
        assert_eq!((throttling.periods, throttling.throttled_periods), (3, 2));
        assert_eq!(throttling.throttled_time, 99);
        assert_eq!((all.pids.current, all.pids.limit), (2, 0));
        let memory = &all.memory;
        assert_eq!((memory.cache, memory.rss, memory.pg_pg_in), (1, 4096, 7));
        assert_eq!(
            (memory.hierarchical_swap_limit, memory.total_cache),
            (11, 2)
        );
        assert_eq!((memory.total_rss, memory.total_inactive_file), (8192, 13));
        assert_eq!(memory.total_unevictable, 17);
        assert_eq!(
            (memory.usage.usage, memory.usage.max, memory.usage.failcnt),
            (123, 456, 6)
        );
        assert_eq!(memory.usage.limit, 9_223_372_036_854_771_712);
        assert!(memory.swap.is_some());
        assert_eq!((memory.kernel.usage, memory.kernel_tcp.failcnt), (77, 1));
        let oom = &all.memory_oom_control;
        assert_eq!(
            (oom.oom_kill_disable, oom.under_oom, oom.oom_kill),
            (0, 1, 3)
        );
        let huge = &all.hugetlb[..];
        assert_eq!(huge.len(), 2);
        assert_eq!(
            (huge[1].usage, huge[1].max, huge[1].failcnt),
            (2_097_152, 4_194_304, 5)
        );
        assert!(all.blkio.is_none() && all.rdma.is_none());
    }

    #[test]
    fn block_devices_are_counted_by_the_scheduler_or_by_the_throttling_layer() {
        let devices = devices(
            "major minor  #blocks  name\n\n   8        0  104857600 sda\n   8        1  1024 sda1\n",
        );
        let root = tempfile::tempdir().unwrap();
        let all = controllers(
            root.path(),
            &[
                (
                    "cfq",
                    &[
                        (
                            "blkio.io_serviced_recursive",
                            "8:0 Read 1\n8:0 Write 2\nTotal 3\n",
                        ),
                        ("blkio.sectors_recursive", "8:1 17\n"),
                        ("blkio.throttle.io_serviced", "8:0 Read 9\n"),
                    ],
                ),
                (
                    "throttle",
                    &[
                        ("blkio.io_serviced_recursive", "Total 0\n"),
                        (
                            "blkio.throttle.io_serviced_recursive",
                            "8:0 Read 4\nTotal 4\n",
                        ),
                        (
                            "blkio.throttle.io_service_bytes",
                            "253:9 Write 4096\nTotal 4096\n",
                        ),
                    ],
                ),
            ],
        );

        let scheduler = blkio(&all["cfq"], &devices);
        let serviced = &scheduler.io_serviced_recursive;
        assert_eq!(
            (serviced.len(), &*serviced[1].op, serviced[1].value),
            (2, "Write", 2)
        );
        assert_eq!(serviced[0].device, "/dev/sda");
        let sectors = &scheduler.sectors_recursive[0];
        assert_eq!(
            (&*sectors.device, &*sectors.op, sectors.value),
            ("/dev/sda1", "", 17)
        );

        let throttle = blkio(&all["throttle"], &devices);
        assert_eq!(throttle.io_serviced_recursive[0].value, 4);
        let bytes = &throttle.io_service_bytes_recursive[0];
        assert_eq!((bytes.major, bytes.minor, bytes.value), (253, 9, 4096));
        assert_eq!(bytes.device, "");
    }
}
