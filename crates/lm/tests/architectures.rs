//! Every architecture against an independent decoder in plain f64 loops, written here from the papers'
//! formulas and sharing nothing with ours, on tiny random weights.

#![expect(clippy::unwrap_used, reason = "helpers of tests")]

use std::{collections::HashMap, path::Path};

use candle_core::{DType, Device};
use lm::{Lm, LoadOptions, TokenId};
use serde_json::json;
use testkit::{Random, TinySpec, matmul, relative_error_of, tiny_base, transpose, values};

/// The reference: weights in f64 by their names in the checkpoint.
struct Plain {
    spec: TinySpec,
    weights: HashMap<String, Vec<f64>>,
}

impl Plain {
    fn load(dir: &Path, spec: &TinySpec) -> Self {
        let mut weights = HashMap::new();
        for entry in std::fs::read_dir(dir)
            .unwrap()
            .map(|entry| entry.unwrap().path())
        {
            if entry
                .extension()
                .is_some_and(|extension| extension == "safetensors")
            {
                for (name, tensor) in candle_core::safetensors::load(&entry, &Device::Cpu).unwrap()
                {
                    weights.insert(name, values(&tensor.to_dtype(DType::F32).unwrap()));
                }
            }
        }
        Self {
            spec: spec.clone(),
            weights,
        }
    }

    /// x [T, in] of a linear by name -> [T, out], with its bias if there is one.
    fn linear(&self, x: &[f64], name: &str, features: usize) -> Vec<f64> {
        let weight = &self.weights[&format!("{name}.weight")];
        let (out, tokens) = (weight.len() / features, x.len() / features);
        let mut y = matmul(x, &transpose(weight, out, features), tokens, features, out);
        if let Some(bias) = self.weights.get(&format!("{name}.bias")) {
            for (value, bias) in y.iter_mut().zip(bias.iter().cycle()) {
                *value += bias;
            }
        }
        y
    }

    fn norm(&self, x: &[f64], name: &str) -> Vec<f64> {
        let gain = &self.weights[&format!("{name}.weight")];
        let rows = x.chunks(gain.len());
        rows.flat_map(|row| {
            let rms = (row.iter().map(|x| x * x).sum::<f64>() / row.len() as f64 + 1e-5).sqrt();
            row.iter()
                .zip(gain)
                .map(move |(x, g)| x / rms * g)
                .collect::<Vec<_>>()
        })
        .collect()
    }

    /// The angle of frequency i at a position, with Llama 3's scaling as its authors wrote it.
    fn angle(&self, i: usize, position: usize) -> f64 {
        let frequency = 10_000_f64.powf(-2.0 * i as f64 / self.spec.head_dim() as f64);
        let Some(scaling) = &self.spec.rope_scaling else {
            return position as f64 * frequency;
        };
        let key = |name: &str| scaling[name].as_f64().unwrap();
        let (old, low, high, factor) = (
            key("original_max_position_embeddings"),
            key("low_freq_factor"),
            key("high_freq_factor"),
            key("factor"),
        );
        let wavelength = std::f64::consts::TAU / frequency;
        let scaled = if wavelength < old / high {
            frequency
        } else if wavelength > old / low {
            frequency / factor
        } else {
            let smooth = (old / wavelength - low) / (high - low);
            (1.0 - smooth) * frequency / factor + smooth * frequency
        };
        position as f64 * scaled
    }

    fn rotate(&self, x: &mut [f64], heads: usize) {
        let dim = self.spec.head_dim();
        for (index, head) in x.chunks_mut(dim).enumerate() {
            let position = index / heads;
            for i in 0..dim / 2 {
                let (sin, cos) = self.angle(i, position).sin_cos();
                let (a, b) = (head[i], head[i + dim / 2]);
                (head[i], head[i + dim / 2]) = (a * cos - b * sin, b * cos + a * sin);
            }
        }
    }

    /// Logits at every token, [T, V].
    fn logits(&self, tokens: &[TokenId]) -> Vec<f64> {
        let TinySpec {
            hidden,
            heads,
            kv_heads,
            intermediate,
            layers,
            sliding_window,
            ..
        } = self.spec;
        let dim = self.spec.head_dim();
        let count = tokens.len();
        let table = &self.weights["model.embed_tokens.weight"];
        let mut h: Vec<f64> = tokens
            .iter()
            .flat_map(|t| table[t.0 as usize * hidden..][..hidden].to_vec())
            .collect();
        for layer in 0..layers {
            let name = |rest: &str| format!("model.layers.{layer}.{rest}");
            let x = self.norm(&h, &name("input_layernorm"));
            let mut q = self.linear(&x, &name("self_attn.q_proj"), hidden);
            let mut k = self.linear(&x, &name("self_attn.k_proj"), hidden);
            let v = self.linear(&x, &name("self_attn.v_proj"), hidden);
            if self.spec.architecture == "qwen3" {
                q = self.norm(&q, &name("self_attn.q_norm"));
                k = self.norm(&k, &name("self_attn.k_norm"));
            }
            self.rotate(&mut q, heads);
            self.rotate(&mut k, kv_heads);
            let mut attended = vec![0.0; count * heads * dim];
            for t in 0..count {
                for head in 0..heads {
                    let group = head / (heads / kv_heads);
                    let query = &q[(t * heads + head) * dim..][..dim];
                    let visible =
                        (0..=t).filter(|s| sliding_window.is_none_or(|window| t - s < window));
                    let scores: Vec<(usize, f64)> = visible
                        .map(|s| {
                            let key = &k[(s * kv_heads + group) * dim..][..dim];
                            (
                                s,
                                (query.iter().zip(key).map(|(a, b)| a * b).sum::<f64>()
                                    / (dim as f64).sqrt())
                                .exp(),
                            )
                        })
                        .collect();
                    let sum: f64 = scores.iter().map(|(_, score)| score).sum();
                    for (s, score) in scores {
                        for i in 0..dim {
                            attended[(t * heads + head) * dim + i] +=
                                score / sum * v[(s * kv_heads + group) * dim + i];
                        }
                    }
                }
            }
            let o = self.linear(&attended, &name("self_attn.o_proj"), heads * dim);
            h = h.iter().zip(&o).map(|(a, b)| a + b).collect();
            let x = self.norm(&h, &name("post_attention_layernorm"));
            let gate = self.linear(&x, &name("mlp.gate_proj"), hidden);
            let up = self.linear(&x, &name("mlp.up_proj"), hidden);
            let middle: Vec<f64> = gate
                .iter()
                .zip(&up)
                .map(|(g, u)| g / (1.0 + (-g).exp()) * u)
                .collect();
            let down = self.linear(&middle, &name("mlp.down_proj"), intermediate);
            h = h.iter().zip(&down).map(|(a, b)| a + b).collect();
        }
        let x = self.norm(&h, "model.norm");
        self.linear(
            &x,
            if self.spec.tied {
                "model.embed_tokens"
            } else {
                "lm_head"
            },
            hidden,
        )
    }
}

/// Our logits and the reference's agree; returns ours.
fn agree(spec: &TinySpec) -> Vec<f64> {
    let dir = tempfile::tempdir().unwrap();
    tiny_base(dir.path(), spec);
    let mut random = Random::new(41);
    let tokens: Vec<TokenId> = (0..45)
        .map(|_| TokenId(random.below(spec.vocab) as u32))
        .collect();
    let want = Plain::load(dir.path(), spec).logits(&tokens);
    let lm = Lm::load(dir.path(), LoadOptions::default()).unwrap();
    let got = values(&lm.logits(&tokens, None, 1.0).unwrap());
    let error = relative_error_of(&got, &want);
    assert!(error < 2e-6, "{}: {error:.1e}", spec.architecture);
    got
}

#[test]
fn llama_is_what_its_formulas_say() {
    agree(&TinySpec {
        layers: 3,
        ..TinySpec::default()
    });
    agree(&TinySpec {
        tied: false,
        kv_heads: 4,
        seed: 7,
        ..TinySpec::default()
    });
    agree(&TinySpec {
        head_dim: Some(12),
        heads: 3,
        kv_heads: 1,
        ..TinySpec::default()
    });
}

#[test]
fn llama3_scaling_keeps_blends_and_slows_down() {
    // Wavelengths of 6.3, 63 and more positions: kept, blended, slowed down.
    let scaling = json!({
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 200,
    });
    let scaled = agree(&TinySpec {
        rope_scaling: Some(scaling),
        ..TinySpec::default()
    });
    assert_ne!(
        scaled,
        agree(&TinySpec::default()),
        "the scaling does something"
    );
}

#[test]
fn mistral_sees_no_further_than_its_window() {
    let mistral = |sliding_window| TinySpec {
        architecture: "mistral",
        sliding_window,
        ..TinySpec::default()
    };
    let near = agree(&mistral(Some(9)));
    let far = agree(&mistral(None));
    let vocab = mistral(None).vocab;
    assert_eq!(
        near[..9 * vocab],
        far[..9 * vocab],
        "within the window nothing differs"
    );
    assert_ne!(near[9 * vocab..], far[9 * vocab..]);
}

#[test]
fn qwen2_adds_its_biases() {
    agree(&TinySpec {
        architecture: "qwen2",
        layers: 3,
        ..TinySpec::default()
    });
}

#[test]
fn qwen3_norms_its_heads() {
    agree(&TinySpec {
        architecture: "qwen3",
        head_dim: Some(16),
        ..TinySpec::default()
    });
}

#[test]
fn half_precision_shards_are_read_as_they_are() {
    for dtype in [DType::F16, DType::BF16] {
        agree(&TinySpec {
            dtype,
            shards: 3,
            tied: false,
            ..TinySpec::default()
        });
    }
}
