//! Words of a text that comes in pieces, as hashes of their stems.
//!
//! A stem is the first six letters in lower case, without a plural's s; letters of scripts that are written without spaces
//! are words by themselves. Start at [`Listener::hear`].

use std::{
    collections::HashSet,
    hash::{DefaultHasher, Hash, Hasher},
    sync::LazyLock,
};

/// Letters of a stem.
const STEM: usize = 6;
/// Letters of a line's label at most, and of a word that are kept.
const LABEL: usize = 32;
/// From here on (CJK radicals) a letter is a word.
const IDEOGRAPHS: char = '\u{2e80}';

/// Words that say nothing of what a text is about, and those by which one asks for a text as such.
const COMMON: &str = "a about above according after again against all also am an and answer any anything are aren article as ask asked \
at be because been before being below between both but by call called can cannot chat conversation could couldn described did didn \
discussed do document does doesn doing don down during each everything explain few find first following for from further gave get give \
given had has hasn have haven having he hello help her here hers hey hi him his how however i if in information into is isn it its just \
kind know known like list ll made make many may me mention mentioned message might mine more most much must my myself name named no nor \
not now of off on once one only or other our out over own part passage people person please question re read recall remember s said same \
say says she should shouldn since so some something such summarise summarize summary t take talk tell text than thank thanks that the \
their them then there these they thing things this those through time to told too two type under until up us use used ve very was wasn \
way we were weren what when where which while who whom whose why will with without won would wouldn write year you your yourself";

static COMMON_WORDS: LazyLock<HashSet<&str>> =
    LazyLock::new(|| COMMON.split_ascii_whitespace().collect());

/// By these a user speaks of himself; "I" and "us" are too often a number and a country.
const PERSONAL: [&str; 6] = ["me", "my", "mine", "myself", "we", "our"];

/// Turns text, as it comes, into what it speaks of; a word that is cut between two pieces is put together.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Listener {
    /// The word under way, at most [`LABEL`] letters of it.
    word: String,
    /// The line under way up to here, if it may still be a label.
    line: Line,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Line {
    Begun(String),
    /// Too long, or past its label.
    Over,
}

impl Default for Line {
    fn default() -> Self {
        Self::Begun(String::new())
    }
}

/// What a piece of text has added.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Heard {
    /// Each word's hash; none of a common word.
    pub(crate) words: Vec<Option<u32>>,
    /// Hashes of what stands before a colon at the beginning of a line.
    pub(crate) labels: Vec<u32>,
    /// Whether somebody speaks of himself.
    pub(crate) personal: bool,
    /// Who goes on behind the piece.
    pub(crate) listener: Listener,
}

impl Listener {
    /// Goes on with a text.
    #[must_use]
    pub(crate) fn hear(mut self, text: &str) -> Heard {
        let mut heard = Heard::default();
        for letter in text.chars() {
            self.label(letter, &mut heard);
            if letter >= IDEOGRAPHS && letter.is_alphanumeric() {
                self.end(&mut heard);
                self.word.push(letter);
                self.end(&mut heard);
            } else if letter.is_alphanumeric() {
                if self.word.len() < LABEL {
                    self.word.extend(letter.to_lowercase());
                }
            } else {
                self.end(&mut heard);
            }
        }
        heard.listener = self;
        heard
    }

    /// The word under way, as if it ended here.
    pub(crate) fn under_way(&self) -> Option<u32> {
        stem(&self.word).map(hash)
    }

    fn end(&mut self, heard: &mut Heard) {
        if !self.word.is_empty() {
            heard.personal |= PERSONAL.contains(&self.word.as_str());
            heard.words.push(stem(&self.word).map(hash));
            self.word.clear();
        }
    }

    fn label(&mut self, letter: char, heard: &mut Heard) {
        match (&mut self.line, letter) {
            (_, '\n') => self.line = Line::default(),
            (Line::Over, _) => {}
            (Line::Begun(line), ':') => {
                let label = line.trim();
                if !label.is_empty() {
                    heard.labels.push(hash(label));
                }
                self.line = Line::Over;
            }
            (Line::Begun(line), letter) if line.len() < LABEL => line.extend(letter.to_lowercase()),
            (Line::Begun(_), _) => self.line = Line::Over,
        }
    }
}

/// None of a common word, and of a single letter that is no digit.
fn stem(word: &str) -> Option<&str> {
    let mut letters = word.chars();
    let (first, second) = (letters.next()?, letters.next());
    let single = second.is_none() && first < IDEOGRAPHS && !first.is_numeric();
    if single || COMMON_WORDS.contains(word) {
        return None;
    }
    if let Some((end, _)) = word.char_indices().nth(STEM) {
        return word.get(..end);
    }
    Some(match word.strip_suffix('s') {
        Some(singular) if singular.chars().count() > 2 => singular,
        Some(_) | None => word,
    })
}

fn hash(text: &str) -> u32 {
    // The same for equal texts of one process: nothing of it is kept beyond.
    let mut hasher = DefaultHasher::new();
    text.hash(&mut hasher);
    hasher.finish() as u32
}
