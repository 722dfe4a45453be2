//! Measurements of the engine beside its peers.
//!
//! Times the engine from outside, through its commands and events ([`offline::run`], [`sessions::run`]), and servers
//! through their clients ([`serve::run`], [`start::run`]). What is printed was measured at that moment, on that machine.

mod child;
mod driver;
mod machine;
pub mod offline;
pub mod page;
mod peer;
mod report;
pub mod serve;
pub mod sessions;
pub mod start;
