//! What is served: the facts about base and generator that callers show.
//!
//! Gathered once when the engine loads. Start at [`ModelInfo`].

use generator::{Generator, Module, ReadOut, Strategy, Write};
use lm::Architecture;

use crate::{ids::TokenId, machine::Machine};

/// A frozen model with its generator.
#[derive(Clone, Debug)]
pub struct ModelInfo {
    /// The architecture.
    pub architecture: Architecture,
    /// Parameters of the frozen model.
    pub parameters: u64,
    /// Decoder layers.
    pub layers: usize,
    /// Width of the residual stream.
    pub hidden: usize,
    /// Tokens in the vocabulary.
    pub vocab: usize,
    /// Tokens that fit a request: prompt and completion together.
    pub context_length: usize,
    /// How the weights are held in memory, e.g. `Q4_1` or `F32`.
    pub weight_format: String,
    /// Digest of the files that make the model, in hex.
    pub digest: String,
    /// Tokens that end an answer.
    pub eos: Vec<TokenId>,
    /// The token that begins a text, where the model has one.
    pub bos: Option<TokenId>,
    /// The generator; without one only the bare model answers.
    pub generator: Option<GeneratorInfo>,
}

/// A trained generator.
#[derive(Clone, Debug)]
pub struct GeneratorInfo {
    /// What a token writes.
    pub write: Write,
    /// How a core is read out of the state.
    pub read_out: ReadOut,
    /// The adapted linears, in the order of layers.
    pub sites: Vec<SiteInfo>,
    /// Tokens in a window by default.
    pub window: usize,
    /// The strategy by default.
    pub strategy: Strategy,
    /// Digest of the checkpoint, in hex.
    pub digest: String,
    /// Parameters of the generator.
    pub parameters: usize,
    /// The format of a question, with `{question}` in it.
    pub prompt_format: Option<String>,
    /// What is put behind each document's text.
    pub document_suffix: String,
    /// Whether contexts and prompts begin with a BOS; none leaves it to the tokenizer.
    pub bos: Option<bool>,
    /// Bytes of one state (f32 sums).
    pub state_bytes: usize,
}

/// An adapted linear of a layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SiteInfo {
    /// The layer, from 0.
    pub layer: usize,
    /// The linear.
    pub module: Module,
    /// Rows of the state (keys).
    pub r1: usize,
    /// Columns of the state (values).
    pub r2: usize,
    /// Largest rank of the core.
    pub rank: usize,
}

impl ModelInfo {
    /// Reads the facts off a loaded model; `state_bytes` are those of one state.
    pub(crate) fn new(machine: &dyn Machine, state_bytes: usize) -> Self {
        let base = machine.base();
        let config = &base.config;
        Self {
            architecture: config.architecture,
            parameters: base.parameters,
            layers: config.layers,
            hidden: config.hidden,
            vocab: config.vocab,
            context_length: config.context_length,
            weight_format: base.weight_format.clone(),
            digest: base.digest.clone(),
            eos: config.eos.clone(),
            bos: config.bos,
            generator: machine
                .generator()
                .map(|generator| GeneratorInfo::new(generator, state_bytes)),
        }
    }
}

impl GeneratorInfo {
    fn new(generator: &Generator, state_bytes: usize) -> Self {
        let config = generator.config();
        let sites = generator.sites().iter().map(|site| {
            let (r1, r2, rank) = site.ranks();
            SiteInfo {
                layer: site.id().layer,
                module: site.id().module,
                r1,
                r2,
                rank,
            }
        });
        Self {
            write: config.write,
            read_out: config.read_out,
            sites: sites.collect(),
            window: config.window,
            strategy: config.strategy,
            digest: generator.digest().to_owned(),
            parameters: generator.parameters(),
            prompt_format: config.prompt_format.clone(),
            document_suffix: config.document_suffix.clone(),
            bos: config.bos,
            state_bytes,
        }
    }
}
