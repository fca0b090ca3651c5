//! What keeps the bytes of an image from who has its files and not its key.
//!
//! ```text
//!  namespace's key ─┬─ "chunk address" ────────────▶ keys the digests: the same in all images of the namespace
//!                   ├─ "manifest" ─────────────────▶ keys the manifest's digest: nobody else can make one
//!                   └─ "pack" + the pack's name ───▶ AES-256-GCM, the chunk's offset in the pack as its nonce
//! ```
//! Every pack has a name of its own, drawn by chance, and so a key of its own, under which no offset is
//! used twice: a pack is written once, from its beginning to its end.

use std::{
    fmt,
    fs::File,
    io::{self, Read as _},
    os::unix::fs::MetadataExt as _,
    path::{Path, PathBuf},
};

use ring::{
    aead::{AES_256_GCM, Aad, LessSafeKey, Nonce, UnboundKey},
    rand::{SecureRandom, SystemRandom},
};

use super::{ChunkError, Digest, PackId};

/// Bytes that encryption adds to a chunk.
pub(super) const TAG: usize = 16;

/// Why a key cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum KeyError {
    /// Neither 32 bytes nor their hex digits.
    #[error(
        "what was read for the key {0:?} is no key: 32 bytes are needed, or their 64 hex digits (`openssl rand -hex 32`)"
    )]
    Form(String),
    /// Its file could not be read.
    #[error("cannot read the key {id:?} from {}", path.display())]
    Read {
        /// Which key.
        id: String,
        /// From where.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// Others than root could read it.
    #[error("the key {id:?} in {} can be read by others than its owner: chmod 600 it", path.display())]
    Open {
        /// Which key.
        id: String,
        /// Where it is.
        path: PathBuf,
    },
    /// The kernel gives no random bytes.
    #[error("the kernel gives no random bytes")]
    Random,
}

/// A namespace's key: 256 bits from which all others are derived. Never shown.
#[derive(Clone)]
pub struct Key {
    id: String,
    bytes: [u8; 32],
}

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Key")
            .field("id", &self.id)
            .finish_non_exhaustive()
    }
}

impl Key {
    /// The key `id` from what its file holds or its command prints: 32 bytes, or 64 hex digits and white space.
    ///
    /// # Errors
    /// [`KeyError::Form`].
    pub fn parse(id: &str, text: &[u8]) -> Result<Self, KeyError> {
        let bytes = <[u8; 32]>::try_from(text).ok().or_else(|| {
            let hex = blake3::Hash::from_hex(text.trim_ascii()).ok()?;
            Some(*hex.as_bytes())
        });
        match bytes {
            Some(bytes) => Ok(Self {
                id: id.to_owned(),
                bytes,
            }),
            None => Err(KeyError::Form(id.to_owned())),
        }
    }

    /// The key `id` from its file.
    ///
    /// # Errors
    /// When it cannot be read, or others can read it, or it is no key.
    pub fn read(id: &str, path: &Path) -> Result<Self, KeyError> {
        let read = |source| KeyError::Read {
            id: id.to_owned(),
            path: path.to_owned(),
            source,
        };
        let mut file = File::open(path).map_err(read)?;
        if file.metadata().map_err(read)?.mode() & 0o077 != 0 {
            return Err(KeyError::Open {
                id: id.to_owned(),
                path: path.to_owned(),
            });
        }
        let mut text = Vec::new();
        // More than any form of a key has.
        (&mut file).take(256).read_to_end(&mut text).map_err(read)?;
        Self::parse(id, &text)
    }

    /// How the configuration and manifests name it.
    pub fn id(&self) -> &str {
        &self.id
    }

    fn derive(&self, purpose: &str, more: &[u8]) -> [u8; 32] {
        let mut hasher = blake3::Hasher::new_derive_key(purpose);
        hasher.update(&self.bytes).update(more);
        *hasher.finalize().as_bytes()
    }

    /// The digest of a manifest that only a holder of the key can make.
    pub(super) fn manifest_digest(&self, bytes: &[u8]) -> Digest {
        let key = self.derive("rekindle 2026-11 image manifest", &[]);
        Digest(*blake3::keyed_hash(&key, bytes).as_bytes())
    }

    /// What tells a wrong key from a damaged image: a digest of a text that every image has.
    pub(crate) fn check(&self) -> String {
        let check = self.derive("rekindle 2026-11 key check", &[]);
        check[..8]
            .iter()
            .map(|byte| format!("{byte:02x}"))
            .collect()
    }

    pub(super) fn address(&self) -> [u8; 32] {
        self.derive("rekindle 2026-11 chunk address", &[])
    }
}

/// Seals and opens the chunks of one pack.
pub struct Cipher(LessSafeKey);

impl fmt::Debug for Cipher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Cipher")
    }
}

impl Cipher {
    pub(super) fn of(key: &Key, pack: PackId) -> Option<Self> {
        let bytes = key.derive("rekindle 2026-11 pack", &pack.0);
        let key = UnboundKey::new(&AES_256_GCM, &bytes).ok()?;
        Some(Self(LessSafeKey::new(key)))
    }

    fn nonce(offset: u64) -> Nonce {
        let mut nonce = [0; 12];
        nonce[4..].copy_from_slice(&offset.to_be_bytes());
        Nonce::assume_unique_for_key(nonce)
    }

    /// Encrypts what will lie at `offset` in place, and appends its tag.
    pub(super) fn seal(&self, offset: u64, bytes: &mut Vec<u8>) -> Result<(), KeyError> {
        // Fails for more than 64 GiB only.
        let sealed = self
            .0
            .seal_in_place_append_tag(Self::nonce(offset), Aad::empty(), bytes);
        sealed.map_err(|_| KeyError::Random)
    }

    /// Decrypts in place; none when a byte of it is not what was sealed at this offset under this key.
    pub(super) fn open<'a>(&self, offset: u64, bytes: &'a mut [u8]) -> Option<&'a mut [u8]> {
        self.0
            .open_in_place(Self::nonce(offset), Aad::empty(), bytes)
            .ok()
    }
}

/// How digests of chunks are made.
#[derive(Debug, Clone)]
pub(super) struct Addresses(Option<[u8; 32]>);

impl Addresses {
    pub(super) fn of(key: Option<&Key>) -> Self {
        Self(key.map(Key::address))
    }

    pub(super) fn digest(&self, bytes: &[u8]) -> Digest {
        let hash = match &self.0 {
            Some(key) => blake3::keyed_hash(key, bytes),
            None => blake3::hash(bytes),
        };
        Digest(*hash.as_bytes())
    }
}

impl PackId {
    /// A new one.
    pub(super) fn draw() -> Result<Self, ChunkError> {
        let mut id = [0; 16];
        SystemRandom::new()
            .fill(&mut id)
            .map_err(|_| KeyError::Random)?;
        Ok(Self(id))
    }
}
