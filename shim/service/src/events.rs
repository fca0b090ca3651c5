//! Events to containerd, in the order in which they happened.
//!
//! containerd may be away when something happens: it is being restarted, or upgraded. An event is kept
//! and tried again until it is delivered, and those behind it wait, so that no exit overtakes its start.

use std::{sync::Arc, time::Duration};

use containerd_shim::event::Event;
use containerd_shim_protos::{
    protobuf::{Message, MessageField},
    shim::{event::Envelope, events::ForwardRequest},
    shim_async::{Client, EventsClient},
    ttrpc::{self, context},
};
use tokio::sync::{Notify, mpsc, oneshot};
use tracing::warn;

use crate::{any, exits::timestamp};

/// Events that wait while containerd is away. Beyond it the newest are dropped: containerd asks for
/// every task's state when it comes back, so an event is news, not truth.
const QUEUE: usize = 1024;
/// containerd answers an event at once or not at all.
const ANSWER: Duration = Duration::from_secs(5);
/// Between attempts. containerd needs some 100 ms to come back; ten seconds are an outage.
const RETRY: [Duration; 4] = [
    Duration::from_millis(100),
    Duration::from_millis(500),
    Duration::from_secs(2),
    Duration::from_secs(10),
];

/// Handle for whoever has something to report.
#[derive(Debug, Clone)]
pub(crate) struct Events {
    queue: mpsc::Sender<Item>,
    /// Cuts the wait between two attempts short.
    hurry: Arc<Notify>,
}

#[derive(Debug)]
enum Item {
    Event(Box<Envelope>),
    Flush(oneshot::Sender<()>),
}

impl Events {
    /// Starts the forwarder. `address` is containerd's ttrpc socket.
    pub(crate) fn start(address: String, namespace: String) -> Self {
        let (queue, mut receiver) = mpsc::channel(QUEUE);
        let hurry = Arc::new(Notify::new());
        let mut link = Link {
            address,
            client: None,
            hurry: Arc::clone(&hurry),
        };
        tokio::spawn(async move {
            while let Some(item) = receiver.recv().await {
                match item {
                    Item::Event(mut envelope) => {
                        envelope.namespace.clone_from(&namespace);
                        link.deliver(*envelope).await;
                    }
                    Item::Flush(done) => {
                        let _ = done.send(());
                    }
                }
            }
        });
        Self { queue, hurry }
    }

    /// Queues an event; never waits.
    pub(crate) fn send(&self, event: impl Event + Message) {
        let mut envelope = Envelope::new();
        envelope.topic = event.topic();
        envelope.timestamp = timestamp(std::time::SystemTime::now());
        envelope.event = MessageField::some(any::pack("containerd.events", &event));
        let topic = envelope.topic.clone();
        if self
            .queue
            .try_send(Item::Event(Box::new(envelope)))
            .is_err()
        {
            warn!(%topic, "event dropped: {QUEUE} are waiting already");
        }
    }

    /// Waits until everything queued so far was delivered, which is tried at once and not when it is due.
    pub(crate) async fn flush(&self) {
        self.hurry.notify_one();
        let (sender, receiver) = oneshot::channel();
        if self.queue.send(Item::Flush(sender)).await.is_ok() {
            let _ = receiver.await;
        }
    }
}

/// The connection to containerd, made when it is needed.
struct Link {
    address: String,
    client: Option<EventsClient>,
    hurry: Arc<Notify>,
}

impl Link {
    async fn deliver(&mut self, envelope: Envelope) {
        let mut request = ForwardRequest::new();
        let topic = envelope.topic.clone();
        request.envelope = MessageField::some(envelope);
        let waits = || {
            let last = std::iter::repeat(&RETRY[RETRY.len() - 1]);
            RETRY.iter().chain(last)
        };
        let mut pending = waits();
        loop {
            match self.forward(&request).await {
                Ok(()) => return,
                // containerd has it and does not want it; it will not want it later either.
                Err(ttrpc::Error::RpcStatus(status)) => {
                    warn!(%topic, reason = status.message, "containerd refused an event");
                    return;
                }
                Err(error) => {
                    self.client = None;
                    let wait = pending.next().copied().unwrap_or(ANSWER);
                    tracing::debug!(%topic, %error, "containerd is away; the event waits");
                    tokio::select! {
                        () = tokio::time::sleep(wait) => {}
                        () = self.hurry.notified() => pending = waits(),
                    }
                }
            }
        }
    }

    async fn forward(&mut self, request: &ForwardRequest) -> ttrpc::Result<()> {
        let client = match &self.client {
            Some(client) => client,
            None => {
                let address = format!("unix://{}", self.address.trim_start_matches("unix://"));
                let connected = Client::connect(&address).await?;
                self.client.insert(EventsClient::new(connected))
            }
        };
        let answer = client.forward(context::Context::default(), request);
        match tokio::time::timeout(ANSWER, answer).await {
            Ok(result) => result.map(drop),
            Err(_) => Err(ttrpc::Error::Others(format!(
                "no answer within {} s",
                ANSWER.as_secs()
            ))),
        }
    }
}
