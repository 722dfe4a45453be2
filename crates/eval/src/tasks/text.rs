//! Running text: reconstruction of a span of the context, and completion of what follows it.
//!
//! The protocol of the study behind the first generator: 256 tokens of context, spans of 64 put from position 0, of which the
//! first token is given. Start at [`cases`].

use std::{path::Path, sync::Arc};

use lm::TokenId;
use serde::Deserialize;

use super::{Case, LaidOut, Question, Wanted};
use crate::{
    Error,
    prompt::{Document, Prompts},
    random::Draws,
};

/// Tokens of a span.
const SPAN: usize = 64;
/// Tokens of context, where no length is asked for.
const CONTEXT: usize = 256;
/// Letters of a document that are looked at, for each token of context.
const LETTERS: usize = 160;

#[derive(Deserialize)]
struct Row {
    id: Option<String>,
    text: String,
}

fn parse(line: &str) -> Result<Row, String> {
    let row: Row = serde_json::from_str(line).map_err(|error| error.to_string())?;
    if row.text.trim().is_empty() {
        return Err("the text is empty".to_owned());
    }
    Ok(row)
}

/// Two questions for each document that is long enough: `reconstruction` and `completion`. The limit counts documents.
pub(super) fn cases(path: &Path, wanted: &Wanted, prompts: &Prompts<'_>) -> Result<LaidOut, Error> {
    let file = rows::collect(path, wanted.max_malformed, parse)?;
    let lengths = if wanted.context_tokens.is_empty() {
        &[CONTEXT][..]
    } else {
        &wanted.context_tokens
    };
    let mut cases = Vec::new();
    for &length in lengths {
        if length < SPAN + 2 {
            return Err(Error::Option {
                option: "--context-tokens",
                detail: format!("a text's context has at least {} tokens", SPAN + 2),
            });
        }
        let mut draws = Draws::new(wanted.seed, "text");
        let mut taken = 0;
        for (number, row) in file.rows.iter().enumerate() {
            if taken == wanted.limit {
                break;
            }
            let letters = LETTERS.saturating_mul(length).max(40_000);
            let text: String = row.text.chars().take(letters).collect();
            let tokens = prompts.tokens(&text)?;
            if tokens.len() < length + SPAN {
                continue;
            }
            let start = draws.below(tokens.len() - length - SPAN + 1);
            let inside = start + 1 + draws.below(length - SPAN - 1);
            let behind = start + length;
            let id = row.id.clone().unwrap_or_else(|| number.to_string());
            let context = &tokens[start..behind];
            cases.push(Case {
                context: vec![Arc::new(Document {
                    text: prompts.text(context)?,
                    tokens: context.to_vec(),
                })],
                frame: prompts.bare_frame(),
                styled: None,
                questions: vec![
                    span(
                        &id,
                        "reconstruction",
                        length,
                        &tokens[inside..inside + SPAN],
                        prompts,
                    )?,
                    span(
                        &id,
                        "completion",
                        length,
                        &tokens[behind..behind + SPAN],
                        prompts,
                    )?,
                ],
            });
            taken += 1;
        }
    }
    Ok(LaidOut {
        cases,
        malformed: file.malformed,
        digest: Some(file.digest.to_hex().to_string()),
    })
}

/// A span of which the first token is given and the others are scored.
#[expect(
    clippy::cast_precision_loss,
    reason = "context lengths are far below 2^52"
)]
fn span(
    id: &str,
    label: &str,
    length: usize,
    tokens: &[TokenId],
    prompts: &Prompts<'_>,
) -> Result<Question, Error> {
    let (given, scored) = tokens.split_at(1);
    Ok(Question {
        id: id.to_owned(),
        label: if length == CONTEXT {
            label.to_owned()
        } else {
            format!("{label}, {length} tokens")
        },
        x: Some(length as f64),
        shown: prompts.text(tokens)?,
        query: None,
        asked: Some(relevance::Asked::text(&prompts.text(given)?)),
        body: given.to_vec(),
        references: Vec::new(),
        answer: scored.to_vec(),
        options: Vec::new(),
        right: None,
        max_tokens: 0,
    })
}
