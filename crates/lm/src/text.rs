//! The text side of a model: tokenizer, chat template, incremental tokenisation and detokenisation.
//!
//! Knows nothing of weights and sessions. Everything that people write is encoded in segments with safe
//! cuts between them (`boundary`), whether it comes at once or in chunks, so both give the same tokens.
//! Start at [`Text::load`] and [`DocumentTokenizer`].

mod boundary;
mod chat;
mod document;
mod patterns;
mod pieces;
mod source;
#[cfg(test)]
mod tests;

use std::{path::Path, sync::Arc};

use serde_json::Value;
use tokenizers::{
    Model, NormalizedString, Normalizer, NormalizerWrapper, OffsetReferential, OffsetType,
    PreTokenizedString, PreTokenizer, PreTokenizerWrapper, Tokenizer,
};

pub use document::{DocumentTokenizer, MAX_HELD_BYTES};
pub use pieces::TextDecoder;

use self::{boundary::Boundaries, chat::ChatTemplate, pieces::Pieces};
use crate::files::FileError;

/// An id of a model's vocabulary.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TokenId(pub u32);

/// What can go wrong between text and tokens.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file of the model cannot be read, or says what cannot be.
    #[error(transparent)]
    File(#[from] FileError),
    /// A tokenizer that this program cannot use.
    #[error("not supported: {what}")]
    Unsupported {
        /// The part of it, by the name that the file gives it.
        what: String,
    },
    /// The tokenizer's parts contradict each other, or it has no token for a text.
    #[error("the tokenizer failed: {what}")]
    Tokenizer {
        /// What it said.
        what: String,
    },
    /// No token of the vocabulary has this id.
    #[error("token {} is not in the vocabulary of {vocab}", token.0)]
    UnknownToken {
        /// The id.
        token: TokenId,
        /// Ids are below this.
        vocab: usize,
    },
    /// The model has no chat template: ask it with plain text.
    #[error("the model has no chat template")]
    NoChatTemplate,
    /// The chat template does not take this conversation, or is not one.
    #[error("the chat template failed: {what}")]
    Template {
        /// What it said, and where.
        what: String,
    },
}

/// A turn of a conversation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Message {
    /// Who speaks: system, user, assistant, or what else the template knows.
    pub role: String,
    /// What is said.
    pub content: String,
}

/// Tokenizer and chat template of a model; cheap to clone, `Send` and `Sync`.
#[derive(Clone)]
pub struct Text {
    inner: Arc<Inner>,
}

/// What all clones share.
struct Inner {
    /// Model and added tokens; its other parts are unused.
    tokenizer: Tokenizer,
    /// For the beginning of a text.
    first: Pipeline,
    /// For what follows a cut: puts no space in front.
    inside: Pipeline,
    /// Whether text behind a special token begins like a text.
    restarts: bool,
    boundaries: Boundaries,
    pieces: Pieces,
    bos: Option<TokenId>,
    eos: Option<TokenId>,
    adds_bos: bool,
    template: ChatTemplate,
}

/// What happens to a text before the model sees its words.
struct Pipeline {
    normalizer: Option<NormalizerWrapper>,
    pre_tokenizer: Option<PreTokenizerWrapper>,
}

/// A tokenizer as its files have it.
struct Source {
    /// Model and added tokens.
    tokenizer: Tokenizer,
    /// The other parts, as tokenizer.json writes them.
    normalizer: Value,
    pre_tokenizer: Value,
    decoder: Value,
    bos: Option<TokenId>,
    eos: Option<TokenId>,
    adds_bos: bool,
    /// The chat template's text.
    template: Option<String>,
}

impl Text {
    /// `path`: a GGUF file (tokenizer and template out of its metadata) or a folder with tokenizer.json and, if the
    /// model has them, tokenizer_config.json and chat_template.jinja or .json.
    ///
    /// # Errors
    /// [`Error::File`] for a file that is missing or damaged; [`Error::Unsupported`] for a tokenizer of another kind,
    /// named; [`Error::Tokenizer`] if its parts contradict each other. A broken chat template is an error of
    /// [`Text::encode_chat`] only.
    pub fn load(path: &Path) -> Result<Self, Error> {
        let source = if path.is_dir() {
            source::from_folder(path)?
        } else {
            source::from_gguf(path)?
        };
        Self::new(source)
    }

    fn new(source: Source) -> Result<Self, Error> {
        let Source {
            tokenizer,
            normalizer,
            pre_tokenizer,
            decoder,
            bos,
            eos,
            adds_bos,
            template,
        } = source;
        if let tokenizers::ModelWrapper::BPE(bpe) = tokenizer.get_model()
            && bpe.dropout.is_some_and(|dropout| dropout > 0.0)
        {
            return Err(Error::Unsupported {
                what: "a tokenizer that drops merges at random (dropout)".into(),
            });
        }
        let pieces = Pieces::new(&tokenizer, &decoder)?;
        for special in [bos, eos].into_iter().flatten() {
            if special.0 as usize >= pieces.vocab_size() {
                return Err(Error::UnknownToken {
                    token: special,
                    vocab: pieces.vocab_size(),
                });
            }
        }
        let spelling = |token: Option<TokenId>| {
            token
                .and_then(|t| tokenizer.id_to_token(t.0))
                .unwrap_or_default()
        };
        let template = ChatTemplate::new(template, &spelling(bos), &spelling(eos));
        let inner = Inner {
            first: Pipeline::new(&normalizer, &pre_tokenizer)?,
            inside: Pipeline::new(
                &without_prefix(&normalizer),
                &without_prefix(&pre_tokenizer),
            )?,
            restarts: !boundary::stages(&pre_tokenizer, "pretokenizers")
                .iter()
                .any(|stage| stage["prepend_scheme"] == "first"),
            boundaries: Boundaries::of(&normalizer, &pre_tokenizer, tokenizer.get_model()),
            tokenizer,
            pieces,
            bos,
            eos,
            adds_bos: adds_bos && bos.is_some(),
            template,
        };
        Ok(Self {
            inner: Arc::new(inner),
        })
    }

    /// Ids of the tokenizer are below this; a model's embedding may have more rows.
    #[must_use]
    pub fn vocab_size(&self) -> usize {
        self.inner.pieces.vocab_size()
    }

    /// The token that begins a text.
    #[must_use]
    pub fn bos(&self) -> Option<TokenId> {
        self.inner.bos
    }

    /// The token that ends a text, as the tokenizer's files name it.
    #[must_use]
    pub fn eos(&self) -> Option<TokenId> {
        self.inner.eos
    }

    /// Whether the tokenizer itself asks for a BOS in front of plain text.
    #[must_use]
    pub fn adds_bos(&self) -> bool {
        self.inner.adds_bos
    }

    /// Special tokens in the text are recognised; never adds a BOS by itself.
    ///
    /// # Errors
    /// If the tokenizer has no token for the text.
    pub fn encode(&self, text: &str) -> Result<Vec<TokenId>, Error> {
        self.encode_parts(text, str::to_owned)
    }

    /// Special tokens in the text are plain text: for what users say.
    ///
    /// # Errors
    /// If the tokenizer has no token for the text.
    pub fn encode_plain(&self, text: &str) -> Result<Vec<TokenId>, Error> {
        self.encode_from(text, true)
    }

    /// The tokens' text, special tokens spelled out. Bytes that are no UTF-8 become U+FFFD.
    ///
    /// # Errors
    /// [`Error::UnknownToken`] if the vocabulary has no such token.
    pub fn decode(&self, tokens: &[TokenId]) -> Result<String, Error> {
        let mut decoder = self.decoder();
        let mut text = String::new();
        for &token in tokens {
            text.push_str(&decoder.push(token)?);
        }
        text.push_str(&decoder.finish()?);
        Ok(text)
    }

    /// Renders and encodes a conversation with a generation prompt. The template's own text holds the BOS where the
    /// model wants one; none is added. What a message spells like a special token stays text: nobody can end a turn
    /// or open another by writing its marks.
    ///
    /// # Errors
    /// [`Error::NoChatTemplate`], or [`Error::Template`] with what the template said.
    pub fn encode_chat(&self, messages: &[Message]) -> Result<Vec<TokenId>, Error> {
        let specials: Vec<&str> = self.special_spellings();
        let veil = chat::Veil::new(messages, &specials)?;
        let rendered = self.inner.template.render(&veil.messages(messages))?;
        self.encode_parts(&rendered, |part| veil.lift(part))
    }

    /// A document's text, tokenised as it comes.
    #[must_use]
    pub fn document(&self) -> DocumentTokenizer {
        DocumentTokenizer::new(Arc::clone(&self.inner), true)
    }

    /// Tokens back to text as they come.
    #[must_use]
    pub fn decoder(&self) -> TextDecoder {
        TextDecoder::new(Arc::clone(&self.inner))
    }

    /// Special tokens by themselves; the text between them after `restore`, as plain text.
    fn encode_parts(
        &self,
        text: &str,
        restore: impl Fn(&str) -> String,
    ) -> Result<Vec<TokenId>, Error> {
        let added = self.inner.tokenizer.get_added_vocabulary();
        let parts = added.extract_and_normalize(None::<&NormalizerWrapper>, text);
        let mut tokens = Vec::new();
        for (part, (start, _), found) in
            parts.get_splits(OffsetReferential::Original, OffsetType::Byte)
        {
            match found {
                Some(found) => tokens.extend(found.iter().map(|token| TokenId(token.id))),
                None => tokens
                    .extend(self.encode_from(&restore(part), start == 0 || self.inner.restarts)?),
            }
        }
        Ok(tokens)
    }

    fn encode_from(&self, text: &str, at_start: bool) -> Result<Vec<TokenId>, Error> {
        let mut document = DocumentTokenizer::new(Arc::clone(&self.inner), at_start);
        let mut tokens = document.push(text)?;
        tokens.extend(document.finish("")?);
        Ok(tokens)
    }

    /// How special tokens are spelled, the longest first.
    fn special_spellings(&self) -> Vec<&str> {
        let added = self
            .inner
            .tokenizer
            .get_added_vocabulary()
            .get_added_tokens_decoder();
        let special = added
            .values()
            .filter(|token| token.special && !token.content.is_empty());
        let mut spellings: Vec<&str> = special.map(|token| token.content.as_str()).collect();
        spellings.sort_unstable_by_key(|spelling| (std::cmp::Reverse(spelling.len()), *spelling));
        spellings
    }
}

impl Inner {
    /// Encodes text that contains no special token.
    fn encode_segment(
        &self,
        text: &str,
        pipeline: &Pipeline,
        tokens: &mut Vec<TokenId>,
    ) -> Result<(), Error> {
        if text.is_empty() {
            return Ok(());
        }
        let mut normalized = NormalizedString::from(text);
        if let Some(normalizer) = &pipeline.normalizer {
            normalizer.normalize(&mut normalized).map_err(failed)?;
        }
        let mut words = PreTokenizedString::from(normalized);
        if let Some(pre_tokenizer) = &pipeline.pre_tokenizer {
            pre_tokenizer.pre_tokenize(&mut words).map_err(failed)?;
        }
        words
            .tokenize(|word| self.tokenizer.get_model().tokenize(word.get()))
            .map_err(failed)?;
        for (_, _, found) in words.get_splits(OffsetReferential::Original, OffsetType::None) {
            tokens.extend(found.iter().flatten().map(|token| TokenId(token.id)));
        }
        Ok(())
    }
}

impl Pipeline {
    fn new(normalizer: &Value, pre_tokenizer: &Value) -> Result<Self, Error> {
        Ok(Self {
            normalizer: stage(normalizer)?,
            pre_tokenizer: stage(pre_tokenizer)?,
        })
    }
}

/// A stage from its JSON; null is none.
fn stage<T: serde::de::DeserializeOwned>(json: &Value) -> Result<Option<T>, Error> {
    if json.is_null() {
        return Ok(None);
    }
    T::deserialize(json)
        .map(Some)
        .map_err(|error| Error::Tokenizer {
            what: error.to_string(),
        })
}

/// The same stages, but none puts anything in front of a text.
fn without_prefix(stage: &Value) -> Value {
    match stage {
        Value::Array(stages) => stages
            .iter()
            .filter(|stage| stage["type"] != "Prepend")
            .map(without_prefix)
            .collect(),
        Value::Object(_) if stage["type"] == "Prepend" => Value::Null,
        Value::Object(keys) => {
            let mut keys: serde_json::Map<String, Value> = keys
                .iter()
                .map(|(key, value)| (key.clone(), without_prefix(value)))
                .collect();
            if stage["type"] == "Metaspace" {
                keys.remove("add_prefix_space");
                keys.insert("prepend_scheme".into(), "never".into());
            } else if keys.contains_key("add_prefix_space") {
                keys.insert("add_prefix_space".into(), false.into());
            }
            Value::Object(keys)
        }
        other => other.clone(),
    }
}

fn failed(error: tokenizers::Error) -> Error {
    Error::Tokenizer {
        what: error.to_string(),
    }
}
