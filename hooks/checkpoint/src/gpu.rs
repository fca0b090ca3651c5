//! Device nodes of GPUs that a container has: what is in those devices no image of this build has.

use std::fs;

use serde_json::Value;

/// Whether a path is that of a GPU's device node, or of the folder that has them: NVIDIA's, AMD's, the render
/// nodes of all others. A `card0` alone is any virtual machine's screen.
fn is_gpu(path: &str) -> bool {
    ["/dev/nvidia", "/dev/kfd", "/dev/dxg", "/dev/dri/renderD"]
        .iter()
        .any(|start| path.starts_with(start))
        || path == "/dev/dri"
}

/// Those that a container's spec gives it, as devices or as mounts.
pub fn of_spec(spec: &Value) -> Vec<String> {
    let texts = |list: &str, key: &'static str| {
        let all = spec.pointer(list).and_then(Value::as_array);
        let all = all.into_iter().flatten();
        all.filter_map(move |one| one.get(key)?.as_str())
    };
    texts("/linux/devices", "path")
        .chain(texts("/mounts", "source"))
        .filter(|path| is_gpu(path))
        .map(str::to_owned)
        .collect()
}

/// Those that a running container has, whoever put them there: NVIDIA's runtime adds them in a hook, and its spec says
/// nothing of it. None where `init`, its first process, cannot be looked at.
pub fn of_process(init: i32) -> Vec<String> {
    let names = |folder: &str| {
        let there = fs::read_dir(format!("/proc/{init}/root{folder}"));
        let folder = folder.to_owned();
        there
            .into_iter()
            .flatten()
            .flatten()
            .map(move |entry| format!("{folder}/{}", entry.file_name().to_string_lossy()))
    };
    let mut found: Vec<String> = names("/dev")
        .filter(|path| path != "/dev/dri")
        .chain(names("/dev/dri"))
        .filter(|path| is_gpu(path))
        .collect();
    found.sort();
    found
}
