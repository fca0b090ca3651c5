//! An S3 server as a process of its own, for the tests and the demo: folders below a root are buckets,
//! requests are signed (SigV4) and, unless `--http` is given, encrypted with a CA made at the start.
//!
//! It prints one line of JSON when it answers, and ends on SIGTERM or SIGINT.
#![forbid(unsafe_code)]

mod adopt;
mod buckets;
mod put;
mod tls;

use std::{io::Write, net::SocketAddr, path::PathBuf};

use anyhow::Context;
use clap::{Parser, Subcommand};
use hyper_util::{
    rt::{TokioExecutor, TokioIo},
    server::conn::auto::Builder,
};
use s3s::{auth::SimpleAuth, service::S3ServiceBuilder};
use tokio::{
    net::{TcpListener, TcpStream},
    signal::unix::{SignalKind, signal},
};

#[derive(Debug, Parser)]
#[command(
    version,
    about = "An S3 server for tests: folders as buckets, SigV4, TLS",
    args_conflicts_with_subcommands = true
)]
struct Args {
    #[command(subcommand)]
    command: Option<Command>,
    /// Folder whose folders are the buckets.
    #[arg(long, required = true)]
    root: Option<PathBuf>,
    /// Where to listen; port 0 takes a free one.
    #[arg(long, default_value = "127.0.0.1:0")]
    listen: SocketAddr,
    /// Requests must be signed with this key.
    #[arg(long, default_value = "rekindle")]
    access_key: String,
    /// The key's secret.
    #[arg(long, default_value = "rekindle-secret")]
    secret_key: String,
    /// Write ca.pem (and a certificate signed by it) to this folder; default: `<root>/.tls`.
    #[arg(long)]
    tls: Option<PathBuf>,
    /// Names and addresses that the certificate is for, beside localhost and the listening address.
    #[arg(long)]
    name: Vec<String>,
    /// Speak plain HTTP.
    #[arg(long, conflicts_with_all = ["tls", "name"])]
    http: bool,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Put the files of a folder into a bucket of such a server.
    Put(put::Put),
}

// Two threads: encryption and reading may then overlap with one slow request.
#[tokio::main(flavor = "multi_thread", worker_threads = 2)]
async fn main() -> anyhow::Result<()> {
    let args = Args::parse();
    if let Some(Command::Put(put)) = &args.command {
        return put::put(put).await;
    }
    let root = args.root.context("--root is needed")?;
    adopt::adopt(&root)
        .with_context(|| format!("cannot read the buckets below {}", root.display()))?;
    let store = buckets::Buckets::open(&root)?;
    let mut builder = S3ServiceBuilder::new(store);
    builder.set_auth(SimpleAuth::from_single(
        &args.access_key,
        args.secret_key.clone(),
    ));
    let service = builder.build();

    let listener = TcpListener::bind(args.listen)
        .await
        .with_context(|| format!("cannot listen on {}", args.listen))?;
    let address = listener.local_addr()?;
    let (acceptor, ca) = if args.http {
        (None, None)
    } else {
        let folder = args.tls.unwrap_or_else(|| root.join(".tls"));
        let mut names = args.name;
        names.extend(["localhost".to_owned(), address.ip().to_string()]);
        let (acceptor, ca) = tls::acceptor(&folder, names)?;
        (Some(acceptor), Some(ca))
    };
    let scheme = if args.http { "http" } else { "https" };
    let ready = serde_json::json!({
        "event": "ready",
        "address": address,
        "endpoint": format!("{scheme}://{address}"),
        "ca": ca,
    });
    writeln!(std::io::stdout(), "{ready}")?;

    let mut term = signal(SignalKind::terminate())?;
    let mut int = signal(SignalKind::interrupt())?;
    loop {
        let socket = tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok((socket, _)) => socket,
                // Out of descriptors, or the peer has gone: the next one may do.
                Err(_) => continue,
            },
            _ = term.recv() => return Ok(()),
            _ = int.recv() => return Ok(()),
        };
        let (service, acceptor) = (service.clone(), acceptor.clone());
        tokio::spawn(async move {
            // A connection that breaks is the client's to report.
            let _ = serve(socket, acceptor, service).await;
        });
    }
}

async fn serve(
    socket: TcpStream,
    acceptor: Option<tokio_rustls::TlsAcceptor>,
    service: s3s::service::S3Service,
) -> anyhow::Result<()> {
    socket.set_nodelay(true)?;
    let http = Builder::new(TokioExecutor::new());
    let served = match acceptor {
        None => http.serve_connection(TokioIo::new(socket), service).await,
        Some(acceptor) => {
            let stream = acceptor.accept(socket).await?;
            http.serve_connection(TokioIo::new(stream), service).await
        }
    };
    served.map_err(|e| anyhow::anyhow!(e))
}
