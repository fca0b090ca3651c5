//! The agent's API: ttrpc on a unix socket, for root and a group. `proto/agent.proto` has the words, `docs/API.md` explains
//! them.
//!
//! It decides nothing: it tells what the agent does, and starts the commands that a person would type.

use std::{
    collections::HashSet,
    fs, io,
    os::unix::fs::PermissionsExt as _,
    path::{Path, PathBuf},
    process::Stdio,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, SystemTime, UNIX_EPOCH},
};

use anyhow::{Context as _, bail};
use futures::{Stream, stream};
use rekindle_checkpoint::ImageStore;
use rekindle_core::name::{ImageName, Namespace};
use serde_json::Value;
use tokio::{
    net::{UnixListener, UnixStream, unix::UCred},
    process::Command,
    sync::{broadcast, mpsc, oneshot},
};
use ttrpc::{
    Code,
    r#async::{Server, ServerStreamSender, TtrpcContext, transport::Listener},
    get_status,
};

#[rustfmt::skip]
#[allow(warnings, clippy::all, reason = "generated")]
mod agent;
#[rustfmt::skip]
#[allow(warnings, clippy::all, reason = "generated")]
mod agent_ttrpc;

use agent::{
    CheckpointRequest, CheckpointResponse, FetchRequest, FetchResponse, Image, ImagesRequest,
    ImagesResponse, RoundRequest, RoundResponse, WatchRequest,
};
pub(crate) use agent::{Event, event::Kind};
use agent_ttrpc::create_agent;

/// Events that are kept for who is slow; a round has some for each image.
const BACKLOG: usize = 1024;
/// Before the next try where the kernel has no descriptor left for a connection.
const EXHAUSTED: Duration = Duration::from_millis(100);

/// What the agent tells of itself.
#[derive(Debug, Clone)]
pub(crate) struct Told {
    events: broadcast::Sender<Event>,
    replicated: Arc<Mutex<HashSet<String>>>,
    /// The newest step, for those who come later.
    step: Arc<Mutex<Event>>,
}

impl Told {
    pub(crate) fn new() -> Self {
        Self {
            events: broadcast::channel(BACKLOG).0,
            replicated: Arc::default(),
            step: Arc::default(),
        }
    }

    /// Tells whoever watches.
    pub(crate) fn event(&self, kind: Kind, mut event: Event) {
        let now = SystemTime::now().duration_since(UNIX_EPOCH);
        event.kind = kind.into();
        event.time = now.unwrap_or_default().as_secs();
        if kind == Kind::STEP {
            *self.step.lock().unwrap_or_else(PoisonError::into_inner) = event.clone();
        }
        // Nobody watches.
        let _ = self.events.send(event);
    }

    /// Looks at the images that are in their tiers, or changes them.
    pub(crate) fn replicated<T>(&self, with: impl FnOnce(&mut HashSet<String>) -> T) -> T {
        let mut all = self.replicated.lock();
        with(all.as_mut().unwrap_or_else(PoisonError::get_mut))
    }
}

/// Who asks for a round hears how often something failed in it.
pub(crate) type Asked = oneshot::Sender<u32>;

struct Service {
    store: ImageStore,
    told: Told,
    rounds: mpsc::Sender<Asked>,
    /// Of this process: its commands read it too.
    config: Option<PathBuf>,
}

/// Serves at `socket` while the answer lives; and the rounds that are asked for.
pub(crate) async fn serve(
    socket: &Path,
    group: Option<&str>,
    store: &ImageStore,
    told: &Told,
    config: Option<&Path>,
) -> anyhow::Result<(Server, mpsc::Receiver<Asked>)> {
    let group = group.map(gid).transpose()?;
    let listener =
        bind(socket, group).with_context(|| format!("serving at {}", socket.display()))?;
    let (rounds, asked) = mpsc::channel(16);
    let service = Arc::new(Service {
        store: store.clone(),
        told: told.clone(),
        rounds,
        config: config.map(Path::to_owned),
    });
    let mut server = Server::new()
        .add_listener(Listener::new(admitted(listener, group)))
        .register_service(create_agent(service));
    server.start().await.context("serving the API")?;
    tracing::info!(socket = %socket.display(), "serving");
    Ok((server, asked))
}

/// The number of a group, which is a name of `/etc/group` or the number itself.
fn gid(group: &str) -> anyhow::Result<u32> {
    if let Ok(number) = group.parse() {
        return Ok(number);
    }
    let file = "/etc/group";
    let all = fs::read_to_string(file).with_context(|| format!("reading {file}"))?;
    let found = all.lines().find_map(|line| {
        let mut fields = line.split(':');
        (fields.next() == Some(group)).then(|| fields.nth(1)?.parse().ok())?
    });
    match found {
        Some(number) => Ok(number),
        None => bail!("agent.group = {group:?}: there is no such group in {file}"),
    }
}

/// Nobody but whom the permissions of the socket name can connect to it.
fn bind(socket: &Path, group: Option<u32>) -> io::Result<UnixListener> {
    if let Some(folder) = socket.parent() {
        fs::create_dir_all(folder)?;
    }
    // Of one that was killed: whoever comes here holds the lock of the node's agent.
    match fs::remove_file(socket) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
        _ => {}
    }
    let listener = UnixListener::bind(socket)?;
    let mode = if group.is_some() { 0o660 } else { 0o600 };
    fs::set_permissions(socket, fs::Permissions::from_mode(mode))?;
    if group.is_some() {
        std::os::unix::fs::chown(socket, None, group)?;
        // The way to it, whatever the umask is; what lies beside it has permissions of its own.
        if let Some(folder) = socket.parent() {
            let mode = fs::metadata(folder)?.permissions().mode();
            fs::set_permissions(folder, fs::Permissions::from_mode(mode | 0o011))?;
        }
    }
    Ok(listener)
}

/// The connections of those who may.
fn admitted(
    listener: UnixListener,
    group: Option<u32>,
) -> impl Stream<Item = io::Result<UnixStream>> + Send + 'static {
    stream::unfold(listener, move |listener| async move {
        loop {
            match listener.accept().await {
                Ok((stream, _)) => match stream.peer_cred() {
                    Ok(peer) if admits(&peer, group) => return Some((Ok(stream), listener)),
                    peer => tracing::warn!(?peer, "a caller of the API was refused"),
                },
                Err(error) => {
                    tracing::warn!(%error, "taking in a caller of the API");
                    tokio::time::sleep(EXHAUSTED).await;
                }
            }
        }
    })
}

/// Root, whom the agent runs as, and members of the group.
fn admits(peer: &UCred, group: Option<u32>) -> bool {
    if peer.uid() == 0 || peer.uid() == rustix::process::geteuid().as_raw() {
        return true;
    }
    let Some(group) = group else { return false };
    peer.gid() == group || peer.pid().is_some_and(|pid| groups(pid).contains(&group))
}

/// The further groups of a process; none where it is gone.
fn groups(pid: i32) -> Vec<u32> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("Groups:"));
    let numbers = line.unwrap_or_default().split_whitespace();
    numbers.filter_map(|number| number.parse().ok()).collect()
}

fn refused(code: Code, reason: impl std::fmt::Display) -> ttrpc::Error {
    ttrpc::Error::RpcStatus(get_status(code, reason.to_string()))
}

impl Service {
    /// `rekindle …`: the last line that it prints, as JSON.
    async fn command(&self, args: &[&str]) -> ttrpc::Result<Value> {
        let failed = |e: &dyn std::fmt::Display| refused(Code::INTERNAL, e);
        let program = std::env::current_exe().map_err(|e| failed(&e))?;
        let mut command = Command::new(program);
        if let Some(config) = &self.config {
            command.arg("--config").arg(config);
        }
        // A caller that is gone ends nothing: what was begun is whole, or nothing of it.
        let output = command.args(args).stdin(Stdio::null()).output().await;
        let output = output.map_err(|e| failed(&e))?;
        if !output.status.success() {
            let said = String::from_utf8_lossy(&output.stderr);
            let code = match output.status.code() {
                Some(2) => Code::INVALID_ARGUMENT,
                Some(3) => Code::FAILED_PRECONDITION,
                Some(4) => Code::NOT_FOUND,
                _ => Code::UNKNOWN,
            };
            return Err(refused(code, said.trim().trim_start_matches("rekindle: ")));
        }
        let said = String::from_utf8_lossy(&output.stdout);
        let last = said.lines().last().unwrap_or_default();
        serde_json::from_str(last).map_err(|e| failed(&e))
    }
}

/// `key: value` of a request, which has to be a name.
fn name<T: std::str::FromStr<Err: std::fmt::Display>>(value: &str) -> ttrpc::Result<T> {
    value
        .parse()
        .map_err(|e| refused(Code::INVALID_ARGUMENT, e))
}

#[async_trait::async_trait]
impl agent_ttrpc::Agent for Service {
    async fn images(
        &self,
        _: &TtrpcContext,
        request: ImagesRequest,
    ) -> ttrpc::Result<ImagesResponse> {
        let only = match request.namespace.as_str() {
            "" => None,
            namespace => Some(name::<Namespace>(namespace)?),
        };
        let store = self.store.clone();
        let found = tokio::task::spawn_blocking(move || store.inventory(only.as_ref()));
        let found = found.await.map_err(|e| refused(Code::INTERNAL, e))?;
        let mut found = found.map_err(|e| refused(Code::INTERNAL, e))?;
        found.sort_by(|a, b| {
            (&a.namespace, &a.name, a.generation).cmp(&(&b.namespace, &b.name, b.generation))
        });
        let images = found.iter().map(|held| Image {
            namespace: held.namespace.to_string(),
            name: held.name.to_string(),
            generation: held.generation,
            bytes: held.bytes(),
            last_used: held.last_used,
            in_use: held.in_use,
            replicated: self
                .told
                .replicated(|all| all.contains(&crate::agent::reference(held))),
            usable: held.usable,
            place: held.places().to_string(),
            memory_bytes: held.memory_bytes(),
            ..Image::default()
        });
        Ok(ImagesResponse {
            images: images.collect(),
            ..ImagesResponse::default()
        })
    }

    async fn watch(
        &self,
        _: &TtrpcContext,
        _: WatchRequest,
        to: ServerStreamSender<Event>,
    ) -> ttrpc::Result<()> {
        let mut events = self.told.events.subscribe();
        let step = self.told.step.lock();
        let step = step.unwrap_or_else(PoisonError::into_inner).clone();
        if to.send(&step).await.is_err() {
            return Ok(());
        }
        loop {
            let event = match events.recv().await {
                Ok(event) => event,
                Err(broadcast::error::RecvError::Lagged(lost)) => Event {
                    kind: Kind::LOST.into(),
                    done: lost,
                    ..Event::default()
                },
                Err(broadcast::error::RecvError::Closed) => return Ok(()),
            };
            // The caller is gone.
            if to.send(&event).await.is_err() {
                return Ok(());
            }
        }
    }

    async fn checkpoint(
        &self,
        _: &TtrpcContext,
        request: CheckpointRequest,
    ) -> ttrpc::Result<CheckpointResponse> {
        let image = name::<ImageName>(&request.name)?;
        let mut args = vec!["checkpoint", "--json", "--name", image.as_str()];
        args.extend(request.exit.then_some("--exit"));
        args.extend(request.keep_tcp.then_some("--keep-tcp"));
        args.extend(["--", request.container.as_str()]);
        let answer = self.command(&args).await?;
        let text = |key: &str| answer[key].as_str().unwrap_or_default().to_owned();
        Ok(CheckpointResponse {
            image: format!(
                "{}/{}@{}",
                text("namespace"),
                text("name"),
                answer["generation"]
            ),
            json: answer.to_string(),
            ..CheckpointResponse::default()
        })
    }

    async fn fetch(&self, _: &TtrpcContext, request: FetchRequest) -> ttrpc::Result<FetchResponse> {
        let namespace = name::<Namespace>(&request.namespace)?;
        let image = name::<ImageName>(&request.name)?;
        let args = [
            "image",
            "fetch",
            "--json",
            "-n",
            namespace.as_str(),
            image.as_str(),
        ];
        let answer = self.command(&args).await?;
        Ok(FetchResponse {
            image: answer["image"].as_str().unwrap_or_default().to_owned(),
            hit: answer["hit"].as_bool().unwrap_or_default(),
            ..FetchResponse::default()
        })
    }

    async fn round(&self, _: &TtrpcContext, _: RoundRequest) -> ttrpc::Result<RoundResponse> {
        let (asked, answer) = oneshot::channel();
        let ending = || refused(Code::UNAVAILABLE, "the agent is ending");
        let sent = self.rounds.send(asked).await;
        sent.map_err(|_| ending())?;
        let failed = answer.await.map_err(|_| ending())?;
        Ok(RoundResponse {
            failed,
            ..RoundResponse::default()
        })
    }
}
