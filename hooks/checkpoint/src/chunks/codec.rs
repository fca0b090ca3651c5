//! Compression of single chunks, where it pays.

use rekindle_core::config::Compression;

use super::CHUNK;

/// What one chunk is stored as.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Encoding {
    Plain = 0,
    Lz4 = 1,
}

impl Encoding {
    pub(super) fn from_byte(byte: u8) -> Option<Self> {
        match byte {
            0 => Some(Self::Plain),
            1 => Some(Self::Lz4),
            _ => None,
        }
    }
}

/// The bytes to store. Saving less than an eighth is not worth the decompression.
pub(super) fn encode<'a>(
    compression: Compression,
    raw: &'a [u8],
    room: &'a mut Vec<u8>,
) -> (Encoding, &'a [u8]) {
    if compression == Compression::Lz4 {
        room.resize(lz4_flex::block::get_maximum_output_size(CHUNK), 0);
        if let Ok(length) = lz4_flex::block::compress_into(raw, room)
            && length <= raw.len() - raw.len() / 8
        {
            return (Encoding::Lz4, &room[..length]);
        }
    }
    (Encoding::Plain, raw)
}

/// Fills `into` with what was stored; false when it does not give exactly that many bytes.
pub(super) fn decode(encoding: Encoding, stored: &[u8], into: &mut [u8]) -> bool {
    match encoding {
        Encoding::Plain if stored.len() == into.len() => {
            into.copy_from_slice(stored);
            true
        }
        Encoding::Plain => false,
        Encoding::Lz4 => {
            lz4_flex::block::decompress_into(stored, into).is_ok_and(|bytes| bytes == into.len())
        }
    }
}
