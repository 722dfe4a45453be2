//! The training rows that a run draws from, tokenised: pieces of text, and contexts with their questions.
//!
//! Read once from the files, held against what is held out, split by hash into training and validation, and kept in
//! a cache of tokens. What is drawn when is `batch`'s matter. Start at [`Pool::load`].

mod cache;
mod dialogues;
mod fewshot;

use std::{collections::HashMap, path::Path};

use lm::text::{Message, Text, TokenId};
use rayon::prelude::*;
use serde_json::{Map, Value};

use crate::{Error, held_out::HeldOut, random::Random, recipe::Recipe};

/// One in so many documents and contexts is for validation.
const VALIDATION: u64 = 64;
/// Texts that are tokenised before progress is told.
const CHUNK: usize = 512;

/// A question with its answer, ready to be asked: `tokens` end with the answer, `scored` of them are its.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Question {
    pub(crate) tokens: Vec<TokenId>,
    pub(crate) scored: usize,
}

/// A paragraph and what is asked about it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Asked {
    pub(crate) context: Vec<TokenId>,
    pub(crate) questions: Vec<Question>,
}

/// Rows of one use.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Split {
    pub(crate) pieces: Vec<Vec<TokenId>>,
    pub(crate) asked: Vec<Asked>,
    /// What was said before, and what is said then.
    pub(crate) dialogues: Vec<Asked>,
    /// Examples of a task, and more of its inputs.
    pub(crate) fewshot: Vec<Asked>,
}

/// What a run draws from.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Pool {
    pub(crate) train: Split,
    pub(crate) validation: Split,
    pub(crate) told: Told,
}

/// What became of the rows.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub(crate) struct Told {
    pub(crate) rows: u64,
    pub(crate) malformed: u64,
    pub(crate) held_out: u64,
}

/// How text is put.
#[derive(Clone)]
pub(crate) struct Format {
    pub(crate) text: Text,
    /// `Question: {question}\nAnswer:`
    pub(crate) prompt: String,
    /// Tokens of a window.
    pub(crate) window: usize,
    pub(crate) query: usize,
    pub(crate) suffix: String,
}

impl Format {
    /// A context as it is read: cut to a window, behind it the suffix.
    pub(crate) fn context(&self, text: &str) -> Result<Vec<TokenId>, Error> {
        let mut tokens = self.text.encode_plain(text)?;
        tokens.extend(self.text.encode_plain(&self.suffix)?);
        tokens.truncate(self.window);
        Ok(tokens)
    }

    /// A question in the checkpoint's own prompt or in the chat template, with its answer. A prompt that is too long
    /// loses its beginning, an answer its end.
    pub(crate) fn question(
        &self,
        question: &str,
        answer: &str,
        chat: bool,
    ) -> Result<Question, Error> {
        let (mut prompt, mut reply) = if chat {
            let said = Message {
                role: "user".to_owned(),
                content: question.to_owned(),
            };
            let mut reply = self.text.encode_plain(answer)?;
            reply.extend(self.text.eos());
            (self.text.encode_chat(&[said])?, reply)
        } else {
            let prompt = self.prompt.replace("{question}", question);
            (
                self.text.encode_plain(&prompt)?,
                self.text.encode_plain(&format!(" {answer}\n"))?,
            )
        };
        // The template's own text is not the question's: it does not count.
        let room = if chat { self.query + 64 } else { self.query };
        reply.truncate(room / 3);
        let most = room - reply.len();
        if prompt.len() > most {
            prompt.drain(..prompt.len() - most);
        }
        let scored = reply.len();
        prompt.extend(reply);
        Ok(Question {
            tokens: prompt,
            scored,
        })
    }

    /// A context with its questions; `None` if it may have been cut, and an answer with it.
    fn asked(
        &self,
        context: &str,
        questions: &[(String, String)],
        chats: &[bool],
    ) -> Result<Option<Asked>, Error> {
        let context = self.context(context)?;
        if context.len() == self.window {
            return Ok(None);
        }
        let questions = questions
            .iter()
            .zip(chats)
            .map(|((question, answer), chat)| self.question(question, answer, *chat))
            .collect::<Result<_, Error>>()?;
        Ok(Some(Asked { context, questions }))
    }

    /// What a continuation is asked by: `tokens` end with `reply`, all of which is scored.
    pub(crate) fn continuation(&self, prompt: &str, reply: &str) -> Result<Question, Error> {
        let mut tokens = self.text.encode_plain(prompt)?;
        let mut reply = self.text.encode_plain(reply)?;
        reply.truncate(self.query / 3);
        let most = self.query - reply.len();
        if tokens.len() > most {
            tokens.drain(..tokens.len() - most);
        }
        let scored = reply.len();
        tokens.extend(reply);
        Ok(Question { tokens, scored })
    }
}

fn string<'a>(row: &'a Map<String, Value>, key: &str) -> Result<&'a str, String> {
    match row.get(key) {
        Some(Value::String(text)) => Ok(text),
        Some(_) => Err(format!("`{key}` is no string")),
        None => Err(format!("no `{key}`")),
    }
}

/// A stable number of a text.
fn number(text: &str) -> u64 {
    let hash = blake3::hash(text.as_bytes());
    hash.as_bytes()
        .as_chunks::<8>()
        .0
        .first()
        .map_or(0, |word| u64::from_le_bytes(*word))
}

/// Whether a document or context is for validation.
fn validates(text: &str) -> bool {
    number(text).is_multiple_of(VALIDATION)
}

impl Pool {
    /// Reads the recipe's files, or the cache in `home` of an earlier reading. `base`: digest of the base, whose
    /// tokenizer this is. `tell` hears what is going on.
    pub(crate) fn load(
        recipe: &Recipe,
        folder: &Path,
        format: &Format,
        base: &str,
        home: &Path,
        tell: &dyn Fn(&str),
    ) -> Result<Self, Error> {
        let held_out = recipe.data.held_out.as_ref().map(|path| folder.join(path));
        let data = &recipe.data;
        let mut key = blake3::Hasher::new();
        let same = serde_json::json!([
            base,
            recipe.seed,
            data.malformed,
            data.pieces,
            data.piece_chars,
            data.pieces_per_document,
            data.qa_contexts,
            data.qa_chars,
            data.answer_chars,
            data.questions,
            data.dialogue_contexts,
            data.fewshot_contexts,
            data.thin,
            data.chat,
            format.prompt,
            format.window,
            format.query,
            format.suffix,
            data.held_out,
        ]);
        key.update(same.to_string().as_bytes());
        let mut files = Vec::new();
        for name in [&data.corpus, &data.qa, &data.dialogues, &data.fewshot] {
            let Some(name) = name else {
                key.update(b"none");
                continue;
            };
            let path = folder.join(name);
            let digest = rows::digest(&path)?;
            key.update(digest.as_bytes());
            files.push((path, digest));
        }
        let held_out = HeldOut::of(held_out.as_deref())?;
        for (path, digest) in &files {
            held_out.refuse(path, digest)?;
        }
        key.update(held_out.digest().as_bytes());
        let cached = home
            .join("tokens")
            .join(format!("{}.bin", key.finalize().to_hex()));
        if let Some(pool) = cache::read(&cached) {
            tell(&format!("tokens from {}", cached.display()));
            return Ok(pool);
        }
        let mut pool = Self::default();
        if let Some(name) = &data.corpus {
            pool.corpus(recipe, &folder.join(name), format, &held_out, tell)?;
        }
        if let Some(name) = &data.qa {
            pool.qa(recipe, &folder.join(name), format, &held_out, tell)?;
        }
        if let Some(name) = &data.dialogues {
            tell("tokenising dialogues");
            pool.dialogues(recipe, &folder.join(name), format, &held_out)?;
        }
        if let Some(name) = &data.fewshot {
            tell("tokenising few-shot tasks");
            pool.fewshot(recipe, &folder.join(name), format, &held_out)?;
        }
        if let Err(error) = cache::write(&cached, &pool) {
            // A cache that cannot be kept costs time, nothing else.
            tell(&format!("tokens are not kept: {error}"));
        }
        Ok(pool)
    }

    /// Counts the rows of a file; refuses it if most of them are held out.
    fn count(
        &mut self,
        path: &Path,
        held_out: &HeldOut,
        dropped: u64,
        count: rows::Count,
    ) -> Result<(), Error> {
        held_out.refuse_share(path, dropped, count.rows)?;
        self.told.rows += count.rows;
        self.told.malformed += count.malformed;
        self.told.held_out += dropped;
        Ok(())
    }

    fn corpus(
        &mut self,
        recipe: &Recipe,
        path: &Path,
        format: &Format,
        held_out: &HeldOut,
        tell: &dyn Fn(&str),
    ) -> Result<(), Error> {
        let data = &recipe.data;
        let mut random = Random::new(recipe.seed, "corpus");
        let mut pieces: Vec<(bool, String)> = Vec::new();
        let mut dropped = 0;
        let count = rows::read(path, data.malformed, |row| {
            let text = string(row, "text")?;
            if held_out.has(text) {
                dropped += 1;
                return Ok(());
            }
            // One piece for each four that would fit, from anywhere in the document.
            let chars = text.chars().count();
            let wanted = (chars / (4 * data.piece_chars)).clamp(1, data.pieces_per_document.max(1));
            let bounds: Vec<usize> = text.char_indices().map(|(at, _)| at).collect();
            for _ in 0..wanted {
                let from = random.below(chars.saturating_sub(data.piece_chars).max(1));
                let until = (from + data.piece_chars).min(chars);
                let at = |index: usize| bounds.get(index).copied().unwrap_or(text.len());
                pieces.push((validates(text), text[at(from)..at(until)].to_owned()));
            }
            Ok(())
        })?;
        self.count(path, held_out, dropped, count)?;
        random.shuffle(&mut pieces);
        let (mut validation, mut train): (Vec<_>, Vec<_>) =
            pieces.into_iter().partition(|(validates, _)| *validates);
        train.truncate(data.pieces);
        validation.truncate(256);
        // Long enough for a window and two queries behind it.
        let least = format.window + 2 * format.query;
        let total = train.len() + validation.len();
        let mut done = 0;
        for (pieces, split) in [
            (&train, &mut self.train),
            (&validation, &mut self.validation),
        ] {
            for chunk in pieces.chunks(CHUNK) {
                tell(&format!("tokenising text, {done} of {total} pieces"));
                let tokens: Vec<_> = chunk
                    .par_iter()
                    .map(|(_, text)| format.text.encode_plain(text))
                    .collect::<Result<_, _>>()?;
                split
                    .pieces
                    .extend(tokens.into_iter().filter(|tokens| tokens.len() >= least));
                done += chunk.len();
            }
        }
        if self.train.pieces.len() < 2 || self.validation.pieces.len() < 2 {
            return Err(Error::NoData {
                what: "text",
                detail: format!(
                    "{} has {} pieces of at least {least} tokens to train on and {} to validate with",
                    path.display(),
                    self.train.pieces.len(),
                    self.validation.pieces.len()
                ),
            });
        }
        Ok(())
    }

    fn qa(
        &mut self,
        recipe: &Recipe,
        path: &Path,
        format: &Format,
        held_out: &HeldOut,
        tell: &dyn Fn(&str),
    ) -> Result<(), Error> {
        let data = &recipe.data;
        // Contexts in the order of the file, each with its questions.
        let mut places: HashMap<String, usize> = HashMap::new();
        let mut contexts: Vec<(String, Vec<(String, String)>)> = Vec::new();
        let mut dropped = 0;
        let count = rows::read(path, data.malformed, |row| {
            let context = string(row, "context")?.trim();
            let question = string(row, "question")?.trim();
            let answer = match row.get("answers").or_else(|| row.get("answer")) {
                Some(Value::String(answer)) => answer.as_str(),
                Some(Value::Array(answers)) => match answers.first() {
                    Some(Value::String(answer)) => answer.as_str(),
                    Some(_) => return Err("an answer is no string".to_owned()),
                    None => "",
                },
                Some(_) | None => return Err("no `answers`".to_owned()),
            };
            if held_out.has(context) || held_out.has(question) {
                dropped += 1;
                return Ok(());
            }
            let share = row
                .get("task")
                .and_then(Value::as_str)
                .and_then(|task| data.thin.get(task));
            // By the context, so that a paragraph is kept or left as a whole.
            if share.is_some_and(|share| number(context) as f64 / u64::MAX as f64 >= *share) {
                return Ok(());
            }
            let chars = context.chars().count();
            let answer = answer.trim();
            if !(data.qa_chars[0]..=data.qa_chars[1]).contains(&chars)
                || answer.is_empty()
                || question.is_empty()
                || answer.chars().count() > data.answer_chars
            {
                return Ok(());
            }
            let place = *places.entry(context.to_owned()).or_insert_with(|| {
                contexts.push((context.to_owned(), Vec::new()));
                contexts.len() - 1
            });
            contexts[place]
                .1
                .push((question.to_owned(), answer.to_owned()));
            Ok(())
        })?;
        self.count(path, held_out, dropped, count)?;
        let mut random = Random::new(recipe.seed, "qa");
        random.shuffle(&mut contexts);
        let (mut validation, mut train): (Vec<_>, Vec<_>) = contexts
            .into_iter()
            .partition(|(context, _)| validates(context));
        train.truncate(data.qa_contexts);
        validation.truncate(512);
        let total = train.len() + validation.len();
        let mut done = 0;
        for (mut contexts, split) in [(train, &mut self.train), (validation, &mut self.validation)]
        {
            // What is drawn is drawn in order, the tokenising then shared out.
            let mut chats: Vec<Vec<bool>> = Vec::with_capacity(contexts.len());
            for (_, questions) in &mut contexts {
                random.shuffle(questions);
                questions.truncate(data.questions);
                chats.push(questions.iter().map(|_| random.chance(data.chat)).collect());
            }
            for (contexts, chats) in contexts.chunks(CHUNK).zip(chats.chunks(CHUNK)) {
                tell(&format!("tokenising questions, {done} of {total} contexts"));
                done += contexts.len();
                let asked: Vec<Option<Asked>> = contexts
                    .par_iter()
                    .zip(chats)
                    .map(|((context, questions), chats)| format.asked(context, questions, chats))
                    .collect::<Result<_, Error>>()?;
                split.asked.extend(asked.into_iter().flatten());
            }
        }
        if self.train.asked.is_empty() || self.validation.asked.is_empty() {
            return Err(Error::NoData {
                what: "questions",
                detail: format!("{} has too few that fit into a window", path.display()),
            });
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests;
