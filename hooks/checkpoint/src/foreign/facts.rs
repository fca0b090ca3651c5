//! What is known of an image that others have made, and what is not.

use std::{
    collections::HashSet,
    path::{Path, PathBuf},
};

use super::{Archive, ForeignError, SHM};
use crate::{
    archive::layer::Layer,
    criu_image::{OpenFiles, Pagemap, credentials, kept, link_remaps, processes},
    fit::container_facts,
    manifest::{DumpFlags, Facts, Host, Process, Source, Unknown},
    plain,
};

impl Archive {
    /// The facts of the image whose CRIU files are in `dir`. Our own shim writes them beside those; of others' dumps
    /// they are taken from the spec and from CRIU's files, and what neither says is unknown.
    pub(super) fn facts(
        &self,
        dir: &Path,
        upper: Option<&Layer>,
        shm: Option<&Layer>,
    ) -> Result<Facts, ForeignError> {
        let refuse = |source| self.criu(source);
        // All that a restore reads of them has to be readable.
        credentials(dir).map_err(refuse)?;
        let (found, machine) = processes(dir).map_err(refuse)?;
        let known = plain::read(dir).map_err(|source| ForeignError::Facts {
            path: self.path.clone(),
            source,
        })?;
        let mut facts = match known {
            Some(known) => known,
            None => self.guessed_by_nobody(dir, machine)?,
        };
        facts.source = Source {
            image_ref: self.about.image_ref.clone(),
            image_digest: self.about.image_digest.clone(),
            container: self.about.container.clone(),
            pod: self.about.pod.clone(),
            warm: None,
        };
        let of = |process: crate::criu_image::Process| Process {
            rss: stored(dir, process.pid),
            pid: process.pid,
            comm: process.comm,
        };
        facts.processes = found.into_iter().map(of).collect();
        if upper.is_none() {
            facts.unknown.insert(Unknown::Layer);
        }
        let lent = self.lends_shm();
        if lent && shm.is_none() {
            facts.unknown.insert(Unknown::Shm);
        }
        let layers = Layers { upper, shm, lent };
        self.refuse_lost(dir, &layers)?;
        Ok(facts)
    }

    /// Of a dump by others.
    fn guessed_by_nobody(&self, dir: &Path, machine: Option<&str>) -> Result<Facts, ForeignError> {
        let machine = machine.ok_or_else(|| {
            self.wrong(
                "core-*.img",
                "does not say of what machine it is, or says several",
            )
        })?;
        let container = container_facts(&self.spec);
        // Nobody can make these out of CRIU's files, and nobody has to: a restore of ours closes connections, and allows
        // sockets to the outside and locks, whatever the dump was told.
        let dump = self.about.flags.clone().unwrap_or_else(|| DumpFlags {
            terminal: container.terminal,
            ..DumpFlags::default()
        });
        let host = Host {
            arch: machine.to_owned(),
            ..Host::default()
        };
        let remaps = link_remaps(dir).map_err(|source| self.criu(source))?;
        Ok(Facts {
            host,
            dump: DumpFlags {
                link_remap: !remaps.is_empty(),
                ..dump
            },
            container,
            unknown: [Unknown::Host].into(),
            ..Facts::default()
        })
    }

    /// Whether `/dev/shm` is another's, so that it is not in CRIU's files.
    fn lends_shm(&self) -> bool {
        let mounts = self.spec.mounts().as_deref().unwrap_or_default();
        let mut shm = mounts
            .iter()
            .filter(|mount| mount.destination() == Path::new(SHM));
        shm.any(|mount| mount.typ().as_deref() == Some("bind"))
    }

    /// Refuses what no restore could find: it would fail, in CRIU's words, when it is too late to make another one.
    fn refuse_lost(&self, dir: &Path, layers: &Layers<'_>) -> Result<(), ForeignError> {
        let refuse = |source| self.criu(source);
        for remap in link_remaps(dir).map_err(refuse)? {
            if !layers.have(&remap.link) {
                return Err(self.lost(
                    &remap.deleted,
                    "it was deleted, and is not in the archive under the name that CRIU gave it for that",
                ));
            }
        }
        if !(layers.lent && layers.shm.is_none()) {
            return Ok(());
        }
        let kept: HashSet<u64> = kept(dir).map_err(refuse)?;
        let open = OpenFiles::read(dir).map_err(refuse)?;
        let mut names = open.names.iter().filter(|(id, _)| !kept.contains(id));
        match names.find(|(_, name)| Path::new(name).starts_with(SHM)) {
            Some((_, name)) => {
                Err(self.lost(Path::new(name), "the pod's /dev/shm is not in the archive"))
            }
            None => Ok(()),
        }
    }

    fn lost(&self, file: &Path, why: &'static str) -> ForeignError {
        ForeignError::Lost {
            path: self.path.clone(),
            file: crate::manifest::shorten(&file.to_string_lossy()),
            why,
        }
    }
}

/// What the archive has of files.
struct Layers<'a> {
    upper: Option<&'a Layer>,
    shm: Option<&'a Layer>,
    /// Whether `/dev/shm` is lent.
    lent: bool,
}

impl Layers<'_> {
    fn have(&self, file: &Path) -> bool {
        let (layer, file): (_, PathBuf) = match file.strip_prefix(SHM) {
            Ok(below) if self.lent => (self.shm, below.to_owned()),
            _ => (
                self.upper,
                file.strip_prefix("/").unwrap_or(file).to_owned(),
            ),
        };
        layer.is_some_and(|layer| layer.names.contains(&file))
    }
}

/// Bytes of a process's pages that are in the image.
fn stored(dir: &Path, pid: u32) -> u64 {
    let page_size = rustix::param::page_size() as u64;
    let mut bytes = 0_u64;
    // A process without memory has none.
    let Ok(mut map) = Pagemap::open(&dir.join(format!("pagemap-{pid}.img"))) else {
        return 0;
    };
    while let Ok(Some(run)) = map.next_run() {
        if run.present() {
            bytes = bytes.saturating_add(run.bytes(page_size));
        }
    }
    bytes
}
