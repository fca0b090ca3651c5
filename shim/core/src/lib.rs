//! What two of rekindle's programs must agree on: [names](name), [paths], what a pod says
//! ([annotations]), what a node says ([config]), who a container is ([identity]), and the
//! [plan](plan::Plan) that comes out of these.
//!
//! No I/O, no runtime, no `unsafe`: everything here is a pure function of its arguments, so that the
//! shim, the CLI and the tests cannot disagree.
#![forbid(unsafe_code)]
#![warn(missing_docs)]

pub mod annotations;
pub mod config;
pub mod duration;
pub mod identity;
pub mod name;
pub mod paths;
pub mod plan;
pub mod size;
pub mod step;
pub mod uri;
