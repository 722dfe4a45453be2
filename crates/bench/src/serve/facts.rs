//! Invented facts, and questions about them: nothing of it is known to a model or stands in a data set.
//!
//! A session's facts follow from the seed and its number. Names are put together of syllables; of a session no two facts are of one
//! place. Start at [`facts`].

use super::arrivals::Random;

const SYLLABLES: [&str; 24] = [
    "ba", "den", "fo", "gri", "hal", "jo", "ka", "len", "mi", "nor", "o", "pel", "qui", "ras",
    "sil", "ta", "u", "ven", "wes", "xa", "yor", "zu", "bri", "cal",
];

/// A sentence with a place, a name and a number in it, and the question that the name or the number answers.
const FORMS: [(&str, &str, Slot); 8] = [
    (
        "The bridge of {place} was built by {name} in the year {number}.",
        "Who built the bridge of {place}?",
        Slot::Name,
    ),
    (
        "In {place} the bakery belongs to {name}, who opens it at {number} minutes past four.",
        "To whom does the bakery in {place} belong?",
        Slot::Name,
    ),
    (
        "The clock tower of {place} has {number} steps, and {name} winds it every Monday.",
        "How many steps does the clock tower of {place} have?",
        Slot::Number,
    ),
    (
        "The ferry to {place} is steered by {name} and carries {number} passengers.",
        "Who steers the ferry to {place}?",
        Slot::Name,
    ),
    (
        "The library of {place} keeps {number} maps, all of them drawn by {name}.",
        "How many maps does the library of {place} keep?",
        Slot::Number,
    ),
    (
        "The garden of {place} is tended by {name}, who planted {number} pear trees there.",
        "Who tends the garden of {place}?",
        Slot::Name,
    ),
    (
        "The school of {place} was founded by {name} with {number} pupils.",
        "Who founded the school of {place}?",
        Slot::Name,
    ),
    (
        "The lighthouse of {place} stands {number} metres above the sea; {name} keeps its lamp.",
        "Who keeps the lamp of the lighthouse of {place}?",
        Slot::Name,
    ),
];

#[derive(Clone, Copy)]
enum Slot {
    Name,
    Number,
}

/// Something to tell, and to ask for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Fact {
    pub(crate) sentence: String,
    pub(crate) question: String,
    /// What a right answer holds.
    pub(crate) answer: String,
}

/// So many facts of a session. `round` tells what it is told first (0) from what it is told later.
pub(crate) fn facts(seed: u64, session: usize, round: u64, count: usize) -> Vec<Fact> {
    let mut random = Random::new(seed, (session as u64 + 1) << 20 | (round & 0xf_ffff));
    let mut places = Vec::with_capacity(count);
    while places.len() < count {
        // Three syllables and, where those are all taken, more.
        let extra = places.len() / 4096;
        let place = word(&mut random, 3 + extra);
        if !places.contains(&place) {
            places.push(place);
        }
    }
    places
        .into_iter()
        .map(|place| {
            let (sentence, question, slot) = FORMS[random.below(FORMS.len())];
            let name = format!("{} {}", word(&mut random, 2), word(&mut random, 3));
            let number = (random.below(880) + 20).to_string();
            let fill = |form: &str| {
                form.replace("{place}", &place)
                    .replace("{name}", &name)
                    .replace("{number}", &number)
            };
            Fact {
                sentence: fill(sentence),
                question: fill(question),
                answer: match slot {
                    Slot::Name => name.clone(),
                    Slot::Number => number.clone(),
                },
            }
        })
        .collect()
}

/// The facts as one text.
pub(crate) fn text(facts: &[Fact]) -> String {
    let sentences: Vec<_> = facts.iter().map(|fact| fact.sentence.as_str()).collect();
    sentences.join(" ")
}

fn word(random: &mut Random, syllables: usize) -> String {
    let word: String = (0..syllables)
        .map(|_| SYLLABLES[random.below(SYLLABLES.len())])
        .collect();
    let mut letters = word.chars();
    letters.next().map_or_else(String::new, |first| {
        first.to_uppercase().chain(letters).collect()
    })
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn a_sessions_facts_are_its_own_and_each_answer_stands_in_its_sentence() {
        let (one, same) = (facts(1, 0, 0, 40), facts(1, 0, 0, 40));
        assert_eq!(one, same);
        assert_ne!(one, facts(1, 1, 0, 40));
        assert_ne!(one, facts(1, 0, 1, 40));
        assert_ne!(one, facts(2, 0, 0, 40));
        let questions: BTreeSet<_> = one.iter().map(|fact| &fact.question).collect();
        assert_eq!(questions.len(), 40);
        for fact in &one {
            assert!(fact.sentence.contains(&fact.answer), "{fact:?}");
            assert!(!fact.question.contains(&fact.answer), "{fact:?}");
            assert!(!fact.sentence.contains('{') && !fact.question.contains('{'));
        }
    }
}
