//! The open files of an image, as far as they are told to people: names of mapped files, and sockets.

use std::{
    collections::HashMap,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    path::Path,
};

use serde::Serialize;

use super::{CriuImageError, folder::FILES_MAGIC, remaps::each_record, wire};

/// `AF_INET` and `AF_INET6`.
const INET: u64 = 2;
const INET6: u64 = 10;
/// `SOCK_STREAM`.
const STREAM: u64 = 1;
/// `TCP_ESTABLISHED` and `TCP_LISTEN`, which Unix sockets have too.
const ESTABLISHED: u64 = 1;
const LISTEN: u64 = 10;

/// What a socket speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum SocketKind {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
    /// Another protocol over IP.
    Ip,
    /// A Unix socket.
    Unix,
    /// A netlink socket.
    Netlink,
    /// A packet socket.
    Packet,
}

/// A socket that some process has open.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct Socket {
    /// What it speaks.
    pub kind: SocketKind,
    /// `listening`, `connected`, or neither.
    pub state: Option<&'static str>,
    /// Its own address; a Unix socket's name, with `@` before an abstract one.
    pub local: Option<String>,
    /// Where it is connected to.
    pub peer: Option<String>,
}

/// What processes have open.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct OpenFiles {
    /// The names of regular files, by their number.
    pub names: HashMap<u64, String>,
    /// The sockets, sorted.
    pub sockets: Vec<Socket>,
}

impl OpenFiles {
    /// Those of the image in `dir`.
    ///
    /// # Errors
    /// When the file that lists them cannot be read.
    pub fn read(dir: &Path) -> Result<Self, CriuImageError> {
        let mut all = Self::default();
        each_record(&dir.join("files.img"), FILES_MAGIC, |message| {
            all.entry(message)
        })?;
        all.sockets.sort();
        Ok(all)
    }

    fn entry(&mut self, message: &[u8]) -> Result<(), &'static str> {
        let (mut id, mut regular) = (None, None);
        let (mut inet, mut unix) = (None, None);
        let mut other = None;
        wire::fields(message, |field, _| match field.number {
            2 => id = field.value,
            3 => regular = Some(field.bytes),
            4 => inet = Some(field.bytes),
            6 => other = Some(SocketKind::Packet),
            7 => other = Some(SocketKind::Netlink),
            16 => unix = Some(field.bytes),
            _ => {}
        })?;
        if let (Some(id), Some(regular)) = (id, regular) {
            wire::fields(regular, |field, _| {
                if field.number == 6 {
                    let name = String::from_utf8_lossy(field.bytes).into_owned();
                    self.names.insert(id, name);
                }
            })?;
        }
        let found = match (inet, unix) {
            (Some(message), _) => Some(of_inet(message)?),
            (None, Some(message)) => Some(of_unix(message)?),
            (None, None) => other.map(|kind| Socket {
                kind,
                state: None,
                local: None,
                peer: None,
            }),
        };
        self.sockets.extend(found);
        Ok(())
    }
}

/// `images/sk-inet.proto`.
fn of_inet(message: &[u8]) -> Result<Socket, &'static str> {
    let mut numbers = [0; 11];
    let (mut from, mut to) = (Vec::new(), Vec::new());
    wire::fields(message, |field, _| {
        let value = field.value.unwrap_or_default();
        match field.number {
            11 => from.push(value as u32),
            12 => to.push(value as u32),
            number @ 0..=10 => numbers[number as usize] = value,
            _ => {}
        }
    })?;
    let [
        _,
        _,
        _,
        family,
        socket_type,
        protocol,
        state,
        from_port,
        to_port,
        ..,
    ] = numbers;
    // The protocol is that of `socket(2)`, which may say 0 for the type's own.
    let kind = match (protocol, socket_type) {
        (0 | 6, STREAM) => SocketKind::Tcp,
        (17, _) | (0, 2) => SocketKind::Udp,
        _ => SocketKind::Ip,
    };
    let address = |words: &[u32], port: u64| {
        let ip = address(family, words)?;
        (port != 0 || !ip.is_unspecified()).then(|| SocketAddr::new(ip, port as u16).to_string())
    };
    Ok(Socket {
        kind,
        state: state_of(state, kind == SocketKind::Udp),
        local: address(&from, from_port),
        peer: address(&to, to_port),
    })
}

/// The words are those of the kernel: bytes in network order, whatever the host's is.
fn address(family: u64, words: &[u32]) -> Option<IpAddr> {
    match (family, words) {
        (INET, [word]) => Some(Ipv4Addr::from(word.to_ne_bytes()).into()),
        (INET6, [a, b, c, d]) => {
            let mut bytes = [0; 16];
            for (into, word) in bytes.chunks_exact_mut(4).zip([a, b, c, d]) {
                into.copy_from_slice(&word.to_ne_bytes());
            }
            Some(Ipv6Addr::from(bytes).into())
        }
        _ => None,
    }
}

/// `images/sk-unix.proto`.
fn of_unix(message: &[u8]) -> Result<Socket, &'static str> {
    let (mut state, mut name): (u64, &[u8]) = (0, &[]);
    wire::fields(message, |field, _| match field.number {
        4 => state = field.value.unwrap_or_default(),
        11 => name = field.bytes,
        _ => {}
    })?;
    let name = String::from_utf8_lossy(name);
    let local = match name.strip_prefix('\0') {
        Some(abstracted) => format!("@{abstracted}"),
        None => name.trim_end_matches('\0').to_owned(),
    };
    Ok(Socket {
        kind: SocketKind::Unix,
        state: state_of(state, false),
        local: Some(local).filter(|name| !name.is_empty()),
        peer: None,
    })
}

fn state_of(state: u64, datagrams: bool) -> Option<&'static str> {
    match state {
        LISTEN if !datagrams => Some("listening"),
        ESTABLISHED => Some("connected"),
        _ => None,
    }
}
