//! The engine: what runs next. Sessions, documents, versions, requests, and the ragged batch of each step.
//!
//! Commands go in (`Engine::push`), events come out (`Engine::step`), and `step` is the only mutation: one
//! thread owns the engine, so there are no locks. It knows no text, no clock (time is an argument), no
//! runtime, and no file but those that it loads. Where the forwards run is a [`Machine`]'s matter. Start at [`Command`], then [`Engine::step`].

mod blocks;
mod budget;
mod command;
mod config;
mod cores;
mod digest;
mod document;
mod engine;
mod error;
mod event;
mod ids;
mod load;
mod machine;
mod model;
mod pace;
mod prefix;
mod reading;
mod request;
mod sampling;
mod scheduler;
mod session;
mod snapshot;
mod tiers;
mod traces;

pub use command::{Chosen, Command, Part, Sampling};
pub use config::Config;
pub use cores::Slot;
pub use engine::{Engine, Full, Usage};
pub use error::{ConfigError, Error, RequestError, SessionError};
pub use event::{Event, Finish, Newest, Rejected, Timings};
pub use generator::{Module, ReadOut, Strategy, Write};
pub use ids::{Digest, DocumentId, RequestId, Seq, SessionId, TenantId, TokenId, Version};
pub use lm::{Activations, Architecture};
pub use machine::{Base, Draw, Host, Machine, Output};
pub use model::{GeneratorInfo, ModelInfo, SiteInfo};
pub use snapshot::{Need, Snapshot, SnapshotError};
pub use tiers::Tiers;
