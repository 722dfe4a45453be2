//! The generator: sites, windows, states, read-outs, cores, checkpoints and PEFT export.
//!
//! A *site* is an adapted linear of a decoder layer. While a window of context passes through the frozen
//! model, each site *writes* outer products into the window's sums; closed windows are folded into a
//! *state*; a *read-out* turns the state into a *core*; rows of later batches add the core's *delta*:
//!
//! ```text
//! S = Σ_t k_t v_tᵀ      G = Σ_t k_t k_tᵀ      N = read-out(S, G)      y = W0 x + (alpha / R2) B Nᵀ A1 x
//! ```
//!
//! Letters, here and in every module: T rows of a batch, D hidden size, Din and Dout of the site's linear,
//! R1 and R2 the inner sizes of the generator, q the rank of a core. No model code, no I/O but the reading
//! of a checkpoint. Start at [`Generator`], then [`Site`]; a generator in training is a [`Trainee`].

mod bytes;
mod checkpoint;
mod config;
mod cores;
mod error;
mod export;
mod gate;
mod generator;
mod read_out;
mod site;
mod state;
#[cfg(test)]
mod testing;
mod trace;
mod trainee;
pub mod windows;

pub use config::{Config, ReadOut, Strategy, Write};
pub use cores::{Core, PlainCore};
pub use error::Error;
pub use export::PeftExport;
pub use gate::{Doubt, GATE_FILE, Gate};
pub use generator::{CoreReading, Generator};
pub use site::{BaseShape, Module, Site, SiteId, SiteRows, WriteRows, normed_embeddings};
pub use state::{Elsewhere, PlainSums, State, Window};
pub use trace::Trace;
pub use trainee::{Adapted, Adapter, PARTS, Seen, Trainee, TraineeSite};
