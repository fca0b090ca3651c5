//! A node's configuration and its store, with images as the shim makes them.

use std::{
    fs,
    io::Write as _,
    path::{Path, PathBuf},
    process::{Command, Output},
    time::{Duration, SystemTime},
};

use rekindle_checkpoint::{
    Facts, ImageStore, Key, chunks::Compression, image::Request, manifest::UPPER_FILE,
};
use rekindle_core::config::NodeConfig;
use serde_json::Value;
use tempfile::TempDir;

use crate::schema;

/// Removed with its folder.
pub(crate) struct Node {
    pub(crate) folder: TempDir,
}

impl Node {
    /// One with this in its configuration.
    pub(crate) fn with(config: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let node = Self { folder };
        let root = node.root();
        fs::write(
            node.config(),
            format!("[images]\nroot = {root:?}\n{config}"),
        )
        .unwrap();
        node
    }

    pub(crate) fn root(&self) -> PathBuf {
        self.folder.path().join("images")
    }

    pub(crate) fn config(&self) -> PathBuf {
        self.folder.path().join("config.toml")
    }

    pub(crate) fn store(&self) -> ImageStore {
        let text = fs::read_to_string(self.config()).unwrap();
        ImageStore::of(&NodeConfig::parse("", &text).unwrap().images).unwrap()
    }

    /// `rekindle --config … image …`
    pub(crate) fn image(&self, args: &[&str]) -> Output {
        let output = Command::new(env!("CARGO_BIN_EXE_rekindle"))
            .args(["--config", self.config().to_str().unwrap(), "image"])
            .args(args)
            .env_remove("REKINDLE_LOG")
            .output()
            .unwrap();
        schema::check(&[&["image"], args].concat(), &output.stdout);
        output
    }

    /// The one object that a command prints, which must succeed.
    pub(crate) fn json(&self, args: &[&str]) -> Value {
        let output = self.image(args);
        assert!(output.status.success(), "{args:?}: {output:?}");
        let text = String::from_utf8(output.stdout).unwrap();
        assert_eq!(text.lines().count(), 1, "{text}");
        serde_json::from_str(&text).unwrap()
    }

    /// What a command prints, which must succeed.
    pub(crate) fn says(&self, args: &[&str]) -> String {
        let output = self.image(args);
        assert!(output.status.success(), "{args:?}: {output:?}");
        String::from_utf8(output.stdout).unwrap()
    }

    /// Asserts that it ends with `code`, and one line on stderr with all of `words`.
    pub(crate) fn fails(&self, args: &[&str], code: i32, words: &[&str]) {
        let output = self.image(args);
        let text = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(code), "{args:?}: {output:?}");
        assert_eq!(text.trim().lines().count(), 1, "{text}");
        for word in words {
            assert!(text.contains(word), "{word:?} is not in: {text}");
        }
    }

    /// Makes the next generation of `namespace/name`, whose writable layer is `upper`; says its folder.
    pub(crate) fn make(&self, image: &str, upper: &[u8]) -> PathBuf {
        self.make_with(image, None, minimal, &[(UPPER_FILE, upper)])
    }

    /// The same with other files of CRIU's and other streams, encrypted where there is a key.
    pub(crate) fn make_with(
        &self,
        image: &str,
        key: Option<Key>,
        criu: impl Fn(&Path),
        streams: &[(&str, &[u8])],
    ) -> PathBuf {
        let store = self.store();
        let request = asked(&store, image);
        let order = store.partial_at(&request.dir()).unwrap().unwrap();
        let bytes = streams.iter().map(|(_, bytes)| bytes.len() as u64).sum();
        let order = order.expecting(bytes);
        let private = self.folder.path().join("private");
        let partial = order.begin(key, Compression::None, &private).unwrap();
        criu(&partial.criu_dir());
        for (name, bytes) in streams {
            let mut stream = partial.chunks().stream(name);
            stream.write_all(bytes).unwrap();
            stream.finish().unwrap();
        }
        let made = partial.seal(Facts::default()).unwrap();
        let generation = made.generation().to_string();
        self.root().join(image).join(generation)
    }

    /// Says of an image that a container last started from it so long ago.
    pub(crate) fn used(&self, image: &str, generation: u64, ago: Duration) {
        let lock = self.root().join(image).join(format!(".{generation}.lock"));
        let lock = fs::File::options().write(true).open(lock).unwrap();
        lock.set_modified(SystemTime::now() - ago).unwrap();
    }

    /// `namespace/name@generation` of all images.
    pub(crate) fn images(&self) -> Vec<String> {
        let rows = self.json(&["ls", "--json"]);
        let rows = rows.as_array().unwrap().iter();
        rows.map(|row| {
            let text = |key: &str| row[key].as_str().unwrap().to_owned();
            format!(
                "{}/{}@{}",
                text("namespace"),
                text("name"),
                row["generation"]
            )
        })
        .collect()
    }
}

/// An image that is asked for.
pub(crate) fn asked(store: &ImageStore, image: &str) -> Request {
    let (namespace, name) = image.split_once('/').unwrap();
    let (namespace, name) = (namespace.parse().unwrap(), name.parse().unwrap());
    store.begin(&namespace, &name, Default::default()).unwrap()
}

/// The files that every image of CRIU's has, with nothing in them.
pub(crate) fn minimal(criu: &Path) {
    let words = |words: [u32; 2]| words.map(u32::to_le_bytes).concat();
    fs::write(criu.join("inventory.img"), words([0x5831_3116, 0])).unwrap();
    fs::write(criu.join("pstree.img"), words([0x5456_4319, 0x5027_3030])).unwrap();
}

/// So many bytes, no two chunks of which are alike; others for another seed.
pub(crate) fn bytes(seed: u32, length: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9) | 1;
    let next = || {
        state ^= state << 13;
        state ^= state >> 17;
        state ^= state << 5;
        Some(state)
    };
    let words = std::iter::from_fn(next).flat_map(u32::to_le_bytes);
    words.take(length).collect()
}
