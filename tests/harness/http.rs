//! Requests to what listens inside a node's network: a thread enters it, for a thread's namespace is its own.

use crate::{Node, poll};
use anyhow::{Context, Result, bail, ensure};
use nix::sched::{CloneFlags, setns};
use std::fs::File;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::time::{Duration, Instant};

/// How often somebody who waits for a server asks again: short beside the fastest start, and idle all the same.
const AGAIN: Duration = Duration::from_millis(2);

impl Node {
    /// `GET http://address/target` from within the node's network; the body of a 200.
    pub async fn http_get(&self, address: SocketAddr, target: &str) -> Result<String> {
        let request = request(address, target);
        self.within_network(move |_| ask(address, &request))
            .await
            .with_context(|| format!("GET http://{address}{target} in the node"))
    }

    /// The first answer of a server that does not listen yet, or not any more, and the moment it came.
    #[allow(
        clippy::disallowed_methods,
        reason = "the thread that sleeps is the request's own"
    )]
    pub async fn http_first(&self, address: SocketAddr, target: &str) -> Result<(String, Instant)> {
        let request = request(address, target);
        let first = move |given_up: &dyn Fn() -> bool| {
            let deadline = Instant::now() + *poll::DEADLINE;
            loop {
                match ask(address, &request) {
                    Ok(body) => return Ok((body, Instant::now())),
                    Err(e) if given_up() || Instant::now() > deadline => return Err(e),
                    Err(_) => std::thread::sleep(AGAIN),
                }
            }
        };
        self.within_network(first).await.with_context(|| {
            format!(
                "waiting {:?} for the first answer of http://{address}{target} in the node",
                *poll::DEADLINE
            )
        })
    }

    /// A server in the node's network that takes connections and never says a word, for as long as it is kept.
    pub async fn silent_server(&self, address: SocketAddr) -> Result<TcpListener> {
        // The kernel takes them: nobody accepts.
        self.within_network(move |_| Ok(TcpListener::bind(address)?))
            .await
            .with_context(|| format!("listening at {address} in the node"))
    }

    async fn within_network<T: Send + 'static>(
        &self,
        ask: impl FnOnce(&dyn Fn() -> bool) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        let network = File::open(format!("/proc/{}/ns/net", self.pid()))?;
        // A thread of its own, which ends afterwards: it has left the host's network for good.
        let (answered, answer) = tokio::sync::oneshot::channel();
        std::thread::spawn(move || {
            let entered =
                setns(&network, CloneFlags::CLONE_NEWNET).context("entering the node's network");
            let answer = entered.and_then(|()| ask(&|| answered.is_closed()));
            let _ = answered.send(answer);
        });
        answer.await?
    }
}

fn request(address: SocketAddr, target: &str) -> String {
    format!("GET {target} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n")
}

fn ask(address: SocketAddr, request: &str) -> Result<String> {
    let mut stream = TcpStream::connect_timeout(&address, Duration::from_secs(5))?;
    stream.set_read_timeout(Some(*poll::DEADLINE))?;
    stream.write_all(request.as_bytes())?;
    let mut text = String::new();
    stream.read_to_string(&mut text)?;
    let Some((head, body)) = text.split_once("\r\n\r\n") else {
        bail!("{address} answered {text:?}");
    };
    ensure!(head.contains(" 200 "), "{address} answered {head:?}");
    Ok(body.to_owned())
}
