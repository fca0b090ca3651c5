//! The keys of encrypted images: from files, and from programs that print them.

use std::{
    io::Read as _,
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail};
use rekindle_checkpoint::{Key, SealedImage};
use rekindle_core::config::{ImageKey, NodeConfig};

/// What a program may take to print a key: a secret store in the same cluster answers in a fraction of it.
const DEADLINE: Duration = Duration::from_secs(10);

/// The key that opens `image`, or that it should be encrypted with and is not; none where there is none.
pub(crate) fn of(config: &NodeConfig, image: &SealedImage) -> anyhow::Result<Option<Key>> {
    let key = config.key_of(image.key(), &image.manifest().namespace);
    key.map(read).transpose()
}

/// Reads a key, or asks for it.
pub(crate) fn read(key: &ImageKey) -> anyhow::Result<Key> {
    if let Some(path) = &key.file {
        return Ok(Key::read(&key.id, path)?);
    }
    let text = printed(key.command.as_deref().unwrap_or_default())
        .with_context(|| format!("asking for the key {:?}", key.id))?;
    Ok(Key::parse(&key.id, text.as_bytes())?)
}

/// What a program prints.
fn printed(command: &[String]) -> anyhow::Result<String> {
    let Some((program, args)) = command.split_first() else {
        bail!("there is no program to ask");
    };
    let mut child = Command::new(program)
        .args(args)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .with_context(|| format!("starting {program}"))?;
    let begun = Instant::now();
    let status = loop {
        if let Some(status) = child.try_wait()? {
            break status;
        }
        if begun.elapsed() > DEADLINE {
            child.kill()?;
            child.wait()?;
            bail!("{program} did not end within {} s", DEADLINE.as_secs());
        }
        std::thread::park_timeout(Duration::from_millis(10));
    };
    if !status.success() {
        bail!("{program} ended with {status}");
    }
    let mut text = String::new();
    // A pipe holds more than any key: who prints more than that never ends, and is told so.
    let out = child.stdout.take().context("its output is gone")?;
    out.take(256).read_to_string(&mut text)?;
    Ok(text)
}
