use proptest::{collection::vec, prelude::*};

use super::*;

const MANIFEST: &[u8] = b"{}";

fn touches() -> impl Strategy<Value = Vec<Touch>> {
    let touch = (1..=i32::MAX, 0..1_u64 << 41);
    let touch = touch.prop_map(|(pid, block)| Touch::at(pid, block * CHUNK as u64));
    vec(touch, 0..40)
}

/// A file with another checksum, as one who means harm would make it.
fn sealed(mut bytes: Vec<u8>) -> Vec<u8> {
    let digest = Digest::of(&bytes).0;
    bytes.extend(digest);
    bytes
}

proptest! {
    #[test]
    fn what_was_written_is_read(touches in touches()) {
        prop_assert_eq!(read(&write(&touches, MANIFEST), MANIFEST), Ok(touches));
    }

    #[test]
    fn what_is_read_is_what_would_be_written(mut body in vec(any::<u8>(), 0..200), count in 0..9_u32, known in any::<bool>()) {
        if known {
            let rows = body.len() / ROW;
            body.truncate(rows * ROW);
            // The pid's sign and the address's alignment by chance, and the size sometimes as it should be.
            let count = if count == 8 { count } else { rows as u32 };
            let image = Digest::of(MANIFEST).0;
            body = [&MAGIC[..], &image[..], &count.to_le_bytes()[..], &body[..]].concat();
        }
        let bytes = sealed(body);
        if let Ok(touches) = read(&bytes, MANIFEST) {
            prop_assert_eq!(write(&touches, MANIFEST), bytes);
        }
    }

    #[test]
    fn one_changed_byte_is_found(touches in touches(), place in any::<prop::sample::Index>(), with in 1..=u8::MAX) {
        let mut bytes = write(&touches, MANIFEST);
        let place = place.index(bytes.len());
        bytes[place] ^= with;
        prop_assert!(read(&bytes, MANIFEST).is_err());
    }

    #[test]
    fn a_part_is_refused(touches in touches(), part in any::<prop::sample::Index>()) {
        let bytes = write(&touches, MANIFEST);
        prop_assert!(read(&bytes[..part.index(bytes.len())], MANIFEST).is_err());
    }
}

#[test]
fn each_fault_is_told_by_its_name() {
    let touch = |pid, vaddr| Touch { pid, vaddr };
    let file = |touches: &[Touch]| write(touches, MANIFEST);
    assert_eq!(read(b"", MANIFEST), Err(TouchesError::Foreign));
    assert_eq!(read(b"RKTOUCH2", MANIFEST), Err(TouchesError::Foreign));
    assert_eq!(read(MAGIC, MANIFEST), Err(TouchesError::Size(8)));
    assert_eq!(read(&file(&[]), b"[]"), Err(TouchesError::OtherImage));
    for (pid, vaddr) in [(0, 0), (-1, 0), (1, 4096), (1, u64::MAX)] {
        let found = read(&file(&[touch(1, 0), touch(pid, vaddr)]), MANIFEST);
        assert_eq!(found, Err(TouchesError::Block(1)));
    }
    let mut longer = file(&[touch(1, 0)]);
    longer.truncate(longer.len() - DIGEST);
    longer[MAGIC.len() + DIGEST..][..4].copy_from_slice(&u32::MAX.to_le_bytes());
    let longer = sealed(longer);
    let size = longer.len();
    assert_eq!(read(&longer, MANIFEST), Err(TouchesError::Size(size)));
}

#[test]
fn no_more_are_written_than_are_read() {
    let many: Vec<Touch> = (0..=MAX_TOUCHES as u64)
        .map(|block| Touch::at(1, block * CHUNK as u64))
        .collect();
    let bytes = write(&many, MANIFEST);
    assert_eq!(bytes.len(), MAX_FILE);
    assert_eq!(read(&bytes, MANIFEST).unwrap(), many[..MAX_TOUCHES]);
}
