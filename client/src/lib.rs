//! The Rust client of imprint: sessions, context and answers over gRPC, and the command-line verbs.
//!
//! A [`Client`] speaks `imprint.v1` to one server. Requests and answers are the messages of the
//! contract ([`v1`]), whose comments are the reference; the two streams have a type of their own:
//! [`Ingest`] numbers, bounds and counts what goes into a session, [`Generation`] reads an answer as
//! it comes. [`cli`] and [`demo`] are what the program `imprint` offers on top. Nothing here knows a
//! model, a tensor or the server's crates. Start at [`Client`].
//!
//! ```no_run
//! use imprint_client::{Client, IngestOptions, Options, prompt, v1};
//!
//! # async fn example() -> Result<(), imprint_client::Error> {
//! let client = Client::connect("http://127.0.0.1:7461", Options::default()).await?;
//! let session = client.create_session(v1::CreateSessionRequest::default()).await?;
//!
//! let mut ingest = client.ingest(&session.session_id, IngestOptions::default()).await?;
//! ingest.text("The harbour bell was cast in 1683.").await?;
//! ingest.end_document().await?;
//! let applied = ingest.finish().await?;
//!
//! let mut answer = client
//!     .generate(v1::GenerateRequest {
//!         adapter: Some(prompt::adapter(&session.session_id)),
//!         prompt: Some(prompt::question("When was the harbour bell cast?")),
//!         stop: vec!["\n".to_owned()],
//!         ..v1::GenerateRequest::default()
//!     })
//!     .await?;
//! while let Some(delta) = answer.next().await? {
//!     eprint!("{}", delta.text);
//! }
//! # let _ = applied;
//! # Ok(())
//! # }
//! ```

mod client;
mod error;
mod export;
mod generation;
mod ingest;
pub mod prompt;

pub mod cli;
pub mod demo;

#[cfg(test)]
mod fake;

pub use client::{Client, Key, Options, SessionUpdate};
pub use error::{Error, Refusal, Violation};
pub use export::{Export, ExportedFile};
pub use generation::Generation;
pub use imprint_proto::v1;
pub use ingest::{Applied, Ingest, IngestOptions};
