//! Between a client and the registry: what it does not lie about goes through.

use std::{
    collections::HashSet,
    io::{Read, Write},
    net::{Shutdown, SocketAddr, TcpStream},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst},
    },
    time::Duration,
};

use crate::http::{Message, serve};

/// What a client asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Op {
    /// Whether a blob is there.
    Head,
    /// A blob, or a part of one.
    Get,
    Manifest,
    Tags,
    /// Begins an upload.
    Begin,
    /// A chunk of one.
    Chunk,
    /// How much of one is there.
    Look,
    /// Completes one.
    Put,
    Abandon,
    PutManifest,
}

#[derive(Debug)]
pub(crate) struct Request {
    pub(crate) op: Op,
    /// How many of this kind came so far, this one included.
    pub(crate) nth: usize,
    /// Whether it is the first of its kind for this thing. Of requests that come at once, and are tried again together, each
    /// third one may be the same one's all the time.
    pub(crate) first: bool,
    pub(crate) message: Message,
}

/// What becomes of a request.
#[derive(Debug, Clone)]
pub(crate) enum Lie {
    None,
    /// This, and the registry never hears of the request.
    Answer(Message),
    /// So many bytes of the body of the answer, then the end of the connection.
    Cut(usize),
    /// So many bytes of the body of the answer, then silence until the client gives up.
    Stall(usize),
    /// Nothing at all until the client gives up, and the registry never hears of the request.
    Silence,
    /// One wrong byte.
    Flip,
    /// As many bytes of something else.
    Other,
    /// The registry never hears that only a part is wanted.
    NoRange,
    /// An answer with this header in place of what it had.
    Header(&'static str, String),
    /// The registry gets half of the body, and the connection breaks.
    Half,
    /// This connection and all that come after it break.
    GoAway,
    /// The registry hears of it without credentials: they were the proxy's.
    Unauthorized,
}

impl Lie {
    pub(crate) fn says(status: &str) -> Self {
        let code = status.split(' ').nth(1).unwrap_or_default();
        let text = format!("{{\"errors\":[{{\"code\":{code:?},\"message\":\"a lie\"}}]}}");
        Self::Answer(Message::answer(status, &[], text.as_bytes()))
    }
}

type Rule = dyn Fn(&Request) -> Lie + Send + Sync;

pub(crate) struct Proxy {
    pub(crate) address: Mutex<Option<SocketAddr>>,
    registry: SocketAddr,
    rule: Box<Rule>,
    counts: [AtomicUsize; 10],
    seen: Mutex<HashSet<(usize, String)>>,
    gone: AtomicBool,
}

impl Proxy {
    pub(crate) fn start(
        registry: SocketAddr,
        rule: impl Fn(&Request) -> Lie + Send + Sync + 'static,
    ) -> Arc<Self> {
        let proxy = Arc::new(Self {
            address: Mutex::default(),
            registry,
            rule: Box::new(rule),
            counts: Default::default(),
            seen: Mutex::default(),
            gone: AtomicBool::new(false),
        });
        let serving = Arc::clone(&proxy);
        let address = serve(move |client| serving.converse(client));
        *proxy.address.lock().unwrap() = Some(address);
        proxy
    }

    pub(crate) fn at(&self) -> SocketAddr {
        self.address.lock().unwrap().unwrap()
    }

    pub(crate) fn count(&self, op: Op) -> usize {
        self.counts[op as usize].load(SeqCst)
    }

    fn converse(&self, mut client: &TcpStream) -> Option<()> {
        let mut message = Message::read(client, false)?;
        let (path, _) = message
            .target()
            .split_once('?')
            .unwrap_or((message.target(), ""));
        let upload = path.contains("/blobs/uploads/");
        let op = match message.method() {
            "HEAD" => Op::Head,
            "POST" => Op::Begin,
            "PATCH" => Op::Chunk,
            "DELETE" => Op::Abandon,
            "PUT" if path.contains("/manifests/") => Op::PutManifest,
            "PUT" => Op::Put,
            _ if upload => Op::Look,
            _ if path.contains("/manifests/") => Op::Manifest,
            _ if path.contains("/tags/") => Op::Tags,
            _ => Op::Get,
        };
        let request = Request {
            op,
            nth: self.counts[op as usize].fetch_add(1, SeqCst) + 1,
            first: self
                .seen
                .lock()
                .unwrap()
                .insert((op as usize, path.to_owned())),
            message: message.clone(),
        };
        let lie = match self.gone.load(SeqCst) {
            true => Lie::GoAway,
            false => (self.rule)(&request),
        };
        match &lie {
            Lie::GoAway => {
                self.gone.store(true, SeqCst);
                return None;
            }
            Lie::Answer(answer) => {
                client.write_all(&answer.head()).ok()?;
                return match op {
                    Op::Head => Some(()),
                    _ => client.write_all(&answer.body).ok(),
                };
            }
            Lie::Silence => return wait(client),
            Lie::NoRange => message.remove("range"),
            Lie::Unauthorized => message.remove("authorization"),
            _ => {}
        }
        message.set("connection", "close");
        let mut registry = TcpStream::connect(self.registry).ok()?;
        registry.write_all(&message.head()).ok()?;
        if let Lie::Half = lie {
            registry
                .write_all(&message.body[..message.body.len() / 2])
                .ok()?;
            registry.shutdown(Shutdown::Write).ok()?;
            // It has noticed when it has answered, or closed.
            let _ = registry.read_to_end(&mut Vec::new());
            return None;
        }
        registry.write_all(&message.body).ok()?;
        let answer = Message::read(&registry, op == Op::Head)?;
        tell(client, answer, &lie)
    }
}

fn tell(mut client: &TcpStream, mut answer: Message, lie: &Lie) -> Option<()> {
    let length = answer.body.len();
    let mut keep = length;
    match lie {
        Lie::Cut(n) | Lie::Stall(n) => keep = length.min(*n),
        Lie::Flip if length > 0 => answer.body[length / 2] ^= 0x40,
        Lie::Other => answer.body.reverse(),
        Lie::Header(name, value) => answer.set(name, value),
        _ => {}
    }
    client.write_all(&answer.head()).ok()?;
    client.write_all(&answer.body[..keep]).ok()?;
    if let Lie::Stall(_) = lie {
        wait(client)?;
    }
    Some(())
}

/// Until the client closes.
fn wait(mut client: &TcpStream) -> Option<()> {
    client
        .set_read_timeout(Some(Duration::from_secs(60)))
        .ok()?;
    let _ = client.read(&mut [0]);
    Some(())
}
