//! Random models of a few kilobytes in the layouts of the real ones, written to a folder.
//!
//! Every decoder that `lm` knows and both forms of the generator, with scales that keep activations
//! near one and deltas large enough to see in the logits. Start at [`tiny_base`].

use std::{collections::BTreeMap, fs, path::Path};

use candle_core::{DType, Tensor, safetensors};
use serde_json::{Map, Value, json};

use crate::Random;

/// The sizes of a random decoder; `..TinySpec::default()` gives the rest.
#[derive(Clone, Debug)]
pub struct TinySpec {
    /// `model_type` of the HF layout: llama, mistral, qwen2 or qwen3.
    pub architecture: &'static str,
    /// Equal specs give equal files.
    pub seed: u64,
    /// Decoder layers.
    pub layers: usize,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads; divides `heads`.
    pub kv_heads: usize,
    /// Width of a head; None: hidden / heads.
    pub head_dim: Option<usize>,
    /// Width inside the feed-forward block.
    pub intermediate: usize,
    /// Rows of the embedding. Below [`TINY_TOKENIZER_VOCAB`] no tokenizer is written.
    pub vocab: usize,
    /// `max_position_embeddings`.
    pub context_length: usize,
    /// The output matrix is the embedding.
    pub tied: bool,
    /// Tokens that a token may attend to, itself included (mistral).
    pub sliding_window: Option<usize>,
    /// `rope_scaling` of config.json.
    pub rope_scaling: Option<Value>,
    /// Type of the numbers on disk.
    pub dtype: DType,
    /// Weight files; more than one come with an index.
    pub shards: usize,
}

impl Default for TinySpec {
    fn default() -> Self {
        Self {
            architecture: "llama",
            seed: 1,
            layers: 2,
            hidden: 32,
            heads: 4,
            kv_heads: 2,
            head_dim: None,
            intermediate: 48,
            vocab: 288,
            context_length: 512,
            tied: true,
            sliding_window: None,
            rope_scaling: None,
            dtype: DType::F32,
            shards: 1,
        }
    }
}

impl TinySpec {
    /// Width of a head.
    #[must_use]
    pub fn head_dim(&self) -> usize {
        self.head_dim.unwrap_or(self.hidden / self.heads)
    }

    /// (out, in) of an adapted linear by its name in the checkpoint.
    ///
    /// # Panics
    /// If no linear has that name.
    #[must_use]
    pub fn linear(&self, module: &str) -> (usize, usize) {
        let (queries, keys) = (
            self.heads * self.head_dim(),
            self.kv_heads * self.head_dim(),
        );
        match module {
            "q_proj" => (queries, self.hidden),
            "k_proj" | "v_proj" => (keys, self.hidden),
            "o_proj" => (self.hidden, queries),
            "gate_proj" | "up_proj" => (self.intermediate, self.hidden),
            "down_proj" => (self.hidden, self.intermediate),
            other => panic!("no linear is named {other}"),
        }
    }
}

/// The folder of a linear in the checkpoint: self_attn or mlp.
fn block(module: &str) -> &'static str {
    if matches!(module, "gate_proj" | "up_proj" | "down_proj") {
        "mlp"
    } else {
        "self_attn"
    }
}

/// Writes a random decoder in the HF layout: config.json, weights, tokenizer.json and tokenizer_config.json.
///
/// # Panics
/// If the spec contradicts itself or the folder cannot be written.
pub fn tiny_base(dir: &Path, spec: &TinySpec) {
    assert!(
        ["llama", "mistral", "qwen2", "qwen3"].contains(&spec.architecture),
        "unknown architecture"
    );
    assert!(
        spec.heads.is_multiple_of(spec.kv_heads),
        "kv_heads divides heads"
    );
    fs::create_dir_all(dir).expect("a folder for the model");
    write_json(&dir.join("config.json"), &base_config(spec));
    write_weights(dir, spec, base_weights(spec));
    if spec.vocab >= TINY_TOKENIZER_VOCAB {
        tiny_tokenizer(dir);
    }
}

fn base_config(spec: &TinySpec) -> Value {
    let class = match spec.architecture {
        "llama" => "LlamaForCausalLM",
        "mistral" => "MistralForCausalLM",
        "qwen2" => "Qwen2ForCausalLM",
        _ => "Qwen3ForCausalLM",
    };
    json!({
        "architectures": [class],
        "model_type": spec.architecture,
        "hidden_act": "silu",
        "hidden_size": spec.hidden,
        "intermediate_size": spec.intermediate,
        "num_hidden_layers": spec.layers,
        "num_attention_heads": spec.heads,
        "num_key_value_heads": spec.kv_heads,
        "head_dim": spec.head_dim(),
        "vocab_size": spec.vocab,
        "max_position_embeddings": spec.context_length,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "rope_scaling": spec.rope_scaling,
        "sliding_window": spec.sliding_window,
        "tie_word_embeddings": spec.tied,
        "attention_bias": false,
        "bos_token_id": IM_START,
        "eos_token_id": IM_END,
    })
}

/// Weights that neither vanish nor explode: linears of deviation 0.9 / sqrt(in), gains around one.
fn base_weights(spec: &TinySpec) -> BTreeMap<String, Tensor> {
    let mut random = Random::new(spec.seed);
    let mut weights = BTreeMap::new();
    weights.insert(
        "model.embed_tokens.weight".into(),
        random.tensor(&[spec.vocab, spec.hidden], 0.0, 0.4),
    );
    weights.insert(
        "model.norm.weight".into(),
        random.tensor(&[spec.hidden], 1.0, 0.1),
    );
    if !spec.tied {
        weights.insert(
            "lm_head.weight".into(),
            random.tensor(&[spec.vocab, spec.hidden], 0.0, 0.4),
        );
    }
    for layer in 0..spec.layers {
        let prefix = format!("model.layers.{layer}");
        for norm in ["input_layernorm", "post_attention_layernorm"] {
            weights.insert(
                format!("{prefix}.{norm}.weight"),
                random.tensor(&[spec.hidden], 1.0, 0.1),
            );
        }
        for module in [
            "q_proj",
            "k_proj",
            "v_proj",
            "o_proj",
            "gate_proj",
            "up_proj",
            "down_proj",
        ] {
            let (rows, columns) = spec.linear(module);
            let name = format!("{prefix}.{}.{module}", block(module));
            let deviation = 0.9 / (columns as f64).sqrt();
            weights.insert(
                format!("{name}.weight"),
                random.tensor(&[rows, columns], 0.0, deviation),
            );
            if spec.architecture == "qwen2" && ["q_proj", "k_proj", "v_proj"].contains(&module) {
                weights.insert(format!("{name}.bias"), random.tensor(&[rows], 0.0, 0.2));
            }
        }
        if spec.architecture == "qwen3" {
            for norm in ["q_norm", "k_norm"] {
                let gain = random.tensor(&[spec.head_dim()], 1.0, 0.1);
                weights.insert(format!("{prefix}.self_attn.{norm}.weight"), gain);
            }
        }
    }
    weights
}

fn write_weights(dir: &Path, spec: &TinySpec, weights: BTreeMap<String, Tensor>) {
    let total: usize = weights
        .values()
        .map(|w| w.elem_count() * spec.dtype.size_in_bytes())
        .sum();
    let each = weights.len().div_ceil(spec.shards.max(1));
    let weights: Vec<(String, Tensor)> = weights
        .into_iter()
        .map(|(name, weight)| (name, weight.to_dtype(spec.dtype).expect("a float type")))
        .collect();
    let mut weight_map = Map::new();
    for (index, shard) in weights.chunks(each).enumerate() {
        let file = if spec.shards <= 1 {
            "model.safetensors".to_owned()
        } else {
            format!(
                "model-{:05}-of-{:05}.safetensors",
                index + 1,
                weights.len().div_ceil(each)
            )
        };
        for (name, _) in shard {
            weight_map.insert(name.clone(), json!(file));
        }
        save(&dir.join(file), shard.iter().cloned().collect());
    }
    if spec.shards > 1 {
        let index = json!({"metadata": {"total_size": total}, "weight_map": weight_map});
        write_json(&dir.join("model.safetensors.index.json"), &index);
    }
}

/// How a generator's tokens write and how its state is read (`GENERATOR.md`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// GenerativeAdapter as published: keys and values from normed hidden states, read out by an SVD.
    Published,
    /// Keys of the site's own input, values of the next token, read out by a ridge regression.
    Associative,
}

/// The sizes of a random generator; `..GeneratorSpec::default()` gives the rest.
#[derive(Clone, Debug)]
pub struct GeneratorSpec {
    /// Which of the two forms.
    pub form: Form,
    /// Equal specs give equal files.
    pub seed: u64,
    /// Rank of the keys (`fastlora_inter_size`).
    pub r1: usize,
    /// Rank of the values (`fastlora_r`).
    pub r2: usize,
    /// Largest rank of a core (`fastlora_max_rank`).
    pub rank: usize,
    /// Tokens of a window.
    pub window: usize,
    /// Adapted linears by name: o_proj, down_proj, ...
    pub modules: Vec<&'static str>,
    /// Adapted layers; None: all.
    pub layers: Option<Vec<usize>>,
    /// `fastlora_norm`; None: svd for the published form, ridge for the associative.
    pub norm: Option<&'static str>,
    /// Key `fastlora_strategy`, if written.
    pub strategy: Option<&'static str>,
    /// Key `bos`, if written.
    pub bos: Option<bool>,
    /// Key `document_suffix`, if written.
    pub document_suffix: Option<&'static str>,
    /// Key `base_digest`, if written.
    pub base_digest: Option<String>,
}

impl Default for GeneratorSpec {
    fn default() -> Self {
        Self {
            form: Form::Associative,
            seed: 2,
            r1: 12,
            r2: 10,
            rank: 6,
            window: 8,
            modules: vec!["down_proj"],
            layers: None,
            norm: None,
            strategy: None,
            bos: None,
            document_suffix: None,
            base_digest: None,
        }
    }
}

/// Writes a random generator for the base of `base`: adapter_config.json and adapter_model.safetensors.
///
/// # Panics
/// If the folder cannot be written.
pub fn tiny_generator(dir: &Path, base: &TinySpec, spec: &GeneratorSpec) {
    fs::create_dir_all(dir).expect("a folder for the generator");
    write_json(&dir.join("adapter_config.json"), &generator_config(spec));
    let mut random = Random::new(spec.seed);
    let mut weights = BTreeMap::new();
    let layers = spec
        .layers
        .clone()
        .unwrap_or_else(|| (0..base.layers).collect());
    for layer in layers {
        for module in &spec.modules {
            let site = format!(
                "base_model.model.model.layers.{layer}.base_layer.{}.{module}",
                block(module)
            );
            let (rows, columns) = base.linear(module);
            let mut linear = |name: &str, rows: usize, columns: usize, size: f64| {
                let weight = random.tensor(&[rows, columns], 0.0, size / (columns as f64).sqrt());
                weights.insert(format!("{site}.fastlora_{name}.weight"), weight);
            };
            linear("A1", spec.r1, columns, 1.0);
            linear("A3", spec.r2, base.hidden, 1.0);
            match spec.form {
                Form::Published => linear("A2", spec.r1, base.hidden, 1.0),
                Form::Associative => linear("A3n", spec.r2, base.hidden, 0.5),
            }
            linear("B", rows, spec.r2, 0.7);
            let ones = Random::new(0).tensor(&[base.hidden], 1.0, 0.0);
            weights.insert(format!("{site}.fastlora_hidden_state_norm.weight"), ones);
            if spec.form == Form::Associative {
                let ridge = random.tensor(&[1], 0.1, 0.01);
                weights.insert(format!("{site}.fastlora_ridge"), ridge);
            }
        }
    }
    save(&dir.join("adapter_model.safetensors"), weights);
}

fn generator_config(spec: &GeneratorSpec) -> Value {
    let associative = spec.form == Form::Associative;
    let norm = spec
        .norm
        .unwrap_or(if associative { "ridge" } else { "svd" });
    let mut config = json!({
        "peft_type": "FASTLORA",
        "base_model_name_or_path": "tiny",
        "fastlora_r": spec.r2,
        "fastlora_inter_size": spec.r1,
        "fastlora_max_rank": spec.rank,
        "fastlora_alpha": spec.r2,
        "fastlora_window": spec.window,
        "fastlora_norm": norm,
        "fastlora_merge": "pre-norm-sum",
        "fastlora_param": spec.modules,
        "target_modules": spec.modules,
    });
    let keys = config.as_object_mut().expect("it was written as an object");
    let mut set = |key: &str, value: Option<Value>| {
        if let Some(value) = value {
            keys.insert(key.to_owned(), value);
        }
    };
    set(
        "fastlora_layers",
        spec.layers.as_ref().map(|layers| json!(layers)),
    );
    set(
        "fastlora_key",
        associative.then(|| json!("site_input_tied_A1")),
    );
    set(
        "fastlora_value",
        associative.then(|| json!("next_token_embedding+A3n_hidden")),
    );
    set("fastlora_skip_first", associative.then(|| json!(1)));
    set("fastlora_skip_last", associative.then(|| json!(1)));
    set("fastlora_strategy", spec.strategy.map(|s| json!(s)));
    set("bos", spec.bos.map(|b| json!(b)));
    set("document_suffix", spec.document_suffix.map(|s| json!(s)));
    set("base_digest", spec.base_digest.as_ref().map(|d| json!(d)));
    config
}

/// Pairs that the tiny tokenizer joins, in order of rank; Ġ spells a space.
const MERGES: &[(&str, &str)] = &[
    ("Ġ", "t"),
    ("h", "e"),
    ("i", "n"),
    ("Ġt", "he"),
    ("e", "r"),
    ("Ġ", "a"),
    ("o", "n"),
    ("r", "e"),
    ("Ġ", "s"),
    ("a", "t"),
    ("l", "l"),
    ("in", "g"),
    ("n", "d"),
    ("Ġa", "nd"),
];
const IM_START: usize = 256 + MERGES.len();
const IM_END: usize = IM_START + 1;
/// Tokens of the tiny tokenizer: the bytes, a few merges, `<|im_start|>` (its BOS) and `<|im_end|>` (its EOS).
pub const TINY_TOKENIZER_VOCAB: usize = IM_END + 1;

/// Writes tokenizer.json and tokenizer_config.json: a byte-level BPE whose id of a single byte is that byte, with ChatML.
///
/// # Panics
/// If the folder cannot be written.
pub fn tiny_tokenizer(dir: &Path) {
    let mut vocab = Map::new();
    for byte in 0..=255u8 {
        vocab.insert(byte_letter(byte).to_string(), json!(byte));
    }
    for (rank, (left, right)) in MERGES.iter().enumerate() {
        vocab.insert(format!("{left}{right}"), json!(256 + rank));
    }
    let special = |id: usize, content: &str| json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": true});
    let byte_level = json!({"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": true, "use_regex": true});
    let tokenizer = json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": [special(IM_START, "<|im_start|>"), special(IM_END, "<|im_end|>")],
        "normalizer": null,
        "pre_tokenizer": byte_level,
        "post_processor": null,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": null,
            "unk_token": null,
            "continuing_subword_prefix": null,
            "end_of_word_suffix": null,
            "fuse_unk": false,
            "byte_fallback": false,
            "vocab": vocab,
            "merges": MERGES.iter().map(|(left, right)| format!("{left} {right}")).collect::<Vec<_>>(),
        },
    });
    write_json(&dir.join("tokenizer.json"), &tokenizer);
    let config = json!({
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|im_start|>",
        "eos_token": "<|im_end|>",
        "add_bos_token": false,
        "chat_template": "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    });
    write_json(&dir.join("tokenizer_config.json"), &config);
}

/// GPT-2's spelling of a byte: itself where it prints, else U+0100 and on, in order.
fn byte_letter(byte: u8) -> char {
    let prints = |byte: u8| matches!(byte, b'!'..=b'~' | 0xa1..=0xac | 0xae..=0xff);
    if prints(byte) {
        return char::from(byte);
    }
    let before = (0..byte).filter(|&other| !prints(other)).count() as u32;
    char::from_u32(0x100 + before).expect("68 letters from U+0100 on")
}

fn save(path: &Path, weights: BTreeMap<String, Tensor>) {
    let weights = weights.into_iter().collect();
    safetensors::save(&weights, path).expect("a tensor file can be written");
}

fn write_json(path: &Path, value: &Value) {
    fs::write(path, format!("{value:#}\n")).expect("a JSON file can be written");
}

#[cfg(test)]
mod tests;
