//! Synthetic facts: `The code of Name is 1234.`, so many in a context, and the question for one of them.
//!
//! No generator was trained on codes; names are made of syllables by the seed. Only the digits are scored and generated.
//! Start at [`cases`].

use std::{collections::BTreeSet, sync::Arc};

use super::{Case, Question, Wanted};
use crate::{
    Error,
    prompt::{Document, Prompts},
    random::Draws,
};

const FIRST: [&str; 16] = [
    "Zor", "Mir", "Tol", "Quan", "Bes", "Hyr", "Vax", "Dru", "Pel", "Sag", "Wix", "Fel", "Kran",
    "Ost", "Jun", "Lom",
];
const LAST: [&str; 16] = [
    "blat", "vane", "kup", "dril", "per", "mont", "ley", "noc", "mira", "orn", "ton", "lume",
    "dor", "rivel", "dra", "quist",
];
const PLACES: [&str; 8] = [
    "harbour", "market", "station", "library", "garden", "mill", "square", "bridge",
];
const WEATHER: [&str; 6] = ["rain", "wind", "fog", "sunshine", "snow", "hail"];
const DAYS: [&str; 7] = [
    "Monday",
    "Tuesday",
    "Wednesday",
    "Thursday",
    "Friday",
    "Saturday",
    "Sunday",
];

/// One question for each context, which is not the generator's question form but the fact's own words.
pub(super) fn cases(wanted: &Wanted, prompts: &Prompts<'_>) -> Result<Vec<Case>, Error> {
    let most = FIRST.len() * LAST.len();
    let mut cases = Vec::new();
    for &count in &wanted.facts {
        if count == 0 || count > most {
            return Err(Error::Option {
                option: "--facts",
                detail: format!("there can be 1 to {most} facts, not {count}"),
            });
        }
        let mut draws = Draws::new(wanted.seed, "facts");
        for number in 0..wanted.limit {
            cases.push(case(
                count,
                number,
                wanted.distance_tokens,
                &mut draws,
                prompts,
            )?);
        }
    }
    Ok(cases)
}

#[expect(clippy::cast_precision_loss, reason = "at most 256 facts")]
fn case(
    count: usize,
    number: usize,
    distance: usize,
    draws: &mut Draws,
    prompts: &Prompts<'_>,
) -> Result<Case, Error> {
    let mut names = BTreeSet::new();
    while names.len() < count {
        let name = (draws.below(FIRST.len()), draws.below(LAST.len()));
        names.insert(name);
    }
    let mut facts: Vec<(String, String)> = names
        .into_iter()
        .map(|(first, last)| {
            let code = (0..4)
                .map(|_| char::from(b'0' + draws.below(10) as u8))
                .collect();
            (format!("{}{}", FIRST[first], LAST[last]), code)
        })
        .collect();
    draws.shuffle(&mut facts);
    let told: Vec<String> = facts
        .iter()
        .map(|(name, code)| format!("The code of {name} is {code}."))
        .collect();
    let mut text = told.join(" ");
    let mut tokens = prompts.tokens(&text)?;
    let facts_end = tokens.len();
    while tokens.len() < facts_end + distance {
        let day = DAYS[draws.below(DAYS.len())];
        let weather = WEATHER[draws.below(WEATHER.len())];
        let place = PLACES[draws.below(PLACES.len())];
        text.push_str(&format!(" On {day} there was {weather} near the {place}."));
        tokens = prompts.tokens(&text)?;
    }
    let asked = draws.below(count);
    let (name, code) = &facts[asked];
    let prompt = format!("The code of {name} is ");
    Ok(Case {
        context: vec![Arc::new(Document { text, tokens })],
        frame: prompts.bare_frame(),
        styled: None,
        questions: vec![Question {
            id: format!("{count}-{number}"),
            label: if distance == 0 {
                format!("{count} facts")
            } else {
                format!("{count} facts, {distance} tokens before")
            },
            x: Some(count as f64),
            asked: Some(relevance::Asked::text(&prompt)),
            body: prompts.tokens(&prompt)?,
            shown: prompt.clone(),
            query: Some(prompt),
            references: vec![code.clone()],
            answer: prompts.tokens(code)?,
            options: Vec::new(),
            right: None,
            max_tokens: code.len(),
        }],
    })
}
