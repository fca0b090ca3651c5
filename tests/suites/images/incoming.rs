//! A container that runs while its image is still coming in from a bucket.

use crate::heap::{heap, image, is_sound, sound};
use crate::stage::{BUCKET, RESTORE_FROM, Stage};
use anyhow::{Context, Result, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use rekindle_harness::container::State;
use rekindle_harness::s3::S3Server;
use rekindle_harness::{Container, Count, poll};
use std::fs;
use std::os::unix::fs::FileExt as _;
use std::path::PathBuf;
use std::time::Duration;

/// The processes of the node with such a command line.
fn running(stage: &Stage, words: &str) -> Result<Vec<Pid>> {
    let found = stage.node.processes_with(&[words])?;
    let pids = found.into_iter().map(|(pid, _)| pid.try_into());
    Ok(pids
        .map(|pid| pid.map(Pid::from_raw))
        .collect::<Result<_, _>>()?)
}

/// Stands still while this lives.
struct Still(Vec<Pid>);

impl Still {
    fn of(stage: &Stage, words: &str) -> Result<Self> {
        let pids = running(stage, words)?;
        ensure!(!pids.is_empty(), "no process of {words:?}");
        let still = Self(pids);
        still.signal(Signal::SIGSTOP)?;
        Ok(still)
    }

    fn signal(&self, signal: Signal) -> Result<()> {
        for pid in &self.0 {
            kill(*pid, signal)?;
        }
        Ok(())
    }
}

impl Drop for Still {
    fn drop(&mut self) {
        for pid in &self.0 {
            let _ = kill(*pid, Signal::SIGCONT);
        }
    }
}

/// What says that an image is not all on the node. Its first generation was made here.
fn origin(stage: &Stage, name: &str) -> PathBuf {
    origin_of(stage, name, 2)
}

fn origin_of(stage: &Stage, name: &str, generation: u64) -> PathBuf {
    let first = stage.image("default", name);
    let folder = first.with_file_name(generation.to_string());
    folder.join("origin.json")
}

/// A heap whose image is in its tier only.
async fn afar(stage: &Stage, name: &str) -> Result<Count> {
    let last = image(stage, name).await?;
    let place = format!("s3://{BUCKET}/default/");
    for args in [&["image", "push", name, &place][..], &["image", "rm", name]] {
        let output = stage.rekindle(args).await?;
        ensure!(output.status.success(), "{args:?}: {output:?}");
    }
    Ok(last)
}

/// A container of an image that has begun to come in, and whose store stands still.
async fn begun<'s>(stage: &'s Stage, id: &str, name: &str) -> Result<(Container<'s>, Still)> {
    begun_as(stage, id, name, 2).await
}

async fn begun_as<'s>(
    stage: &'s Stage,
    id: &str,
    name: &str,
    generation: u64,
) -> Result<(Container<'s>, Still)> {
    let origin = origin_of(stage, name, generation);
    let still = async {
        while !origin.exists() {
            tokio::time::sleep(Duration::from_micros(200)).await;
        }
        Still::of(stage, "rekindle-s3server --root")
    };
    let created = heap(stage, id).annotation(RESTORE_FROM, name).create();
    let both = async { tokio::join!(created, still) };
    let both = tokio::time::timeout(Duration::from_secs(60), both).await;
    let (created, still) = both.context("the image does not begin to come in")?;
    Ok((created?, still?))
}

/// Starts it. A restore asks for some of its memory before it is over, and for that the store goes on for a moment now and
/// then.
async fn starts(warm: &Container<'_>, store: &Still) -> Result<()> {
    let trickle = async {
        loop {
            tokio::time::sleep(Duration::from_millis(100)).await;
            store.signal(Signal::SIGCONT)?;
            tokio::time::sleep(Duration::from_millis(5)).await;
            store.signal(Signal::SIGSTOP)?;
        }
    };
    let started = tokio::select! {
        started = warm.start() => started.map(drop).map_err(Into::into),
        failed = trickle => failed,
    };
    store.signal(Signal::SIGSTOP)?;
    started
}

async fn is_whole(stage: &Stage, name: &str) -> Result<()> {
    is_whole_as(stage, name, 2).await
}

async fn is_whole_as(stage: &Stage, name: &str, generation: u64) -> Result<()> {
    let origin = origin_of(stage, name, generation);
    poll::until("the rest of the image", async || {
        Ok((!origin.exists()).then_some(()))
    })
    .await?;
    let verified = stage.rekindle(&["image", "verify", name]).await?;
    ensure!(verified.status.success(), "{verified:?}");
    Ok(())
}

pub(crate) async fn it_runs_before_its_memory_is_on_the_node(stage: &Stage) -> Result<()> {
    let last = afar(stage, "early").await?;
    let (warm, store) = begun(stage, "early-2", "early").await?;
    starts(&warm, &store).await?;
    assert_eq!(warm.state().await?, State::Running);
    ensure!(origin(stage, "early").exists(), "all of it is here already");
    // What needs all of it says so.
    let refused = stage.rekindle(&["image", "verify", "early"]).await?;
    let said = String::from_utf8_lossy(&refused.stderr);
    let said = format!("{said}{}", String::from_utf8_lossy(&refused.stdout));
    ensure!(said.contains("is not all on this node yet"), "{said}");
    drop(store);
    is_sound(&warm, &last).await?;
    is_whole(stage, "early").await?;
    warm.remove().await?;
    stage.node.is_rid_of("early-2").await
}

/// Whoever dies meanwhile: the container is sound, or ended with the reason, and what has come is of use to the next.
pub(crate) async fn who_fetches_it_is_killed(stage: &Stage) -> Result<()> {
    let last = afar(stage, "unfetched").await?;
    let (warm, store) = begun(stage, "unfetched-2", "unfetched").await?;
    starts(&warm, &store).await?;
    let fetching = running(stage, "rekindle image fetch")?;
    ensure!(!fetching.is_empty(), "nobody fetches it");
    for pid in fetching {
        kill(pid, Signal::SIGKILL)?;
    }
    drop(store);
    // Its pager goes on, and leaves the rest to another one.
    is_sound(&warm, &last).await?;
    is_whole(stage, "unfetched").await?;
    warm.remove().await?;
    stage.node.is_rid_of("unfetched-2").await
}

pub(crate) async fn its_pager_is_killed(stage: &Stage) -> Result<()> {
    let last = afar(stage, "unpaged").await?;
    let (warm, store) = begun(stage, "unpaged-2", "unpaged").await?;
    starts(&warm, &store).await?;
    for words in ["rekindle image fetch", "rekindle pager --criu"] {
        for pid in running(stage, words)? {
            kill(pid, Signal::SIGKILL)?;
        }
    }
    assert_eq!(warm.wait().await?.status, 137);
    sound(&warm)?;
    warm.remove().await?;
    ensure!(origin(stage, "unpaged").exists(), "it passes for whole");
    drop(store);
    let again = heap(stage, "unpaged-3").annotation(RESTORE_FROM, "unpaged");
    let again = again.run().await?;
    is_sound(&again, &last).await?;
    is_whole(stage, "unpaged").await?;
    again.remove().await?;
    stage.node.is_rid_of("unpaged-3").await
}

/// The promise: a page is what was sealed, or nobody reads it.
pub(crate) async fn other_bytes_in_the_bucket_end_it(stage: &Stage) -> Result<()> {
    afar(stage, "belied").await?;
    let (warm, store) = begun(stage, "belied-2", "belied").await?;
    let blobs = stage.node.path("/srv/s3").join(BUCKET);
    for entry in fs::read_dir(blobs.join("default/blobs/sha256"))? {
        let path = entry?.path();
        let file = fs::File::options().read(true).write(true).open(&path)?;
        let bytes = file.metadata()?.len();
        // The packs: everything else is here.
        for at in (0..bytes).step_by(16 << 10).filter(|_| bytes > 1 << 20) {
            file.write_all_at(&[0x5a], at)?;
        }
    }
    drop(store);
    match warm.start().await {
        Ok(_) => {
            assert_eq!(warm.wait().await?.status, 137);
            sound(&warm)?;
            let log = stage.node.log_tail(usize::MAX);
            let told = log.lines().any(|line| {
                line.contains("the container is ended") && line.contains("gives something else")
            });
            ensure!(told, "nobody is told why");
        }
        Err(refusal) => {
            let said = refusal.message();
            ensure!(said.contains("gives something else"), "{said}");
            warm.delete().await?;
        }
    }
    warm.remove().await?;
    stage.node.is_rid_of("belied-2").await?;
    ensure!(origin(stage, "belied").exists(), "it passes for whole");
    let removed = stage.rekindle(&["image", "rm", "belied"]).await?;
    ensure!(removed.status.success(), "{removed:?}");
    Ok(())
}

/// What else happens meanwhile.
#[derive(Debug, Clone, Copy)]
enum Event {
    /// Another container starts from it.
    AnotherStart,
    /// Somebody removes it by force.
    Removed,
    /// The store goes away, for longer than anybody's patience, and comes back.
    StoreGone,
}

/// One image, which is fetched anew for each of them.
pub(crate) async fn whatever_happens_it_is_sound_or_ends_with_the_reason(
    stage: &Stage,
) -> Result<()> {
    let last = afar(stage, "eventful").await?;
    let events = [Event::AnotherStart, Event::Removed, Event::StoreGone];
    for (generation, event) in (2..).zip(events) {
        let id = format!("eventful-{generation}");
        let (warm, store) = begun_as(stage, &id, "eventful", generation).await?;
        starts(&warm, &store).await?;
        let met = meets(stage, event, (&warm, store), (&last, generation)).await;
        met.with_context(|| format!("{event:?}"))?;
        sound(&warm)?;
        warm.remove().await?;
        stage.node.is_rid_of(&id).await?;
        // And the next one fetches it again.
        if !matches!(event, Event::Removed) {
            let removed = stage.rekindle(&["image", "rm", "eventful"]).await?;
            ensure!(removed.status.success(), "{removed:?}");
        }
    }
    println!("{} events", events.len());
    Ok(())
}

async fn meets(
    stage: &Stage,
    event: Event,
    (warm, store): (&Container<'_>, Still),
    (last, generation): (&Count, u64),
) -> Result<()> {
    match event {
        Event::AnotherStart => {
            let second = heap(stage, "eventful-beside").annotation(RESTORE_FROM, "eventful");
            let second = second.run().await?;
            drop(store);
            is_sound(warm, last).await?;
            is_sound(&second, last).await?;
            second.remove().await?;
            is_whole_as(stage, "eventful", generation).await
        }
        Event::Removed => {
            let rm = ["image", "rm", "eventful", "--force"];
            let removed = stage.rekindle(&rm).await?;
            ensure!(removed.status.success(), "{removed:?}");
            drop(store);
            // Whoever has its files open keeps them.
            is_sound(warm, last).await?;
            poll::until("whoever fetches it to end", async || {
                Ok(running(stage, "rekindle image fetch")?
                    .is_empty()
                    .then_some(()))
            })
            .await?;
            ensure!(
                !stage.images().await?.contains(&"eventful".to_owned()),
                "what was removed came back"
            );
            Ok(())
        }
        Event::StoreGone => {
            for pid in &store.0 {
                kill(*pid, Signal::SIGKILL)?;
            }
            assert_eq!(warm.wait().await?.status, 137);
            let log = stage.node.log_tail(usize::MAX);
            let told = log.lines().any(|line| {
                line.contains("the container is ended")
                    && line.contains(&format!("id=\"{}\"", warm.id()))
                    && line.contains("gave up after")
            });
            ensure!(told, "nobody is told why");
            ensure!(
                origin_of(stage, "eventful", generation).exists(),
                "it passes for whole"
            );
            // It ends with this program, as the first one would have.
            std::mem::forget(S3Server::empty(&stage.node, BUCKET).await?);
            let again = heap(stage, "eventful-again").annotation(RESTORE_FROM, "eventful");
            let again = again.run().await?;
            is_sound(&again, last).await?;
            is_whole_as(stage, "eventful", generation).await?;
            again.remove().await
        }
    }
}
