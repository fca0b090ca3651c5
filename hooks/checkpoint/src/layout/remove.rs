//! What goes from a bucket: tags, and, when nobody can need them any more, blobs.
//!
//! ```text
//!  tags/<tag> ──remove──▶ removed/<tag> ──a time of grace──▶ its blobs, unless another tag needs them ──▶ nothing
//! ```
//! Failure contract: whoever is killed, wherever that is, leaves every tag whole that is still there. A tag goes before
//! what it needs, `tags/` before `index.json`, and a blob only when no tag of either and none that was removed within the
//! grace needs it. So whoever has just read a tag has that long to fetch its image, and a container whose memory still
//! comes from there.
//!
//! What an upload has written and not tagged yet is younger than the grace. What it found there and did not write may be
//! old and needed by nobody else: for that an upload puts a note into `uploads/`, and then looks for one in `gc/`, and
//! waits while there is one; who removes puts one into `gc/`, and then looks into `uploads/`, and does so again every few
//! requests, and stops when there is one. One of the two sees the other. Times are the store's own, so no node's clock
//! matters; only who stands still between two requests for longer than [`LONGEST_REMOVAL`] is not waited for.

use std::{
    collections::{BTreeMap, BTreeSet},
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use bytes::Bytes;
use futures::{StreamExt as _, TryStreamExt as _, stream};
use rekindle_core::name::Namespace;
use rekindle_store::s3::{Condition, Object, S3Error, Small};
use serde_json::Value;

use super::{
    BLOBS, BlobDigest, BlobFault, Descriptor, INDEX_JSON, Layout, LayoutError, MAX_INDEX_JSON,
    MAX_OCI_MANIFEST, REF_NAME,
    away::{Away, MAX_TAGS, Told},
    bucket::{NOTES, ROUNDS, Remote, TAGS, tag_tells},
};
use crate::manifest::shorten;

/// Tags that were removed, with the descriptors that they had.
const REMOVED: &str = "removed/";
/// Who is adding an image.
const UPLOADS: &str = "uploads/";
/// Who removes blobs.
const RUNNING: &str = "gc/running";
/// Most blobs that are looked through.
const MAX_BLOBS: usize = 4_000_000;
/// An upload that takes longer was killed.
const LONGEST_UPLOAD: Duration = Duration::from_secs(24 * 3600);
/// Who removes stops then, and goes on the next time: an upload does not wait for one that was killed for ever.
const LONGEST_REMOVAL: Duration = Duration::from_secs(600);
/// How many blobs are removed before it is looked again whether somebody wants to add to the bucket.
const AT_ONCE: usize = 64;
/// How often an upload looks whether somebody still removes, and how long it waits between. Who is told of an upload stops
/// within some requests; who was killed is not waited for by people.
const LOOKS: u32 = 40;
const PAUSE: Duration = Duration::from_millis(250);
/// How deep an index may name others.
const MAX_DEPTH: usize = 4;

/// Which tags go.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Rules {
    /// Of each name, those beyond so many newest ones.
    pub keep: Option<usize>,
    /// Those that were made longer ago, but for the newest of each name.
    pub older_than: Option<Duration>,
}

/// The tags among `tags` that go by `rules`, `now` seconds after 1970. Only `NAMESPACE/NAME@CREATED-DIGEST` says when it
/// was made and of what it is a generation: what somebody has called otherwise stays. Of namespaces that `ours` does not
/// hold, all stay.
pub fn expired(
    tags: &[String],
    rules: Rules,
    ours: impl Fn(&Namespace) -> bool,
    now: u64,
) -> Vec<String> {
    let mut names: BTreeMap<_, Vec<(u64, &String)>> = BTreeMap::new();
    for tag in tags {
        let told = tag_tells(tag).filter(|told| ours(&told.namespace));
        if let Some(Told {
            namespace,
            image: Some((name, when)),
        }) = told
        {
            names
                .entry((namespace, name))
                .or_default()
                .push((when, tag));
        }
    }
    let mut gone = Vec::new();
    for generations in names.values_mut() {
        // As `newest` has it: of one second, the greatest.
        generations.sort_unstable_by(|a, b| b.cmp(a));
        for (nth, (when, tag)) in generations.iter().enumerate().skip(1) {
            let beyond = rules.keep.is_some_and(|keep| nth >= keep);
            let old = rules
                .older_than
                .is_some_and(|than| now.saturating_sub(*when) > than.as_secs());
            if beyond || old {
                gone.push((*tag).clone());
            }
        }
    }
    gone
}

/// What became of the blobs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Collected {
    /// Those that were removed, or would be.
    pub blobs: u64,
    /// Bytes of these.
    pub bytes: u64,
    /// Bytes of those that no tag needs, and that stay until their grace is over.
    pub waiting: u64,
    /// Whether all stay, because somebody adds an image just now.
    pub uploading: bool,
}

/// A note that an image is being added. Dropped, it is removed.
#[derive(Debug)]
pub(super) struct Upload<'a> {
    remote: &'a Remote,
    key: String,
}

impl Drop for Upload<'_> {
    fn drop(&mut self) {
        // One that stays ends with its age.
        let _ = self.remote.wait(self.remote.bucket.delete(&self.key));
    }
}

impl Remote {
    /// Says that an image is being added, and waits until nobody removes blobs any more.
    pub(super) fn announce(&self, layout: &Layout) -> Result<Upload<'_>, LayoutError> {
        let now = SystemTime::now()
            .duration_since(UNIX_EPOCH)
            .unwrap_or_default();
        let key = format!("{UPLOADS}{:x}-{:x}", now.as_nanos(), std::process::id());
        self.write(&key, b"{}")?;
        let upload = Upload { remote: self, key };
        for _ in 0..LOOKS {
            let removing = self.objects(RUNNING, 1)?;
            let Some(running) = removing.first() else {
                return Ok(upload);
            };
            let ours = self.objects(&upload.key, 1)?;
            // Twice, for it looks at its clock only between some requests.
            if ours
                .first()
                .is_some_and(|ours| age(ours, running) > 2 * LONGEST_REMOVAL)
            {
                return Ok(upload);
            }
            self.wait(async { tokio::time::sleep(PAUSE).await });
        }
        Err(layout.busy())
    }

    fn objects(&self, start: &str, max: usize) -> Result<Vec<Object>, S3Error> {
        self.wait(self.bucket.objects(start, max))
    }

    /// Takes a tag out of `index.json`.
    fn forget(&self, layout: &Layout, tag: &str) -> Result<(), LayoutError> {
        for _ in 0..ROUNDS {
            let Some(Small { bytes, etag }) = self.small(INDEX_JSON, MAX_INDEX_JSON)? else {
                return Ok(());
            };
            let mut index: Value = layout.json(INDEX_JSON, &bytes)?;
            let Some(manifests) = index.get_mut("manifests").and_then(Value::as_array_mut) else {
                return Ok(());
            };
            let before = manifests.len();
            manifests.retain(|of| of["annotations"][REF_NAME] != tag);
            if manifests.len() == before {
                return Ok(());
            }
            let condition = etag.map_or(Condition::Always, Condition::Is);
            let text = Bytes::from(index.to_string());
            if self.wait(self.bucket.put(INDEX_JSON, text, &condition))? {
                return Ok(());
            }
        }
        Err(layout.kept("others change its index.json all the time: try it again"))
    }
}

/// How much later the first was written than the second. What the store does not date is as new as can be.
fn age(now: &Object, then: &Object) -> Duration {
    let seconds = now
        .modified
        .zip(then.modified)
        .map(|(now, then)| now.saturating_sub(then));
    Duration::from_secs(u64::try_from(seconds.unwrap_or(0)).unwrap_or(0))
}

impl Layout {
    fn remote(&self) -> Result<&Remote, LayoutError> {
        let remote = self.away().and_then(Away::bucket);
        remote.ok_or_else(|| self.kept("only buckets are tidied, and it is none"))
    }

    fn busy(&self) -> LayoutError {
        LayoutError::Busy {
            path: self.path.clone(),
            note: RUNNING,
            minutes: 2 * LONGEST_REMOVAL.as_secs() / 60,
        }
    }

    fn kept(&self, reason: &str) -> LayoutError {
        LayoutError::Kept {
            path: self.path.clone(),
            reason: reason.to_owned(),
        }
    }

    /// All tags that lead to an image: those of `tags/`, and those that only `index.json` has.
    ///
    /// # Errors
    /// What the store says.
    pub fn all_tags(&self) -> Result<Vec<String>, LayoutError> {
        let mut all: BTreeSet<String> = self.remote()?.tags()?.into_iter().collect();
        let indexed = self.tags()?;
        all.extend(
            indexed
                .iter()
                .filter_map(Descriptor::tag)
                .map(str::to_owned),
        );
        Ok(all.into_iter().collect())
    }

    /// Removes a tag; false when there is none. Its blobs stay for [`Layout::collect`].
    ///
    /// # Errors
    /// What the store says.
    pub fn remove(&self, tag: &str) -> Result<bool, LayoutError> {
        let remote = self.remote()?;
        let found = match remote.tag(self, tag)? {
            Some(of) => Some(of),
            None => self.tags()?.into_iter().find(|of| of.tag() == Some(tag)),
        };
        let Some(of) = found else { return Ok(false) };
        let text = serde_json::to_vec(&of).map_err(|e| self.unwritable(&e))?;
        remote.write(&format!("{REMOVED}{tag}"), &text)?;
        remote.wait(remote.bucket.delete(&format!("{TAGS}{tag}")))?;
        remote.forget(self, tag)?;
        remote.wait(remote.bucket.delete(&format!("{NOTES}{tag}")))?;
        Ok(true)
    }

    /// Removes the blobs that no tag needs, and that no tag which was removed within `grace` has needed. With `dry_run` it
    /// only says which would go, as if the tags of `going` were removed long ago.
    ///
    /// # Errors
    /// What the store says; [`LayoutError::Kept`] when a tag cannot be understood: nobody knows what it needs then.
    pub fn collect(
        &self,
        grace: Duration,
        dry_run: Option<&[String]>,
    ) -> Result<Collected, LayoutError> {
        let remote = self.remote()?;
        let begun = Instant::now();
        if let Some(going) = dry_run {
            let now = SystemTime::now()
                .duration_since(UNIX_EPOCH)
                .unwrap_or_default();
            let now = dated(now.as_secs().cast_signed());
            let (doomed, collected) = self.doomed(remote, &now, grace, going)?;
            drop(doomed);
            return Ok(collected);
        }
        remote.write(RUNNING, b"{}")?;
        let now = remote.objects(RUNNING, 1)?.pop();
        let now =
            now.ok_or_else(|| self.kept("what is written to the store is not in its listing"))?;
        let collected = self.sweep_blobs(remote, &now, grace, begun);
        // A note that stays is over in two hours.
        let _ = remote.wait(remote.bucket.delete(RUNNING));
        collected
    }

    fn sweep_blobs(
        &self,
        remote: &Remote,
        now: &Object,
        grace: Duration,
        begun: Instant,
    ) -> Result<Collected, LayoutError> {
        let uploads = remote.objects(UPLOADS, MAX_TAGS)?;
        let (dead, alive): (Vec<_>, Vec<_>) = uploads
            .into_iter()
            .partition(|upload| age(now, upload) > LONGEST_UPLOAD);
        for upload in dead {
            remote.wait(remote.bucket.delete(&upload.key))?;
        }
        let removed = remote.objects(REMOVED, MAX_TAGS)?;
        let (doomed, mut collected) = self.doomed(remote, now, grace, &[])?;
        if !alive.is_empty() {
            return Ok(Collected {
                waiting: collected.waiting + collected.bytes,
                uploading: true,
                ..Collected::default()
            });
        }
        (collected.blobs, collected.bytes) = (0, 0);
        for some in doomed.chunks(AT_ONCE) {
            collected.uploading = !remote.objects(UPLOADS, MAX_TAGS)?.is_empty();
            if collected.uploading || begun.elapsed() > LONGEST_REMOVAL {
                collected.waiting +=
                    doomed.iter().map(|blob| blob.size).sum::<u64>() - collected.bytes;
                return Ok(collected);
            }
            let deleting = stream::iter(some)
                .map(|blob| remote.bucket.delete(&blob.key))
                .buffer_unordered(remote.requests().max(1));
            remote.wait(deleting.try_collect::<()>())?;
            collected.blobs += some.len() as u64;
            collected.bytes += some.iter().map(|blob| blob.size).sum::<u64>();
        }
        // A restore may have noted something of an image that had just been removed.
        let tags: BTreeSet<String> = remote.tags()?.into_iter().collect();
        for note in remote.objects(NOTES, MAX_TAGS)? {
            let of = note.key.strip_prefix(NOTES).unwrap_or_default();
            if !tags.contains(of) && age(now, &note) >= grace {
                remote.wait(remote.bucket.delete(&note.key))?;
            }
        }
        // What was removed is forgotten when nothing is left of it.
        for tag in removed.iter().filter(|tag| age(now, tag) >= grace) {
            remote.wait(remote.bucket.delete(&tag.key))?;
        }
        Ok(collected)
    }

    /// The blobs that may go.
    fn doomed(
        &self,
        remote: &Remote,
        now: &Object,
        grace: Duration,
        going: &[String],
    ) -> Result<(Vec<Object>, Collected), LayoutError> {
        // Listed before the tags: what is added later is not among them.
        let blobs = remote.objects(&format!("{BLOBS}/"), MAX_BLOBS)?;
        let needed = self.needed(remote, now, grace, going)?;
        let mut collected = Collected::default();
        let unneeded = blobs.into_iter().filter(|blob| !needed.contains(&blob.key));
        let (doomed, young): (Vec<_>, Vec<_>) =
            unneeded.partition(|blob| blob.modified.is_some() && age(now, blob) >= grace);
        collected.blobs = doomed.len() as u64;
        collected.bytes = doomed.iter().map(|blob| blob.size).sum();
        collected.waiting = young.iter().map(|blob| blob.size).sum();
        Ok((doomed, collected))
    }

    /// The keys of the blobs that a tag needs, or one has needed that was removed not long ago.
    fn needed(
        &self,
        remote: &Remote,
        now: &Object,
        grace: Duration,
        going: &[String],
    ) -> Result<BTreeSet<String>, LayoutError> {
        let mut needed = BTreeSet::new();
        let mut roots = Vec::new();
        // In this order: a tag that is removed meanwhile is found where it went to.
        for tag in remote.tags()? {
            if !going.contains(&tag) {
                roots.extend(remote.tag(self, &tag)?);
            }
        }
        let indexed = self.tags()?.into_iter();
        roots.extend(indexed.filter(|of| {
            !of.tag()
                .is_some_and(|tag| going.iter().any(|gone| gone == tag))
        }));
        for removed in remote.objects(REMOVED, MAX_TAGS)? {
            if age(now, &removed) < grace
                && let Some(found) = remote.small(&removed.key, super::bucket::MAX_TAG_BYTES)?
            {
                roots.push(self.json(&removed.key, &found.bytes)?);
            }
        }
        for of in roots {
            self.follow(&of, MAX_DEPTH, &mut needed)?;
        }
        Ok(needed)
    }

    /// Adds what a descriptor leads to. It may be another's artifact.
    fn follow(
        &self,
        of: &Descriptor,
        depth: usize,
        needed: &mut BTreeSet<String>,
    ) -> Result<(), LayoutError> {
        let what = of.tag().unwrap_or(&of.digest);
        let lost = |reason: &str| {
            let reason = format!("nobody knows which blobs {} needs: {reason}", shorten(what));
            self.kept(&reason)
        };
        let digest: BlobDigest = of.digest.parse().map_err(|_| lost("its digest is none"))?;
        if !needed.insert(digest.path()) {
            return Ok(());
        }
        let bytes = match self.small_blob(what, of, MAX_OCI_MANIFEST) {
            Ok(bytes) => bytes,
            // Whoever pulls it is told of that; it needs no more.
            Err(LayoutError::Blob {
                fault: BlobFault::Absent,
                ..
            }) => return Ok(()),
            Err(LayoutError::Blob { .. }) => return Err(lost("its manifest is damaged")),
            Err(other) => return Err(other),
        };
        let value: Value =
            serde_json::from_slice(&bytes).map_err(|_| lost("its manifest is no JSON"))?;
        let list = |key: &str| {
            value
                .get(key)
                .and_then(Value::as_array)
                .into_iter()
                .flatten()
        };
        let leaves = list("layers")
            .chain(list("blobs"))
            .chain(value.get("config"));
        for leaf in leaves {
            let digest = leaf["digest"]
                .as_str()
                .and_then(|text| text.parse::<BlobDigest>().ok());
            let digest = digest.ok_or_else(|| lost("its manifest names a blob by no digest"))?;
            needed.insert(digest.path());
        }
        for nested in list("manifests").chain(value.get("subject")) {
            if depth == 0 {
                return Err(lost("its indexes name each other too deep"));
            }
            let nested: Descriptor = serde_json::from_value(nested.clone())
                .map_err(|_| lost("its index names something by no descriptor"))?;
            self.follow(&nested, depth - 1, needed)?;
        }
        Ok(())
    }
}

/// An object that was written then.
fn dated(modified: i64) -> Object {
    Object {
        key: String::new(),
        size: 0,
        modified: Some(modified),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_of_a_name_stay_and_what_is_called_otherwise() {
        let tags = [
            "team-a/warm@100-aaaaaaaaaaaa",
            "team-a/warm@300-aaaaaaaaaaaa",
            "team-a/warm@200-aaaaaaaaaaaa",
            "team-a/warm@200-bbbbbbbbbbbb",
            "team-a/other@50-aaaaaaaaaaaa",
            "team-b/warm@1-aaaaaaaaaaaa",
            "team-b/warm@2-aaaaaaaaaaaa",
            "team-a/release",
            "team-a/warm@1",
            "warm@1-aaaaaaaaaaaa",
        ]
        .map(str::to_owned);
        let gone = |rules| expired(&tags, rules, |owner| owner.as_str() == "team-a", 1000);
        let keep = |keep| Rules {
            keep: Some(keep),
            older_than: None,
        };
        assert_eq!(gone(Rules::default()), Vec::<String>::new());
        assert_eq!(
            gone(keep(2)),
            [
                "team-a/warm@200-aaaaaaaaaaaa",
                "team-a/warm@100-aaaaaaaaaaaa"
            ]
        );
        assert_eq!(gone(keep(4)), Vec::<String>::new());
        let old = Rules {
            keep: None,
            older_than: Some(Duration::from_secs(800)),
        };
        assert_eq!(gone(old), ["team-a/warm@100-aaaaaaaaaaaa"]);
        // The last of a name is the only way to its image.
        let all = Rules {
            keep: None,
            older_than: Some(Duration::ZERO),
        };
        assert_eq!(gone(all).len(), 3);
    }
}
