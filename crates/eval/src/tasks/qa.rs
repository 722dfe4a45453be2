//! Questions on documents: squad, realtimeqa, narrativeqa, fairytaleqa, and the streams and forgetting made of them.
//!
//! Rows of the same context are one document. Start at [`cases`].

use std::{collections::HashMap, path::Path, sync::Arc};

use serde::Deserialize;

use super::{Case, LaidOut, Question, Wanted};
use crate::{
    Error,
    prompt::{Document, Prompts},
    random::Draws,
};

/// Tokens of an answer at most.
const ANSWER: usize = 16;
/// Questions for one context, where nobody says how many.
const QUESTIONS: usize = 16;
/// A context of at most so many tokens is one document alone, as in the study behind the first generator.
const ALONE: usize = 256;
/// Documents of a forgetting case.
const TOLD: usize = 4;

#[derive(Deserialize)]
struct Row {
    id: Option<String>,
    context: String,
    question: String,
    answers: Vec<String>,
    #[serde(default)]
    choices: Vec<String>,
    #[serde(default)]
    answer_idx: Vec<usize>,
}

fn parse(line: &str) -> Result<Row, String> {
    let row: Row = serde_json::from_str(line).map_err(|error| error.to_string())?;
    let empty = |text: &str| text.trim().is_empty();
    if empty(&row.context) || empty(&row.question) {
        return Err("context or question is empty".to_owned());
    }
    if row.answers.first().is_none_or(|answer| empty(answer)) {
        return Err("there is no answer".to_owned());
    }
    if row
        .answer_idx
        .iter()
        .any(|&index| index >= row.choices.len())
    {
        return Err("answer_idx names no choice".to_owned());
    }
    Ok(row)
}

/// A document and what is asked about it.
struct Asked {
    document: Arc<Document>,
    rows: Vec<Row>,
}

/// A file's documents, in an order drawn by the seed, as are each one's questions.
struct Library {
    documents: Vec<Asked>,
    malformed: u64,
    digest: String,
}

impl Library {
    fn read(path: &Path, wanted: &Wanted, prompts: &Prompts<'_>) -> Result<Self, Error> {
        let file = rows::collect(path, wanted.max_malformed, parse)?;
        let mut places: HashMap<String, usize> = HashMap::new();
        let mut documents: Vec<Asked> = Vec::new();
        for row in file.rows {
            let context = row.context.trim();
            let place = match places.get(context) {
                Some(&place) => place,
                None => {
                    places.insert(context.to_owned(), documents.len());
                    documents.push(Asked {
                        document: Arc::new(prompts.document(context)?),
                        rows: Vec::new(),
                    });
                    documents.len() - 1
                }
            };
            documents[place].rows.push(row);
        }
        let mut draws = Draws::new(wanted.seed, "documents");
        draws.shuffle(&mut documents);
        for asked in &mut documents {
            draws.shuffle(&mut asked.rows);
        }
        Ok(Self {
            documents,
            malformed: file.malformed,
            digest: file.digest.to_hex().to_string(),
        })
    }

    fn laid_out(self, cases: Vec<Case>) -> LaidOut {
        LaidOut {
            cases,
            malformed: self.malformed,
            digest: Some(self.digest),
        }
    }

    /// A case with so many of the questions on `about`, in turns; demonstrations come from documents that are not told.
    #[expect(
        clippy::too_many_arguments,
        reason = "what is told, what is asked and how it is labelled are three things"
    )]
    fn case(
        &self,
        told: &[usize],
        about: &[usize],
        most: usize,
        label: &str,
        x: Option<f64>,
        draws: &mut Draws,
        prompts: &Prompts<'_>,
    ) -> Result<Case, Error> {
        let mut questions = Vec::new();
        let rounds = about
            .iter()
            .map(|&place| self.documents[place].rows.len())
            .max()
            .unwrap_or(0);
        for round in 0..rounds {
            for &place in about {
                if let Some(row) = self.documents[place].rows.get(round)
                    && questions.len() < most
                {
                    questions.push(question(row, label, x, prompts)?);
                }
            }
        }
        let frame = prompts.frame()?;
        let styled = match self.demonstrations(told, about, draws) {
            Some(shown) => Some(prompts.styled(&shown)?),
            None => None,
        };
        Ok(Case {
            context: told
                .iter()
                .map(|&place| Arc::clone(&self.documents[place].document))
                .collect(),
            frame,
            styled,
            questions,
        })
    }

    /// Two questions with their answers, of two documents that are neither told nor asked about.
    fn demonstrations(
        &self,
        told: &[usize],
        about: &[usize],
        draws: &mut Draws,
    ) -> Option<Vec<(String, String)>> {
        let free: Vec<usize> = (0..self.documents.len())
            .filter(|place| !told.contains(place) && !about.contains(place))
            .collect();
        if free.len() < 2 {
            return None;
        }
        let first = draws.below(free.len());
        let second = (first + 1 + draws.below(free.len() - 1)) % free.len();
        let mut show = |place: usize| {
            let row = draws.pick(&self.documents[free[place]].rows)?;
            Some((row.question.clone(), row.answers.first()?.clone()))
        };
        Some(vec![show(first)?, show(second)?])
    }

    /// Places of the documents that are no longer than a window.
    fn of_one_window(&self) -> Vec<usize> {
        (0..self.documents.len())
            .filter(|&place| self.tokens(place) <= ALONE)
            .collect()
    }

    fn tokens(&self, place: usize) -> usize {
        self.documents[place].document.tokens.len()
    }
}

fn question(
    row: &Row,
    label: &str,
    x: Option<f64>,
    prompts: &Prompts<'_>,
) -> Result<Question, Error> {
    let answer = row.answers.first().map_or("", String::as_str);
    let options = row
        .choices
        .iter()
        .map(|choice| prompts.answer(choice))
        .collect::<Result<_, _>>()?;
    Ok(Question {
        id: row.id.clone().unwrap_or_default(),
        label: label.to_owned(),
        x,
        shown: row.question.trim().to_owned(),
        query: Some(row.question.clone()),
        asked: Some(prompts.asks(&row.question)),
        body: prompts.question(&row.question)?,
        references: row.answers.clone(),
        answer: prompts.answer(answer)?,
        options,
        right: row.answer_idx.first().copied(),
        max_tokens: ANSWER,
    })
}

/// Documents joined up to each context length; without a length, each document alone. The limit counts questions of a length.
#[expect(
    clippy::cast_precision_loss,
    reason = "context lengths are far below 2^52"
)]
pub(super) fn cases(path: &Path, wanted: &Wanted, prompts: &Prompts<'_>) -> Result<LaidOut, Error> {
    let library = Library::read(path, wanted, prompts)?;
    let mut cases = Vec::new();
    let lengths: Vec<Option<usize>> = if wanted.context_tokens.is_empty() {
        vec![None]
    } else {
        wanted.context_tokens.iter().copied().map(Some).collect()
    };
    for length in lengths {
        let mut draws = Draws::new(wanted.seed, "demonstrations");
        let label = length.map_or_else(|| "alone".to_owned(), |n| format!("{n} tokens"));
        let x = length.map(|n| n as f64);
        let mut asked = 0;
        for told in groups(&library, length) {
            if asked >= wanted.limit {
                break;
            }
            let most = wanted.questions.unwrap_or(told.len().min(QUESTIONS));
            let most = most.min(wanted.limit - asked);
            let case = library.case(&told, &told, most, &label, x, &mut draws, prompts)?;
            asked += case.questions.len();
            cases.push(case);
        }
    }
    Ok(library.laid_out(cases))
}

/// Places of the documents of each context. No document is in two contexts of one length.
fn groups(library: &Library, length: Option<usize>) -> Vec<Vec<usize>> {
    let count = library.documents.len();
    let Some(length) = length else {
        return (0..count).map(|place| vec![place]).collect();
    };
    let fitting = (0..count).filter(|&place| library.tokens(place) <= length);
    if length <= ALONE {
        return fitting.map(|place| vec![place]).collect();
    }
    let mut groups = Vec::new();
    let (mut group, mut tokens) = (Vec::new(), 0);
    for place in fitting {
        if tokens + library.tokens(place) > length {
            groups.push(std::mem::take(&mut group));
            tokens = 0;
        }
        tokens += library.tokens(place);
        group.push(place);
    }
    // What is left over is no context of that length, unless it is all that there is.
    if groups.is_empty() || tokens * 4 >= length * 3 {
        groups.push(group);
    }
    groups.retain(|group| !group.is_empty());
    groups
}

/// The questions on the first document, after it alone and after so many further ones of one window each.
#[expect(
    clippy::cast_precision_loss,
    reason = "window counts are far below 2^52"
)]
pub(super) fn stream(
    path: &Path,
    wanted: &Wanted,
    prompts: &Prompts<'_>,
) -> Result<LaidOut, Error> {
    let library = Library::read(path, wanted, prompts)?;
    let fitting = library.of_one_window();
    let longest = wanted.windows.iter().copied().max().unwrap_or(1);
    if longest == 0 || longest > fitting.len() {
        return Err(Error::Option {
            option: "--windows",
            detail: format!("there are {} documents of one window", fitting.len()),
        });
    }
    let each = wanted.questions.unwrap_or(2);
    let mut cases = Vec::new();
    for &windows in &wanted.windows {
        let mut draws = Draws::new(wanted.seed, "demonstrations");
        let label = format!("{windows} windows");
        let mut asked = 0;
        for start in 0..fitting.len() {
            if asked >= wanted.limit {
                break;
            }
            // The first documents are those of the other lengths too: points of the series differ by nothing else.
            let told: Vec<usize> = (0..windows.max(1))
                .map(|step| fitting[(start * longest + step) % fitting.len()])
                .collect();
            let most = each.min(wanted.limit - asked);
            let x = Some(windows as f64);
            let case = library.case(&told, &told[..1], most, &label, x, &mut draws, prompts)?;
            asked += case.questions.len();
            cases.push(case);
        }
    }
    Ok(library.laid_out(cases))
}

/// Four documents: the questions on one of them while all are told (`told`), and once it is forgotten (`forgotten`); those on the
/// others afterwards (`kept`). What a session folds after forgetting is the sum of the others, so that is what is told here.
pub(super) fn forget(
    path: &Path,
    wanted: &Wanted,
    prompts: &Prompts<'_>,
) -> Result<LaidOut, Error> {
    let library = Library::read(path, wanted, prompts)?;
    let fitting = library.of_one_window();
    let mut draws = Draws::new(wanted.seed, "demonstrations");
    let (mut cases, mut asked) = (Vec::new(), 0);
    for told in fitting.chunks_exact(TOLD) {
        if asked >= wanted.limit {
            break;
        }
        let (forgotten, kept) = told.split_at(1);
        let parts = [
            ("told", told, forgotten),
            ("forgotten", kept, forgotten),
            ("kept", kept, &kept[..1]),
        ];
        for (label, told, about) in parts {
            cases.push(library.case(told, about, 1, label, None, &mut draws, prompts)?);
        }
        asked += 1;
    }
    Ok(library.laid_out(cases))
}
