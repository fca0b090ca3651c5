#![no_main]

use libfuzzer_sys::{fuzz_mutator, fuzz_target, fuzzer_mutate};
use tar::Header;

fuzz_target!(|bytes: &[u8]| rekindle_checkpoint_fuzz::archive(bytes));

// Hardly a change would get behind the checksum of its header otherwise.
fuzz_mutator!(|data: &mut [u8], size: usize, max_size: usize, seed: u32| {
    let size = fuzzer_mutate(data, size, max_size);
    if !seed.is_multiple_of(16) {
        correct(&mut data[..size]);
    }
    size
});

/// Makes the checksums of all headers right.
fn correct(mut rest: &mut [u8]) {
    while let Some((header, behind)) = rest.split_first_chunk_mut::<512>() {
        let mut size = 0;
        if header.iter().any(|byte| *byte != 0) {
            // The checksum counts itself as spaces.
            header[148..156].fill(b' ');
            let sum: u32 = header.iter().map(|byte| u32::from(*byte)).sum();
            header[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
            size = Header::from_byte_slice(header).entry_size().unwrap_or(0);
        }
        let data = size.div_ceil(512).saturating_mul(512);
        let data = behind
            .len()
            .min(usize::try_from(data).unwrap_or(usize::MAX));
        rest = &mut behind[data..];
    }
}
