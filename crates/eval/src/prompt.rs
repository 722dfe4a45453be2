//! From texts to tokens: documents, questions, answers, and what stands in front of them.
//!
//! A prompt is `head ++ context ++ between ++ body`, whatever the form: so a context's tokens are the same in a plain prompt, in
//! a chat and on their way into an imprint. Start at [`Prompts`].

use clap::ValueEnum;
use generator::Generator;
use lm::{
    TokenId,
    text::{Message, Text},
};
use relevance::Asked;
use serde::{Deserialize, Serialize};

use crate::Error;

/// How a question is put.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ValueEnum)]
#[serde(rename_all = "snake_case")]
pub enum Form {
    /// In the generator's own prompt format; an answer ends at a line's end.
    #[default]
    Plain,
    /// As a user's message under the model's chat template; an answer ends with the end of the turn.
    Chat,
}

/// What is told of at once.
#[derive(Debug)]
pub(crate) struct Document {
    pub(crate) text: String,
    /// Tokens of the text and of the generator's document suffix; no BOS.
    pub(crate) tokens: Vec<TokenId>,
}

/// What stands around the context.
#[derive(Clone, Debug, Default)]
pub(crate) struct Frame {
    /// In front of it.
    pub(crate) head: Vec<TokenId>,
    /// Behind it.
    pub(crate) between: Vec<TokenId>,
}

/// The prompt format of models without a generator.
const FORMAT: &str = "Question: {question}\nAnswer:";

/// Makes tokens of texts for one model.
pub(crate) struct Prompts<'a> {
    text: &'a Text,
    form: Form,
    format: String,
    suffix: String,
    bos: Vec<TokenId>,
}

impl<'a> Prompts<'a> {
    /// For a model, with the conventions of its generator if it has one.
    pub(crate) fn new(text: &'a Text, generator: Option<&Generator>, form: Form) -> Self {
        let config = generator.map(Generator::config);
        let bos = config
            .and_then(|config| config.bos)
            .unwrap_or_else(|| text.adds_bos());
        Self {
            text,
            form,
            format: config
                .and_then(|config| config.prompt_format.clone())
                .filter(|format| format.contains("{question}"))
                .unwrap_or_else(|| FORMAT.to_owned()),
            suffix: config.map_or_else(
                || "\n\n".to_owned(),
                |config| config.document_suffix.clone(),
            ),
            bos: text.bos().filter(|_| bos).into_iter().collect(),
        }
    }

    /// What context windows begin with.
    pub(crate) fn bos(&self) -> &[TokenId] {
        &self.bos
    }

    /// Tokens of a text by itself.
    pub(crate) fn tokens(&self, text: &str) -> Result<Vec<TokenId>, Error> {
        Ok(self.text.encode_plain(text)?)
    }

    /// The text of tokens.
    pub(crate) fn text(&self, tokens: &[TokenId]) -> Result<String, Error> {
        Ok(self.text.decode(tokens)?)
    }

    /// A document as a session would be told it.
    pub(crate) fn document(&self, text: &str) -> Result<Document, Error> {
        let text = text.trim();
        Ok(Document {
            text: text.to_owned(),
            tokens: self.tokens(&format!("{text}{}", self.suffix))?,
        })
    }

    /// A question in the generator's own format, as text.
    pub(crate) fn asked(&self, question: &str) -> String {
        self.format.replace("{question}", question.trim())
    }

    /// What a question's prompt ends with.
    pub(crate) fn question(&self, question: &str) -> Result<Vec<TokenId>, Error> {
        let question = question.trim();
        match self.form {
            Form::Plain => self.tokens(&self.asked(question)),
            Form::Chat => Ok(self.chat(&[], question)?.1),
        }
    }

    /// What such a prompt asks, to be held against what was told.
    pub(crate) fn asks(&self, question: &str) -> Asked {
        let label = match self.form {
            Form::Plain => Some(self.format.as_str()),
            Form::Chat => None,
        };
        Asked::new([question].into_iter(), label)
    }

    /// An answer behind that prompt, with its end.
    pub(crate) fn answer(&self, answer: &str) -> Result<Vec<TokenId>, Error> {
        let answer = answer.trim();
        match self.form {
            Form::Plain => self.tokens(&format!(" {answer}\n")),
            Form::Chat => {
                let mut tokens = self.tokens(answer)?;
                tokens.extend(self.text.eos());
                Ok(tokens)
            }
        }
    }

    /// What stands around a context in front of a question.
    pub(crate) fn frame(&self) -> Result<Frame, Error> {
        self.styled(&[])
    }

    /// The same with demonstrations: questions with their answers, between context and question; under a chat template, whose
    /// context is part of the last message, as turns before it.
    pub(crate) fn styled(&self, demonstrations: &[(String, String)]) -> Result<Frame, Error> {
        match self.form {
            Form::Plain => {
                let shown = demonstrations.iter().map(|(question, answer)| {
                    format!("{} {}\n\n", self.asked(question), answer.trim())
                });
                Ok(Frame {
                    head: self.bos.clone(),
                    between: self.tokens(&shown.collect::<String>())?,
                })
            }
            Form::Chat => Ok(Frame {
                head: self.chat(demonstrations, "?")?.0,
                between: Vec::new(),
            }),
        }
    }

    /// What stands around a context where no template is used whatever the form: continuations of text and of dialogues.
    pub(crate) fn bare_frame(&self) -> Frame {
        Frame {
            head: self.bos.clone(),
            between: Vec::new(),
        }
    }

    /// A conversation's tokens, cut where its last message's content begins.
    fn chat(
        &self,
        turns: &[(String, String)],
        last: &str,
    ) -> Result<(Vec<TokenId>, Vec<TokenId>), Error> {
        let message = |role: &str, content: &str| Message {
            role: role.to_owned(),
            content: content.trim().to_owned(),
        };
        let mut messages = Vec::new();
        for (question, answer) in turns {
            messages.push(message("user", question));
            messages.push(message("assistant", answer));
        }
        messages.push(message("user", last));
        let tokens = self.text.encode_chat(&messages)?;
        let content = self.tokens(last)?;
        let place = tokens
            .windows(content.len().max(1))
            .rposition(|part| part == content)
            .ok_or_else(|| Error::Option {
                option: "--form",
                detail: "the chat template changes what a message says".to_owned(),
            })?;
        let body = tokens[place..].to_vec();
        Ok((tokens[..place].to_vec(), body))
    }
}
