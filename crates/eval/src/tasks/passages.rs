//! A context cut into passages, for looking something up in it.
//!
//! Start at [`passages`].

/// Words that a passage has about.
const WORDS: usize = 60;

/// Passages of whole sentences, a new one once a passage has 60 words.
pub(crate) fn passages(text: &str) -> Vec<&str> {
    let mut passages = Vec::new();
    let (mut start, mut words) = (0, 0);
    for sentence in sentences(text) {
        words += sentence.split_whitespace().count();
        let end = sentence.as_ptr() as usize - text.as_ptr() as usize + sentence.len();
        if words >= WORDS {
            passages.push(text[start..end].trim());
            (start, words) = (end, 0);
        }
    }
    let rest = text[start..].trim();
    if !rest.is_empty() {
        passages.push(rest);
    }
    passages
}

/// Pieces that end behind a full stop, a question or exclamation mark and a space, or a line's end.
fn sentences(text: &str) -> impl Iterator<Item = &str> {
    let mut mark = false;
    text.split_inclusive(move |letter: char| {
        let ends = letter == '\n' || (mark && letter.is_whitespace());
        mark = matches!(letter, '.' | '!' | '?');
        ends
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn passages_are_whole_sentences_and_lose_nothing() {
        let sentence = "One two three four five six seven eight nine ten. ";
        let text = sentence.repeat(13);
        let found = passages(&text);
        assert_eq!(found.len(), 3);
        assert_eq!(found[0], sentence.repeat(6).trim());
        assert_eq!(found.join(" "), text.trim());
        assert!(passages("  \n").is_empty());
        assert_eq!(passages("Dr. No"), ["Dr. No"]);
    }
}
