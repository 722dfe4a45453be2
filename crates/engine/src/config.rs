//! Budgets and bounds of the engine.
//!
//! Every queue and cache has its bound here, and `tests/bounds.rs` has a test at each. Start at [`Config`].

use lm::Activations;

use crate::error::ConfigError;

/// Budgets and bounds. `Default` suits a model of a few hundred million parameters on a small machine.
#[derive(Clone, Debug)]
pub struct Config {
    /// Tokens in one step: decode tokens, prompt chunks and context chunks together. More is faster in
    /// bulk, less lets running answers come more evenly. At least `max_running` + 2.
    pub step_tokens: usize,
    /// Of these the most for prompts and context together while an answer is running: the time between two of its
    /// tokens is that of a step. As far as the caller's clock goes, fewer: so many that a step takes less than twice what the answers
    /// take by themselves. At least 2.
    pub max_bulk_beside_decode: usize,
    /// Blocks of the KV cache, shared by requests and open windows. Memory is touched only as blocks are
    /// used. Together with `block_size` it bounds prompt + completion of one request.
    pub kv_blocks: usize,
    /// Tokens in a block.
    pub block_size: usize,
    /// Keep what requests leave in blocks that nobody holds, for requests of the same tenant that begin with the same tokens under
    /// the same imprint. It changes no answer. Without it memory that was touched is used again before other.
    pub prefix_cache: bool,
    /// Requests that run at once.
    pub max_running: usize,
    /// Requests that wait to run. One more is refused as `Full`.
    pub max_queued: usize,
    /// Commands that wait for the next step. One more is refused as `Full`.
    pub max_commands: usize,
    /// Open sessions, in memory or not. One that is not takes some kilobytes and 4 bytes a token.
    pub max_sessions: usize,
    /// Documents of a session, those forgotten not counted.
    pub max_documents: usize,
    /// Context tokens of a session, provisional ones included.
    pub max_session_tokens: usize,
    /// Context tokens of all sessions that wait to be encoded. A chunk beyond it is refused as `Full`; a
    /// chunk that is larger by itself fails.
    pub max_queued_tokens: usize,
    /// Bytes of the states (f32 sums) that are in memory. A session whose documents are all read holds the running fold, and one state
    /// per document where documents can be forgotten by refolding (concat, parallel); with sequential it is charged for the
    /// two that reading again would take. While a document is open or unread, it may come to hold more: the open window,
    /// where that was not counted, and both of a provisional end. States of sessions at rest leave for those of others; a document
    /// that does not fit beside those that cannot rest is refused.
    pub state_budget_bytes: usize,
    /// Bytes of what single tokens of documents wrote (bf16 keys and values), kept so that a request can be made of some sentences
    /// of a document. A document that does not fit goes on without: it is taken whole then. Open windows hold at most their own
    /// beside. 0 keeps nothing.
    pub trace_budget_bytes: usize,
    /// Bytes of all cores: of newest versions, of versions that running requests are pinned to, and of open windows that
    /// are read with one of their own (sequential); each core counts once, however many hold it. A version beyond it is not
    /// published: who asked for it is told, and the session keeps its older one. What a forgotten document leaves is published all
    /// the same, and no window waits.
    pub core_budget_bytes: usize,
    /// A session that leaves memory is kept as a snapshot where that takes at most so many bytes for each token of its log; others, and
    /// all with 0, are read again when they are asked for. Core, and sums with traces, are kept or not independently. Whoever drives the
    /// engine answers `Save` and `Wanted` then.
    pub snapshot_bytes_per_token: usize,
    /// Expand the frozen weights to f32 when loading.
    pub dequantize: bool,
    /// What the activations of maps with quantised weights are rounded to. With int8, the default, a model runs several times as
    /// fast, and the loss of a text moves by less than 1 % (docs/PERFORMANCE.md); f32 is the dequantised model.
    pub activations: Activations,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            step_tokens: 512,
            max_bulk_beside_decode: 256,
            kv_blocks: 1024,
            block_size: 16,
            prefix_cache: true,
            max_running: 32,
            max_queued: 256,
            max_commands: 4096,
            max_sessions: 100_000,
            max_documents: 1024,
            max_session_tokens: 1 << 20,
            max_queued_tokens: 1 << 18,
            state_budget_bytes: 4 << 30,
            trace_budget_bytes: 1 << 30,
            core_budget_bytes: 1 << 30,
            snapshot_bytes_per_token: 0,
            dequantize: false,
            activations: Activations::Int8,
        }
    }
}

impl Config {
    /// Says which field cannot work, and why.
    ///
    /// # Errors
    /// [`ConfigError`] names the first such field.
    pub fn check(&self) -> Result<(), ConfigError> {
        let fields = [
            ("kv_blocks", self.kv_blocks),
            ("block_size", self.block_size),
            ("max_running", self.max_running),
            ("max_queued", self.max_queued),
            ("max_commands", self.max_commands),
            ("max_sessions", self.max_sessions),
            ("max_documents", self.max_documents),
            ("max_session_tokens", self.max_session_tokens),
            ("max_queued_tokens", self.max_queued_tokens),
            ("core_budget_bytes", self.core_budget_bytes),
        ];
        for (field, value) in fields {
            if value == 0 {
                return Err(ConfigError {
                    field,
                    value,
                    least: 1,
                    most: usize::MAX,
                });
            }
        }
        // One token of a prompt and one of a context: neither waits for the other to be done.
        let least = [
            (
                "step_tokens",
                self.step_tokens,
                self.max_running.saturating_add(2),
            ),
            ("max_bulk_beside_decode", self.max_bulk_beside_decode, 2),
        ];
        for (field, value, least) in least {
            if value < least {
                return Err(ConfigError {
                    field,
                    value,
                    least,
                    most: usize::MAX,
                });
            }
        }
        // Slots of the cache are u32 numbers.
        let most = usize::try_from(u32::MAX).unwrap_or(usize::MAX) / self.block_size;
        if self.kv_blocks > most {
            return Err(ConfigError {
                field: "kv_blocks",
                value: self.kv_blocks,
                least: 1,
                most,
            });
        }
        Ok(())
    }
}
