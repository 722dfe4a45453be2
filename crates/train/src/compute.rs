//! Where a run computes, and what its activations are.
//!
//! On the processor in f32 by the kernels that serve; else by candle's own operations, the same functions with the same gradients
//! up to rounding. Start at [`Place`].

use std::str::FromStr;

use candle_core::{DType, Device};

use crate::{Error, recipe::Compute};

/// Where a run computes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Place {
    /// The processor.
    #[default]
    Cpu,
    /// An NVIDIA GPU, from 0.
    Cuda(usize),
}

impl FromStr for Place {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let ordinal = match text.split_once(':') {
            None if text == "cpu" => return Ok(Self::Cpu),
            None if text == "cuda" => return Ok(Self::Cuda(0)),
            Some(("cuda", ordinal)) => ordinal.parse().ok(),
            Some(_) | None => None,
        };
        let ordinal = ordinal.filter(|ordinal| *ordinal < 1024);
        ordinal
            .map(Self::Cuda)
            .ok_or_else(|| "it is not cpu, cuda or cuda:1".to_owned())
    }
}

impl Place {
    /// Opens the device.
    ///
    /// # Errors
    /// [`Error::Device`] for one that is not there, or in a program that was built without it.
    pub(crate) fn open(self) -> Result<Device, Error> {
        match self {
            Self::Cpu => Ok(Device::Cpu),
            Self::Cuda(ordinal) => Device::new_cuda(ordinal).map_err(|error| Error::Device {
                place: format!("cuda:{ordinal}"),
                detail: if cfg!(feature = "cuda") {
                    error.to_string()
                } else {
                    "this program was built without the feature `cuda-train`".to_owned()
                },
            }),
        }
    }

    /// Whether candle's own operations compute there.
    pub(crate) fn is_plain(self, compute: Compute) -> bool {
        self != Self::Cpu || compute != Compute::F32
    }
}

impl Compute {
    pub(crate) fn dtype(self) -> DType {
        match self {
            Self::F32 => DType::F32,
            Self::Bf16 => DType::BF16,
        }
    }

    pub(crate) fn is_f32(&self) -> bool {
        *self == Self::F32
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_have_names_and_a_device_that_is_not_there_is_refused_by_its_own() {
        for (text, place) in [
            ("cpu", Place::Cpu),
            ("cuda", Place::Cuda(0)),
            ("cuda:3", Place::Cuda(3)),
        ] {
            assert_eq!(text.parse(), Ok(place));
        }
        for wrong in ["", "gpu", "cuda:", "cuda:x", "cpu:0", "cuda:5000"] {
            assert!(wrong.parse::<Place>().is_err(), "{wrong}");
        }
        let error = Place::Cuda(900).open().unwrap_err().to_string();
        assert!(error.starts_with("cuda:900"), "{error}");
    }
}
