//! `rekindle agent` with a store of images and a bucket: no containerd, and no root.
#![allow(
    clippy::unwrap_used,
    reason = "helpers of tests, which clippy does not know for tests"
)]

#[rustfmt::skip]
#[allow(warnings, clippy::all, reason = "generated")]
#[path = "../../shim/agent/src/api/agent.rs"]
mod agent;
#[rustfmt::skip]
#[allow(warnings, clippy::all, reason = "generated")]
#[path = "../../shim/agent/src/api/agent_ttrpc.rs"]
mod agent_ttrpc;

use agent::event::Kind;
use agent_ttrpc::AgentClient;
use rekindle_checkpoint::manifest::{ORIGIN_FILE, UPPER_FILE};
use rekindle_checkpoint::{Facts, ImageStore, chunks::Compression};
use rekindle_core::config::NodeConfig;
use rekindle_core::step::AgentStep;
use rekindle_harness::{cli, s3_server, schema};
use rustix::fs::{FallocateFlags, fallocate};
use serde_json::Value;
use sha2::{Digest as _, Sha256};
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, SystemTime};
use tempfile::TempDir;

/// Generations of each image; of which one is kept on the node.
const MADE: u64 = 3;
/// Of each: long enough to be killed in its upload, and of several parts.
const BYTES: usize = 12 << 20;

/// Images of `team-a`, which has a tier, and of `team-b`, which has none.
struct Node {
    folder: TempDir,
    /// Where images lie in memory, where the node is to have some there.
    memory: Option<TempDir>,
    server: Child,
}

impl Drop for Node {
    fn drop(&mut self) {
        let _ = self.server.kill();
        let _ = self.server.wait();
    }
}

impl Node {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let bucket = folder.path().join("s3/images");
        fs::create_dir_all(bucket).unwrap();
        let mut server = Command::new(s3_server().unwrap())
            .arg("--http")
            .arg("--root")
            .arg(folder.path().join("s3"))
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut line = String::new();
        BufReader::new(server.stdout.take().unwrap())
            .read_line(&mut line)
            .unwrap();
        let ready: Value = serde_json::from_str(&line).unwrap();
        let credentials = folder.path().join("credentials");
        let keys = "[default]\naws_access_key_id=rekindle\naws_secret_access_key=rekindle-secret\n";
        fs::write(&credentials, keys).unwrap();
        let node = Self {
            folder,
            memory: None,
            server,
        };
        for name in ["node", "other"] {
            let root = node.root(name);
            let endpoint = &ready["endpoint"];
            let text = format!(
                "[images]\nroot = {root:?}\n[images.retention]\nkeep = 1\nquota = \"1TiB\"\n\
                 [agent]\nevery = \"1h\"\n\
                 [[images.tier]]\nurl = \"s3://images/a/\"\nnamespaces = [\"team-a\"]\n\
                 endpoint = {endpoint}\ncredentials-file = {credentials:?}\nregion = \"us-east-1\"\n"
            );
            fs::write(node.config(name), text).unwrap();
        }
        node
    }

    /// With images of both.
    fn with_images() -> Self {
        let node = Self::new();
        for generation in 0..MADE {
            node.make("team-a", generation as u32);
            node.make("team-b", 100 + generation as u32);
        }
        node
    }

    /// With memory for three images beside one of `team-c` that lies there only.
    fn with_memory(idle: &str) -> Self {
        let mut node = Self::with_images();
        let memory = tempfile::tempdir_in("/dev/shm").unwrap();
        let mut text = fs::read_to_string(node.config("node")).unwrap();
        text += &format!(
            "[images.memory]\nroot = {:?}\nquota = \"50MiB\"\nidle = {idle:?}\n",
            memory.path()
        );
        fs::write(node.config("node"), text).unwrap();
        node.memory = Some(memory);
        // The newest was used last.
        let now = SystemTime::now();
        for (place, namespace) in ["team-a", "team-b"].iter().enumerate() {
            for generation in 1..=MADE {
                let ago = Duration::from_secs(10 * (MADE - generation) + place as u64 + 1);
                let lock = format!("{namespace}/warm/.{generation}.lock");
                let lock = fs::File::options()
                    .write(true)
                    .open(node.root("node").join(lock));
                lock.unwrap().set_modified(now - ago).unwrap();
            }
        }
        node.make("team-c", 200);
        assert_eq!(node.place("team-c", 1), "memory");
        node
    }

    /// What a restart of the node does.
    fn restart(&self) {
        let root = self.memory.as_ref().unwrap().path();
        for entry in fs::read_dir(root).unwrap() {
            let path = entry.unwrap().path();
            let _ = fs::remove_dir_all(&path).or_else(|_| fs::remove_file(&path));
        }
    }

    /// Where a generation of `NAMESPACE/warm` lies.
    fn place(&self, namespace: &str, generation: u64) -> String {
        let rows = self.rows(namespace);
        let found = rows.iter().find(|row| row["generation"] == generation);
        found.unwrap()["place"].as_str().unwrap().to_owned()
    }

    /// Whether its copies are sound, each by itself.
    fn is_sound(&self, image: &str) -> bool {
        let args = ["image", "verify", image];
        let verified = self.rekindle("node", &args).output().unwrap();
        verified.status.success() && verified.stderr.is_empty()
    }

    fn root(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn config(&self, name: &str) -> PathBuf {
        self.folder.path().join(format!("{name}.toml"))
    }

    fn socket(&self) -> PathBuf {
        self.folder.path().join("run/agent.sock")
    }

    async fn client(&self) -> AgentClient {
        let address = format!("unix://{}", self.socket().display());
        AgentClient::new(ttrpc::r#async::Client::connect(&address).await.unwrap())
    }

    fn store(&self) -> ImageStore {
        let text = fs::read_to_string(self.config("node")).unwrap();
        let config = NodeConfig::parse("", &text).unwrap();
        ImageStore::of(&config.images).unwrap()
    }

    /// Makes the next generation of `NAMESPACE/warm`, unlike all others.
    fn make(&self, namespace: &str, seed: u32) {
        self.make_of(namespace, seed, &[UPPER_FILE]);
    }

    /// The same, of so many streams.
    fn make_of(&self, namespace: &str, seed: u32, streams: &[&str]) {
        let store = self.store();
        let (namespace, name) = (namespace.parse().unwrap(), "warm".parse().unwrap());
        let request = store.begin(&namespace, &name, Default::default()).unwrap();
        let order = store.partial_at(&request.dir()).unwrap().unwrap();
        let order = order.expecting(BYTES as u64);
        let private = self.folder.path().join("private");
        let partial = order.begin(None, Compression::None, &private).unwrap();
        let words = |words: [u32; 2]| words.map(u32::to_le_bytes).concat();
        let criu = partial.criu_dir();
        fs::write(criu.join("inventory.img"), words([0x5831_3116, 0])).unwrap();
        fs::write(criu.join("pstree.img"), words([0x5456_4319, 0x5027_3030])).unwrap();
        for (name, seed) in streams.iter().zip(seed..) {
            let mut stream = partial.chunks().stream(name);
            stream.write_all(&bytes(seed)).unwrap();
            stream.finish().unwrap();
        }
        partial.seal(Facts::default()).unwrap();
    }

    fn rekindle(&self, node: &str, args: &[&str]) -> Command {
        let mut command = Command::new(cli().unwrap());
        command
            .arg("--config")
            .arg(self.config(node))
            .args(args)
            .env_remove("REKINDLE_LOG");
        command
    }

    fn once(&self) -> Output {
        self.rekindle("node", &["agent", "--once"])
            .output()
            .unwrap()
    }

    /// The generations of `NAMESPACE/warm` that are on the node, each of which must be sound. One that has lost its
    /// manifest is none any more: its removal was killed.
    fn here(&self, namespace: &str) -> Vec<u64> {
        let found = self.listed(namespace);
        for generation in &found {
            let image = format!("{namespace}/warm@{generation}");
            let args = ["image", "verify", image.as_str()];
            let verified = self.rekindle("node", &args).output().unwrap();
            assert!(verified.status.success(), "{verified:?}");
        }
        found
    }

    fn rows(&self, namespace: &str) -> Vec<Value> {
        let args = ["image", "ls", "--json", "-n", namespace];
        let output = self.rekindle("node", &args).output().unwrap();
        schema::check(&args, &output.stdout);
        serde_json::from_slice(&output.stdout).unwrap()
    }

    fn listed(&self, namespace: &str) -> Vec<u64> {
        let rows = self.rows(namespace);
        let whole = rows.iter().filter(|row| row["refused"].is_null());
        let numbers = whole.map(|row| row["generation"].as_u64().unwrap());
        numbers.collect()
    }

    /// The tags in the bucket, each of which must be a whole image for another node.
    fn tags(&self) -> Vec<String> {
        let folder = self.folder.path().join("s3/images/a/tags/team-a");
        let mut tags = Vec::new();
        for entry in fs::read_dir(folder).into_iter().flatten() {
            let tag = entry.unwrap().file_name().into_string().unwrap();
            let place = format!("s3://images/a/:team-a/{tag}");
            let args = ["image", "pull", place.as_str()];
            let pulled = self.rekindle("other", &args).output().unwrap();
            assert!(pulled.status.success(), "{tag}: {pulled:?}");
            tags.push(tag);
        }
        let _ = fs::remove_dir_all(self.root("other"));
        tags
    }

    /// The pack of an image that has one.
    fn pack_of(&self, image: &str) -> PathBuf {
        let folder = fs::read_dir(self.root("node").join(image)).unwrap();
        let mut paths = folder.map(|entry| entry.unwrap().path());
        let is_pack = |path: &PathBuf| path.to_str().unwrap().contains("/pack-");
        paths.find(is_pack).unwrap()
    }

    /// What lies in the folders for images that are being made.
    fn partial(&self) -> usize {
        let memory = self.memory.iter().map(|folder| folder.path().to_owned());
        let roots = memory.chain([self.root("node")]);
        let found = roots.flat_map(|root| fs::read_dir(root.join(".partial")));
        found.flatten().count()
    }
}

/// No two chunks of which are alike; others for another seed.
fn bytes(seed: u32) -> Vec<u8> {
    let mut state = (seed + 1).wrapping_mul(0x9e37_79b9) | 1;
    let next = || {
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        Some(state)
    };
    let words = std::iter::from_fn(next).flat_map(u32::to_le_bytes);
    words.take(BYTES).collect()
}

#[test]
fn images_are_in_their_tier_before_they_go() {
    let node = Node::with_images();
    let ended = node.once();
    assert!(ended.status.success(), "{ended:?}");
    let said = String::from_utf8_lossy(&ended.stderr);
    assert_eq!(said.matches("replicated").count(), 3, "{said}");
    assert_eq!(said.matches("removed").count(), 4, "{said}");
    assert_eq!(
        (node.here("team-a"), node.here("team-b")),
        (vec![3], vec![3])
    );
    assert_eq!(node.tags().len(), 3);
    let ls = ["image", "ls", "s3://images/a/", "--json"];
    let rows = node.rekindle("node", &ls).output().unwrap().stdout;
    schema::check(&ls, &rows);
    let rows: Vec<Value> = serde_json::from_slice(&rows).unwrap();
    assert_eq!(rows.len(), 3);
    for row in rows {
        assert_eq!(row["namespace"], "team-a");
        assert!(row["created"].as_u64().unwrap() > 1_700_000_000);
        assert!(row["tag"].as_str().unwrap().starts_with("team-a/warm@"));
    }
    // And there is nothing left to do.
    let ended = node.once();
    assert!(
        ended.status.success() && ended.stderr.is_empty(),
        "{ended:?}"
    );
}

#[test]
fn what_its_tier_does_not_take_stays() {
    let mut node = Node::with_images();
    node.server.kill().unwrap();
    node.server.wait().unwrap();
    let ended = node.once();
    assert_eq!(ended.status.code(), Some(1), "{ended:?}");
    let said = String::from_utf8_lossy(&ended.stderr);
    // Once for all images of the tier, and not after a minute for each.
    assert_eq!(said.matches("gave up").count(), 1, "{said}");
    assert_eq!(node.here("team-a"), [1, 2, 3]);
    assert_eq!(node.here("team-b"), [3]);
}

/// As a fetch leaves it that is killed, with a restore that did not need the rest.
#[test]
fn what_has_begun_to_come_in_is_completed() {
    let node = Node::new();
    node.make("team-a", 1);
    assert!(node.once().status.success());
    let pack = node.pack_of("team-a/warm/1");
    let origin = pack.with_file_name("origin.json");
    let digest = Sha256::digest(fs::read(&pack).unwrap());
    let digest: String = digest.iter().map(|byte| format!("{byte:02x}")).collect();
    let name = pack.file_name().unwrap().to_str().unwrap();
    let text = serde_json::json!({
        "tier": "s3://images/a/", "packs": {name: format!("sha256:{digest}")},
    });
    fs::write(&origin, text.to_string()).unwrap();
    let file = fs::File::options().write(true).open(&pack).unwrap();
    let hole = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    fallocate(&file, hole, 1 << 20, 5 << 20).unwrap();

    let ls = ["image", "ls", "--json"];
    let rows = node.rekindle("node", &ls).output().unwrap().stdout;
    let rows: Vec<Value> = serde_json::from_slice(&rows).unwrap();
    assert_eq!(rows[0]["incoming"], true);
    let verify = ["image", "verify", "team-a/warm"];
    let unsound = node.rekindle("node", &verify).output().unwrap();
    let said = String::from_utf8_lossy(&unsound.stdout);
    assert!(said.contains("is not all on this node yet"), "{said}");

    let ended = node.once();
    assert!(ended.status.success(), "{ended:?}");
    assert!(!origin.exists());
    assert_eq!(node.here("team-a"), [1]);
}

#[test]
fn what_is_damaged_is_not_replicated_and_stays() {
    let node = Node::with_images();
    let pack = node.pack_of("team-a/warm/1");
    let mut bytes = fs::read(&pack).unwrap();
    bytes[BYTES / 2] ^= 1;
    fs::write(pack, bytes).unwrap();
    let ended = node.once();
    assert_eq!(ended.status.code(), Some(1), "{ended:?}");
    let said = String::from_utf8_lossy(&ended.stderr);
    assert!(said.contains("not replicated, and not removed"), "{said}");
    assert_eq!(node.tags().len(), 2);
    assert_eq!(node.listed("team-a"), [1, 3]);
}

#[test]
fn what_is_leased_stays_as_long() {
    let node = Node::with_images();
    let store = node.store();
    let (namespace, name) = ("team-a".parse().unwrap(), "warm".parse().unwrap());
    let lease = store.resolve(&namespace, &name, Some(1)).unwrap();
    assert!(node.once().status.success());
    assert_eq!(node.here("team-a"), [1, 3]);
    assert_eq!(node.tags().len(), 3);
    drop(lease);
    assert!(node.once().status.success());
    assert_eq!(node.here("team-a"), [3]);
}

#[test]
fn there_is_one_on_a_node() {
    let node = Node::new();
    let mut first = resting(&node);
    let second = node.once();
    assert_eq!(second.status.code(), Some(3), "{second:?}");
    first.kill().unwrap();
    first.wait().unwrap();
    assert!(node.once().status.success());
}

/// An agent that has done its round.
fn resting(node: &Node) -> Child {
    begun(node, AgentStep::Rest)
}

/// An agent that has begun a step.
fn begun(node: &Node, step: AgentStep) -> Child {
    let socket = node.socket();
    let mut agent = node
        .rekindle("node", &["agent", "--socket", socket.to_str().unwrap()])
        .env("REKINDLE_LOG", "warn,rekindle=debug")
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(agent.stderr.take().unwrap()).lines();
    let wanted = format!("begins step={step:?}");
    let mut said = Vec::new();
    while let Some(line) = lines.next() {
        let line = line.unwrap();
        if line.contains(&wanted) {
            // Somebody reads what it says, as long as it lives.
            std::thread::spawn(move || lines.for_each(drop));
            return agent;
        }
        said.push(line);
    }
    agent.wait().unwrap();
    panic!("it ended before it came to {step:?}: {said:#?}");
}

/// What is true when a step begins.
#[derive(Debug)]
struct True {
    /// Images of `team-a` that are in the tier.
    in_tier: u64,
    /// Generations of it that are on the node.
    on_node: u64,
    /// The image that was in memory only is on the disk too.
    settled: bool,
    /// The newest of `team-a` is in memory too.
    promoted: bool,
}

/// A step that is new has to say it, and is killed in then, too.
fn true_when(step: AgentStep) -> True {
    let of = |in_tier, on_node, settled, promoted| True {
        in_tier,
        on_node,
        settled,
        promoted,
    };
    match step {
        AgentStep::Sweep | AgentStep::List | AgentStep::Settle => of(0, MADE, false, false),
        AgentStep::Promote => of(0, MADE, true, false),
        AgentStep::Replicate => of(0, MADE, true, true),
        AgentStep::Plan | AgentStep::Evict => of(MADE, MADE, true, true),
        AgentStep::Rest => of(MADE, 1, true, true),
    }
}

/// Wherever it is: each image is in memory, on the disk or in its tier, whole, and the next one does the rest.
#[test]
fn it_is_killed_in_each_of_its_steps() {
    let mut cases = 0;
    for step in AgentStep::ALL {
        // At its beginning, and somewhere in it.
        for after in [0, 15, 60] {
            let node = Node::with_memory("100h");
            for root in [
                node.root("node"),
                node.memory.as_ref().unwrap().path().into(),
            ] {
                let left = root.join(".partial/left");
                fs::create_dir(&left).unwrap();
                fs::write(left.join("pack-0"), "half of one").unwrap();
            }
            let mut agent = begun(&node, *step);
            std::thread::park_timeout(Duration::from_millis(after));
            agent.kill().unwrap();
            agent.wait().unwrap();

            let what = format!("killed {after} ms after {step:?} began");
            let then = true_when(*step);
            let (tags, here) = (node.tags().len() as u64, node.here("team-a"));
            assert!(tags >= then.in_tier, "{what}: {tags} are in the tier");
            if after == 0 && *step == AgentStep::Rest {
                assert_eq!(here.len() as u64, then.on_node, "{what}");
            }
            assert_eq!(node.here("team-c"), [1], "{what}");
            let (of_c, of_a) = (node.place("team-c", 1), node.place("team-a", MADE));
            assert!(!then.settled || of_c == "memory+disk", "{what}: {of_c}");
            assert!(!then.promoted || of_a == "memory+disk", "{what}: {of_a}");
            assert!(here.contains(&MADE), "{what}: the newest is gone: {here:?}");
            let gone = MADE - here.len() as u64;
            assert!(
                gone == 0 || tags == MADE,
                "{what}: {here:?} are here, {tags} there"
            );

            let ended = node.once();
            assert!(ended.status.success(), "{what}: {ended:?}");
            assert_eq!(node.tags().len() as u64, MADE, "{what}");
            assert_eq!(node.here("team-a"), [MADE], "{what}");
            assert_eq!(node.here("team-b"), [MADE], "{what}");
            assert_eq!(node.partial(), 0, "{what}");
            assert_eq!(node.place("team-c", 1), "memory+disk", "{what}");
            assert_eq!(node.place("team-a", MADE), "memory+disk", "{what}");
            let verified = node
                .rekindle("node", &["image", "verify"])
                .output()
                .unwrap();
            assert!(verified.status.success(), "{what}: {verified:?}");
            node.restart();
            assert_eq!(node.here("team-c"), [1], "{what}: after a restart");
            assert_eq!(node.place("team-c", 1), "disk", "{what}");
            cases += 1;
        }
    }
    println!("{cases} agents were killed");
}

/// What has come of an image that is fetched.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Come {
    Nothing,
    /// As much as a restore needs to begin.
    Begun,
    All,
}

impl Node {
    fn come(&self) -> Come {
        // Its number is not known: one that was killed may have taken some for nothing.
        let found = self.listed("team-a");
        let Some(generation) = found.last() else {
            return Come::Nothing;
        };
        assert_eq!(found.len(), 1, "it was begun twice");
        let folder = self.root("node").join(format!("team-a/warm/{generation}"));
        match folder.join(ORIGIN_FILE).exists() {
            true => Come::Begun,
            false => Come::All,
        }
    }
}

/// Whenever it is killed: there is nothing, or a begun image that says so, or all of it; and the next one goes on.
#[test]
fn a_fetch_is_killed_at_any_time() {
    let node = Node::new();
    node.make_of("team-a", 0, &[UPPER_FILE, "criu/pages-1.img"]);
    let image = |args: &[&str]| {
        let args = [&["image"], args].concat();
        node.rekindle("node", &args).output().unwrap()
    };
    for args in [
        &["push", "team-a/warm", "s3://images/a/"][..],
        &["rm", "team-a/warm"],
    ] {
        let done = image(args);
        assert!(done.status.success(), "{done:?}");
    }
    let (mut seen, mut kills) = (Vec::new(), 0);
    for after in (0..).step_by(15) {
        let mut fetch = node
            .rekindle("node", &["image", "fetch", "team-a/warm"])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        std::thread::park_timeout(Duration::from_millis(after));
        fetch.kill().unwrap();
        let ended = fetch.wait().unwrap();
        kills += usize::from(!ended.success());
        let come = node.come();
        assert_eq!(ended.success(), ended.success() && come == Come::All);
        let verified = image(&["verify", "team-a/warm"]);
        let said = String::from_utf8_lossy(&verified.stderr).into_owned();
        let said = said + &String::from_utf8_lossy(&verified.stdout);
        match come {
            Come::Nothing => assert!(said.contains("there is no image"), "{said}"),
            Come::Begun => assert!(said.contains("is not all on this node yet"), "{said}"),
            Come::All => assert!(verified.status.success(), "{said}"),
        }
        // What has come is never lost.
        assert!(
            seen.last().is_none_or(|last| *last as u8 <= come as u8),
            "{seen:?}, then {come:?}"
        );
        if seen.last() != Some(&come) {
            seen.push(come);
        }
        if come == Come::All {
            break;
        }
    }
    assert_eq!(seen, [Come::Nothing, Come::Begun, Come::All]);
    println!("{kills} fetches were killed");
    // The next one leaves nothing of them, and is told that it is here.
    let done = image(&["fetch", "team-a/warm"]);
    assert!(done.status.success(), "{done:?}");
    assert_eq!(node.partial(), 0);
    assert_eq!(node.here("team-a").len(), 1);
}

#[test]
fn what_is_in_memory_only_reaches_the_disk_and_outlives_a_restart() {
    let node = Node::with_memory("100h");
    let ended = node.once();
    assert!(ended.status.success(), "{ended:?}");
    let said = String::from_utf8_lossy(&ended.stderr);
    assert_eq!(said.matches("copied to the disk").count(), 1, "{said}");
    // What was used last, as far as the quota goes.
    assert_eq!(said.matches("copied into memory").count(), 3, "{said}");
    assert_eq!(node.place("team-c", 1), "memory+disk");
    for image in ["team-a/warm", "team-b/warm", "team-c/warm"] {
        assert!(node.is_sound(image), "{image}");
    }
    let again = node.once();
    assert!(again.stderr.is_empty(), "{again:?}");
    node.restart();
    assert_eq!(node.here("team-c"), [1]);
    assert_eq!(node.place("team-c", 1), "disk");
}

#[test]
fn what_is_idle_leaves_memory_when_it_is_on_the_disk() {
    let node = Node::with_memory("1s");
    std::thread::park_timeout(Duration::from_millis(2100));
    let ended = node.once();
    assert!(ended.status.success(), "{ended:?}");
    let said = String::from_utf8_lossy(&ended.stderr);
    assert_eq!(said.matches("removed from memory").count(), 1, "{said}");
    assert_eq!(node.place("team-c", 1), "disk");
    assert_eq!(node.here("team-c"), [1]);
}

/// No file of the agent's may be larger than a MiB: so its disk is full.
#[test]
fn what_the_disk_does_not_take_stays_in_memory() {
    let node = Node::with_memory("1s");
    std::thread::park_timeout(Duration::from_millis(2100));
    let ended = Command::new("sh")
        .args(["-c", "trap '' XFSZ; ulimit -f 1024; exec \"$@\"", "sh"])
        .arg(cli().unwrap())
        .arg("--config")
        .arg(node.config("node"))
        .args(["agent", "--once"])
        .env_remove("REKINDLE_LOG")
        .output()
        .unwrap();
    assert_eq!(ended.status.code(), Some(1), "{ended:?}");
    let said = String::from_utf8_lossy(&ended.stderr);
    assert!(said.contains("in memory only"), "{said}");
    assert!(!said.contains("removed from memory"), "{said}");
    assert_eq!(node.place("team-c", 1), "memory");
    assert_eq!(node.here("team-c"), [1]);
    assert_eq!(node.partial(), 0);
    assert!(node.once().status.success());
    assert_eq!(node.place("team-c", 1), "disk");
}

#[test]
fn a_damaged_copy_in_memory_is_told_and_does_not_settle() {
    let node = Node::with_memory("100h");
    let folder = node.memory.as_ref().unwrap().path().join("team-c/warm/1");
    let packs = fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().path());
    let mut packs = packs.filter(|path| path.to_str().unwrap().contains("/pack-"));
    let pack = packs.next().unwrap();
    let mut bytes = fs::read(&pack).unwrap();
    bytes[BYTES / 2] ^= 1;
    fs::write(&pack, bytes).unwrap();
    let ended = node.once();
    assert_eq!(ended.status.code(), Some(1), "{ended:?}");
    let said = String::from_utf8_lossy(&ended.stderr);
    assert!(
        said.contains("does not have the checksum") || said.contains("is damaged"),
        "{said}"
    );
    assert_eq!(node.place("team-c", 1), "memory");
    assert_eq!(node.partial(), 0);
}

/// For a call that takes at most a minute.
fn within() -> ttrpc::context::Context {
    ttrpc::context::with_timeout(60_000_000_000)
}

/// What a call was refused with.
fn refusal<T: std::fmt::Debug>(answer: ttrpc::Result<T>) -> (ttrpc::Code, String) {
    match answer.unwrap_err() {
        ttrpc::Error::RpcStatus(status) => (status.code(), status.message),
        other => panic!("{other:?}"),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn its_api_tells_what_there_is_and_what_it_does() {
    let node = Node::with_images();
    let mut running = resting(&node);
    let client = node.client().await;
    let images = async |namespace: &str| {
        let mut request = agent::ImagesRequest::new();
        request.namespace = namespace.to_owned();
        client.images(within(), &request).await.unwrap().images
    };
    let all = images("").await;
    let told = |image: &agent::Image| {
        let name = format!("{}/{}@{}", image.namespace, image.name, image.generation);
        (name, image.replicated, image.usable, image.in_use)
    };
    let told: Vec<_> = all.iter().map(told).collect();
    let a = ("team-a/warm@3".to_owned(), true, true, false);
    let b = ("team-b/warm@3".to_owned(), false, true, false);
    assert_eq!(told, [a, b]);
    assert!(all[0].bytes >= BYTES as u64 && all[0].last_used > 1_700_000_000);
    assert_eq!(images("team-b").await.len(), 1);

    // A round that is asked for, and somebody watches.
    node.make("team-a", 50);
    let watch = agent::WatchRequest::new();
    let mut watching = client
        .watch(ttrpc::context::Context::default(), &watch)
        .await
        .unwrap();
    let first = watching.recv().await.unwrap().unwrap();
    assert_eq!(first.step, AgentStep::Rest.name());
    let request = agent::RoundRequest::new();
    let round = client.round(within(), &request);
    let watched = async {
        let mut seen = Vec::new();
        loop {
            let event = watching.recv().await.unwrap().unwrap();
            let ends = event.step == AgentStep::Rest.name();
            seen.push(event);
            if ends {
                return seen;
            }
        }
    };
    let watched = tokio::time::timeout(Duration::from_secs(60), watched);
    let (round, seen) = tokio::join!(round, watched);
    assert_eq!(round.unwrap().failed, 0);
    let seen = seen.unwrap();
    let steps: Vec<&str> = seen.iter().map(|event| event.step.as_str()).collect();
    let steps: Vec<&str> = steps.into_iter().filter(|step| !step.is_empty()).collect();
    let wanted: Vec<&str> = AgentStep::ALL.iter().map(|step| step.name()).collect();
    assert_eq!(steps, wanted);
    let of = |kind: Kind, image: &str| {
        let is =
            |event: &&agent::Event| event.kind.enum_value() == Ok(kind) && event.image == image;
        seen.iter().filter(is).count()
    };
    assert_eq!(of(Kind::APPEARED, "team-a/warm@4"), 1, "{seen:?}");
    assert!(of(Kind::REPLICATING, "team-a/warm@4") >= 1, "{seen:?}");
    assert_eq!(of(Kind::REPLICATED, "team-a/warm@4"), 1, "{seen:?}");
    assert_eq!(of(Kind::REMOVED, "team-a/warm@3"), 1, "{seen:?}");
    assert!(seen.iter().all(|event| event.time > 1_700_000_000));
    assert_eq!(node.here("team-a"), [4]);

    // What is removed by a call comes back by another one, and who watches hears of it.
    let mut remove = agent::RemoveRequest::new();
    (remove.namespace, remove.name) = ("team-a".to_owned(), "warm".to_owned());
    remove.generation = 9;
    let (code, said) = refusal(client.remove(within(), &remove).await);
    assert_eq!(code, ttrpc::Code::NOT_FOUND, "{said}");
    remove.generation = 0;
    let removed = client.remove(within(), &remove).await.unwrap();
    assert_eq!(removed.images, ["team-a/warm@4"]);
    assert!(node.listed("team-a").is_empty());
    let mut fetch = agent::FetchRequest::new();
    (fetch.namespace, fetch.name) = ("team-a".to_owned(), "warm".to_owned());
    let fetched = client.fetch(within(), &fetch).await.unwrap();
    assert_eq!(
        (fetched.image.as_str(), fetched.hit),
        ("team-a/warm@5", false)
    );
    let mut heard = async |wanted: Kind| {
        let mut before = Vec::new();
        loop {
            let event = watching.recv().await.unwrap().unwrap();
            if event.kind.enum_value() == Ok(wanted) {
                return (before, event);
            }
            before.push(event);
        }
    };
    let limit = Duration::from_secs(60);
    let (before, failed) = tokio::time::timeout(limit, heard(Kind::FAILED))
        .await
        .unwrap();
    assert!(before.is_empty(), "{before:?}");
    assert_eq!(failed.image, "team-a/warm@9");
    let (before, fetched) = tokio::time::timeout(limit, heard(Kind::FETCHED))
        .await
        .unwrap();
    assert_eq!(fetched.image, "team-a/warm@5");
    assert!(fetched.total >= BYTES as u64, "{fetched:?}");
    let of_it = |event: &agent::Event| {
        event.kind.enum_value() == Ok(Kind::FETCHING) && event.image.starts_with("team-a/warm")
    };
    assert!(!before.is_empty() && before.iter().all(of_it), "{before:?}");
    let whole = before.iter().any(|event| event.total >= BYTES as u64);
    assert!(whole, "nothing of how far it is: {before:?}");
    assert!(client.fetch(within(), &fetch).await.unwrap().hit);
    fetch.name = "never-made".to_owned();
    let (code, said) = refusal(client.fetch(within(), &fetch).await);
    assert_eq!(code, ttrpc::Code::NOT_FOUND, "{said}");
    assert!(said.contains("has no image with the tag"), "{said}");
    for name in ["", "../x", "--config"] {
        fetch.name = name.to_owned();
        let (code, said) = refusal(client.fetch(within(), &fetch).await);
        assert_eq!(code, ttrpc::Code::INVALID_ARGUMENT, "{name:?}: {said}");
    }
    // There is no containerd here; that is what it says.
    let mut checkpoint = agent::CheckpointRequest::new();
    (checkpoint.container, checkpoint.name) = ("--help".to_owned(), "warm".to_owned());
    let mut restore = agent::RestoreRequest::new();
    (restore.image, restore.id) = ("team-a/warm".to_owned(), "--help".to_owned());
    restore.like = "--force".to_owned();
    let mut suspend = agent::SuspendRequest::new();
    suspend.container = "--help".to_owned();
    let mut resume = agent::ResumeRequest::new();
    resume.container = "--help".to_owned();
    for (code, said) in [
        refusal(client.checkpoint(within(), &checkpoint).await),
        refusal(client.restore(within(), &restore).await),
        refusal(client.suspend(within(), &suspend).await),
        refusal(client.resume(within(), &resume).await),
    ] {
        assert_eq!(code, ttrpc::Code::UNKNOWN, "{said}");
        assert!(
            said.contains("is it running, and is this its socket?"),
            "{said}"
        );
    }
    restore.image = "../x".to_owned();
    let (code, said) = refusal(client.restore(within(), &restore).await);
    assert_eq!(code, ttrpc::Code::INVALID_ARGUMENT, "{said}");
    restore.image = "team-a/never-made".to_owned();
    let (code, said) = refusal(client.restore(within(), &restore).await);
    assert_eq!(code, ttrpc::Code::NOT_FOUND, "{said}");
    running.kill().unwrap();
    running.wait().unwrap();
}

#[test]
fn its_api_is_for_root_and_its_group() {
    use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
    let node = Node::new();
    let mut running = resting(&node);
    let socket = fs::metadata(node.socket()).unwrap();
    assert_eq!(socket.permissions().mode() & 0o777, 0o600);
    let run = node.socket().parent().unwrap().to_owned();
    fs::set_permissions(run, fs::Permissions::from_mode(0o700)).unwrap();
    running.kill().unwrap();
    running.wait().unwrap();

    let config = node.config("node");
    let text = fs::read_to_string(&config).unwrap();
    let with = |group: &str| text.replace("[agent]\n", &format!("[agent]\ngroup = {group:?}\n"));
    fs::write(&config, with("no-such-group")).unwrap();
    let refused = node.rekindle("node", &["agent"]).output().unwrap();
    let said = String::from_utf8_lossy(&refused.stderr);
    assert_eq!(refused.status.code(), Some(1), "{said}");
    assert!(
        said.contains("agent.group") && said.contains("/etc/group"),
        "{said}"
    );

    // Only root can give the socket to another group.
    if socket.uid() != 0 {
        return;
    }
    fs::write(&config, with("65534")).unwrap();
    let mut running = resting(&node);
    let found = fs::metadata(node.socket()).unwrap();
    assert_eq!(
        (found.permissions().mode() & 0o777, found.gid()),
        (0o660, 65534)
    );
    // The folder of the test is root's own; whom the socket admits has to come to it.
    fs::set_permissions(node.folder.path(), fs::Permissions::from_mode(0o755)).unwrap();
    let asks = |uid: u32, gid: u32, open: bool| {
        fs::set_permissions(
            node.socket(),
            fs::Permissions::from_mode(if open { 0o666 } else { 0o660 }),
        )
        .unwrap();
        use std::os::unix::process::CommandExt as _;
        let me = std::env::current_exe().unwrap();
        // Nobody else may be able to execute where cargo builds.
        let there = node.folder.path().join("caller");
        if !there.exists() {
            fs::copy(me, &there).unwrap();
            fs::set_permissions(&there, fs::Permissions::from_mode(0o755)).unwrap();
        }
        let asked = Command::new(there)
            .args(["--exact", "a_caller_of_the_api", "--ignored"])
            .env(SOCKET, node.socket())
            .current_dir("/")
            .uid(uid)
            .gid(gid)
            .output()
            .unwrap();
        asked.status.success()
    };
    assert!(asks(0, 0, false), "root");
    assert!(asks(65533, 65534, false), "a member of the group");
    assert!(!asks(65533, 65533, false), "the kernel keeps others out");
    assert!(
        !asks(65533, 65533, true),
        "and so does the agent, if that is changed"
    );
    running.kill().unwrap();
    running.wait().unwrap();
}

const SOCKET: &str = "REKINDLE_TEST_SOCKET";

#[tokio::test]
#[ignore = "run by the test of who may call"]
async fn a_caller_of_the_api() {
    let address = format!("unix://{}", std::env::var(SOCKET).unwrap());
    let client = AgentClient::new(ttrpc::r#async::Client::connect(&address).await.unwrap());
    let context = ttrpc::context::with_timeout(10_000_000_000);
    client
        .images(context, &agent::ImagesRequest::new())
        .await
        .unwrap();
}
