//! The agent of a node: what it does with the images in a round.
//!
//! ```text
//!  sweep ─▶ list ─▶ settle ─▶ promote ─▶ replicate ─▶ plan ─▶ evict ─▶ rest ─┐
//!    ▲                                                                        │
//!    └────────────────────────────────────────────────────────────────────────┘
//! ```
//! What it knows it reads anew in each round, from manifests, locks, and tags; what it remembers between rounds saves
//! questions, and nothing depends on it. So it can be killed at any time: an image in a tier is there when its tag is, one
//! on the node while its manifest is, and what is neither is swept.
//!
//! A failure is told, and ends nothing but what it is about; the next round tries again.

use std::{
    collections::{BTreeMap, HashSet},
    sync::atomic::{AtomicU64, Ordering},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use anyhow::{Context as _, bail};
use rekindle_checkpoint::{
    ImageError, ImageStore, SealedImage,
    image::{Evicted, Place},
    layout::Layout,
    retention::{Held, Reason, Removal, plan},
};
use rekindle_core::{
    config::{NodeConfig, Retention},
    name::Namespace,
    step::AgentStep,
};
use rekindle_store::s3::Tuning;

use crate::{
    api::{Event, Kind, Told},
    commands::image::opened::Room,
    keys, tier,
};

mod memory;

/// Between two words about how far something is.
const TICK: Duration = Duration::from_millis(250);

/// The agent, and what it remembers between rounds.
pub(crate) struct Agent {
    store: ImageStore,
    /// What it tells of itself; among that the images that were whole in their tier when that was last asked.
    told: Told,
    /// Images that were told to be damaged: once is enough.
    damaged: HashSet<String>,
    /// The images of the last round; none before the first.
    there: Option<HashSet<String>>,
}

/// The tiers that were asked for in a round.
struct Tiers<'a> {
    config: &'a NodeConfig,
    /// By their URLs; none is one that failed in this round and is left alone.
    open: BTreeMap<String, Option<Layout>>,
}

/// What became of an image that should be in a tier.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Replica {
    /// It is there, whole.
    Whole,
    /// Its namespace has no tier.
    NotWanted,
    /// It is not there.
    Failed,
}

impl Agent {
    pub(crate) fn new(config: &NodeConfig) -> anyhow::Result<Self> {
        Ok(Self {
            store: ImageStore::of(&config.images)?,
            told: Told::new(),
            damaged: HashSet::new(),
            there: None,
        })
    }

    pub(crate) fn store(&self) -> &ImageStore {
        &self.store
    }

    pub(crate) fn told(&self) -> &Told {
        &self.told
    }

    /// A step that begins.
    pub(crate) fn begins(&self, step: AgentStep) {
        tracing::debug!(?step, "begins");
        let event = Event {
            step: step.name().to_owned(),
            ..Event::default()
        };
        self.told.event(Kind::STEP, event);
    }

    /// Goes round once; says how often something failed.
    pub(crate) fn round(&mut self, config: &NodeConfig) -> usize {
        let mut failed = 0;
        let mut images = Vec::new();
        let mut missing = Vec::new();
        let (mut removals, mut demotions) = (Vec::new(), Vec::new());
        let mut tiers = Tiers {
            config,
            open: BTreeMap::new(),
        };
        for step in AgentStep::ALL {
            let step = *step;
            if step != AgentStep::Rest {
                self.begins(step);
            }
            let done = match step {
                AgentStep::Sweep => self.sweep(),
                AgentStep::List => self.list().map(|found| images = found),
                AgentStep::Settle => {
                    failed += self.settle(&mut images, config);
                    Ok(())
                }
                AgentStep::Promote => {
                    failed += self.promote(&mut images, config);
                    Ok(())
                }
                AgentStep::Replicate => {
                    missing = self.replicate(&images, &mut tiers);
                    failed += missing.len();
                    Ok(())
                }
                AgentStep::Plan => {
                    demotions = self.leaving(&images, config);
                    // Somebody needs them: their tier.
                    for image in &missing {
                        images[*image].in_use = true;
                    }
                    let found = self.plan(&images, config.images.retention);
                    found.map(|found| removals = found)
                }
                AgentStep::Evict => {
                    failed += self.evict(&images, &removals, &mut tiers);
                    failed += self.demote(&images, &demotions, &mut tiers);
                    Ok(())
                }
                AgentStep::Rest => Ok(()),
            };
            if let Err(error) = done {
                failed += 1;
                tracing::error!("{}: {error:#}", step.name());
                self.failed("", format!("{error:#}"));
            }
        }
        failed
    }

    /// Tells that something failed, of which the log has been told.
    fn failed(&self, image: &str, message: String) {
        let event = Event {
            image: image.to_owned(),
            message,
            ..Event::default()
        };
        self.told.event(Kind::FAILED, event);
    }

    /// Tells of an image.
    fn of(&self, kind: Kind, image: &str) {
        let event = Event {
            image: image.to_owned(),
            ..Event::default()
        };
        self.told.event(kind, event);
    }

    fn sweep(&self) -> anyhow::Result<()> {
        let swept = self.store.leftovers(true)?;
        if swept.folders > 0 {
            let (folders, bytes) = (swept.folders, swept.bytes);
            tracing::info!(folders, bytes, "removed what killed processes left");
        }
        Ok(())
    }

    /// The images of the node, the last used first.
    fn list(&mut self) -> anyhow::Result<Vec<Held>> {
        let mut images = self.store.inventory(None)?;
        images.sort_by_key(|held| std::cmp::Reverse((held.last_used, held.generation)));
        let there: HashSet<String> = images.iter().map(reference).collect();
        let still = |image: &String| there.contains(image);
        self.told.replicated(|all| all.retain(still));
        self.damaged.retain(still);
        if let Some(before) = self.there.replace(there.clone()) {
            for image in there.difference(&before) {
                self.of(Kind::APPEARED, image);
            }
            for image in before.difference(&there) {
                self.of(Kind::DISAPPEARED, image);
            }
        }
        Ok(images)
    }

    /// Puts images into their tiers; which are not there.
    fn replicate(&mut self, images: &[Held], tiers: &mut Tiers<'_>) -> Vec<usize> {
        let mut missing = Vec::new();
        for (place, held) in images.iter().enumerate() {
            if let Err(error) = self.complete(held, tiers.config) {
                tracing::warn!(image = reference(held), "the rest does not come: {error:#}");
                self.failed(
                    &reference(held),
                    format!("the rest does not come: {error:#}"),
                );
            }
            let replica = self.replica(held, tiers).unwrap_or_else(|error| {
                tracing::warn!(image = reference(held), "not replicated: {error:#}");
                self.failed(&reference(held), format!("not replicated: {error:#}"));
                Replica::Failed
            });
            missing.extend((replica == Replica::Failed).then_some(place));
        }
        missing
    }

    /// Has the rest of an image come that began to come in, where whoever fetched it is gone.
    fn complete(&self, held: &Held, config: &NodeConfig) -> anyhow::Result<()> {
        if !held.incoming {
            return Ok(());
        }
        let (namespace, name) = (&held.namespace, &held.name);
        let sealed = match self.store.resolve(namespace, name, Some(held.generation)) {
            // Somebody has removed it meanwhile, or what is there cannot be read, which others tell.
            Err(_) => return Ok(()),
            Ok(sealed) => sealed,
        };
        let Some(source) = tier::rest_of(config, &sealed)? else {
            return Ok(());
        };
        let Some(_alone) = self.store.fetching(namespace, name)? else {
            return Ok(());
        };
        let key = keys::of(config, &sealed)?;
        sealed.complete(key.as_ref(), source, &AtomicU64::new(0))?;
        tracing::info!(image = reference(held), "the rest of it has come");
        Ok(())
    }

    fn replica(&mut self, held: &Held, tiers: &mut Tiers<'_>) -> anyhow::Result<Replica> {
        let config = tiers.config;
        let Some(layout) = tiers.of(&held.namespace) else {
            return Ok(Replica::NotWanted);
        };
        let image = reference(held);
        if self.told.replicated(|all| all.contains(&image)) {
            return Ok(Replica::Whole);
        }
        let Some(layout) = layout? else {
            return Ok(Replica::Failed);
        };
        if !is_wanted(held) {
            return Ok(Replica::NotWanted);
        }
        let sealed = self
            .store
            .resolve(&held.namespace, &held.name, Some(held.generation));
        let sealed = match sealed {
            // Somebody has removed it meanwhile.
            Err(ImageError::Unknown(_)) => return Ok(Replica::Failed),
            sealed => sealed?,
        };
        // What stays is what is carried off.
        let sealed = sealed.on_disk().unwrap_or(sealed);
        let pushed = self.push(layout, &sealed, config);
        match pushed {
            Ok(done) => {
                if done {
                    self.told.replicated(|all| all.insert(image));
                    return Ok(Replica::Whole);
                }
                Ok(Replica::Failed)
            }
            Err(error) => {
                // The next image would wait for it as long, and in vain.
                tiers.give_up(&held.namespace);
                Err(error)
            }
        }
    }

    /// Whether an image is in its tier, after it was put there; not, where it is damaged.
    fn push(
        &mut self,
        layout: &Layout,
        sealed: &SealedImage,
        config: &NodeConfig,
    ) -> anyhow::Result<bool> {
        if layout.holds(sealed)? {
            return Ok(true);
        }
        let reference = sealed.reference();
        if self.damaged.contains(&reference) {
            return Ok(false);
        }
        // What is damaged must not be what is left when this node's copy goes.
        if let Err(error) = self.verify(sealed, config) {
            tracing::error!(
                image = reference,
                "not replicated, and not removed: {error:#}"
            );
            self.failed(
                &reference,
                format!("not replicated, and not removed: {error:#}"),
            );
            self.damaged.insert(reference);
            return Ok(false);
        }
        let tag = layout.tag_for(sealed);
        let pushed = self.watched(sealed, |done| layout.push(sealed, &tag, done))?;
        let (bytes, written) = (pushed.bytes, pushed.written);
        tracing::info!(image = reference, bytes, written, "replicated");
        self.of(Kind::REPLICATED, &reference);
        Ok(true)
    }

    /// Puts an image somewhere, and tells how far that is.
    fn watched<T: Send>(
        &self,
        sealed: &SealedImage,
        work: impl FnOnce(&AtomicU64) -> T + Send,
    ) -> T {
        let (done, total) = (AtomicU64::new(0), sealed.manifest().total_bytes());
        let result = std::thread::scope(|scope| {
            let working = scope.spawn(|| work(&done));
            while !working.is_finished() {
                let event = Event {
                    image: sealed.reference(),
                    done: done.load(Ordering::Relaxed),
                    total,
                    ..Event::default()
                };
                self.told.event(Kind::REPLICATING, event);
                std::thread::park_timeout(TICK);
            }
            working.join()
        });
        result.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }

    /// Reads all of an image that this node has the key of, and as much as can be compared of another one.
    fn verify(&self, sealed: &SealedImage, config: &NodeConfig) -> anyhow::Result<()> {
        let key = keys::of(config, sealed)?;
        if sealed.key().is_some() && key.is_none() {
            return Ok(());
        }
        let room = Room::new(&self.store, key.as_ref())?;
        let manifest = sealed.manifest();
        let (namespace, name) = (&manifest.namespace, &manifest.name);
        let again = self
            .store
            .resolve(namespace, name, Some(sealed.generation()))?;
        let again = match sealed.place() {
            Place::Disk => again.on_disk().unwrap_or(again),
            Place::Memory => again,
        };
        let verified = again.alone().verify(&room.path, key.as_ref())?;
        verified.verify_chunks(&AtomicU64::new(0))?;
        Ok(())
    }

    fn plan(&self, images: &[Held], policy: Retention) -> anyhow::Result<Vec<Removal>> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        let now = now.unwrap_or_default().as_secs();
        let plan = plan(images, &policy, Some(self.store.disk()?), now);
        if plan.over() > 0 {
            tracing::warn!(
                over = plan.over(),
                quota = plan.quota,
                "images take more than they may: containers use them, or their tiers do not have them"
            );
        }
        Ok(plan.removals)
    }

    fn evict(&self, images: &[Held], removals: &[Removal], tiers: &mut Tiers<'_>) -> usize {
        let mut failed = 0;
        for removal in removals {
            let held = &images[removal.image];
            let image = reference(held);
            match self.remove(held, tiers) {
                Ok(Some(Evicted::Freed(bytes))) => {
                    let why = rule(removal.reason);
                    tracing::info!(image, bytes, why, "removed");
                    let event = Event {
                        image,
                        done: bytes,
                        message: why.to_owned(),
                        ..Event::default()
                    };
                    self.told.event(Kind::REMOVED, event);
                }
                Ok(Some(Evicted::Used | Evicted::Gone)) => {}
                Ok(None) => {
                    tracing::warn!(image, "kept: its tier does not have it any more");
                    self.told.replicated(|all| all.remove(&image));
                }
                Err(error) => {
                    failed += 1;
                    tracing::warn!(image, "not removed: {error:#}");
                    self.failed(&image, format!("not removed: {error:#}"));
                }
            }
        }
        failed
    }

    /// Removes an image, unless its tier has it no more.
    fn remove(&self, held: &Held, tiers: &mut Tiers<'_>) -> anyhow::Result<Option<Evicted>> {
        if let Some(layout) = tiers.of(&held.namespace)
            && is_wanted(held)
        {
            let Some(layout) = layout? else {
                bail!("its tier is not asked again: it has failed in this round");
            };
            let generation = Some(held.generation);
            let sealed = match self.store.resolve(&held.namespace, &held.name, generation) {
                Err(ImageError::Unknown(_)) => return Ok(Some(Evicted::Gone)),
                sealed => sealed?,
            };
            if !layout.holds(&sealed)? {
                return Ok(None);
            }
        }
        Ok(Some(self.store.evict(held)?))
    }
}

impl Tiers<'_> {
    /// The tier of a namespace: none where there is none; none in that where it has failed in this round.
    fn of(&mut self, namespace: &Namespace) -> Option<anyhow::Result<Option<&Layout>>> {
        let url = self.config.tier_for(namespace)?.url.clone();
        if !self.open.contains_key(&url) {
            let opened = tier::of(self.config, namespace, Tuning::default());
            match opened.with_context(|| format!("opening the tier {url}")) {
                Ok(layout) => {
                    self.open.insert(url.clone(), layout);
                }
                Err(error) => {
                    self.open.insert(url, None);
                    return Some(Err(error));
                }
            }
        }
        Some(Ok(self.open.get(&url).and_then(Option::as_ref)))
    }

    /// Leaves a tier alone for the rest of the round.
    fn give_up(&mut self, namespace: &Namespace) {
        if let Some(tier) = self.config.tier_for(namespace) {
            self.open.insert(tier.url.clone(), None);
        }
    }
}

/// `NAMESPACE/NAME@GENERATION`.
pub(crate) fn reference(held: &Held) -> String {
    format!("{}/{}@{}", held.namespace, held.name, held.generation)
}

/// Whether an image belongs into its tier. One that is refused, or in quarantine, is nobody's to start from; and what
/// containers make for others of their kind they look for on the node, and make again.
fn is_wanted(held: &Held) -> bool {
    held.usable && !held.remade
}

/// The rule of the configuration by which an image went.
fn rule(reason: Reason) -> &'static str {
    match reason {
        Reason::Keep { .. } => "keep",
        Reason::Idle { .. } => "idle",
        Reason::NamespaceQuota { .. } => "namespace-quota",
        Reason::Quota { .. } => "quota",
    }
}
