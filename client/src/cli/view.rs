//! The contract's messages as JSON and as words for people.
//!
//! The keys of the JSON are the field names of the contract. Start at [`session`].

use serde_json::{Value, json};

use crate::{Applied, v1};

/// A session.
pub(super) fn session(session: &v1::Session) -> Value {
    json!({
        "session_id": session.session_id,
        "model": session.model,
        "strategy": strategy(session.strategy()),
        "window": session.window,
        "labels": session.labels,
        "ttl_s": session.ttl.as_ref().map(seconds),
        "create_time": session.create_time.as_ref().map(ToString::to_string),
        "update_time": session.update_time.as_ref().map(ToString::to_string),
        "expire_time": session.expire_time.as_ref().map(ToString::to_string),
        "adapter_version": session.adapter_version,
        "state_digest": session.state_digest,
        "accepted_seq": session.accepted_seq,
        "applied_seq": session.applied_seq,
        "context_tokens": session.context_tokens,
        "documents": session.documents,
        "state_bytes": session.state_bytes,
        "trace_bytes": session.trace_bytes,
        "core_bytes": session.core_bytes,
        "forked_from": session.forked_from,
    })
}

/// A document of a session.
pub(super) fn document(document: &v1::Document) -> Value {
    json!({
        "document_id": document.document_id,
        "tokens": document.tokens,
        "complete": document.complete,
        "first_seq": document.first_seq,
        "last_seq": document.last_seq,
    })
}

/// A published version.
pub(super) fn applied(applied: &Applied) -> Value {
    json!({
        "seq": applied.seq,
        "adapter_version": applied.adapter_version,
        "state_digest": applied.state_digest,
        "tokens": applied.tokens,
    })
}

/// The end of a generation, with the text before it.
pub(super) fn answer(text: &str, finished: &v1::GenerateFinished) -> Value {
    let usage = finished.usage.unwrap_or_default();
    let timings = finished.timings.unwrap_or_default();
    let ms = |span: Option<prost_types::Duration>| span.as_ref().map(|span| 1e3 * seconds(span));
    json!({
        "text": text,
        "finish_reason": finish_reason(finished.finish_reason()),
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "context_tokens": usage.context_tokens,
        "cached_tokens": usage.cached_tokens,
        "adapter_version": finished.adapter_version,
        "state_digest": finished.state_digest,
        "queue_ms": ms(timings.queue),
        "prefill_ms": ms(timings.prefill),
        "decode_ms": ms(timings.decode),
    })
}

/// Why a generation ended, in a word.
pub(super) fn finish_reason(reason: v1::FinishReason) -> &'static str {
    match reason {
        v1::FinishReason::Unspecified => "unspecified",
        v1::FinishReason::Eos => "eos",
        v1::FinishReason::Stop => "stop",
        v1::FinishReason::Length => "length",
        v1::FinishReason::Shutdown => "shutdown",
    }
}

/// A strategy, in a word.
pub(super) fn strategy(strategy: v1::Strategy) -> &'static str {
    match strategy {
        v1::Strategy::Unspecified => "unspecified",
        v1::Strategy::Concat => "concat",
        v1::Strategy::Parallel => "parallel",
        v1::Strategy::Sequential => "sequential",
    }
}

/// Bytes in a unit that people read.
pub(crate) fn bytes(bytes: u64) -> String {
    #[expect(clippy::cast_precision_loss, reason = "three digits are shown")]
    let value = bytes as f64;
    match bytes {
        0..1_000 => format!("{bytes} B"),
        1_000..1_000_000 => format!("{:.1} kB", value / 1e3),
        1_000_000..1_000_000_000 => format!("{:.1} MB", value / 1e6),
        _ => format!("{:.1} GB", value / 1e9),
    }
}

/// A span of the contract in seconds.
pub(crate) fn seconds(span: &prost_types::Duration) -> f64 {
    #[expect(
        clippy::cast_precision_loss,
        reason = "spans that are shown are far below 2^53 s"
    )]
    let whole = span.seconds as f64;
    whole + f64::from(span.nanos) * 1e-9
}
