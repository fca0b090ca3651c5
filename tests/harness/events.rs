//! containerd's events, collected.

use crate::poll;
use anyhow::{Context, Result, anyhow, bail};
use containerd_client::Client;
use containerd_client::events as api;
use containerd_client::services::v1::{PublishRequest, SubscribeRequest};
use containerd_client::tonic::Request;
use containerd_client::with_namespace;
use prost::Message;
use prost_types::Any;
use tokio::sync::watch;

/// One event of a task, reduced to what the tests compare.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Event {
    /// The container.
    pub container: String,
    /// The event's name without its package: `TaskStart`.
    pub name: String,
    /// The process it is about, where it names one: an exec's id, or the container's.
    pub process: String,
    /// The pid, where it carries one.
    pub pid: u32,
    /// The exit status, where it carries one.
    pub status: u32,
}

/// A running subscription.
#[derive(Debug)]
pub struct Events(watch::Receiver<Vec<Event>>);

const PROBE: &str = "/rekindle-test/probe";

impl Events {
    pub(crate) async fn subscribe(client: Client) -> Result<Events> {
        let (seen, events) = watch::channel(Vec::new());
        let (ready, mut is_ready) = watch::channel(false);
        let mut subscriber = client.events();
        tokio::spawn(async move {
            let mut stream = subscriber
                .subscribe(SubscribeRequest { filters: vec![] })
                .await?
                .into_inner();
            while let Some(envelope) = stream.message().await? {
                if envelope.topic == PROBE {
                    ready.send_replace(true);
                } else if let Some(event) = envelope.event.as_ref().and_then(decode) {
                    seen.send_modify(|all| all.push(event));
                }
            }
            Ok::<(), anyhow::Error>(())
        });
        // containerd says nothing when a subscription begins: ours has begun when it delivers what we publish.
        poll::until("the first event of a subscription", async || {
            let event = Some(Any {
                type_url: "google.protobuf.Empty".into(),
                value: vec![],
            });
            let request = PublishRequest {
                topic: PROBE.into(),
                event,
            };
            client
                .events()
                .publish(with_namespace!(request, crate::node::NAMESPACE))
                .await?;
            Ok(is_ready.borrow_and_update().then_some(()))
        })
        .await?;
        Ok(Events(events))
    }

    /// The events of a container so far, in their order.
    pub fn of(&self, id: &str) -> Vec<Event> {
        self.0
            .borrow()
            .iter()
            .filter(|event| event.container == id)
            .cloned()
            .collect()
    }

    /// Waits for an event of a container; answers with all of it until now.
    pub async fn until(&self, id: &str, name: &str) -> Result<Vec<Event>> {
        self.until_one(id, name, |event| event.name == name).await
    }

    /// Waits until the end of a container's first process is told; answers with all of it until now.
    pub async fn until_exit(&self, id: &str) -> Result<Vec<Event>> {
        self.until_one(id, "TaskExit", |event| {
            event.name == "TaskExit" && event.process == id
        })
        .await
    }

    /// Waits until there are `count` events of a container; answers with all of it until now.
    pub async fn until_all(&self, id: &str, count: usize) -> Result<Vec<Event>> {
        let mut events = self.0.clone();
        let enough =
            |all: &Vec<Event>| all.iter().filter(|event| event.container == id).count() >= count;
        let came = events.wait_for(enough);
        match tokio::time::timeout(*poll::DEADLINE, came).await {
            Ok(Ok(_)) => Ok(self.of(id)),
            _ => bail!(
                "waited for {count} events of {id}; it had {:?}",
                self.of(id)
            ),
        }
    }

    async fn until_one(
        &self,
        id: &str,
        what: &str,
        is_it: impl Fn(&Event) -> bool,
    ) -> Result<Vec<Event>> {
        let mut events = self.0.clone();
        let came = events.wait_for(|all| {
            all.iter()
                .any(|event| event.container == id && is_it(event))
        });
        match tokio::time::timeout(*poll::DEADLINE, came).await {
            Ok(Ok(_)) => Ok(self.of(id)),
            Ok(Err(_)) => {
                Err(anyhow!("containerd closed the event stream")).context("waiting for an event")
            }
            Err(_) => bail!(
                "waited {:?} for {what} of {id}; it had {:?}",
                *poll::DEADLINE,
                self.of(id)
            ),
        }
    }
}

fn decode(any: &Any) -> Option<Event> {
    let name = any.type_url.rsplit(['.', '/']).next()?.to_owned();
    let value = any.value.as_slice();
    let event = |container: String, process: String, pid, status| {
        Some(Event {
            container,
            name: name.clone(),
            process,
            pid,
            status,
        })
    };
    match name.as_str() {
        "TaskCreate" => api::TaskCreate::decode(value)
            .ok()
            .and_then(|e| event(e.container_id, String::new(), e.pid, 0)),
        "TaskStart" => api::TaskStart::decode(value)
            .ok()
            .and_then(|e| event(e.container_id, String::new(), e.pid, 0)),
        "TaskDelete" => {
            let e = api::TaskDelete::decode(value).ok()?;
            event(e.container_id, e.id, e.pid, e.exit_status)
        }
        "TaskExit" => api::TaskExit::decode(value)
            .ok()
            .and_then(|e| event(e.container_id, e.id, e.pid, e.exit_status)),
        "TaskExecAdded" => api::TaskExecAdded::decode(value)
            .ok()
            .and_then(|e| event(e.container_id, e.exec_id, 0, 0)),
        "TaskExecStarted" => api::TaskExecStarted::decode(value)
            .ok()
            .and_then(|e| event(e.container_id, e.exec_id, e.pid, 0)),
        "TaskPaused" => api::TaskPaused::decode(value)
            .ok()
            .and_then(|e| event(e.container_id, String::new(), 0, 0)),
        "TaskResumed" => api::TaskResumed::decode(value)
            .ok()
            .and_then(|e| event(e.container_id, String::new(), 0, 0)),
        "TaskOOM" => api::TaskOom::decode(value)
            .ok()
            .and_then(|e| event(e.container_id, String::new(), 0, 0)),
        "TaskCheckpointed" => api::TaskCheckpointed::decode(value)
            .ok()
            .and_then(|e| event(e.container_id, String::new(), 0, 0)),
        _ => None,
    }
}
