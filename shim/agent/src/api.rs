//! The agent's API: ttrpc on a unix socket, for root and a group. `proto/agent.proto` has the words, `docs/API.md` explains
//! them.
//!
//! It decides nothing: it tells what the agent does, and starts the commands that a person would type.

use std::{
    collections::HashSet,
    path::Path,
    sync::{Arc, Mutex, PoisonError},
    time::{SystemTime, UNIX_EPOCH},
};

use anyhow::Context as _;
use rekindle_checkpoint::ImageStore;
use rekindle_core::name::{ImageName, ImageRef, Namespace};
use serde_json::Value;
use tokio::sync::{broadcast, mpsc, oneshot};
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

mod commands;
mod socket;

use agent::{
    CheckpointRequest, CheckpointResponse, FetchRequest, FetchResponse, Image, ImagesRequest,
    ImagesResponse, RemoveRequest, RemoveResponse, RestoreRequest, RestoreResponse, ResumeRequest,
    ResumeResponse, RoundRequest, RoundResponse, SuspendRequest, SuspendResponse, WatchRequest,
};
pub(crate) use agent::{Event, event::Kind};
use agent_ttrpc::create_agent;
use commands::{Commands, Telling};

/// Events that are kept for who is slow; a round has some for each image.
const BACKLOG: usize = 1024;

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
    commands: Commands,
    rounds: mpsc::Sender<Asked>,
}

/// Serves at `path` while the answer lives; and the rounds that are asked for.
pub(crate) async fn serve(
    path: &Path,
    group: Option<&str>,
    store: &ImageStore,
    told: &Told,
    config: Option<&Path>,
) -> anyhow::Result<(Server, mpsc::Receiver<Asked>)> {
    let group = group.map(socket::gid).transpose()?;
    let listener =
        socket::bind(path, group).with_context(|| format!("serving at {}", path.display()))?;
    let (rounds, asked) = mpsc::channel(16);
    let service = Arc::new(Service {
        store: store.clone(),
        commands: Commands {
            told: told.clone(),
            config: config.map(Path::to_owned),
        },
        rounds,
    });
    let mut server = Server::new()
        .add_listener(Listener::new(socket::admitted(listener, group)))
        .register_service(create_agent(service));
    server.start().await.context("serving the API")?;
    tracing::info!(socket = %path.display(), "serving");
    Ok((server, asked))
}

fn refused(code: Code, reason: impl std::fmt::Display) -> ttrpc::Error {
    ttrpc::Error::RpcStatus(get_status(code, reason.to_string()))
}

/// `key: value` of a request, which has to be a name.
fn name<T: std::str::FromStr<Err: std::fmt::Display>>(value: &str) -> ttrpc::Result<T> {
    value
        .parse()
        .map_err(|e| refused(Code::INVALID_ARGUMENT, e))
}

fn text(answer: &Value, key: &str) -> String {
    answer[key].as_str().unwrap_or_default().to_owned()
}

impl Service {
    async fn run(
        &self,
        args: &[&str],
        progress: Option<Kind>,
        about: Event,
    ) -> ttrpc::Result<Value> {
        self.commands.run(args, Telling { progress, about }).await
    }

    /// Suspends or resumes a container; its id, and whether there was nothing to do.
    async fn change(
        &self,
        command: &str,
        container: &str,
        kind: Kind,
    ) -> ttrpc::Result<(String, bool)> {
        let about = Event {
            container: container.to_owned(),
            ..Event::default()
        };
        let args = [command, "--json", "--", container];
        let answer = self.run(&args, None, about).await?;
        let container = text(&answer, "container");
        let already = answer["already"].as_bool().unwrap_or_default();
        if !already {
            let changed = Event {
                container: container.clone(),
                ..Event::default()
            };
            self.commands.told.event(kind, changed);
        }
        Ok((container, already))
    }
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
                .commands
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
        let mut events = self.commands.told.events.subscribe();
        let step = self.commands.told.step.lock();
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
        let mut args = vec!["checkpoint", "--json", "--progress"];
        args.extend(["--name", image.as_str()]);
        args.extend(request.exit.then_some("--exit"));
        args.extend(request.keep_tcp.then_some("--keep-tcp"));
        args.extend(["--", request.container.as_str()]);
        let about = Event {
            container: request.container.clone(),
            ..Event::default()
        };
        let answer = self
            .run(&args, Some(Kind::CHECKPOINTING), about.clone())
            .await?;
        let image = text(&answer, "image");
        let made = Event {
            image: image.clone(),
            total: answer["bytes"].as_u64().unwrap_or_default(),
            ..about
        };
        self.commands.told.event(Kind::CHECKPOINTED, made);
        Ok(CheckpointResponse {
            image,
            json: answer.to_string(),
            ..CheckpointResponse::default()
        })
    }

    async fn restore(
        &self,
        _: &TtrpcContext,
        request: RestoreRequest,
    ) -> ttrpc::Result<RestoreResponse> {
        let image = name::<ImageRef>(&request.image)?.to_string();
        // In one word each, so that no value is taken for an option.
        let like = format!("--like={}", request.like);
        let namespace = format!("--containerd-namespace={}", request.containerd_namespace);
        let mut args = vec!["restore", "--json", &like];
        args.extend((!request.containerd_namespace.is_empty()).then_some(namespace.as_str()));
        args.extend(request.force.then_some("--force"));
        args.extend(["--", &image, &request.id]);
        let about = Event {
            container: request.id.clone(),
            ..Event::default()
        };
        let answer = self.run(&args, None, about.clone()).await?;
        let image = text(&answer, "image");
        let restored = Event {
            image: image.clone(),
            ..about
        };
        self.commands.told.event(Kind::RESTORED, restored);
        let pid = answer["pid"].as_u64().unwrap_or_default();
        Ok(RestoreResponse {
            image,
            pid: u32::try_from(pid).unwrap_or_default(),
            json: answer.to_string(),
            ..RestoreResponse::default()
        })
    }

    async fn suspend(
        &self,
        _: &TtrpcContext,
        request: SuspendRequest,
    ) -> ttrpc::Result<SuspendResponse> {
        let changed = self.change("suspend", &request.container, Kind::SUSPENDED);
        let (container, already) = changed.await?;
        Ok(SuspendResponse {
            container,
            already,
            ..SuspendResponse::default()
        })
    }

    async fn resume(
        &self,
        _: &TtrpcContext,
        request: ResumeRequest,
    ) -> ttrpc::Result<ResumeResponse> {
        let changed = self.change("resume", &request.container, Kind::RESUMED);
        let (container, already) = changed.await?;
        Ok(ResumeResponse {
            container,
            already,
            ..ResumeResponse::default()
        })
    }

    async fn remove(
        &self,
        _: &TtrpcContext,
        request: RemoveRequest,
    ) -> ttrpc::Result<RemoveResponse> {
        let namespace = name::<Namespace>(&request.namespace)?;
        let mut image = name::<ImageName>(&request.name)?.to_string();
        if request.generation > 0 {
            image = format!("{image}@{}", request.generation);
        }
        let mut args = vec!["image", "rm", "--json", "-n", namespace.as_str()];
        args.extend(request.force.then_some("--force"));
        args.push(&image);
        let about = Event {
            image: format!("{namespace}/{image}"),
            ..Event::default()
        };
        let answer = self.run(&args, None, about).await?;
        let removed = answer["removed"].as_array().into_iter().flatten();
        Ok(RemoveResponse {
            images: removed
                .filter_map(|image| Some(image.as_str()?.to_owned()))
                .collect(),
            ..RemoveResponse::default()
        })
    }

    async fn fetch(&self, _: &TtrpcContext, request: FetchRequest) -> ttrpc::Result<FetchResponse> {
        let namespace = name::<Namespace>(&request.namespace)?;
        let image = name::<ImageName>(&request.name)?;
        let about = Event {
            image: format!("{namespace}/{image}"),
            ..Event::default()
        };
        let (namespace, image) = (namespace.as_str(), image.as_str());
        let args = ["image", "fetch", "--json", "-n", namespace, image];
        let answer = self.run(&args, Some(Kind::FETCHING), about).await?;
        let image = text(&answer, "image");
        let fetched = Event {
            image: image.clone(),
            total: answer["bytes"].as_u64().unwrap_or_default(),
            ..Event::default()
        };
        self.commands.told.event(Kind::FETCHED, fetched);
        Ok(FetchResponse {
            image,
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
