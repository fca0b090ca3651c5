//! The measurement: how soon a restored model server answers, and how soon all of its memory is in. By our pager from the
//! disk and from a bucket, eagerly, and by CRIU's own daemon, in turn; with a small and with a large heap beside the server.

use crate::figures::Series;
use crate::filling;
use crate::machine::{self, Machine};
use crate::steps::{Steps, steps};
use anyhow::{Context, Result, ensure};
use rekindle_harness::container::Builder;
use rekindle_harness::model::{self, Embedding};
use rekindle_harness::progress::Progress;
use rekindle_harness::s3::{self, S3Server};
use rekindle_harness::{Container, Node};
use std::cell::{Cell, RefCell};
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::{Duration, Instant};

/// MiB of noise beside the server: a small heap, and a large one where the machine's memory holds it twice and the image
/// once more, or else what every machine holds.
const SMALL: u64 = 512;
const LARGE: u64 = 8192;
const LESS_LARGE: u64 = 2048;
const MEMORY_FOR_LARGE: u64 = 40;
/// The bucket of the images that are not on the node, below the namespace's prefix.
const BUCKET: &str = "images";
/// Where the plain checkpoints lie, and the runc that restores from them.
const PLAIN: &str = "/var/lib/bench";
const LAZY_RUNC: &str = "/usr/local/bin/runc-with-lazy-pages";
/// How often a pager is looked at.
const AGAIN: Duration = Duration::from_millis(3);
/// Longer than any load takes.
const GIVEN_UP: Duration = Duration::from_secs(120);

/// A heap of which no two pages are alike, in a process that sleeps.
const HEAP: &str = "import os, signal, sys\nheap = [os.urandom(1 << 20) for _ in range(int(sys.argv[1]))]\n\
                    print('ready', flush=True)\nsignal.pause()";

/// runc, but that CRIU's own daemon brings in the memory of what it restores. Nothing else is different: the same shim
/// runs it.
const RUNC: &str = r#"#!/bin/sh
n=$# lazily= last= work= images=
while [ $n -gt 0 ]; do
  word=$1; shift; set -- "$@" "$word"; n=$((n - 1))
  case $last in --work-path) work=$word;; --image-path) images=$word;; esac
  if [ "$word" = restore ] && [ -z "$lazily" ]; then lazily=yes; set -- "$@" --lazy-pages; fi
  last=$word
done
if [ -n "$lazily" ]; then
  rm -f "$work/lazy-pages.socket"
  criu lazy-pages --images-dir "$images" --work-dir "$work" -o lazy-pages.log </dev/null >/dev/null 2>&1 &
  until [ -S "$work/lazy-pages.socket" ]; do sleep 0.002; done
fi
exec runc "$@"
"#;

/// How memory comes in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    Ours,
    /// By our pager, too, of an image that is in a bucket only.
    Afar,
    Eagerly,
    Criu,
}

const WAYS: [Way; 4] = [Way::Ours, Way::Afar, Way::Eagerly, Way::Criu];

impl Way {
    /// The processes that bring it in, by what is in their command lines.
    fn pager(self) -> Option<&'static [&'static str]> {
        match self {
            Way::Ours | Way::Afar => Some(&["rekindle pager --criu"]),
            Way::Criu => Some(&["criu lazy-pages"]),
            Way::Eagerly => None,
        }
    }
}

/// One start: milliseconds after the task's create was asked for.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Start {
    pub(crate) answered: f64,
    /// Until its pager had ended; none where there is none.
    pub(crate) all_in: Option<f64>,
    /// The most memory that its pager held, MiB.
    pub(crate) pager_mib: Option<f64>,
}

/// All ways, in one round.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Round {
    pub(crate) ours: Start,
    pub(crate) afar: Start,
    pub(crate) eager: Start,
    pub(crate) criu: Start,
}

/// The rounds with one heap beside the server.
#[derive(Debug)]
pub(crate) struct Beside {
    pub(crate) mib: u64,
    pub(crate) rounds: Vec<Round>,
    /// What the shim says its steps took, where the image came from a bucket.
    pub(crate) afar: Steps,
}

impl Beside {
    pub(crate) fn of(&self, what: impl Fn(&Round) -> Option<f64>) -> Series {
        self.rounds.iter().filter_map(what).collect()
    }
}

/// Everything that was measured.
#[derive(Debug)]
pub(crate) struct Measured {
    pub(crate) machine: Machine,
    pub(crate) small: Beside,
    pub(crate) large: Beside,
    /// GB/s of the kernel's own calls, with one thread and with two.
    pub(crate) filling: [Series; 2],
}

impl Measured {
    /// The first answer of ours with the large heap, as a part of that with the small one.
    pub(crate) fn large_of_small(&self) -> Series {
        let both = self.large.rounds.iter().zip(&self.small.rounds);
        both.map(|(large, small)| large.ours.answered / small.ours.answered)
            .collect()
    }
}

/// A node with what all starts are made of.
struct Stage {
    node: Node,
    prepared: model::Prepared,
    /// Containers started so far: each has an id of its own.
    started: Cell<usize>,
    /// The steps of the last one.
    steps: RefCell<Vec<(String, f64)>>,
}

pub(crate) async fn measure(pairs: usize) -> Result<Measured> {
    let mut prepared = model::prepare().await?;
    if let Some(config) = &mut prepared.config.rekindle_toml {
        *config += &s3::tier(BUCKET, "default");
    }
    // The shim tells at debug how long each step took.
    prepared.config.log_level = "debug";
    let node = Node::start(prepared.config.clone()).await?;
    let _s3 = S3Server::start(&node, model::BUCKET, model::PREFIX, &prepared.weights).await?;
    fs::create_dir_all(node.path(s3::ROOT).join(BUCKET))?;
    let machine = machine::facts(&node)?;
    let runc = node.path(LAZY_RUNC);
    fs::write(&runc, RUNC)?;
    fs::set_permissions(&runc, fs::Permissions::from_mode(0o755))?;
    let stage = Stage {
        node,
        prepared,
        started: Cell::new(0),
        steps: RefCell::default(),
    };
    let large = match machine.memory_gib >= MEMORY_FOR_LARGE {
        true => LARGE,
        false => LESS_LARGE,
    };
    let progress = Progress::live("measuring");
    let mut all = Vec::new();
    for mib in [SMALL, large] {
        progress.step(&format!("the images, {mib} MiB beside the server"));
        let first = stage.images(mib).await?;
        // A restore notes what it is asked for, in the bucket, too, and after the third there is as a rule nothing new. And
        // the page cache learns the files of all.
        for way in [
            Way::Ours,
            Way::Ours,
            Way::Ours,
            Way::Afar,
            Way::Afar,
            Way::Afar,
            Way::Eagerly,
            Way::Criu,
        ] {
            stage.start(way, mib, &first).await?;
        }
        let (rounds, afar) = (Vec::new(), Steps::default());
        all.push((first, Beside { mib, rounds, afar }));
    }
    let mut filling = [Vec::new(), Vec::new()];
    for pair in 0..pairs {
        progress.step(&format!("pair {} of {pairs}", pair + 1));
        for (threads, rates) in filling.iter_mut().enumerate() {
            rates.push(filling::rate(threads + 1)?);
        }
        for (first, beside) in &mut all {
            let mut starts = [None; WAYS.len()];
            for turn in 0..WAYS.len() {
                // Each is the first one, the second and the last in turn.
                let place = (pair + turn) % WAYS.len();
                starts[place] = Some(stage.start(WAYS[place], beside.mib, first).await?);
                if WAYS[place] == Way::Afar {
                    beside.afar.0.append(&mut stage.steps.take());
                }
            }
            if let [Some(ours), Some(afar), Some(eager), Some(criu)] = starts {
                beside.rounds.push(Round {
                    ours,
                    afar,
                    eager,
                    criu,
                });
            }
        }
    }
    progress.hide();
    let mut all = all.into_iter().map(|(_, beside)| beside);
    let (small, large) = all.next().zip(all.next()).context("two heaps")?;
    Ok(Measured {
        machine,
        small,
        large,
        filling: filling.map(|rates| rates.into_iter().collect()),
    })
}

impl Stage {
    fn server(&self, id: &str, mib: u64) -> Builder<'_> {
        let line = format!("python3 -c \"$HEAP\" {mib} & exec python3 /server.py");
        model::server(&self.node, &self.prepared.image, id)
            .args(&["sh", "-c", &line])
            .env(&format!("HEAP={HEAP}"))
    }

    /// Starts a server, and makes the images of it; what it had answered by then.
    async fn images(&self, mib: u64) -> Result<Embedding> {
        let id = format!("first-{mib}");
        let task = self.server(&id, mib).run().await?;
        let (answer, _) = model::first_answer(&task).await?;
        let ready = |text: &str| text.contains("ready");
        task.io().out()?.until("the heap", ready).await?;
        let plain = format!("{PLAIN}/{mib}");
        self.node.run(["mkdir", "-p", PLAIN]).await?;
        self.node
            .run(["ctr", "task", "checkpoint", "--image-path", &plain, &id])
            .await?;
        let (near, afar) = (name(mib), away(mib));
        let place = format!("s3://{BUCKET}/default/");
        let node = &self.node;
        node.run(["rekindle", "checkpoint", &id, "--name", &afar])
            .await?;
        node.run(["rekindle", "image", "push", &afar, &place])
            .await?;
        node.run(["rekindle", "checkpoint", &id, "--name", &near, "--exit"])
            .await?;
        task.remove().await?;
        Ok(answer)
    }

    async fn start(&self, way: Way, mib: u64, first: &Embedding) -> Result<Start> {
        self.paging(if way == Way::Eagerly { "eager" } else { "lazy" })?;
        let number = self.started.replace(self.started.get() + 1);
        let id = format!("warm-{number}");
        let server = self.server(&id, mib);
        let server = match way {
            Way::Criu => server
                .binary(LAZY_RUNC)
                .restore_from(&format!("{PLAIN}/{mib}")),
            Way::Afar => {
                // Who has fetched it may still have it written to the disk.
                let remove = format!(
                    "for _ in $(seq 100); do rekindle image rm {} && exit; sleep 0.1; done; exit 1",
                    away(mib)
                );
                self.node.run(["sh", "-c", &remove]).await?;
                server.annotation("rekindle.dev/restore-from", &away(mib))
            }
            Way::Ours | Way::Eagerly => server.annotation("rekindle.dev/restore-from", &name(mib)),
        };
        let prepared = server.prepare().await?;
        let began = Instant::now();
        let task = prepared.create().await?;
        let (start, all_in) = tokio::join!(answered(&task, began, first), self.watched(way, began));
        let (answered, all_in) = (start?, all_in?);
        self.steps.replace(steps(&self.node, &id)?);
        let start = Start {
            answered,
            all_in: all_in.map(|(ms, _)| ms),
            pager_mib: all_in.map(|(_, mib)| mib),
        };
        if way == Way::Afar {
            let fetch = ["rekindle", "image", "fetch", &away(mib)];
            self.node.run(fetch).await?;
        }
        task.remove().await?;
        // Nothing of this one may be left to do in the time of the next.
        self.node.run(["sync"]).await?;
        Ok(start)
    }

    /// Shims read the node's configuration when they start.
    fn paging(&self, word: &str) -> Result<()> {
        let rest = self
            .prepared
            .config
            .rekindle_toml
            .as_deref()
            .unwrap_or_default();
        let text = format!("{rest}\n[restore]\npaging = \"{word}\"\n");
        let path = self.node.path("/etc/rekindle/config.toml");
        fs::write(&path, text).with_context(|| format!("writing {}", path.display()))
    }

    /// Looks at a pager from its beginning to its end: when that was, and the most memory that it held in MiB.
    async fn watched(&self, way: Way, began: Instant) -> Result<Option<(f64, f64)>> {
        let Some(words) = way.pager() else {
            return Ok(None);
        };
        let (mut seen, mut most) = (None, 0.0_f64);
        let mut pager = None;
        while began.elapsed() < GIVEN_UP {
            let held = pager.and_then(peak);
            match held {
                Some(mib) => {
                    most = most.max(mib);
                    seen = Some(began.elapsed());
                }
                // Not there yet, gone, or a child has taken its place.
                None => match (self.node.processes_with(words)?.first(), seen) {
                    (Some((pid, _)), _) => pager = Some(*pid),
                    (None, Some(seen)) => return Ok(Some((ms(seen), most))),
                    (None, None) => {}
                },
            }
            tokio::time::sleep(AGAIN).await;
        }
        anyhow::bail!("no process with {words:?} was seen to end in {GIVEN_UP:?}")
    }
}

fn name(mib: u64) -> String {
    format!("bench-{mib}")
}

/// The image that is in a bucket only.
fn away(mib: u64) -> String {
    format!("afar-{mib}")
}

fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

/// Starts it and waits for its first answer, which must be the next one of the process that was checkpointed.
async fn answered(task: &Container<'_>, began: Instant, first: &Embedding) -> Result<f64> {
    task.start().await?;
    let (answer, at) = model::first_answer(task).await?;
    ensure!(
        answer.boot == first.boot && answer.n == first.n + 1 && answer.sha256 == first.sha256,
        "a restored server answered {answer:?}; its image was made after {first:?}"
    );
    Ok(ms(at - began))
}

/// The most memory that a process has held, MiB; none of one that has ended.
fn peak(pid: u32) -> Option<f64> {
    let status = fs::read_to_string(Path::new("/proc").join(pid.to_string()).join("status"));
    let status = status.ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kib: f64 = line?.split_whitespace().next()?.parse().ok()?;
    Some(kib / 1024.0)
}
