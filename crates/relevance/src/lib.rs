//! Whether a prompt concerns what was told.
//!
//! An imprint changes every answer, also to questions that it knows nothing of; and the more documents are in it, the less is
//! left of each. What a document speaks of is kept as the hashes of its words, sentence by sentence. The share of a prompt's words
//! that one window of sentences speaks of says how far the imprint is meant, and becomes the strength that it gets; which sentences speak
//! of them says which it is best made of. Knows words alone: no model, and of tokens only how many there are. Start at [`meant`].

mod words;

use std::{collections::BTreeSet, ops::Range};

use words::{Heard, Listener};

/// Words of a window: about as many as a generator's window of 256 tokens holds.
const WINDOW: usize = 192;
/// Words of a passage at most: it ends with its sentence, or at the next word.
const LONGEST: usize = 96;
/// Labels of a document that are kept.
const LABELS: usize = 256;
/// Words of a message that are looked at, whichever: each is looked up in every passage.
const WORDS: usize = 256;
/// Messages of a conversation that are looked at, the newest.
const MESSAGES: usize = 4;
/// Words at the end of a text that is to be continued that are looked at.
const LAST: usize = 24;
/// Share of a prompt's words up to which the imprint is not meant at all, and from which it is meant wholly. Set on training
/// questions: 1.8 % of those about another paragraph reach the upper one, 87 % of those about their own
/// (docs/QUALITY.md).
const SHARES: [f32; 2] = [0.1, 0.4];
/// Passages at most that an imprint is made of where a prompt means some more than others, beside their neighbours.
const PASSAGES: usize = 2;
/// A passage is meant if it scores at least this much of the best one's score.
const BESIDE: f32 = 0.7;
/// Weight of the windows around the passages: so much for the share of the prompt's words that these do not speak of, and their share of
/// the windows times so much. Set on training questions and on synthetic facts (docs/QUALITY.md).
const DOUBT: f32 = 2.0;
const SURE: f32 = 0.2;

/// What a document speaks of: at most four bytes for each of its words, and a few for each of its passages.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Spoken {
    /// In order, without gaps.
    passages: Vec<Passage>,
    /// Words of the passage under way.
    open: BTreeSet<u32>,
    /// How many, repetitions and common ones included.
    count: usize,
    /// Words of what is told but has no tokens yet.
    rest: BTreeSet<u32>,
    /// Tokens so far.
    tokens: usize,
    /// Whether a sentence ends if a space follows.
    mark: bool,
    labels: BTreeSet<u32>,
    /// Whether somebody speaks of himself.
    personal: bool,
    listener: Listener,
}

/// A few sentences.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Passage {
    /// Hashes of its words, ascending.
    words: Box<[u32]>,
    /// How many, repetitions and common ones included.
    count: usize,
    /// Where it ends among the document's tokens.
    end: usize,
}

impl Spoken {
    /// Goes on with a piece of text that is so many tokens. Passages end between pieces.
    pub fn hear(&mut self, text: &str, tokens: usize) {
        // Blanks belong to what stands before them.
        let space = text.chars().next().filter(|first| first.is_whitespace());
        let mut text = text;
        if let Some(space) = space.filter(|_| !text.trim().is_empty())
            && ((self.mark && self.count > 0) || self.count >= LONGEST)
        {
            // A space ends the last word of what it stands behind.
            let (first, rest) = text.split_at(space.len_utf8());
            self.listen(first);
            text = rest;
            self.close();
        }
        self.tokens += tokens;
        self.listen(text);
        if let Some(last) = text.trim_end().chars().next_back() {
            let ends = |letter| matches!(letter, '.' | '!' | '?');
            let closes = matches!(last, '"' | '\'' | ')' | '”');
            self.mark = ends(last) || (closes && (self.mark || text.contains(ends)));
        }
        if text.contains('\n') && self.count > 0 {
            self.close();
        }
    }

    /// What was told behind all pieces, but has no tokens yet.
    pub fn ahead(&mut self, text: &str) {
        let heard = self.listener.clone().hear(&format!("{text}\n"));
        self.rest = heard.words.into_iter().flatten().collect();
        self.personal |= heard.personal;
    }

    fn listen(&mut self, text: &str) {
        let heard = std::mem::take(&mut self.listener).hear(text);
        self.count += heard.words.len();
        self.open.extend(heard.words.into_iter().flatten());
        for label in heard.labels {
            if self.labels.len() < LABELS {
                self.labels.insert(label);
            }
        }
        self.personal |= heard.personal;
        self.listener = heard.listener;
    }

    fn close(&mut self) {
        self.passages.push(Passage {
            words: std::mem::take(&mut self.open).into_iter().collect(),
            count: std::mem::take(&mut self.count),
            end: self.tokens,
        });
    }

    /// What goes on where this one ends: as it is, but without the passages that have ended.
    #[must_use]
    pub fn onward(&self) -> Self {
        Self {
            passages: Vec::new(),
            open: self.open.clone(),
            rest: self.rest.clone(),
            labels: self.labels.clone(),
            listener: self.listener.clone(),
            ..*self
        }
    }

    /// Takes over what [`Spoken::onward`] has come to.
    pub fn extend(&mut self, onward: Self) {
        let mut passages = std::mem::take(&mut self.passages);
        passages.extend(onward.passages);
        *self = Self { passages, ..onward };
    }

    /// What a whole text speaks of, each word a token.
    #[must_use]
    pub fn of(text: &str) -> Self {
        let mut spoken = Self::default();
        let (mut start, mut blank) = (0, true);
        for (at, letter) in text.char_indices() {
            if letter.is_whitespace() && !blank {
                spoken.hear(&text[start..at], 1);
                start = at;
            }
            blank = letter.is_whitespace();
        }
        if start < text.len() {
            spoken.hear(&text[start..], 1);
        }
        spoken
    }

    /// Whether the passage of this number, the open one last, speaks of a word.
    fn knows(&self, passage: usize, word: u32) -> bool {
        match self.passages.get(passage) {
            Some(passage) => passage.words.binary_search(&word).is_ok(),
            None => {
                self.open.contains(&word)
                    || self.rest.contains(&word)
                    || self.listener.under_way() == Some(word)
            }
        }
    }

    /// How many passages there are, the open one included if there is a word in it.
    fn len(&self) -> usize {
        let open = self.count > 0 || !self.rest.is_empty() || self.listener.under_way().is_some();
        self.passages.len() + usize::from(open || self.passages.is_empty())
    }

    /// Where a passage lies among the tokens.
    fn span(&self, passage: usize) -> Range<usize> {
        let end = |passage: usize| match self.passages.get(passage) {
            Some(closed) if passage + 1 < self.len() => closed.end,
            Some(_) | None => self.tokens,
        };
        passage.checked_sub(1).map_or(0, end)..end(passage)
    }

    /// Where the window lies that holds a passage.
    fn window(&self, passage: usize) -> Range<usize> {
        let (mut start, mut count, mut over) = (0, 0, false);
        for other in 0..self.len() {
            if over && other > passage {
                return start..self.span(other).start;
            }
            if over {
                (start, count) = (self.span(other).start, 0);
            }
            count += self.passages.get(other).map_or(0, |passage| passage.count);
            over = count >= WINDOW;
        }
        start..self.tokens
    }

    /// The largest number of words that one window speaks of. Each half of a window is the other half of the next one.
    fn known(&self, words: &[u32]) -> usize {
        let nothing = vec![false; words.len()];
        let (mut most, mut count) = (0, 0);
        let (mut before, mut now) = (nothing.clone(), nothing.clone());
        for passage in 0..self.len() {
            for (known, &word) in now.iter_mut().zip(words) {
                *known |= self.knows(passage, word);
            }
            let known = before.iter().zip(&now).filter(|(a, b)| **a || **b);
            most = most.max(known.count());
            let words = self.passages.get(passage);
            count += words.map_or(0, |passage| passage.count);
            if count >= WINDOW / 2 {
                (before, now, count) = (now, nothing.clone(), 0);
            }
        }
        most
    }
}

/// What a prompt asks.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Asked {
    /// The words of each message that has any.
    messages: Vec<Vec<u32>>,
    label: Option<u32>,
    /// Whether it is a text that goes on, of which all is meant unless one knows better.
    goes_on: bool,
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
            words.into_iter().take(WORDS).collect()
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
            goes_on: false,
        }
    }

    /// Of a text that is to be continued: its last words.
    #[must_use]
    pub fn text(text: &str) -> Self {
        let words = text.split_whitespace().rev().take(LAST).count();
        let start = text
            .split_whitespace()
            .rev()
            .nth(words.saturating_sub(1))
            .map_or(0, |word| word.as_ptr() as usize - text.as_ptr() as usize);
        Self {
            goes_on: true,
            ..Self::new([&text[start..]].into_iter(), Some(text))
        }
    }
}

/// What of a session's imprint a prompt means.
#[derive(Clone, Debug, PartialEq)]
pub struct Meant {
    /// How far it is meant at all: from 0 (not at all) to 1.
    pub strength: f32,
    /// What it is best made of, in the order of the documents; none: of all.
    pub parts: Option<Vec<Part>>,
    /// With what weight the tokens around those that are meant count, added to all of them.
    pub beside: f32,
    /// Whether it is to be held back on what it says nothing of, token by token: nothing else says where a text that goes on is about
    /// what was told.
    pub gated: bool,
}

/// A part of a document.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Part {
    /// The document, by its place.
    pub document: usize,
    /// Its tokens that are meant, ascending; none: all of them.
    pub tokens: Vec<Range<usize>>,
    /// The tokens of the windows that these lie in, themselves included.
    pub around: Vec<Range<usize>>,
}

impl Meant {
    /// All of it.
    const ALL: Self = Self {
        strength: 1.0,
        parts: None,
        beside: 0.0,
        gated: false,
    };
    /// All of it where it is about something.
    const GATED: Self = Self {
        gated: true,
        ..Self::ALL
    };
}

/// What of an imprint of these documents is meant by a prompt.
///
/// Of a text that is to be continued always all of it, held back where it says nothing of a token, unless one or two sentences speak
/// of all of its last words, two at least: then these.
/// Of a question or a conversation all of it if the prompt says nothing to go by (no word but common ones), or ends with a label that the documents use (a
/// task's own form, as in few-shot examples), or if who asks speaks of himself (`my`, `me`) and so does a document: "how old
/// is my sister" need not share a word with what was told of her. Else its strength rises with the share of a message's words that one window of
/// a document speaks of; of several messages the one counts that has the largest share. With it the passages are chosen that
/// speak of these words most, words that few of them speak of counting for more (inverse document frequency).
#[must_use]
pub fn meant(told: &[&Spoken], asked: &Asked) -> Meant {
    let label = |spoken: &&&Spoken| {
        asked
            .label
            .is_some_and(|label| spoken.labels.contains(&label))
    };
    if asked.messages.is_empty() || told.iter().any(|spoken| label(&spoken)) {
        return if asked.goes_on {
            Meant::GATED
        } else {
            Meant::ALL
        };
    }
    let mut most = (0.0f32, None);
    for message in &asked.messages {
        let known = told.iter().map(|spoken| spoken.known(message)).max();
        let share = known.unwrap_or(0) as f32 / message.len() as f32;
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
    // One word of a text does not say what it is about.
    let least = if asked.goes_on { 2 } else { 1 };
    let chosen = message
        .filter(|message| strength > 0.0 && message.len() >= least)
        .and_then(|message| chosen(told, message));
    match chosen {
        Some(chosen) if !asked.goes_on || chosen.covered >= 1.0 => Meant {
            strength: if asked.goes_on { 1.0 } else { strength },
            parts: Some(chosen.parts),
            beside: chosen.beside,
            gated: false,
        },
        _ if asked.goes_on => Meant::GATED,
        _ => Meant {
            strength,
            ..Meant::ALL
        },
    }
}

/// Passages that are meant.
struct Chosen {
    parts: Vec<Part>,
    beside: f32,
    /// The share of the words that the best of them speak of.
    covered: f32,
}

/// The passages that speak most of the words, with what lies around them and its weight; none if nothing is left out.
fn chosen(told: &[&Spoken], words: &[u32]) -> Option<Chosen> {
    // (document, passage)
    let all: Vec<(usize, usize)> = told
        .iter()
        .enumerate()
        .flat_map(|(document, spoken)| (0..spoken.len()).map(move |passage| (document, passage)))
        .filter(|&(document, passage)| !told[document].span(passage).is_empty())
        .collect();
    let knows = |place: usize, word: u32| {
        let (document, passage) = all[place];
        told[document].knows(passage, word)
    };
    let mut weights = vec![0.0f32; all.len()];
    for &word in words {
        let known: Vec<usize> = (0..all.len()).filter(|&place| knows(place, word)).collect();
        // As BM25 weighs a word.
        let (count, known_count) = (all.len() as f32, known.len() as f32);
        let weight = (1.0 + (count - known_count + 0.5) / (known_count + 0.5)).ln();
        for place in known {
            weights[place] += weight;
        }
    }
    let best = weights.iter().copied().fold(0.0, f32::max);
    let mut best: Vec<usize> = (0..all.len())
        .filter(|&place| weights[place] >= BESIDE * best)
        .collect();
    // Of equals the later one: what was said last.
    best.sort_by(|a, b| weights[*b].total_cmp(&weights[*a]).then(b.cmp(a)));
    best.truncate(PASSAGES);
    let covered = |word: &&u32| best.iter().any(|&place| knows(place, **word));
    let covered = words.iter().filter(covered).count() as f32 / words.len() as f32;
    // Where a word is missing, the answer may stand in the next sentence, or in the one before.
    let beside = usize::from(covered < 1.0);
    let mut picked: BTreeSet<usize> = BTreeSet::new();
    for &place in &best {
        let near = place.saturating_sub(beside)..=(place + beside).min(all.len() - 1);
        picked.extend(near.filter(|&other| all[other].0 == all[place].0));
    }
    if picked.len() == all.len() {
        return None;
    }
    let mut parts: Vec<Part> = Vec::new();
    for place in picked {
        let (document, passage) = all[place];
        if parts.last().is_none_or(|part| part.document != document) {
            parts.push(Part {
                document,
                tokens: Vec::new(),
                around: Vec::new(),
            });
        }
        if let Some(part) = parts.last_mut() {
            join(&mut part.tokens, told[document].span(passage));
            join(&mut part.around, told[document].window(passage));
        }
    }
    for part in &mut parts {
        let whole = 0..told[part.document].tokens;
        if part.tokens.iter().eq([&whole]) {
            (part.tokens, part.around) = (Vec::new(), Vec::new());
        }
    }
    let count = |of: fn(&Part) -> &[Range<usize>]| -> f32 {
        let lengths = parts.iter().flat_map(of).map(ExactSizeIterator::len);
        lengths.sum::<usize>() as f32
    };
    let share = count(|part| &part.tokens) / count(|part| &part.around).max(1.0);
    Some(Chosen {
        parts,
        beside: (DOUBT * (1.0 - covered) + SURE * share).min(1.0),
        covered,
    })
}

/// Adds a range behind or upon the last one.
fn join(ranges: &mut Vec<Range<usize>>, next: Range<usize>) {
    match ranges.last_mut().filter(|last| next.start <= last.end) {
        Some(last) => last.end = last.end.max(next.end),
        None => ranges.push(next),
    }
}

#[cfg(test)]
mod tests;
