//! What stands in for an apiserver: pods that are made, changed, deleted, read and watched.

use super::pki::{Pki, Users};
use anyhow::{Context, Result};
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Full, StreamBody};
use hyper::body::{Bytes, Frame, Incoming};
use hyper::header::{CONTENT_TYPE, HeaderValue};
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto::Builder;
use serde_json::{Value, json};
use std::collections::{BTreeMap, HashMap};
use std::convert::Infallible;
use std::fmt;
use std::net::{SocketAddr, TcpListener};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;
use tokio::sync::{oneshot, watch};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls::pki_types::PrivateKeyDer;
use tokio_rustls::rustls::server::WebPkiClientVerifier;
use tokio_rustls::rustls::{RootCertStore, ServerConfig, crypto::ring};

type Answer = Response<UnsyncBoxBody<Bytes, Infallible>>;
/// Whose pods, and which.
type Name = (String, String);

/// A running stand-in.
pub(super) struct StandIn {
    address: SocketAddr,
    cluster: Cluster,
    tls: TlsAcceptor,
    running: Option<(oneshot::Sender<()>, JoinHandle<()>)>,
}

impl fmt::Debug for StandIn {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("StandIn").finish_non_exhaustive()
    }
}

/// What it knows, which outlives it.
#[derive(Clone)]
struct Cluster {
    users: Users,
    state: Arc<Mutex<State>>,
    /// The newest version.
    version: watch::Sender<u64>,
}

#[derive(Default)]
struct State {
    pods: BTreeMap<Name, Value>,
    /// Whatever has happened, by its version.
    history: Vec<(u64, &'static str, Value)>,
}

impl Drop for StandIn {
    fn drop(&mut self) {
        let _ = self.stop();
    }
}

impl StandIn {
    /// Listens at `address`, and at the other sockets.
    pub(super) fn start(pki: &Pki, address: SocketAddr, also: Vec<TcpListener>) -> Result<StandIn> {
        let mut roots = RootCertStore::empty();
        roots.add(pki.ca_der.clone().into())?;
        let provider = Arc::new(ring::default_provider());
        let clients = WebPkiClientVerifier::builder_with_provider(roots.into(), provider.clone());
        let pair = pki.server()?;
        let tls = ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()?
            // Who shows none is asked for a token.
            .with_client_cert_verifier(clients.allow_unauthenticated().build()?)
            .with_single_cert(
                vec![pair.certificate_der.into()],
                PrivateKeyDer::Pkcs8(pair.key_der.into()),
            )?;
        let mut this = StandIn {
            address,
            cluster: Cluster {
                users: pki.users.clone(),
                state: Arc::default(),
                version: watch::Sender::new(1),
            },
            tls: TlsAcceptor::from(Arc::new(tls)),
            running: None,
        };
        this.listen(also)?;
        Ok(this)
    }

    pub(super) fn go_on(&mut self) -> Result<()> {
        self.listen(Vec::new())
    }

    fn listen(&mut self, also: Vec<TcpListener>) -> Result<()> {
        let mut listeners = vec![TcpListener::bind(self.address).context("listening")?];
        listeners.extend(also);
        let (stop, stopped) = oneshot::channel();
        let (cluster, tls) = (self.cluster.clone(), self.tls.clone());
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()?;
        // A test's runtime ends with the test; others may use it longer.
        let thread = std::thread::spawn(move || {
            runtime.block_on(async move {
                for listener in listeners {
                    tokio::spawn(accept(listener, cluster.clone(), tls.clone()));
                }
                let _ = stopped.await;
            });
        });
        self.running = Some((stop, thread));
        Ok(())
    }

    pub(super) fn stop(&mut self) -> Result<()> {
        if let Some((stop, thread)) = self.running.take() {
            drop(stop);
            thread.join().ok().context("the stand-in panicked")?;
        }
        Ok(())
    }
}

async fn accept(listener: TcpListener, cluster: Cluster, tls: TlsAcceptor) -> Result<()> {
    listener.set_nonblocking(true)?;
    let listener = tokio::net::TcpListener::from_std(listener)?;
    loop {
        let (stream, _) = listener.accept().await?;
        let (cluster, tls) = (cluster.clone(), tls.clone());
        tokio::spawn(async move {
            let stream = tls.accept(stream).await?;
            let shown = stream.get_ref().1.peer_certificates();
            let shown = shown.and_then(|all| all.first().map(|one| one.to_vec()));
            let user = shown.and_then(|shown| {
                let users = cluster.users.lock();
                users
                    .unwrap_or_else(PoisonError::into_inner)
                    .get(&shown)
                    .cloned()
            });
            let service = service_fn(|request| {
                let (cluster, user) = (cluster.clone(), user.clone());
                async move { Ok::<_, Infallible>(cluster.answer(request, user).await) }
            });
            let http = Builder::new(TokioExecutor::new());
            let _ = http.serve_connection(TokioIo::new(stream), service).await;
            Ok::<_, anyhow::Error>(())
        });
    }
}

impl Cluster {
    async fn answer(&self, request: Request<Incoming>, user: Option<String>) -> Answer {
        let answered = match user {
            Some(user) => self.handle(request, &user).await,
            None => Err((StatusCode::UNAUTHORIZED, "Unauthorized".to_owned())),
        };
        answered.unwrap_or_else(|(code, message)| {
            let reason = code.canonical_reason().unwrap_or_default().replace(' ', "");
            let status = json!({
                "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure",
                "message": message, "reason": reason, "code": code.as_u16(),
            });
            whole(code, &status)
        })
    }

    async fn handle(
        &self,
        request: Request<Incoming>,
        user: &str,
    ) -> Result<Answer, (StatusCode, String)> {
        let path = request.uri().path().to_owned();
        let query = query(request.uri().query().unwrap_or_default());
        let method = request.method().clone();
        let parts: Vec<&str> = path.trim_matches('/').split('/').collect();
        let body = request.into_body().collect();
        let body = body.await.map(|body| body.to_bytes()).unwrap_or_default();
        let body = || serde_json::from_slice::<Value>(&body).map_err(|e| bad(&e));
        match (&method, parts.as_slice()) {
            (&Method::GET, ["version"]) => Ok(whole(
                StatusCode::OK,
                &json!({
                    "major": "1", "minor": "36", "gitVersion": "v1.36.0-stand-in", "gitCommit": "", "gitTreeState": "",
                    "buildDate": "", "goVersion": "", "compiler": "", "platform": "",
                }),
            )),
            (&Method::GET, ["api", "v1", "namespaces", namespace, "pods", name]) => {
                let state = self.state();
                let found = state
                    .pods
                    .get(&((*namespace).to_owned(), (*name).to_owned()));
                permitted(user, found.map(node_of), name)?;
                let pod = found.ok_or_else(|| not_found(name))?;
                Ok(whole(StatusCode::OK, pod))
            }
            (&Method::GET, ["api", "v1", "namespaces", namespace, "pods"])
                if query.contains_key("watch") =>
            {
                let selector = query.get("fieldSelector").cloned().unwrap_or_default();
                let selected: HashMap<&str, &str> = selector
                    .split(',')
                    .filter_map(|one| one.split_once('='))
                    .collect();
                let node = selected.get("spec.nodeName").map(|node| (*node).to_owned());
                permitted(user, node, "")?;
                let name = selected.get("metadata.name").copied().unwrap_or_default();
                let of = ((*namespace).to_owned(), name.to_owned());
                Ok(self.watch(of, &query))
            }
            (&Method::POST, ["api", "v1", "namespaces", namespace, "pods"]) => {
                permitted(user, None, "")?;
                let mut pod = body()?;
                let name = pod["metadata"]["name"]
                    .as_str()
                    .unwrap_or_default()
                    .to_owned();
                let uid =
                    std::fs::read_to_string("/proc/sys/kernel/random/uuid").map_err(|e| bad(&e))?;
                pod["metadata"]["uid"] = json!(uid.trim());
                pod["metadata"]["namespace"] = json!(namespace);
                Ok(whole(
                    StatusCode::CREATED,
                    &self.happens("ADDED", ((*namespace).to_owned(), name), pod),
                ))
            }
            (&Method::PATCH, ["api", "v1", "namespaces", namespace, "pods", name, "status"]) => {
                permitted(user, None, name)?;
                let of = ((*namespace).to_owned(), (*name).to_owned());
                let found = self.state().pods.get(&of).cloned();
                let mut pod = found.ok_or_else(|| not_found(name))?;
                pod["status"] = body()?["status"].clone();
                Ok(whole(StatusCode::OK, &self.happens("MODIFIED", of, pod)))
            }
            (&Method::DELETE, ["api", "v1", "namespaces", namespace, "pods", name]) => {
                permitted(user, None, name)?;
                let of = ((*namespace).to_owned(), (*name).to_owned());
                let found = self.state().pods.remove(&of);
                let pod = found.ok_or_else(|| not_found(name))?;
                Ok(whole(StatusCode::OK, &self.happens("DELETED", of, pod)))
            }
            _ => Err((
                StatusCode::NOT_FOUND,
                format!("{method} {path}: the stand-in has no such call"),
            )),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes note of what happens to a pod, and tells who watches.
    fn happens(&self, what: &'static str, of: Name, mut pod: Value) -> Value {
        let mut state = self.state();
        let version = *self.version.borrow() + 1;
        pod["metadata"]["resourceVersion"] = json!(version.to_string());
        if what != "DELETED" {
            state.pods.insert(of, pod.clone());
        }
        state.history.push((version, what, pod.clone()));
        self.version.send_replace(version);
        pod
    }

    /// A line of JSON for each thing that has happened to a pod since a version, until the time that was asked for is over.
    fn watch(&self, of: Name, query: &HashMap<String, String>) -> Answer {
        let number = |key: &str| query.get(key).and_then(|value| value.parse::<u64>().ok());
        let mut seen = number("resourceVersion").unwrap_or_default();
        let limit = Duration::from_secs(number("timeoutSeconds").unwrap_or(300));
        let until = tokio::time::Instant::now() + limit;
        let (this, mut versions) = (self.clone(), self.version.subscribe());
        let lines = async_stream(move |lines| async move {
            loop {
                let newest = *versions.borrow_and_update();
                let new: Vec<Value> = {
                    let state = this.state();
                    let is_new = |(version, ..): &&(u64, &str, Value)| *version > seen;
                    let is_meant = |pod: &Value| {
                        pod["metadata"]["namespace"] == of.0 && pod["metadata"]["name"] == of.1
                    };
                    let all = state.history.iter().filter(is_new);
                    let meant = all.filter(|(_, _, pod)| is_meant(pod));
                    meant
                        .map(|(_, what, pod)| json!({"type": what, "object": pod}))
                        .collect()
                };
                seen = newest;
                for event in new {
                    if lines.send(format!("{event}\n")).await.is_err() {
                        return;
                    }
                }
                match tokio::time::timeout_at(until, versions.changed()).await {
                    Ok(Ok(())) => {}
                    _ => return,
                }
            }
        });
        let body = StreamBody::new(lines).boxed_unsync();
        let mut answer = Response::new(body);
        answer.headers_mut().insert(CONTENT_TYPE, json_body());
        answer
    }
}

fn json_body() -> HeaderValue {
    HeaderValue::from_static("application/json")
}

/// The frames of a body that a task writes.
fn async_stream<F>(
    write: impl FnOnce(tokio::sync::mpsc::Sender<String>) -> F,
) -> impl futures::Stream<Item = Result<Frame<Bytes>, Infallible>> + Send + 'static
where
    F: Future<Output = ()> + Send + 'static,
{
    let (sender, receiver) = tokio::sync::mpsc::channel(16);
    tokio::spawn(write(sender));
    futures::stream::unfold(receiver, |mut receiver| async move {
        let line: String = receiver.recv().await?;
        Some((Ok(Frame::data(Bytes::from(line))), receiver))
    })
}

fn whole(code: StatusCode, value: &Value) -> Answer {
    let mut answer = Response::new(Full::new(Bytes::from(value.to_string())).boxed_unsync());
    *answer.status_mut() = code;
    answer.headers_mut().insert(CONTENT_TYPE, json_body());
    answer
}

fn query(text: &str) -> HashMap<String, String> {
    let pairs = text.split('&').filter_map(|pair| pair.split_once('='));
    let clear = |text: &str| text.replace("%3D", "=").replace("%2C", ",");
    pairs
        .map(|(key, value)| (key.to_owned(), clear(value)))
        .collect()
}

fn node_of(pod: &Value) -> String {
    pod["spec"]["nodeName"]
        .as_str()
        .unwrap_or_default()
        .to_owned()
}

/// As the node authorizer has it: a node reads the pods that are bound to it, and watches those that it selects by its own
/// name. It does not learn whether another one's exist.
fn permitted(user: &str, node: Option<String>, name: &str) -> Result<(), (StatusCode, String)> {
    let Some(own) = user.strip_prefix("system:node:") else {
        return Ok(());
    };
    if node.as_deref() == Some(own) {
        return Ok(());
    }
    let message = format!(
        "pods \"{name}\" is forbidden: User \"{user}\" cannot get resource \"pods\" in API group \"\": no relationship found between node '{own}' and this object"
    );
    Err((StatusCode::FORBIDDEN, message))
}

fn not_found(name: &str) -> (StatusCode, String) {
    (StatusCode::NOT_FOUND, format!("pods \"{name}\" not found"))
}

fn bad(error: &dyn fmt::Display) -> (StatusCode, String) {
    (StatusCode::BAD_REQUEST, error.to_string())
}
