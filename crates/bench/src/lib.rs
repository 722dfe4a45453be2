//! Measurements of the engine beside its peers.
//!
//! Times the engine from outside, through its commands and events; judges no answer. What is printed was measured at
//! that moment, on that machine. Start at [`offline::run`].

mod driver;
mod machine;
pub mod offline;
mod peer;
mod report;
