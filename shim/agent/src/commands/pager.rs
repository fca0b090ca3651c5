//! `rekindle pager`: hidden; the process that a shim starts beside a lazy restore, and that outlives it.

use std::{
    io,
    os::{fd::AsFd as _, unix::net::UnixStream},
    path::{Path, PathBuf},
    process::ExitCode,
    sync::Arc,
};

use anyhow::Context as _;
use clap::Args;
use rekindle_checkpoint::{ImageStore, pager};
use rekindle_core::{
    config::{Memory, NodeConfig},
    name::ImageRef,
};

use crate::{keys, output, tier};

use rest::Rest;

mod rest;

/// Where no more than this part of what was asked for first was not noted, what the tier has noted is left as it is.
const KNOWN: usize = 10;

/// Its standard input is the connection to the shim, over which the processes come.
#[derive(Debug, Args)]
pub(crate) struct PagerArgs {
    /// The folder of CRIU's images.
    #[arg(long)]
    criu: PathBuf,
    /// The store of the image.
    #[arg(long)]
    store: PathBuf,
    /// Where the store has images in memory.
    #[arg(long)]
    memory: Option<PathBuf>,
    /// The image: NAMESPACE/NAME@GENERATION.
    image: ImageRef,
}

/// `file` is the configuration's, where it is not the usual one. Blocks.
pub(crate) fn run(
    args: &PagerArgs,
    file: Option<&Path>,
    config: impl FnOnce() -> anyhow::Result<NodeConfig>,
) -> anyhow::Result<ExitCode> {
    let stdin = io::stdin();
    let relay = stdin.as_fd().try_clone_to_owned();
    let relay = UnixStream::from(relay.context("duplicating the connection to the shim")?);
    more_descriptors();
    let Some(namespace) = &args.image.namespace else {
        anyhow::bail!("the image {} has no namespace", args.image);
    };
    let mut store = ImageStore::open(&args.store)?;
    if let Some(root) = &args.memory
        && let Err(error) = store.use_memory(Memory::to_read(root))
    {
        tracing::warn!("no images in memory: {error}");
    }
    let image = store.resolve(namespace, &args.image.name, args.image.generation)?;
    let image = Arc::new(image);
    // Only who has an image that is encrypted, or not all here, has to know of keys and tiers.
    let origin = image.origin()?;
    let config = match origin.is_none() && image.key().is_none() {
        true => None,
        false => Some(config()?),
    };
    let (key, rest) = match &config {
        None => (None, None),
        Some(config) => (keys::of(config, &image)?, tier::rest_of(config, &image)?),
    };
    let (chunks, rest) = match rest {
        None => (Arc::new(image.chunks(key.as_ref())?), None),
        Some(source) => {
            let chunks = Arc::new(image.chunks_from(key.as_ref(), source)?);
            let rest = Rest::begin(&image, &chunks, &args.criu)?;
            (chunks, Some(rest))
        }
    };
    let noted = image.touches().unwrap_or_else(|error| {
        tracing::debug!(%error, "nothing is brought in ahead");
        Vec::new()
    });
    match pager::serve(relay, &args.criu, &chunks, noted.clone()) {
        Ok(served) => {
            if chunks.has_missed() {
                image.leave_memory();
            }
            if served.touches != noted
                && let Err(error) = image.note_touches(&served.touches)
            {
                tracing::debug!(%error, "the next restore will know nothing of this one");
            }
            // Where it was removed meanwhile, nobody wants the rest.
            if let Some(rest) = rest
                && matches!(image.origin(), Ok(Some(_)))
            {
                rest.leave(file);
            }
            // What came in before anybody asked for it was not missed: it takes some restores until all is known.
            let new = served.asked > served.touches.len() / KNOWN;
            if let (Some(config), Some(origin), true) = (&config, origin, new)
                && let Err(error) = tier::put_note(config, &origin, &image, &served.touches)
            {
                tracing::debug!("other nodes will know nothing of this restore: {error:#}");
            }
            // Its stderr is its log, and this line goes into the shim's.
            output::note(&format!(
                "processes={} asked={} ahead={}",
                served.processes, served.asked, served.ahead
            ));
            Ok(ExitCode::SUCCESS)
        }
        Err(pager::ServeError::Abandoned) => Ok(ExitCode::from(pager::ABANDONED)),
        Err(e) => Err(e.into()),
    }
}

/// Every process that is forked while memory comes in has a descriptor, and may be one of very many.
fn more_descriptors() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let now = getrlimit(Resource::Nofile);
    let more = Rlimit {
        current: now.maximum,
        ..now
    };
    // Those that there are do for most programs.
    let _ = setrlimit(Resource::Nofile, more);
}
