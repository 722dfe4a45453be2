//! What a step reads and asks: windows, groups of them, and queries.
//!
//! Drawn from the pool by the run's random numbers alone, so that their state is the place in the data. No model here.
//! Start at [`Draw::batch`].

use lm::text::TokenId;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::{
    Error,
    data::{Asked, Format, Split},
    facts,
    random::Random,
    recipe::{Ask, Layout, Mix, Recipe},
};

/// What a query is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Kind {
    /// A span of the context.
    Reconstruction,
    /// What follows it.
    Completion,
    /// The answer to a question.
    Answer,
    /// Text that the context does not concern.
    Negative,
}

impl Kind {
    pub(crate) const ALL: [Self; 4] = [
        Self::Reconstruction,
        Self::Completion,
        Self::Answer,
        Self::Negative,
    ];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Reconstruction => "reconstruction",
            Self::Completion => "completion",
            Self::Answer => "answer",
            Self::Negative => "negative",
        }
    }
}

/// A query: its last `scored` tokens are to be predicted.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Query {
    #[serde(serialize_with = "ids", deserialize_with = "of_ids")]
    pub(crate) tokens: Vec<TokenId>,
    pub(crate) scored: usize,
    pub(crate) kind: Kind,
    /// The group whose core it runs with.
    pub(crate) core: usize,
    /// The window that the in-context teacher has in its prompt; a negative's is the bare model.
    pub(crate) window: usize,
}

fn ids<S: Serializer>(tokens: &[TokenId], to: S) -> Result<S::Ok, S::Error> {
    to.collect_seq(tokens.iter().map(|token| token.0))
}

fn lists<S: Serializer>(lists: &[Vec<TokenId>], to: S) -> Result<S::Ok, S::Error> {
    to.collect_seq(
        lists
            .iter()
            .map(|tokens| tokens.iter().map(|token| token.0).collect::<Vec<_>>()),
    )
}

fn of_ids<'de, D: Deserializer<'de>>(from: D) -> Result<Vec<TokenId>, D::Error> {
    Ok(Vec::deserialize(from)?.into_iter().map(TokenId).collect())
}

fn of_lists<'de, D: Deserializer<'de>>(from: D) -> Result<Vec<Vec<TokenId>>, D::Error> {
    let lists: Vec<Vec<u32>> = Vec::deserialize(from)?;
    Ok(lists
        .into_iter()
        .map(|ids| ids.into_iter().map(TokenId).collect())
        .collect())
}

/// What one step reads and asks.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Batch {
    #[serde(serialize_with = "lists", deserialize_with = "of_lists")]
    pub(crate) windows: Vec<Vec<TokenId>>,
    /// The windows of each core, in order.
    pub(crate) groups: Vec<Vec<usize>>,
    pub(crate) queries: Vec<Query>,
}

impl Batch {
    /// What is wrong with a batch that was read from a file.
    pub(crate) fn check(&self) -> Result<(), String> {
        if let Some(group) = self
            .groups
            .iter()
            .position(|group| group.iter().any(|&w| w >= self.windows.len()))
        {
            return Err(format!("group {group} has a window that is not there"));
        }
        if self.windows.iter().any(Vec::is_empty) {
            return Err("a window is empty".to_owned());
        }
        let fits = |query: &Query| {
            query.core < self.groups.len()
                && query.window < self.windows.len()
                && (1..query.tokens.len()).contains(&query.scored)
        };
        match self.queries.iter().position(|query| !fits(query)) {
            Some(query) => Err(format!(
                "query {query} names a core or window that is not there, or scores too many tokens"
            )),
            None => Ok(()),
        }
    }

    /// Tokens that go through the model, teachers not counted.
    pub(crate) fn tokens(&self) -> u64 {
        let context = self.windows.iter().map(|window| window.len() as u64);
        let queries = self.queries.iter().map(|query| query.tokens.len() as u64);
        context.sum::<u64>() + queries.sum::<u64>()
    }
}

/// Draws batches.
pub(crate) struct Draw<'a> {
    pub(crate) recipe: &'a Recipe,
    pub(crate) format: &'a Format,
    pub(crate) split: &'a Split,
}

/// Where a window comes from.
enum Source<'a> {
    /// A piece, its number, and the window's first token in it.
    Text(&'a [TokenId], usize, usize),
    /// With others that it may be asked of instead.
    Asked(Asked, &'a [Asked]),
}

impl Draw<'_> {
    /// The next batch.
    pub(crate) fn batch(&self, random: &mut Random) -> Result<Batch, Error> {
        let chances: Vec<f64> = self
            .recipe
            .layout
            .iter()
            .map(|layout| layout.chance)
            .collect();
        let layout = &self.recipe.layout[random.weighted(&chances)];
        if layout.prefix {
            return self.prefixes(layout, random);
        }
        let mix = layout.mix.as_ref().unwrap_or(&self.recipe.data.mix);
        let mut batch = Batch {
            groups: (0..layout.windows)
                .collect::<Vec<_>>()
                .chunks(layout.group)
                .map(<[usize]>::to_vec)
                .collect(),
            ..Batch::default()
        };
        for window in 0..layout.windows {
            let source = self.source(mix, layout.queries.len(), random)?;
            self.put(&mut batch, source, layout, window, random);
        }
        Ok(batch)
    }

    fn source(
        &self,
        mix: &Mix,
        questions: usize,
        random: &mut Random,
    ) -> Result<Source<'_>, Error> {
        let asked = |from: &'_ [Asked], what, random: &mut Random| {
            let mut asked = random.pick(from).ok_or_else(|| nothing(what))?.clone();
            random.shuffle(&mut asked.questions);
            asked.questions.truncate(questions);
            Ok::<_, Error>(asked)
        };
        let split = self.split;
        Ok(match random.weighted(&mix.shares()) {
            0 => {
                let number = random.below(self.split.pieces.len());
                let piece = self
                    .split
                    .pieces
                    .get(number)
                    .ok_or_else(|| nothing("text"))?;
                Source::Text(piece, number, self.place(piece, random))
            }
            1 => Source::Asked(asked(&split.asked, "questions", random)?, &split.asked),
            3 => Source::Asked(
                asked(&split.dialogues, "dialogues", random)?,
                &split.dialogues,
            ),
            4 => Source::Asked(asked(&split.fewshot, "few-shot tasks", random)?, &[]),
            _ => {
                let pack = facts::pack(random, self.format, questions, self.recipe.data.chat)?;
                Source::Asked(pack, &[])
            }
        })
    }

    /// Where a window begins in a piece: a window and two queries fit behind.
    fn place(&self, piece: &[TokenId], random: &mut Random) -> usize {
        let needed = self.format.window + 2 * self.format.query;
        random.below(piece.len().saturating_sub(needed) + 1)
    }

    fn put(
        &self,
        batch: &mut Batch,
        source: Source<'_>,
        layout: &Layout,
        window: usize,
        random: &mut Random,
    ) {
        let core = window / layout.group;
        match source {
            Source::Asked(Asked { context, questions }, others) => {
                for mut question in questions {
                    let mut kind = Kind::Answer;
                    if layout.foreign > 0.0 && random.chance(layout.foreign) {
                        let other = random.pick(others).filter(|other| other.context != context);
                        let foreign = other.and_then(|other| random.pick(&other.questions));
                        if let Some(foreign) = foreign {
                            (question, kind) = (foreign.clone(), Kind::Negative);
                        }
                    }
                    batch.queries.push(Query {
                        tokens: question.tokens,
                        scored: question.scored,
                        kind,
                        core,
                        window,
                    });
                }
                batch.windows.push(context);
            }
            Source::Text(piece, number, from) => {
                let until = from + self.format.window;
                batch.windows.push(piece[from..until].to_vec());
                for ask in &layout.queries {
                    if let Some((kind, tokens)) = self.ask(ask, (piece, number), from, random) {
                        batch.queries.push(Query {
                            scored: tokens.len() - 1,
                            tokens,
                            kind,
                            core,
                            window,
                        });
                    }
                }
            }
        }
    }

    fn ask(
        &self,
        ask: &Ask,
        (piece, number): (&[TokenId], usize),
        from: usize,
        random: &mut Random,
    ) -> Option<(Kind, Vec<TokenId>)> {
        let (window, query) = (self.format.window, self.format.query);
        let until = from + window;
        let span = |at: usize| piece.get(at..at + query).map(<[TokenId]>::to_vec);
        match random.weighted(&[ask.reconstruction, ask.completion, ask.far, ask.negative]) {
            0 => {
                // The first token of a window writes nothing.
                let at = from + 1 + random.below(window.saturating_sub(query + 1).max(1));
                Some((Kind::Reconstruction, span(at)?))
            }
            1 => Some((Kind::Completion, span(until)?)),
            2 => Some((Kind::Completion, span(until + query)?)),
            _ => {
                // Any piece but this one.
                let other = random.below(self.split.pieces.len().saturating_sub(1));
                let other = self
                    .split
                    .pieces
                    .get(other + usize::from(other >= number))?;
                let at = random.below(other.len().saturating_sub(query) + 1);
                Some((Kind::Negative, other.get(at..at + query)?.to_vec()))
            }
        }
    }

    /// The published scheme on one document: cores are those of its prefixes.
    fn prefixes(&self, layout: &Layout, random: &mut Random) -> Result<Batch, Error> {
        let piece = random
            .pick(&self.split.pieces)
            .ok_or_else(|| nothing("text"))?;
        let window = self.format.window;
        let count = layout.windows.min(piece.len() / window);
        let from = random.below(piece.len().saturating_sub(count * window) + 1);
        let windows: Vec<Vec<TokenId>> = (0..count)
            .map(|i| piece[from + i * window..][..window].to_vec())
            .collect();
        let mut batch = Batch {
            // Core i is that of windows 0 ..= i.
            groups: (0..count).map(|i| (0..=i).collect()).collect(),
            ..Batch::default()
        };
        for (i, own) in windows.iter().enumerate() {
            if let Some(before) = i.checked_sub(1) {
                batch.queries.push(Query {
                    tokens: own.clone(),
                    scored: window - 1,
                    kind: Kind::Completion,
                    core: before,
                    window: before,
                });
            }
            let at = from + random.below(i * window + 1);
            batch.queries.push(Query {
                tokens: piece[at..at + window].to_vec(),
                scored: window - 1,
                kind: Kind::Reconstruction,
                core: i,
                window: i,
            });
        }
        batch.windows = windows;
        Ok(batch)
    }
}

fn nothing(what: &'static str) -> Error {
    Error::NoData {
        what,
        detail: "the recipe draws it, but there is none".to_owned(),
    }
}

#[cfg(test)]
pub(crate) mod tests;
