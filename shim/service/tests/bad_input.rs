//! What the shim answers when it is given something wrong, without a containerd that would refuse it first: one
//! sentence with its name, at once, and nothing left behind.
#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    clippy::disallowed_methods,
    reason = "a test, which waits on its own thread"
)]

mod shim;

use std::{
    collections::BTreeSet,
    fs,
    io::Write,
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
    time::{Duration, Instant},
};

use containerd_shim::bootstrap::{BootstrapParams, BootstrapResult};
use containerd_shim_protos::{
    api::{
        ConnectRequest, CreateTaskRequest, ExecProcessRequest, Mount, ShutdownRequest, StateRequest,
    },
    protobuf::{Message, MessageField, well_known_types::any::Any},
    shim::oci::Options,
    shim_async::TaskClient,
    ttrpc::{self, r#async::Client, context},
};

/// A second, on a machine that has something else to do.
const AT_ONCE: Duration = Duration::from_secs(5);
const LONG: usize = 10_000;

/// A bundle, and the folder for the shim's socket beside it.
struct Bundle(tempfile::TempDir);

impl Bundle {
    fn new() -> Self {
        let this = Self(tempfile::tempdir().unwrap());
        fs::create_dir_all(this.path().join("rootfs")).unwrap();
        this.configure(br#"{"ociVersion": "1.1.0"}"#);
        this
    }

    fn path(&self) -> PathBuf {
        self.0.path().join("bundle")
    }

    fn sockets(&self) -> PathBuf {
        self.0.path().join("sockets")
    }

    fn configure(&self, text: &[u8]) {
        fs::write(self.path().join("config.json"), text).unwrap();
    }

    /// The names of all files.
    fn files(&self) -> BTreeSet<String> {
        let entries = fs::read_dir(self.path()).unwrap();
        entries
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect()
    }

    /// Runs `start` in it, as containerd 2.3 does.
    fn start(&self, namespace: &str, id: &str) -> Output {
        let params = BootstrapParams {
            instance_id: id.to_owned(),
            namespace: namespace.to_owned(),
            socket_dir: Some(self.sockets().display().to_string()),
            ..Default::default()
        };
        let mut start = Command::new(env!("CARGO_BIN_EXE_containerd-shim-rekindle-v1"))
            .args(["-namespace", namespace, "-id", id, "start"])
            .current_dir(self.path())
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let input = params.write_to_bytes().unwrap();
        // It may have refused its arguments, and not read this any more.
        let _ = start.stdin.take().unwrap().write_all(&input);
        start.wait_with_output().unwrap()
    }
}

/// 50 MB that take no room.
fn large(path: &Path) {
    fs::File::create(path).unwrap().set_len(50 << 20).unwrap();
}

fn ten_thousand_mounts() -> Vec<u8> {
    let mount = |n| {
        format!(
            r#"{{"destination": "/m{n}", "type": "bind", "source": "/tmp", "options": ["bind"]}}"#
        )
    };
    let mounts: Vec<String> = (0..LONG).map(mount).collect();
    format!(
        r#"{{"ociVersion": "1.1.0", "mounts": [{}]}}"#,
        mounts.join(",")
    )
    .into_bytes()
}

fn any(type_url: &str, value: Vec<u8>) -> MessageField<Any> {
    MessageField::some(Any {
        type_url: type_url.to_owned(),
        value,
        ..Any::default()
    })
}

fn without_runc(request: &mut CreateTaskRequest) {
    let mut options = Options::new();
    options.binary_name = "/no/such/runc".to_owned();
    request.options = any(
        "containerd.runc.v1.Options",
        options.write_to_bytes().unwrap(),
    );
}

#[test]
fn a_start_is_refused() {
    type Spoil = fn(&Bundle);
    let long = "x".repeat(LONG);
    let cases: [(&str, &str, &str, Spoil, &str); 8] = [
        (
            "no config.json",
            "test",
            "one",
            |b| fs::remove_file(b.path().join("config.json")).unwrap(),
            "config.json: No such file",
        ),
        (
            "a large one",
            "test",
            "one",
            |b| large(&b.path().join("config.json")),
            "52428800 bytes are more",
        ),
        (
            "one that is not JSON",
            "test",
            "one",
            |b| b.configure(b"{"),
            "config.json: EOF while parsing",
        ),
        (
            "one that nobody writes",
            "test",
            "one",
            |b| fifo(&b.path().join("config.json")),
            "config.json: not a file",
        ),
        (
            "an id with a slash",
            "test",
            "../one",
            |_| {},
            "-id \"../one\": not an id",
        ),
        ("an id like an option", "test", "--all", |_| {}, "-id"),
        ("a long id", "test", &long, |_| {}, "not an id"),
        (
            "a namespace with a slash",
            "../test",
            "one",
            |_| {},
            "-namespace \"../test\": not an id",
        ),
    ];
    println!("{} starts", cases.len());
    for (case, namespace, id, spoil, words) in cases {
        let bundle = Bundle::new();
        spoil(&bundle);
        let (before, since) = (bundle.files(), Instant::now());
        let output = bundle.start(namespace, id);
        let said = String::from_utf8(output.stderr).unwrap();
        assert!(!output.status.success(), "{case}");
        assert!(
            said.contains(words) && said.lines().count() == 1,
            "{case}: {said}"
        );
        assert!(said.len() < 1000, "{case}: {said}");
        assert!(since.elapsed() < AT_ONCE, "{case}: {:?}", since.elapsed());
        assert_eq!(bundle.files(), before, "{case}");
        // A socket may be in a folder for them; a shim that listens there would be left too.
        assert!(fs::read_dir(bundle.sockets()).is_err(), "{case}");
    }
}

fn fifo(path: &Path) {
    let _ = fs::remove_file(path);
    nix::unistd::mkfifo(path, nix::sys::stat::Mode::S_IRWXU).unwrap();
}

type Change = fn(&Bundle, &mut CreateTaskRequest);

const CREATIONS: [(&str, Change, &str); 21] = [
    (
        "no config.json",
        |b, _| fs::remove_file(b.path().join("config.json")).unwrap(),
        "config.json: No such file",
    ),
    (
        "a large one",
        |b, _| large(&b.path().join("config.json")),
        "52428800 bytes are more",
    ),
    (
        "one that is not JSON",
        |b, _| b.configure(b"[1"),
        "config.json: EOF while parsing",
    ),
    (
        "an id with a slash",
        |_, r| r.id = "a/b".to_owned(),
        "id \"a/b\": not an id",
    ),
    ("no id", |_, r| r.id.clear(), "id \"\": not an id"),
    ("a long id", |_, r| r.id = "x".repeat(LONG), "not an id"),
    (
        "options of another runtime",
        |_, r| r.options = any("x.Other", vec![]),
        "x.Other: allowed are",
    ),
    (
        "options that are none",
        |_, r| r.options = any("containerd.runc.v1.Options", vec![0xff]),
        "containerd.runc.v1.Options",
    ),
    (
        "an option that is misspelt",
        |_, r| {
            r.options = any(
                "runtimeoptions.v1.Options",
                b"\x1a\x12SystemdCgroups = 1".to_vec(),
            )
        },
        "`SystemdCgroups`",
    ),
    (
        "a stdout that is not there",
        |_, r| r.stdout = "/no/such/stdout".to_owned(),
        "/no/such/stdout: No such file",
    ),
    (
        "a stdin that is not there",
        |_, r| r.stdin = "/no/such/stdin".to_owned(),
        "/no/such/stdin: No such file",
    ),
    (
        "a stdin that is no FIFO",
        |b, r| r.stdin = b.path().join("config.json").display().to_string(),
        "opening the input FIFO",
    ),
    (
        "a relative stdout",
        |_, r| r.stdout = "stdout".to_owned(),
        "\"stdout\": a stream needs an absolute path",
    ),
    (
        "a relative file",
        |_, r| r.stdout = "file://log".to_owned(),
        "\"file://log\": a stream needs",
    ),
    (
        "an unknown scheme",
        |_, r| r.stderr = "gopher://x".to_owned(),
        "\"gopher://x\": allowed are",
    ),
    (
        "a file as stdin",
        |_, r| r.stdin = "file:///x".to_owned(),
        "\"file:///x\": stdin comes from",
    ),
    (
        "a logger that is not there",
        |_, r| r.stdout = "binary:///no/such/logger".to_owned(),
        "/no/such/logger of one: starting it: No such file",
    ),
    (
        "ids that are mapped to nothing",
        |_, r| r.rootfs.push(mount("uidmap=0:1")),
        "uidmap=0:1: allowed are",
    ),
    (
        "an overlay of nothing",
        |_, r| r.rootfs.push(mount("lowerdir=/no/such/layer")),
        "rootfs",
    ),
    (
        "no runc",
        |_, r| without_runc(r),
        "starting /no/such/runc: No such file",
    ),
    (
        "ten thousand mounts and no runc",
        |b, r| {
            b.configure(&ten_thousand_mounts());
            without_runc(r)
        },
        "starting /no/such/runc",
    ),
];

fn mount(option: &str) -> Mount {
    Mount {
        type_: "overlay".to_owned(),
        source: "overlay".to_owned(),
        options: vec![option.to_owned()],
        ..Mount::default()
    }
}

type ChangeExec = fn(&mut ExecProcessRequest);

const EXECS: [(&str, ChangeExec, &str); 6] = [
    (
        "an id with a slash",
        |r| r.exec_id = "../e".to_owned(),
        "exec id \"../e\": not an id",
    ),
    ("a long id", |r| r.exec_id = "x".repeat(LONG), "not an id"),
    (
        "a process that is not JSON",
        |r| r.spec = any("x", b"sh".to_vec()),
        "process of exec e: not JSON",
    ),
    (
        "a process that is a list",
        |r| r.spec = any("x", b"[]".to_vec()),
        "process of exec e: not a JSON object",
    ),
    (
        "an unknown scheme",
        |r| r.stdout = "gopher://x".to_owned(),
        "\"gopher://x\": allowed are",
    ),
    ("no container", |_| {}, "container one: not created here"),
];

#[test]
fn a_call_is_refused() {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .unwrap();
    let bundle = Bundle::new();
    let output = bundle.start("test", "one");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{said}");
    let answer = BootstrapResult::parse_from_bytes(&output.stdout).unwrap();
    println!("{} creations, {} execs", CREATIONS.len(), EXECS.len());
    let pid = runtime.block_on(async {
        let task = TaskClient::new(Client::connect(&answer.address).await.unwrap());
        creations(&bundle, &task).await;
        execs(&task).await;
        let pid = task.connect(soon(), &ConnectRequest::default()).await;
        task.shutdown(soon(), &ShutdownRequest::default())
            .await
            .unwrap();
        pid.unwrap().shim_pid
    });
    shim::ends(pid);
    assert_eq!(fs::read_dir(bundle.sockets()).unwrap().count(), 0);
}

fn soon() -> context::Context {
    context::with_duration(Duration::from_secs(60))
}

async fn creations(first: &Bundle, task: &TaskClient) {
    for (case, change, words) in CREATIONS {
        let bundle = Bundle::new();
        let mut request = CreateTaskRequest::new();
        request.id = "one".to_owned();
        request.bundle = bundle.path().display().to_string();
        change(&bundle, &mut request);
        let before = bundle.files();
        let since = Instant::now();
        let refusal = task.create(soon(), &request).await.unwrap_err();
        expect(case, &refusal, words, since);
        assert_eq!(bundle.files(), before, "{case}");
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
        assert!(!mounts.contains(&request.bundle), "{case}: {mounts}");
        let mut state = StateRequest::new();
        state.id = request.id;
        let state = task.state(soon(), &state).await;
        assert!(state.is_err(), "{case}");
    }
    let pid = task.connect(soon(), &ConnectRequest::default()).await;
    let pid = pid.unwrap().shim_pid;
    let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children"));
    assert_eq!(children.unwrap(), "", "the shim has children left");
    assert!(first.path().join("address").exists());
}

async fn execs(task: &TaskClient) {
    for (case, change, words) in EXECS {
        let mut request = ExecProcessRequest::new();
        request.id = "one".to_owned();
        request.exec_id = "e".to_owned();
        request.spec = any("x", br#"{"args": ["true"]}"#.to_vec());
        change(&mut request);
        let since = Instant::now();
        let refusal = task.exec(soon(), &request).await.unwrap_err();
        expect(case, &refusal, words, since);
    }
}

fn expect(case: &str, refusal: &ttrpc::Error, words: &str, since: Instant) {
    let ttrpc::Error::RpcStatus(status) = refusal else {
        panic!("{case}: {refusal}");
    };
    let said = status.message();
    assert!(said.contains(words), "{case}: {said}");
    assert!(said.len() < 1000 && !said.contains('\n'), "{case}: {said}");
    assert!(since.elapsed() < AT_ONCE, "{case}: {:?}", since.elapsed());
}
