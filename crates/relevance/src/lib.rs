//! Whether a prompt concerns what was told.
//!
//! An imprint changes every answer, also to questions that it knows nothing of; and the more documents are in it, the less is
//! left of each. What a document speaks of is kept as the hashes of its words, window by window. The share of a prompt's words
//! that one window speaks of says how far the imprint is meant, and becomes the strength that it gets; which documents speak
//! of them says which it is best made of. Knows words alone: no model, no tokens. Start at [`meant`].

mod words;

use std::collections::BTreeSet;

pub use words::{Heard, Listener};

/// Words of a window: about as many as a generator's window of 256 tokens holds.
const WINDOW: usize = 192;
/// Labels of a document that are kept.
const LABELS: usize = 256;
/// Messages of a conversation that are looked at, the newest.
const MESSAGES: usize = 4;
/// Share of a prompt's words up to which the imprint is not meant at all, and from which it is meant wholly. Set on training
/// questions: 1.8 % of those about another paragraph reach the upper one, 87 % of those about their own
/// (docs/QUALITY.md).
const SHARES: [f32; 2] = [0.1, 0.4];
/// Documents at most that an imprint is made of where a prompt means some more than others.
const DOCUMENTS: usize = 4;
/// A document is meant if it scores at least this much of the best one's score.
const BESIDE: f32 = 0.7;

/// What a document speaks of: at most four bytes for each of its words.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Spoken {
    /// Hashes of the words of each full window, ascending.
    full: Vec<Box<[u32]>>,
    open: BTreeSet<u32>,
    /// Words of the open window, repetitions and common ones included.
    count: usize,
    labels: BTreeSet<u32>,
    /// Whether somebody speaks of himself.
    personal: bool,
    listener: Listener,
}

impl Spoken {
    /// Who goes on listening to the document.
    #[must_use]
    pub fn listener(&self) -> Listener {
        self.listener.clone()
    }

    /// Adds what its listener has heard.
    pub fn add(&mut self, heard: Heard) {
        for word in heard.words {
            self.open.extend(word);
            self.count += 1;
            if self.count == WINDOW {
                self.full.push(self.open.iter().copied().collect());
                self.open.clear();
                self.count = 0;
            }
        }
        for label in heard.labels {
            if self.labels.len() < LABELS {
                self.labels.insert(label);
            }
        }
        self.personal |= heard.personal;
        self.listener = heard.listener;
    }

    /// What a whole text speaks of.
    #[must_use]
    pub fn of(text: &str) -> Self {
        let mut spoken = Self::default();
        spoken.add(spoken.listener().hear(text));
        spoken
    }

    /// The largest sum of the weights of words that one window speaks of.
    fn weight(&self, words: &[(u32, f32)]) -> f32 {
        let under_way = self.listener.under_way();
        let sum = |knows: &dyn Fn(u32) -> bool| -> f32 {
            let known = words.iter().filter(|(word, _)| knows(*word));
            known.map(|(_, weight)| weight).sum()
        };
        self.full
            .iter()
            .map(|window| sum(&|word| window.binary_search(&word).is_ok()))
            .chain([sum(&|word| {
                self.open.contains(&word) || under_way == Some(word)
            })])
            .fold(0.0, f32::max)
    }

    fn knows(&self, word: u32) -> bool {
        self.weight(&[(word, 1.0)]) > 0.0
    }
}

/// What a prompt asks.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Asked {
    /// The words of each message that has any.
    messages: Vec<Vec<u32>>,
    label: Option<u32>,
    /// Whether the newest message is about who asks.
    personal: bool,
}

impl Asked {
    /// Of a conversation's messages that a user wrote, oldest first, and what the prompt ends with where that is a label such
    /// as `Answer:`.
    #[must_use]
    pub fn new<'a>(
        messages: impl DoubleEndedIterator<Item = &'a str>,
        label: Option<&str>,
    ) -> Self {
        let mut heard = messages.rev().take(MESSAGES).map(|message| {
            // Its last word ends with it.
            Listener::default().hear(&format!("{message}\n"))
        });
        let newest = heard.next();
        let personal = newest.as_ref().is_some_and(|heard| heard.personal);
        let words = |heard: Heard| -> Vec<u32> {
            let words: BTreeSet<u32> = heard.words.into_iter().flatten().collect();
            words.into_iter().collect()
        };
        Self {
            messages: newest
                .into_iter()
                .chain(heard)
                .map(words)
                .filter(|words| !words.is_empty())
                .collect(),
            personal,
            label: label.and_then(|label| {
                let last = label.rsplit('\n').next().unwrap_or("");
                let heard = Listener::default().hear(last);
                heard.labels.first().copied()
            }),
        }
    }
}

/// What of a session's imprint a prompt means.
#[derive(Clone, Debug, PartialEq)]
pub struct Meant {
    /// How far it is meant at all: from 0 (not at all) to 1.
    pub strength: f32,
    /// The documents that it is best made of, by their place, ascending; none: of all.
    pub documents: Option<Vec<usize>>,
}

impl Meant {
    /// All of it.
    const ALL: Self = Self {
        strength: 1.0,
        documents: None,
    };
}

/// What of an imprint of these documents is meant by a prompt.
///
/// All of it if the prompt says nothing to go by (no word but common ones), or ends with a label that the documents use (a
/// task's own form, as in few-shot examples), or if who asks speaks of himself (`my`, `me`) and so does a document: "how old
/// is my sister" need not share a word with what was told of her. Else its strength rises with the share of a message's words that one window of
/// a document speaks of; of several messages the one counts that has the largest share. With it the documents are chosen that
/// speak of these words most, words that few of them speak of counting for more (inverse document frequency).
#[must_use]
pub fn meant(told: &[&Spoken], asked: &Asked) -> Meant {
    let label = |spoken: &&&Spoken| {
        asked
            .label
            .is_some_and(|label| spoken.labels.contains(&label))
    };
    if asked.messages.is_empty() || told.iter().any(|spoken| label(&spoken)) {
        return Meant::ALL;
    }
    let mut most = (0.0f32, None);
    for message in &asked.messages {
        let even: Vec<(u32, f32)> = message.iter().map(|&word| (word, 1.0)).collect();
        let weights = told.iter().map(|spoken| spoken.weight(&even));
        let share = weights.fold(0.0, f32::max) / message.len() as f32;
        if share > most.0 {
            most = (share, Some(message));
        }
    }
    let (share, message) = most;
    let [none, all] = SHARES;
    let strength = ((share - none) / (all - none)).clamp(0.0, 1.0);
    if strength < 1.0 && asked.personal && told.iter().any(|spoken| spoken.personal) {
        return Meant::ALL;
    }
    Meant {
        strength,
        documents: message
            .filter(|_| strength > 0.0)
            .and_then(|message| chosen(told, message)),
    }
}

/// The documents that speak most of the words; none if that leaves none out.
fn chosen(told: &[&Spoken], words: &[u32]) -> Option<Vec<usize>> {
    let weighted: Vec<(u32, f32)> = words
        .iter()
        .map(|&word| {
            let known = told.iter().filter(|spoken| spoken.knows(word)).count() as f32;
            // As BM25 weighs a word.
            (
                word,
                (1.0 + (told.len() as f32 - known + 0.5) / (known + 0.5)).ln(),
            )
        })
        .collect();
    let weights: Vec<f32> = told.iter().map(|spoken| spoken.weight(&weighted)).collect();
    let best = weights.iter().copied().fold(0.0, f32::max);
    let mut places: Vec<usize> = (0..told.len())
        .filter(|&place| weights[place] >= BESIDE * best)
        .collect();
    // Of equals the later one: what was said last.
    places.sort_by(|a, b| weights[*b].total_cmp(&weights[*a]).then(b.cmp(a)));
    places.truncate(DOCUMENTS);
    places.sort_unstable();
    (places.len() < told.len()).then_some(places)
}

#[cfg(test)]
mod tests;
