#![no_main]

use libfuzzer_sys::{fuzz_mutator, fuzz_target, fuzzer_mutate};
use rekindle_checkpoint_fuzz::{archive, correct};

fuzz_target!(|bytes: &[u8]| archive(bytes));

fuzz_mutator!(|data: &mut [u8], size: usize, max_size: usize, seed: u32| {
    let size = fuzzer_mutate(data, size, max_size);
    if !seed.is_multiple_of(16) {
        correct(&mut data[..size]);
    }
    size
});
