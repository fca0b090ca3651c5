//! An S3 store that lies on request: a real socket, the three requests that a download needs, and a
//! fault for each of them.

use std::{
    collections::BTreeMap,
    io::{BufRead, BufReader, Read, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    sync::{
        Arc, Condvar, Mutex,
        atomic::{AtomicU64, AtomicUsize, Ordering::SeqCst},
    },
    time::Duration,
};

use base64_simd::STANDARD;
use md5::{Digest, Md5};
use rekindle_store::crc::Crc64;

/// Nothing that a test waits for takes longer on a machine that works.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Op {
    List,
    Head,
    Get,
}

#[derive(Debug)]
pub(crate) struct Request {
    pub(crate) op: Op,
    pub(crate) key: String,
    /// First byte of the range.
    pub(crate) start: u64,
    /// How many of this kind came so far, this one included.
    pub(crate) nth: usize,
    /// The access key that signed it.
    pub(crate) signer: String,
    query: BTreeMap<String, String>,
    end: Option<u64>,
    if_match: Option<String>,
    checksums: bool,
}

#[derive(Debug, Clone, Copy)]
pub(crate) enum Fault {
    /// None: the truth.
    Serve,
    /// This status and code instead.
    Answer(u16, &'static str),
    /// This many bytes of the body, then RST.
    Reset(usize),
    /// This many bytes of the body, then a proper end.
    Short(usize),
    /// This many bytes of the body, then silence until the client gives up.
    Stall(usize),
    /// One wrong byte.
    Flip,
    /// The object as it is now, whatever `If-Match` says.
    IgnoreIfMatch,
    /// The whole object with 200, whatever the range says.
    IgnoreRange,
    /// This many bytes of the body, then nothing until the gate opens.
    Hold(usize),
}

#[derive(Debug, Clone)]
pub(crate) struct Object {
    pub(crate) bytes: Arc<Vec<u8>>,
    pub(crate) etag: String,
    /// Checksum headers of HEAD.
    pub(crate) checksums: Vec<(&'static str, String)>,
    /// A size that LIST and HEAD claim instead of the true one.
    pub(crate) claims: Option<i64>,
}

impl Object {
    /// As S3 stores it today: the MD5 as ETag, and a CRC-64/NVME.
    pub(crate) fn new(bytes: Vec<u8>) -> Self {
        let crc = STANDARD.encode_to_string(Crc64::of(&bytes).0.to_be_bytes());
        Self::without_checksum(bytes).with("x-amz-checksum-crc64nvme", crc)
    }

    pub(crate) fn without_checksum(bytes: Vec<u8>) -> Self {
        let md5: String = Md5::digest(&bytes)
            .iter()
            .map(|b| format!("{b:02x}"))
            .collect();
        Self {
            bytes: Arc::new(bytes),
            etag: format!("\"{md5}\""),
            checksums: Vec::new(),
            claims: None,
        }
    }

    pub(crate) fn with(mut self, name: &'static str, value: String) -> Self {
        self.checksums.push((name, value));
        self
    }

    fn size(&self) -> i64 {
        self.claims.unwrap_or(self.bytes.len() as i64)
    }
}

type Hook = dyn Fn(&Request, &Liar) -> Fault + Send + Sync;

pub(crate) struct Liar {
    pub(crate) address: SocketAddr,
    /// Bytes of bodies that GETs have brought.
    pub(crate) served: AtomicU64,
    /// In the order in which LIST shows them: a true store sorts them.
    pub(crate) objects: Mutex<Vec<(String, Object)>>,
    page: usize,
    counts: [AtomicUsize; 3],
    hook: Box<Hook>,
    gate: (Mutex<(bool, usize)>, Condvar),
}

impl Liar {
    pub(crate) fn start(
        objects: Vec<(&str, Object)>,
        hook: impl Fn(&Request, &Liar) -> Fault + Send + Sync + 'static,
    ) -> Arc<Self> {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let owned = objects
            .into_iter()
            .map(|(key, object)| (key.to_owned(), object));
        let liar = Arc::new(Self {
            address: listener.local_addr().unwrap(),
            served: AtomicU64::new(0),
            objects: Mutex::new(owned.collect()),
            page: 1000,
            counts: Default::default(),
            hook: Box::new(hook),
            gate: Default::default(),
        });
        let accepting = Arc::clone(&liar);
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                // Head and body are two writes: with Nagle the second waits 40 ms for an ACK.
                stream.set_nodelay(true).unwrap();
                let liar = Arc::clone(&accepting);
                std::thread::spawn(move || liar.converse(stream));
            }
        });
        liar
    }

    pub(crate) fn count(&self, op: Op) -> usize {
        self.counts[op as usize].load(SeqCst)
    }

    pub(crate) fn put(&self, key: &str, object: Object) {
        let mut objects = self.objects.lock().unwrap();
        objects.retain(|(name, _)| name != key);
        objects.push((key.to_owned(), object));
    }

    /// Waits until `n` bodies are held at the gate.
    pub(crate) fn wait_for_held(&self, n: usize) {
        let (gate, changed) = &self.gate;
        let held = changed
            .wait_timeout_while(gate.lock().unwrap(), PATIENCE, |(_, held)| *held < n)
            .unwrap();
        assert!(
            !held.1.timed_out(),
            "{} of {n} bodies came to the gate",
            held.0.1
        );
    }

    pub(crate) fn open_gate(&self) {
        self.gate.0.lock().unwrap().0 = true;
        self.gate.1.notify_all();
    }

    fn pass_gate(&self) {
        let (gate, changed) = &self.gate;
        let mut state = gate.lock().unwrap();
        state.1 += 1;
        changed.notify_all();
        let _state = changed
            .wait_timeout_while(state, PATIENCE, |(open, _)| !*open)
            .unwrap();
    }

    /// Answers requests until the client closes or a fault ends the connection.
    fn converse(&self, stream: TcpStream) {
        let mut reader = BufReader::new(stream.try_clone().unwrap());
        while let Some(request) = self.read(&mut reader) {
            if self.answer(&request, &stream).is_none() {
                return;
            }
        }
    }

    fn read(&self, from: &mut impl BufRead) -> Option<Request> {
        let mut line = String::new();
        from.read_line(&mut line).ok().filter(|n| *n > 0)?;
        let mut words = line.split(' ');
        let (method, target) = (words.next()?.to_owned(), words.next()?.to_owned());
        let mut headers = BTreeMap::new();
        loop {
            let mut line = String::new();
            from.read_line(&mut line).ok()?;
            let Some((name, value)) = line.trim_end().split_once(": ") else {
                break;
            };
            headers.insert(name.to_ascii_lowercase(), value.to_owned());
        }
        let (path, query) = target.split_once('?').unwrap_or((&target, ""));
        let query: BTreeMap<_, _> = query
            .split('&')
            .filter_map(|pair| pair.split_once('='))
            .map(|(name, value)| (name.to_owned(), decode(value)))
            .collect();
        let op = match method.as_str() {
            "HEAD" => Op::Head,
            _ if query.contains_key("list-type") => Op::List,
            _ => Op::Get,
        };
        let range = headers.get("range").and_then(|range| {
            let (start, end) = range.strip_prefix("bytes=")?.split_once('-')?;
            Some((start.parse::<u64>().ok()?, end.parse::<u64>().ok()? + 1))
        });
        let signer = headers
            .get("authorization")
            .and_then(|text| text.split("Credential=").nth(1)?.split('/').next())
            .unwrap_or_default();
        Some(Request {
            op,
            // Path style: /bucket/key.
            key: decode(path.splitn(3, '/').nth(2).unwrap_or_default()),
            start: range.map_or(0, |range| range.0),
            end: range.map(|range| range.1),
            nth: self.counts[op as usize].fetch_add(1, SeqCst) + 1,
            signer: signer.to_owned(),
            if_match: headers.get("if-match").cloned(),
            checksums: headers.contains_key("x-amz-checksum-mode"),
            query,
        })
    }

    /// `None` ends the connection.
    fn answer(&self, request: &Request, stream: &TcpStream) -> Option<()> {
        let fault = (self.hook)(request, self);
        if let Fault::Answer(status, code) = fault {
            return refuse(stream, request.op, status, code);
        }
        match request.op {
            Op::List => self.list(request, stream),
            Op::Head | Op::Get => {
                let objects = self.objects.lock().unwrap();
                let found = objects.iter().find(|(key, _)| *key == request.key);
                let found = found.map(|(_, object)| object.clone());
                drop(objects);
                match found {
                    None => refuse(stream, request.op, 404, "NoSuchKey"),
                    Some(object) if request.op == Op::Head => head(request, &object, stream),
                    Some(object) => self.get(request, &object, fault, stream),
                }
            }
        }
    }

    fn list(&self, request: &Request, stream: &TcpStream) -> Option<()> {
        let prefix = request.query.get("prefix").cloned().unwrap_or_default();
        let first: usize = match request.query.get("continuation-token") {
            Some(token) => token.parse().ok()?,
            None => 0,
        };
        let objects = self.objects.lock().unwrap();
        // A lying store shows what was not asked for; "lie:" marks such keys.
        let all: Vec<_> = objects
            .iter()
            .filter(|(key, _)| key.starts_with(&prefix) || key.starts_with("lie:"))
            .collect();
        let rows: String = all
            .iter()
            .skip(first)
            .take(self.page)
            .map(|(key, object)| {
                let key = key.trim_start_matches("lie:");
                format!(
                    "<Contents><Key>{key}</Key><Size>{}</Size></Contents>",
                    object.size()
                )
            })
            .collect();
        let more = first + self.page < all.len();
        let token = match more {
            true => format!(
                "<NextContinuationToken>{}</NextContinuationToken>",
                first + self.page
            ),
            false => String::new(),
        };
        let xml = format!(
            "<?xml version=\"1.0\"?><ListBucketResult><IsTruncated>{more}</IsTruncated>{token}{rows}</ListBucketResult>"
        );
        send(
            stream,
            "200 OK",
            &[("content-type", "application/xml")],
            xml.as_bytes(),
        )
    }

    fn get(
        &self,
        request: &Request,
        object: &Object,
        fault: Fault,
        mut stream: &TcpStream,
    ) -> Option<()> {
        let changed = request
            .if_match
            .as_ref()
            .is_some_and(|etag| *etag != object.etag);
        if changed && !matches!(fault, Fault::IgnoreIfMatch) {
            return refuse(stream, request.op, 412, "PreconditionFailed");
        }
        let whole = object.bytes.len() as u64;
        let end = request.end.unwrap_or(whole).min(whole);
        if let Fault::IgnoreRange = fault {
            self.served.fetch_add(whole, SeqCst);
            return send(stream, "200 OK", &[("etag", &object.etag)], &object.bytes);
        }
        if request.start >= end {
            return refuse(stream, request.op, 416, "InvalidRange");
        }
        let mut body = object.bytes[request.start as usize..end as usize].to_vec();
        if let Fault::Flip = fault {
            let middle = body.len() / 2;
            body[middle] ^= 0x40;
        }
        let head = format!(
            "HTTP/1.1 206 Partial Content\r\ncontent-length: {}\r\ncontent-range: bytes {}-{}/{whole}\r\netag: {}\r\n\r\n",
            body.len(),
            request.start,
            end - 1,
            object.etag
        );
        stream.write_all(head.as_bytes()).ok()?;
        let cut = match fault {
            Fault::Reset(n) | Fault::Short(n) | Fault::Stall(n) | Fault::Hold(n) => {
                n.min(body.len())
            }
            _ => body.len(),
        };
        self.body(stream, &body[..cut])?;
        match fault {
            Fault::Reset(_) => {
                rustix::net::sockopt::set_socket_linger(stream, Some(Duration::ZERO)).ok()?;
                None
            }
            Fault::Short(_) => None,
            // Ends when the client closes.
            Fault::Stall(_) => stream.read(&mut [0]).ok().and(None),
            Fault::Hold(_) => {
                self.pass_gate();
                self.body(stream, &body[cut..])
            }
            _ => Some(()),
        }
    }

    fn body(&self, mut stream: &TcpStream, bytes: &[u8]) -> Option<()> {
        self.served.fetch_add(bytes.len() as u64, SeqCst);
        stream.write_all(bytes).ok()
    }
}

fn head(request: &Request, object: &Object, mut stream: &TcpStream) -> Option<()> {
    let mut text = format!(
        "HTTP/1.1 200 OK\r\ncontent-length: {}\r\netag: {}\r\nlast-modified: Sun, 01 Nov 2026 00:00:00 GMT\r\n",
        object.size(),
        object.etag
    );
    for (name, value) in object.checksums.iter().filter(|_| request.checksums) {
        text.push_str(&format!("{name}: {value}\r\n"));
    }
    stream.write_all(format!("{text}\r\n").as_bytes()).ok()
}

fn refuse(mut stream: &TcpStream, op: Op, status: u16, code: &str) -> Option<()> {
    if op == Op::Head {
        // No body: HEAD has none, and the client must live with the status.
        return stream
            .write_all(format!("HTTP/1.1 {status} {code}\r\ncontent-length: 0\r\n\r\n").as_bytes())
            .ok();
    }
    let xml = format!("<Error><Code>{code}</Code><Message>as the test wants</Message></Error>");
    send(
        stream,
        &format!("{status} {code}"),
        &[("content-type", "application/xml")],
        xml.as_bytes(),
    )
}

fn send(mut stream: &TcpStream, status: &str, headers: &[(&str, &str)], body: &[u8]) -> Option<()> {
    let mut text = format!("HTTP/1.1 {status}\r\ncontent-length: {}\r\n", body.len());
    for (name, value) in headers {
        text.push_str(&format!("{name}: {value}\r\n"));
    }
    stream.write_all(format!("{text}\r\n").as_bytes()).ok()?;
    stream.write_all(body).ok()
}

fn decode(text: &str) -> String {
    let mut bytes = Vec::new();
    let mut rest = text.bytes();
    while let Some(byte) = rest.next() {
        match byte {
            b'%' => {
                let hex: String = rest.by_ref().take(2).map(char::from).collect();
                bytes.push(u8::from_str_radix(&hex, 16).unwrap());
            }
            other => bytes.push(other),
        }
    }
    String::from_utf8(bytes).unwrap()
}
