//! adapter_config.json of a generator: published keys and ours, parsed into checked types.
//!
//! Unknown keys pass, as foreign tools write many; a value that this crate cannot honour is an error that
//! names key and value. A missing key means the published behaviour. Start at [`Config::parse`].

use serde_json::{Map, Value};

use crate::{error::Error, site::Module};

/// What a token writes into the state.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Write {
    /// k = A2 n, v = A3 n of the normed residual n (arXiv 2411.05877).
    Published,
    /// k = A1 x of the site's own input, v = A3 u + A3n n with u the next token's normed embedding.
    Associative,
}

/// How the state becomes the matrix N [R1, R2] that a core stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ReadOut {
    /// N = U_q V_qᵀ of the truncated SVD of S: every kept singular value becomes 1.
    Svd,
    /// N = S / ||S||_F.
    Frobenius,
    /// N = S / sigma_1.
    Spectral,
    /// N = (G + lambda I)⁻¹ S.
    Ridge,
}

/// How the windows of a context see each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Strategy {
    /// The whole context is one window.
    Concat,
    /// Each window is encoded by the bare base.
    Parallel,
    /// Each window is encoded by the model adapted with the windows before it.
    Sequential,
}

/// The parsed adapter_config.json.
#[derive(Clone, Debug)]
pub struct Config {
    /// What a token writes.
    pub write: Write,
    /// How a core is read out.
    pub read_out: ReadOut,
    /// R1, size of keys (`fastlora_inter_size`; null or missing: R2).
    pub r1: usize,
    /// R2, size of values (`fastlora_r`).
    pub r2: usize,
    /// Largest rank of a core that the svd read-out makes, and of a truncated ridge (`fastlora_max_rank`).
    pub max_rank: usize,
    /// The delta is scaled with alpha / R2 (`fastlora_alpha`).
    pub alpha: f64,
    /// W, tokens of a window (`fastlora_window`).
    pub window: usize,
    /// The strategy it was trained for (`fastlora_strategy`; default: parallel with a ridge read-out, else sequential).
    pub strategy: Strategy,
    /// Adapted linears of a layer, in the order in which a layer computes them (`fastlora_param`, else `target_modules`).
    pub modules: Vec<Module>,
    /// Adapted layers, ascending (`fastlora_layers`); `None`: all.
    pub layers: Option<Vec<usize>>,
    /// The first token of a window writes nothing (`fastlora_skip_first`).
    pub skip_first: bool,
    /// The last token of a window writes nothing (`fastlora_skip_last`): in the associative form it has no successor.
    pub skip_last: bool,
    /// Whether contexts and prompts begin with a BOS (`bos`); `None`: as the tokenizer does.
    pub bos: Option<bool>,
    /// Text that ends a document (`document_suffix`).
    pub document_suffix: String,
    /// How `ask` puts a question, with `{question}` in it (`prompt_format`).
    pub prompt_format: Option<String>,
    /// Digests of weight files that are this generator's base (`base_digest`, one or a list); empty: not said.
    pub base_digest: Vec<String>,
    /// Name of the base (`base_model_name_or_path`).
    pub base_model: String,
}

/// Sizes beyond this are lies: R1 x R2 sums of it would hold 4 Gi values a site.
const MAX_RANK: usize = 1 << 16;
/// Longest window that a config may ask for, in tokens.
const MAX_WINDOW: usize = 1 << 24;

impl Config {
    /// Parses the text of an adapter_config.json.
    ///
    /// # Errors
    /// [`Error::MissingKey`], [`Error::UnsupportedValue`]; text that is no JSON object is the latter, too.
    pub fn parse(json: &[u8]) -> Result<Self, Error> {
        let keys = match serde_json::from_slice(json) {
            Ok(Value::Object(keys)) => Keys(keys),
            Ok(_) => return Err(unsupported("(file)", "no JSON object", "a JSON object")),
            Err(fault) => {
                return Err(unsupported(
                    "(file)",
                    &format!("no JSON: {fault}"),
                    "a JSON object",
                ));
            }
        };
        keys.only("peft_type", &["FASTLORA"], true)?;
        keys.only("fastlora_arch", &["aassbb"], false)?;
        keys.only("fastlora_merge", &["pre-norm-sum"], false)?;
        keys.only("bias", &["none"], false)?;
        keys.zero("fastlora_gist_len")?;
        keys.zero("lora_r")?;

        let write = keys.write()?;
        let read_out =
            match keys.word("fastlora_norm", &["svd", "frobenius", "spectral", "ridge"])? {
                Some(1) => ReadOut::Frobenius,
                Some(2) => ReadOut::Spectral,
                Some(3) => ReadOut::Ridge,
                _ => ReadOut::Svd,
            };
        let strategy = match keys.word(
            "fastlora_strategy",
            &["concat", "parallel", "sequential", "sequential-long"],
        )? {
            Some(0) => Strategy::Concat,
            Some(1) => Strategy::Parallel,
            Some(_) => Strategy::Sequential,
            None if read_out == ReadOut::Ridge => Strategy::Parallel,
            None => Strategy::Sequential,
        };
        let r2 = keys
            .size("fastlora_r", MAX_RANK)?
            .ok_or(Error::MissingKey { key: "fastlora_r" })?;
        let r1 = keys.size("fastlora_inter_size", MAX_RANK)?.unwrap_or(r2);
        let max_rank = keys
            .size("fastlora_max_rank", MAX_RANK)?
            .ok_or(Error::MissingKey {
                key: "fastlora_max_rank",
            })?;
        let skip_last = keys.flag("fastlora_skip_last", "0 or 1")?;
        let skip_last = match write {
            Write::Published if skip_last == Some(true) => {
                return Err(keys.refuse("fastlora_skip_last", "0 in the published form"));
            }
            Write::Associative if skip_last == Some(false) => {
                return Err(keys.refuse(
                    "fastlora_skip_last",
                    "1 with next_token_embedding: the last token has no successor",
                ));
            }
            Write::Published => false,
            Write::Associative => true,
        };
        Ok(Self {
            write,
            read_out,
            r1,
            r2,
            max_rank: max_rank.min(r1).min(r2),
            alpha: keys.alpha()?,
            window: keys
                .size("fastlora_window", MAX_WINDOW)?
                .ok_or(Error::MissingKey {
                    key: "fastlora_window",
                })?,
            strategy,
            modules: keys.modules()?,
            layers: keys.layers()?,
            skip_first: keys.flag("fastlora_skip_first", "0 or 1")?.unwrap_or(false),
            skip_last,
            bos: keys.flag("bos", "true or false")?,
            document_suffix: keys.text("document_suffix")?.unwrap_or_default(),
            prompt_format: keys.prompt_format()?,
            base_digest: keys.texts("base_digest")?.unwrap_or_default(),
            base_model: keys.text("base_model_name_or_path")?.unwrap_or_default(),
        })
    }

    /// r of an adapter that a core is exported as, at most: that of a truncated core, else R2.
    pub fn export_rank(&self) -> usize {
        let Self {
            r1, r2, max_rank, ..
        } = *self;
        match self.read_out {
            ReadOut::Svd => max_rank,
            ReadOut::Ridge if max_rank * (r1 + r2) < r1 * r2 => max_rank,
            ReadOut::Frobenius | ReadOut::Spectral | ReadOut::Ridge => r2,
        }
    }

    /// Whether a weight file with this digest is a base of the generator; true if the config names none.
    pub fn names_base(&self, digest: &str) -> bool {
        self.base_digest.is_empty()
            || self
                .base_digest
                .iter()
                .any(|known| known.eq_ignore_ascii_case(digest))
    }
}

fn unsupported(key: &'static str, value: &str, supported: &'static str) -> Error {
    Error::UnsupportedValue {
        key,
        value: value.to_owned(),
        supported,
    }
}

/// The file's keys; null counts as missing throughout.
struct Keys(Map<String, Value>);

impl Keys {
    fn get(&self, key: &'static str) -> Option<&Value> {
        self.0.get(key).filter(|value| !value.is_null())
    }

    fn refuse(&self, key: &'static str, supported: &'static str) -> Error {
        let mut value = self.get(key).unwrap_or(&Value::Null).to_string();
        if value.chars().count() > 200 {
            value = value.chars().take(200).chain("...".chars()).collect();
        }
        Error::UnsupportedValue {
            key,
            value,
            supported,
        }
    }

    fn only(
        &self,
        key: &'static str,
        words: &'static [&'static str; 1],
        required: bool,
    ) -> Result<(), Error> {
        match self.get(key) {
            None if required => Err(Error::MissingKey { key }),
            None => Ok(()),
            Some(Value::String(word)) if word == words[0] => Ok(()),
            Some(_) => Err(self.refuse(key, words[0])),
        }
    }

    fn zero(&self, key: &'static str) -> Result<(), Error> {
        match self.get(key) {
            Some(value) if value.as_f64() != Some(0.0) => Err(self.refuse(key, "0")),
            _ => Ok(()),
        }
    }

    /// Index of the word in the list of those that are supported.
    fn word(&self, key: &'static str, words: &[&'static str]) -> Result<Option<usize>, Error> {
        let Some(value) = self.get(key) else {
            return Ok(None);
        };
        let found = value
            .as_str()
            .and_then(|word| words.iter().position(|known| *known == word));
        let supported = match key {
            "fastlora_norm" => "svd, frobenius, spectral, ridge",
            "fastlora_strategy" => "concat, parallel, sequential, sequential-long",
            "fastlora_key" => "site_input_tied_A1",
            _ => "next_token_embedding+A3n_hidden",
        };
        found.map(Some).ok_or_else(|| self.refuse(key, supported))
    }

    fn write(&self) -> Result<Write, Error> {
        let key = self.word("fastlora_key", &["site_input_tied_A1"])?;
        let value = self.word("fastlora_value", &["next_token_embedding+A3n_hidden"])?;
        match (key, value) {
            (None, None) => Ok(Write::Published),
            (Some(_), Some(_)) => Ok(Write::Associative),
            (Some(_), None) => Err(Error::MissingKey {
                key: "fastlora_value",
            }),
            (None, Some(_)) => Err(Error::MissingKey {
                key: "fastlora_key",
            }),
        }
    }

    fn size(&self, key: &'static str, most: usize) -> Result<Option<usize>, Error> {
        let Some(value) = self.get(key) else {
            return Ok(None);
        };
        let size = value
            .as_u64()
            .and_then(|size| usize::try_from(size).ok())
            .filter(|size| (1..=most).contains(size));
        size.map(Some)
            .ok_or_else(|| self.refuse(key, "a positive integer of sensible size"))
    }

    fn alpha(&self) -> Result<f64, Error> {
        let key = "fastlora_alpha";
        let value = self.get(key).ok_or(Error::MissingKey { key })?;
        value
            .as_f64()
            .filter(|alpha| alpha.is_finite() && *alpha > 0.0)
            .ok_or_else(|| self.refuse(key, "a positive number"))
    }

    fn flag(&self, key: &'static str, supported: &'static str) -> Result<Option<bool>, Error> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Bool(flag)) => Ok(Some(*flag)),
            Some(value) => match value.as_u64() {
                Some(0) => Ok(Some(false)),
                Some(1) => Ok(Some(true)),
                _ => Err(self.refuse(key, supported)),
            },
        }
    }

    fn text(&self, key: &'static str) -> Result<Option<String>, Error> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text.clone())),
            Some(_) => Err(self.refuse(key, "a string")),
        }
    }

    /// A string, or a list of strings.
    fn texts(&self, key: &'static str) -> Result<Option<Vec<String>>, Error> {
        let refuse = || self.refuse(key, "a string or a list of strings");
        match self.get(key) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(vec![text.clone()])),
            Some(Value::Array(items)) => {
                let texts: Option<Vec<_>> = items
                    .iter()
                    .map(|item| item.as_str().map(str::to_owned))
                    .collect();
                texts.map(Some).ok_or_else(refuse)
            }
            Some(_) => Err(refuse()),
        }
    }

    fn prompt_format(&self) -> Result<Option<String>, Error> {
        match self.text("prompt_format")? {
            Some(format) if !format.contains("{question}") => {
                Err(self.refuse("prompt_format", "text with {question} in it"))
            }
            format => Ok(format),
        }
    }

    fn modules(&self) -> Result<Vec<Module>, Error> {
        let key = if self.get("fastlora_param").is_some() {
            "fastlora_param"
        } else {
            "target_modules"
        };
        let names = self.texts(key)?.ok_or(Error::MissingKey {
            key: "fastlora_param",
        })?;
        let modules: Option<Vec<_>> = names.iter().map(|name| Module::from_name(name)).collect();
        let mut modules = modules
            .filter(|modules| !modules.is_empty())
            .ok_or_else(|| {
                self.refuse(
                    key,
                    "some of q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj",
                )
            })?;
        modules.sort_unstable();
        modules.dedup();
        Ok(modules)
    }

    fn layers(&self) -> Result<Option<Vec<usize>>, Error> {
        let key = if self.get("fastlora_layers").is_some() {
            "fastlora_layers"
        } else {
            "layers_to_transform"
        };
        let Some(value) = self.get(key) else {
            return Ok(None);
        };
        let index = |item: &Value| item.as_u64().and_then(|layer| usize::try_from(layer).ok());
        let layers: Option<Vec<usize>> = match value {
            Value::Array(items) => items.iter().map(index).collect(),
            single => index(single).map(|layer| vec![layer]),
        };
        let mut layers = layers
            .filter(|layers| !layers.is_empty())
            .ok_or_else(|| self.refuse(key, "a list of layer indices"))?;
        layers.sort_unstable();
        layers.dedup();
        Ok(Some(layers))
    }
}

#[cfg(test)]
mod tests;
