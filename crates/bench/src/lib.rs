//! Measurements of the engine beside its peers.
//!
//! Times the engine from outside, through its commands and events ([`offline::run`], [`sessions::run`],
//! [`append::run`], [`beside::run`]), and servers
//! through their clients ([`serve::run`], [`start::run`]). What is printed was measured at that moment, on that machine.

pub mod append;
pub mod beside;
mod child;
mod disk;
mod driver;
mod machine;
pub mod offline;
mod output;
pub mod page;
mod peer;
mod report;
pub mod serve;
pub mod sessions;
pub mod start;
