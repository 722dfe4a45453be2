//! Evaluations of tiny random models, end to end: rows in, reports out.

#![expect(clippy::unwrap_used, reason = "helpers of tests")]

mod device;
mod methods;
mod rows;
mod support;
mod tasks;
