//! Whether a prompt concerns what was told.
//!
//! An imprint changes every answer, also to questions that it knows nothing of. What a document speaks of is kept as the
//! hashes of its words, window by window; the share of a prompt's words that one window speaks of says how far the imprint
//! is meant, and becomes the strength that it gets. Knows words alone: no model, no tokens. Start at [`strength`].

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

/// What a document speaks of: at most four bytes for each of its words.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Spoken {
    /// Hashes of the words of each full window, ascending.
    full: Vec<Box<[u32]>>,
    open: BTreeSet<u32>,
    /// Words of the open window, repetitions and common ones included.
    count: usize,
    labels: BTreeSet<u32>,
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
        self.listener = heard.listener;
    }

    /// What a whole text speaks of.
    #[must_use]
    pub fn of(text: &str) -> Self {
        let mut spoken = Self::default();
        spoken.add(spoken.listener().hear(text));
        spoken
    }

    /// The largest share of the words that one window speaks of, from 0 to 1.
    fn share(&self, words: &[u32]) -> f32 {
        let under_way = self.listener.under_way();
        let open = |word: &&u32| self.open.contains(word) || under_way == Some(**word);
        let most = self
            .full
            .iter()
            .map(|window| {
                let known = words
                    .iter()
                    .filter(|word| window.binary_search(word).is_ok());
                known.count()
            })
            .chain([words.iter().filter(open).count()])
            .max();
        most.unwrap_or(0) as f32 / words.len().max(1) as f32
    }
}

/// What a prompt asks.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Asked {
    /// The words of each message that has any.
    messages: Vec<Vec<u32>>,
    label: Option<u32>,
}

impl Asked {
    /// Of a conversation's messages that a user wrote, oldest first, and what the prompt ends with where that is a label such
    /// as `Answer:`.
    #[must_use]
    pub fn new<'a>(
        messages: impl DoubleEndedIterator<Item = &'a str>,
        label: Option<&str>,
    ) -> Self {
        let words = |message: &str| -> Vec<u32> {
            let heard = Listener::default().hear(message);
            let mut words: BTreeSet<u32> = heard.words.into_iter().flatten().collect();
            words.extend(heard.listener.under_way());
            words.into_iter().collect()
        };
        Self {
            messages: messages
                .rev()
                .take(MESSAGES)
                .map(words)
                .filter(|words| !words.is_empty())
                .collect(),
            label: label.and_then(|label| {
                let last = label.rsplit('\n').next().unwrap_or("");
                let heard = Listener::default().hear(last);
                heard.labels.first().copied()
            }),
        }
    }
}

/// How far an imprint of these documents is meant by a prompt, from 0 (not at all) to 1.
///
/// It is 1 if the prompt says nothing to go by (no word but common ones), or ends with a label that the documents use (a
/// task's own form, as in few-shot examples). Else it rises with the share of a message's words that one window of a document
/// speaks of; of several messages the one counts that has the largest share.
#[must_use]
pub fn strength<'a>(told: impl Iterator<Item = &'a Spoken>, asked: &Asked) -> f32 {
    if asked.messages.is_empty() {
        return 1.0;
    }
    let mut most = 0.0f32;
    for spoken in told {
        if asked
            .label
            .is_some_and(|label| spoken.labels.contains(&label))
        {
            return 1.0;
        }
        for words in &asked.messages {
            most = most.max(spoken.share(words));
        }
    }
    let [none, all] = SHARES;
    ((most - none) / (all - none)).clamp(0.0, 1.0)
}

#[cfg(test)]
mod tests;
