//! What a store can do wrong, over a real socket, and what becomes of it: a whole dataset, or none and
//! one sentence.
#![allow(
    clippy::unwrap_used,
    reason = "helpers of tests, which clippy does not know for tests"
)]

mod bytes;
mod kill;
mod liar;
mod listings;
mod node;
mod requests;
