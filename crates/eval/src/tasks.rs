//! The tasks: rows of a file become cases of context and questions.
//!
//! A task decides what is told and what is asked, never how the context comes to the model. Same rows, same seed: the same cases.
//! Start at [`lay_out`].

mod dialogue;
mod facts;
mod fewshot;
mod passages;
mod qa;
mod text;

use std::{path::Path, sync::Arc};

use clap::builder::PossibleValue;
use lm::TokenId;
use serde::{Deserialize, Serialize};

pub(crate) use self::passages::passages;
use crate::{
    Error,
    prompt::{Document, Frame, Prompts},
};

/// What is asked of an imprint.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Task {
    /// SQuAD v1.1: short answers out of paragraphs, joined up to a context length.
    Squad,
    /// RealTimeQA: questions on news articles, with choices.
    Realtimeqa,
    /// NarrativeQA: questions on summaries of stories.
    Narrativeqa,
    /// FairytaleQA: questions on sections of fairy tales.
    Fairytaleqa,
    /// MetaICL: k examples of a task are the context; options are scored.
    Metaicl,
    /// Multi-Session Chat: the last session is the context, the next utterance of this one is wanted.
    Msc,
    /// PersonaChat: a persona is the context, its next utterance is wanted.
    PersonaChat,
    /// Running text: a span of the context again (reconstruction), and what follows it (completion).
    Text,
    /// Synthetic facts: a value of four digits for an invented name, behind so many facts and so far away.
    Facts,
    /// Contexts that do not concern what is asked: the bare model's answers have to stay. Rows of squad, text or dialogues.
    Interference,
    /// Four documents are told and one is forgotten again. Rows of squad's form.
    Forget,
    /// Questions on the first document after so many windows. Rows of squad's form.
    Stream,
}

impl Task {
    /// All tasks.
    pub const ALL: [Self; 12] = [
        Self::Squad,
        Self::Realtimeqa,
        Self::Narrativeqa,
        Self::Fairytaleqa,
        Self::Metaicl,
        Self::Msc,
        Self::PersonaChat,
        Self::Text,
        Self::Facts,
        Self::Interference,
        Self::Forget,
        Self::Stream,
    ];

    /// Its name in options and reports.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Squad => "squad",
            Self::Realtimeqa => "realtimeqa",
            Self::Narrativeqa => "narrativeqa",
            Self::Fairytaleqa => "fairytaleqa",
            Self::Metaicl => "metaicl",
            Self::Msc => "msc",
            Self::PersonaChat => "persona_chat",
            Self::Text => "text",
            Self::Facts => "facts",
            Self::Interference => "interference",
            Self::Forget => "forget",
            Self::Stream => "stream",
        }
    }
}

impl clap::ValueEnum for Task {
    fn value_variants<'a>() -> &'a [Self] {
        &Self::ALL
    }

    fn to_possible_value(&self) -> Option<PossibleValue> {
        Some(PossibleValue::new(self.name()))
    }
}

/// A context, and what is asked of a model that was told it.
#[derive(Debug)]
pub(crate) struct Case {
    /// In the order in which they are told; each is encoded by itself.
    pub(crate) context: Vec<Arc<Document>>,
    /// What stands around the context in a prompt.
    pub(crate) frame: Frame,
    /// The same with two demonstrations of the answer format, where the task has such.
    pub(crate) styled: Option<Frame>,
    pub(crate) questions: Vec<Question>,
}

/// A question, with all that is needed to judge its answer.
#[derive(Debug)]
pub(crate) struct Question {
    pub(crate) id: String,
    /// The point of a series that it belongs to.
    pub(crate) label: String,
    /// Where that point lies, if it lies anywhere.
    pub(crate) x: Option<f64>,
    /// For people.
    pub(crate) shown: String,
    /// What a passage is looked up with; none where nothing can be looked up.
    pub(crate) query: Option<String>,
    /// What it asks, where it says anything: the imprint is what is meant of it, as when serving. None: all of it at full strength.
    pub(crate) asked: Option<relevance::Asked>,
    /// The end of the prompt.
    pub(crate) body: Vec<TokenId>,
    /// Right answers; the first is scored. None: nothing is generated.
    pub(crate) references: Vec<String>,
    /// The scored answer, with its end.
    pub(crate) answer: Vec<TokenId>,
    /// Answers to choose from.
    pub(crate) options: Vec<Vec<TokenId>>,
    /// The right one of them.
    pub(crate) right: Option<usize>,
    /// At most so many tokens are generated.
    pub(crate) max_tokens: usize,
}

/// What is wanted of a task.
#[derive(Clone, Debug)]
pub(crate) struct Wanted {
    /// Questions for each point of the series.
    pub(crate) limit: usize,
    pub(crate) seed: u64,
    /// Context lengths; empty: the task's own.
    pub(crate) context_tokens: Vec<usize>,
    /// Questions for a context; none: one for each document in it, at most 16.
    pub(crate) questions: Option<usize>,
    /// Examples in a few-shot context.
    pub(crate) shots: Vec<usize>,
    /// Facts in a context.
    pub(crate) facts: Vec<usize>,
    /// Tokens of other text between the facts and the question.
    pub(crate) distance_tokens: usize,
    /// Windows of a stream.
    pub(crate) windows: Vec<usize>,
    /// The share of malformed rows that is put up with.
    pub(crate) max_malformed: f64,
}

/// The cases of a task, and what they were made from.
#[derive(Debug)]
pub(crate) struct LaidOut {
    pub(crate) cases: Vec<Case>,
    pub(crate) malformed: u64,
    /// Of the data file, if there is one.
    pub(crate) digest: Option<String>,
}

/// Makes the cases of a task.
///
/// # Errors
/// The data cannot be read, is of another task, or gives no case.
pub(crate) fn lay_out(
    task: Task,
    data: Option<&Path>,
    wanted: &Wanted,
    prompts: &Prompts<'_>,
) -> Result<LaidOut, Error> {
    let file = || data.ok_or(Error::NoData { task: task.name() });
    let laid_out = match task {
        Task::Facts => LaidOut {
            cases: facts::cases(wanted, prompts)?,
            malformed: 0,
            digest: None,
        },
        Task::Squad | Task::Realtimeqa | Task::Narrativeqa | Task::Fairytaleqa => {
            qa::cases(file()?, wanted, prompts)?
        }
        Task::Stream => qa::stream(file()?, wanted, prompts)?,
        Task::Forget => qa::forget(file()?, wanted, prompts)?,
        Task::Metaicl => fewshot::cases(file()?, wanted, prompts)?,
        Task::Msc => dialogue::msc(file()?, wanted, prompts)?,
        Task::PersonaChat => dialogue::persona_chat(file()?, wanted, prompts)?,
        Task::Text => text::cases(file()?, wanted, prompts)?,
        Task::Interference => interference(file()?, wanted, prompts)?,
    };
    if laid_out.cases.iter().all(|case| case.questions.is_empty()) {
        return Err(Error::TooFew {
            detail: "the rows give no question under these options".to_owned(),
        });
    }
    Ok(laid_out)
}

/// Questions of another task, each with a context that has nothing to do with it. Which task tells the first row.
fn interference(path: &Path, wanted: &Wanted, prompts: &Prompts<'_>) -> Result<LaidOut, Error> {
    #[derive(Deserialize)]
    struct Keys {
        text: Option<serde::de::IgnoredAny>,
        question: Option<serde::de::IgnoredAny>,
        previous_sessions: Option<serde::de::IgnoredAny>,
    }
    let keys = rows::collect(path, 1.0, |line| {
        serde_json::from_str::<Keys>(line).map_err(|error| error.to_string())
    })?;
    let first = keys.rows.first();
    let has = |key: fn(&Keys) -> bool| first.is_some_and(key);
    let mut laid_out = if has(|keys| keys.question.is_some()) {
        qa::cases(path, wanted, prompts)?
    } else {
        let mut laid_out = if has(|keys| keys.text.is_some()) {
            text::cases(path, wanted, prompts)?
        } else if has(|keys| keys.previous_sessions.is_some()) {
            dialogue::msc(path, wanted, prompts)?
        } else {
            dialogue::persona_chat(path, wanted, prompts)?
        };
        // Of a text or a session that was not told, a span is a span, and a fact cannot be known.
        for case in &mut laid_out.cases {
            case.questions.truncate(1);
        }
        laid_out
    };
    let contexts: Vec<_> = laid_out
        .cases
        .iter()
        .map(|case| case.context.clone())
        .collect();
    for (index, case) in laid_out.cases.iter_mut().enumerate() {
        let other = foreign(index, &contexts).ok_or_else(|| Error::TooFew {
            detail: "a context that does not concern the question takes a second case".to_owned(),
        })?;
        case.context.clone_from(&contexts[other]);
        for question in &mut case.questions {
            question.label = "irrelevant".to_owned();
            question.x = None;
        }
    }
    Ok(laid_out)
}

/// The next context in turn that shares no document with this one's.
pub(crate) fn foreign(index: usize, contexts: &[Vec<Arc<Document>>]) -> Option<usize> {
    let own = contexts.get(index)?;
    let shares = |other: &[Arc<Document>]| {
        other
            .iter()
            .any(|a| own.iter().any(|b| Arc::ptr_eq(a, b) || a.text == b.text))
    };
    (1..contexts.len())
        .map(|step| (index + step) % contexts.len())
        .find(|&other| !shares(&contexts[other]))
}

#[cfg(test)]
mod tests;
