//! A store of one object that stands still in the middle of it, until it is let go on: a download that takes as long as
//! a test wants.

use crate::Node;
use anyhow::Result;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

/// The object's bytes: less than a part, so that one request fetches it.
pub const SIZE: usize = 1 << 20;
/// What comes before it stands still: so little that nobody expects the rest soon.
const BEGUN: usize = 1 << 10;

/// A running store, whose bucket has one object whatever it is asked for. It ends with the runtime that started it.
#[derive(Debug)]
pub struct HaltingStore {
    begun: Arc<AtomicUsize>,
    goes_on: watch::Sender<bool>,
}

impl HaltingStore {
    /// Listens in the node's network.
    pub async fn start(node: &Node, address: SocketAddr) -> Result<HaltingStore> {
        let listener = node.silent_server(address).await?;
        listener.set_nonblocking(true)?;
        let listener = TcpListener::from_std(listener)?;
        let (goes_on, seen) = watch::channel(false);
        let begun = Arc::new(AtomicUsize::new(0));
        let count = begun.clone();
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                tokio::spawn(answer(stream, count.clone(), seen.clone()));
            }
        });
        Ok(HaltingStore { begun, goes_on })
    }

    /// How often somebody began to fetch the object. One who goes on where a download was cut does not begin.
    pub fn begun(&self) -> usize {
        self.begun.load(Ordering::Relaxed)
    }

    /// Sends what is missing, to everybody.
    pub fn go_on(&self) {
        self.goes_on.send_replace(true);
    }
}

/// One request, a HEAD or a GET of a range, and its connection's end.
async fn answer(
    mut stream: TcpStream,
    begun: Arc<AtomicUsize>,
    mut goes_on: watch::Receiver<bool>,
) -> io::Result<()> {
    let mut request = Vec::new();
    while !request.ends_with(b"\r\n\r\n") {
        if stream.read_buf(&mut request).await? == 0 {
            return Ok(());
        }
    }
    let request = String::from_utf8_lossy(&request).to_lowercase();
    let range = request.split("bytes=").nth(1);
    let start: Option<usize> = range.and_then(|range| range.split('-').next()?.parse().ok());
    let (status, range) = match start {
        Some(start) => (
            "206 Partial Content",
            format!("Content-Range: bytes {start}-{}/{SIZE}\r\n", SIZE - 1),
        ),
        None => ("200 OK", String::new()),
    };
    let left = SIZE - start.unwrap_or(0);
    let head = format!(
        "HTTP/1.1 {status}\r\nContent-Length: {left}\r\n{range}ETag: \"the only one\"\r\n\
         Last-Modified: Thu, 01 Jan 2026 00:00:00 GMT\r\nConnection: close\r\n\r\n"
    );
    stream.write_all(head.as_bytes()).await?;
    if request.starts_with("get ") {
        let body = vec![b'w'; left];
        let (first, rest) = body.split_at(match start {
            Some(0) | None => {
                begun.fetch_add(1, Ordering::Relaxed);
                BEGUN
            }
            Some(_) => 0,
        });
        stream.write_all(first).await?;
        if goes_on.wait_for(|goes_on| *goes_on).await.is_ok() {
            stream.write_all(rest).await?;
        }
    }
    stream.shutdown().await
}
