//! The gRPC edge of imprint: sessions and requests of many clients, driven into one engine.
//!
//! It checks, tokenises, commits to the log, feeds the engine and turns events into answers. It holds no model code: below the
//! engine it knows `lm::text` alone. A chunk's way in is `grpc::context`, `sessions`, then the store and the engine; an answer's
//! way out `grpc::generation`. Start at [`Server::start`].

pub mod auth;
pub mod config;
pub mod edge;
pub mod engine_thread;
pub mod grpc;
pub mod machine;
pub mod metrics;
pub mod models;
pub mod places;
mod serve;
pub mod sessions;
pub mod snapshots;
pub mod states;
pub mod status;
#[cfg(test)]
mod testing;

pub use config::Config;
pub use serve::{Error, Running, Server};
