//! What an imprint is worth: tasks, methods side by side, figures with intervals.
//!
//! A *task* reads rows and makes *cases* of them: documents of context, and questions that go with them. A *method* is a way to
//! bring the context to the model: not at all, in the prompt, as an imprint, or the wrong one on purpose. The same frozen model
//! answers under each, through the forward that serves, and a *report* holds figures with bootstrap intervals. Judges, trains
//! nothing, fetches nothing. Start at [`run::run`] and [`Method`].

mod bm25;
mod cost;
mod error;
mod lora;
mod method;
pub mod metrics;
mod model;
pub mod page;

mod plot;
mod prompt;
mod random;
pub mod report;
pub mod run;
mod seat;
mod tasks;

pub use error::Error;
pub use method::Method;
pub use prompt::Form;
pub use seat::settings;
pub use tasks::Task;
