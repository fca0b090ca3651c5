//! The downloading process dies; another one waits for it.

use std::{
    path::Path,
    process::{Child, Command, Stdio},
    sync::{Arc, atomic::Ordering::SeqCst},
    time::Duration,
};

use rekindle_core::config::NodeConfig;
use rekindle_dataset::{Cache, Event, Tuning, acquire};

use crate::{
    liar::{Fault, Liar, Object, Op, PATIENCE},
    node::{MIB, Node, config_text, pattern, read},
};

const CONFIG: &str = "REKINDLE_TEST_CONFIG";
/// Parts of the object, and those that are served before the rest is held at the gate.
const PARTS: usize = 24;
const FREE: usize = 12;
/// `concurrency` in the node's configuration: parts that may be in flight.
const IN_FLIGHT: usize = 4;

/// A process of its own that acquires the dataset.
fn downloader(config: &Path) -> Child {
    Command::new(std::env::current_exe().unwrap())
        .args([
            "--exact",
            "kill::the_downloading_process",
            "--ignored",
            "--nocapture",
        ])
        .env(CONFIG, config)
        .stdout(Stdio::null())
        .spawn()
        .unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "run by the tests that kill it"]
async fn the_downloading_process() {
    let path = std::env::var(CONFIG).unwrap();
    let text = std::fs::read_to_string(&path).unwrap();
    let config = NodeConfig::parse(&path, &text).unwrap();
    let uri = "s3://bucket/m/".parse().unwrap();
    let patient = Tuning {
        stall: PATIENCE,
        ..Tuning::default()
    };
    let ended = acquire(&config, &uri, &"default".parse().unwrap(), patient, &|_| {}).await;
    ended.unwrap();
}

fn held_store(bytes: Vec<u8>) -> Arc<Liar> {
    Liar::start(vec![("m/a", Object::new(bytes))], |request, _| {
        match request.op == Op::Get && request.nth > FREE {
            true => Fault::Hold(MIB / 2),
            false => Fault::Serve,
        }
    })
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_waits_takes_over_from_who_is_killed() {
    let bytes = pattern(1, PARTS * MIB);
    let store = held_store(bytes.clone());
    let node = Arc::new(Node::new(store.address));
    let config = node.folder.path().join("config.toml");
    let text = config_text(&node.folder, &node.config.datasets.root, store.address, "");
    std::fs::write(&config, text).unwrap();

    let mut holder = downloader(&config);
    let watching = Arc::clone(&store);
    // All its workers hang in a part: every earlier part is in the journal.
    tokio::task::spawn_blocking(move || watching.wait_for_held(IN_FLIGHT))
        .await
        .unwrap();

    let waiting = Arc::clone(&node);
    let joiner = tokio::spawn(async move { waiting.acquire("s3://bucket/m/").await });
    let seen = async {
        while !node.events.lock().unwrap().iter().any(
            |event| matches!(event, Event::Progress(progress) if progress.done >= (FREE * MIB) as u64),
        ) {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    tokio::time::timeout(PATIENCE, seen)
        .await
        .expect("the holder's progress is reported");
    assert_eq!(
        store.count(Op::Get),
        FREE + IN_FLIGHT,
        "who waits downloads nothing"
    );
    node.assert_nothing_published("a download that is not done");

    holder.kill().unwrap();
    holder.wait().unwrap();
    store.open_gate();
    let ready = tokio::time::timeout(PATIENCE, joiner)
        .await
        .unwrap()
        .unwrap()
        .unwrap();
    assert!(read(&ready, "a") == bytes);
    assert!(!ready.hit, "it downloaded the rest itself");
    let again = store.served.load(SeqCst) - bytes.len() as u64;
    assert!(
        again <= (IN_FLIGHT * MIB) as u64,
        "{again} bytes were fetched twice"
    );
    let cache = Cache::open(&node.config.datasets);
    let info = cache.at(&ready.path).unwrap().unwrap();
    assert_eq!(cache.verify(&info, |_| {}).unwrap(), []);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_journal_that_claims_too_much_is_not_believed() {
    let bytes = pattern(2, PARTS * MIB);
    let store = held_store(bytes.clone());
    let node = Node::new(store.address);
    let config = node.folder.path().join("config.toml");
    let text = config_text(&node.folder, &node.config.datasets.root, store.address, "");
    std::fs::write(&config, text).unwrap();
    let mut holder = downloader(&config);
    let watching = Arc::clone(&store);
    tokio::task::spawn_blocking(move || watching.wait_for_held(IN_FLIGHT))
        .await
        .unwrap();
    holder.kill().unwrap();
    holder.wait().unwrap();

    // As after a power cut: the journal is there, some of the bytes are not.
    let partial = crate::node::walk(&node.config.datasets.root);
    let file = partial
        .iter()
        .find(|path| path.ends_with("files/a"))
        .unwrap();
    let open = std::fs::OpenOptions::new().write(true).open(file).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&open, &[0; 100], 1000).unwrap();
    store.open_gate();
    let ready = node.acquire("s3://bucket/m/").await.unwrap();
    assert!(read(&ready, "a") == bytes);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_at_once_download_once() {
    let bytes = pattern(3, 8 * MIB);
    let store = Liar::start(vec![("m/a", Object::new(bytes.clone()))], |_, _| {
        Fault::Serve
    });
    let node = Arc::new(Node::new(store.address));
    let tasks: Vec<_> = (0..6)
        .map(|_| {
            let node = Arc::clone(&node);
            tokio::spawn(async move { node.acquire("s3://bucket/m/").await })
        })
        .collect();
    let mut fetched = 0;
    for task in tasks {
        let ready = task.await.unwrap().unwrap();
        assert!(read(&ready, "a") == bytes);
        fetched += usize::from(!ready.hit);
    }
    assert_eq!(
        (fetched, store.served.load(SeqCst)),
        (1, bytes.len() as u64)
    );
}
