//! Weights on the device: from safetensors files tensor by tensor, or random ones of a real shape.
//!
//! bf16; q, k, v and gate, up are put beside each other, so that a layer reads each input once. Start at [`Source`].

use std::{
    fs::File,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};

use half::{bf16, f16};
use safetensors::{
    Dtype,
    tensor::{Metadata, TensorInfo},
};

use crate::{
    Buffer, Device, Error, Form, GeneratorShape, Shape, error::fits, ops::QUANTISED_BLOCK,
};

/// Gives a tensor of so many elements by its name.
pub type Asked = dyn Fn(&str, usize) -> Result<Vec<bf16>, Error>;

/// A matrix [out, in] whose weights share a scale and a minimum by 32 neighbours, as [`crate::ops::Quantised`] has them.
#[derive(Clone, Debug, Default)]
pub struct Blocks {
    /// 4 or 8.
    pub bits: usize,
    /// [out, in / 32, bits]
    pub codes: Vec<u32>,
    /// [out, in / 32]
    pub scales: Vec<u32>,
}

impl Blocks {
    /// GGUF's names of the formats that are blocks of 32.
    pub const FORMATS: [&'static str; 3] = ["Q4_0", "Q4_1", "Q8_0"];

    /// GGUF's bytes of a matrix in one of these formats, codes and scales apart, so that both are read in whole words. Layouts after
    /// ggml-common.h of ggml (facts of the format).
    pub fn from_gguf(format: &str, bytes: &[u8]) -> Option<Self> {
        let (bits, head) = match format {
            "Q4_0" => (4, 2),
            "Q4_1" => (4, 4),
            "Q8_0" => (8, 2),
            _ => return None,
        };
        let mut blocks = Self {
            bits,
            ..Self::default()
        };
        for block in bytes.chunks_exact(head + 4 * bits) {
            let (head, codes) = block.split_at(head);
            let d = u16::from_le_bytes([head[0], head[1]]);
            let minimum = match (format, head) {
                // Codes are around 8, and eight times a half is a half, unless it is beyond all of them.
                ("Q4_0", _) => f16::from_f32(-8.0 * f16::from_bits(d).to_f32()).to_bits(),
                (_, &[_, _, low, high]) => u16::from_le_bytes([low, high]),
                _ => 0,
            };
            blocks.scales.push(u32::from(d) | u32::from(minimum) << 16);
            let words = codes.as_chunks().0.iter();
            blocks
                .codes
                .extend(words.map(|word| u32::from_le_bytes(*word)));
        }
        Some(blocks)
    }
}

/// Gives a matrix of so many elements by its name, if it is quantised.
pub type AskedBlocks = dyn Fn(&str, usize) -> Result<Option<Blocks>, Error>;

/// Where weights come from.
pub enum Source {
    /// Numbers that keep activations near one: the same for the same seed.
    Random(u64),
    /// Checkpoints in the HF layout.
    Files(Files),
    /// Whoever can read them.
    Asked(Box<Asked>),
    /// The same, and matrices that stay quantised.
    Quantised(Box<Asked>, Box<AskedBlocks>),
}

/// Safetensors files, read tensor by tensor.
#[derive(Debug)]
pub struct Files(Vec<(PathBuf, File, u64, Metadata)>);

/// No header of a real checkpoint comes near this.
const MAX_HEADER: u64 = 100 << 20;

impl Files {
    /// All `*.safetensors` of a folder.
    ///
    /// # Errors
    /// [`Error::File`] naming the file that cannot be read.
    pub fn open(folder: &Path) -> Result<Self, Error> {
        let failed = |path: &Path, error: &dyn std::fmt::Display| Error::File {
            path: path.to_owned(),
            detail: error.to_string(),
        };
        let mut paths = Vec::new();
        for entry in std::fs::read_dir(folder).map_err(|error| failed(folder, &error))? {
            let path = entry.map_err(|error| failed(folder, &error))?.path();
            if path
                .extension()
                .is_some_and(|extension| extension == "safetensors")
            {
                paths.push(path);
            }
        }
        paths.sort();
        let mut files = Vec::new();
        for path in paths {
            let file = File::open(&path).map_err(|error| failed(&path, &error))?;
            let mut length = [0; 8];
            file.read_exact_at(&mut length, 0)
                .map_err(|error| failed(&path, &error))?;
            let length = u64::from_le_bytes(length);
            if length > MAX_HEADER {
                return Err(failed(&path, &format!("a header of {length} bytes")));
            }
            let mut header = vec![0; length as usize];
            file.read_exact_at(&mut header, 8)
                .map_err(|error| failed(&path, &error))?;
            // Not `SafeTensors::read_metadata`: that wants the tensors in memory as well.
            let metadata: Metadata =
                serde_json::from_slice(&header).map_err(|error| failed(&path, &error))?;
            files.push((path, file, length + 8, metadata));
        }
        if files.is_empty() {
            return Err(failed(folder, &"no safetensors file is here"));
        }
        Ok(Self(files))
    }

    /// A tensor's numbers, of any type that vectors come in.
    ///
    /// # Errors
    /// [`Error::File`] naming what is missing or of another type.
    pub fn numbers(&self, name: &str) -> Result<Vec<f64>, Error> {
        let (info, bytes, path) = self.bytes(name)?;
        match info.dtype {
            Dtype::F32 => Ok(bytes
                .as_chunks()
                .0
                .iter()
                .map(|b| f64::from(f32::from_le_bytes(*b)))
                .collect()),
            Dtype::I64 => Ok(bytes
                .as_chunks()
                .0
                .iter()
                .map(|b| i64::from_le_bytes(*b) as f64)
                .collect()),
            other => Err(Error::File {
                path: path.to_owned(),
                detail: format!("{name} is of type {other:?}"),
            }),
        }
    }

    fn bytes(&self, name: &str) -> Result<(&TensorInfo, Vec<u8>, &Path), Error> {
        let Some((path, file, start, info)) =
            self.0.iter().find_map(|(path, file, start, metadata)| {
                metadata.info(name).map(|info| (path, file, *start, info))
            })
        else {
            let path = self.0[0].0.parent().unwrap_or(Path::new("")).to_owned();
            return Err(Error::File {
                path,
                detail: format!("no tensor {name}"),
            });
        };
        let failed = |detail: String| Error::File {
            path: path.clone(),
            detail,
        };
        let (from, to) = info.data_offsets;
        let mut bytes = vec![0; to.saturating_sub(from)];
        file.read_exact_at(&mut bytes, start + from as u64)
            .map_err(|error| failed(error.to_string()))?;
        Ok((info, bytes, path))
    }

    fn read(&self, name: &str, len: usize) -> Result<Vec<bf16>, Error> {
        let (info, bytes, path) = self.bytes(name)?;
        let failed = |detail: String| Error::File {
            path: path.to_owned(),
            detail,
        };
        if info.shape.iter().product::<usize>() != len {
            return Err(failed(format!(
                "{name} has the shape {:?}, not {len} elements",
                info.shape
            )));
        }
        let values: Vec<bf16> = match info.dtype {
            Dtype::BF16 => bytes
                .as_chunks()
                .0
                .iter()
                .map(|b| bf16::from_le_bytes(*b))
                .collect(),
            Dtype::F16 => bytes
                .as_chunks()
                .0
                .iter()
                .map(|b| bf16::from_f32(f16::from_le_bytes(*b).to_f32()))
                .collect(),
            Dtype::F32 => bytes
                .as_chunks()
                .0
                .iter()
                .map(|b| bf16::from_f32(f32::from_le_bytes(*b)))
                .collect(),
            other => return Err(failed(format!("{name} is of type {other:?}"))),
        };
        if values.len() == len {
            Ok(values)
        } else {
            Err(failed(format!("{name} is cut off")))
        }
    }
}

/// Whether random numbers stand for a matrix or for the gain of a norm.
#[derive(Clone, Copy)]
enum Fill {
    /// Deviation 1 / sqrt(columns).
    Matrix(usize),
    One,
    /// A bias.
    Small,
}

/// Reads, or makes up, parts and puts them behind each other.
struct Loader<'a> {
    device: &'a Device,
    source: &'a Source,
    seed: u64,
}

impl Loader<'_> {
    fn load(&mut self, parts: &[(&str, usize)], fill: Fill) -> Result<Buffer<bf16>, Error> {
        let buffer = self.device.alloc(parts.iter().map(|(_, len)| len).sum())?;
        let mut at = 0;
        for (name, len) in parts {
            let values = match self.source {
                Source::Files(files) => files.read(name, *len)?,
                Source::Asked(ask) | Source::Quantised(ask, _) => {
                    let values = ask(name, *len)?;
                    fits(values.len() == *len, || {
                        format!("{name} of {} elements, not {len}", values.len())
                    })?;
                    values
                }
                Source::Random(seed) => {
                    self.seed += 1;
                    random(
                        seed.wrapping_mul(0x1_0000_0001).wrapping_add(self.seed),
                        *len,
                        fill,
                    )
                }
            };
            buffer.view().part(at, *len)?.write(self.device, &values)?;
            at += len;
        }
        Ok(buffer)
    }

    fn matrix(&mut self, name: &str, rows: usize, columns: usize) -> Result<Buffer<bf16>, Error> {
        self.load(&[(name, rows * columns)], Fill::Matrix(columns))
    }

    /// Matrices below each other: quantised where all of them are, and alike.
    fn linear(&mut self, parts: &[(&str, usize)], columns: usize) -> Result<Linear, Error> {
        let sized: Vec<_> = parts
            .iter()
            .map(|(name, rows)| (*name, rows * columns))
            .collect();
        if let Source::Quantised(_, ask) = self.source
            && columns.is_multiple_of(QUANTISED_BLOCK)
        {
            let mut whole = Blocks::default();
            let mut alike = true;
            for (name, len) in &sized {
                let part = ask(name, *len)?;
                let part = part.filter(|part| whole.bits == 0 || whole.bits == part.bits);
                let Some(part) = part else {
                    alike = false;
                    break;
                };
                let blocks = len / QUANTISED_BLOCK;
                fits(
                    part.scales.len() == blocks && part.codes.len() == blocks * part.bits,
                    || format!("{name} of {} blocks, not {blocks}", part.scales.len()),
                )?;
                whole.bits = part.bits;
                whole.codes.extend(part.codes);
                whole.scales.extend(part.scales);
            }
            if alike {
                return Ok(Linear::Quantised {
                    codes: self.device.upload(&whole.codes)?,
                    scales: self.device.upload(&whole.scales)?,
                    bits: whole.bits,
                });
            }
        }
        Ok(Linear::Rounded(self.load(&sized, Fill::Matrix(columns))?))
    }

    fn gain(&mut self, name: &str, len: usize) -> Result<Buffer<bf16>, Error> {
        self.load(&[(name, len)], Fill::One)
    }
}

/// Uniform numbers of the wanted deviation: a period of 65,521 of them, turned on by one at each period, as 7 G draws would take minutes.
fn random(seed: u64, len: usize, fill: Fill) -> Vec<bf16> {
    const PERIOD: usize = 65_521;
    let (middle, deviation) = match fill {
        Fill::Matrix(columns) => (0.0, 1.0 / (columns as f64).sqrt()),
        Fill::One => (1.0, 0.05),
        Fill::Small => (0.0, 0.05),
    };
    let mut state = seed;
    let mut draw = || {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        let uniform = ((z ^ (z >> 31)) >> 11) as f64 / (1u64 << 52) as f64 - 1.0;
        bf16::from_f64(middle + uniform * 3f64.sqrt() * deviation)
    };
    let period: Vec<bf16> = (0..len.min(PERIOD)).map(|_| draw()).collect();
    let mut values = Vec::with_capacity(len);
    while values.len() < len {
        let turn = values.len() / PERIOD % period.len().max(1);
        values.extend(
            period[turn..]
                .iter()
                .chain(&period[..turn])
                .take(len - values.len()),
        );
    }
    values
}

/// A linear of the base, [out, in].
pub(crate) enum Linear {
    Rounded(Buffer<bf16>),
    Quantised {
        codes: Buffer<u32>,
        scales: Buffer<u32>,
        bits: usize,
    },
}

impl Linear {
    /// Elements that it has in bf16 before it is multiplied with many rows.
    fn elements(&self) -> usize {
        match self {
            Self::Rounded(_) => 0,
            Self::Quantised { scales, .. } => scales.view().len() * QUANTISED_BLOCK,
        }
    }
}

/// One decoder layer's weights.
pub(crate) struct Layer {
    /// `[D]`
    pub(crate) input_norm: Buffer<bf16>,
    /// [(H + 2 Hkv) Dh, D]
    pub(crate) qkv: Linear,
    /// [(H + 2 Hkv) Dh]
    pub(crate) qkv_bias: Option<Buffer<bf16>>,
    /// `[Dh]` each, of q and of k.
    pub(crate) head_norms: Option<[Buffer<bf16>; 2]>,
    /// [D, H Dh]
    pub(crate) output: Linear,
    /// `[D]`
    pub(crate) post_norm: Buffer<bf16>,
    /// [2F, D]
    pub(crate) gate_up: Linear,
    /// [D, F]
    pub(crate) down: Linear,
    /// One for each of the generator's places.
    pub(crate) sites: Vec<SiteWeights>,
}

/// One site's weights.
pub(crate) struct SiteWeights {
    /// [R1, Din]
    pub(crate) a1: Buffer<bf16>,
    /// [D, R2]
    pub(crate) b: Buffer<bf16>,
    /// `[D]`
    pub(crate) gain: Buffer<bf16>,
    /// A2 [R1, D] of the published form, A3n [R2, D] of the associative one.
    pub(crate) hidden: Buffer<bf16>,
    /// A3 [R2, D]
    pub(crate) a3: Buffer<bf16>,
}

/// All weights.
pub(crate) struct Weights {
    /// [V, D]
    pub(crate) embedding: Buffer<bf16>,
    pub(crate) layers: Vec<Layer>,
    /// `[D]`
    pub(crate) final_norm: Buffer<bf16>,
    /// [V, D]; `None` where it is the embedding.
    pub(crate) head: Option<Linear>,
}

impl Weights {
    pub(crate) fn load(
        device: &Device,
        shape: &Shape,
        source: &Source,
        generator: Option<(&GeneratorShape, &Source)>,
    ) -> Result<Self, Error> {
        let Shape {
            hidden,
            intermediate,
            heads,
            vocab,
            ..
        } = *shape;
        let (queries, keys) = (heads.queries * heads.dim, heads.keys * heads.dim);
        let mut base = Loader {
            device,
            source,
            seed: 0,
        };
        let embedding = base.matrix("model.embed_tokens.weight", vocab, hidden)?;
        let mut layers = Vec::with_capacity(shape.layers);
        for layer in 0..shape.layers {
            let name = |what: &str| format!("model.layers.{layer}.{what}");
            let [q, k, v] =
                ["q", "k", "v"].map(|part| name(&format!("self_attn.{part}_proj.weight")));
            let [gate, up] = ["gate", "up"].map(|part| name(&format!("mlp.{part}_proj.weight")));
            let biases = ["q", "k", "v"].map(|part| name(&format!("self_attn.{part}_proj.bias")));
            let qkv_bias = shape.attention_bias.then(|| {
                base.load(
                    &[
                        (&biases[0], queries),
                        (&biases[1], keys),
                        (&biases[2], keys),
                    ],
                    Fill::Small,
                )
            });
            let head_norms = if shape.qk_norm {
                let [q, k] = ["q", "k"].map(|part| name(&format!("self_attn.{part}_norm.weight")));
                Some([base.gain(&q, heads.dim)?, base.gain(&k, heads.dim)?])
            } else {
                None
            };
            let sites = match generator {
                Some((generator, source)) if generator.first_site(layer).is_some() => {
                    Self::sites(device, shape, layer, generator, source)?
                }
                _ => Vec::new(),
            };
            layers.push(Layer {
                input_norm: base.gain(&name("input_layernorm.weight"), hidden)?,
                qkv: base.linear(&[(&q, queries), (&k, keys), (&v, keys)], hidden)?,
                qkv_bias: qkv_bias.transpose()?,
                head_norms,
                output: base.linear(&[(&name("self_attn.o_proj.weight"), hidden)], queries)?,
                post_norm: base.gain(&name("post_attention_layernorm.weight"), hidden)?,
                gate_up: base.linear(&[(&gate, intermediate), (&up, intermediate)], hidden)?,
                down: base.linear(&[(&name("mlp.down_proj.weight"), hidden)], intermediate)?,
                sites,
            });
        }
        Ok(Self {
            embedding,
            layers,
            final_norm: base.gain("model.norm.weight", hidden)?,
            head: (!shape.tied)
                .then(|| base.linear(&[("lm_head.weight", vocab)], hidden))
                .transpose()?,
        })
    }

    /// The most elements that a quantised linear has.
    pub(crate) fn most_quantised(&self) -> usize {
        let layers = self.layers.iter();
        let linears = layers.flat_map(|l| [&l.qkv, &l.output, &l.gate_up, &l.down]);
        let elements = linears.chain(&self.head).map(Linear::elements);
        elements.max().unwrap_or(0)
    }

    fn sites(
        device: &Device,
        shape: &Shape,
        layer: usize,
        generator: &GeneratorShape,
        source: &Source,
    ) -> Result<Vec<SiteWeights>, Error> {
        let GeneratorShape { r1, r2, form, .. } = *generator;
        let site = |(index, place): (usize, &crate::Place)| {
            let mut loader = Loader {
                device,
                source,
                seed: (1 << 32) | ((layer * 2 + index) as u64 * 16),
            };
            let name = |what: &str| {
                format!(
                    "base_model.model.model.layers.{layer}.base_layer.{}.fastlora_{what}.weight",
                    place.name()
                )
            };
            let input = match place {
                crate::Place::Output => shape.heads.queries * shape.heads.dim,
                crate::Place::Down => shape.intermediate,
            };
            Ok(SiteWeights {
                a1: loader.matrix(&name("A1"), r1, input)?,
                b: loader.matrix(&name("B"), shape.hidden, r2)?,
                gain: loader.gain(&name("hidden_state_norm"), shape.hidden)?,
                hidden: match form {
                    Form::Published => loader.matrix(&name("A2"), r1, shape.hidden)?,
                    Form::Associative => loader.matrix(&name("A3n"), r2, shape.hidden)?,
                },
                a3: loader.matrix(&name("A3"), r2, shape.hidden)?,
            })
        };
        generator.places.iter().enumerate().map(site).collect()
    }
}
