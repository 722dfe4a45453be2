//! A frozen decoder's tensors, one by one, for who computes elsewhere than [`crate::Lm`]: the same files, names, order of rows and digest.
//!
//! Holds no weight. Start at [`Tensors::read`].

use std::path::Path;

use crate::{
    Config, Error, LoadOptions,
    config::RopeScaling,
    gguf::Gguf,
    weights::{Rows, Weights, digest, safetensors_files},
};

/// The files of a decoder, to be read tensor by tensor.
pub struct Tensors {
    pub(crate) config: Config,
    pub(crate) weights: Weights,
    pub(crate) digest: String,
}

impl Tensors {
    /// `path`: as for [`crate::Lm::load`].
    ///
    /// # Errors
    /// As there, up to the first weight.
    pub fn open(path: &Path) -> Result<Self, Error> {
        Self::open_for(path, LoadOptions::default())
    }

    /// The same for weights that are held as `options` say.
    pub(crate) fn open_for(path: &Path, options: LoadOptions) -> Result<Self, Error> {
        let (mut config, mut weights, files) = if path.is_dir() {
            // The same weights under another config (say, another rope_theta) are another function.
            let mut files = vec![path.join("config.json")];
            files.extend(safetensors_files(path)?);
            let weights = Weights::from_folder(path, options)?;
            (Config::from_folder(path)?, weights, files)
        } else {
            let gguf = Gguf::open(path)?;
            let config = Config::from_gguf(&gguf)?;
            let weights = Weights::from_gguf(gguf, config.architecture, options)?;
            (config, weights, vec![path.to_owned()])
        };
        if let Some(divisors) = weights.rope_divisors(config.head_dim / 2)? {
            config.rope_scaling = RopeScaling::Divisors(divisors);
        }
        Ok(Self {
            config,
            weights,
            digest: digest(&files)?,
        })
    }

    /// Sizes and switches.
    pub fn config(&self) -> &Config {
        &self.config
    }

    /// As [`crate::Lm::digest`].
    pub fn digest(&self) -> &str {
        &self.digest
    }

    /// Elements read so far.
    pub fn parameters(&self) -> u64 {
        self.weights.parameters()
    }

    /// A tensor by its name in the HF layout, in f32, row by row; rows of q and k in the order of halves.
    ///
    /// # Errors
    /// [`Error::MissingTensor`], also for a name that no decoder has, [`Error::Shape`], [`Error::File`].
    pub fn read(&mut self, name: &str) -> Result<Vec<f32>, Error> {
        let missing = || Error::MissingTensor {
            name: name.to_owned(),
        };
        let (shape, rows) = self.shape_of(name).ok_or_else(missing)?;
        self.weights.values(name, &shape, rows)
    }

    /// A GGUF file's matrix as it lies there, by its name in the HF layout: the format's name and its bytes, row by row, rows of q and k in
    /// the order of halves. None if it is of none of these formats.
    ///
    /// # Errors
    /// As [`Self::read`].
    pub fn read_as(
        &mut self,
        name: &str,
        formats: &[&str],
    ) -> Result<Option<(&'static str, Vec<u8>)>, Error> {
        let missing = || Error::MissingTensor {
            name: name.to_owned(),
        };
        let format = self.weights.format_of(name);
        if format.is_none_or(|format| !formats.contains(&format)) {
            return Ok(None);
        }
        let (shape, rows) = self.shape_of(name).ok_or_else(missing)?;
        self.weights.bytes(name, &shape, rows).map(Some)
    }

    /// The shape that a tensor has to have, and the order of its rows.
    fn shape_of(&self, name: &str) -> Option<(Vec<usize>, Rows)> {
        let Config {
            vocab,
            hidden,
            intermediate,
            head_dim,
            ..
        } = self.config;
        let (query, key_value) = (self.config.query_features(), self.config.kv_features());
        let rotary = Rows::Rotary { head_dim };
        let plain = |shape: Vec<usize>| Some((shape, Rows::Plain));
        match name {
            "model.embed_tokens.weight" | "lm_head.weight" => return plain(vec![vocab, hidden]),
            "model.norm.weight" => return plain(vec![hidden]),
            _ => {}
        }
        let (_, rest) = name.strip_prefix("model.layers.")?.split_once('.')?;
        match rest {
            "input_layernorm.weight" | "post_attention_layernorm.weight" => plain(vec![hidden]),
            "self_attn.q_norm.weight" | "self_attn.k_norm.weight" => plain(vec![head_dim]),
            "self_attn.q_proj.weight" => Some((vec![query, hidden], rotary)),
            "self_attn.k_proj.weight" => Some((vec![key_value, hidden], rotary)),
            "self_attn.v_proj.weight" => plain(vec![key_value, hidden]),
            "self_attn.q_proj.bias" => Some((vec![query], rotary)),
            "self_attn.k_proj.bias" => Some((vec![key_value], rotary)),
            "self_attn.v_proj.bias" => plain(vec![key_value]),
            "self_attn.o_proj.weight" => plain(vec![hidden, query]),
            "mlp.gate_proj.weight" | "mlp.up_proj.weight" => plain(vec![intermediate, hidden]),
            "mlp.down_proj.weight" => plain(vec![hidden, intermediate]),
            _ => None,
        }
    }
}
