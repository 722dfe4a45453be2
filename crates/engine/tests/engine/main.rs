//! The engine's laws, with tiny models of both forms, in plain loops: commands in, steps, events out.
//!
//! Numbers are compared by their bits: an adapter by the bytes of its export, a model's answer by its log-probabilities.
//! Start at `context`.

mod bounds;
mod context;
mod faults;
mod golden;
mod mixed;
mod portions;
mod preemption;
mod prefix;
mod requests;
mod returning;
mod support;
mod tiers;
