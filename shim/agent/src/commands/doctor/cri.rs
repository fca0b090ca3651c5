//! Whether containerd's CRI plugin knows the runtime, read from containerd's configuration.
//!
//! The files are read, not the running daemon: its CRI answer does not show `pod_annotations`.

use std::{fs, path::Path};

use toml::{Table, Value};

use super::Check;

const NAME: &str = "containerd runtime";
const ADVICE: &str = "install runtimeclass/manifests/containerd-2.toml (containerd 1.7: containerd-1.7.toml) and restart containerd";
/// The CRI plugin of containerd 2.x, and of 1.7.
const PLUGINS: [&str; 2] = ["io.containerd.cri.v1.runtime", "io.containerd.grpc.v1.cri"];

/// Looks for the runtime `rekindle` in `main` and in the files that it imports.
pub(super) fn check(main: &Path) -> Check {
    let mut tables = Vec::new();
    if let Err(reason) = read(main, &mut tables) {
        return Check::failed(NAME, reason, ADVICE);
    }
    match tables.iter().find_map(runtime) {
        None => {
            let found = format!(
                "no runtime \"rekindle\" in {} and what it imports",
                main.display()
            );
            Check::failed(NAME, found, ADVICE)
        }
        Some(entry) => judge(entry),
    }
}

fn judge(entry: &Table) -> Check {
    let text = |key: &str| entry.get(key).and_then(Value::as_str).unwrap_or("");
    let listed = entry
        .get("pod_annotations")
        .and_then(Value::as_array)
        .is_some_and(|keys| {
            keys.iter()
                .any(|key| key.as_str() == Some("rekindle.dev/*"))
        });
    let path = text("runtime_path");
    if !listed {
        let found =
            "registered without pod_annotations = [\"rekindle.dev/*\"]: every annotation is lost";
        Check::failed(NAME, found, ADVICE)
    } else if !path.is_empty() && !Path::new(path).exists() {
        Check::failed(
            NAME,
            format!("its runtime_path {path} does not exist"),
            "install the shim there",
        )
    } else if path.is_empty() && text("runtime_type") != "io.containerd.rekindle.v1" {
        let found = format!(
            "runtime_type {} without runtime_path: another shim would run",
            text("runtime_type")
        );
        Check::failed(NAME, found, ADVICE)
    } else {
        let which = if path.is_empty() {
            text("runtime_type")
        } else {
            path
        };
        Check::passed(NAME, format!("rekindle = {which}"))
    }
}

fn runtime(table: &Table) -> Option<&Table> {
    let plugins = table.get("plugins")?.as_table()?;
    PLUGINS.iter().find_map(|plugin| {
        plugins
            .get(*plugin)?
            .get("containerd")?
            .get("runtimes")?
            .get("rekindle")?
            .as_table()
    })
}

fn read(file: &Path, into: &mut Vec<Table>) -> Result<(), String> {
    let shown = file.display();
    let text = fs::read_to_string(file).map_err(|e| format!("reading {shown}: {e}"))?;
    let table: Table = text
        .parse()
        .map_err(|e: toml::de::Error| format!("{shown}: {}", e.message()))?;
    let imports: Vec<String> = table
        .get("imports")
        .and_then(Value::as_array)
        .map(|list| {
            list.iter()
                .filter_map(Value::as_str)
                .map(str::to_owned)
                .collect()
        })
        .unwrap_or_default();
    into.push(table);
    for import in imports {
        for path in matching(file, &import) {
            // An import is not followed further: containerd follows them, but nobody nests them.
            let text = fs::read_to_string(&path)
                .map_err(|e| format!("reading {}: {e}", path.display()))?;
            let table = text
                .parse()
                .map_err(|e: toml::de::Error| format!("{}: {}", path.display(), e.message()))?;
            into.push(table);
        }
    }
    Ok(())
}

/// The files an import means: a path, relative to the file that names it, whose last part may hold a `*`.
fn matching(from: &Path, import: &str) -> Vec<std::path::PathBuf> {
    let path = from.parent().unwrap_or(Path::new("/")).join(import);
    let Some((before, after)) = path
        .file_name()
        .and_then(|name| name.to_str())
        .and_then(|name| name.split_once('*'))
    else {
        return vec![path];
    };
    let Some(Ok(entries)) = path.parent().map(fs::read_dir) else {
        return Vec::new();
    };
    let mut files: Vec<_> = entries
        .filter_map(|entry| Some(entry.ok()?.path()))
        .filter(|path| {
            path.file_name()
                .and_then(|name| name.to_str())
                .is_some_and(|name| {
                    name.len() >= before.len() + after.len()
                        && name.starts_with(before)
                        && name.ends_with(after)
                })
        })
        .collect();
    files.sort();
    files
}

#[cfg(test)]
mod tests {
    use super::super::State;
    use super::*;

    fn drop_in(entry: &str) -> Check {
        let folder = tempfile::tempdir().unwrap();
        let main = folder.path().join("config.toml");
        fs::create_dir(folder.path().join("conf.d")).unwrap();
        fs::write(&main, "version = 3\nimports = ['conf.d/*.toml']\n").unwrap();
        let section = "[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.rekindle]\n";
        fs::write(
            folder.path().join("conf.d/rekindle.toml"),
            format!("{section}{entry}"),
        )
        .unwrap();
        check(&main)
    }

    #[test]
    fn an_entry_is_found_in_an_import_and_judged() {
        let annotations = "pod_annotations = ['rekindle.dev/*']\n";
        let good = drop_in(&format!(
            "{annotations}runtime_type = 'io.containerd.rekindle.v1'"
        ));
        assert_eq!(good.state, State::Passed, "{good:?}");
        for (bad, words) in [
            (
                "runtime_type = 'io.containerd.rekindle.v1'".to_owned(),
                "every annotation is lost",
            ),
            (
                format!("{annotations}runtime_type = 'io.containerd.runc.v2'"),
                "another shim",
            ),
            (
                format!("{annotations}runtime_path = '/nowhere/shim'"),
                "does not exist",
            ),
        ] {
            let check = drop_in(&bad);
            assert_eq!(check.state, State::Failed);
            assert!(check.found.contains(words), "{check:?}");
        }
    }

    #[test]
    fn the_manifests_that_are_shipped_are_understood() {
        for text in [
            include_str!("../../../../../runtimeclass/manifests/containerd-2.toml"),
            include_str!("../../../../../runtimeclass/manifests/containerd-1.7.toml"),
        ] {
            let table: Table = text.parse().unwrap();
            let entry = runtime(&table).unwrap();
            assert!(entry.contains_key("pod_annotations"));
            assert!(
                entry["runtime_path"]
                    .as_str()
                    .unwrap()
                    .starts_with("/opt/rekindle/bin/")
            );
        }
    }
}
