//! What is removed from a bucket, and who is killed at it: each tag that is still there is whole.

use std::{
    collections::BTreeSet,
    fs,
    path::PathBuf,
    sync::atomic::{AtomicUsize, Ordering::SeqCst},
    time::{Duration, SystemTime},
};

use rekindle_checkpoint::layout::{Layout, LayoutError};

use super::{
    nodes::{MIB, Nodes},
    proxy::{Lie, Op, Proxy},
};

const DAY: Duration = Duration::from_secs(24 * 3600);

/// Makes all that the bucket has older.
fn age(nodes: &Nodes, by: Duration) {
    for key in nodes.keys("") {
        let file = fs::File::options()
            .append(true)
            .open(nodes.there().join(key))
            .unwrap();
        let then = file.metadata().unwrap().modified().unwrap() - by;
        file.set_modified(then).unwrap();
    }
}

/// Takes each tag that there is to the other node, from `tags/` and from `index.json`.
fn assert_whole(nodes: &Nodes, layout: &Layout, why: &str) -> Vec<String> {
    let all = layout.all_tags().unwrap();
    for tag in &all {
        match nodes.pull(layout, tag) {
            Ok(pulled) => drop(pulled),
            Err(error) => panic!("{why}: {tag}: {}", super::chain(&error)),
        }
    }
    all
}

/// Three generations, of which the second shares with the first, and the third with none.
fn three(nodes: &Nodes, layout: &Layout) -> Vec<String> {
    let mut tags = Vec::new();
    for seed in [1, 1, 2] {
        let image = nodes.make(seed, 2 * MIB);
        nodes.push(layout, &image).unwrap();
        tags.push(layout.tag_for(&image));
    }
    tags
}

#[test]
fn a_tag_goes_at_once_and_its_blobs_when_nobody_can_need_them() {
    let nodes = Nodes::new();
    let layout = nodes.layout(nodes.address);
    let tags = three(&nodes, &layout);
    assert!(!layout.remove("team-a/never").unwrap());
    let before = nodes.keys("blobs/").len();
    assert!(layout.remove(&tags[0]).unwrap());
    assert!(layout.remove(&tags[2]).unwrap());
    assert_eq!(layout.all_tags().unwrap(), [tags[1].clone()]);
    let folder = Layout::open(&nodes.there()).unwrap();
    let refused = nodes.pull(&folder, &tags[0]).unwrap_err();
    assert!(
        matches!(refused, LayoutError::NoTag { .. }),
        "index.json: {refused}"
    );

    // Young, and then old; removed not long ago, and then long ago.
    assert_eq!(layout.collect(DAY, None).unwrap().blobs, 0);
    assert_eq!(nodes.keys("blobs/").len(), before);
    age(&nodes, 2 * DAY);
    let dry = layout.collect(DAY, Some(&[])).unwrap();
    assert_eq!(nodes.keys("blobs/").len(), before);
    let done = layout.collect(DAY, None).unwrap();
    assert_eq!((dry.blobs, dry.bytes), (done.blobs, done.bytes));
    assert!(done.bytes > 2 * MIB as u64, "{done:?}");
    assert_eq!(before - nodes.keys("blobs/").len(), done.blobs as usize);
    assert_eq!(assert_whole(&nodes, &layout, "removed"), [tags[1].clone()]);
    // A restore has noted something of an image that had just been removed, and long ago by now.
    let note = nodes.there().join("touches").join(&tags[0]);
    fs::create_dir_all(note.parent().unwrap()).unwrap();
    fs::write(&note, "note").unwrap();
    layout.collect(DAY, None).unwrap();
    assert!(note.exists());
    age(&nodes, 2 * DAY);
    layout.collect(DAY, None).unwrap();
    for left in ["removed/", "gc/", "uploads/", "touches/"] {
        assert_eq!(nodes.keys(left), Vec::<String>::new());
    }
    assert_eq!(layout.collect(DAY, None).unwrap().blobs, 0);
}

/// Whoever has read the tag still fetches the image, though the blobs are old and no tag needs them.
#[test]
fn what_was_removed_a_moment_ago_can_still_be_fetched() {
    let nodes = Nodes::new();
    let layout = nodes.layout(nodes.address);
    let image = nodes.make(1, 2 * MIB);
    nodes.push(&layout, &image).unwrap();
    age(&nodes, 9 * DAY);
    let tag = layout.tag_for(&image);
    let found = layout.find(Some(&tag)).unwrap();
    layout.remove(&tag).unwrap();
    let collected = layout.collect(DAY, None).unwrap();
    assert_eq!(collected.blobs, 0);
    let (namespace, name) = super::names();
    let into = nodes.folder.path().join("into");
    let counts = (&Default::default(), &Default::default());
    found
        .pull(&nodes.to, (&namespace, &name), None, &into, counts)
        .unwrap();
}

/// Blobs that an upload has written, and not tagged yet, are nobody's; so are those that it found there.
#[test]
fn an_upload_and_a_removal_do_not_meet() {
    let nodes = Nodes::new();
    let layout = nodes.layout(nodes.address);
    let image = nodes.make(1, 2 * MIB);
    nodes.push(&layout, &image).unwrap();
    let tag = layout.tag_for(&image);
    layout.remove(&tag).unwrap();
    age(&nodes, 2 * DAY);
    let before = nodes.keys("blobs/").len();
    // As if it were at it: all of its blobs are there, old, and no tag's.
    let note = nodes.there().join("uploads/1-1");
    fs::create_dir_all(note.parent().unwrap()).unwrap();
    fs::write(&note, "{}").unwrap();
    let collected = layout.collect(DAY, None).unwrap();
    assert!(
        collected.uploading && collected.blobs == 0 && collected.waiting > 0,
        "{collected:?}"
    );
    assert_eq!(nodes.keys("blobs/").len(), before);
    // One that was killed is not waited for for ever.
    age(&nodes, 2 * DAY);
    assert_eq!(layout.collect(DAY, None).unwrap().blobs, before as u64);

    // The other way round: a push does not trust in what is there while somebody removes.
    let note = nodes.there().join("gc/running");
    fs::create_dir_all(note.parent().unwrap()).unwrap();
    fs::write(&note, "{}").unwrap();
    let refused = nodes.push(&layout, &image).unwrap_err();
    assert!(matches!(refused, LayoutError::Busy { .. }), "{refused}");
    assert_eq!(nodes.keys("tags/"), Vec::<String>::new());
    let hour = SystemTime::now() - Duration::from_secs(3600);
    fs::File::options()
        .append(true)
        .open(&note)
        .unwrap()
        .set_modified(hour)
        .unwrap();
    nodes.push(&layout, &image).unwrap();
    assert_whole(&nodes, &layout, "pushed again");
}

/// A removal that begins while an upload waits at some request, and the other way round, for each request of the upload.
#[test]
fn a_removal_in_the_midst_of_an_upload_leaves_it_whole() {
    for nth in 1.. {
        let nodes = Nodes::new();
        let sound = nodes.layout(nodes.address);
        let image = nodes.make(1, MIB);
        nodes.push(&sound, &image).unwrap();
        sound.remove(&sound.tag_for(&image)).unwrap();
        age(&nodes, 2 * DAY);
        let seen = std::sync::Arc::new(AtomicUsize::new(0));
        let (count, address) = (std::sync::Arc::clone(&seen), nodes.address);
        let collecting = nodes.layout(address);
        let collecting = std::sync::Mutex::new(Some(collecting));
        let proxy = Proxy::start(address, move |_| {
            if count.fetch_add(1, SeqCst) + 1 == nth
                && let Some(layout) = collecting.lock().unwrap().take()
            {
                layout.collect(DAY, None).unwrap();
            }
            Lie::None
        });
        nodes.push(&nodes.layout(proxy.address), &image).unwrap();
        assert_eq!(
            assert_whole(&nodes, &sound, &format!("request {nth}")).len(),
            1
        );
        if seen.load(SeqCst) < nth {
            println!("removed in the midst of an upload of {} requests", nth - 1);
            return;
        }
    }
}

/// Killed behind each request of a removal and of what follows it: each tag that is there is whole.
#[test]
fn killed_anywhere_it_leaves_each_tag_whole() {
    for last in 0.. {
        let nodes = Nodes::new();
        let sound = nodes.layout(nodes.address);
        let tags = three(&nodes, &sound);
        age(&nodes, 2 * DAY);
        let seen = AtomicUsize::new(0);
        let proxy = Proxy::start(nodes.address, move |_| {
            match seen.fetch_add(1, SeqCst) < last {
                true => Lie::None,
                false => Lie::GoAway,
            }
        });
        let layout = nodes.layout(proxy.address);
        let removed = layout
            .remove(&tags[0])
            .and_then(|_| layout.remove(&tags[2]))
            // So that its blobs go at once, which is as far as it can come.
            .and_then(|_| layout.collect(Duration::ZERO, None));
        let why = format!("it went away after {last} requests");
        let left = assert_whole(&nodes, &sound, &why);
        assert!(left.contains(&tags[1]), "{why}");
        // And the next one does the rest.
        for tag in [&tags[0], &tags[2]] {
            sound.remove(tag).unwrap();
        }
        age(&nodes, 2 * DAY);
        sound.collect(DAY, None).unwrap();
        assert_eq!(assert_whole(&nodes, &sound, &why), [tags[1].clone()]);
        let needed: BTreeSet<PathBuf> = nodes
            .keys("blobs/")
            .into_iter()
            .map(PathBuf::from)
            .collect();
        assert_eq!(
            sound.collect(Duration::ZERO, None).unwrap().blobs,
            0,
            "{why}: {needed:?}"
        );
        if removed.is_ok() {
            assert!(proxy.count(Op::Delete) > 4);
            println!("removed after {last} stores that went away");
            return;
        }
    }
}

/// A tag that nobody understands needs nobody knows what.
#[test]
fn a_tag_that_is_not_understood_keeps_all_blobs() {
    for (text, words) in [
        ("{}", "cannot be understood"),
        (
            r#"{"mediaType":"x","digest":"md5:1","size":1}"#,
            "its digest is none",
        ),
    ] {
        let nodes = Nodes::new();
        let layout = nodes.layout(nodes.address);
        let tags = three(&nodes, &layout);
        layout.remove(&tags[0]).unwrap();
        age(&nodes, 2 * DAY);
        fs::write(nodes.there().join("tags/other"), text).unwrap();
        let before = nodes.keys("blobs/").len();
        let refused = layout.collect(DAY, None).unwrap_err();
        assert!(
            super::chain(&refused).contains(words),
            "{}",
            super::chain(&refused)
        );
        assert_eq!(nodes.keys("blobs/").len(), before);
        fs::remove_file(nodes.there().join("tags/other")).unwrap();
        assert_whole(&nodes, &layout, words);
    }
}
