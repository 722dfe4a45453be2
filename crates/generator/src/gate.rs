//! Gates: how far a core concerns a token, as the token's own keys say.
//!
//! A ridge core knows how much it knows. s = kᵀ (G + lambda I)⁻¹ G k / |k|² is the leverage of a key k: 1 where what was
//! written spans it, 0 where nothing was like it (1 - s is the variance that a Gaussian process of the same kernel has left
//! there, of 1 without data; Rasmussen and Williams 2006, eq. 2.26). A key of any text at all has some: on average
//! e = tr((G + lambda I)⁻¹ G C), C = E[k kᵀ / |k|²] over text at large, which grows with what was told. So a token's *doubt* is
//!
//! ```text
//! r = (1 - s) / (1 - e)        about 1 on text that the core knows nothing of, less where it does, for any length
//! ```
//!
//! and its delta is taken times sigmoid((threshold - r̄) / width), r̄ the mean over the sites that the token has passed: the
//! token's own matter alone, so that a row's bits do not depend on the rows beside it.
//!
//! C, threshold and width are measured on text once a generator is trained and lie in a file of their own. Start at [`Gate`].

use std::{collections::HashMap, fs::File, io::Read, path::Path, sync::Arc};

use candle_core::{Device, Tensor};
use half::bf16;
use safetensors::{Dtype, SafeTensors, tensor::TensorView};

use crate::{
    checkpoint,
    config::{Config, ReadOut, Write},
    error::Error,
    site::Site,
};

/// The file of a generator's folder that holds its gate.
pub const GATE_FILE: &str = "gate.safetensors";
/// Longest header of it, in bytes: a tensor is described in about 150.
const MAX_HEADER: u64 = 16 << 20;
/// 1 - e at least: a context that spans all keys leaves no doubt to measure with.
const LEAST: f64 = 1e-6;

/// What gates are made with: where they close, and what keys of any text look like.
#[derive(Clone, Debug)]
pub struct Gate {
    threshold: f32,
    width: f32,
    keys: Vec<Tensor>,
    digest: [u8; 32],
}

impl Gate {
    /// Gates that leave half of a delta at a doubt of `threshold` and close over `width`, both above 0 and below 1. keys: C [R1, R1] of
    /// each site, in order, the second moment of unit keys k / |k| over text at large.
    ///
    /// # Errors
    /// [`Error::Foreign`] for numbers out of range, [`Error::Tensor`] for tensors that are not f32.
    pub fn new(threshold: f32, width: f32, keys: Vec<Tensor>) -> Result<Self, Error> {
        let mut digest = blake3::Hasher::new();
        for number in [threshold, width] {
            if !(number > 0.0 && number < 1.0) {
                return Err(Error::Foreign {
                    detail: format!("a gate's number {number} is not between 0 and 1"),
                });
            }
            digest.update(&number.to_le_bytes());
        }
        for keys in &keys {
            for value in keys.flatten_all()?.to_vec1::<f32>()? {
                digest.update(&value.to_le_bytes());
            }
        }
        Ok(Self {
            threshold,
            width,
            keys,
            digest: *digest.finalize().as_bytes(),
        })
    }

    /// Threshold and width.
    pub fn numbers(&self) -> (f32, f32) {
        (self.threshold, self.width)
    }

    /// blake3 over its numbers.
    pub fn digest(&self) -> [u8; 32] {
        self.digest
    }

    /// C [R1, R1] of a site.
    pub(crate) fn keys(&self, site: usize) -> Option<&Tensor> {
        self.keys.get(site)
    }

    /// The bytes of a file for the generator of this digest: C in bf16.
    ///
    /// # Errors
    /// [`Error::Foreign`] if there is not one C for each site, [`Error::Tensor`] if one cannot be read.
    pub(crate) fn to_bytes(&self, sites: &[Site], generator: &str) -> Result<Vec<u8>, Error> {
        if self.keys.len() != sites.len() {
            return Err(Error::Foreign {
                detail: format!("{} sites, not {}", self.keys.len(), sites.len()),
            });
        }
        let mut tensors = Vec::with_capacity(sites.len());
        for (site, keys) in sites.iter().zip(&self.keys) {
            let values = keys.flatten_all()?.to_vec1::<f32>()?;
            let bytes: Vec<u8> = values
                .into_iter()
                .flat_map(|value| bf16::from_f32(value).to_le_bytes())
                .collect();
            tensors.push((key(site), keys.dims().to_vec(), bytes));
        }
        let views = tensors
            .iter()
            .map(|(key, shape, bytes)| {
                let view = TensorView::new(Dtype::BF16, shape.clone(), bytes);
                view.map(|view| (key.clone(), view))
            })
            .collect::<Result<Vec<_>, _>>();
        let about = HashMap::from([
            ("generator".to_owned(), generator.to_owned()),
            ("threshold".to_owned(), self.threshold.to_string()),
            ("width".to_owned(), self.width.to_string()),
        ]);
        views
            .and_then(|views| safetensors::serialize(views, Some(about)))
            .map_err(|fault| Error::Foreign {
                detail: format!("gates that cannot be written: {fault}"),
            })
    }

    /// Reads the gate of a folder, if there is one.
    pub(crate) fn load(
        dir: &Path,
        config: &Config,
        sites: &[Site],
        generator: &str,
    ) -> Result<Option<Self>, Error> {
        let path = dir.join(GATE_FILE);
        let file = match File::open(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(source) => return Err(checkpoint::io(&path, source)),
        };
        let malformed = |detail: String| Error::Malformed {
            path: path.clone(),
            detail,
        };
        if (config.write, config.read_out) != (Write::Associative, ReadOut::Ridge) {
            return Err(malformed(
                "only an associative generator with a ridge read-out has gates".to_owned(),
            ));
        }
        let longest = (sites.len() * config.r1 * config.r1 * size_of::<f32>()) as u64 + MAX_HEADER;
        let mut bytes = Vec::new();
        file.take(longest + 1)
            .read_to_end(&mut bytes)
            .map_err(|source| checkpoint::io(&path, source))?;
        if bytes.len() as u64 > longest {
            return Err(malformed(format!("it is longer than {longest} bytes")));
        }
        let (_, header) = SafeTensors::read_metadata(&bytes)
            .map_err(|fault| malformed(format!("its header cannot be read: {fault}")))?;
        let about = header.metadata().clone().unwrap_or_default();
        let number = |name: &str| {
            let value = about.get(name).and_then(|text| text.parse::<f32>().ok());
            value
                .filter(|value| *value > 0.0 && *value < 1.0)
                .ok_or_else(|| malformed(format!("its {name} is no number between 0 and 1")))
        };
        let (threshold, width) = (number("threshold")?, number("width")?);
        if about.get("generator").map(String::as_str) != Some(generator) {
            return Err(malformed(format!(
                "it is not of this generator, whose digest is {generator}"
            )));
        }
        let tensors = SafeTensors::deserialize(&bytes)
            .map_err(|fault| malformed(format!("its tensors cannot be read: {fault}")))?;
        let wanted: Vec<String> = sites.iter().map(key).collect();
        let mut foreign: Vec<String> = tensors.names().into_iter().map(str::to_owned).collect();
        foreign.retain(|name| !wanted.contains(name));
        foreign.sort_unstable();
        let lacks = |name: &&String| tensors.tensor(name).is_err();
        let missing: Vec<String> = wanted.iter().filter(lacks).cloned().collect();
        if !missing.is_empty() || !foreign.is_empty() {
            return Err(Error::Tensors { missing, foreign });
        }
        let keys = wanted.iter().map(|name| {
            let view = tensors
                .tensor(name)
                .map_err(|fault| malformed(format!("`{name}`: {fault}")))?;
            let want = vec![config.r1, config.r1];
            if view.shape() != want {
                return Err(Error::Shape {
                    key: name.clone(),
                    want,
                    found: view.shape().to_vec(),
                });
            }
            let values = checkpoint::vector(name, view.dtype(), view.data())?;
            Ok(Tensor::from_vec(
                values,
                (config.r1, config.r1),
                &Device::Cpu,
            )?) // [R1, R1]
        });
        let keys = keys.collect::<Result<_, Error>>()?;
        Self::new(threshold, width, keys).map(Some)
    }
}

fn key(site: &Site) -> String {
    format!("{}.fastlora_keys", site.id)
}

/// One site's gate, as a read-out makes it.
#[derive(Debug)]
pub(crate) struct SiteGate {
    /// (G + lambda I)⁻¹ G [R1, R1].
    pub(crate) known: Tensor,
    /// 1 - e.
    pub(crate) rest: f32,
}

impl SiteGate {
    pub(crate) fn new(known: Tensor, expected: f64) -> Self {
        Self {
            known,
            rest: (1.0 - expected).max(LEAST) as f32,
        }
    }
}

/// The gates of a core.
#[derive(Debug)]
pub(crate) struct Gates {
    threshold: f32,
    width: f32,
    sites: Box<[Option<SiteGate>]>,
}

impl Gates {
    pub(crate) fn new(gate: &Gate, sites: Vec<Option<SiteGate>>) -> Arc<Self> {
        Arc::new(Self {
            threshold: gate.threshold,
            width: gate.width,
            sites: sites.into(),
        })
    }

    pub(crate) fn site(&self, index: usize) -> Option<&SiteGate> {
        self.sites.get(index)?.as_ref()
    }

    /// Writes zeros over them. Says whether it could.
    pub(crate) fn scrub(&self) -> bool {
        let mut done = true;
        for site in self.sites.iter().flatten() {
            done &= site.known.zero_set().is_ok();
        }
        done
    }

    pub(crate) fn bytes(&self) -> usize {
        let floats = |site: &SiteGate| site.known.elem_count();
        let all = self.sites.iter().flatten().map(floats).sum::<usize>();
        all * size_of::<f32>()
    }

    /// What is left of the delta of a token in this doubt.
    fn open(&self, doubt: &Doubt) -> f32 {
        let far = (doubt.mean() - self.threshold) / self.width;
        1.0 / (1.0 + far.exp())
    }
}

/// What the sites that a token has passed make of it; the default before the first.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Doubt {
    sum: f32,
    sites: f32,
}

impl Doubt {
    fn mean(&self) -> f32 {
        self.sum / self.sites.max(1.0)
    }
}

/// Rows of one core at a site: notes their doubts and scales what the core gives them. k [T, R1] their keys, known
/// k (G + lambda I)⁻¹ G [T, R1], c [T, R2], all as rows of values.
pub(crate) fn close(
    gates: &Gates,
    gate: &SiteGate,
    k: &[f32],
    known: &[f32],
    c: &mut [f32],
    doubts: &mut [Doubt],
) {
    let tokens = doubts.len().max(1);
    let (r1, r2) = (k.len() / tokens, c.len() / tokens);
    let rows = k.chunks_exact(r1).zip(known.chunks_exact(r1));
    for (((k, known), c), doubt) in rows.zip(c.chunks_exact_mut(r2)).zip(doubts) {
        let spanned: f32 = k.iter().zip(known).map(|(k, known)| k * known).sum();
        let length: f32 = k.iter().map(|k| k * k).sum();
        // A key of nothing is like nothing.
        let leverage = if length > 0.0 { spanned / length } else { 0.0 };
        doubt.sum += (1.0 - leverage) / gate.rest;
        doubt.sites += 1.0;
        let open = gates.open(doubt);
        for value in c {
            *value *= open;
        }
    }
}

#[cfg(test)]
mod tests;
