//! Figures of answers: F1 and exact match by the rules of SQuAD v1.1, ROUGE-L recall, bootstrap intervals.
//!
//! Strings and numbers in, numbers out. Start at [`f1`] and [`interval`].

use std::collections::HashMap;

use crate::random::Draws;

/// The words of an answer by SQuAD's rules: lower case, no ASCII punctuation, no articles.
#[must_use]
pub fn words(answer: &str) -> Vec<String> {
    let lower = answer.to_lowercase();
    let kept: String = lower
        .chars()
        .filter(|letter| !letter.is_ascii_punctuation())
        .collect();
    kept.split_whitespace()
        .filter(|word| !["a", "an", "the"].contains(word))
        .map(str::to_owned)
        .collect()
}

/// Whether the words of the answer are those of a reference.
#[must_use]
pub fn exact(answer: &str, references: &[String]) -> bool {
    let answer = words(answer);
    references
        .iter()
        .any(|reference| words(reference) == answer)
}

/// The best harmonic mean of precision and recall of words over the references, in [0, 1]. Where either has no words, 1 if both
/// have none.
#[must_use]
pub fn f1(answer: &str, references: &[String]) -> f64 {
    let answer = words(answer);
    best(references, |reference| {
        let reference = words(reference);
        if answer.is_empty() || reference.is_empty() {
            return f64::from(u8::from(answer.is_empty() && reference.is_empty()));
        }
        let mut counts: HashMap<&str, usize> = HashMap::new();
        for word in &reference {
            *counts.entry(word).or_default() += 1;
        }
        let mut common = 0;
        for word in &answer {
            if let Some(count) = counts.get_mut(word.as_str())
                && *count > 0
            {
                *count -= 1;
                common += 1;
            }
        }
        2.0 * ratio(common, answer.len() + reference.len())
    })
}

/// The best share of a reference's words that occur in the answer in their order (ROUGE-L recall), in [0, 1]. A reference without
/// words gives 0.
#[must_use]
pub fn rouge_l_recall(answer: &str, references: &[String]) -> f64 {
    let answer = words(answer);
    best(references, |reference| {
        let reference = words(reference);
        ratio(common_subsequence(&answer, &reference), reference.len())
    })
}

fn best(references: &[String], score: impl Fn(&str) -> f64) -> f64 {
    references
        .iter()
        .map(|reference| score(reference))
        .fold(0.0, f64::max)
}

/// Length of the longest common subsequence.
fn common_subsequence(a: &[String], b: &[String]) -> usize {
    let mut lengths = vec![0_usize; b.len() + 1];
    for word in a {
        let mut diagonal = 0;
        for (place, other) in b.iter().enumerate() {
            let above = lengths[place + 1];
            lengths[place + 1] = if word == other {
                diagonal + 1
            } else {
                above.max(lengths[place])
            };
            diagonal = above;
        }
    }
    lengths.last().copied().unwrap_or(0)
}

#[expect(clippy::cast_precision_loss, reason = "word counts are small")]
fn ratio(part: usize, whole: usize) -> f64 {
    if whole == 0 {
        return 0.0;
    }
    part as f64 / whole as f64
}

/// How many times a bootstrap draws.
const RESAMPLES: usize = 1000;

/// The 95 % percentile interval of a figure under resampling of `count` independent units with replacement. `figure` is given
/// how often each unit was drawn; draws for which it is not defined do not count. None if it never is, or if there are fewer than two units.
#[must_use]
pub fn interval(
    count: usize,
    seed: u64,
    mut figure: impl FnMut(&[u32]) -> Option<f64>,
) -> Option<[f64; 2]> {
    if count < 2 {
        return None;
    }
    let mut draws = Draws::new(seed, "bootstrap");
    let mut figures = Vec::with_capacity(RESAMPLES);
    let mut times = vec![0_u32; count];
    for _ in 0..RESAMPLES {
        times.fill(0);
        for _ in 0..count {
            times[draws.below(count)] += 1;
        }
        figures.extend(figure(&times).filter(|figure| figure.is_finite()));
    }
    figures.sort_unstable_by(f64::total_cmp);
    let at = |share: usize| figures.get(figures.len() * share / 1000).copied();
    Some([at(25)?, at(975)?])
}

#[cfg(test)]
mod tests;
