//! How a model is loaded. Start at [`LoadOptions`].

use std::{fmt, str::FromStr};

use serde::Deserialize;

/// How weights are held, and what they are multiplied with.
#[derive(Clone, Copy, Debug, Default)]
pub struct LoadOptions {
    /// Expand all weights to f32. Activations are f32 then, too.
    pub dequantize: bool,
    /// What quantised weights are multiplied with.
    pub activations: Activations,
}

/// What the activations of a linear map with quantised weights are rounded to. A generator's site does as its linear does, with maps
/// and cores in 8 bits. The base's maps with floating weights, attention and all else are computed in f32 either way, and a row's result
/// is the same bits in any batch either way.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Activations {
    /// Nothing: results are those of the dequantised model up to f32 rounding.
    #[default]
    F32,
    /// 8 bits for each, with a scale for each 32 neighbours: several times as fast.
    Int8,
}

impl fmt::Display for Activations {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::F32 => "f32",
            Self::Int8 => "int8",
        })
    }
}

impl FromStr for Activations {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        match name {
            "f32" => Ok(Self::F32),
            "int8" => Ok(Self::Int8),
            _ => Err(format!("`{name}` is neither `f32` nor `int8`")),
        }
    }
}
