//! The engine's forwards on a device: `engine::Machine` by `cuda::Model`.
//!
//! What is near the device and what is on the host is decided here: cores in slots with copies in pinned memory behind them, sums of open
//! windows, graphs by bucket. What rows mean is the engine's, arithmetic `cuda`'s. Start at [`Accelerator`].

mod cores;
mod load;
mod machine;
mod read_out;
mod windows;

pub use cuda::Libraries;
pub use machine::{Accelerator, Options};
