//! `rekindle await`: hidden; waits until a container is warm, for the shim, which links no network client.

use std::{
    fs::File,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    process::ExitCode,
    time::Duration,
};

use anyhow::{Context as _, ensure};
use clap::Args;
use http_body_util::Empty;
use hyper::{Request, body::Bytes, client::conn::http1, header::HOST};
use hyper_util::rt::TokioIo;
use nix::{
    ifaddrs::getifaddrs,
    sched::{CloneFlags, setns},
};
use rekindle_core::{annotations::WarmWhen, duration};
use rustix::fs::{Mode, OFlags, ResolveFlags, openat2};
use tokio::{
    net::TcpStream,
    time::{Instant, sleep, timeout},
};

use crate::exit::Failure;

/// Between two looks.
const AGAIN: Duration = Duration::from_millis(200);
/// What an answer may take. The kubelet's probes have one second by default.
const ANSWER: Duration = Duration::from_secs(2);

#[derive(Debug, Args)]
pub(crate) struct AwaitArgs {
    /// The container's first process, by its number here.
    #[arg(long)]
    pid: i32,
    /// How long to wait.
    #[arg(long, value_parser = duration::parse)]
    within: Duration,
    /// What makes it warm, as in the annotation.
    when: WarmWhen,
}

/// To be called without a runtime: this thread goes where the container's network is, and there may be no other that does
/// not follow.
pub(crate) fn run(args: &AwaitArgs) -> anyhow::Result<ExitCode> {
    match wait(args) {
        Ok(true) => Ok(ExitCode::SUCCESS),
        Ok(false) => Ok(ExitCode::FAILURE),
        // Other than that it is not warm.
        Err(error) => Err(Failure::Refused(format!("{error:#}")).into()),
    }
}

fn wait(args: &AwaitArgs) -> anyhow::Result<bool> {
    let root =
        File::open(format!("/proc/{}/root", args.pid)).context("looking into the container")?;
    let network =
        File::open(format!("/proc/{}/ns/net", args.pid)).context("finding its network")?;
    setns(network, CloneFlags::CLONE_NEWNET).context("joining its network")?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    runtime.block_on(async {
        let until = Instant::now() + args.within;
        loop {
            let begun = Instant::now();
            let warm = match &args.when {
                WarmWhen::After(after) => {
                    sleep(*after).await;
                    true
                }
                WarmWhen::File(path) => is_there(&root, path),
                WarmWhen::Tcp(port) => answers(*port, None).await,
                WarmWhen::Http { port, path } => answers(*port, Some(path)).await,
            };
            if warm || begun >= until {
                return Ok(warm);
            }
            sleep(AGAIN).await;
        }
    })
}

/// Whether there is such a file in the container. Links lead nowhere else.
fn is_there(root: &File, path: &str) -> bool {
    let flags = OFlags::PATH | OFlags::CLOEXEC;
    openat2(root, path, flags, Mode::empty(), ResolveFlags::IN_ROOT).is_ok()
}

/// Whether something accepts a connection on one of the container's own addresses, and answers a GET where there is a
/// path.
async fn answers(port: u16, path: Option<&str>) -> bool {
    for address in addresses() {
        let address = SocketAddr::new(address, port);
        let asked = timeout(ANSWER, async {
            let stream = TcpStream::connect(address).await?;
            match path {
                Some(path) => get(stream, address, path).await,
                None => Ok(()),
            }
        });
        if matches!(asked.await, Ok(Ok(()))) {
            return true;
        }
    }
    false
}

/// Loopback first, where most servers listen too.
fn addresses() -> Vec<IpAddr> {
    let mut all = vec![IpAddr::V4(Ipv4Addr::LOCALHOST)];
    for address in getifaddrs()
        .into_iter()
        .flatten()
        .filter_map(|interface| interface.address)
    {
        let v4 = address
            .as_sockaddr_in()
            .map(|address| IpAddr::V4(address.ip()));
        let v6 = address
            .as_sockaddr_in6()
            .map(|address| IpAddr::V6(address.ip()));
        // A link's own address needs the link's name.
        let found =
            v4.or(v6.filter(|ip| !matches!(ip, IpAddr::V6(v6) if v6.is_unicast_link_local())));
        all.extend(found.filter(|found| !all.contains(found)));
    }
    all
}

/// As the kubelet's probes have it: a status from 200 to 399, and redirections are not followed.
async fn get(stream: TcpStream, address: SocketAddr, path: &str) -> anyhow::Result<()> {
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
    let request = Request::get(path)
        .header(HOST, address.to_string())
        .body(Empty::<Bytes>::new())?;
    // A server may answer and close in one: the answer counts.
    tokio::spawn(connection);
    let status = sender.send_request(request).await?.status().as_u16();
    ensure!((200..400).contains(&status), "status {status}");
    Ok(())
}
