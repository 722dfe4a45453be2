//! The engine itself: its public face, to be filled in.
//!
//! Start at [`Engine`].
#![expect(clippy::unimplemented, unused_variables, reason = "the face that others build on comes first")]

use std::{path::Path, sync::Arc, time::Instant};

use crate::{command::Command, config::Config, error::Error, event::Event, model::ModelInfo};

/// The queue that the command belongs to is full: the command comes back.
#[derive(Debug)]
pub struct Full(pub Command);

/// One frozen model with its sessions and requests. One thread owns it.
pub struct Engine {
    model: Arc<ModelInfo>,
}

impl Engine {
    /// Loads a model and, for sessions, a generator made for it.
    ///
    /// # Errors
    /// A bound that cannot work, or a file that is missing, damaged or made for another base.
    pub fn load(model: &Path, generator: Option<&Path>, config: Config) -> Result<Self, Error> {
        config.check()?;
        let lm = lm::Lm::load(model, lm::LoadOptions { dequantize: config.dequantize })?;
        Ok(Self { model: Arc::new(ModelInfo::new(&lm, 0)) })
    }

    /// What is served.
    pub fn model(&self) -> &Arc<ModelInfo> {
        &self.model
    }

    /// Queues a command for the next step.
    ///
    /// # Errors
    /// The command comes back if its queue is full; it fits later, after steps.
    pub fn push(&mut self, command: Command) -> Result<(), Box<Full>> {
        unimplemented!()
    }

    /// Whether a step would do nothing.
    pub fn idle(&self) -> bool {
        unimplemented!()
    }

    /// Takes the queued commands and runs one forward over a ragged batch. `now` is the caller's clock, read when the
    /// step begins and when its forward is done.
    ///
    /// # Errors
    /// A broken engine. A bad command is an event.
    pub fn step(&mut self, now: impl Fn() -> Instant, events: &mut Vec<Event>) -> Result<(), Error> {
        unimplemented!()
    }
}
