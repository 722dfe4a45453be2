//! adapter_model.safetensors of a generator: keys, shapes and types checked before a weight is read.
//!
//! The header is read and judged first, against the file's own length and against what config and base call
//! for; then tensor after tensor in file order, so that memory holds one tensor beside the finished sites and
//! the digest is taken in passing. Start at [`read`].

use std::{collections::HashMap, fs::File, io::Read, path::Path};

use candle_core::{Device, Tensor};
use half::{bf16, f16};
use kernels::{Linear, WeightFormat};
use safetensors::{Dtype, tensor::Metadata};

use crate::{
    config::{Config, ReadOut, Write},
    error::Error,
    site::{BaseShape, Site, SiteId, Writer},
};

/// Longest safetensors header that is read. A site has at most seven tensors of about 150 bytes each: room for
/// more than 10,000 sites.
const MAX_HEADER: u64 = 16 << 20;

/// Sites in order, and the number of trained values. Every byte read also goes into `digest`.
pub(crate) fn read(
    path: &Path,
    config: &Config,
    base: &BaseShape,
    digest: &mut blake3::Hasher,
) -> Result<(Vec<Site>, usize), Error> {
    let ids = site_ids(config, base)?;
    let wanted: HashMap<String, Vec<usize>> = ids
        .iter()
        .flat_map(|id| tensors_of(*id, config, base))
        .collect();
    let mut file = Source {
        file: File::open(path).map_err(|source| io(path, source))?,
        path,
        digest,
    };
    let header = file.header()?;

    // `fastlora_ridge` and `fastlora_A1.weight` alike are known by what stands before `.weight`.
    let bare = |key: &str| key.strip_suffix(".weight").unwrap_or(key).to_owned();
    let keys = header.offset_keys();
    let mut foreign: Vec<_> = keys
        .iter()
        .filter(|key| !wanted.contains_key(&bare(key)))
        .cloned()
        .collect();
    let present: HashMap<String, &String> = keys.iter().map(|key| (bare(key), key)).collect();
    if present.len() < keys.len() {
        foreign.extend(
            keys.iter()
                .filter(|key| present.get(&bare(key)) != Some(key))
                .cloned(),
        );
    }
    let mut missing: Vec<_> = wanted
        .keys()
        .filter(|key| !present.contains_key(*key))
        .cloned()
        .collect();
    if !missing.is_empty() || !foreign.is_empty() {
        missing.sort_unstable();
        foreign.sort_unstable();
        foreign.dedup();
        return Err(Error::Tensors { missing, foreign });
    }
    for key in &keys {
        let (want, info) = (
            &wanted[&bare(key)],
            header
                .info(key)
                .ok_or_else(|| file.malformed("a tensor without description"))?,
        );
        if *want != info.shape {
            return Err(Error::Shape {
                key: key.clone(),
                want: want.clone(),
                found: info.shape.clone(),
            });
        }
        format(key, info.dtype)?;
    }

    let mut loaded = HashMap::with_capacity(keys.len());
    let mut parameters = 0;
    for key in &keys {
        let info = header
            .info(key)
            .ok_or_else(|| file.malformed("a tensor without description"))?;
        let bytes = file.take(info.data_offsets.1 - info.data_offsets.0)?;
        parameters += info.shape.iter().product::<usize>();
        let weights = match *info.shape.as_slice() {
            [rows, columns] => Weights::Matrix(Linear::new(
                format(key, info.dtype)?,
                &bytes,
                rows,
                columns,
            )?),
            _ => Weights::Vector(vector(key, info.dtype, &bytes)?),
        };
        loaded.insert(bare(key), weights);
    }
    let mut loaded = Loaded(loaded);
    let sites = ids
        .iter()
        .map(|id| loaded.site(*id, config))
        .collect::<Result<_, Error>>()?;
    Ok((sites, parameters))
}

/// Adapted linears in order.
fn site_ids(config: &Config, base: &BaseShape) -> Result<Vec<SiteId>, Error> {
    let layers = match &config.layers {
        Some(layers) => layers.clone(),
        None => (0..base.layers).collect(),
    };
    if let Some(layer) = layers.iter().copied().find(|layer| *layer >= base.layers) {
        return Err(Error::Layer {
            layer,
            layers: base.layers,
        });
    }
    Ok(layers
        .iter()
        .flat_map(|layer| {
            config.modules.iter().map(|module| SiteId {
                layer: *layer,
                module: *module,
            })
        })
        .collect())
}

fn key(id: SiteId, tensor: &str) -> String {
    let (layer, block, module) = (id.layer, id.module.block(), id.module.name());
    format!("base_model.model.model.layers.{layer}.base_layer.{block}.{module}.fastlora_{tensor}")
}

/// Keys without `.weight`, and shapes, of the tensors that a site must have.
fn tensors_of(id: SiteId, config: &Config, base: &BaseShape) -> Vec<(String, Vec<usize>)> {
    let (outputs, inputs) = base.linear(id.module);
    let (r1, r2, hidden) = (config.r1, config.r2, base.hidden);
    let mut tensors = vec![
        (key(id, "hidden_state_norm"), vec![hidden]),
        (key(id, "A1"), vec![r1, inputs]),
        (key(id, "A3"), vec![r2, hidden]),
        (key(id, "B"), vec![outputs, r2]),
    ];
    tensors.push(match config.write {
        Write::Published => (key(id, "A2"), vec![r1, hidden]),
        Write::Associative => (key(id, "A3n"), vec![r2, hidden]),
    });
    if config.read_out == ReadOut::Ridge {
        tensors.push((key(id, "ridge"), vec![1]));
    }
    tensors
}

fn format(key: &str, dtype: Dtype) -> Result<WeightFormat, Error> {
    match dtype {
        Dtype::F32 => Ok(WeightFormat::F32),
        Dtype::F16 => Ok(WeightFormat::F16),
        Dtype::BF16 => Ok(WeightFormat::BF16),
        other => Err(Error::Dtype {
            key: key.to_owned(),
            dtype: format!("{other:?}"),
        }),
    }
}

/// Values of a tensor, all finite.
pub(crate) fn vector(key: &str, dtype: Dtype, bytes: &[u8]) -> Result<Vec<f32>, Error> {
    let (pairs, _) = bytes.as_chunks::<2>();
    let (quads, _) = bytes.as_chunks::<4>();
    let values: Vec<f32> = match format(key, dtype)? {
        WeightFormat::BF16 => pairs
            .iter()
            .map(|b| bf16::from_le_bytes(*b).to_f32())
            .collect(),
        WeightFormat::F16 => pairs
            .iter()
            .map(|b| f16::from_le_bytes(*b).to_f32())
            .collect(),
        _ => quads.iter().map(|b| f32::from_le_bytes(*b)).collect(),
    };
    if !values.iter().all(|value| value.is_finite()) {
        return Err(Error::Values {
            key: key.to_owned(),
            detail: "holds values that are not finite",
        });
    }
    Ok(values)
}

enum Weights {
    Matrix(Linear),
    Vector(Vec<f32>),
}

/// Tensors by their key without `.weight`.
struct Loaded(HashMap<String, Weights>);

impl Loaded {
    fn matrix(&mut self, id: SiteId, tensor: &str) -> Result<Linear, Error> {
        match self.0.remove(&key(id, tensor)) {
            Some(Weights::Matrix(linear)) => Ok(linear),
            Some(Weights::Vector(_)) | None => Err(Error::Tensors {
                missing: vec![key(id, tensor)],
                foreign: Vec::new(),
            }),
        }
    }

    fn vector(&mut self, id: SiteId, tensor: &str) -> Result<Vec<f32>, Error> {
        match self.0.remove(&key(id, tensor)) {
            Some(Weights::Vector(values)) => Ok(values),
            Some(Weights::Matrix(_)) | None => Err(Error::Tensors {
                missing: vec![key(id, tensor)],
                foreign: Vec::new(),
            }),
        }
    }

    fn site(&mut self, id: SiteId, config: &Config) -> Result<Site, Error> {
        let a3 = self.matrix(id, "A3")?; // [R2, D]
        let writer = match config.write {
            Write::Published => Writer::Published {
                a2: self.matrix(id, "A2")?,
                a3,
            },
            Write::Associative => Writer::Associative {
                a3,
                a3n: self.matrix(id, "A3n")?,
            },
        };
        let ridge = match config.read_out {
            ReadOut::Ridge => {
                let lambda = self
                    .vector(id, "ridge")?
                    .first()
                    .map(|lambda| f64::from(*lambda))
                    .filter(|lambda| *lambda > 0.0);
                Some(lambda.ok_or(Error::Values {
                    key: key(id, "ridge"),
                    detail: "is not positive",
                })?)
            }
            ReadOut::Svd | ReadOut::Frobenius | ReadOut::Spectral => None,
        };
        let gain = self.vector(id, "hidden_state_norm")?;
        let width = gain.len();
        Ok(Site {
            id,
            a1: self.matrix(id, "A1")?,
            b: self.matrix(id, "B")?,
            writer,
            gain: Tensor::from_vec(gain, width, &Device::Cpu)?, // [D]
            ridge,
            scale: config.alpha / config.r2 as f64,
            max_rank: config.max_rank,
            skip_first: config.skip_first,
        })
    }
}

/// A file that is read once from front to back, and hashed.
struct Source<'a> {
    file: File,
    path: &'a Path,
    digest: &'a mut blake3::Hasher,
}

impl Source<'_> {
    fn malformed(&self, detail: impl Into<String>) -> Error {
        Error::Malformed {
            path: self.path.to_owned(),
            detail: detail.into(),
        }
    }

    /// The header, true to the length of the file.
    fn header(&mut self) -> Result<Metadata, Error> {
        let length = self
            .file
            .metadata()
            .map_err(|source| io(self.path, source))?
            .len();
        if length < 8 {
            return Err(self.malformed(format!(
                "it is {length} bytes long, too short for a safetensors header"
            )));
        }
        let size: [u8; 8] = self
            .take(8)?
            .try_into()
            .map_err(|_| self.malformed("it ended early"))?;
        let size = u64::from_le_bytes(size);
        if size > MAX_HEADER || size > length - 8 {
            return Err(self.malformed(format!(
                "its header claims {size} bytes of a file of {length}"
            )));
        }
        let bytes = self.take(size as usize)?;
        let header: Metadata = serde_json::from_slice(&bytes)
            .map_err(|fault| self.malformed(format!("its header cannot be read: {fault}")))?;
        let claimed = header.data_len() as u64;
        if Some(length) != claimed.checked_add(8 + size) {
            return Err(self.malformed(format!(
                "its header claims {claimed} bytes of tensors, but {} follow",
                length - 8 - size
            )));
        }
        Ok(header)
    }

    /// The next `len` bytes; callers have held `len` against the file's length.
    fn take(&mut self, len: usize) -> Result<Vec<u8>, Error> {
        let mut bytes = vec![0; len];
        self.file
            .read_exact(&mut bytes)
            .map_err(|source| io(self.path, source))?;
        self.digest.update(&bytes);
        Ok(bytes)
    }
}

pub(crate) fn io(path: &Path, source: std::io::Error) -> Error {
    Error::Io {
        path: path.to_owned(),
        source,
    }
}

#[cfg(test)]
mod tests;
