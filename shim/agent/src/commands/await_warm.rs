//! `rekindle await`: hidden; waits until a container is warm, for the shim, which links no network client.

use std::{
    fs::File,
    net::{IpAddr, Ipv4Addr, SocketAddr},
    path::PathBuf,
    process::ExitCode,
    time::Duration,
};

use anyhow::{Context as _, bail, ensure};
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

use crate::{
    cluster::{self, PodContainer},
    output,
};

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
    /// For `ready`: what the apiserver is asked with.
    #[arg(long, value_name = "FILE")]
    kubeconfig: Option<PathBuf>,
    /// For `ready`: the container's pod, NAMESPACE/NAME.
    #[arg(long)]
    pod: Option<String>,
    /// For `ready`: the pod's uid.
    #[arg(long)]
    uid: Option<String>,
    /// For `ready`: the container's id.
    #[arg(long)]
    container: Option<String>,
}

/// To be called without a runtime: this thread goes where the container's network is, and there may be no other that does
/// not follow. Why the container is not warm is one line on stdout, for the shim.
pub(crate) fn run(args: &AwaitArgs) -> anyhow::Result<ExitCode> {
    let waited = match args.when {
        WarmWhen::Ready => wait_for_readiness(args),
        _ => wait_in_its_network(args),
    };
    match waited {
        Ok(()) => Ok(ExitCode::SUCCESS),
        Err(reason) => {
            output::line(format!("{reason:#}"));
            Ok(ExitCode::FAILURE)
        }
    }
}

/// Asks the apiserver, in the network of the host: the pod's may not lead there.
fn wait_for_readiness(args: &AwaitArgs) -> anyhow::Result<()> {
    let needs = "ready needs --kubeconfig, --pod, --uid and --container";
    let kubeconfig = args.kubeconfig.as_deref().context(needs)?;
    let (namespace, pod) = args
        .pod
        .as_deref()
        .and_then(|pod| pod.split_once('/'))
        .context(needs)?;
    let container = PodContainer {
        namespace: namespace.to_owned(),
        pod: pod.to_owned(),
        uid: args.uid.clone().context(needs)?,
        id: args.container.clone().context(needs)?,
    };
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let mut why = "the apiserver has not answered".to_owned();
    let waiting = cluster::until_ready(kubeconfig, &container, &mut why);
    let waited = runtime.block_on(async { timeout(args.within, waiting).await });
    waited.unwrap_or_else(|_| bail!("not within {} s: {why}", args.within.as_secs()))
}

fn wait_in_its_network(args: &AwaitArgs) -> anyhow::Result<()> {
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
                WarmWhen::Ready => bail!("the apiserver is not asked from the pod's network"),
                WarmWhen::After(after) => {
                    sleep(*after).await;
                    true
                }
                WarmWhen::File(path) => is_there(&root, path),
                WarmWhen::Tcp(port) => answers(*port, None).await,
                WarmWhen::Http { port, path } => answers(*port, Some(path)).await,
            };
            if warm {
                return Ok(());
            }
            if begun >= until {
                bail!("not within {} s", args.within.as_secs());
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
