//! What the processes of an image ask for first: the blocks of their memory, in the order in which a restore was asked
//! for them. The next restore brings them in ahead, in that order.
//!
//! It is a hint, made after the image was sealed and no part of it. It has addresses and no content, and can do no more
//! than change an order: a block that an image does not have is passed over. So it is not proved by anything, and what
//! is wrong with it is never a reason to refuse a restore.
//!
//! ```text
//!  8  "RKTOUCH1"
//! 32  the BLAKE3 of the image's manifest.json
//!  4  blocks
//! 12  each: the process by its number in the container (4), the address (8)
//! 32  the BLAKE3 of all before it
//! ```
//! All numbers are little-endian.

use crate::chunks::{CHUNK, Digest};

/// Behind the name comes the version.
const MAGIC: &[u8; 8] = b"RKTOUCH1";
const DIGEST: usize = 32;
const HEAD: usize = MAGIC.len() + DIGEST + 4;
const ROW: usize = 12;
/// More blocks are not noted: 4 GiB of memory that was asked for, and 768 KiB of file.
pub(crate) const MAX_TOUCHES: usize = 1 << 16;
/// Bytes of the longest file.
pub(crate) const MAX_FILE: usize = HEAD + MAX_TOUCHES * ROW + DIGEST;

/// A block of a process's memory, of 64 KiB.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Touch {
    pid: i32,
    vaddr: u64,
}

impl Touch {
    /// The block that an address of a process lies in. The process has its number in the container, which is the same in
    /// every restore of an image; one that was forked since has none, which is 0.
    pub fn at(pid: i32, address: u64) -> Self {
        let vaddr = address - address % CHUNK as u64;
        Self { pid, vaddr }
    }

    /// The process's number.
    pub fn pid(self) -> i32 {
        self.pid
    }

    /// The block's first address, a multiple of 64 KiB.
    pub fn vaddr(self) -> u64 {
        self.vaddr
    }
}

/// Why a file with touches is not used.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum TouchesError {
    /// It is of another version, or no such file at all.
    #[error("it does not begin as one of this version does")]
    Foreign,
    /// It has more or fewer bytes than it says, or more blocks than are ever noted.
    #[error("it has {0} bytes, which is not what it says")]
    Size(usize),
    /// It was made for another image.
    #[error("it is of another image")]
    OtherImage,
    /// Its bytes are not those that were written.
    #[error("it does not have the checksum that it was written with")]
    Checksum,
    /// A process without a number, or an address within a block.
    #[error("block {0} is none")]
    Block(usize),
}

/// Reads a file of the image that has this manifest.
///
/// # Errors
/// Any byte that [`write()`] would not have written.
pub fn read(bytes: &[u8], manifest: &[u8]) -> Result<Vec<Touch>, TouchesError> {
    let size = TouchesError::Size(bytes.len());
    let (magic, rest) = bytes
        .split_first_chunk::<8>()
        .ok_or(TouchesError::Foreign)?;
    if magic != MAGIC {
        return Err(TouchesError::Foreign);
    }
    let (image, rest) = rest.split_first_chunk::<DIGEST>().ok_or(size)?;
    let (count, rest) = rest.split_first_chunk::<4>().ok_or(size)?;
    let (rows, digest) = rest.split_last_chunk::<DIGEST>().ok_or(size)?;
    let count = u32::from_le_bytes(*count) as usize;
    if count > MAX_TOUCHES || rows.len() != count * ROW {
        return Err(size);
    }
    if Digest::of(&bytes[..bytes.len() - DIGEST]).0 != *digest {
        return Err(TouchesError::Checksum);
    }
    if Digest::of(manifest).0 != *image {
        return Err(TouchesError::OtherImage);
    }
    let (rows, _) = rows.as_chunks::<ROW>();
    let rows = rows.iter().enumerate().map(|(number, row)| {
        let [a, b, c, d, vaddr @ ..] = *row;
        let (pid, vaddr) = (i32::from_le_bytes([a, b, c, d]), u64::from_le_bytes(vaddr));
        let touch = Touch::at(pid, vaddr);
        (pid > 0 && touch.vaddr == vaddr)
            .then_some(touch)
            .ok_or(TouchesError::Block(number))
    });
    rows.collect()
}

/// The file of these blocks, at most [`MAX_TOUCHES`] of them, for the image that has this manifest.
pub fn write(touches: &[Touch], manifest: &[u8]) -> Vec<u8> {
    let touches = &touches[..touches.len().min(MAX_TOUCHES)];
    let mut bytes = Vec::with_capacity(HEAD + touches.len() * ROW + DIGEST);
    bytes.extend(MAGIC);
    bytes.extend(Digest::of(manifest).0);
    bytes.extend((touches.len() as u32).to_le_bytes());
    for Touch { pid, vaddr } in touches {
        bytes.extend(pid.to_le_bytes());
        bytes.extend(vaddr.to_le_bytes());
    }
    let digest = Digest::of(&bytes);
    bytes.extend(digest.0);
    bytes
}

#[cfg(test)]
mod tests;
