//! What a restored container is told (`after-restore`): it goes on in the middle of what it did, and may have to
//! reseed, or to connect anew.

use std::{fs, time::Duration};

use rekindle_core::annotations::AfterRestore;
use serde_json::{Value, json};

use super::{PhaseError, step};
use crate::{bundle::Spec, context::Fixed, error::Error, sys};

/// Tells it, and waits until the command has ended. What fails here fails the restore. `running` is told the pid of the
/// runc whose child the command is, for a kill meanwhile.
pub(super) async fn tell(
    fixed: &Fixed,
    spec: &Spec,
    init: i32,
    left: Duration,
    running: impl Fn(Option<i32>),
) -> Result<(), Error> {
    let Some(told) = &fixed.plan.after_restore else {
        return Ok(());
    };
    step(&fixed.id, "after-restore", async {
        match told {
            AfterRestore::Signal(number) => {
                sys::kill(init, *number).map_err(Error::io("signalling a restored container"))
            }
            AfterRestore::Command(words) => run(fixed, spec, words, left, running).await,
        }
    })
    .await
}

/// Runs a command in it as its own user and with the environment of the new pod, as `runc exec` would by itself.
async fn run(
    fixed: &Fixed,
    spec: &Spec,
    words: &[String],
    left: Duration,
    running: impl Fn(Option<i32>),
) -> Result<(), Error> {
    let mut process = spec.process();
    if let Some(process) = process.as_object_mut() {
        process.insert("args".to_owned(), json!(words));
        process.insert("terminal".to_owned(), Value::Bool(false));
        process.remove("consoleSize");
    }
    let file = fixed.bundle.join("after-restore.json");
    fs::write(&file, process.to_string()).map_err(Error::file("writing", &file))?;
    let (mut command, log) = fixed.runc.command("exec");
    command.arg("--process").arg(&file).arg(&fixed.id);
    let ran = async {
        let runc = fixed.runc.spawn("exec", command, log)?;
        running(Some(runc.pid()));
        let ran = fixed.runc.wait(runc, left).await;
        running(None);
        ran
    };
    let ran = ran.await;
    let _ = fs::remove_file(&file);
    ran.map_err(|error| {
        // The command is this pod's own: the image is as good for others as before.
        PhaseError::CannotRestoreHere {
            id: fixed.id.clone(),
            reason: format!("its after-restore command {:?} failed: {error}", words[0]),
        }
        .into()
    })
}
