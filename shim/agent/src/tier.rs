//! Where images have copies, as `[[images.tier]]` names it.

use anyhow::Context as _;
use rekindle_checkpoint::{
    SealedImage,
    image::{Origin, Source},
    layout::Layout,
    touches::Touch,
};
use rekindle_core::{
    config::{NodeConfig, Tier},
    name::Namespace,
    uri::ImagePlace,
};
use rekindle_store::{
    registry::{Access, Registry},
    s3::{Bucket, Limits, Tuning},
};
use tokio::runtime::Handle;

use crate::exit::Failure;

/// The layout at a place, as a tier that it lies in says; for images of `namespace`, where that is known. Blocks.
pub(crate) fn at(
    config: &NodeConfig,
    place: &ImagePlace,
    namespace: Option<&Namespace>,
) -> anyhow::Result<Layout> {
    let found = config.tier_at(place, namespace);
    let tier = found.ok_or_else(|| refused(place, namespace))?;
    open(config, tier, place, Tuning::default())
}

/// The layout of the tier that has the images of a namespace; none where there is none. Blocks.
pub(crate) fn of(
    config: &NodeConfig,
    namespace: &Namespace,
    tuning: Tuning,
) -> anyhow::Result<Option<Layout>> {
    let Some(tier) = config.tier_for(namespace) else {
        return Ok(None);
    };
    open(config, tier, &tier.url.parse()?, tuning).map(Some)
}

/// What fetches the rest of an image that is not all on the node; none where it is. Blocks.
pub(crate) fn rest_of(config: &NodeConfig, image: &SealedImage) -> anyhow::Result<Option<Source>> {
    let Some(origin) = image.origin()? else {
        return Ok(None);
    };
    let manifest = image.manifest();
    let layout = at(config, &origin.tier.parse()?, Some(&manifest.namespace))?;
    Ok(Some(Source {
        remote: layout.packs(manifest, &origin)?,
        requests: layout.requests(),
    }))
}

/// Has other nodes know what a restore of an image has asked for first, where it came from. Blocks.
pub(crate) fn put_note(
    config: &NodeConfig,
    origin: &Origin,
    image: &SealedImage,
    touches: &[Touch],
) -> anyhow::Result<()> {
    let namespace = &image.manifest().namespace;
    let layout = at(config, &origin.tier.parse()?, Some(namespace))?;
    Ok(layout.put_note(image, touches)?)
}

/// Refuses a place that is no tier of a namespace.
pub(crate) fn admit(
    config: &NodeConfig,
    place: &ImagePlace,
    namespace: &Namespace,
) -> anyhow::Result<()> {
    match config.tier_at(place, Some(namespace)) {
        Some(_) => Ok(()),
        None => Err(refused(place, Some(namespace)).into()),
    }
}

fn refused(place: &ImagePlace, namespace: Option<&Namespace>) -> Failure {
    let whose = namespace.map_or_else(String::new, |namespace| {
        format!(" for namespace {namespace}")
    });
    Failure::Refused(format!(
        "{place} is no tier of images{whose}: add it to an [[images.tier]] in the node's configuration"
    ))
}

/// The layout of a place, with the access of its tier. Blocks.
pub(crate) fn open(
    config: &NodeConfig,
    tier: &Tier,
    place: &ImagePlace,
    tuning: Tuning,
) -> anyhow::Result<Layout> {
    // What a download of a dataset has in flight is what a node can take.
    let limits = Limits {
        concurrency: config.datasets.concurrency,
        part_size: config.datasets.part_size,
        tuning,
    };
    let runtime = Handle::current();
    let name = || format!("the tier {:?}", tier.url);
    match place {
        ImagePlace::Bucket { bucket, key } => {
            let opened = runtime.block_on(Bucket::open(&tier.access, bucket, key, limits));
            Ok(Layout::in_bucket(opened.with_context(name)?, runtime))
        }
        ImagePlace::Registry(repository) => {
            let access = Access {
                endpoint: tier.access.endpoint.clone(),
                ca_file: tier.access.ca_file.clone(),
                credentials_file: tier.access.credentials_file.clone(),
                anonymous: tier.access.anonymous,
            };
            let opened = Registry::open(&access, repository, limits);
            Ok(Layout::in_registry(opened.with_context(name)?, runtime))
        }
    }
}
