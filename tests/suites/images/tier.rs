//! Images that are in a bucket, and not on the node.

use crate::stage::{BUCKET, POLICY, RESTORE_FROM, Stage, one_sentence};
use anyhow::{Context, Result, ensure};
use rekindle_harness::Count;
use rekindle_harness::cri::Pod;
use std::fs;

/// A counter of a namespace, checkpointed and gone: what it said last.
async fn image(stage: &Stage, namespace: &str, name: &str) -> Result<Count> {
    let cri = stage.node.cri().await?;
    let pod = cri.pod(name).namespace(namespace).run().await?;
    let task = pod.container("main").args(&["/counter"]).run().await?;
    task.counts_to(3).await?;
    stage
        .checkpoint(&format!("{namespace}/{name}/main"), name, &["--exit"])
        .await?;
    task.ended().await?;
    let last = Count::last(&task.said("stdout")?).context("the counter said nothing")?;
    pod.remove().await?;
    Ok(last)
}

/// Has an image in its tier, and not on the node any more.
async fn carry_off(stage: &Stage, image: &str) -> Result<()> {
    let place = format!("s3://{BUCKET}/afar/");
    for args in [
        &["image", "push", image, &place][..],
        &["image", "rm", image],
    ] {
        let output = stage.rekindle(args).await?;
        ensure!(output.status.success(), "{args:?}: {output:?}");
    }
    Ok(())
}

async fn pod<'n>(stage: &'n Stage, id: &str, namespace: &str, image: &str) -> Result<Pod<'n>> {
    let cri = stage.node.cri().await?;
    let pod = cri.pod(id).namespace(namespace);
    pod.annotation(RESTORE_FROM, image).run().await
}

/// A pod continues from an image of namespace `afar`.
async fn continues(stage: &Stage, id: &str, image: &str, at: &Count) -> Result<()> {
    let pod = pod(stage, id, "afar", image).await?;
    let task = pod.container("main").args(&["/counter"]).run().await?;
    task.counts_to(at.n + 3).await?;
    at.continues_in(&task.said("stdout")?, at.n)?;
    pod.remove().await
}

/// The generations of an image of `afar` that are on the node.
async fn here(stage: &Stage, name: &str) -> Result<Vec<u64>> {
    let output = stage
        .rekindle(&["image", "ls", "-n", "afar", "--json"])
        .await?;
    let rows: Vec<serde_json::Value> = serde_json::from_slice(&output.stdout)?;
    let of_name = rows.iter().filter(|row| row["name"] == name);
    Ok(of_name
        .filter_map(|row| row["generation"].as_u64())
        .collect())
}

pub(crate) async fn a_miss_is_fetched_and_stays(stage: &Stage) -> Result<()> {
    let at = image(stage, "afar", "fetched").await?;
    carry_off(stage, "afar/fetched").await?;
    assert_eq!(here(stage, "fetched").await?, Vec::<u64>::new());
    continues(stage, "fetched-2", "fetched", &at).await?;
    // The number of one that is gone never means another image.
    assert_eq!(here(stage, "fetched").await?, [2]);
    // A container may run before all of it is here.
    for command in ["fetch", "verify"] {
        let done = stage.rekindle(&["image", command, "afar/fetched"]).await?;
        ensure!(done.status.success(), "{done:?}");
    }
    // On the node it is found without its tier.
    let bucket = stage.node.path("/srv/s3").join(BUCKET).join("afar");
    fs::remove_dir_all(bucket.join("tags/afar"))?;
    continues(stage, "fetched-3", "fetched", &at).await?;
    assert_eq!(here(stage, "fetched").await?, [2]);
    Ok(())
}

pub(crate) async fn many_pods_fetch_once(stage: &Stage) -> Result<()> {
    let at = image(stage, "afar", "fetched-once").await?;
    carry_off(stage, "afar/fetched-once").await?;
    let started = |id: &'static str| continues(stage, id, "fetched-once", &at);
    let (a, b, c) = tokio::join!(
        started("fetched-once-a"),
        started("fetched-once-b"),
        started("fetched-once-c")
    );
    a.and(b).and(c)?;
    assert_eq!(here(stage, "fetched-once").await?, [2]);
    Ok(())
}

pub(crate) async fn a_tier_that_fails_is_a_miss(stage: &Stage) -> Result<()> {
    let pod = pod(stage, "nowhere-1", "nowhere", "never-made").await?;
    let task = pod.container("main").args(&["/counter"]).create().await?;
    let refusal = task.start().await.err().context("started from nothing")?;
    let words = [
        "no image nowhere/never-made",
        "image never-made: ",
        "gave up after 4 attempts",
    ];
    one_sentence(&refusal, &words)?;
    pod.remove().await?;
    cold(stage, "nowhere-2", "nowhere").await
}

pub(crate) async fn what_a_tier_does_not_have_is_a_miss(stage: &Stage) -> Result<()> {
    let pod = pod(stage, "afar-none", "afar", "never-made").await?;
    let task = pod.container("main").args(&["/counter"]).create().await?;
    let refusal = task.start().await.err().context("started from nothing")?;
    one_sentence(
        &refusal,
        &["no image afar/never-made", "has no image with the tag"],
    )?;
    pod.remove().await?;
    cold(stage, "afar-cold", "afar").await
}

/// A pod that can do without its image starts without it.
async fn cold(stage: &Stage, id: &str, namespace: &str) -> Result<()> {
    let cri = stage.node.cri().await?;
    let pod = cri.pod(id).namespace(namespace);
    let pod = pod.annotation(RESTORE_FROM, "never-made");
    let pod = pod.annotation(POLICY, "Opportunistic").run().await?;
    let task = pod.container("main").args(&["/counter"]).run().await?;
    task.counts_to(2).await?;
    assert!(task.said("stdout")?.contains(" 1\n"));
    pod.remove().await
}

pub(crate) async fn another_namespaces_image_under_its_name_is_refused(
    stage: &Stage,
) -> Result<()> {
    image(stage, "afar", "changeling").await?;
    carry_off(stage, "afar/changeling").await?;
    let tags = stage
        .node
        .path("/srv/s3")
        .join(BUCKET)
        .join("afar/tags/afar");
    for entry in fs::read_dir(&tags)? {
        let path = entry?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        if let Some(when) = name.strip_prefix("changeling@") {
            fs::copy(&path, tags.join(format!("stolen@{when}")))?;
        }
    }
    let pod = pod(stage, "stolen", "afar", "stolen").await?;
    let task = pod.container("main").args(&["/counter"]).create().await?;
    let refusal = task.start().await.err().context("it was started")?;
    one_sentence(&refusal, &["its manifest says that it is afar/changeling"])?;
    assert_eq!(here(stage, "stolen").await?, Vec::<u64>::new());
    pod.remove().await
}
