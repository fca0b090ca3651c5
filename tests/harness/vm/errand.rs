//! What a machine is booted for: a script, and the files that it needs on top of the disk.

use super::temporary;
use crate::{Image, node};
use anyhow::{Context, Result};
use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use tar::{Builder, EntryType, Header};

/// What a test may take there, in terms of what it may take here. The machine is ten times slower, and alone with it.
const PATIENCE: &str = "4";
/// What of this program's variables the same program needs there.
const HANDED_ON: [&str; 2] = ["NODE_SUITE", "REKINDLE_RUNTIMES"];

/// To be given to [`super::Machine::boot`].
#[derive(Debug)]
pub struct Errand {
    script: String,
    files: Vec<(&'static str, PathBuf)>,
    texts: Vec<(&'static str, String)>,
}

impl Errand {
    /// A story to be told with the shim under test on a containerd without CRI, which nobody asks there: its start
    /// takes seconds. `image` is `/run/errand/image.tar`.
    pub fn story(story: &str, image: &Image) -> Result<Errand> {
        Ok(Errand {
            script: story.to_owned(),
            files: vec![("run/errand/image.tar", image.archive.clone())],
            texts: vec![(
                "etc/containerd/config.toml",
                include_str!("containerd.toml").to_owned(),
            )],
        })
    }

    /// This test program, with the arguments it was given here: its tests take the machine for their node.
    pub(super) fn this_program() -> Result<Errand> {
        // containerd is started anew by some of them, so there is one at a time.
        let mut script = "export REKINDLE_NODE=here RUST_TEST_THREADS=1".to_owned();
        script += &format!(" REKINDLE_PATIENCE={PATIENCE}");
        for name in HANDED_ON {
            if let Ok(value) = std::env::var(name) {
                script += &format!(" {name}={}", quoted(&value));
            }
        }
        script += "\nexec /run/errand/program";
        for argument in std::env::args().skip(1) {
            script += &format!(" {}", quoted(&argument));
        }
        Ok(Errand {
            script,
            files: vec![("run/errand/program", std::env::current_exe()?)],
            texts: Vec::new(),
        })
    }

    /// All of it as an archive in a file without a name.
    pub(super) fn pack(&self) -> Result<File> {
        let folder = temporary();
        let file = tempfile::tempfile_in(&folder)
            .with_context(|| format!("making a file in {}", folder.display()))?;
        let mut archive = Builder::new(file);
        // busybox reads no sparse entries.
        archive.sparse(false);
        let environment = format!("HOME=/root\nPATH={}\n", node::PATH);
        let units = "run/systemd/system";
        for (name, text) in [
            ("run/errand/script".into(), self.script.as_str()),
            ("run/errand/environment".into(), &environment),
            (
                format!("{units}/errand.service"),
                include_str!("errand.service"),
            ),
            (
                format!("{units}/containerd.service.d/errand.conf"),
                include_str!("containerd.conf"),
            ),
        ] {
            text_file(&mut archive, &name, text)?;
        }
        for (name, text) in &self.texts {
            text_file(&mut archive, name, text)?;
        }
        let programs = node::programs()?;
        let programs = [node::SHIM, "rekindle"]
            .map(|name| (format!("opt/rekindle/bin/{name}"), programs.join(name)));
        let files = self.files.iter();
        let files = files.map(|(name, from)| ((*name).to_owned(), from.clone()));
        for (name, from) in files.chain(programs) {
            archive
                .append_path_with_name(&from, name)
                .with_context(|| format!("packing {}: run `make build`", from.display()))?;
        }
        let mut link = Header::new_gnu();
        link.set_entry_type(EntryType::Symlink);
        link.set_size(0);
        link.set_mode(0o777);
        archive.append_link(
            &mut link,
            "opt/rekindle/shadow/containerd-shim-runc-v2",
            Path::new("../bin").join(node::SHIM),
        )?;
        let mut file = archive.into_inner()?;
        file.flush()?;
        Ok(file)
    }
}

fn text_file(archive: &mut Builder<File>, name: &str, text: &str) -> Result<()> {
    let mut header = Header::new_gnu();
    header.set_mode(0o644);
    header.set_size(text.len() as u64);
    Ok(archive.append_data(&mut header, name, text.as_bytes())?)
}

/// As one word of a shell's.
fn quoted(word: &str) -> String {
    format!("'{}'", word.replace('\'', r"'\''"))
}
