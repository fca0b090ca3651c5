//! What can become of each file of an image, and where that is found first.
//!
//! A case is one damage of one file, tried with all that reads an image: before a restore, when the chunks are read,
//! when all are read, on the way to another node, and when the next generation is built on it.

use std::{collections::BTreeMap, sync::LazyLock};

use super::*;
use crate::{
    criu_image::{PE_LAZY, PE_PRESENT},
    layout::Layout,
    manifest::{ORIGIN_FILE, SHM_FILE},
};

/// The note of a restore, which lies beside the image's folder.
const TOUCHES: &str = "../.1.touches";
const PAGES: &str = "criu/pages-1.img";
const PAGEMAP: &str = "criu/pagemap-1.img";
/// Pages that CRIU reads itself, before those that a pager brings in.
const EAGER: u64 = 16;
const LAZY: u64 = 40;

/// The streams of the sample, of several chunks each, no two of which are alike and all of which LZ4 makes smaller.
static STREAMS: LazyLock<BTreeMap<&str, Vec<u8>>> = LazyLock::new(|| {
    let lines = |seed: usize, bytes: usize| -> Vec<u8> {
        let lines = (seed..).map(|n| format!("a line with the number {n}\n"));
        lines.flat_map(String::into_bytes).take(bytes).collect()
    };
    let pages = (EAGER + LAZY) as usize * 4096;
    BTreeMap::from([
        (PAGES, lines(0, pages)),
        (UPPER_FILE, lines(100_000, 150_000)),
        (SHM_FILE, lines(200_000, 100_000)),
    ])
});

/// How an image is stored.
struct Form {
    name: &'static str,
    key: Option<Key>,
    compression: Compression,
}

fn forms() -> [Form; 3] {
    let form = |name, key, compression| Form {
        name,
        key,
        compression,
    };
    let key = Key::parse("team-a-1", &[7; 32]).unwrap();
    [
        form("plain", None, Compression::None),
        form("compressed", None, Compression::Lz4),
        form("encrypted", Some(key), Compression::Lz4),
    ]
}

impl Form {
    /// Makes the next generation of the sample.
    fn make(&self, store: &ImageStore) -> Result<SealedImage, ImageError> {
        let making = Making {
            key: self.key.clone(),
            compression: self.compression,
            private: store.root().join("../private"),
        };
        let (namespace, name) = names();
        let request = store.begin(&namespace, &name, Source::default())?;
        let partial = making.begin(store, &request);
        folder(&partial.criu_dir());
        fs::remove_file(partial.criu_dir().join("pages-1.img")).unwrap();
        let lazy = 0x10000 + EAGER * 4096;
        let runs = [
            (0x10000, EAGER, PE_PRESENT),
            (lazy, LAZY, PE_PRESENT | PE_LAZY),
        ];
        fs::write(partial.criu_dir().join("pagemap-1.img"), pagemap(1, &runs)).unwrap();
        for (name, bytes) in &*STREAMS {
            let mut stream = partial.chunks().stream(name);
            stream.write_all(bytes).unwrap();
            stream.finish().unwrap();
        }
        drop(partial.seal(Facts::default())?);
        request.finish()
    }
}

/// What finds a damage first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Found {
    /// Whoever looks for the image.
    Resolve,
    /// One of the two: what is no JSON any more, or other JSON.
    ResolveOrVerify,
    /// The verification before a restore.
    Verify,
    /// Whoever reads that chunk.
    Chunk,
    /// Whoever reads the note, which is no reason to refuse a restore.
    Note,
    /// Whoever needs all of the image: this says that it is not all here.
    Whole,
    /// Nobody. Why that harms nobody is said where it is so.
    Nobody,
}

struct Case {
    file: String,
    what: String,
    harm: Box<dyn Fn(&Path)>,
    found: Found,
    /// In the sentence.
    words: String,
}

/// The cases of one image, which lies in `dir`.
struct Cases<'a> {
    dir: &'a Path,
    encrypted: bool,
    all: Vec<Case>,
}

impl Cases<'_> {
    fn add(
        &mut self,
        file: &str,
        what: &str,
        (found, words): (Found, &str),
        harm: impl Fn(&Path) + 'static,
    ) {
        let path = file.to_owned();
        self.all.push(Case {
            file: file.to_owned(),
            what: what.to_owned(),
            harm: Box::new(move |dir| harm(&dir.join(&path))),
            found,
            words: words.to_owned(),
        });
    }

    fn flip(&mut self, file: &str, (what, at): (&str, u64), found: (Found, &str)) {
        let what = format!("{what} flipped");
        self.add(file, &what, found, move |path| flip(path, at, 1));
    }

    fn bytes(&self, file: &str) -> Vec<u8> {
        fs::read(self.dir.join(file)).unwrap()
    }

    /// First, middle and last byte.
    fn ends(&mut self, file: &str, found: (Found, &str)) {
        let length = self.bytes(file).len() as u64;
        for place in [
            ("the first byte", 0),
            ("a byte in the middle", length / 2),
            ("the last byte", length - 1),
        ] {
            self.flip(file, place, found);
        }
    }

    /// What is not a file of that length. `kinds` is what is said of what is no regular file, `sizes` of another
    /// length, and `absent` when it is gone.
    fn shapes(
        &mut self,
        file: &str,
        sizes: (Found, &str),
        kinds: (Found, &str),
        absent: (Found, &str),
    ) {
        let length = self.bytes(file).len() as u64;
        let set_len = |bytes: u64| {
            move |path: &Path| {
                let file = File::options().write(true).open(path).unwrap();
                file.set_len(bytes).unwrap();
            }
        };
        self.add(file, "cut by a byte", sizes, set_len(length - 1));
        self.add(file, "empty", sizes, set_len(0));
        self.add(file, "a byte longer", sizes, set_len(length + 1));
        self.add(file, "a TiB of holes", sizes, set_len(1 << 40));
        self.add(file, "a link to what it was", kinds, |path| {
            let elsewhere = path.ancestors().nth(4).unwrap().join("elsewhere");
            fs::copy(path, &elsewhere).unwrap();
            fs::remove_file(path).unwrap();
            symlink(elsewhere, path).unwrap();
        });
        self.add(file, "a FIFO", kinds, |path| {
            use rustix::fs::{CWD, FileType, Mode, mknodat};
            fs::remove_file(path).unwrap();
            mknodat(CWD, path, FileType::Fifo, Mode::RUSR, 0).unwrap();
        });
        self.add(file, "a folder", kinds, |path| {
            fs::remove_file(path).unwrap();
            fs::create_dir(path).unwrap();
        });
        self.add(file, "gone", absent, |path| fs::remove_file(path).unwrap());
    }

    fn extra(&mut self, file: &str) {
        let words = (Found::Verify, "is not in the manifest");
        self.add(file, "too many", words, |path| {
            fs::write(path, "x").unwrap();
        });
    }

    fn manifest(&mut self) {
        let text = String::from_utf8(self.bytes(MANIFEST_FILE)).unwrap();
        let not_sealed = (Found::Verify, "manifest.json does not have the checksum");
        let no_json = (Found::Resolve, "cannot be understood");
        // The last digit of the number behind these words, in whose place another one is as good for a parser.
        let digit = |words: &str| {
            let at = text.find(words).unwrap() + words.len();
            let begin = at + text[at..].find(|c: char| c.is_ascii_digit()).unwrap();
            let length = text[begin..].find(|c: char| !c.is_ascii_digit()).unwrap();
            (begin + length - 1) as u64
        };
        for (what, at, found) in [
            ("the first byte", 0, no_json),
            (
                "a byte in the middle",
                text.len() as u64 / 2,
                (Found::ResolveOrVerify, ""),
            ),
            ("the last byte", text.len() as u64 - 1, no_json),
            (
                "the format",
                digit("\"format\":"),
                (Found::Resolve, "format 3"),
            ),
            ("a size", digit("\"size\":"), not_sealed),
            ("a digest", digit("\"blake3\": \""), not_sealed),
            ("a fact", digit("\"created\":"), not_sealed),
        ] {
            self.flip(MANIFEST_FILE, (what, at), found);
        }
        // What is behind its end is no JSON; a TiB is more than is read of it; and without one it is no image.
        self.shapes(
            MANIFEST_FILE,
            (Found::Resolve, "the manifest"),
            (Found::Resolve, "cannot read the manifest"),
            (Found::Resolve, "there is no image team-a/warm@1"),
        );
    }

    fn seal(&mut self) {
        let not_sealed = (Found::Verify, "manifest.json does not have the checksum");
        self.ends(MANIFEST_DIGEST_FILE, not_sealed);
        self.shapes(
            MANIFEST_DIGEST_FILE,
            not_sealed,
            (Found::Verify, "manifest.blake3 is not a regular file"),
            (Found::Verify, "manifest.blake3 is missing"),
        );
    }

    /// A file that the manifest lists with its size, and every byte of which something compares.
    fn listed(&mut self, file: &str) {
        let said = |words: &str| format!("{file} {words}");
        self.shapes(
            file,
            (Found::Verify, &said("has ")),
            (Found::Verify, &said("is not a regular file")),
            (Found::Verify, &said("is missing")),
        );
    }

    fn index(&mut self) {
        let (rows, _) = index(&self.bytes(INDEX_FILE));
        let not_sealed = (Found::Verify, "chunks.index does not have the checksum");
        self.ends(INDEX_FILE, not_sealed);
        let streams = 20 + 52 * rows.len() as u64;
        for place in [
            ("the number of packs", 8),
            ("the number of chunks", 12),
            ("the number of streams", 16),
            ("a chunk's digest", 20),
            ("a chunk's offset", 52),
            ("a chunk's stored length", 60),
            ("a chunk's length", 64),
            ("a chunk's pack", 68),
            ("a chunk's encoding", 70),
            ("a chunk's last byte", 71),
            ("the length of a stream's name", streams),
            ("a stream's name", streams + 1),
        ] {
            self.flip(INDEX_FILE, place, not_sealed);
        }
        self.listed(INDEX_FILE);
    }

    fn criu(&mut self) {
        for file in ["criu/inventory.img", "criu/pstree.img", PAGEMAP] {
            let words = format!("{file} does not have the checksum");
            self.ends(file, (Found::Verify, &words));
            self.listed(file);
        }
        let words = format!("{PAGEMAP} does not have the checksum");
        for place in [("the second magic", 4), ("a record's length", 8)] {
            self.flip(PAGEMAP, place, (Found::Verify, &words));
        }
        // Another process's, or none of any.
        self.extra("criu/pagemap-2.img");
        self.extra("criu/pages-1.img");
        let missing = (Found::Verify, "is missing");
        self.add(CRIU_DIR, "a link to what it was", missing, |path| {
            let elsewhere = path.ancestors().nth(4).unwrap().join("elsewhere");
            move_folder(path, &elsewhere);
            symlink(elsewhere, path).unwrap();
        });
        let deep = (Found::Verify, "criu/deep is not in the manifest");
        self.add("criu/deep", "a folder too many", deep, |path| {
            fs::create_dir(path).unwrap();
        });
    }

    /// The bytes of each kind of stream: found by whoever reads that chunk, and before a restore where CRIU is to read
    /// it.
    fn pack(&mut self) {
        let pack = pack(self.dir);
        let pack = pack.file_name().unwrap().to_str().unwrap().to_owned();
        let (rows, streams) = index(&self.bytes(INDEX_FILE));
        let damaged = |found| (found, "is damaged: what lies at byte");
        for (name, parts) in &streams {
            for (place, row) in parts.iter().enumerate() {
                let (offset, stored) = rows[*row as usize];
                let before = match name.as_str() {
                    PAGES => place < EAGER as usize / 16,
                    UPPER_FILE | SHM_FILE => false,
                    _ => true,
                };
                let found = match before {
                    true => Found::Verify,
                    false => Found::Chunk,
                };
                for (which, at) in [
                    ("first", offset),
                    ("middle", offset + stored / 2),
                    ("last", offset + stored - 1),
                ] {
                    let what = format!("{name}, chunk {place}: the {which} byte");
                    self.flip(&pack, (&what, at), damaged(found));
                }
            }
        }
        assert_eq!(self.encrypted, streams.len() > STREAMS.len());
        self.listed(&pack);
        self.extra("pack-00000000000000000000000000000000");
        self.extra("upper.tar");
    }

    /// It is a hint: whoever reads it finds the damage, and a restore goes on without it.
    fn touches(&mut self) {
        let note = (Found::Note, "1.touches is not used");
        let unread = (Found::Note, "cannot read");
        self.ends(TOUCHES, note);
        for place in [
            ("the image's digest", 8),
            ("the number of blocks", 40),
            ("a process", 44),
            ("an address", 48),
        ] {
            self.flip(TOUCHES, place, note);
        }
        // That there is none is no damage.
        self.shapes(TOUCHES, note, unread, (Found::Nobody, ""));
    }

    /// It says where the rest of an image is to be asked for, and is no part of it: what comes from there is compared
    /// with the index, whatever it was. Beside an image that is whole it says that this is not.
    fn origin(&mut self) {
        let text = r#"{"tier": "s3://images/all/", "packs": {}}"#;
        let whole = (Found::Whole, "is not all on this node yet");
        self.add(ORIGIN_FILE, "beside a whole image", whole, move |path| {
            fs::write(path, text).unwrap();
        });
        let other = text.replace("all", "alm");
        self.add(ORIGIN_FILE, "of another tier", whole, move |path| {
            fs::write(path, &other).unwrap();
        });
        let not_read = (Found::Whole, "origin.json");
        for (what, bytes) in [
            ("empty", Vec::new()),
            ("cut by a byte", text.as_bytes()[..text.len() - 1].to_vec()),
            ("a byte longer", format!("{text}x").into_bytes()),
            ("no text", vec![0xff; 9]),
        ] {
            self.add(ORIGIN_FILE, what, not_read, move |path| {
                fs::write(path, &bytes).unwrap();
            });
        }
        self.add(ORIGIN_FILE, "a TiB of holes", not_read, |path| {
            File::create(path).unwrap().set_len(1 << 40).unwrap();
        });
        self.add(ORIGIN_FILE, "a link", not_read, |path| {
            symlink(MANIFEST_FILE, path).unwrap();
        });
        self.add(ORIGIN_FILE, "a folder", not_read, |path| {
            fs::create_dir(path).unwrap();
        });
    }
}

/// The parts of each stream.
type Streams = BTreeMap<String, Vec<u32>>;

/// Where the stored bytes of each chunk lie in their pack, and which chunks make up each stream, as
/// `docs/IMAGE_FORMAT.md` says it.
fn index(bytes: &[u8]) -> (Vec<(u64, u64)>, Streams) {
    let word = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
    let (chunks, streams) = (word(12) as usize, word(16));
    let rows = (0..chunks).map(|row| {
        let at = 20 + 52 * row;
        let offset = u64::from_le_bytes(bytes[at + 32..at + 40].try_into().unwrap());
        (offset, u64::from(word(at + 40)))
    });
    let (rows, mut at) = (rows.collect(), 20 + 52 * chunks);
    let mut all = BTreeMap::new();
    for _ in 0..streams {
        let length = usize::from(bytes[at]);
        let name = String::from_utf8(bytes[at + 1..at + 1 + length].to_vec()).unwrap();
        at += 1 + length;
        let parts = word(at) as usize;
        let words = (0..parts).map(|part| word(at + 4 + 4 * part));
        all.insert(name, words.collect());
        at += 4 + 4 * parts;
    }
    (rows, all)
}

/// A node on which the sample lies as it was sealed, but for one damage.
struct Harmed<'a> {
    form: &'a Form,
    root: tempfile::TempDir,
    store: ImageStore,
}

impl<'a> Harmed<'a> {
    fn new(form: &'a Form, sound: &Path, case: &Case) -> Self {
        let root = tempfile::tempdir().unwrap();
        copy_tree(sound, &root.path().join("images"));
        (case.harm)(&root.path().join("images/team-a/warm/1"));
        let store = ImageStore::open(&root.path().join("images")).unwrap();
        Self { form, root, store }
    }

    fn resolve(&self) -> Result<SealedImage, ImageError> {
        let (namespace, name) = names();
        self.store.resolve(&namespace, &name, Some(1))
    }

    /// As before a restore.
    fn verify(&self) -> Result<VerifiedImage, ImageError> {
        let into = self.root.path().join("laid-out");
        self.resolve()?.verify(&into, self.form.key.as_ref())
    }

    /// As `rekindle image verify`.
    fn verify_all(&self) -> Result<(), ImageError> {
        self.verify()?.verify_chunks(&AtomicU64::new(0))
    }

    /// Reads what a restore reads, each stream as far as it comes, and all of what comes is what was sealed.
    fn read(&self) -> Result<(), ImageError> {
        let mut image = self.verify()?;
        let chunks = Arc::new(self.resolve()?.chunks(self.form.key.as_ref())?);
        let mut outcome = Ok(());
        for (name, sealed) in &*STREAMS {
            let mut read = Vec::new();
            let mut stream = chunks.stream(name).unwrap();
            if let Err(error) = stream.read_to_end(&mut read) {
                outcome = Err(ImageError::io("read", Path::new(name))(error));
            } else {
                assert!(read == *sealed, "{name} is another one");
            }
            assert!(sealed.starts_with(&read), "wrong bytes of {name}");
        }
        let eager = image.load_eagerly();
        let pages = fs::read(image.criu_dir().join("pages-1.img")).unwrap();
        if eager.is_ok() {
            assert!(pages == STREAMS[PAGES]);
        }
        // What did not come is a hole, and CRIU is not started for it.
        outcome.and(eager)
    }

    /// Into a layout, and out of it on another node, which has the key.
    fn travel(&self) -> Result<(), (bool, String)> {
        let image = self.resolve().map_err(|e| (false, with_causes(&e)))?;
        let layout = Layout::create(&self.root.path().join("layout")).unwrap();
        let pushed = layout.push(&image, "one", &AtomicU64::new(0));
        pushed.map_err(|e| (false, with_causes(&e)))?;
        let there = ImageStore::open(&self.root.path().join("there")).unwrap();
        let (namespace, name) = names();
        let counts = (&AtomicU64::new(0), &AtomicU64::new(0));
        let into = self.root.path().join("into");
        let pulled = layout.find(None).and_then(|found| {
            let key = self.form.key.as_ref();
            found.pull(&there, (&namespace, &name), key, &into, counts)
        });
        assert_eq!(there.list(None).unwrap().len(), usize::from(pulled.is_ok()));
        assert_eq!(leftovers(&there), 0);
        pulled.map(drop).map_err(|e| (true, with_causes(&e)))
    }

    /// The next generation is sound, or none is made.
    fn build_on(&self) -> Result<(), ImageError> {
        let next = self.form.make(&self.store)?;
        assert_eq!(next.generation(), 2);
        let into = self.root.path().join("next");
        let next = next.verify(&into, self.form.key.as_ref()).unwrap();
        next.verify_chunks(&AtomicU64::new(0)).unwrap();
        Ok(())
    }

    /// Tries all that reads it.
    fn asserts(&self, case: &Case) {
        let refused = |outcome: Result<(), ImageError>| {
            let sentence = with_causes(&outcome.unwrap_err());
            assert!(sentence.contains(&case.words), "{sentence}");
            assert!(!sentence.contains('\n'), "{sentence}");
        };
        let found = match (case.found, self.resolve()) {
            (Found::ResolveOrVerify, Err(_)) => Found::Resolve,
            (Found::ResolveOrVerify, Ok(_)) => Found::Verify,
            (found, _) => found,
        };
        match found {
            Found::Resolve => refused(self.resolve().map(drop)),
            _ => drop(self.resolve().unwrap()),
        }
        let (before, read) = match found {
            Found::Resolve | Found::Verify | Found::Whole => (false, false),
            Found::Chunk => (true, false),
            _ => (true, true),
        };
        if before {
            self.verify().unwrap();
        } else {
            refused(self.verify().map(drop));
        }
        if read {
            self.read().unwrap();
            self.verify_all().unwrap();
        } else {
            refused(self.read());
            refused(self.verify_all());
        }
        match found {
            Found::Note => refused(self.resolve().unwrap().touches().map(drop)),
            Found::Chunk | Found::Nobody => drop(self.resolve().unwrap().touches().unwrap()),
            _ => {}
        }
        match (found, self.travel()) {
            (Found::Note | Found::Nobody, Ok(())) => {}
            // No one without the key can tell, and chunks are not read for it: whoever takes it out does.
            (Found::Chunk, Err((true, _))) => {}
            (Found::Resolve | Found::Verify | Found::Whole, Err((_, said))) => {
                assert!(!said.contains('\n'), "{said}");
            }
            (_, other) => panic!("it travelled: {other:?}"),
        }
        if let Err(error) = self.build_on() {
            let chunk = case.file.starts_with("pack-") && case.what.ends_with("flipped");
            let sentence = with_causes(&error);
            assert!(chunk && sentence.contains("is damaged"), "{sentence}");
        }
        assert_eq!(leftovers(&self.store), 0);
        // It is listed, whatever it is, and in nobody's way to be removed.
        let (namespace, name) = names();
        assert!(!self.store.list(None).unwrap().is_empty());
        self.store.inventory(None).unwrap();
        self.store.remove(&namespace, &name, None, false).unwrap();
        assert_eq!(names_in(&self.store.home_of(&namespace, &name)), NUMBER);
    }
}

fn copy_tree(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let to = to.join(entry.file_name());
        match entry.file_type().unwrap().is_dir() {
            true => copy_tree(&entry.path(), &to),
            false => drop(fs::copy(entry.path(), to).unwrap()),
        }
    }
}

/// The promise: whatever becomes of a file of an image, it is refused in one sentence by the first that could be harmed,
/// and nobody gets a byte of it that was not sealed.
#[test]
fn whatever_becomes_of_a_file_is_found_before_it_harms() {
    let mut failed = Vec::new();
    for form in forms() {
        let sound = tempfile::tempdir().unwrap();
        let root = sound.path().join("images");
        let image = form.make(&ImageStore::open(&root).unwrap()).unwrap();
        image.note_touches(&touched(&[1, 2, 3])).unwrap();
        drop(image);
        let mut cases = Cases {
            dir: &root.join("team-a/warm/1"),
            encrypted: form.key.is_some(),
            all: Vec::new(),
        };
        cases.manifest();
        cases.seal();
        cases.index();
        if form.key.is_none() {
            cases.criu();
        }
        cases.pack();
        cases.touches();
        cases.origin();
        cases.extra("extra");
        cases.extra("manifest.jsonx");
        for case in &cases.all {
            let harmed = Harmed::new(&form, &root, case);
            let tried = std::panic::AssertUnwindSafe(|| harmed.asserts(case));
            if std::panic::catch_unwind(tried).is_err() {
                failed.push(format!("{}: {}: {}", form.name, case.file, case.what));
            }
        }
        let count = cases.all.len();
        println!("{count} damages of an image that is {}", form.name);
    }
    assert!(failed.is_empty(), "{failed:#?}");
}
