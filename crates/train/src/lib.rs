//! Trains a generator on the forward that serves it.
//!
//! A recipe says what is read, asked and minimised; a run draws batches, lets gradients through the frozen model into
//! the generator's tensors, and leaves checkpoints that the server loads. No engine, no network. Start at [`run()`], then
//! `step`.

mod batch;
mod checkpoint;
mod compute;
mod curves;
mod data;
mod error;
mod estimate;
mod facts;
mod files;
mod gate;
mod held_out;
mod init;
mod optimizer;
mod progress;
mod random;
pub mod recipe;
mod run;
mod step;
mod teacher;

pub use compute::Place;
pub use error::Error;
pub use gate::{GateArgs, measure as measure_gate};
pub use recipe::Recipe;
pub use run::{Args, Ended, run};
