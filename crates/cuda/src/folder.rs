//! Shapes out of checkpoints' own config files.
//!
//! For programs that have no `lm` beside them: the check that travels to a GPU. What this room has no form for is refused by name; unknown
//! keys pass. Start at [`Shape::from_folder`].

use std::path::Path;

use serde_json::Value;

use crate::{Error, Form, GeneratorShape, Place, Shape, ops::Heads};

/// Keys of one file.
struct Keys<'a> {
    path: &'a Path,
    keys: Value,
}

/// Longest tables of rotary angles that are made: 2^17 positions.
const MAX_POSITIONS: usize = 1 << 17;

impl<'a> Keys<'a> {
    fn read(path: &'a Path) -> Result<Self, Error> {
        let failed = |error: &dyn std::fmt::Display| Error::File {
            path: path.to_owned(),
            detail: error.to_string(),
        };
        let text = std::fs::read(path).map_err(|error| failed(&error))?;
        Ok(Self {
            path,
            keys: serde_json::from_slice(&text).map_err(|error| failed(&error))?,
        })
    }

    fn refused(&self, key: &str) -> Error {
        Error::File {
            path: self.path.to_owned(),
            detail: format!("{key} is {}", self.keys[key]),
        }
    }

    fn optional(&self, key: &str) -> Result<Option<usize>, Error> {
        if self.keys[key].is_null() {
            return Ok(None);
        }
        let number = self.keys[key]
            .as_u64()
            .and_then(|n| usize::try_from(n).ok())
            .filter(|n| *n < 1 << 30);
        number.map(Some).ok_or_else(|| self.refused(key))
    }

    fn size(&self, key: &str) -> Result<usize, Error> {
        self.optional(key)?
            .filter(|n| *n > 0)
            .ok_or_else(|| self.refused(key))
    }

    /// Frequencies as `rope_scaling` changes them: in Llama 3's form those of long wavelengths are slowed down, short ones kept.
    fn scaled(&self, frequencies: Vec<f64>) -> Result<Vec<f64>, Error> {
        let scaling = &self.keys["rope_scaling"];
        if scaling.is_null() {
            return Ok(frequencies);
        }
        let number = |key: &str| scaling[key].as_f64().filter(|x| x.is_finite() && *x > 0.0);
        let kind = scaling["rope_type"].as_str().or(scaling["type"].as_str());
        let [Some(factor), Some(low), Some(high), Some(context)] = [
            "factor",
            "low_freq_factor",
            "high_freq_factor",
            "original_max_position_embeddings",
        ]
        .map(number) else {
            return Err(self.refused("rope_scaling"));
        };
        if kind != Some("llama3") || low >= high {
            return Err(self.refused("rope_scaling"));
        }
        let scaled = |frequency: f64| {
            let turns = context * frequency / std::f64::consts::TAU;
            let kept = ((turns - low) / (high - low)).clamp(0.0, 1.0);
            frequency * (kept + (1.0 - kept) / factor)
        };
        Ok(frequencies.into_iter().map(scaled).collect())
    }

    fn number(&self, key: &str) -> Result<f64, Error> {
        self.keys[key]
            .as_f64()
            .filter(|x| x.is_finite())
            .ok_or_else(|| self.refused(key))
    }
}

impl Shape {
    /// Of a decoder in the HF layout; of scaled rotary frequencies Llama 3's.
    ///
    /// # Errors
    /// [`Error::File`] naming the key that has no form here.
    pub fn from_folder(folder: &Path) -> Result<Self, Error> {
        let path = folder.join("config.json");
        let keys = Keys::read(&path)?;
        let kind = keys.keys["model_type"].as_str().unwrap_or_default();
        if !["llama", "mistral", "qwen2", "qwen3"].contains(&kind) {
            return Err(keys.refused("model_type"));
        }
        let (hidden, queries) = (keys.size("hidden_size")?, keys.size("num_attention_heads")?);
        let dim = keys.optional("head_dim")?.unwrap_or(hidden / queries);
        let theta = if keys.keys["rope_theta"].is_null() {
            1e4
        } else {
            keys.number("rope_theta")?
        };
        let window = if kind == "mistral" {
            keys.optional("sliding_window")?
        } else {
            None
        };
        let shape = Self {
            layers: keys.size("num_hidden_layers")?,
            hidden,
            intermediate: keys.size("intermediate_size")?,
            heads: Heads {
                queries,
                keys: keys.optional("num_key_value_heads")?.unwrap_or(queries),
                dim,
            },
            vocab: keys.size("vocab_size")?,
            eps: keys.number("rms_norm_eps")? as f32,
            frequencies: keys.scaled(
                (0..dim / 2)
                    .map(|i| theta.powf(-((2 * i) as f64) / dim as f64))
                    .collect(),
            )?,
            positions: keys.size("max_position_embeddings")?.min(MAX_POSITIONS),
            window: window.unwrap_or(0),
            tied: keys.keys["tie_word_embeddings"].as_bool().unwrap_or(false),
            attention_bias: kind == "qwen2"
                || keys.keys["attention_bias"].as_bool().unwrap_or(false),
            qk_norm: kind == "qwen3",
        };
        shape.check()?;
        Ok(shape)
    }
}

impl GeneratorShape {
    /// Of a FASTLORA checkpoint. Whether its sizes and layers fit is told when a model is loaded with it.
    ///
    /// # Errors
    /// [`Error::File`] naming the key that has no form here.
    pub fn from_folder(folder: &Path) -> Result<Self, Error> {
        let path = folder.join("adapter_config.json");
        let keys = Keys::read(&path)?;
        let r2 = keys.size("fastlora_r")?;
        let r1 = keys.optional("fastlora_inter_size")?.unwrap_or(r2);
        let rank = keys.size("fastlora_max_rank")?;
        let named = [&keys.keys["target_modules"], &keys.keys["fastlora_param"]]
            .into_iter()
            .find(|value| !value.is_null());
        let names: Vec<&str> = match named {
            Some(Value::Array(names)) => names.iter().filter_map(Value::as_str).collect(),
            _ => Vec::new(),
        };
        let places: Vec<_> = [Place::Output, Place::Down]
            .into_iter()
            .filter(|place| {
                let short = place.name().rsplit('.').next().unwrap_or_default();
                names.iter().any(|name| name.ends_with(short))
            })
            .collect();
        if places.is_empty() || places.len() != names.len() {
            return Err(keys.refused("target_modules"));
        }
        let layers = match &keys.keys["fastlora_layers"] {
            Value::Null => None,
            Value::Array(layers) => {
                let number = |layer: &Value| layer.as_u64().and_then(|n| usize::try_from(n).ok());
                let named: Option<Vec<usize>> = layers.iter().map(number).collect();
                Some(named.ok_or_else(|| keys.refused("fastlora_layers"))?)
            }
            _ => return Err(keys.refused("fastlora_layers")),
        };
        let form = match keys.keys["fastlora_key"].as_str() {
            None => Form::Published,
            Some("site_input_tied_A1") => Form::Associative,
            Some(_) => return Err(keys.refused("fastlora_key")),
        };
        // A ridge's N is truncated only where that makes the core smaller.
        let rank = if form == Form::Associative && rank * (r1 + r2) >= r1 * r2 {
            0
        } else {
            rank
        };
        let shape = Self {
            form,
            places,
            layers,
            r1,
            r2,
            rank,
            scale: (keys.number("fastlora_alpha")? / r2 as f64) as f32,
            gate: None,
        };
        Ok(shape)
    }
}
