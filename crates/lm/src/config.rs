//! The shape of a decoder, out of config.json or GGUF metadata.
//!
//! Unknown keys pass, values that this program cannot honour are errors that name key and value. Every
//! size is bounded and consistent with the others once a [`Config`] exists. Start at [`Config`].

use std::{fs, path::Path};

use generator::BaseShape;
use serde_json::{Map, Value};

use crate::{FileError, TokenId, gguf::Gguf};

/// A decoder's family: what its checkpoint and its attention look like.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Architecture {
    /// Llama 2, 3 and everything of that form (SmolLM2, TinyLlama).
    Llama,
    /// Mistral 7B; sliding window where the config has one.
    Mistral,
    /// Qwen 2 and 2.5: biases at q, k and v.
    Qwen2,
    /// Qwen 3: norms over each head's q and k.
    Qwen3,
}

impl Architecture {
    /// `model_type` of the HF layout.
    pub fn name(self) -> &'static str {
        match self {
            Self::Llama => "llama",
            Self::Mistral => "mistral",
            Self::Qwen2 => "qwen2",
            Self::Qwen3 => "qwen3",
        }
    }
}

/// How rotary frequencies are changed for contexts longer than those of pre-training.
#[derive(Clone, Debug, PartialEq)]
pub enum RopeScaling {
    /// Not at all.
    None,
    /// Llama 3.1's: long wavelengths are slowed down by `factor`, short ones kept, those between blended.
    Llama3 {
        /// Divisor of the frequencies of long wavelengths.
        factor: f64,
        /// Wavelengths above `original_context_length` / this are long.
        low_freq_factor: f64,
        /// Wavelengths below `original_context_length` / this are short.
        high_freq_factor: f64,
        /// Context of pre-training, in tokens.
        original_context_length: f64,
    },
    /// A divisor for each frequency, [Dh/2] (GGUF's `rope_freqs.weight`).
    Divisors(Vec<f32>),
}

/// The shape of a decoder, from config.json or GGUF metadata.
#[derive(Clone, Debug)]
pub struct Config {
    /// Its family.
    pub architecture: Architecture,
    /// Decoder layers.
    pub layers: usize,
    /// D, size of the residual stream.
    pub hidden: usize,
    /// F, size between gate/up and down.
    pub intermediate: usize,
    /// H, query heads.
    pub heads: usize,
    /// Hkv, key and value heads; divides `heads`.
    pub kv_heads: usize,
    /// Dh, size of a head; even.
    pub head_dim: usize,
    /// V, tokens of the vocabulary.
    pub vocab: usize,
    /// Positions that the model was made for.
    pub context_length: usize,
    /// eps of all norms.
    pub rms_norm_eps: f64,
    /// Base of the rotary frequencies.
    pub rope_theta: f64,
    /// What is done to these frequencies.
    pub rope_scaling: RopeScaling,
    /// Only so many keys (a query's own included) are visible to a query.
    pub sliding_window: Option<usize>,
    /// The head is the embedding table.
    pub tied_embeddings: bool,
    /// q, k and v have biases.
    pub attention_bias: bool,
    /// o has a bias.
    pub output_bias: bool,
    /// Each head's q and k are normed before the rotation.
    pub qk_norm: bool,
    /// Tokens that end a generation.
    pub eos: Vec<TokenId>,
    /// The token in front of a text, if the model has one.
    pub bos: Option<TokenId>,
}

const MAX_LAYERS: usize = 1 << 12;
const MAX_FEATURES: usize = 1 << 20;
const MAX_VOCAB: usize = 1 << 24;
const MAX_CONTEXT: usize = 1 << 24;

impl Config {
    /// Features of all query heads, H Dh.
    pub fn query_features(&self) -> usize {
        self.heads * self.head_dim
    }

    /// Features of all key (or value) heads, Hkv Dh.
    pub fn kv_features(&self) -> usize {
        self.kv_heads * self.head_dim
    }

    /// What a generator must know of this base.
    pub fn base_shape(&self) -> BaseShape {
        BaseShape {
            layers: self.layers,
            hidden: self.hidden,
            intermediate: self.intermediate,
            query: self.query_features(),
            key_value: self.kv_features(),
            vocab: self.vocab,
        }
    }

    /// Rotary frequencies 1/theta^(2i/Dh) with their scaling, [Dh/2].
    pub fn rope_frequencies(&self) -> Vec<f64> {
        let plain = (0..self.head_dim / 2).map(|i| {
            self.rope_theta
                .powf(-((2 * i) as f64) / self.head_dim as f64)
        });
        match &self.rope_scaling {
            RopeScaling::None => plain.collect(),
            RopeScaling::Divisors(divisors) => plain
                .zip(divisors)
                .map(|(f, &d)| f / f64::from(d))
                .collect(),
            RopeScaling::Llama3 {
                factor,
                low_freq_factor,
                high_freq_factor,
                original_context_length,
            } => plain
                .map(|f| {
                    // smooth runs from 0 (long wavelengths) to 1 (short ones); f/factor to f.
                    let turns = original_context_length * f / std::f64::consts::TAU;
                    let smooth = ((turns - low_freq_factor) / (high_freq_factor - low_freq_factor))
                        .clamp(0.0, 1.0);
                    (1.0 - smooth) * f / factor + smooth * f
                })
                .collect(),
        }
    }

    /// Reads `config.json` (and `generation_config.json`, whose `eos_token_id` goes before) of a folder.
    ///
    /// # Errors
    /// [`FileError`] if it cannot be read, is no such config, or asks for what is not there.
    pub fn from_folder(folder: &Path) -> Result<Self, FileError> {
        let path = folder.join("config.json");
        let keys = Keys::read(&path)?;
        let mut config = from_json(&keys)?;
        let generation = folder.join("generation_config.json");
        if generation.is_file() {
            let eos = Keys::read(&generation)?.tokens("eos_token_id")?;
            if !eos.is_empty() {
                config.eos = eos;
            }
        }
        config.check(&path)?;
        Ok(config)
    }

    /// Reads GGUF metadata. The divisors of `rope_freqs.weight`, if any, come with the weights.
    pub(crate) fn from_gguf(gguf: &Gguf) -> Result<Self, FileError> {
        let config = from_metadata(gguf)?;
        config.check(gguf.path())?;
        Ok(config)
    }

    fn check(&self, path: &Path) -> Result<(), FileError> {
        let bounded = |name: &str, value: usize, limit: usize| {
            if (1..=limit).contains(&value) {
                return Ok(());
            }
            Err(FileError::unsupported(
                path,
                format!("{name} of {value} (1 to {limit} are)"),
            ))
        };
        bounded("a number of layers", self.layers, MAX_LAYERS)?;
        bounded("a hidden size", self.hidden, MAX_FEATURES)?;
        bounded("an intermediate size", self.intermediate, MAX_FEATURES)?;
        bounded("a number of heads", self.heads, MAX_FEATURES)?;
        bounded("a number of key/value heads", self.kv_heads, self.heads)?;
        bounded("a head size", self.head_dim, MAX_FEATURES)?;
        bounded("a vocabulary", self.vocab, MAX_VOCAB)?;
        bounded("a context length", self.context_length, MAX_CONTEXT)?;
        bounded(
            "a number of query features",
            self.query_features(),
            MAX_FEATURES,
        )?;
        if !self.head_dim.is_multiple_of(2) {
            return Err(FileError::unsupported(
                path,
                format!("an odd head size of {}", self.head_dim),
            ));
        }
        if !self.heads.is_multiple_of(self.kv_heads) {
            return Err(FileError::unsupported(
                path,
                format!(
                    "{} heads over {} key/value heads",
                    self.heads, self.kv_heads
                ),
            ));
        }
        if self.sliding_window == Some(0) {
            return Err(FileError::unsupported(path, "a sliding window of 0"));
        }
        let positive = |x: f64| x.is_finite() && x > 0.0;
        if !positive(self.rms_norm_eps) || !positive(self.rope_theta) {
            let (eps, theta) = (self.rms_norm_eps, self.rope_theta);
            return Err(FileError::unsupported(
                path,
                format!("a norm eps of {eps} with a rope theta of {theta}"),
            ));
        }
        let frequencies = self.rope_frequencies();
        if !frequencies.iter().all(|f| f.is_finite()) {
            return Err(FileError::unsupported(
                path,
                format!("the rope scaling {:?}", self.rope_scaling),
            ));
        }
        Ok(())
    }
}

fn from_json(keys: &Keys<'_>) -> Result<Config, FileError> {
    let architecture = match keys.text("model_type")?.as_deref() {
        Some("llama") => Architecture::Llama,
        Some("mistral") => Architecture::Mistral,
        Some("qwen2") => Architecture::Qwen2,
        Some("qwen3") => Architecture::Qwen3,
        other => return Err(keys.unsupported("model_type", other.unwrap_or("missing"))),
    };
    if let Some(other) = keys.text("hidden_act")?.filter(|act| act != "silu") {
        return Err(keys.unsupported("hidden_act", &other));
    }
    for key in ["mlp_bias", "use_sliding_window"] {
        if keys.flag(key)? == Some(true) {
            return Err(keys.unsupported(key, "true"));
        }
    }
    if let Some(factor) = keys
        .float("partial_rotary_factor")?
        .filter(|&factor| factor != 1.0)
    {
        return Err(keys.unsupported("partial_rotary_factor", &factor.to_string()));
    }
    if keys
        .0
        .get("quantization_config")
        .is_some_and(|value| !value.is_null())
    {
        return Err(keys.unsupported("quantization_config", "an object"));
    }

    let hidden = keys.required("hidden_size")?;
    let heads = keys.required("num_attention_heads")?;
    let bias = keys.flag("attention_bias")?;
    let (rope_theta, rope_scaling) = rope_of_json(keys)?;
    Ok(Config {
        architecture,
        layers: keys.required("num_hidden_layers")?,
        hidden,
        intermediate: keys.required("intermediate_size")?,
        heads,
        kv_heads: keys.size("num_key_value_heads")?.unwrap_or(heads),
        head_dim: keys.size("head_dim")?.unwrap_or(hidden / heads.max(1)),
        vocab: keys.required("vocab_size")?,
        context_length: keys.required("max_position_embeddings")?,
        rms_norm_eps: keys.float("rms_norm_eps")?.unwrap_or(1e-6),
        rope_theta,
        rope_scaling,
        // Qwen keeps the key beside a switch that is off.
        sliding_window: match architecture {
            Architecture::Mistral => keys.size("sliding_window")?,
            Architecture::Llama | Architecture::Qwen2 | Architecture::Qwen3 => None,
        },
        tied_embeddings: keys.flag("tie_word_embeddings")?.unwrap_or(false),
        // Qwen 2 has its biases whatever a key says.
        attention_bias: bias.unwrap_or(false) || architecture == Architecture::Qwen2,
        output_bias: bias.unwrap_or(false) && architecture != Architecture::Qwen2,
        qk_norm: architecture == Architecture::Qwen3,
        eos: keys.tokens("eos_token_id")?,
        bos: keys.tokens("bos_token_id")?.first().copied(),
    })
}

/// Theta and scaling, from `rope_parameters` (transformers 5) or `rope_theta` and `rope_scaling`.
fn rope_of_json(keys: &Keys<'_>) -> Result<(f64, RopeScaling), FileError> {
    let object = |key| match keys.0.get(key) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::Object(map)) => Ok(Some(Keys(map.clone(), keys.1))),
        Some(_) => Err(keys.damaged(key, "an object")),
    };
    let inner = match object("rope_parameters")? {
        Some(parameters) => Some(parameters),
        None => object("rope_scaling")?,
    };
    let mut theta = keys.float("rope_theta")?;
    let mut scaling = RopeScaling::None;
    if let Some(inner) = inner {
        theta = inner.float("rope_theta")?.or(theta);
        let kind = inner.text("rope_type")?.or(inner.text("type")?);
        scaling = match kind.as_deref() {
            None | Some("default") => RopeScaling::None,
            Some("llama3") => RopeScaling::Llama3 {
                factor: inner.required_float("factor")?,
                low_freq_factor: inner.required_float("low_freq_factor")?,
                high_freq_factor: inner.required_float("high_freq_factor")?,
                original_context_length: inner
                    .required_float("original_max_position_embeddings")?,
            },
            Some(other) => return Err(keys.unsupported("rope_scaling.rope_type", other)),
        };
    }
    Ok((theta.unwrap_or(10_000.0), scaling))
}

/// A JSON object and the file it is from.
struct Keys<'a>(Map<String, Value>, &'a Path);

impl<'a> Keys<'a> {
    fn read(path: &'a Path) -> Result<Self, FileError> {
        const MAX_CONFIG_BYTES: u64 = 1 << 24;
        let length = fs::metadata(path)
            .map_err(|e| FileError::io(path, e))?
            .len();
        if length > MAX_CONFIG_BYTES {
            return Err(FileError::unsupported(
                path,
                format!("a config of {length} bytes"),
            ));
        }
        let bytes = fs::read(path).map_err(|e| FileError::io(path, e))?;
        match serde_json::from_slice(&bytes) {
            Ok(Value::Object(map)) => Ok(Self(map, path)),
            Ok(_) => Err(FileError::header(path, "it is not a JSON object")),
            Err(error) => Err(FileError::header(path, format!("it is not JSON: {error}"))),
        }
    }

    fn unsupported(&self, key: &str, value: &str) -> FileError {
        FileError::unsupported(self.1, format!("{key} = {value}"))
    }

    fn damaged(&self, key: &str, kind: &str) -> FileError {
        FileError::header(self.1, format!("{key} is not {kind}"))
    }

    fn typed<T>(
        &self,
        key: &str,
        kind: &str,
        take: impl FnOnce(&Value) -> Option<T>,
    ) -> Result<Option<T>, FileError> {
        match self.0.get(key) {
            None | Some(Value::Null) => Ok(None),
            Some(value) => take(value).map(Some).ok_or_else(|| self.damaged(key, kind)),
        }
    }

    fn text(&self, key: &str) -> Result<Option<String>, FileError> {
        self.typed(key, "a string", |v| v.as_str().map(str::to_owned))
    }

    fn flag(&self, key: &str) -> Result<Option<bool>, FileError> {
        self.typed(key, "a boolean", Value::as_bool)
    }

    fn float(&self, key: &str) -> Result<Option<f64>, FileError> {
        self.typed(key, "a number", Value::as_f64)
    }

    fn required_float(&self, key: &str) -> Result<f64, FileError> {
        self.float(key)?
            .ok_or_else(|| FileError::header(self.1, format!("it has no {key}")))
    }

    fn size(&self, key: &str) -> Result<Option<usize>, FileError> {
        self.typed(key, "a size", |v| {
            v.as_u64().and_then(|n| usize::try_from(n).ok())
        })
    }

    fn required(&self, key: &str) -> Result<usize, FileError> {
        self.size(key)?
            .ok_or_else(|| FileError::header(self.1, format!("it has no {key}")))
    }

    /// One token id or a list of them.
    fn tokens(&self, key: &str) -> Result<Vec<TokenId>, FileError> {
        let token = |v: &Value| v.as_u64().and_then(|n| u32::try_from(n).ok()).map(TokenId);
        let tokens = self.typed(key, "a token id or a list of them", |v| match v {
            Value::Array(items) => items.iter().map(token).collect(),
            other => token(other).map(|t| vec![t]),
        })?;
        Ok(tokens.unwrap_or_default())
    }
}

fn from_metadata(gguf: &Gguf) -> Result<Config, FileError> {
    let path = gguf.path();
    let missing = |key: &str| FileError::header(path, format!("it has no {key}"));
    let size = |value: u64, key: &str| {
        usize::try_from(value).map_err(|_| FileError::unsupported(path, format!("{key} = {value}")))
    };
    let name = gguf
        .string("general.architecture")?
        .ok_or_else(|| missing("general.architecture"))?;
    let architecture = match name {
        "llama" => Architecture::Llama,
        "qwen2" => Architecture::Qwen2,
        "qwen3" => Architecture::Qwen3,
        other => {
            return Err(FileError::unsupported(
                path,
                format!("general.architecture = {other}"),
            ));
        }
    };
    let key = |suffix: &str| format!("{name}.{suffix}");
    let optional = |suffix: &str| match gguf.u64(&key(suffix))? {
        Some(value) => Ok(Some(size(value, &key(suffix))?)),
        None => Ok::<_, FileError>(None),
    };
    let required = |suffix: &str| optional(suffix)?.ok_or_else(|| missing(&key(suffix)));

    if let Some(experts) = optional("expert_count")?.filter(|&n| n > 0) {
        return Err(FileError::unsupported(
            path,
            format!("{name}.expert_count = {experts}"),
        ));
    }
    if let Some(kind) = gguf
        .string(&key("rope.scaling.type"))?
        .filter(|&kind| kind != "none")
    {
        return Err(FileError::unsupported(
            path,
            format!("{name}.rope.scaling.type = {kind}"),
        ));
    }
    let hidden = required("embedding_length")?;
    let heads = required("attention.head_count")?;
    let head_dim = optional("attention.key_length")?.unwrap_or(hidden / heads.max(1));
    for suffix in ["rope.dimension_count", "attention.value_length"] {
        if let Some(other) = optional(suffix)?.filter(|&n| n != head_dim) {
            return Err(FileError::unsupported(
                path,
                format!("{name}.{suffix} = {other} with heads of {head_dim}"),
            ));
        }
    }
    let embedding = gguf
        .tensor("token_embd.weight")
        .ok_or_else(|| missing("token_embd.weight"))?;
    let &[_, vocab] = embedding.shape.as_slice() else {
        return Err(FileError::header(path, "token_embd.weight is not a matrix"));
    };
    let token = |key: &str| match gguf.u64(key)? {
        Some(id) => u32::try_from(id)
            .map(|id| Some(TokenId(id)))
            .map_err(|_| FileError::header(path, format!("{key} = {id}"))),
        None => Ok(None),
    };
    let mut eos = Vec::new();
    for key in ["tokenizer.ggml.eos_token_id", "tokenizer.ggml.eot_token_id"] {
        if let Some(id) = token(key)?.filter(|id| !eos.contains(id)) {
            eos.push(id);
        }
    }
    Ok(Config {
        architecture,
        layers: required("block_count")?,
        hidden,
        intermediate: required("feed_forward_length")?,
        heads,
        kv_heads: optional("attention.head_count_kv")?.unwrap_or(heads),
        head_dim,
        vocab: size(vocab, "the vocabulary")?,
        context_length: required("context_length")?,
        rms_norm_eps: gguf
            .f64(&key("attention.layer_norm_rms_epsilon"))?
            .ok_or_else(|| missing(&key("attention.layer_norm_rms_epsilon")))?,
        rope_theta: gguf.f64(&key("rope.freq_base"))?.unwrap_or(10_000.0),
        rope_scaling: RopeScaling::None,
        sliding_window: optional("attention.sliding_window")?.filter(|&n| n > 0),
        tied_embeddings: gguf.tensor("output.weight").is_none(),
        // A Qwen2 file that lost its biases is refused for the missing tensor, not loaded without.
        attention_bias: architecture == Architecture::Qwen2
            || gguf.tensor("blk.0.attn_q.bias").is_some(),
        output_bias: gguf.tensor("blk.0.attn_output.bias").is_some(),
        qk_norm: architecture == Architecture::Qwen3,
        eos,
        bos: token("tokenizer.ggml.bos_token_id")?,
    })
}
