//! BM25 over the passages of a context: which of them a question's words speak of.
//!
//! The form of Robertson and Zaragoza (2009) with k1 = 1.2 and b = 0.75. Words only, no model. Start at [`best`].

use std::collections::HashMap;

const K1: f64 = 1.2;
const B: f64 = 0.75;

/// Words of a text, in lower case.
fn words(text: &str) -> Vec<String> {
    text.split(|letter: char| !letter.is_alphanumeric())
        .filter(|word| !word.is_empty())
        .map(str::to_lowercase)
        .collect()
}

/// The index of the passage with the highest score for the query, the first among equals. None without passages.
pub(crate) fn best(query: &str, passages: &[&str]) -> Option<usize> {
    scores(query, passages)
        .into_iter()
        .enumerate()
        .max_by(|(i, a), (j, b)| a.total_cmp(b).then(j.cmp(i)))
        .map(|(index, _)| index)
}

#[expect(clippy::cast_precision_loss, reason = "word counts are far below 2^52")]
fn scores(query: &str, passages: &[&str]) -> Vec<f64> {
    let mut query = words(query);
    query.sort_unstable();
    query.dedup();
    let passages: Vec<(HashMap<String, usize>, usize)> = passages
        .iter()
        .map(|passage| {
            let words = words(passage);
            let length = words.len();
            let mut counts = HashMap::new();
            for word in words {
                *counts.entry(word).or_insert(0) += 1;
            }
            (counts, length)
        })
        .collect();
    let count = passages.len() as f64;
    let mean = passages.iter().map(|(_, n)| *n as f64).sum::<f64>() / count.max(1.0);
    let mut scores = vec![0.0; passages.len()];
    for word in &query {
        let holding = passages
            .iter()
            .filter(|(counts, _)| counts.contains_key(word))
            .count() as f64;
        let rarity = (1.0 + (count - holding + 0.5) / (holding + 0.5)).ln();
        for (score, (counts, length)) in scores.iter_mut().zip(&passages) {
            let times = counts.get(word).copied().unwrap_or(0) as f64;
            let long = 1.0 - B + B * *length as f64 / mean.max(1.0);
            *score += rarity * times * (K1 + 1.0) / (times + K1 * long);
        }
    }
    scores
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_passage_with_the_rare_word_wins_and_ties_go_to_the_first() {
        let passages = [
            "The cat sat on the mat.",
            "The dog ate the violin.",
            "The cat and the dog.",
        ];
        assert_eq!(best("Who ate the violin?", &passages), Some(1));
        assert_eq!(best("zebra", &passages), Some(0));
        assert_eq!(best("zebra", &[]), None);
    }

    #[test]
    fn scores_are_what_one_computes_by_hand() {
        // "b" is in one of two passages: rarity ln(1 + 1.5 / 1.5) = ln 2; passage lengths 2 and 1, mean 1.5.
        let scores = scores("b", &["a b", "a"]);
        let long = 0.25 + 0.75 * 2.0 / 1.5;
        assert!((scores[0] - 2f64.ln() * 2.2 / (1.0 + 1.2 * long)).abs() < 1e-12);
        assert_eq!(scores[1], 0.0);
    }
}
