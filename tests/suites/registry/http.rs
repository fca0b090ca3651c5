//! As much of HTTP as a server that lies needs.

use std::{
    io::{Read, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    sync::Arc,
};

/// A message: its first line, its headers, its body.
#[derive(Debug, Clone)]
pub(crate) struct Message {
    pub(crate) line: String,
    pub(crate) headers: Vec<(String, String)>,
    pub(crate) body: Vec<u8>,
}

impl Message {
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        let mut all = self.headers.iter();
        let (_, value) = all.find(|(key, _)| key.eq_ignore_ascii_case(name))?;
        Some(value)
    }

    pub(crate) fn set(&mut self, name: &str, value: &str) {
        self.remove(name);
        self.headers.push((name.to_owned(), value.to_owned()));
    }

    pub(crate) fn remove(&mut self, name: &str) {
        self.headers
            .retain(|(key, _)| !key.eq_ignore_ascii_case(name));
    }

    pub(crate) fn method(&self) -> &str {
        self.line.split(' ').next().unwrap_or_default()
    }

    /// Path and query.
    pub(crate) fn target(&self) -> &str {
        self.line.split(' ').nth(1).unwrap_or_default()
    }

    pub(crate) fn head(&self) -> Vec<u8> {
        let mut text = format!("{}\r\n", self.line);
        for (name, value) in &self.headers {
            text.push_str(&format!("{name}: {value}\r\n"));
        }
        text.push_str("\r\n");
        text.into_bytes()
    }

    /// An answer.
    pub(crate) fn answer(status: &str, headers: &[(&str, &str)], body: &[u8]) -> Self {
        let mut answer = Self {
            line: format!("HTTP/1.1 {status}"),
            headers: Vec::new(),
            body: body.to_vec(),
        };
        for (name, value) in headers {
            answer.set(name, value);
        }
        answer.set("content-length", &body.len().to_string());
        answer.set("connection", "close");
        answer
    }

    /// Reads one. An answer to HEAD has no body, whatever it announces.
    pub(crate) fn read(mut from: &TcpStream, of_head: bool) -> Option<Self> {
        let mut all = Vec::new();
        let mut piece = [0; 64 << 10];
        let end = loop {
            if let Some(end) = all.windows(4).position(|four| four == b"\r\n\r\n") {
                break end + 4;
            }
            let n = from.read(&mut piece).ok().filter(|n| *n > 0)?;
            all.extend_from_slice(&piece[..n]);
        };
        let body = all.split_off(end);
        let text = String::from_utf8(all).ok()?;
        let mut lines = text.lines();
        let line = lines.next()?.to_owned();
        let headers = lines.filter_map(|line| line.split_once(": "));
        let mut message = Self {
            line,
            headers: headers.map(|(a, b)| (a.to_owned(), b.to_owned())).collect(),
            body,
        };
        let length = message.header("content-length").map(str::parse::<usize>);
        match length {
            _ if of_head => {}
            Some(length) => {
                let length = length.ok()?;
                while message.body.len() < length {
                    let n = from.read(&mut piece).ok().filter(|n| *n > 0)?;
                    message.body.extend_from_slice(&piece[..n]);
                }
            }
            None if message.line.starts_with("HTTP/") => {
                from.read_to_end(&mut message.body).ok()?;
                message.unchunk();
            }
            None => {}
        }
        Some(message)
    }

    /// Takes a chunked body apart.
    fn unchunk(&mut self) {
        if self.header("transfer-encoding") != Some("chunked") {
            return;
        }
        let mut body = Vec::new();
        let mut rest = &self.body[..];
        while let Some(end) = rest.windows(2).position(|two| two == b"\r\n") {
            let size = String::from_utf8_lossy(&rest[..end]).into_owned();
            let size = usize::from_str_radix(&size, 16).unwrap_or(0);
            if size == 0 {
                break;
            }
            body.extend_from_slice(&rest[end + 2..end + 2 + size]);
            rest = &rest[end + 2 + size + 2..];
        }
        self.body = body;
        self.remove("transfer-encoding");
        self.set("content-length", &self.body.len().to_string());
    }
}

/// Serves each connection one request, on a thread of its own; ends with the process.
pub(crate) fn serve(
    handle: impl Fn(&TcpStream) -> Option<()> + Send + Sync + 'static,
) -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap();
    let handle = Arc::new(handle);
    std::thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let handle = Arc::clone(&handle);
            std::thread::spawn(move || {
                let _ = stream.set_nodelay(true);
                handle(&stream)
            });
        }
    });
    address
}

/// Serves answers.
pub(crate) fn answers(answer: impl Fn(&Message) -> Message + Send + Sync + 'static) -> SocketAddr {
    serve(move |mut client| {
        let asked = Message::read(client, false)?;
        let answer = answer(&asked);
        client.write_all(&answer.head()).ok()?;
        match asked.method() {
            "HEAD" => Some(()),
            _ => client.write_all(&answer.body).ok(),
        }
    })
}
