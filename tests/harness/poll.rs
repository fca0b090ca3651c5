//! Waiting for what sends no event: ask again until a deadline.

use anyhow::{Result, anyhow};
use std::sync::LazyLock;
use std::time::Duration;
use tokio::time::Instant;

/// Long enough for a loaded machine of two cores; what works takes a fraction of it.
pub static DEADLINE: LazyLock<Duration> = LazyLock::new(|| patient(Duration::from_secs(60)));
const STEP: Duration = Duration::from_millis(20);

/// A limit of time, `REKINDLE_PATIENCE` times as long where that is set: an emulated machine is slower than its host.
pub fn patient(limit: Duration) -> Duration {
    let times = std::env::var("REKINDLE_PATIENCE").ok();
    limit * times.and_then(|times| times.parse().ok()).unwrap_or(1)
}

/// Asks `probe` until it answers with a value. `what` names the awaited thing in the error.
pub async fn until<T, F>(what: &str, mut probe: F) -> Result<T>
where
    F: AsyncFnMut() -> Result<Option<T>>,
{
    let deadline = Instant::now() + *DEADLINE;
    loop {
        let answer = probe().await;
        match answer {
            Ok(Some(value)) => return Ok(value),
            Ok(None) if Instant::now() < deadline => {}
            Err(_) if Instant::now() < deadline => {}
            Ok(None) => {
                return Err(anyhow!(
                    "waited {:?} for {what}: it did not come",
                    *DEADLINE
                ));
            }
            Err(e) => return Err(e.context(format!("waited {:?} for {what}", *DEADLINE))),
        }
        tokio::time::sleep(STEP).await;
    }
}
