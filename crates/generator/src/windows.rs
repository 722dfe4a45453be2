//! How a context of known length is cut into windows.
//!
//! A stream cuts fixed windows from each document's start; equalised windows are the published way for
//! one-shot calls (evaluation, reference vectors). Ranges of token indices, nothing else.

use std::ops::Range;

/// Windows of `window` tokens from the start on, the last one with what is left. No tokens: no windows.
/// A `window` of 0 counts as 1.
pub fn fixed(tokens: usize, window: usize) -> impl Iterator<Item = Range<usize>> {
    let window = window.max(1);
    (0..tokens)
        .step_by(window)
        .map(move |start| start..start.saturating_add(window).min(tokens))
}

/// n = ceil(T / W) windows of ceil(T / n) tokens, the last one with what is left. No tokens: no windows.
/// A `window` of 0 counts as 1.
pub fn equalised(tokens: usize, window: usize) -> impl Iterator<Item = Range<usize>> {
    let count = tokens.div_ceil(window.max(1)).max(1);
    fixed(tokens, tokens.div_ceil(count))
}

#[cfg(test)]
mod tests;
