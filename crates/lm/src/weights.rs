//! Weights out of safetensors (one file or shards) or GGUF, under the names of the HF layout.
//!
//! Each tensor is read by itself, straight into the form it stays in: a file is never held whole beside
//! the model. GGUF's own names and its order of q and k rows end here. Start at [`Weights`].

use std::{
    collections::{BTreeMap, BTreeSet, HashMap},
    fs::{self, File},
    io::{Read, Seek, SeekFrom},
    path::{Path, PathBuf},
};

use candle_core::{Device, Tensor};
use kernels::{Linear, WeightFormat};
use safetensors::{Dtype, tensor::Metadata};

use crate::{
    Activations, Architecture, Error, FileError, LoadOptions,
    gguf::{Gguf, ggml_type},
};

/// The weight files of a model.
pub(crate) struct Weights {
    source: Source,
    options: LoadOptions,
    parameters: u64,
    /// Elements of the matrices in each format.
    formats: BTreeMap<&'static str, u64>,
}

enum Source {
    Gguf {
        gguf: Gguf,
        file: File,
        permuted: bool,
    },
    Safetensors {
        shards: Vec<Shard>,
        names: HashMap<String, usize>,
    },
}

/// Rows of q or k in GGUF's llama order, and how many of them make a head.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Rows {
    Plain,
    Rotary { head_dim: usize },
}

struct Shard {
    path: PathBuf,
    file: File,
    tensors: HashMap<String, Entry>,
}

struct Entry {
    dtype: Dtype,
    shape: Vec<usize>,
    offset: u64,
    bytes: usize,
}

/// The bytes of a tensor and what they are.
struct Raw {
    bytes: Vec<u8>,
    format: WeightFormat,
    shape: Vec<usize>,
    permuted: bool,
}

impl Weights {
    pub(crate) fn from_gguf(
        gguf: Gguf,
        architecture: Architecture,
        options: LoadOptions,
    ) -> Result<Self, Error> {
        let file = File::open(gguf.path()).map_err(|e| FileError::io(gguf.path(), e))?;
        // llama.cpp rotates neighbouring pairs in its llama models and half-split pairs in the others.
        let permuted = architecture == Architecture::Llama;
        Ok(Self::new(
            Source::Gguf {
                gguf,
                file,
                permuted,
            },
            options,
        ))
    }

    pub(crate) fn from_folder(folder: &Path, options: LoadOptions) -> Result<Self, Error> {
        let mut shards = Vec::new();
        let mut names = HashMap::new();
        for path in safetensors_files(folder)? {
            let shard = Shard::open(&path)?;
            for name in shard.tensors.keys() {
                names.insert(name.clone(), shards.len());
            }
            shards.push(shard);
        }
        Ok(Self::new(Source::Safetensors { shards, names }, options))
    }

    fn new(source: Source, options: LoadOptions) -> Self {
        Self {
            source,
            options,
            parameters: 0,
            formats: BTreeMap::new(),
        }
    }

    /// Elements read so far.
    pub(crate) fn parameters(&self) -> u64 {
        self.parameters
    }

    /// The format of most of the matrices' elements, as the file has them.
    pub(crate) fn format(&self) -> &'static str {
        self.formats
            .iter()
            .max_by_key(|(_, elements)| **elements)
            .map_or("none", |(name, _)| name)
    }

    /// That the file holds something that has no meaning here.
    pub(crate) fn unsupported(&self, what: String) -> FileError {
        FileError::unsupported(self.path(), what)
    }

    /// Whether the file has a tensor of this (HF) name.
    pub(crate) fn has(&self, name: &str) -> bool {
        match &self.source {
            Source::Gguf { gguf, .. } => {
                gguf_name(name).is_some_and(|name| gguf.tensor(&name).is_some())
            }
            Source::Safetensors { names, .. } => names.contains_key(name),
        }
    }

    /// A matrix [out, in].
    pub(crate) fn linear(
        &mut self,
        name: &str,
        out: usize,
        features: usize,
        rows: Rows,
    ) -> Result<Linear, Error> {
        let raw = self.read(name, &[out, features])?;
        *self.formats.entry(format_name(raw.format)).or_default() += (out * features) as u64;
        let bytes = match rows {
            Rows::Rotary { head_dim } if raw.permuted => half_split_rows(&raw.bytes, out, head_dim),
            Rows::Rotary { .. } | Rows::Plain => raw.bytes,
        };
        let LoadOptions {
            dequantize,
            activations,
        } = self.options;
        Ok(match activations {
            _ if dequantize => Linear::new(raw.format, &bytes, out, features)?.to_f32()?,
            Activations::F32 => Linear::new(raw.format, &bytes, out, features)?,
            Activations::Int8 => Linear::with_int8_activations(raw.format, &bytes, out, features)?,
        })
    }

    /// A vector `[n]`, in f32.
    pub(crate) fn vector(&mut self, name: &str, size: usize, rows: Rows) -> Result<Tensor, Error> {
        let raw = self.read(name, &[size])?;
        let bytes = match rows {
            Rows::Rotary { head_dim } if raw.permuted => {
                half_split_rows(&raw.bytes, size, head_dim)
            }
            Rows::Rotary { .. } | Rows::Plain => raw.bytes,
        };
        let Some(values) = floats(raw.format, &bytes) else {
            let what = format!("{name} is a vector in {}", format_name(raw.format));
            return Err(FileError::unsupported(self.path(), what).into());
        };
        Ok(Tensor::from_vec(values, size, &Device::Cpu)?)
    }

    /// All of a tensor in f32, row by row.
    pub(crate) fn values(
        &mut self,
        name: &str,
        shape: &[usize],
        rows: Rows,
    ) -> Result<Vec<f32>, Error> {
        let raw = self.read(name, shape)?;
        let out = shape.first().copied().unwrap_or_default();
        let bytes = match rows {
            Rows::Rotary { head_dim } if raw.permuted => half_split_rows(&raw.bytes, out, head_dim),
            Rows::Rotary { .. } | Rows::Plain => raw.bytes,
        };
        match (floats(raw.format, &bytes), shape) {
            (Some(values), _) => Ok(values),
            (None, &[out, features]) => {
                let map = Linear::new(raw.format, &bytes, out, features)?;
                Ok(map.dequantize()?.flatten_all()?.to_vec1()?)
            }
            (None, _) => {
                let what = format!("{name} is a vector in {}", format_name(raw.format));
                Err(FileError::unsupported(self.path(), what).into())
            }
        }
    }

    /// The bytes of a matrix [out, in] as its file has them, and what they are.
    pub(crate) fn bytes(
        &mut self,
        name: &str,
        shape: &[usize],
        rows: Rows,
    ) -> Result<(&'static str, Vec<u8>), Error> {
        let raw = self.read(name, shape)?;
        let out = shape.first().copied().unwrap_or_default();
        let bytes = match rows {
            Rows::Rotary { head_dim } if raw.permuted => half_split_rows(&raw.bytes, out, head_dim),
            Rows::Rotary { .. } | Rows::Plain => raw.bytes,
        };
        Ok((format_name(raw.format), bytes))
    }

    /// What a tensor's numbers are in its file.
    pub(crate) fn format_of(&self, name: &str) -> Option<&'static str> {
        match &self.source {
            Source::Gguf { gguf, .. } => {
                let info = gguf.tensor(&gguf_name(name)?)?;
                ggml_type(info.ggml_type).map(|(name, ..)| name)
            }
            Source::Safetensors { .. } => None,
        }
    }

    /// GGUF's divisors of the rotary frequencies, if there are any, `[n]`.
    pub(crate) fn rope_divisors(&mut self, size: usize) -> Result<Option<Vec<f32>>, Error> {
        if !self.has(ROPE_DIVISORS) {
            return Ok(None);
        }
        let divisors: Vec<f32> = self.vector(ROPE_DIVISORS, size, Rows::Plain)?.to_vec1()?;
        if !divisors.iter().all(|d| d.is_finite() && *d > 0.0) {
            return Err(FileError::header(
                self.path(),
                "rope_freqs.weight has divisors that are not positive",
            )
            .into());
        }
        Ok(Some(divisors))
    }

    fn path(&self) -> &Path {
        match &self.source {
            Source::Gguf { gguf, .. } => gguf.path(),
            Source::Safetensors { shards, .. } => {
                shards.first().map_or(Path::new(""), |shard| &shard.path)
            }
        }
    }

    fn read(&mut self, name: &str, shape: &[usize]) -> Result<Raw, Error> {
        let raw = match &mut self.source {
            Source::Gguf {
                gguf,
                file,
                permuted,
            } => read_gguf(gguf, file, *permuted, name, shape)?,
            Source::Safetensors { shards, names } => {
                let shard = names.get(name).and_then(|&index| shards.get_mut(index));
                let shard = shard.ok_or_else(|| Error::MissingTensor {
                    name: name.to_owned(),
                })?;
                shard.read(name, shape)?
            }
        };
        self.parameters += raw.shape.iter().product::<usize>() as u64;
        Ok(raw)
    }
}

/// Numbers of a floating format in f32.
fn floats(format: WeightFormat, bytes: &[u8]) -> Option<Vec<f32>> {
    match format {
        WeightFormat::F32 => {
            let values = bytes.as_chunks().0.iter();
            Some(values.map(|b| f32::from_le_bytes(*b)).collect())
        }
        WeightFormat::F16 => {
            let values = bytes.as_chunks().0.iter();
            Some(
                values
                    .map(|b| half::f16::from_le_bytes(*b).to_f32())
                    .collect(),
            )
        }
        WeightFormat::BF16 => {
            let values = bytes.as_chunks().0.iter();
            Some(
                values
                    .map(|b| half::bf16::from_le_bytes(*b).to_f32())
                    .collect(),
            )
        }
        WeightFormat::Q8_0
        | WeightFormat::Q8
        | WeightFormat::Q4_0
        | WeightFormat::Q4_1
        | WeightFormat::Q4K
        | WeightFormat::Q6K => None,
    }
}

const ROPE_DIVISORS: &str = "rope_freqs.weight";

fn check_shape(name: &str, expected: &[usize], found: &[usize]) -> Result<(), Error> {
    if expected == found {
        return Ok(());
    }
    Err(Error::Shape {
        name: name.to_owned(),
        expected: expected.to_vec(),
        found: found.to_vec(),
    })
}

fn read_gguf(
    gguf: &Gguf,
    file: &mut File,
    permuted: bool,
    name: &str,
    expected: &[usize],
) -> Result<Raw, Error> {
    let own = gguf_name(name).unwrap_or_else(|| name.to_owned());
    let info = gguf
        .tensor(&own)
        .ok_or_else(|| Error::MissingTensor { name: own.clone() })?;
    let found: Vec<usize> = info
        .shape
        .iter()
        .rev()
        .map(|&n| usize::try_from(n).unwrap_or(usize::MAX))
        .collect();
    check_shape(&own, expected, &found)?;
    let format = match info.ggml_type {
        0 => WeightFormat::F32,
        1 => WeightFormat::F16,
        2 => WeightFormat::Q4_0,
        3 => WeightFormat::Q4_1,
        8 => WeightFormat::Q8_0,
        12 => WeightFormat::Q4K,
        14 => WeightFormat::Q6K,
        30 => WeightFormat::BF16,
        other => {
            let format = ggml_type(other)
                .map_or_else(|| format!("type {other}"), |(name, ..)| name.to_owned());
            return Err(
                FileError::unsupported(gguf.path(), format!("{own} is in {format}")).into(),
            );
        }
    };
    let bytes = gguf.read_tensor(file, info)?;
    Ok(Raw {
        bytes,
        format,
        shape: found,
        permuted,
    })
}

/// GGUF's name of an HF tensor.
fn gguf_name(name: &str) -> Option<String> {
    let whole = match name {
        "model.embed_tokens.weight" => "token_embd.weight",
        "model.norm.weight" => "output_norm.weight",
        "lm_head.weight" => "output.weight",
        ROPE_DIVISORS => ROPE_DIVISORS,
        _ => "",
    };
    if !whole.is_empty() {
        return Some(whole.to_owned());
    }
    let (layer, rest) = name.strip_prefix("model.layers.")?.split_once('.')?;
    let (module, kind) = rest.rsplit_once('.')?;
    let own = match module {
        "input_layernorm" => "attn_norm",
        "self_attn.q_proj" => "attn_q",
        "self_attn.k_proj" => "attn_k",
        "self_attn.v_proj" => "attn_v",
        "self_attn.o_proj" => "attn_output",
        "self_attn.q_norm" => "attn_q_norm",
        "self_attn.k_norm" => "attn_k_norm",
        "post_attention_layernorm" => "ffn_norm",
        "mlp.gate_proj" => "ffn_gate",
        "mlp.up_proj" => "ffn_up",
        "mlp.down_proj" => "ffn_down",
        _ => return None,
    };
    Some(format!("blk.{layer}.{own}.{kind}"))
}

/// Rows out of llama.cpp's order (pairs side by side) into HF's (halves): row 2j + s of a head goes to
/// s Dh/2 + j. `bytes` holds `rows` rows of one length; a row is a whole number of blocks.
fn half_split_rows(bytes: &[u8], rows: usize, head_dim: usize) -> Vec<u8> {
    let row_bytes = bytes.len() / rows;
    let mut split = Vec::with_capacity(bytes.len());
    for row in 0..rows {
        let (head, within) = (row / head_dim, row % head_dim);
        let (s, j) = (within / (head_dim / 2), within % (head_dim / 2));
        let from = (head * head_dim + 2 * j + s) * row_bytes;
        split.extend_from_slice(&bytes[from..from + row_bytes]);
    }
    split
}

fn format_name(format: WeightFormat) -> &'static str {
    match format {
        WeightFormat::F32 => "F32",
        WeightFormat::F16 => "F16",
        WeightFormat::BF16 => "BF16",
        WeightFormat::Q8_0 => "Q8_0",
        WeightFormat::Q8 => "Q8",
        WeightFormat::Q4_0 => "Q4_0",
        WeightFormat::Q4_1 => "Q4_1",
        WeightFormat::Q4K => "Q4_K",
        WeightFormat::Q6K => "Q6_K",
    }
}

impl Shard {
    fn open(path: &Path) -> Result<Self, FileError> {
        let io = |e| FileError::io(path, e);
        let damaged = |what: String| FileError::header(path, what);
        let mut file = File::open(path).map_err(io)?;
        let length = file.metadata().map_err(io)?.len();
        let mut size = [0; 8];
        if length < 8 {
            return Err(damaged(format!("it has {length} bytes")));
        }
        file.read_exact(&mut size).map_err(io)?;
        let header_bytes = u64::from_le_bytes(size);
        // The crate's own limit, and the file's.
        if header_bytes > 100_000_000 || header_bytes > length - 8 {
            return Err(damaged(format!(
                "its header claims {header_bytes} bytes of {length}"
            )));
        }
        let mut header = vec![0; header_bytes as usize];
        file.read_exact(&mut header).map_err(io)?;
        // Reading it checks that tensors lie side by side and have the bytes that their shapes need.
        let metadata: Metadata =
            serde_json::from_slice(&header).map_err(|e| damaged(e.to_string()))?;
        let start = 8 + header_bytes;
        if start + metadata.data_len() as u64 != length {
            let bytes = metadata.data_len();
            return Err(damaged(format!(
                "its tensors take {bytes} bytes behind a header of {start}, the file has {length}"
            )));
        }
        let mut tensors = HashMap::new();
        for (name, info) in metadata.tensors() {
            let (from, to) = info.data_offsets;
            let entry = Entry {
                dtype: info.dtype,
                shape: info.shape.clone(),
                offset: start + from as u64,
                bytes: to - from,
            };
            tensors.insert(name, entry);
        }
        Ok(Self {
            path: path.to_owned(),
            file,
            tensors,
        })
    }

    fn read(&mut self, name: &str, expected: &[usize]) -> Result<Raw, Error> {
        let entry = self.tensors.get(name).ok_or_else(|| Error::MissingTensor {
            name: name.to_owned(),
        })?;
        check_shape(name, expected, &entry.shape)?;
        let format = match entry.dtype {
            Dtype::F32 => WeightFormat::F32,
            Dtype::F16 => WeightFormat::F16,
            Dtype::BF16 => WeightFormat::BF16,
            other => {
                return Err(
                    FileError::unsupported(&self.path, format!("{name} is in {other:?}")).into(),
                );
            }
        };
        let io = |e| FileError::io(&self.path, e);
        let mut bytes = vec![0; entry.bytes];
        self.file.seek(SeekFrom::Start(entry.offset)).map_err(io)?;
        self.file.read_exact(&mut bytes).map_err(io)?;
        Ok(Raw {
            bytes,
            format,
            shape: entry.shape.clone(),
            permuted: false,
        })
    }
}

/// model.safetensors, or the shards that model.safetensors.index.json names, in order of their names.
pub(crate) fn safetensors_files(folder: &Path) -> Result<Vec<PathBuf>, FileError> {
    let single = folder.join("model.safetensors");
    let index = folder.join("model.safetensors.index.json");
    if single.is_file() || !index.is_file() {
        return Ok(vec![single]);
    }
    #[derive(serde::Deserialize)]
    struct Index {
        weight_map: BTreeMap<String, String>,
    }
    let bytes = fs::read(&index).map_err(|e| FileError::io(&index, e))?;
    let Index { weight_map } =
        serde_json::from_slice(&bytes).map_err(|e| FileError::header(&index, e.to_string()))?;
    let files: BTreeSet<String> = weight_map.into_values().collect();
    let mut paths = Vec::new();
    for file in files {
        // A shard lies in the folder itself: an index cannot make us read elsewhere.
        if Path::new(&file)
            .file_name()
            .is_none_or(|name| name != file.as_str())
        {
            return Err(FileError::header(
                &index,
                format!("{file} is not the name of a file beside it"),
            ));
        }
        paths.push(folder.join(file));
    }
    Ok(paths)
}

/// blake3 of the files' bytes, one after the other, in hex.
pub(crate) fn digest(paths: &[PathBuf]) -> Result<String, FileError> {
    let mut hasher = blake3::Hasher::new();
    for path in paths {
        let file = File::open(path).map_err(|e| FileError::io(path, e))?;
        hasher
            .update_reader(file)
            .map_err(|e| FileError::io(path, e))?;
    }
    Ok(hasher.finalize().to_hex().to_string())
}
