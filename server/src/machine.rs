//! Forwards on a GPU, in a program that was built with the feature `cuda`.
//!
//! Names the device that the configuration names, nothing else. Start at [`on_device`].

use std::path::Path;

use engine::{Error, Machine};

use crate::config::Cuda;

/// A model with its generator on a GPU, loaded for steps of `settings`.
///
/// # Errors
/// What the device says of files, libraries and memory; a program that was built without the feature `cuda`.
#[cfg(feature = "cuda")]
pub fn on_device(
    model: &Path,
    generator: Option<&Path>,
    settings: &engine::Config,
    cuda: &Cuda,
) -> Result<Box<dyn Machine>, Error> {
    let options = device::Options {
        libraries: device::Libraries {
            driver: cuda.driver.clone(),
            cublas: cuda.cublas.clone(),
        },
        ordinal: cuda.ordinal,
        slots: cuda.slots,
        pinned: cuda.pinned,
        quantised: cuda.quantised,
        windows: cuda.windows,
    };
    let machine = device::Accelerator::load(model, generator, settings, &options)?;
    Ok(Box::new(machine))
}

/// A model on a GPU, which this program cannot have.
///
/// # Errors
/// Always: it was built without the feature `cuda`.
#[cfg(not(feature = "cuda"))]
pub fn on_device(
    _: &Path,
    _: Option<&Path>,
    _: &engine::Config,
    _: &Cuda,
) -> Result<Box<dyn Machine>, Error> {
    Err(Error::Machine {
        detail: "this program was built without the feature `cuda`".to_owned(),
    })
}
