//! A process with memory enough that loading it takes a while, and which looks at all of it again and again.

use crate::stage::{RESTORE_FROM, Stage, counts_to};
use anyhow::{Context, Result, bail, ensure};
use containerd_client::tonic::Code;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use rekindle_checkpoint::pager::Phase;
use rekindle_harness::container::{Builder, State};
use rekindle_harness::{Container, Count, poll};
use std::fs;
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::time::Duration;

/// A pager that was not seen in this time has done its work.
const SEEN: Duration = Duration::from_secs(3);
const ATTEMPTS: usize = 10;
/// Of 256 MiB, which the pager reads: far more than a restore asks for before it is over, and far from all.
const BEGUN: u64 = 16 << 20;

/// 64 strings of 4 MiB, each of its own pattern, compared with what they should be; a line as the counter's for each round.
const PROGRAM: &str = r#"
function fill(i,  s) { s = sprintf("%08d:%s:", i, nonce); while (length(s) < 4194304) s = s s; return s }
BEGIN {
  "cat /proc/sys/kernel/random/uuid" | getline nonce
  close("cat /proc/sys/kernel/random/uuid")
  for (i = 0; i < 64; i++) a[i] = fill(i)
  while (1) {
    for (i = 0; i < 64; i++) if (a[i] != fill(i)) { print "corrupt " i; fflush() }
    print nonce " " ++n; fflush()
  }
}"#;

pub(crate) fn heap<'s>(stage: &'s Stage, id: &str) -> Builder<'s> {
    stage.container(id).args(&["awk", PROGRAM])
}

pub(crate) fn sound(task: &Container<'_>) -> Result<()> {
    let text = task.io().out()?.so_far();
    ensure!(
        !text.contains("corrupt"),
        "the memory of {} is not what it was: {text}",
        task.id()
    );
    Ok(())
}

/// Waits until a restored heap has looked at all of its memory, twice.
pub(crate) async fn is_sound(task: &Container<'_>, from: &Count) -> Result<Count> {
    let now = counts_to(task.io().out()?, from.n + 3).await?;
    sound(task)?;
    assert_eq!(now.nonce, from.nonce);
    Ok(now)
}

pub(crate) async fn image(stage: &Stage, id: &str) -> Result<Count> {
    let task = heap(stage, id).run().await?;
    counts_to(task.io().out()?, 1).await?;
    stage.checkpoint(id, id, &["--exit"]).await?;
    let last = Count::last(&task.io().out()?.text().await?).context("the heap said nothing")?;
    sound(&task)?;
    task.remove().await?;
    Ok(last)
}

pub(crate) async fn memory_is_what_it_was(stage: &Stage) -> Result<()> {
    let last = image(stage, "heap").await?;
    let warm = heap(stage, "heap-2")
        .annotation(RESTORE_FROM, "heap")
        .run()
        .await?;
    is_sound(&warm, &last).await?;
    warm.remove().await?;
    stage.node.is_rid_of("heap-2").await
}

/// As [`PROGRAM`], and in every round the next of the strings gets another pattern.
pub(crate) const CHANGING: &str = r#"
function fill(i,  s) { s = sprintf("%08d:%s:%08d:", i, nonce, v[i]); while (length(s) < 4194304) s = s s; return s }
BEGIN {
  "cat /proc/sys/kernel/random/uuid" | getline nonce
  close("cat /proc/sys/kernel/random/uuid")
  for (i = 0; i < 80; i++) a[i] = fill(i)
  while (1) {
    v[n % 80]++
    a[n % 80] = fill(n % 80)
    for (i = 0; i < 80; i++) if (a[i] != fill(i)) { print "corrupt " i; fflush() }
    print nonce " " ++n; fflush()
  }
}"#;

/// The promise of the pre-copy: however much of the memory was stored before the stop, the image has what was there at
/// the stop.
pub(crate) async fn memory_that_changes_is_what_it_was(stage: &Stage) -> Result<()> {
    let changing = |id: &str| stage.container(id).args(&["awk", CHANGING]);
    let task = changing("changing").run().await?;
    let mut made = Vec::new();
    for _ in 0..2 {
        let before = counts_to(task.io().out()?, made.len() as u64 * 3 + 1).await?;
        stage.checkpoint("changing", "changing", &[]).await?;
        made.push(before);
    }
    is_sound(&task, &made[1]).await?;
    task.remove().await?;
    let log = stage.node.log_tail(usize::MAX);
    let sealed = |line: &&str| line.contains("image sealed") && line.contains("default/changing@");
    let precopied: Vec<u64> = log
        .lines()
        .filter(sealed)
        .filter_map(|line| {
            line.split("precopied=")
                .nth(1)?
                .split_whitespace()
                .next()?
                .parse()
                .ok()
        })
        .collect();
    assert_eq!(precopied.len(), 2);
    // Of 320 MiB, of which a round changes a string or two. Without a kernel that remembers writes it is none.
    ensure!(
        precopied.iter().all(|bytes| *bytes > 200 << 20),
        "the pre-copy has stored {precopied:?} bytes"
    );
    for (generation, before) in (1..).zip(made) {
        let id = format!("changing-{generation}");
        let image = format!("changing@{generation}");
        let warm = changing(&id).annotation(RESTORE_FROM, &image).run().await?;
        is_sound(&warm, &before).await?;
        warm.remove().await?;
    }
    Ok(())
}

/// Three shells with one memory of 8 MiB, shared from a fork, and in every round two that are forked anew. All compare.
/// A round is told when every one of them has done it.
const FORKS: &str = r#"
read nonce < /proc/sys/kernel/random/uuid
v=$(awk 'BEGIN { s = "0123456789abcdef"; while (length(s) < 8388608) s = s s length(s); print s }')
w=$v
sound() { [ "$v" = "$w" ] || echo corrupt; }
side() { i=0; while sound; do i=$((i + 1)); echo $i > /tmp/$1.new; mv /tmp/$1.new /tmp/$1; done; }
# Waits until a side has gone on.
goes_on() { while read now < /tmp/$1 && [ "$now" = "$2" ]; do sleep 0.01; done; }
mkdir -p /tmp; echo 0 > /tmp/a; echo 0 > /tmp/b
side a & side b &
n=0
while :; do
  read a < /tmp/a; read b < /tmp/b
  sound
  sound & one=$!
  sound & wait $one; wait $!
  goes_on a $a; goes_on b $b
  n=$((n + 1)); echo "$nonce $n"
done"#;

pub(crate) async fn forked_processes_keep_theirs(stage: &Stage) -> Result<()> {
    let task = stage.container("forks").shell(FORKS).run().await?;
    counts_to(task.io().out()?, 2).await?;
    stage.checkpoint("forks", "forks", &["--exit"]).await?;
    let last = Count::last(&task.io().out()?.text().await?).context("the shells said nothing")?;
    sound(&task)?;
    task.remove().await?;
    let warm = stage
        .container("forks-2")
        .shell(FORKS)
        .annotation(RESTORE_FROM, "forks")
        .run()
        .await?;
    is_sound(&warm, &last).await?;
    warm.remove().await?;
    stage.node.is_rid_of("forks-2").await
}

/// Waits for a pager that has read this many bytes.
async fn pager(stage: &Stage, bytes: u64) -> Result<Pid> {
    loop {
        for (pid, _) in stage.node.processes_with(&["rekindle pager --criu"])? {
            if has_read(pid) >= bytes {
                return Ok(Pid::from_raw(pid.try_into()?));
            }
        }
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

/// Bytes that a process has read; none of one that has ended.
fn has_read(pid: u32) -> u64 {
    let io = fs::read_to_string(format!("/proc/{pid}/io")).unwrap_or_default();
    let read = io.lines().find_map(|line| line.strip_prefix("rchar: "));
    read.and_then(|bytes| bytes.parse().ok()).unwrap_or(0)
}

/// A heap in mid-load, whose pager stands still. A load that was over before it was seen is begun again.
pub(crate) async fn loading<'s>(
    stage: &'s Stage,
    heap: impl Fn() -> Builder<'s>,
    image: &str,
) -> Result<(Container<'s>, Pid)> {
    for _ in 0..ATTEMPTS {
        let warm = heap().annotation(RESTORE_FROM, image).create().await?;
        let found = async {
            let pager = tokio::time::timeout(SEEN, pager(stage, BEGUN))
                .await
                .ok()?
                .ok()?;
            kill(pager, Signal::SIGSTOP).is_ok().then_some(pager)
        };
        let (started, pager) = tokio::join!(warm.start(), found);
        started.context("starting from the image")?;
        if let Some(pager) = pager {
            return Ok((warm, pager));
        }
        warm.kill(9).await?;
        warm.wait().await?;
        warm.remove().await?;
    }
    bail!("in {ATTEMPTS} restores no pager was seen in mid-load")
}

/// Whether a pager has been given the memory of a process.
fn holds_memory(pager: Pid) -> bool {
    let all = fs::read_dir(format!("/proc/{pager}/fd"));
    all.into_iter().flatten().flatten().any(|fd| {
        fs::read_link(fd.path()).is_ok_and(|to| to.to_string_lossy().contains("[userfaultfd]"))
    })
}

/// Whenever it is killed: it costs the start or the container, or nothing when all is in; and never zeros.
pub(crate) async fn a_pager_is_killed_in_each_phase(stage: &Stage) -> Result<()> {
    let last = image(stage, "orphaned").await?;
    for phase in Phase::all() {
        let id = format!("orphaned-{phase:?}").to_lowercase();
        let killed = match phase {
            Phase::Waiting => unborn(stage, &id, false).await,
            Phase::Restoring => unborn(stage, &id, true).await,
            Phase::Loading => orphaned(stage, &id).await,
            Phase::Loaded => done_with(stage, &id, &last).await,
        };
        killed.with_context(|| format!("killed when {phase:?}"))?;
        stage.node.is_rid_of(&id).await?;
    }
    println!("{} phases", Phase::all().count());
    Ok(())
}

/// Killed as soon as it is there, which is long before CRIU has built the process; or as soon as it has the process. CRIU
/// would wait for its pages for ever.
async fn unborn(stage: &Stage, id: &str, late: bool) -> Result<()> {
    let warm = heap(stage, id).annotation(RESTORE_FROM, "orphaned");
    let warm = warm.create().await?;
    let strike = async {
        let pager = pager(stage, 0).await?;
        while late && !holds_memory(pager) {
            tokio::time::sleep(Duration::from_micros(200)).await;
        }
        Ok::<_, anyhow::Error>(kill(pager, Signal::SIGKILL)?)
    };
    let both = async { tokio::join!(warm.start(), tokio::time::timeout(*poll::DEADLINE, strike)) };
    let (started, struck) = tokio::time::timeout(*poll::DEADLINE * 2, both)
        .await
        .context("the start goes on without its pager")?;
    struck.context("no pager was seen")??;
    match started {
        Err(refusal) => {
            let said = refusal.message();
            ensure!(said.contains("the pager was ended by signal 9"), "{said}");
        }
        // CRIU had just finished.
        Ok(_) if late => assert_eq!(warm.wait().await?.status, 137),
        Ok(_) => bail!("it was started without its memory"),
    }
    sound(&warm)?;
    warm.delete().await?;
    warm.remove().await
}

async fn orphaned(stage: &Stage, id: &str) -> Result<()> {
    let (warm, pager) = loading(stage, || heap(stage, id), "orphaned").await?;
    assert_eq!(warm.state().await?, State::Running);
    kill(pager, Signal::SIGKILL)?;
    assert_eq!(warm.wait().await?.status, 137);
    sound(&warm)?;
    is_told_of(stage, id, "the pager was ended by signal 9")?;
    warm.reaches(State::Stopped).await?;
    warm.remove().await
}

/// Killed when the shim has let go of the memory, which it does at the pager's word. It may be over by then.
async fn done_with(stage: &Stage, id: &str, last: &Count) -> Result<()> {
    let (warm, pager) = loading(stage, || heap(stage, id), "orphaned").await?;
    let (shim, _) = stage.node.shim_of(id)?;
    let shim = Pid::from_raw(shim.try_into()?);
    ensure!(holds_memory(shim), "the shim holds no memory in mid-load");
    kill(pager, Signal::SIGCONT)?;
    let done = async {
        while holds_memory(shim) {
            tokio::time::sleep(Duration::from_micros(200)).await;
        }
    };
    tokio::time::timeout(*poll::DEADLINE, done)
        .await
        .context("it does not come to its end")?;
    let _ = kill(pager, Signal::SIGKILL);
    is_sound(&warm, last).await?;
    warm.remove().await
}

/// That the log has the reason of a container's end.
fn is_told_of(stage: &Stage, id: &str, why: &str) -> Result<()> {
    let log = stage.node.log_tail(usize::MAX);
    let (of, ended) = (format!("id=\"{id}\""), "the container is ended");
    let told = log
        .lines()
        .filter(|line| line.contains(ended) && line.contains(&of));
    let told: Vec<&str> = told.collect();
    ensure!(
        told.len() == 1 && told[0].contains(why),
        "{why:?} is told in {told:?}"
    );
    Ok(())
}

pub(crate) async fn a_checkpoint_while_still_loading_drains_first(stage: &Stage) -> Result<()> {
    let last = image(stage, "drained").await?;
    let (warm, pager) = loading(stage, || heap(stage, "drained-2"), "drained").await?;
    let checkpoint = stage.checkpoint("drained-2", "drained-again", &["--exit"]);
    tokio::pin!(checkpoint);
    // A dump now would have holes, so it waits for a pager that stands still.
    let early = tokio::time::timeout(Duration::from_secs(1), &mut checkpoint).await;
    ensure!(early.is_err(), "it was checkpointed in mid-load");
    kill(pager, Signal::SIGCONT)?;
    checkpoint.await?;
    sound(&warm)?;
    warm.remove().await?;
    let third = heap(stage, "drained-3")
        .annotation(RESTORE_FROM, "drained-again")
        .run()
        .await?;
    is_sound(&third, &last).await?;
    third.remove().await
}

pub(crate) async fn a_container_that_ends_while_loading_leaves_nothing(
    stage: &Stage,
) -> Result<()> {
    image(stage, "cut-short").await?;
    let (warm, pager) = loading(stage, || heap(stage, "cut-short-2"), "cut-short").await?;
    warm.kill(9).await?;
    assert_eq!(warm.wait().await?.status, 137);
    warm.remove().await?;
    stage.node.is_rid_of("cut-short-2").await?;
    is_gone(stage, pager).await
}

/// Also what still waits for its memory, whose pager is no process of the container.
pub(crate) async fn a_shim_that_is_killed_while_loading_leaves_nothing(
    stage: &Stage,
) -> Result<()> {
    image(stage, "headless").await?;
    let (warm, pager) = loading(stage, || heap(stage, "headless-2"), "headless").await?;
    let (shim, _) = stage.node.shim_of("headless-2")?;
    kill(Pid::from_raw(shim.try_into()?), Signal::SIGKILL)?;
    let rid = stage.node.is_rid_of("headless-2").await;
    let gone = is_gone(stage, pager).await;
    if gone.is_err() {
        // The next test would take it for its own.
        kill(pager, Signal::SIGKILL)?;
    }
    rid.and(gone)?;
    let state = warm.state().await;
    ensure!(
        state.as_ref().is_err_and(|e| e.code() == Code::NotFound),
        "it has a task: {state:?}"
    );
    // Nobody holds the image any more.
    stage
        .node
        .run(["rekindle", "image", "rm", "headless"])
        .await?;
    warm.remove().await
}

/// What becomes of the pack that a container's memory is in.
#[derive(Debug, Clone, Copy)]
enum Harm {
    /// One byte, before the start.
    Flipped,
    /// One byte of each chunk that is still to come.
    AllFlipped,
    /// It is cut to nothing in mid-load.
    Cut,
    /// The image is removed by force in mid-load.
    Removed,
}

impl Harm {
    fn inflict(self, pack: &Path) -> Result<()> {
        let file = fs::File::options().read(true).write(true).open(pack)?;
        let bytes = file.metadata()?.len();
        let places = match self {
            Self::Flipped => vec![bytes / 2],
            Self::AllFlipped => (0..bytes).step_by(64 << 10).collect(),
            Self::Cut => return Ok(file.set_len(0)?),
            Self::Removed => Vec::new(),
        };
        for at in places {
            let mut byte = [0];
            file.read_exact_at(&mut byte, at)?;
            file.write_all_at(&[byte[0] ^ 1], at)?;
        }
        Ok(())
    }
}

/// The promise: a page is what was sealed, or nobody reads it. One reason is told, and the image, put back as it was,
/// is an image again.
pub(crate) async fn whatever_becomes_of_its_pack_a_page_is_what_was_sealed(
    stage: &Stage,
) -> Result<()> {
    let last = image(stage, "harmed").await?;
    let folder = stage.image("default", "harmed");
    let mut all = fs::read_dir(&folder)?.filter_map(Result::ok);
    let pack = all
        .find(|entry| entry.file_name().to_string_lossy().starts_with("pack-"))
        .context("the image has no pack")?
        .path();
    let kept = stage.node.path("/var/tmp/harmed");
    fs::copy(&pack, &kept)?;
    let harms = [Harm::Flipped, Harm::AllFlipped, Harm::Cut, Harm::Removed];
    for harm in harms {
        let id = format!("harmed-{harm:?}").to_lowercase();
        let harmed = match harm {
            Harm::Flipped => flipped(stage, &id, &pack).await,
            Harm::AllFlipped | Harm::Cut => harmed(stage, &id, (harm, &pack)).await,
            Harm::Removed => removed(stage, &id, &last).await,
        };
        harmed.with_context(|| format!("{harm:?}"))?;
        stage.node.is_rid_of(&id).await?;
        if pack.exists() {
            fs::copy(&kept, &pack)?;
        }
    }
    println!("{} ways to harm a pack", harms.len());
    Ok(fs::remove_file(kept)?)
}

async fn flipped(stage: &Stage, id: &str, pack: &Path) -> Result<()> {
    Harm::Flipped.inflict(pack)?;
    let warm = heap(stage, id).annotation(RESTORE_FROM, "harmed");
    let warm = warm.create().await?;
    // A fault may ask for it before the restore is over, or a loader comes to it later.
    match warm.start().await {
        Ok(_) => {
            assert_eq!(warm.wait().await?.status, 137);
            is_told_of(stage, id, "is damaged: what lies at byte")?;
        }
        Err(refusal) => {
            let said = refusal.message();
            ensure!(
                said.contains("pack-") && said.contains("is damaged"),
                "{said}"
            );
        }
    }
    sound(&warm)?;
    warm.remove().await
}

async fn harmed(stage: &Stage, id: &str, (harm, pack): (Harm, &Path)) -> Result<()> {
    let (warm, pager) = loading(stage, || heap(stage, id), "harmed").await?;
    harm.inflict(pack)?;
    kill(pager, Signal::SIGCONT)?;
    assert_eq!(warm.wait().await?.status, 137);
    sound(&warm)?;
    is_told_of(stage, id, "is damaged: what lies at byte")?;
    warm.remove().await
}

/// Whoever has its files open keeps them, and nothing of it comes back.
async fn removed(stage: &Stage, id: &str, last: &Count) -> Result<()> {
    let (warm, pager) = loading(stage, || heap(stage, id), "harmed").await?;
    let refused = stage.rekindle(&["image", "rm", "harmed"]).await?;
    ensure!(
        !refused.status.success(),
        "an image in use was removed: {refused:?}"
    );
    let rm = ["image", "rm", "harmed", "--force"];
    let removed = stage.rekindle(&rm).await?;
    ensure!(removed.status.success(), "{removed:?}");
    kill(pager, Signal::SIGCONT)?;
    is_sound(&warm, last).await?;
    is_gone(stage, pager).await?;
    let home = stage.image("default", "harmed");
    let left = fs::read_dir(home.parent().unwrap_or(&home))?;
    let mut left: Vec<_> = left
        .map(|entry| Ok(entry?.file_name()))
        .collect::<Result<_>>()?;
    left.sort();
    assert_eq!(left, [".last", ".last.lock"]);
    warm.remove().await
}

async fn is_gone(stage: &Stage, pager: Pid) -> Result<()> {
    poll::until("the pager's end", async || {
        let left = stage.node.processes()?;
        let pager = u32::try_from(pager.as_raw())?;
        Ok(left.iter().all(|(pid, _)| *pid != pager).then_some(()))
    })
    .await
}

/// `restore.paging` as it is without a word: what is small goes on sooner when it is read before it runs.
pub(crate) async fn what_is_small_is_read_before_it_runs(stage: &Stage) -> Result<()> {
    let last = image(stage, "large").await?;
    let (task, at) = stage.lived_in("little").await?;
    stage.checkpoint("little", "little", &["--exit"]).await?;
    task.remove().await?;
    let file = stage.node.path("/etc/rekindle/config.toml");
    let before = fs::read_to_string(&file)?;
    fs::write(
        &file,
        before.replace("paging = \"lazy\"", "paging = \"auto\""),
    )?;
    let restored = async {
        let little = stage.warm("little-2", "little").run().await?;
        let large = heap(stage, "large-2").annotation(RESTORE_FROM, "large");
        anyhow::Ok((little, large.run().await?))
    };
    let restored = restored.await;
    fs::write(&file, before)?;
    let (little, large) = restored?;
    let now = counts_to(little.io().out()?, at.n + 3).await?;
    assert_eq!(now.nonce, at.nonce);
    is_sound(&large, &last).await?;
    let log = stage.node.log_tail(usize::MAX);
    let read = |id: &str| log.contains(&format!("begins id={id:?} step=\"read pages\""));
    ensure!(read("little-2"), "the little one came in lazily");
    ensure!(!read("large-2"), "the large one was read before it ran");
    little.remove().await?;
    large.remove().await
}
