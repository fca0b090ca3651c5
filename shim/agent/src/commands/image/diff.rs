//! `rekindle image diff`: in what two images differ.

use std::{collections::BTreeMap, process::ExitCode};

use rekindle_checkpoint::{
    ImageStore, SealedImage,
    archive::{self, Change, Difference},
    chunks::Composition,
    contents::{Contents, Memory},
    manifest::{Process, SHM_FILE, UPPER_FILE},
};
use rekindle_core::{
    config::NodeConfig,
    name::{ImageRef, Namespace},
};
use serde::Serialize;
use serde_json::{Value, json};

use super::{failure, locate, opened::Opened, show::line};
use crate::output;

#[derive(Debug, clap::Args)]
pub(super) struct DiffArgs {
    /// The first image: [NAMESPACE/]NAME[@GENERATION].
    a: ImageRef,
    /// The second one.
    b: ImageRef,
    /// Look in this namespace.
    #[arg(short, long, value_name = "NS")]
    namespace: Option<Namespace>,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
}

/// One of the two images.
struct Side {
    image: SealedImage,
    contents: Contents,
    /// Different chunks that the other one has too, with their bytes; none where that cannot be told.
    common: Option<(usize, u64)>,
}

/// The memory of one process, kind and name in both images.
#[derive(Default)]
struct Pair([Option<Composition>; 2]);

/// In what two images differ.
struct Differences {
    sides: [Side; 2],
    memory: BTreeMap<Memory, Pair>,
    upper: Vec<Difference>,
    shm: Vec<Difference>,
}

pub(super) fn run(
    store: &ImageStore,
    config: &NodeConfig,
    args: &DiffArgs,
) -> anyhow::Result<ExitCode> {
    let resolve = |wanted: &ImageRef| {
        let (namespace, generation) = locate(store, wanted, args.namespace.as_ref())?;
        let image = store.resolve(&namespace, &wanted.name, Some(generation));
        image.map_err(failure)
    };
    let images = [resolve(&args.a)?, resolve(&args.b)?];
    let spinner = output::spinner("reading both images");
    let found = compare(store, config, images);
    spinner.finish_and_clear();
    let found = found?;
    match args.json {
        true => output::json(&report(&found))?,
        false => describe(&found),
    }
    Ok(ExitCode::SUCCESS)
}

fn compare(
    store: &ImageStore,
    config: &NodeConfig,
    [a, b]: [SealedImage; 2],
) -> anyhow::Result<Differences> {
    let opened = [
        Opened::new(store, config, &a)?,
        Opened::new(store, config, &b)?,
    ];
    // Under another key an equal chunk has another digest.
    let comparable = a.manifest().encryption == b.manifest().encryption;
    let side = |image: SealedImage, own: &Opened, other: &Opened| -> anyhow::Result<Side> {
        let common = comparable.then(|| own.chunks.common(&other.chunks));
        Ok(Side {
            contents: own.contents(&image, common.as_ref())?,
            common: common.map(|common| own.chunks.in_common(&common)),
            image,
        })
    };
    let sides = [
        side(a, &opened[0], &opened[1])?,
        side(b, &opened[1], &opened[0])?,
    ];
    let mut memory: BTreeMap<Memory, Pair> = BTreeMap::new();
    for (place, side) in sides.iter().enumerate() {
        for (of, composition) in &side.contents.memory {
            let pair = memory.entry(of.clone()).or_default();
            pair.0[place] = Some(*composition);
        }
    }
    Ok(Differences {
        upper: files(&sides, UPPER_FILE)?,
        shm: files(&sides, SHM_FILE)?,
        sides,
        memory,
    })
}

/// The files in which the archives of that name differ. One that is not there is empty.
fn files(sides: &[Side; 2], archive: &str) -> anyhow::Result<Vec<Difference>> {
    let [a, b] = sides.each_ref().map(|side| {
        let stream = side.contents.chunks.stream(archive);
        stream.map_or_else(|| Ok(Vec::new()), archive::list)
    });
    Ok(archive::differences(&a?, &b?))
}

impl Pair {
    /// Whether there is nothing in it that the other image does not have too.
    fn is_same(&self) -> bool {
        let [Some(a), Some(b)] = &self.0 else {
            return false;
        };
        (a.bytes, a.zeros) == (b.bytes, b.zeros) && a.own() == 0 && b.own() == 0
    }
}

fn report(found: &Differences) -> Value {
    let both = |say: fn(&Side) -> Value| {
        let [a, b] = found.sides.each_ref().map(say);
        json!({"a": a, "b": b})
    };
    let comparable = found.sides[0].common.is_some();
    let composition = |of: &Option<Composition>| {
        of.map(|of| {
            let own = comparable.then(|| of.own());
            json!({"bytes": of.bytes, "zeros": of.zeros, "own": own})
        })
    };
    let memory = found.memory.iter().map(|(memory, pair)| {
        json!({
            "pid": memory.pid,
            "kind": memory.kind,
            "name": memory.name,
            "a": composition(&pair.0[0]),
            "b": composition(&pair.0[1]),
        })
    });
    let files = |all: &[Difference]| -> Vec<Value> {
        let row = |file: &Difference| {
            json!({
                "path": file.path.to_string_lossy(),
                "change": file.change,
                "kind": file.kind,
                "a": file.bytes[0],
                "b": file.bytes[1],
            })
        };
        all.iter().map(row).collect()
    };
    json!({
        "images": both(|side| json!(side.image.reference())),
        "chunks": both(|side| {
            let (count, bytes) = side.contents.chunks.different();
            let common = side.common.map(|(count, bytes)| json!({"count": count, "bytes": bytes}));
            json!({"count": count, "bytes": bytes, "common": common})
        }),
        "processes": both(|side| json!(side.image.manifest().facts.processes)),
        "memory": memory.collect::<Vec<_>>(),
        "writable_layer": files(&found.upper),
        "shm": files(&found.shm),
    })
}

fn describe(found: &Differences) {
    for (title, side) in ["first", "second"].into_iter().zip(&found.sides) {
        let (count, bytes) = side.contents.chunks.different();
        let bytes = output::bytes(bytes);
        let text = format!("{}, {bytes} in {count} chunks", side.image.reference());
        line(title, &text);
    }
    match found.sides[0].common {
        Some((count, bytes)) => {
            let text = format!("{} in {count} chunks", output::bytes(bytes));
            line("in common", &text);
        }
        None => line(
            "in common",
            "cannot be told: they are encrypted with different keys, or one is not",
        ),
    }
    processes(found);
    for (memory, pair) in found.memory.iter().filter(|(_, pair)| !pair.is_same()) {
        describe_memory(found, memory, pair);
    }
    for (title, files) in [("writable layer", &found.upper), ("/dev/shm", &found.shm)] {
        describe_files(title, files);
    }
}

fn processes(found: &Differences) {
    let [a, b] = found
        .sides
        .each_ref()
        .map(|side| &side.image.manifest().facts.processes);
    let is = |one: &Process, other: &Process| (one.pid, &one.comm) == (other.pid, &other.comm);
    for (sign, ours, others) in [("-", a, b), ("+", b, a)] {
        for process in ours
            .iter()
            .filter(|one| !others.iter().any(|other| is(one, other)))
        {
            line(
                "process",
                &format!("{sign} {:>6}  {}", process.pid, process.comm),
            );
        }
    }
}

fn describe_memory(found: &Differences, memory: &Memory, pair: &Pair) {
    let side = |place: usize| match &pair.0[place] {
        None => "none".to_owned(),
        Some(of) if found.sides[place].common.is_none() => output::bytes(of.bytes),
        Some(of) => format!(
            "{}, {} its own",
            output::bytes(of.bytes),
            output::bytes(of.own())
        ),
    };
    let of = memory.pid.map_or_else(String::new, |pid| format!("{pid} "));
    let name = memory.name.as_deref().unwrap_or_default();
    let what = format!("{of}{} {name}", word(&memory.kind));
    let text = format!("{}: {} → {}", what.trim_end(), side(0), side(1));
    line("memory", &text);
}

fn describe_files(title: &str, files: &[Difference]) {
    for file in files {
        let [before, after] = file.bytes.map(output::bytes);
        let (sign, size) = match file.change {
            Change::Added => ("+", after),
            Change::Removed => ("-", before),
            Change::Changed => ("~", format!("{before} → {after}")),
        };
        let kind = word(&file.kind);
        let path = file.path.display();
        line(title, &format!("{sign} /{path}  {kind}, {size}"));
    }
    let count = |change| files.iter().filter(|file| file.change == change).count();
    let [added, changed, removed] = [Change::Added, Change::Changed, Change::Removed].map(count);
    let text = match files {
        [] => "no difference".to_owned(),
        _ => format!("{added} added, {changed} changed, {removed} removed"),
    };
    line(title, &text);
}

/// What serde calls it.
pub(super) fn word(of: &impl Serialize) -> String {
    let value = serde_json::to_value(of).ok();
    let word = value.as_ref().and_then(Value::as_str);
    word.unwrap_or_default().to_owned()
}
