//! Waiting for what sends no event: ask again until a deadline.

use anyhow::{Result, anyhow};
use std::time::Duration;
use tokio::time::Instant;

/// Long enough for a loaded machine of two cores; what works takes a fraction of it.
pub const DEADLINE: Duration = Duration::from_secs(60);
const STEP: Duration = Duration::from_millis(20);

/// Asks `probe` until it answers with a value. `what` names the awaited thing in the error.
pub async fn until<T, F>(what: &str, mut probe: F) -> Result<T>
where
    F: AsyncFnMut() -> Result<Option<T>>,
{
    let deadline = Instant::now() + DEADLINE;
    loop {
        let answer = probe().await;
        match answer {
            Ok(Some(value)) => return Ok(value),
            Ok(None) if Instant::now() < deadline => {}
            Err(_) if Instant::now() < deadline => {}
            Ok(None) => return Err(anyhow!("waited {DEADLINE:?} for {what}: it did not come")),
            Err(e) => return Err(e.context(format!("waited {DEADLINE:?} for {what}"))),
        }
        tokio::time::sleep(STEP).await;
    }
}
