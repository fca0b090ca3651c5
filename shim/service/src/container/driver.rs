//! What serialises the calls that change a container.

use std::{future::Future, pin::Pin};

use tokio::sync::{mpsc, oneshot};

/// Calls that may wait for one container; containerd serialises most of them itself.
const WAITING: usize = 32;

type Job = Box<dyn FnOnce() -> Pin<Box<dyn Future<Output = ()> + Send>> + Send>;

/// Does one thing at a time, in the order in which it was asked.
#[derive(Debug)]
pub(super) struct Driver(mpsc::Sender<Job>);

/// What was asked for has ended without an answer.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Gone;

impl Driver {
    /// It ends when nobody can ask it for anything any more.
    pub(super) fn start() -> Self {
        let (jobs, mut queue) = mpsc::channel::<Job>(WAITING);
        tokio::spawn(async move {
            while let Some(job) = queue.recv().await {
                // A task of its own: a panic in it is that call's error, not the driver's end.
                if let Err(error) = tokio::spawn(job()).await {
                    tracing::error!(%error, "a call ended unexpectedly");
                }
            }
        });
        Self(jobs)
    }

    /// Does it when everything before is done; also when nobody waits for the answer any more.
    pub(super) async fn run<T, F>(
        &self,
        work: impl FnOnce() -> F + Send + 'static,
    ) -> Result<T, Gone>
    where
        T: Send + 'static,
        F: Future<Output = T> + Send + 'static,
    {
        let (reply, answer) = oneshot::channel();
        let job: Job = Box::new(move || {
            Box::pin(async move {
                let _ = reply.send(work().await);
            })
        });
        self.0.send(job).await.map_err(|_| Gone)?;
        answer.await.map_err(|_| Gone)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use super::*;

    #[tokio::test]
    async fn a_panic_is_the_error_of_the_call_that_panicked() {
        let driver = Driver::start();
        let panics = driver.run(|| async { panic!("on purpose") });
        let (panicked, next) = tokio::join!(panics, driver.run(|| async { 7 }));
        assert_eq!(panicked, Err::<(), _>(Gone));
        assert_eq!(next, Ok(7));
    }

    #[tokio::test]
    async fn calls_are_done_in_their_order_even_when_nobody_waits_for_them() {
        let (driver, done) = (Driver::start(), Arc::new(Mutex::new(Vec::new())));
        let note = |number: i32| {
            let done = Arc::clone(&done);
            move || async move {
                tokio::task::yield_now().await;
                done.lock().unwrap().push(number);
            }
        };
        tokio::select! {
            biased;
            _ = driver.run(note(1)) => unreachable!("it yields"),
            () = std::future::ready(()) => {}
        }
        driver.run(note(2)).await.unwrap();
        assert_eq!(*done.lock().unwrap(), [1, 2]);
    }
}
