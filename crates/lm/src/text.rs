//! The text side of a model: tokenizer, chat template, incremental tokenisation and detokenisation. STUB.
use std::path::Path;

/// An id of a model's vocabulary.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TokenId(pub u32);

#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error { #[error("{0}")] Stub(String) /* Io, Tokenizer, NoChatTemplate, Template(minijinja), ... */ }

#[derive(Clone, Debug)]
pub struct Message { pub role: String, pub content: String }

/// Tokenizer and chat template of a model; cheap to clone (Arc inside), Send + Sync.
#[derive(Clone)]
pub struct Text {}
impl Text {
    /// `path`: a GGUF file (tokenizer and template out of its metadata) or a folder (tokenizer.json, tokenizer_config.json, chat_template.jinja).
    pub fn load(path: &Path) -> Result<Self, Error> { unimplemented!() }
    pub fn vocab_size(&self) -> usize { unimplemented!() }
    pub fn bos(&self) -> Option<TokenId> { unimplemented!() }
    /// Whether the tokenizer itself asks for a BOS in front of plain text.
    pub fn adds_bos(&self) -> bool { unimplemented!() }
    /// Special tokens in the text are recognised; never adds a BOS by itself.
    pub fn encode(&self, text: &str) -> Result<Vec<TokenId>, Error> { unimplemented!() }
    /// Special tokens in the text are plain text: for what users say.
    pub fn encode_plain(&self, text: &str) -> Result<Vec<TokenId>, Error> { unimplemented!() }
    pub fn decode(&self, tokens: &[TokenId]) -> Result<String, Error> { unimplemented!() }
    /// Renders and encodes a conversation with a generation prompt. The template's own text holds the BOS where the model wants one; none is added.
    pub fn encode_chat(&self, messages: &[Message]) -> Result<Vec<TokenId>, Error> { unimplemented!() }
    /// A document's text, tokenised as it comes.
    pub fn document(&self) -> DocumentTokenizer { unimplemented!() }
    /// Tokens back to text as they come.
    pub fn decoder(&self) -> TextDecoder { unimplemented!() }
}

/// Tokenises a document's text in any chunks; the concatenation of all tokens equals `encode_plain` of the whole text.
/// The last pre-tokens are held back until more text comes. `clone` is cheap (provisional ends).
#[derive(Clone)]
pub struct DocumentTokenizer {}
impl DocumentTokenizer {
    /// Takes text and returns the tokens that no later text can change.
    pub fn push(&mut self, text: &str) -> Result<Vec<TokenId>, Error> { unimplemented!() }
    /// Bytes of text whose tokens have all been returned.
    pub fn committed_bytes(&self) -> usize { unimplemented!() }
    /// The tokens of what is held back plus `suffix`, as if the document ended here; changes nothing.
    pub fn provisional(&self, suffix: &str) -> Result<Vec<TokenId>, Error> { unimplemented!() }
    /// Ends the document: the last tokens.
    pub fn finish(self, suffix: &str) -> Result<Vec<TokenId>, Error> { unimplemented!() }
    /// Bytes held.
    pub fn held_bytes(&self) -> usize { unimplemented!() }
}
/// Incremental detokenisation: text is returned once it is whole UTF-8.
pub struct TextDecoder {}
impl TextDecoder {
    pub fn push(&mut self, token: TokenId) -> Result<String, Error> { unimplemented!() }
    pub fn finish(self) -> Result<String, Error> { unimplemented!() }
}
