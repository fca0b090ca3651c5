//! Between a client and the server: what it does not lie about goes through.

use std::{
    collections::HashSet,
    io::{Read, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst},
    },
    time::Duration,
};

/// What a client asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Op {
    Head,
    Get,
    List,
    Put,
    /// A part of an upload.
    Part,
    /// Begins or completes an upload.
    Post,
    Delete,
}

#[derive(Debug)]
pub(crate) struct Request {
    pub(crate) op: Op,
    /// Without the bucket.
    pub(crate) key: String,
    /// How many of this kind came so far, this one included.
    pub(crate) nth: usize,
    /// Whether it is the first of its kind for this thing. Of requests that come at once, and are tried again together, each
    /// third one may be the same one's all the time.
    pub(crate) first: bool,
}

/// What becomes of an answer.
#[derive(Debug, Clone)]
pub(crate) enum Lie {
    None,
    /// This status and code, and the server never hears of the request.
    Answer(u16, &'static str),
    /// Success, and the server never hears of the request.
    Swallow,
    /// So many bytes of the body, then the end of the connection.
    Cut(usize),
    /// So many bytes of the body, then silence until the client gives up.
    Stall(usize),
    /// One wrong byte.
    Flip,
    /// As many bytes of something else.
    Other,
    /// An answer that does not say which range it is.
    NoRange,
    /// This connection and all that come after it break.
    GoAway,
}

type Rule = dyn Fn(&Request) -> Lie + Send + Sync;

pub(crate) struct Proxy {
    pub(crate) address: SocketAddr,
    server: SocketAddr,
    rule: Box<Rule>,
    counts: [AtomicUsize; 7],
    seen: Mutex<HashSet<(usize, String)>>,
    gone: AtomicBool,
}

impl Proxy {
    pub(crate) fn start(
        server: SocketAddr,
        rule: impl Fn(&Request) -> Lie + Send + Sync + 'static,
    ) -> Arc<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let proxy = Arc::new(Self {
            address: listener.local_addr().unwrap(),
            server,
            rule: Box::new(rule),
            counts: Default::default(),
            seen: Mutex::default(),
            gone: AtomicBool::new(false),
        });
        let accepting = Arc::clone(&proxy);
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let proxy = Arc::clone(&accepting);
                std::thread::spawn(move || proxy.converse(&stream));
            }
        });
        proxy
    }

    pub(crate) fn count(&self, op: Op) -> usize {
        self.counts[op as usize].load(SeqCst)
    }

    /// One request; the server closes behind it, and so do we.
    fn converse(&self, mut client: &TcpStream) -> Option<()> {
        client.set_nodelay(true).ok()?;
        let (head, body) = message(client)?;
        let head = String::from_utf8(head).ok()?;
        let (line, headers) = head.split_once("\r\n")?;
        let mut words = line.split(' ');
        let (method, target) = (words.next()?, words.next()?);
        let (path, query) = target.split_once('?').unwrap_or((target, ""));
        let op = match method {
            "HEAD" => Op::Head,
            "GET" if query.contains("list-type") => Op::List,
            "GET" => Op::Get,
            "PUT" if query.contains("partNumber") => Op::Part,
            "PUT" => Op::Put,
            "DELETE" => Op::Delete,
            _ => Op::Post,
        };
        let request = Request {
            op,
            key: path.splitn(3, '/').nth(2).unwrap_or_default().to_owned(),
            nth: self.counts[op as usize].fetch_add(1, SeqCst) + 1,
            first: self
                .seen
                .lock()
                .unwrap()
                .insert((op as usize, path.to_owned())),
        };
        let lie = match self.gone.load(SeqCst) {
            true => Lie::GoAway,
            false => (self.rule)(&request),
        };
        match lie {
            Lie::GoAway => {
                self.gone.store(true, SeqCst);
                return None;
            }
            Lie::Answer(status, code) => {
                let xml = match op {
                    Op::Head => String::new(),
                    _ => format!("<Error><Code>{code}</Code><Message>a lie</Message></Error>"),
                };
                return answer(client, &format!("{status} {code}"), xml.as_bytes());
            }
            Lie::Swallow => return answer(client, "200 OK", b""),
            _ => {}
        }
        let mut server = TcpStream::connect(self.server).ok()?;
        server
            .write_all(format!("{line}\r\nconnection: close\r\n{headers}").as_bytes())
            .ok()?;
        server.write_all(&body).ok()?;
        let mut all = Vec::new();
        server.read_to_end(&mut all).ok()?;
        // What a client is told before the answer is no part of it.
        while all.starts_with(b"HTTP/1.1 100") {
            all.drain(..end_of_head(&all)?);
        }
        let begin = end_of_head(&all)?;
        let length = all.len() - begin;
        match lie {
            Lie::Cut(n) => client.write_all(&all[..begin + n.min(length)]).ok(),
            Lie::Stall(n) => {
                client.write_all(&all[..begin + n.min(length)]).ok()?;
                // Ends when the client closes.
                client
                    .set_read_timeout(Some(Duration::from_secs(60)))
                    .ok()?;
                client.read(&mut [0]).ok().and(None)
            }
            Lie::Flip => {
                all[begin + length / 2] ^= 0x40;
                client.write_all(&all).ok()
            }
            Lie::NoRange => {
                let head = String::from_utf8_lossy(&all[..begin]).into_owned();
                let lines = head
                    .lines()
                    .filter(|line| !line.to_ascii_lowercase().starts_with("content-range:"));
                let head: Vec<&str> = lines.collect();
                let head = head
                    .join("\r\n")
                    .replacen("206 Partial Content", "200 OK", 1);
                client.write_all(format!("{head}\r\n").as_bytes()).ok()?;
                client.write_all(&all[begin..]).ok()
            }
            Lie::Other => {
                all[begin..].reverse();
                client.write_all(&all).ok()
            }
            _ => client.write_all(&all).ok(),
        }
    }
}

fn answer(mut client: &TcpStream, status: &str, body: &[u8]) -> Option<()> {
    let head = format!(
        "HTTP/1.1 {status}\r\ncontent-length: {}\r\netag: \"0\"\r\nconnection: close\r\n\r\n",
        body.len()
    );
    client.write_all(head.as_bytes()).ok()?;
    client.write_all(body).ok()
}

/// The head of a message, and as many bytes as it announces.
fn message(mut from: &TcpStream) -> Option<(Vec<u8>, Vec<u8>)> {
    let mut all = Vec::new();
    let mut piece = [0; 64 << 10];
    let head = loop {
        if let Some(end) = end_of_head(&all) {
            break end;
        }
        let n = from.read(&mut piece).ok().filter(|n| *n > 0)?;
        all.extend_from_slice(&piece[..n]);
    };
    let mut body = all.split_off(head);
    let text = String::from_utf8_lossy(&all).to_ascii_lowercase();
    let length = text
        .lines()
        .find_map(|line| line.strip_prefix("content-length:"))
        .map_or(0, |n| n.trim().parse().unwrap());
    while body.len() < length {
        let n = from.read(&mut piece).ok().filter(|n| *n > 0)?;
        body.extend_from_slice(&piece[..n]);
    }
    Some((all, body))
}

fn end_of_head(bytes: &[u8]) -> Option<usize> {
    let at = bytes.windows(4).position(|four| four == b"\r\n\r\n")?;
    Some(at + 4)
}
