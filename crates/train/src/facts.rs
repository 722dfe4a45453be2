//! Synthetic packs of facts: names that nobody has heard, what is said of them, and questions about it.
//!
//! `code` is never an attribute here: recall is judged on it. Start at [`pack`].

use crate::{
    Error,
    data::{Asked, Format},
    random::Random,
};

const ATTRIBUTES: [&str; 24] = [
    "password",
    "age",
    "phone extension",
    "room number",
    "favourite colour",
    "birthplace",
    "score",
    "weight in grams",
    "job",
    "pet",
    "locker number",
    "badge",
    "home town",
    "drink",
    "lucky number",
    "year of birth",
    "street",
    "instrument",
    "desk",
    "parking space",
    "nickname",
    "favourite food",
    "bus line",
    "team",
];
const VALUES: [&str; 60] = [
    "red", "blue", "green", "amber", "silver", "violet", "London", "Cairo", "Lima", "Oslo",
    "Quito", "Dakar", "tea", "coffee", "milk", "juice", "baker", "pilot", "nurse", "farmer",
    "teacher", "lawyer", "cat", "dog", "parrot", "turtle", "horse", "falcon", "rabbit", "iron",
    "copper", "granite", "maple", "cedar", "walnut", "storm", "river", "harbor", "lantern",
    "compass", "anchor", "saddle", "violin", "marble", "piano", "garden", "window", "bridge",
    "candle", "market", "orchard", "pepper", "saffron", "velvet", "thunder", "meadow", "willow",
    "basket", "mirror", "ladder",
];
const SYLLABLES: [&str; 32] = [
    "ba", "ko", "ri", "ta", "mel", "dor", "vin", "sha", "lu", "pra", "gen", "tol", "zed", "mi",
    "ka", "fen", "rul", "os", "ter", "wyn", "jal", "bru", "que", "nor", "sil", "hep", "dra", "ven",
    "osk", "ili", "mar", "tup",
];
/// How a fact is said; the value comes last but for what closes the sentence.
const SENTENCES: [&str; 6] = [
    "The {a} of {x} is {v}.",
    "{x} has the {a} {v}.",
    "For {x}, the {a} is {v}.",
    "{x}'s {a} is {v}.",
    "As for the {a} of {x}, it is {v}.",
    "We know that the {a} of {x} is {v}.",
];
const COUNTS: [usize; 8] = [1, 2, 3, 4, 6, 8, 12, 16];

fn name(random: &mut Random) -> String {
    let mut name = String::new();
    for _ in 0..2 + random.below(2) {
        name.push_str(SYLLABLES[random.below(SYLLABLES.len())]);
    }
    let mut letters = name.chars();
    let first = letters.next().map(|c| c.to_ascii_uppercase());
    first.into_iter().chain(letters).collect()
}

fn value(random: &mut Random) -> String {
    if random.chance(0.6) {
        let digits = 2 + random.below(4);
        return (0..digits)
            .map(|_| char::from(b'0' + random.below(10) as u8))
            .collect();
    }
    let word = VALUES[random.below(VALUES.len())];
    if random.chance(0.4) {
        return format!("{word} {}", VALUES[random.below(VALUES.len())]);
    }
    word.to_owned()
}

/// A pack that fits into a window, and `questions` about it: half of them as the beginning of the fact's own sentence,
/// half as questions, of which a share `chat` is asked in the chat template.
pub(crate) fn pack(
    random: &mut Random,
    format: &Format,
    questions: usize,
    chat: f64,
) -> Result<Asked, Error> {
    let count = COUNTS[random.below(COUNTS.len())];
    let mut names: Vec<String> = Vec::new();
    while names.len() < count {
        let name = name(random);
        if !names.contains(&name) {
            names.push(name);
        }
    }
    let shared = random
        .chance(0.5)
        .then(|| ATTRIBUTES[random.below(ATTRIBUTES.len())]);
    let sentence = SENTENCES[random.below(SENTENCES.len())];
    let between = if random.chance(0.5) { " " } else { "\n" };
    let facts: Vec<(String, &str, String)> = names
        .into_iter()
        .map(|name| {
            let attribute = shared.unwrap_or_else(|| ATTRIBUTES[random.below(ATTRIBUTES.len())]);
            (name, attribute, value(random))
        })
        .collect();
    let said = |(name, attribute, value): &(String, &str, String)| {
        sentence
            .replace("{a}", attribute)
            .replace("{x}", name)
            .replace("{v}", value)
    };
    let (mut context, mut fitting) = (Vec::new(), 0);
    for (index, fact) in facts.iter().enumerate() {
        let mut text = if index > 0 {
            between.to_owned()
        } else {
            String::new()
        };
        text.push_str(&said(fact));
        let tokens = format.text.encode_plain(&text)?;
        if !context.is_empty() && context.len() + tokens.len() + 4 > format.window {
            break;
        }
        context.extend(tokens);
        fitting += 1;
    }
    if random.chance(0.5) {
        context.extend(format.text.encode_plain(&format.suffix)?);
    }
    context.truncate(format.window);
    let asked = (0..questions).map(|_| {
        let (name, attribute, value) = &facts[random.below(fitting)];
        if random.chance(0.5) {
            let begun = sentence.split("{v}").next().unwrap_or_default();
            let begun = begun.replace("{a}", attribute).replace("{x}", name);
            return format.continuation(begun.trim_end(), &format!(" {value}."));
        }
        let question = format!("What is the {attribute} of {name}?");
        format.question(&question, value, random.chance(chat))
    });
    let questions = asked.collect::<Result<_, Error>>()?;
    Ok(Asked { context, questions })
}

#[cfg(test)]
mod tests;
