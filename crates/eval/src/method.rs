//! The methods: how a context comes to the model, and the controls.
//!
//! Only what each puts where; who computes it is `run`'s matter. Start at [`Method`].

use clap::builder::PossibleValue;
use serde::{Deserialize, Serialize};

/// A way to bring a context to the frozen model.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Method {
    /// Not at all: the question alone.
    None,
    /// The question alone, behind two demonstrations of the answer format.
    NoneStyled,
    /// The context in the prompt; its newest tokens where not all fit the model's window.
    InContext,
    /// The same with the two demonstrations between context and question.
    InContextStyled,
    /// The context as an imprint, the question alone in the prompt.
    Imprint,
    /// Another case's context as an imprint: what remains there is style, not knowledge.
    ImprintForeign,
    /// Another case's context in the prompt.
    InContextForeign,
    /// The imprint, and one passage of the context in the prompt, found by BM25.
    ImprintSnippet,
    /// That passage in the prompt, without an imprint.
    Bm25,
    /// The newest tokens of the context in the prompt, as many as cost what the imprint costs: reading the context once, shared
    /// by the case's questions, and answering one of them.
    InContextTruncated,
    /// The context by gradient descent: a fresh low-rank adapter of the imprint's rank and places takes some steps of AdamW on the
    /// context's own tokens, the question alone in the prompt. How many steps is tuned on other cases.
    Lora,
}

/// Whose context.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Whose {
    Own,
    Foreign,
}

/// What of a context is in the prompt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Prompted {
    Nothing,
    Context(Whose),
    Passage,
    /// As much as costs what the imprint costs.
    Truncated,
}

impl Method {
    /// All methods, in the order of tables.
    pub const ALL: [Self; 11] = [
        Self::None,
        Self::NoneStyled,
        Self::InContext,
        Self::InContextStyled,
        Self::InContextForeign,
        Self::InContextTruncated,
        Self::Bm25,
        Self::Imprint,
        Self::ImprintForeign,
        Self::ImprintSnippet,
        Self::Lora,
    ];

    /// Its name in options, reports and tables.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::NoneStyled => "none_styled",
            Self::InContext => "in_context",
            Self::InContextStyled => "in_context_styled",
            Self::InContextForeign => "in_context_foreign",
            Self::InContextTruncated => "in_context_truncated",
            Self::Bm25 => "bm25",
            Self::Imprint => "imprint",
            Self::ImprintForeign => "imprint_foreign",
            Self::ImprintSnippet => "imprint_snippet",
            Self::Lora => "lora",
        }
    }

    /// Whose imprint the model runs with.
    pub(crate) fn imprint(self) -> Option<Whose> {
        match self {
            Self::Imprint | Self::ImprintSnippet => Some(Whose::Own),
            Self::ImprintForeign => Some(Whose::Foreign),
            Self::None
            | Self::NoneStyled
            | Self::InContext
            | Self::InContextStyled
            | Self::InContextForeign
            | Self::InContextTruncated
            | Self::Bm25
            | Self::Lora => None,
        }
    }

    /// What of a context its prompt holds.
    pub(crate) fn prompted(self) -> Prompted {
        match self {
            Self::None | Self::NoneStyled | Self::Imprint | Self::ImprintForeign | Self::Lora => {
                Prompted::Nothing
            }
            Self::InContext | Self::InContextStyled => Prompted::Context(Whose::Own),
            Self::InContextForeign => Prompted::Context(Whose::Foreign),
            Self::Bm25 | Self::ImprintSnippet => Prompted::Passage,
            Self::InContextTruncated => Prompted::Truncated,
        }
    }

    /// Whether two demonstrations of the answer format stand in front of the question.
    pub(crate) fn styled(self) -> bool {
        matches!(self, Self::NoneStyled | Self::InContextStyled)
    }

    /// Whether it asks what `none` asks, of an adapted model: then their distributions can be compared.
    pub(crate) fn compares_to_bare(self) -> bool {
        matches!(self, Self::Imprint | Self::ImprintForeign | Self::Lora)
    }

    /// Whether it takes a generator: one that writes, or one that says what the imprint costs, or where and of what rank it is.
    pub(crate) fn takes_generator(self) -> bool {
        self.imprint().is_some() || matches!(self, Self::InContextTruncated | Self::Lora)
    }

    /// Whether it follows gradients.
    pub(crate) fn trains(self) -> bool {
        self == Self::Lora
    }

    /// Whether it takes so long that it has to be asked for.
    pub(crate) fn on_demand(self) -> bool {
        self == Self::Lora
    }
}

impl clap::ValueEnum for Method {
    fn value_variants<'a>() -> &'a [Self] {
        &Self::ALL
    }

    fn to_possible_value(&self) -> Option<PossibleValue> {
        Some(PossibleValue::new(self.name()))
    }
}
