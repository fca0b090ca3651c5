//! The server: one per pod, until its last container is gone.

use std::{collections::HashMap, fs, io, sync::Arc, time::Duration};

use containerd_shim::Flags;
use containerd_shim_protos::{
    shim_async::{Task, create_task},
    ttrpc::r#async::{Server, Service, transport::Listener},
};
use tokio::signal::unix::{SignalKind, signal};

use crate::{
    bootstrap::LISTENER_FD, context::Shared, data::Data, error::Error, events::Events,
    exits::Exits, host::HostFacts, logging, node, phases::restore::HostNames, sys,
    task::TaskService,
};

/// How long the last events may take. A containerd that runs takes them at once; one that starts ends the
/// shims of dead containers first, and takes in events only when it is through with all of them.
const LAST_EVENTS: Duration = Duration::from_secs(30);

/// Serves until containerd asks for the end.
pub(crate) fn run(flags: &Flags) -> Result<(), Error> {
    logging::start(flags.debug);
    nix::sys::prctl::set_child_subreaper(true).map_err(Error::io("becoming the subreaper"))?;
    // CRIU leaves its own groups to a process that had none (`prepare_mm`, `restore_creds`), and has them from
    // here. Nobody who may not change groups runs containers as root.
    if let Err(error) = nix::unistd::setgroups(&[]) {
        tracing::debug!(%error, "keeping the further groups that containerd runs with");
    }
    // One thread: what a shim does is wait. Checksums and mounts go to threads that end.
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .max_blocking_threads(8)
        .build()
        .map_err(Error::io("starting the runtime"))?;
    let result = runtime.block_on(serve(flags));
    // A thread that is stuck in a system call does not keep the shim alive.
    runtime.shutdown_timeout(Duration::from_secs(1));
    if let Err(error) = &result {
        tracing::error!(%error, "the shim ends");
    }
    result
}

async fn serve(flags: &Flags) -> Result<(), Error> {
    let listener = sys::take_listener(LISTENER_FD).map_err(|_| Error::Argument {
        key: "action".to_owned(),
        reason: "without one this is the server, which only `start` can launch".to_owned(),
    })?;
    let socket = listener
        .local_addr()
        .ok()
        .and_then(|address| address.as_pathname().map(ToOwned::to_owned));
    let ttrpc_address = std::env::var("TTRPC_ADDRESS").unwrap_or_default();
    let events = Events::start(ttrpc_address, flags.namespace.clone());
    let exits = Exits::default();
    let reaper = tokio::spawn(exits.clone().reap());
    let service = TaskService::new(Shared {
        namespace: flags.namespace.clone(),
        containerd: flags.address.clone(),
        node: Arc::new(node::config()?),
        host: HostFacts::default(),
        data: Data::new(exits.clone()),
        host_names: HostNames::default(),
        exits,
        events: events.clone(),
    });

    listener
        .set_nonblocking(true)
        .map_err(Error::io("preparing the socket"))?;
    let listener = Listener::try_from(listener).map_err(Error::io("preparing the socket"))?;
    let mut server = Server::new()
        .add_listener(listener)
        .register_service(both_versions(&service));
    server.start().await.map_err(|e| Error::Io {
        doing: "serving",
        source: io::Error::other(e),
    })?;
    tracing::info!(pid = std::process::id(), "serving");

    // To end is containerd's decision. USR1 asks the shim that containerd ships for its stacks. A handler stays when its
    // stream is dropped.
    for kind in [
        SignalKind::terminate(),
        SignalKind::interrupt(),
        SignalKind::user_defined1(),
    ] {
        drop(signal(kind).map_err(Error::io("ignoring a signal"))?);
    }
    tokio::select! {
        () = service.shutdown.notified() => {}
        () = service.forgotten() => tracing::info!("nobody knows of this shim any more"),
    }
    // The answer to `Shutdown` has to leave before the connection does.
    server.stop_listen().await;
    // Before the wait: the next shim of the pod may listen there.
    if let Some(path) = socket {
        let _ = fs::remove_file(path);
    }
    let _ = tokio::time::timeout(LAST_EVENTS, events.flush()).await;
    let _ = tokio::time::timeout(Duration::from_secs(3), server.shutdown()).await;
    reaper.abort();
    Ok(())
}

/// The task service under both of its names. The messages of version 2 and 3 are the same, field for
/// field (containerd `api/runtime/task/{v2,v3}/shim.proto`); only the package differs.
fn both_versions(service: &TaskService) -> HashMap<String, Service> {
    let make = || create_task(Arc::new(service.clone()) as Arc<dyn Task + Send + Sync>);
    let v2 = make()
        .into_iter()
        .map(|(name, service)| (name.replace(".v3.", ".v2."), service));
    make().into_iter().chain(v2).collect()
}
