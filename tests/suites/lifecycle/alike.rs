//! Random orders of calls are answered by our shim as by the one that containerd ships.
//!
//! Each order runs on a node of each, step by step, and after every step both answers and both states are compared:
//! what `lifecycle::admit` allows and refuses is what the Go shim does. `REKINDLE_SEED` repeats a run.

use crate::{Stage, stage};
use anyhow::{Context, Result, bail, ensure};
use containerd_client::tonic::{Code, Status};
use proptest::prelude::*;
use proptest::test_runner::{Config, RngAlgorithm, TestCaseError, TestError, TestRng, TestRunner};
use rekindle_harness::container::{Container, Exec, State};
use rekindle_harness::{Runtime, poll};
use serde_json::json;
use std::sync::atomic::{AtomicU32, Ordering};

/// Orders of a run. Each takes half a second.
const ORDERS: u32 = 24;
const STEPS: usize = 14;

const KILL: u32 = 9;
const TERM: u32 = 15;
/// Ignored by whoever does not ask for it.
const WINCH: u32 = 28;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Call {
    Start,
    Pause,
    Resume,
    Update,
    Kill(u32),
    Delete,
    Pids,
    Resize,
    CloseStdin,
    AddExec(usize),
    StartExec(usize),
    KillExec(usize),
    DeleteExec(usize),
}

fn call() -> impl Strategy<Value = Call> {
    let exec = || 0..EXECS.len();
    prop_oneof![
        3 => Just(Call::Start),
        3 => Just(Call::Pause),
        4 => Just(Call::Resume),
        1 => Just(Call::Update),
        2 => prop_oneof![Just(KILL), Just(TERM), Just(WINCH)].prop_map(Call::Kill),
        1 => Just(Call::Delete),
        1 => Just(Call::Pids),
        1 => Just(Call::Resize),
        1 => Just(Call::CloseStdin),
        3 => exec().prop_map(Call::AddExec),
        3 => exec().prop_map(Call::StartExec),
        2 => exec().prop_map(Call::KillExec),
        2 => exec().prop_map(Call::DeleteExec),
    ]
}

/// One that stays, and one that cannot be started.
const EXECS: [(&str, &[&str]); 2] = [
    ("stays", &["sleep", "1000"]),
    ("missing", &["/no/such/program"]),
];

/// What a client can tell a refusal by. The Go shim says Unknown where a state does not allow a call and where runc has
/// failed; we say which of the two.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Answer {
    Done,
    NotFound,
    Exists,
    Refused,
}

fn answer<T>(of: &Result<T, Status>) -> Result<Answer> {
    Ok(match of.as_ref().map_err(Status::code) {
        Ok(_) => Answer::Done,
        Err(Code::NotFound) => Answer::NotFound,
        Err(Code::AlreadyExists) => Answer::Exists,
        Err(Code::FailedPrecondition | Code::Unknown | Code::InvalidArgument) => Answer::Refused,
        Err(code) => bail!("an answer of no known kind: {code:?}"),
    })
}

/// What there is to see: the task's state and exit status, and those of its execs.
type Seen = Vec<Option<(State, u32)>>;

/// One of the two.
struct Side<'n> {
    task: Container<'n>,
}

impl<'n> Side<'n> {
    async fn create(stage: &'n Stage, id: &str) -> Result<Side<'n>> {
        let task = stage
            .container(id)
            // Its first process ends on SIGTERM, and on nothing else that is sent here.
            .shell("trap 'exit 8' TERM; echo ready; while :; do sleep 0.02; done")
            .create()
            .await?;
        Ok(Side { task })
    }

    fn exec(&self, which: usize) -> Exec<'_, 'n> {
        self.task.existing_exec(EXECS[which].0)
    }

    async fn call(&self, call: Call) -> Result<Answer> {
        let task = &self.task;
        match call {
            Call::Start => {
                let started = task.start().await;
                if started.is_ok() {
                    // A signal that comes before the trap is set would be another's.
                    task.io()
                        .out()?
                        .until("its word", |text| text.contains("ready"))
                        .await?;
                }
                answer(&started)
            }
            Call::Pause => answer(&task.pause().await),
            Call::Resume => answer(&task.resume().await),
            Call::Update => answer(&task.update(&json!({"memory": {"limit": 64 << 20}})).await),
            Call::Kill(signal) => answer(&task.kill(signal).await),
            Call::Delete => answer(&task.delete().await),
            Call::Pids => answer(&task.pids().await),
            Call::Resize => answer(&task.resize(80, 25).await),
            Call::CloseStdin => answer(&task.close_stdin().await),
            Call::AddExec(which) => {
                let (id, args) = EXECS[which];
                answer(&task.exec(id, args).detached().try_add().await?.1)
            }
            Call::StartExec(which) => answer(&self.exec(which).start().await),
            Call::KillExec(which) => answer(&self.exec(which).kill(KILL).await),
            Call::DeleteExec(which) => answer(&self.exec(which).delete().await),
        }
    }

    async fn seen(&self) -> Result<Seen> {
        let mut seen = Vec::new();
        let mut processes = vec![self.task.process().await];
        for which in 0..EXECS.len() {
            processes.push(self.exec(which).process().await);
        }
        for process in processes {
            seen.push(match process {
                Ok(process) => Some((process.status(), process.exit_status)),
                Err(status) if status.code() == Code::NotFound => None,
                Err(status) => bail!("looking at it: {status}"),
            });
        }
        Ok(seen)
    }
}

/// What a signal has begun that is seen later: the ends of the task and of execs.
#[derive(Debug, Default)]
struct Coming {
    task: bool,
    execs: Vec<usize>,
}

impl Coming {
    /// After a call that was done in `before`.
    fn note(&mut self, call: Call, before: State) {
        match call {
            Call::Kill(KILL | TERM) => self.task = true,
            Call::KillExec(which) => self.execs.push(which),
            _ => {}
        }
        if call == Call::Kill(KILL) && before == State::Paused {
            // It is thawed for its end.
            self.execs.clear();
        }
    }

    /// Waits until it is seen, unless a pause holds it up.
    async fn comes(&self, side: &Side<'_>) -> Result<()> {
        let ended = |state| matches!(state, Ok(State::Stopped));
        if self.task {
            side.task.reaches(State::Stopped).await?;
        }
        for &which in &self.execs {
            let exec = side.exec(which);
            poll::until("the end of an exec", async || {
                let gone = matches!(&exec.state().await, Err(e) if e.code() == Code::NotFound);
                Ok((gone || ended(exec.state().await)).then_some(()))
            })
            .await?;
        }
        Ok(())
    }
}

/// Runs an order on both, and compares after each step.
async fn compare(go: &Stage, ours: &Stage, order: &[Call]) -> Result<()> {
    static ORDER: AtomicU32 = AtomicU32::new(0);
    let id = format!("alike-{}", ORDER.fetch_add(1, Ordering::Relaxed));
    let (go, ours) = (Side::create(go, &id).await?, Side::create(ours, &id).await?);
    let outcome = steps(&go, &ours, order).await;
    let (theirs, mine) = tokio::join!(go.task.remove(), ours.task.remove());
    outcome?;
    theirs.context("removing what the Go shim has left")?;
    mine.context("removing what ours has left")
}

async fn steps(go: &Side<'_>, ours: &Side<'_>, order: &[Call]) -> Result<()> {
    let mut coming = Coming::default();
    let mut state = Some(State::Created);
    let mut started = [false; EXECS.len()];
    for (number, &call) in order.iter().enumerate() {
        // Before its start the task is runc itself, with signals of its own.
        if state == Some(State::Created) && call == Call::Kill(TERM) {
            continue;
        }
        // A second start of an exec ends the Go shim, at once where the first has failed and else with the exec: it closes a
        // channel twice (`process/exec.go`).
        match call {
            Call::StartExec(which) if started[which] => continue,
            _ => {}
        }
        let (theirs, mine) = tokio::join!(go.call(call), ours.call(call));
        let (theirs, mine) = (theirs?, mine?);
        ensure!(
            theirs == mine,
            "step {number}, {call:?} of a task that is {state:?}: the Go shim answers {theirs:?}, ours {mine:?}"
        );
        match (call, mine) {
            (Call::StartExec(which), Answer::Done | Answer::Refused) => started[which] = true,
            (Call::DeleteExec(which), Answer::Done) => started[which] = false,
            _ => {}
        }
        if let (Answer::Done, Some(before)) = (mine, state) {
            coming.note(call, before);
            let held = before == State::Paused && !matches!(call, Call::Resume | Call::Kill(KILL));
            if !held {
                let (one, other) = tokio::join!(coming.comes(go), coming.comes(ours));
                one?;
                other?;
                coming = Coming::default();
            }
        }
        let (theirs, mine) = tokio::join!(go.seen(), ours.seen());
        let (theirs, mine) = (theirs?, mine?);
        ensure!(
            theirs == mine,
            "after step {number}, {call:?}: the Go shim shows {theirs:?}, ours {mine:?}"
        );
        state = mine[0].map(|(state, _)| state);
    }
    Ok(())
}

#[test]
fn random_calls_are_answered_alike() -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let Some(go) = runtime.block_on(stage(Runtime::Go))? else {
        return Ok(());
    };
    let Some(ours) = runtime.block_on(stage(Runtime::Rekindle))? else {
        return Ok(());
    };
    let seed = match std::env::var("REKINDLE_SEED") {
        Ok(seed) => seed.parse()?,
        Err(_) => std::time::UNIX_EPOCH.elapsed()?.as_nanos() as u64,
    };
    let mut bytes = [0; 32];
    bytes[..8].copy_from_slice(&seed.to_le_bytes());
    let config = Config {
        cases: ORDERS,
        failure_persistence: None,
        max_shrink_iters: 40,
        // An order that shows a hang takes a minute each time.
        max_shrink_time: 60_000,
        ..Config::default()
    };
    let mut runner =
        TestRunner::new_with_rng(config, TestRng::from_seed(RngAlgorithm::ChaCha, &bytes));
    let orders = proptest::collection::vec(call(), 1..=STEPS);
    let ran = runner.run(&orders, |order| {
        let compared = runtime.block_on(compare(go, ours, &order));
        compared.map_err(|e| TestCaseError::fail(format!("{e:#}")))
    });
    match ran {
        Ok(()) => Ok(()),
        Err(TestError::Fail(reason, order)) => {
            bail!("REKINDLE_SEED={seed}: {reason}\nthe shortest order that was found: {order:?}")
        }
        Err(TestError::Abort(reason)) => bail!("REKINDLE_SEED={seed}: {reason}"),
    }
}
