//! A wrong annotation keeps the sandbox from running, in one sentence; `try_run` sees to it that nothing stays of it.

use anyhow::{Context, Result, ensure};
use rekindle_harness::cri::Cri;

/// Runs a pod with one annotation, and wants a refusal with all of `words` in one line.
async fn refused(cri: &Cri<'_>, name: &str, key: &str, value: &str, words: &[&str]) -> Result<()> {
    let answer = cri.pod(name).annotation(key, value).try_run().await?;
    let refusal = answer
        .err()
        .with_context(|| format!("a pod with {key}={value} was run"))?;
    let text = refusal.message();
    ensure!(
        !text.trim().contains('\n'),
        "the refusal is more than a line: {text:?}"
    );
    for word in words {
        ensure!(
            text.contains(word),
            "{word:?} is not in the refusal: {text}"
        );
    }
    Ok(())
}

pub(crate) async fn an_unknown_key_is_refused_by_name(cri: &Cri<'_>) -> Result<()> {
    refused(
        cri,
        "unknown-key",
        "rekindle.dev/restore-form",
        "warm",
        &["rekindle.dev/restore-form"],
    )
    .await
}

pub(crate) async fn a_bad_uri_is_refused(cri: &Cri<'_>) -> Result<()> {
    for (at, uri) in [
        "ftp://models/x/",
        "s3://models/../secrets/",
        "s3:/models",
        "",
    ]
    .iter()
    .enumerate()
    {
        refused(
            cri,
            &format!("bad-uri-{at}"),
            "rekindle.dev/dataset",
            uri,
            &["rekindle.dev/dataset"],
        )
        .await?;
    }
    Ok(())
}

pub(crate) async fn a_mount_that_climbs_is_refused(cri: &Cri<'_>) -> Result<()> {
    for (at, path) in ["/data/../etc", "data", "/proc/1", "/"].iter().enumerate() {
        let key = "rekindle.dev/dataset-mount";
        let pod = cri
            .pod(&format!("climbing-mount-{at}"))
            .annotation("rekindle.dev/dataset", "s3://models/x/");
        let refusal = pod
            .annotation(key, path)
            .try_run()
            .await?
            .err()
            .context("the mount was accepted")?;
        ensure!(
            refusal.message().contains(key) && refusal.message().contains(path),
            "{refusal}"
        );
    }
    Ok(())
}

pub(crate) async fn an_image_name_that_climbs_is_refused(cri: &Cri<'_>) -> Result<()> {
    for (at, name) in ["../other", "a/b/c", "/etc", "warm@0", "warm@new"]
        .iter()
        .enumerate()
    {
        let key = "rekindle.dev/restore-from";
        refused(cri, &format!("climbing-name-{at}"), key, name, &[key, name]).await?;
    }
    Ok(())
}

pub(crate) async fn a_policy_that_is_none_is_refused(cri: &Cri<'_>) -> Result<()> {
    let key = "rekindle.dev/restore-policy";
    let pod = cri
        .pod("no-policy")
        .annotation("rekindle.dev/restore-from", "warm")
        .annotation(key, "Maybe");
    let refusal = pod
        .try_run()
        .await?
        .err()
        .context("the policy was accepted")?;
    for word in [key, "Maybe", "Required", "Opportunistic"] {
        ensure!(
            refusal.message().contains(word),
            "{word} is not in the refusal: {refusal}"
        );
    }
    Ok(())
}

pub(crate) async fn what_this_build_lacks_is_refused(cri: &Cri<'_>) -> Result<()> {
    let key = "rekindle.dev/dataset";
    let words = [key, "hf://", "this build has no source for"];
    refused(cri, "not-yet", key, "hf://org/model", &words).await
}

pub(crate) async fn other_annotations_are_nobodys_business(cri: &Cri<'_>) -> Result<()> {
    let pod = cri
        .pod("others")
        .annotation("example.com/rekindle.dev", "x")
        .annotation("rekindle.development/x", "y");
    let pod = pod.run().await?;
    let one = pod.container("one").shell("exit 0").run().await?;
    assert_eq!(one.ended().await?.exit_code, 0);
    pod.remove().await
}
