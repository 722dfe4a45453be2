//! What a run leaves: a state to resume from exactly, and generators to serve.
//!
//! `state.safetensors` has masters and moments in f32, and in its header where the run stands; `best/` and `last/` are
//! checkpoints in the layout that `imprint serve --generator` loads. Every file is whole or the one before. Start at
//! [`save_state`] and [`export`].

use std::{
    collections::{BTreeMap, HashMap},
    fs,
    path::Path,
};

use generator::{Module, PARTS, Trainee};
use safetensors::{
    Dtype, SafeTensors,
    tensor::{TensorView, serialize},
};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::{Error, batch::Kind, files::write_whole, optimizer::Masters, step::Figures};

/// Where a run stands.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(crate) struct Standing {
    /// Digest of the recipe, but for its length.
    pub(crate) recipe: String,
    /// Digest of the base.
    pub(crate) base: String,
    /// Steps taken.
    pub(crate) step: u64,
    /// Tokens read and asked.
    pub(crate) tokens: u64,
    /// Seconds of training behind it.
    pub(crate) seconds: f64,
    /// State of the random numbers that draw batches.
    pub(crate) random: u64,
    /// Lowest held-out figure, and the step that it was taken at.
    pub(crate) best: Option<(f64, u64)>,
    /// Step and second of the last held-out figure.
    pub(crate) validated: (u64, f64),
    /// Running means by [`Kind::ALL`].
    pub(crate) running: [Figures; 4],
}

const STATE: &str = "state.safetensors";

fn name(site: impl std::fmt::Display, part: &str, what: &str) -> String {
    format!("{site}.{part}.{what}")
}

fn bytes(values: &[f32]) -> Vec<u8> {
    values
        .iter()
        .flat_map(|value| value.to_le_bytes())
        .collect()
}

/// Writes the state of a run, or leaves the one before.
pub(crate) fn save_state(
    folder: &Path,
    standing: &Standing,
    masters: &Masters,
) -> Result<(), Error> {
    let path = folder.join(STATE);
    let failed = |what: String| Error::io(&path, std::io::Error::other(what));
    let mut tensors = Vec::new();
    for master in &masters.all {
        for (what, values) in [
            ("unit", &master.unit),
            ("first", &master.first),
            ("second", &master.second),
        ] {
            tensors.push((
                name(master.site, &master.part, what),
                bytes(values),
                values.len(),
            ));
        }
        tensors.push((
            name(master.site, &master.part, "scale"),
            bytes(&[master.scale]),
            1,
        ));
    }
    let views: Vec<_> = tensors
        .iter()
        .map(|(name, bytes, count)| Ok((name, TensorView::new(Dtype::F32, vec![*count], bytes)?)))
        .collect::<Result<_, safetensors::SafeTensorError>>()
        .map_err(|error| failed(error.to_string()))?;
    let standing = serde_json::to_string(standing).map_err(|error| failed(error.to_string()))?;
    let header = HashMap::from([("standing".to_owned(), standing)]);
    let file = serialize(views, Some(header)).map_err(|error| failed(error.to_string()))?;
    write_whole(&path, &file).map_err(|source| Error::io(&path, source))
}

/// Brings masters to the state in the folder; `None` if there is none.
pub(crate) fn load_state(folder: &Path, masters: &mut Masters) -> Result<Option<Standing>, Error> {
    let path = folder.join(STATE);
    let file = match fs::read(&path) {
        Ok(file) => file,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(source) => return Err(Error::io(&path, source)),
    };
    let damaged = |detail: String| Error::Damaged {
        path: path.clone(),
        detail,
    };
    let (_, header) =
        SafeTensors::read_metadata(&file).map_err(|error| damaged(error.to_string()))?;
    let standing = header
        .metadata()
        .as_ref()
        .and_then(|keys| keys.get("standing"));
    let standing =
        standing.ok_or_else(|| damaged("it does not say where the run stands".to_owned()))?;
    let standing = serde_json::from_str(standing).map_err(|error| damaged(error.to_string()))?;
    let tensors = SafeTensors::deserialize(&file).map_err(|error| damaged(error.to_string()))?;
    for master in &mut masters.all {
        let read = |what: &str, count: usize| -> Result<Vec<f32>, Error> {
            let name = name(master.site, &master.part, what);
            let view = tensors
                .tensor(&name)
                .map_err(|error| damaged(error.to_string()))?;
            if view.dtype() != Dtype::F32 || view.shape() != [count] {
                return Err(damaged(format!("{name} is {:?}", view.shape())));
            }
            let values = view.data().as_chunks::<4>().0.iter();
            Ok(values.map(|value| f32::from_le_bytes(*value)).collect())
        };
        let count = master.unit.len();
        let scale = read("scale", 1)?.first().copied().unwrap_or(1.0);
        let (unit, first, second) = (
            read("unit", count)?,
            read("first", count)?,
            read("second", count)?,
        );
        (master.scale, master.unit, master.first, master.second) = (scale, unit, first, second);
    }
    masters.publish()?;
    Ok(Some(standing))
}

fn key(layer: usize, module: Module, tensor: &str) -> String {
    let (block, module) = (module.block(), module.name());
    format!("base_model.model.model.layers.{layer}.base_layer.{block}.{module}.fastlora_{tensor}")
}

/// Writes a generator that can be served, in bf16 (lambda in f32): `config` is its adapter_config.json.
pub(crate) fn export(
    folder: &Path,
    trainee: &Trainee,
    config: &Map<String, Value>,
) -> Result<(), Error> {
    let path = folder.join("adapter_model.safetensors");
    let failed = |what: String| Error::io(&path, std::io::Error::other(what));
    let mut tensors: BTreeMap<String, (Dtype, Vec<usize>, Vec<u8>)> = BTreeMap::new();
    for site in trainee.sites() {
        let amplitude = site.log_amplitude.exp()?; // [1]
        for part in PARTS {
            let Some(tensor) = site.part(part) else {
                continue;
            };
            let tensor = match part {
                "log_amplitude" => continue, // in B
                "log_ridge" => {
                    let ridge = bytes(&tensor.exp()?.to_vec1::<f32>()?);
                    tensors.insert(
                        key(site.id.layer, site.id.module, "ridge"),
                        (Dtype::F32, vec![1], ridge),
                    );
                    continue;
                }
                "B" => tensor.broadcast_mul(&amplitude.reshape((1, 1))?)?,
                _ => tensor.clone(),
            };
            let shape = tensor.dims().to_vec();
            let values: Vec<f32> = tensor.flatten_all()?.to_vec1()?;
            let values = values
                .iter()
                .flat_map(|value| bf16(*value).to_le_bytes())
                .collect();
            let key = key(site.id.layer, site.id.module, &format!("{part}.weight"));
            tensors.insert(key, (Dtype::BF16, shape, values));
        }
    }
    let views: Vec<_> = tensors
        .iter()
        .map(|(name, (dtype, shape, bytes))| {
            Ok((name, TensorView::new(*dtype, shape.clone(), bytes)?))
        })
        .collect::<Result<_, safetensors::SafeTensorError>>()
        .map_err(|error| failed(error.to_string()))?;
    let file = serialize(views, None).map_err(|error| failed(error.to_string()))?;
    let mut text =
        serde_json::to_string_pretty(config).map_err(|error| failed(error.to_string()))?;
    text.push('\n');
    let written = write_whole(&path, &file);
    written
        .and_then(|()| write_whole(&folder.join("adapter_config.json"), text.as_bytes()))
        .map_err(|source| Error::io(&path, source))
}

/// The nearest bfloat16, ties to even.
fn bf16(value: f32) -> u16 {
    let bits = value.to_bits();
    if value.is_nan() {
        return 0x7fc0;
    }
    let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1));
    (rounded >> 16) as u16
}

/// Running means as they are told: nats per token of each kind that has any.
pub(crate) fn told(figures: &[Figures; 4]) -> Value {
    let kinds = Kind::ALL
        .iter()
        .zip(figures)
        .filter(|(_, figures)| figures.tokens > 0);
    let told = kinds.map(|(kind, figures)| {
        let mean = |sum: f64| sum / figures.tokens as f64;
        let figures = json!({
            "tokens": figures.tokens, "ce": mean(figures.ce), "kl": mean(figures.kl),
            "accuracy": mean(figures.right as f64),
        });
        (kind.name().to_owned(), figures)
    });
    Value::Object(told.collect())
}

#[cfg(test)]
mod tests;
